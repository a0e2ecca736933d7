"""Standings and verdicts: computed from measured cells, and right where the answer is known."""

import math
import random

import pytest

from lib.evaluation.paired import Interval, envelope, perplexity_ratio
from lib.suite import claims
from lib.suite.claim import (
    BELOW,
    CONTRADICTED,
    REPRODUCED,
    UNDECIDED,
    UNTESTABLE,
    Claim,
    Evidence,
    accuracy,
    exactly,
    judge,
    ratio,
    shown,
)
from lib.suite.results import RAW, raw_frame
from lib.suite.standing import BEHIND, FIRST, LEVEL, SEEMS_BEHIND, leaders, paired, standings

TOKENS, WINDOWS = 31, 60


def cell(shift: float, seed: int = 0, noise: float = 0.02, windows: int = WINDOWS, right: list[bool] | None = None) -> dict:
    """A measured cell whose log-perplexity is `shift` above windows that all cells share, with noise of its own."""
    hard, own = random.Random(99), random.Random(seed)
    losses = [TOKENS * (3 + hard.gauss(0, 0.5) + shift + own.gauss(0, noise)) for _ in range(WINDOWS)]
    losses = losses[:: WINDOWS // windows]
    value = math.exp(sum(losses) / len(losses) / TOKENS)
    asked = [] if right is None else [{"task": "toy", "acc": sum(right) / len(right), "correct": right}]
    return {"perplexity": {"perplexity": value, "losses": losses, "windows": windows, "length": TOKENS + 1}, "zero_shot": asked}


# --- who leads --------------------------------------------------------------------------------------------------------------


def test_a_pair_is_compared_window_by_window_and_draw_by_draw():
    ours, other = [cell(0.10, 1), cell(0.14, 2)], [cell(0.0, 3), cell(0.0, 4)]
    found = paired(ours, other)
    pairs = list(zip(ours, other, strict=True))
    logs = [sum(x - y for x, y in zip(a["perplexity"]["losses"], b["perplexity"]["losses"], strict=True)) for a, b in pairs]
    assert math.log(found.estimate) == pytest.approx(sum(logs) / 2 / TOKENS / WINDOWS, rel=1e-9)
    each = [perplexity_ratio(a["perplexity"]["losses"], b["perplexity"]["losses"], TOKENS) for a, b in pairs]
    assert (found.low, found.high) == (each[0].low, each[1].high)
    assert paired([cell(0.1, 1, windows=20)], [cell(0.0, noise=0)]).estimate == pytest.approx(math.exp(0.1), rel=0.02)
    assert paired([], other) is None


def test_standings_tell_ahead_from_level():
    cells = {
        "good": [cell(0.10, seed) for seed in (1, 2, 3)],
        "as good": [cell(0.10, seed) for seed in (4, 5, 6)],
        "worse": [cell(0.15, seed) for seed in (7, 8, 9)],
        "sometimes worse": [cell(shift, seed) for shift, seed in ((0.10, 10), (0.2, 11), (0.2, 12))],
    }
    rows = standings(cell(0.0, noise=0), cells)
    standing = {row["method"]: row["standing"] for row in rows}
    assert rows[0]["standing"] == FIRST
    assert {rows[0]["method"], rows[1]["method"]} == {"good", "as good"}
    assert (rows[1]["standing"], standing["worse"], standing["sometimes worse"]) == (LEVEL, BEHIND, LEVEL)
    assert rows[0]["relative"] == pytest.approx(math.exp(0.1), rel=0.01)
    assert leaders(rows).endswith(f"level with it: {rows[1]['method']}, sometimes worse")
    for count, words in ((1, "one draw"), (2, "2 draws")):
        few = standings(cell(0.0, noise=0), {method: found[:count] for method, found in cells.items()})
        assert leaders(few).endswith(f" (over the windows of {words} of the calibration text: another may differ)")
    fewer = leaders(standings(cell(0.0, noise=0), cells | {rows[1]["method"]: cells[rows[1]["method"]][:1]}))
    assert f"level with it: {rows[1]['method']} (one draw), sometimes worse" in fewer
    assert "another may differ" not in fewer


@pytest.mark.parametrize("short", ["good", "worse"])
def test_nothing_is_behind_on_fewer_than_three_draws(short):
    """Whichever of both has them, unless it reads no text."""
    cells = {"good": [cell(0.10, seed) for seed in (1, 2, 3)], "worse": [cell(0.15, seed) for seed in (7, 8, 9)]}
    cells[short] = cells[short][:2]
    assert standings(cell(0.0, noise=0), cells)[1]["standing"] == SEEMS_BEHIND
    assert standings(cell(0.0, noise=0), cells, drawless=[short])[1]["standing"] == BEHIND
    assert standings(cell(0.0, noise=0), cells, enough=2)[1]["standing"] == BEHIND


def test_many_null_pairs_are_level_after_holm():
    """Twenty methods that are the same: without a correction one of them would be called behind every other time."""
    called = 0
    for trial in range(20):
        rows = standings(cell(0.0, noise=0), {f"m{i}": [cell(0.1, 1000 * trial + i)] for i in range(20)}, enough=1)
        called += any(row["standing"] == BEHIND for row in rows[1:])
    assert called <= 7  # the first is chosen as the lowest of twenty, so a little above the nominal rate


# --- verdicts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "wanted", "verdict"),
    [
        (0.90, 0.97, BELOW, REPRODUCED),
        (0.97, 1.03, BELOW, UNDECIDED),
        (1.01, 1.05, BELOW, CONTRADICTED),
        (1.00, 1.00, BELOW, UNDECIDED),  # the same model twice
        (0.98, 1.02, (0.97, 1.03), REPRODUCED),
        (0.90, 1.10, (0.97, 1.03), UNDECIDED),
        (1.04, 1.10, (0.97, 1.03), CONTRADICTED),
    ],
)
def test_a_verdict_follows_from_the_interval(low, high, wanted, verdict):
    assert judge(Interval((low + high) / 2, low, high, 0.5), wanted) == verdict


