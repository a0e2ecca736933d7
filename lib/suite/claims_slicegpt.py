"""Claims of SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024) and the measurements of its notebook that decide them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from lib.evaluation.paired import Interval
from lib.suite.claim import ABOVE, BELOW, Claim, Evidence, exactly
from lib.suite.standing import paired

# The cells of the main experiment: none of the variants that change something else than the level and the draw.
MAIN = {"layout": "low-rank", "variant": None, "what": None, "pca": None}
NO_GPU = "it is a time on graphics cards that no run of this suite has had; the notebook measures its own processor"


def sliced(evidence: Evidence, model: str, level: float, method: str = "SliceGPT", **changed) -> list[dict]:
    """Cells of SliceGPT at a level, one for each draw; changed: settings in which they differ from the main experiment."""
    return evidence.cells(model, method, level, **MAIN | changed)


def against_sparse(level: float) -> Callable:
    """Perplexity of SliceGPT at a level over that of SparseGPT 2:4."""
    return lambda evidence, model: paired(sliced(evidence, model, level), evidence.cells(model, "SparseGPT 2:4", 0.5))


def between(ours: dict, other: dict, family: str = "") -> Callable:
    """Perplexity of one kind of cells over that of another: both are arguments of `sliced`; family: part of a model's name."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        return paired(*(sliced(evidence, model, **kind) for kind in (ours, other))) if family in model else None

    return measure


def extremes(what: str, setting: str) -> Callable:
    """Perplexity with the largest value of a setting of the draw over that with the smallest, at 25 %."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        found = [r["settings"] for r in evidence.records if r["settings"].get("what") == what and r["settings"]["model"] == model]
        if not found:
            return None
        ends = [pick(own["draw"][setting] for own in found) for pick in (max, min)]
        return paired(*(sliced(evidence, model, 0.25, what=what, draw={setting: end}) for end in ends))

    return measure


def accuracy_share(level: float, ours: str = "SliceGPT", other: str = "SliceGPT", family: str = "") -> Callable:
    """Accuracy of a method at a level as a share of that of another, or of the dense model, over the same questions."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        against = evidence.cells(model, "dense") if other == "dense" else sliced(evidence, model, level, other)
        cells = [[c for c in side if c["zero_shot"]] for side in (sliced(evidence, model, level, ours), against)]
        if family not in model or not all(cells):
            return None
        return share(*([answer for row in side[0]["zero_shot"] for answer in row["correct"]] for side in cells))

    return measure


def share(ours: list[bool], other: list[bool]) -> Interval:
    """Accuracy of one model divided by that of another over the same questions, with its 95 % interval.

    The interval is that of a ratio R of paired means (Cochran, Sampling Techniques, section 2.11), from the residuals x - R y.
    Raises ValueError where the other model answers nothing correctly.
    """
    x, y = np.asarray(ours, dtype=float), np.asarray(other, dtype=float)
    if not y.any():
        raise ValueError("the other model answers no question correctly: there is no share of nothing")
    found = x.mean() / y.mean()
    error = (x - found * y).std(ddof=1) / math.sqrt(len(x)) / y.mean()
    half = stats.norm.ppf(0.975) * error
    p = float(2 * stats.norm.sf(abs(found - 1) / error)) if error else 1.0
    return Interval(float(found), float(found - half), float(found + half), p)


