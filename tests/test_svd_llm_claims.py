"""The claims of SVD-LLM, judged on invented measurements whose verdicts are known beforehand."""

import math

import pytest

from lib.suite import claims
from lib.suite.claim import CONTRADICTED, REPRODUCED, UNDECIDED, Evidence, judge
from lib.suite.claims_svd_llm import CLAIMS, at_main, between_draws, hardest

WINDOWS, LENGTH = 40, 11
WOBBLE = [0.02 * ((7 * i) % 5 - 2) for i in range(WINDOWS)]  # sums to zero over the windows


def cell(method, level, perplexity, seed=0, wobble=0.0, model="m"):
    """A ledger record: every window costs the log of the perplexity a token, give or take."""
    losses = [(LENGTH - 1) * (math.log(perplexity) + wobble * w) for w in WOBBLE]
    found = {"perplexity": perplexity, "losses": losses, "windows": WINDOWS, "length": LENGTH}
    settings = {"model": model, "method": method, "level": level, "draw": {"seed": seed}}
    return {"settings": settings, "result": {"perplexity": found, "zero_shot": []}}


def other(result, model="m", **settings):
    return {"settings": {"model": model} | settings, "result": result}


def verdicts(*records):
    """{statement: verdict} of the claims that the records decide."""
    frame = claims.table("svd_llm", Evidence(records))
    return {row.claim: row.verdict for row in frame[frame.model != "any"].itertuples()}


def test_the_best_rival_counts():
    evidence = Evidence(
        [cell("SVD-LLM (W)", 0.2, 60, wobble=1), cell("SVD", 0.2, 600), cell("FWSVD", 0.2, 80), cell("ASVD", 0.2, 90)]
    )
    found = hardest("SVD-LLM (W)", ("SVD", "FWSVD", "ASVD", "not run"), 0.2)(evidence, "m")
    assert found.estimate == pytest.approx(60 / 80)
    assert judge(found, (0.0, 1.0)) == REPRODUCED
    assert hardest("SVD-LLM (W)", ("SVD",), 0.4)(evidence, "m") is None


def test_equal_ranks_and_the_search_are_judged_apart():
    found = verdicts(
        *(
            cell(m, 0.2, p, wobble=w)
            for m, p, w in [("SVD-LLM (W)", 60, 1), ("SVD", 90, 0), ("ASVD", 80, 0), ("ASVD, with its search", 50, 0)]
        )
    )
    assert found["Whitening alone is far ahead of SVD and FWSVD at 20 %."] == REPRODUCED
    assert found["Whitening alone is ahead of ASVD at 20 %."] == CONTRADICTED
    assert len(found) == 2


def test_tuned_methods_are_compared_at_the_ratio_that_there_is():
    for level in (0.4, 0.2):
        evidence = Evidence([cell("SVD-LLM", level, 60, wobble=1), cell("v, then u", level, 60.6)])
        assert at_main("SVD-LLM", "v, then u")(evidence, "m").estimate == pytest.approx(60 / 60.6)
    found = verdicts(
        *(cell(m, 0.4, p, wobble=w) for m, p, w in [("SVD-LLM", 60, 1), ("v, then u", 60.6, 0), ("both factors at once", 50, 0)])
    )
    assert found["It hardly matters which factor is trained first."] == REPRODUCED
    assert found["Training the factors in turn is better than training both at once."] == CONTRADICTED


def test_draws_are_compared_with_each_other():
    values = (60, 61, 63)
    evidence = Evidence([cell("SVD-LLM (W)", 0.2, p, seed, wobble=seed) for seed, p in enumerate(values)])
    found = between_draws(evidence, "m")
    assert found.estimate == pytest.approx((61 / 60 * 63 / 60 * 63 / 61) ** (1 / 3))
    assert found.high > 63 / 60
    assert found.low < 61 / 60
    assert judge(found, (0.97, 1.03)) == UNDECIDED
    assert between_draws(Evidence([cell("SVD-LLM (W)", 0.2, 60)]), "m") is None


def test_another_text_is_compared_with_the_same_draw():
    usual = [cell("SVD-LLM (W)", 0.4, p, seed) for seed, p in enumerate((60, 90, 90))]
    found = verdicts(*usual, cell("SVD-LLM (W), another text", 0.4, 60.6, wobble=1))
    assert found["The source of the calibration text changes perplexity by at most 3 %."] == REPRODUCED


def test_what_was_counted():
    found = verdicts(
        other([{"SVD-LLM (W)": 0.5, "predicted": 0.5 + 1e-7}, {"SVD-LLM (W)": 0.4, "predicted": 0.4}], what="matrix loss"),
        other([{"DRONE_loss": 2.0, "SVD-LLM_loss": 1.0, "DRONE_seconds": 1, "SVD-LLM_seconds": 2}] * 2, what="drone"),
        other({"latent_bytes": 40, "cache_bytes": 100}, what="memory", ratio=0.2),
        other({"seconds": 10.0, "trials": []}, what="rank search"),
        other(4.0, what="time", method="SVD-LLM"),
        other({"0.0": {"prefill_tokens_per_s": 2.0}, "0.4": {"prefill_tokens_per_s": 3.0}}, what="throughput", batch=8),
    )
    assert found == {
        "Dropping singular values costs exactly the root of the sum of their squares.": REPRODUCED,
        "DRONE has the same minimum.": CONTRADICTED,
        "DRONE takes more time.": CONTRADICTED,
        "SVD-LLM with its update takes less time than ASVD with its search.": REPRODUCED,
        "Latents take half of 1 - R of the cache.": REPRODUCED,
        "A compressed model reads prompts faster.": REPRODUCED,
    }


def test_every_claim_has_a_measure_or_a_reason():
    assert all((claim.measure is None) == bool(claim.reason) for claim in CLAIMS)
    assert len({claim.statement for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.paper == "svd_llm" and claim.where and claim.printed for claim in CLAIMS)
