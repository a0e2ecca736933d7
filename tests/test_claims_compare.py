"""The claims of the papers on each other, judged by the comparison: which cells count, and what is said of known numbers."""

import pytest

from lib.suite.claim import CONTRADICTED, REPRODUCED, UNDECIDED, Evidence
from lib.suite.claims import table
from lib.suite.claims_compare import at
from tests.test_claims import cell

TEXT = {"corpus": "c", "split": "validation"}
RIGHT = {"COMP": 70, "LLM-Pruner": 30, "Structured AFR": 30}


def made(method, shift, size=0.2, seed=0, removed=None, split="validation", **settings):
    """A record as the comparison writes it: the first draw at 20 % by itself, any other in a sweep."""
    first = size == 0.2 and seed == 0 and split == "validation"
    own = {"what": "alone", "ratio": 0.31} if first else {"level": size}
    right = [i < RIGHT.get(method, 50) for i in range(100)]
    found = cell(shift, sum(method.encode()) + seed, right=right if first else None)
    draw = TEXT | {"split": split, "seed": seed}
    settings = {"model": "toy", "method": method, "draw": draw} | own | settings
    return {"settings": settings, "result": found | {"size": {"removed_decoder": removed or size}}}


def records():
    drawn = [made(method, shift, 0.2, seed) for method, shift in (("COMP", 0.1), ("LLM-Pruner", 0.2)) for seed in range(3)]
    return [
        *drawn,
        made("ShortGPT", 0.3, removed=0.25),  # not near the size
        made("FPT", 0.1),
        made("SliceGPT", 0.05),
        made("SVD-LLM (W)", 1.0),
        *(made(method, shift) for method, shift in (("SVD", 3.0), ("FWSVD", 1.5), ("ASVD", 2.0))),
        made("Structured AFR", 0.3),
        made("COMP", 5.0, 0.2, 0, split="train"),  # on text that the model knows by heart
        made("COMP", 5.0, 0.5, 0, what="files"),
        made("COMP", 0.5, 0.5, 0),
    ]


def test_cells_are_those_of_the_size_and_of_the_text_that_all_read():
    evidence, known = Evidence(records()), records()
    assert at(evidence, "toy", "COMP", 0.2) == [record["result"] for record in known[:3]]
    assert evidence.draws == {3}
    assert at(evidence, "toy", "COMP", 0.5) == [known[-1]["result"]]
    assert evidence.draws == {1, 3}
    assert at(evidence, "toy", "ShortGPT", 0.2) == [] == at(evidence, "other", "COMP", 0.2)
    assert at(Evidence(known[-1:]), "toy", "COMP", 0.5) == []  # without a cell that says which text is the run's own


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("COMP is ahead of LLM-Pruner, with 20 % removed.", REPRODUCED),
        ("COMP is ahead of SliceGPT, with 20 % removed.", CONTRADICTED),
        ("COMP is ahead of FPT, with 20 % removed.", UNDECIDED),
        ("Whitening is ahead of the truncations without it, with 20 % removed.", REPRODUCED),
        ("COMP answers more questions than LLM-Pruner, with 20 % removed.", REPRODUCED),
        ("Structured AFR answers more questions than LLM-Pruner, with 20 % removed.", UNDECIDED),
    ],
)
def test_verdicts_on_known_numbers(claim, verdict):
    found = table("compare", Evidence(records())).set_index("claim")
    assert found.verdict[claim] == verdict
    assert "COMP is ahead of ShortGPT, with 20 % removed." not in found.index  # it is not near this size here
    assert found.here["Whitening is ahead of the truncations without it, with 20 % removed."].startswith(
        "perplexity of SVD-LLM (W) over that of the best of SVD, FWSVD and ASVD: 0.6"
    )