def counted(names: tuple[str, ...], level: float, value: Callable[[dict], float]) -> Callable:
    """A number made from the counts {params, dense} of some of the paper's models, in the published layout."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        found = evidence.result(model, what="published layout", level=level) if model in names else None
        return exactly(value(found)) if found else None

    return measure


def removed(found: dict) -> float:
    return 1 - found["params"] / found["dense"]


def claim(statement: str, where: str, printed: str, number: str, measure: Callable, within: tuple[float, float] = BELOW) -> Claim:
    return Claim("slicegpt", statement, where, printed, number, within, measure)


CLAIMS: tuple[Claim, ...] = (
    claim(
        "At 25 % slicing the perplexity is below that of SparseGPT 2:4.",
        "Table 1",
        "Llama-2-7B: 7.24 against 8.69; so for all Llama-2",
        "perplexity of SliceGPT 25 % over SparseGPT 2:4",
        against_sparse(0.25),
    ),
    claim(
        "At 30 % slicing the perplexity is still below that of SparseGPT 2:4.",
        "Table 1",
        "OPT-6.7B: 12.51 against 13.00; so for all OPT but 2.7B",
        "perplexity of SliceGPT 30 % over SparseGPT 2:4",
        against_sparse(0.3),
    ),
    claim(
        "Perplexity rises with the slicing level.",
        "Table 1",
        "Llama-2-7B: 5.89 at 10 %, 8.12 at 30 %",
        "perplexity at 30 % over that at 10 %",
        between({"level": 0.3}, {"level": 0.1}),
        ABOVE,
    ),
    claim(
        "25 % slicing keeps 90 % of the dense model's zero-shot accuracy.",
        "abstract",
        "99 % for Llama-2-70B and OPT-66B, 90 % for Phi-2",
        "share of the dense accuracy at 25 %",
        accuracy_share(0.25, other="dense"),
        (0.9, math.inf),
    ),
    claim(
        "30 % slicing keeps 90 % of the dense model's zero-shot accuracy.",
        "section 4",
        "every model; but Llama-2-7B has 51.5 of 69.0 in Table 7",
        "share of the dense accuracy at 30 %",
        accuracy_share(0.3, other="dense"),
        (0.9, math.inf),
    ),
    claim(
        "Eigendecompositions in float32 make the perplexity worse.",
        "Table 4 against Table 5",
        "Llama-2-70B at 25 %: 7.01 against 4.89",
        "perplexity with float32 over that with float64",
        between({"level": 0.25, "pca": "float32"}, {"level": 0.25}),
        ABOVE,
    ),
    claim(
        "More calibration sequences help.",
        "Figure 7, Table 5 against Table 1",
        "Llama-2-7B at 25 %: 7.56 with 128 sequences, 7.24 with 1,024",
        "perplexity with the most sequences over that with the fewest",
        extremes("calibration size", "samples"),
    ),
    claim(
        "Longer calibration sequences help.",
        "Figure 7",
        "a figure",
        "perplexity with the longest sequences over the shortest, with equal tokens",
        extremes("calibration length", "length"),
    ),
    claim(
        "Widths that vary with the spectrum help OPT.",
        "Table 6",
        "OPT-6.7B at 25 %: 11.94 against 12.10",
        "perplexity with varying widths over that with constant ones, of equal size",
        between({"level": 0.25, "what": "schedule"}, {"level": 0.25}, "opt"),
    ),
    claim(
        "Widths that vary with the spectrum hurt Llama-2.",
        "Table 6",
        "Llama-2-7B at 25 %: 7.63 against 6.84",
        "perplexity with varying widths over that with constant ones, of equal size",
        between({"level": 0.25, "what": "schedule"}, {"level": 0.25}, "llama"),
        ABOVE,
    ),
    claim(
        "Recovery fine-tuning helps Llama models.",
        "Tables 7 and 9",
        "Llama-2-7B at 25 %: 55.5 to 56.2 % accuracy",
        "perplexity after recovery over that before it, at 25 %",
        between({"level": 0.25, "method": "SliceGPT + recovery"}, {"level": 0.25, "draw": {"seed": 0}}, "llama"),
    ),
    claim(
        "Recovery fine-tuning does not help the accuracy of OPT models.",
        "Figure 6",
        "no setting was found that helps",
        "accuracy after recovery over that before it, at 25 %",
        accuracy_share(0.25, "SliceGPT + recovery", family="opt"),
        (0.0, 1.0),
    ),
    claim(
        "A random orientation of the kept subspace changes nothing.",
        "Theorem 1",
        "equal",
        "perplexity with a random orientation over that without",
        between({"level": 0.25, "layout": None, "variant": "random orientation"}, {"level": 0.25, "draw": {"seed": 0}}),
        (0.999, 1.001),
    ),
    claim(
        "Without a rotation the perplexity explodes.",
        "section 4",
        "thousands after a few columns, where the dense model has about 5 to 30",
        "perplexity with a tenth of the unrotated coordinates deleted over the dense one",
        lambda evidence, model: paired(evidence.cells(model, "no rotation", 0.1), evidence.cells(model, "dense")),
        (100.0, math.inf),
    ),
    claim(
        "25 % slicing removes 25 % of the parameters, embeddings included.",
        "abstract",
        "25 %",
        "share of the parameters removed, counted",
        counted(("Llama-2-70B", "Phi-2"), 0.25, removed),
        (0.245, 0.255),
    ),
    claim(
        "Llama-2-70B has about 51.6 billion parameters at 30 %.",
        "section 4",
        "51.6 billion",
        "billions of parameters, counted",
        counted(("Llama-2-70B",), 0.3, lambda found: found["params"] / 1e9),
        (51.1, 52.1),
    ),
    claim(
        "Phi-2 has about 2.2 billion parameters at 25 %.",
        "section 4",
        "2.2 of 2.8 billion",
        "billions of parameters, counted",
        counted(("Phi-2",), 0.25, lambda found: found["params"] / 1e9),
        (2.15, 2.25),
    ),
    claim(
        "OPT-125M at 20 % has the number of parameters that the released code's tests state.",
        "the released code",
        "147,250,880",
        "parameters counted here, minus those",
        counted(("OPT-125M",), 0.2, lambda found: found["params"] - 147_250_880),
        (-0.5, 0.5),
    ),
    Claim(
        "slicegpt",
        "A token takes less time: 16 to 17 % less on RTX6000, 11 to 13 % on A100, at 25 %.",
        "Table 2",
        "OPT-66B: 237 to 204 ms, 114 to 102 ms",
        reason=NO_GPU,
    ),
    Claim(
        "slicegpt",
        "Throughput grows by up to 1.55 at 25 %, and a 70B model at 50 % needs one card instead of two.",
        "Table 11",
        "Llama-2-70B: 541 to 839 tokens a second",
        reason=NO_GPU,
    ),
    Claim(
        "slicegpt",
        "Slicing and recovery of a 7B model take little more than an hour on one card.",
        "Table 3",
        "Llama-2-7B: 44 and 23 minutes",
        reason=NO_GPU,
    ),
)
