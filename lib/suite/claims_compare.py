"""What the papers claim of each other, judged by the comparison: where all methods have removed equally much, on any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lib.evaluation.paired import Interval
from lib.suite import published
from lib.suite.claim import BELOW, POSITIVE, Claim, Evidence, difference_of_answers
from lib.suite.standing import NEAR, paired

SIZES = (0.2, 0.5)
TRUNCATIONS = ("SVD", "FWSVD", "ASVD")
TABLE_1 = {0.2: "at 20 %: 7.94 against 20,061, 1,727 and 11.14", 0.5: "at 40 %: 13.73 against 52,489, 18,156 and 1,407"}
TABLE_4 = {0.2: "at 20 %: 7.73 against 7.94", 0.5: "at 40 %: 9.27 against 13.11"}


def at(evidence: Evidence, model: str, method: str, size: float) -> list[dict]:
    """Cells of a method that removed about this share of the decoder, one for each draw of the text that all methods read.

    By rising seed, so that the cells of two methods belong together. The first draw of one size was measured by itself.
    """
    texts = [r["settings"]["draw"] for r in evidence.records if r["settings"].get("what") == "alone"]
    if not texts:
        return []
    text = {name: value for name, value in texts[0].items() if name != "seed"}
    others = set(evidence.draws)
    cells = evidence.cells(model, method, what="alone", draw=text) + evidence.cells(model, method, size, what=None, draw=text)
    found = [cell for cell in cells if abs(cell["size"]["removed_decoder"] - size) < NEAR]
    evidence.draws = others | ({len(found)} if found else set())  # both kinds of cells together
    return found


def over(ours: str, others: Sequence[str], size: float) -> Callable:
    """Perplexity of a method over that of the best of some others at a size."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        mine = at(evidence, model, ours, size)
        found = [paired(mine, at(evidence, model, other, size)) for other in others]
        return max((each for each in found if each), key=lambda each: each.estimate, default=None)

    return measure


def answers(ours: str, other: str, size: float) -> Callable:
    """Accuracy of a method minus that of another at a size, in points, of the first draw."""
    return lambda evidence, model: difference_of_answers(
        evidence, *(at(evidence, model, method, size) for method in (ours, other))
    )


def lower(statement: str, where: str, printed: str, ours: str, others: Sequence[str], size: float) -> Claim:
    best = others[0] if len(others) == 1 else f"the best of {', '.join(others[:-1])} and {others[-1]}"
    number = f"perplexity of {ours} over that of {best}"
    return Claim(
        "compare", f"{statement}, with {100 * size:.0f} % removed.", where, printed, number, BELOW, over(ours, others, size)
    )


def more_accurate(paper: str, where: str, printed: str, ours: str, other: str, size: float) -> Claim:
    statement, number = (
        f"{paper} answers more questions than {other}, with {100 * size:.0f} % removed.",
        "accuracy, difference in points",
    )
    return Claim("compare", statement, where, printed, number, POSITIVE, answers(ours, other, size))


def _table_3(other: str, size: float) -> str:
    means = (f"{name} {published.afr_average(size, name):.2f}" for name in ("absolute + GMM", other))
    return f"mean accuracy of five tasks: {', '.join(means)}"


CLAIMS = (
    *(
        lower("Whitening is ahead of the truncations without it", "SVD-LLM, Table 1", TABLE_1[p], "SVD-LLM (W)", TRUNCATIONS, p)
        for p in SIZES
    ),
    *(
        lower("The update makes whitening better", "SVD-LLM, Table 4", TABLE_4[p], "SVD-LLM (W+U)", ("SVD-LLM (W)",), p)
        for p in SIZES
    ),
    *(
        more_accurate("Structured AFR", "AFR, Table 3", _table_3(other, p), "Structured AFR", other, p)
        for other in ("LLM-Pruner", "LoRAP", "CFSP")
        for p in SIZES
    ),
    *(
        lower(
            f"COMP is ahead of {other}", "COMP, a summary of the paper", "names only; no number was at hand", "COMP", (other,), p
        )
        for other in ("LLM-Pruner", "ShortGPT", "SliceGPT", "FPT")
        for p in SIZES
    ),
    *(more_accurate("COMP", "COMP, abstract", "+6.13 % on LLaMA-2-7B at 20 %", "COMP", "LLM-Pruner", p) for p in SIZES[:1]),
)
