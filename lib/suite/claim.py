"""What a claim of a paper is, the measurements that can decide it, and how a verdict follows from a number's interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.evaluation.paired import Interval, accuracy_difference
from lib.suite.results import RAW, Results
from lib.suite.standing import paired

VERDICTS = REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
UNTESTABLE = "not testable here"

BELOW = (0.0, 1.0)  # ranges for a ratio
ABOVE = (1.0, math.inf)
POSITIVE = (0.0, math.inf)  # for a difference


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that a number decides.

    where, printed: where it stands and the numbers printed there. number: what is measured here, in words. range: where it must
    lie for the claim to hold. measure: (evidence, model) -> the number with its interval, or None where this run lacks it.
    reason: why no run of this suite can decide it; then there is no number.
    """

    paper: str
    statement: str
    where: str
    printed: str
    number: str = ""
    range: tuple[float, float] = BELOW
    measure: Callable[[Evidence, str], Interval | None] | None = None
    reason: str = ""


class Evidence:
    """The measurements of one notebook run, found by what identifies them: the records of its ledger or of its `raw.parquet`.

    draws: of how many draws of a calibration text the cells are that were asked for; it is emptied before a claim is judged.
    """

    def __init__(self, records: Iterable[dict]):
        self.records = [record for record in records if "model" in record["settings"]]
        self.draws: set[int] = set()

    @classmethod
    def of(cls, run: Results) -> Evidence:
        """What a running notebook has measured so far."""
        return cls(run.ledger.records[key] for key in run.asked)

    @classmethod
    def committed(cls, folder: Path) -> Evidence:
        """What a finished run measured. Raises FileNotFoundError where it keeps no raw file."""
        rows = pd.read_parquet(folder / RAW).to_dict("records")
        return cls({"settings": json.loads(row["settings"]), "result": json.loads(row["result"])} for row in rows)

    def models(self) -> list[str]:
        """The names of the models that were measured, in their order."""
        return list(dict.fromkeys(record["settings"]["model"] for record in self.records))

    def cells(self, model: str, method: str, level: float | None = None, **settings) -> list[dict]:
        """Results of the cells of a method at a level whose settings have these values, one for each draw, by rising seed.

        So the cells of two methods are of the same draws, place by place. A setting is given as it stands in the ledger;
        `draw={"seed": 0}` asks for a part of one. Of two cells of one draw, the one on more windows counts.
        """
        wanted = {"model": model, "method": method} | ({} if level is None else {"level": level}) | settings
        found: dict[tuple[int, str], dict] = {}
        for record in self.records:
            own, result = record["settings"], record["result"]
            if not isinstance(result, dict) or "perplexity" not in result or not _holds(own, wanted):
                continue
            drawn = own.get("draw") or {}
            draw = (drawn.get("seed", 0), json.dumps(drawn, sort_keys=True))
            if draw not in found or result["perplexity"]["windows"] > found[draw]["perplexity"]["windows"]:
                found[draw] = result
        if any(own for _, own in found if own != "{}"):
            self.draws.add(len(found))
        return [found[draw] for draw in sorted(found)]

    def result(self, model: str, **settings) -> object | None:
        """The result of the first cell of a model with these settings, of whatever kind; None where there is none."""
        wanted = {"model": model} | settings
        return next((record["result"] for record in self.records if _holds(record["settings"], wanted)), None)


def _holds(settings: dict, wanted: dict) -> bool:
    """Whether settings have the wanted values; a dictionary may have more entries than are wanted of it."""
    for name, value in wanted.items():
        own = settings.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            if not _holds(own, value):
                return False
        elif own != value:
            return False
    return True


def sides(evidence: Evidence, model: str, ours: str, other: str, level: float, **settings) -> tuple[list[dict], list[dict]]:
    """The cells of two methods at a level; `other` may be `dense`, which has no level and no settings."""
    against = evidence.cells(model, other) if other == "dense" else evidence.cells(model, other, level, **settings)
    return evidence.cells(model, ours, level, **settings), against


def ratio(ours: str, other: str, level: float, **settings) -> Callable:
    """The measurement "perplexity of `ours` over that of `other`" at a level, for a `Claim`; `other` may be `dense`."""

    return lambda evidence, model: paired(*sides(evidence, model, ours, other, level, **settings))


def accuracy(ours: str, other: str, level: float, **settings) -> Callable:
    """The measurement "accuracy of `ours` minus that of `other`" over all questions, in points of 100, of the first draw."""

    return lambda evidence, model: difference_of_answers(evidence, *sides(evidence, model, ours, other, level, **settings))


def difference_of_answers(evidence: Evidence, ours: Sequence[dict], other: Sequence[dict]) -> Interval | None:
    """Accuracy over all questions of the first cell of either side that was asked any, the difference in points of 100."""
    evidence.draws = {1}
    asked = [[cell for cell in cells if cell["zero_shot"]] for cells in (ours, other)]
    if not all(asked):
        return None
    right = [[answer for row in cells[0]["zero_shot"] for answer in row["correct"]] for cells in asked]
    found = accuracy_difference(*right)
    return Interval(100 * found.estimate, 100 * found.low, 100 * found.high, found.p)


def exactly(value: float) -> Interval:
    """A number that was counted and not measured."""
    return Interval(value, value, value, 0.0)


def judge(found: Interval, wanted: tuple[float, float]) -> str:
    """The verdict on a claim that a number lies in a range: by where its whole interval lies."""
    low, high = wanted
    if low < found.low and found.high < high:
        return REPRODUCED
    return CONTRADICTED if found.high < low or high < found.low else UNDECIDED


def shown(claim: Claim, found: Interval, draws: Collection[int] = ()) -> str:
    """A number with its interval, in words. draws: of the calibration texts, on either side."""
    if found.low == found.high:
        return f"{claim.number}: {found.estimate:,.4g}"
    many = f"; {' and '.join(map(str, sorted(draws)))} {'draw' if set(draws) == {1} else 'draws'}" if draws else ""
    return f"{claim.number}: {found.estimate:,.3f} [{found.low:,.3f}, {found.high:,.3f}]{many}"
