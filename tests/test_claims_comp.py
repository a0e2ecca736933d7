"""The claims of COMP find their cells among those of the notebook and judge them by their numbers."""

from lib.suite.claim import CONTRADICTED, REPRODUCED, UNDECIDED, Evidence
from lib.suite.claims import table as judged
from tests.test_claims_slicegpt import record


def verdicts(records, part):
    found = judged("comp", Evidence(records))
    found = found[found.claim.str.contains(part, regex=False)]
    return dict(zip(found.model, found.verdict, strict=True))


def comp(ratio, level=0.2, changed="", **settings):
    return record("m", "COMP", level, ratio, changed=changed, **settings)


def test_a_changed_choice_is_not_mistaken_for_the_method():
    records = [comp(1.3, changed="metric=C0"), comp(1.1), comp(1.4, changed="tune=False"), record("m", "FPT", 0.2, 1.2)]
    records += [comp(1.5, what="calibration", draw={"seed": 1, "samples": 2})]
    assert verdicts(records, "FPT") == {"m": REPRODUCED}
    assert verdicts(records, "matrix condition") == {"m": REPRODUCED}
    assert verdicts(records, "Mask tuning") == {"m": REPRODUCED}


def test_shortgpt_is_judged_where_whole_blocks_are_of_equal_size():
    records = [comp(1.1), record("m", "ShortGPT", 0.2, 1.3), comp(1.4, 0.25), record("m", "ShortGPT", 0.25, 1.3)]
    assert verdicts(records, "At 25 % COMP has lower perplexity than ShortGPT") == {"m": CONTRADICTED}


def test_every_draw_counts():
    records = [record("m", "LLM-Pruner", 0.2, 1.2, seed=seed) for seed in range(3)]
    records += [comp(ratio, seed=seed) for seed, ratio in enumerate((1.1, 1.1, 1.25))]
    assert verdicts(records, "its own 640 tokens") == {"m": UNDECIDED}


def test_the_hybrid_is_held_against_both_of_its_parts():
    records = [comp(1.3, 0.25, "rho=0.5"), comp(1.2, 0.25, "rho=0.0"), comp(1.5, 0.25, "rho=1.0")]
    assert verdicts(records, "neurons alone") == {"m": CONTRADICTED}
    assert verdicts(records, "blocks alone") == {"m": REPRODUCED}


def test_memory_is_judged_by_all_of_its_readings():
    def readings(peaks):
        return [
            {"settings": {"model": "random Llama", "what": "memory", "method": method, "repeat": i}, "result": {"peak": peak}}
            for method, row in peaks.items()
            for i, peak in enumerate(row)
        ]

    assert verdicts(readings({"comp": (15, 16, 19), "all gradients": (100, 100, 100)}), "80 %") == {"random Llama": REPRODUCED}
    assert verdicts(readings({"comp": (15, 16, 29), "all gradients": (100, 100, 100)}), "80 %") == {"random Llama": UNDECIDED}
    assert verdicts(readings({"comp": (35, 36, 34), "all gradients": (100, 100, 100)}), "80 %") == {"random Llama": CONTRADICTED}
    assert verdicts(readings({"comp": (None, None, None), "all gradients": (100, 100, 100)}), "80 %") == {}
