"""The claims of SliceGPT find their cells among those of the notebook and judge them by their numbers."""

import math

import numpy as np
import pytest

from lib.suite.claim import CONTRADICTED, REPRODUCED, UNDECIDED, UNTESTABLE, Evidence
from lib.suite.claims import table
from lib.suite.claims_slicegpt import CLAIMS, share

LENGTH = 256
WINDOWS = np.random.default_rng(0).normal(3.5, 0.3, 60) * (LENGTH - 1)


def record(model, method, level, ratio, correct=(), seed=0, **settings):
    """A cell of a model whose perplexity is `ratio` times the dense one's on every window, give or take a thousandth."""
    noise = np.random.default_rng(round(1e4 * ratio) + seed).normal(0, 1e-3, len(WINDOWS))
    losses = WINDOWS + (math.log(ratio) + noise) * (LENGTH - 1)
    value = {"perplexity": 1.0, "losses": losses.tolist(), "length": LENGTH, "windows": len(losses)}
    settings = {"draw": {"seed": seed, "samples": 32, "length": LENGTH}} | settings
    key = {"model": model, "method": method} | ({} if level is None else {"level": level}) | settings
    return {"settings": key, "result": {"perplexity": value, "zero_shot": [{"correct": list(correct)}] if correct else []}}


def low_rank(model, level, ratio, **settings):
    return record(model, "SliceGPT", level, ratio, layout="low-rank", **settings)


def verdicts(records, part):
    """{model: verdict} of the claims whose statement has this part."""
    found = table("slicegpt", Evidence(records))
    found = found[found.claim.str.contains(part, regex=False)]
    return dict(zip(found.model, found.verdict, strict=True))


def test_the_headline_needs_every_draw_below_sparsegpt():
    for model, ratios, expected in (("a-llama", (1.20, 1.20, 1.20), REPRODUCED), ("a-llama", (1.20, 1.20, 1.31), UNDECIDED),
                                    ("a-llama", (1.33, 1.34, 1.35), CONTRADICTED)):  # fmt: skip
        records = [record(model, "SparseGPT 2:4", 0.5, 1.30, seed=seed) for seed in range(3)]
        records += [low_rank(model, 0.25, ratio, seed=seed) for seed, ratio in enumerate(ratios)]
        assert verdicts(records, "At 25 % slicing the perplexity") == {model: expected}


def test_variants_are_not_mistaken_for_the_method():
    records = [record("a-llama", "SparseGPT 2:4", 0.5, 1.30), low_rank("a-llama", 0.25, 1.20)]
    changed = [
        {"variant": "random orientation"}, {"pca": "float32"}, {"what": "schedule"}, {"layout": "dense"},
        {"what": "calibration size", "draw": {"seed": 1, "samples": 2}},
    ]  # fmt: skip
    records += [record("a-llama", "SliceGPT", 0.25, 2.0, **({"layout": "low-rank"} | settings)) for settings in changed]
    records += [low_rank("a-llama", 0.3, 2.0)]
    assert verdicts(records, "At 25 % slicing the perplexity") == {"a-llama": REPRODUCED}
    assert verdicts(records, "in float32") == {"a-llama": REPRODUCED}
    assert verdicts(records, "rises with") == {}  # nothing was measured at 10 %


def test_calibration_compares_the_ends_of_its_sweep():
    ratios = {2: 1.5, 8: 1.1, 32: 1.3}
    records = [
        low_rank("m", 0.25, ratio, seed=seed, what="calibration size", draw={"seed": seed, "samples": n})
        for n, ratio in ratios.items()
        for seed in range(3)
    ]
    assert verdicts(records, "More calibration") == {"m": REPRODUCED}
    found = table("slicegpt", Evidence(records))
    assert f"{1.3 / 1.5:.3f} [" in found[found.claim.str.contains("More calibration")].here.item()


def test_a_claim_on_one_family_is_asked_of_it_alone():
    records = []
    for model in ("a-llama", "a-opt"):
        records += [low_rank(model, 0.25, 1.3), low_rank(model, 0.25, 1.2, what="schedule")]
    assert verdicts(records, "help OPT") == {"a-opt": REPRODUCED}
    assert verdicts(records, "hurt Llama-2") == {"a-llama": CONTRADICTED}


def test_accuracy_is_judged_over_the_same_questions():
    right = [True] * 90 + [False] * 10
    records = [record("m", "dense", None, 1.0, right), low_rank("m", 0.25, 1.2, correct=[True] * 88 + [False] * 12)]
    records += [low_rank("m", 0.3, 1.2, correct=[True] * 60 + [False] * 40)]
    assert verdicts(records, "25 % slicing keeps") == {"m": REPRODUCED}
    assert verdicts(records, "30 % slicing keeps") == {"m": CONTRADICTED}


def test_share_is_the_bootstraps():
    chance = np.random.default_rng(1)
    other = chance.random(2000) < 0.6
    ours = np.where(chance.random(2000) < 0.8, other, chance.random(2000) < 0.3)
    found = share(ours.tolist(), other.tolist())
    picks = chance.integers(0, 2000, (4000, 2000))
    drawn = ours[picks].mean(1) / other[picks].mean(1)
    assert found.estimate == pytest.approx(ours.mean() / other.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.004)
    assert share([True, False], [True, False]).p == 1.0
    with pytest.raises(ValueError, match="no question correctly"):
        share([True, False], [False, False])


def test_counts_are_those_of_the_papers_models():
    """In the published layout, from the closed formula N(k) for a Llama without biases."""
    V, d, f, q, kv, L = 32000, 8192, 28672, 8192, 1024, 80
    k = {0.25: 6144, 0.3: 5728}
    count = {
        s: V * k + L * k * (2 * q + 2 * kv + 3 * f) + (2 * L - 1) * k * k + k * d + (d - k) * f + V * d for s, k in k.items()
    }
    records = [
        {
            "settings": {"model": "Llama-2-70B", "what": "published layout", "level": s},
            "result": {"params": n, "dense": 68_976_648_192},
        }
        for s, n in count.items()
    ]
    assert verdicts(records, "removes 25 %") == {"Llama-2-70B": CONTRADICTED}
    assert verdicts(records, "51.6 billion") == {"Llama-2-70B": CONTRADICTED}


def test_what_no_run_decides_says_why():
    found = table("slicegpt", Evidence([]))
    assert (found.verdict == UNTESTABLE).all()
    assert found.here.str.len().min() > 20
    assert len({claim.statement for claim in CLAIMS}) >= 15
