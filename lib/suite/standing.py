"""Who leads, and who is level with the first: measured cells of several methods and draws, compared in pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lib.evaluation.paired import Interval, common_ratio, envelope, holm

FIRST, LEVEL, BEHIND, SEEMS_BEHIND = "first", "level", "behind", "behind on few draws"
SIGNIFICANT = 0.05
NEAR = 0.015  # a model counts at a size when what was really removed is within this of it
ENOUGH = 3  # draws of the calibration text: with fewer, another one could change who leads


def paired(ours: Sequence[dict], other: Sequence[dict]) -> Interval | None:
    """Perplexity of one method over that of another: paired over windows, and the envelope over their common draws.

    ours, other: cells, as `Subject.measure` makes them, in the order of their draws; a single one, such as the dense model,
    stands beside every draw of the other side. None where one side has none, or where they have one window.
    """
    if not ours or not other:
        return None
    count = max(len(ours), len(other)) if 1 in (len(ours), len(other)) else min(len(ours), len(other))
    pairs = [[side[i if len(side) > 1 else 0]["perplexity"] for side in (ours, other)] for i in range(count)]
    if min(len(record["losses"]) for pair in pairs for record in pair) < 2:
        return None
    return envelope([common_ratio(*pair) for pair in pairs])


def standings(
    dense: dict, cells: Mapping[str, Sequence[dict]], drawless: Collection[str] = (), enough: int = ENOUGH
) -> list[dict]:
    """A row for each method, lowest mean first: how it stands to the dense model and to the first.

    cells: {method: its cells, one for each draw}. `relative` is the geometric mean over the draws of the perplexity over that of
    the dense model, `low` and `high` the interval over windows and draws; `over_first` the same against the first method. A
    method is `behind` where the interval of every draw lies above the first's, and its p-value, of all draws the largest,
    is significant after Holm's correction for the number of methods; otherwise it is `level`. Where the method or the first has
    fewer than `enough` draws, one more could change that, and it is only `behind on few draws`; the methods `drawless` read no
    text, so that one measurement is all there is.
    """
    relative = {method: paired(found, [dense]) for method, found in cells.items()}
    order = sorted(cells, key=lambda method: relative[method].estimate)
    against = [paired(cells[method], cells[order[0]]) for method in order[1:]]
    corrected = holm([found.p for found in against])
    rows = [{"over_first": 1.0, "over_first_low": 1.0, "over_first_high": 1.0, "p": 1.0, "standing": FIRST}]
    for method, found, p in zip(order[1:], against, corrected, strict=True):
        behind = found.verdict(1.0) == "above" and p < SIGNIFICANT
        few = any(len(cells[m]) < enough for m in (method, order[0]) if m not in drawless)
        row = {"over_first": found.estimate, "over_first_low": found.low, "over_first_high": found.high, "p": p}
        rows.append(row | {"standing": (SEEMS_BEHIND if few else BEHIND) if behind else LEVEL})
    about = [{"method": m, "draws": len(cells[m]), "relative": relative[m].estimate} for m in order]
    bounds = [{"low": relative[m].low, "high": relative[m].high} for m in order]
    return [a | b | c for a, b, c in zip(about, bounds, rows, strict=True)]


def leaders(rows: Sequence[dict]) -> str:
    """The outcome in a sentence: the first, and the methods that are level with it."""
    first, *others = rows
    level = [row["method"] + _fewer(row, first) for row in others if row["standing"] == LEVEL]
    value = f"{first['relative']:.3f} times dense [{first['low']:.3f}, {first['high']:.3f}]"
    found = f"{first['method']} has the lowest perplexity, {value}; level with it: {', '.join(level) or 'none'}"
    if first["draws"] >= ENOUGH:
        return found
    return f"{found} (over the windows of {_draws(first)} of the calibration text: another may differ)"


def _draws(row: dict) -> str:
    return "one draw" if row["draws"] == 1 else f"{row['draws']} draws"


def _fewer(row: dict, first: dict) -> str:
    return f" ({_draws(row)})" if row["draws"] < first["draws"] else ""
