"""Whether two models differ: paired over the windows of one text, and over the questions of one task.

Both models are asked the same, so what is hard for both cancels: two perplexities that are each known to 6 % can be told apart
where they differ by 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lib.evaluation.text import spread


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and the p-value of there being no difference."""

    estimate: float
    low: float
    high: float
    p: float

    def verdict(self, level: float) -> str:
        """`above`, `below` or `level`: where the interval lies beside the number that stands for no difference."""
        return "above" if self.low > level else "below" if self.high < level else "level"

    def percent(self, first: str, second: str) -> str:
        """A ratio in words: `COMP is 2.1 % [0.8, 3.4] above CFSP`, or level with it where the interval says both."""
        estimate, low, high = (100 * (value - 1) for value in (self.estimate, self.low, self.high))
        if self.verdict(1.0) == "below":
            return f"{first} is {-estimate:.1f} % [{-high:.1f}, {-low:.1f}] below {second}"
        word = "above" if self.verdict(1.0) == "above" else "level with"
        return f"{first} is {word} {second}: {estimate:+.1f} % [{low:+.1f}, {high:+.1f}]"


def perplexity_ratio(ours: Sequence[float], other: Sequence[float], tokens: int, confidence: float = 0.95) -> Interval:
    """Perplexity of one model over that of another; 1 is no difference.

    ours, other: summed losses in nats of the same windows, in the same order; tokens: scored in each window. The interval is that
    of the mean difference of log-perplexity over the windows, by Student's t: with ten windows it holds the truth in 95 of 100
    cases, where resampling the windows does so in 90. Neighbouring windows of one article are not independent, so it is a little
    too narrow. Raises ValueError for sequences of different length and for fewer than two windows.
    """
    difference = _differences(ours, other) / tokens
    mean = difference.mean()
    if not difference.any():  # the same model
        return Interval(1.0, 1.0, 1.0, 1.0)
    test = stats.ttest_1samp(difference, 0.0)
    found = test.confidence_interval(confidence)
    return Interval(math.exp(mean), math.exp(found.low), math.exp(found.high), float(test.pvalue))


def common_ratio(ours: dict, other: dict) -> Interval:
    """`perplexity_ratio` of two records of `lib.evaluation.perplexity.Perplexity`, on the windows that both have.

    A record of fewer windows has those that `lib.evaluation.text.spread` chooses among the other's. Raises ValueError where
    fewer than two are common.
    """
    few = min(len(ours["losses"]), len(other["losses"]))
    pair = [[record["losses"][i] for i in spread(len(record["losses"]), few)] for record in (ours, other)]
    return perplexity_ratio(*pair, tokens=ours["length"] - 1)


def envelope(draws: Sequence[Interval]) -> Interval:
    """One interval for several draws of the calibration text: from the lowest end to the highest, so it is clear of a number only
    where every draw's is. The estimate is the geometric mean; p the largest."""
    estimate = math.exp(sum(math.log(draw.estimate) for draw in draws) / len(draws))
    return Interval(estimate, min(d.low for d in draws), max(d.high for d in draws), max(d.p for d in draws))


def accuracy_difference(ours: Sequence[bool], other: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Accuracy of one model minus that of another, in [-1, 1], over the same questions; 0 is no difference.

    ours, other: whether each question was answered correctly. The p-value is McNemar's, exact: of the questions that only one of
    both got right, each is equally likely to be either's. Raises ValueError as `perplexity_ratio`.
    """
    difference = _differences(ours, other)
    won, lost = flips(ours, other)
    if won + lost == 0:
        return Interval(0.0, 0.0, 0.0, 1.0)
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))
    half = stats.norm.ppf((1 + confidence) / 2) * error
    return Interval(float(mean), float(mean - half), float(mean + half), float(stats.binomtest(won, won + lost).pvalue))


def flips(ours: Sequence[bool], other: Sequence[bool]) -> tuple[int, int]:
    """Questions that only the first model answers correctly, and those that only the second does."""
    difference = _differences(ours, other)
    return int((difference > 0).sum()), int((difference < 0).sum())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p-values that are read together (Holm 1979), in their order: n times the smallest, and so on."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def _differences(ours: Sequence, other: Sequence) -> np.ndarray:
    if len(ours) != len(other) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(other)} measurements are not pairs: give two or more of the same for both models")
    return np.asarray(ours, dtype=float) - np.asarray(other, dtype=float)
