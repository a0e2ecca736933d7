"""Claims of COMP (Xu et al., 2025, arXiv 2501.15255) and the measurements of its notebook that decide them.

The paper's formulas and tables were not at hand. What is judged is our reading of the method, so a claim that fails here may
fail because of the reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lib.evaluation.paired import Interval
from lib.suite.claim import BELOW, POSITIVE, Claim, Evidence, accuracy
from lib.suite.standing import paired

AT = 0.2  # the abstract's ratio
SPLIT = 0.25  # a whole number of blocks of the embedded models, so that blocks alone can reach it
REPEATS = (0, 1, 2)  # of a reading of memory


def comp(evidence: Evidence, model: str, level: float = AT, changed: str = "") -> list[dict]:
    """Cells of our COMP reading at a ratio with one choice changed, such as `metric=C0`, one for each draw."""
    return evidence.cells(model, "COMP", level, changed=changed, what=None)


def against(rival: str, level: float = AT) -> Callable:
    """Perplexity of COMP over that of a rival at one ratio."""
    return lambda evidence, model: paired(comp(evidence, model, level), evidence.cells(model, rival, level, what=None))


def between(level: float, ours: str, other: str) -> Callable:
    """Perplexity of COMP with one choice over that with another."""
    return lambda evidence, model: paired(comp(evidence, model, level, ours), comp(evidence, model, level, other))


def saved_memory(evidence: Evidence, model: str) -> Interval | None:
    """Share of the peak of LLM-Pruner with all gradients that COMP saves: mean, smallest and largest of its readings."""
    saved = []
    for i in REPEATS:
        ours, other = (evidence.result(model, what="memory", method=method, repeat=i) for method in ("comp", "all gradients"))
        if ours and other and ours["peak"] and other["peak"]:
            saved.append(1 - ours["peak"] / other["peak"])
    return spread_of(saved) if saved else None


def spread_of(values: Sequence[float]) -> Interval:
    """Mean, smallest and largest of repeated readings; no p-value can be told from so few."""
    return Interval(sum(values) / len(values), min(values), max(values), 1.0)


def claim(statement: str, where: str, printed: str, number: str, measure: Callable, within: tuple[float, float] = BELOW) -> Claim:
    return Claim("comp", statement, where, printed, number, within, measure)


SUMMARY = "a summary of the paper"
NAMED = "names only; no number was at hand"
CLAIMS: tuple[Claim, ...] = (
    claim(
        "At 20 % COMP is more accurate than LLM-Pruner.",
        "abstract",
        "+6.13 % on LLaMA-2-7B; points or percent is not said",
        "accuracy of COMP minus that of LLM-Pruner, points",
        accuracy("COMP", "LLM-Pruner", AT, what=None),
        POSITIVE,
    ),
    claim(
        "At 20 % COMP has lower perplexity than LLM-Pruner with its own 640 tokens.",
        "abstract, in other words",
        "+6.13 % accuracy",
        "perplexity of COMP over that of LLM-Pruner",
        against("LLM-Pruner"),
    ),
    claim(
        "At 20 % COMP has lower perplexity than LLM-Pruner that reads the same text.",
        "abstract, in other words",
        "+6.13 % accuracy",
        "perplexity of COMP over that of LLM-Pruner, all text",
        against("LLM-Pruner, all text"),
    ),
    *(
        claim(
            f"At {100 * level:.0f} % COMP has lower perplexity than {rival}.",
            SUMMARY,
            NAMED,
            f"perplexity of COMP over that of {rival}",
            against(rival, level),
        )
        for rival, level in (("ShortGPT", SPLIT), ("SliceGPT", AT), ("FPT", AT))  # ShortGPT: whole blocks
    ),
    claim(
        "Blocks first and then neurons is better than neurons alone.",
        "title and abstract",
        "no number was at hand",
        "perplexity with half of the ratio paid by blocks over that of neurons alone, at 25 %",
        between(SPLIT, "rho=0.5", "rho=0.0"),
    ),
    claim(
        "Blocks first and then neurons is better than blocks alone.",
        "title and abstract",
        "no number was at hand",
        "perplexity with half of the ratio paid by blocks over that of blocks alone, at 25 %",
        between(SPLIT, "rho=0.5", "rho=1.0"),
    ),
    claim(
        "Mask tuning helps.",
        "abstract",
        "no number was at hand",
        "perplexity with tuning over that without",
        between(AT, "", "tune=False"),
    ),
    claim(
        "The matrix condition chooses better neurons than magnitude does.",
        "abstract",
        "no number was at hand",
        "perplexity with C1 in sequence over that with C0, both tuned",
        between(AT, "", "metric=C0"),
    ),
    claim(
        "Pruning needs 80 % less memory than LLM-Pruner.",
        "abstract",
        "80 %; what was counted is not said",
        "share of LLM-Pruner's peak with all gradients that is saved, beyond the weights",
        saved_memory,
        (0.8, math.inf),
    ),
    Claim(
        "comp",
        "The pruned model needs less memory and time at inference in some cases.",
        SUMMARY,
        "no numbers",
        reason="no number, device or model is stated that a measurement could be held against",
    ),
    Claim(
        "comp",
        "It works on several architectures.",
        SUMMARY,
        "no numbers",
        reason="neither the models nor a measure of working are stated; the other rows are given for each model here",
    ),
)