def test_an_envelope_covers_every_draw():
    found = envelope([Interval(0.9, 0.88, 0.92, 0.001), Interval(1.0, 0.97, 1.03, 0.4)])
    assert (found.low, found.high, found.p) == (0.88, 1.03, 0.4)
    assert found.estimate == pytest.approx(math.sqrt(0.9))


def records() -> list[dict]:
    right = [True] * 60 + [False] * 40
    made = {
        ("dense", None, 0): cell(0.0, noise=0, right=right),
        ("A", 0.2, 0): cell(0.1, 1, right=[True] * 50 + [False] * 50),
        ("A", 0.2, 1): cell(0.1, 2),
        ("B", 0.2, 0): cell(0.2, 3, right=[True] * 20 + [False] * 80),
        ("B", 0.2, 1): cell(0.2, 4),
    }
    return [
        {"settings": {"model": "toy", "method": method, "level": level, "draw": {"seed": seed}}, "result": result}
        for (method, level, seed), result in made.items()
    ] + [{"settings": {"what": "speed"}, "result": [1, 2]}]


def test_evidence_finds_the_cells_of_a_method():
    evidence = Evidence(records())
    assert evidence.models() == ["toy"]
    assert len(evidence.cells("toy", "A", 0.2)) == 2
    assert len(evidence.cells("toy", "A", 0.2, draw={"seed": 1})) == 1
    assert Evidence(records()[::-1]).cells("toy", "A", 0.2) == evidence.cells("toy", "A", 0.2)  # by seed, however measured
    assert evidence.cells("toy", "A", 0.3) == [] == evidence.cells("other", "A", 0.2)
    assert evidence.draws == {1, 2}
    assert ratio("A", "B", 0.2)(evidence, "toy").verdict(1.0) == "below"
    assert ratio("A", "dense", 0.2)(evidence, "toy").estimate == pytest.approx(math.exp(0.1), rel=0.01)
    assert ratio("A", "C", 0.2)(evidence, "toy") is None
    assert accuracy("A", "B", 0.2)(evidence, "toy").estimate == pytest.approx(30)
    assert evidence.draws == {1}  # questions are asked of one draw


@pytest.mark.parametrize(
    ("draws", "said"),
    [((), "[0.900, 1.100]"), ({1}, "1.100]; 1 draw"), ({3}, "1.100]; 3 draws"), ({3, 1}, "1.100]; 1 and 3 draws")],
)
def test_a_number_says_its_draws(draws, said):
    claim = Claim("slicegpt", "A is below B.", "Table 1", "1", "A over B")
    assert shown(claim, Interval(1.0, 0.9, 1.1, 0.5), draws).endswith(said)
    assert shown(claim, Interval(2, 2, 2, 0.0), draws) == "A over B: 2"


def test_a_page_judges_the_committed_runs(tmp_path, monkeypatch):
    (tmp_path / "workshop" / "slicegpt").mkdir(parents=True)
    kept = [r | {"key": str(i), "modules": None, "seconds": 1.0, "commit": None} for i, r in enumerate(records())]
    raw_frame(kept).to_parquet(tmp_path / "workshop" / "slicegpt" / RAW)
    toy = (
        Claim("slicegpt", "A beats B.", "Table 1", "1 and 2", "A over B", BELOW, ratio("A", "B", 0.2)),
        Claim("slicegpt", "B beats A.", "Table 2", "2 and 1", "B over A", BELOW, ratio("B", "A", 0.2)),
        Claim("slicegpt", "Four are four.", "Table 3", "4", "counted", (3.5, 4.5), lambda evidence, model: exactly(4)),
        Claim("slicegpt", "It is fast on a GPU.", "Table 4", "2 times", reason="no GPU"),
    )
    monkeypatch.setattr(claims, "CLAIMS", {"slicegpt": toy, "comp": ()})
    found = claims.judged(tmp_path, ["workshop", "not there"])
    assert found["slicegpt"].verdict.tolist() == [REPRODUCED, CONTRADICTED, REPRODUCED, UNTESTABLE]
    assert "- Of 4 claims of the four papers, 1 cannot be tested here.\n" in claims.page(found, ["toy"])
    assert "- On toy: 2 reproduced, 1 contradicted, 0 undecided.\n" in claims.page(found, ["toy"])
    assert "- On shapes and random networks: 2 reproduced" in claims.summary(found, [])
    assert found["comp"].empty


def test_every_claim_is_a_whole_record():
    every = [claim for records in claims.CLAIMS.values() for claim in records]
    for paper, records_of in claims.CLAIMS.items():
        assert all(claim.paper == paper for claim in records_of)
    assert len({(claim.paper, claim.statement) for claim in every}) == len(every) >= 25
    for claim in every:
        assert claim.statement.endswith("."), claim
        assert all((claim.where, claim.printed)), claim
        assert bool(claim.measure) != bool(claim.reason), f"{claim.statement}: a measurement, or a reason why there is none"
        assert not claim.measure or (claim.number and claim.range[0] < claim.range[1])
