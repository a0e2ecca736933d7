"""The figures of the notebooks: a colour for each thing that a method removes, a marker for each method, and how to draw them.

`STYLE` is the one table that every figure of every profile follows. Nothing is measured here. First come the helpers, which
draw on the axes that they are given; then a function for each figure, which takes a table or numbers and returns the figure.
Its title says what the numbers say, in a sentence made from them. A figure is as wide as a phone can show with letters of
`FONT` points and more, and as high as it needs to be.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from lib.suite.results import Results
from lib.suite.standing import NEAR

WIDTH = 5.6  # inches of a figure: shown as wide as a phone, ten points are nine of its pixels
FONT = 10  # points of the smallest letters
LOOK = {
    "figure.figsize": (WIDTH, 3.4),
    "figure.dpi": 144,
    "font.size": FONT,
    "axes.labelsize": FONT + 1,
    "axes.titlesize": FONT + 1,
    "figure.titlesize": FONT + 2,
    "figure.titleweight": "bold",
    "legend.fontsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}

# What a method removes, and its colour: the palette of Okabe and Ito, whose colours stay apart for colour-blind readers.
COLOURS = {
    "deletes neurons": "#0072B2",
    "deletes blocks": "#009E73",
    "narrows the stream": "#D55E00",
    "factors matrices": "#CC79A7",
    "zeroes single weights": "#56B4E9",
    "chance": "#000000",
    "something else": "#595959",  # a method without a line in STYLE, such as one that a reader has added to a notebook
}
OTHERS = "#BBBBBB"  # lines that only show where the field is, and what is not removed
INK = "#333333"  # points and words that stand for no method


@dataclass(frozen=True)
class Style:
    """What a method removes, which gives its colour, and the marker and line that tell it from others of that colour."""

    removes: str
    marker: str
    line: str = "-"

    @property
    def color(self) -> str:
        return COLOURS[self.removes]


# By the names that tables and figures show. A method that removes several things has the colour of the largest part: COMP
# drops whole blocks too, LLM-Pruner, FLAP and FPT heads, LoRAP factors the attention, and MoDeGPT narrows its heads.
STYLE = {
    "COMP": Style("deletes neurons", "o"),
    "CFSP": Style("deletes neurons", "s"),
    "LLM-Pruner": Style("deletes neurons", "X"),
    "FPT": Style("deletes neurons", "^"),
    "Wanda-sp": Style("deletes neurons", "d"),
    "Wanda-sp, with heads": Style("deletes neurons", "<", "--"),
    "FLAP": Style("deletes neurons", ">"),
    "LoRAP": Style("deletes neurons", "P"),
    "MoDeGPT": Style("deletes neurons", "p"),
    "magnitude": Style("deletes neurons", "v"),
    "Structured AFR": Style("deletes neurons", "*"),
    "simple mean": Style("deletes neurons", "s", "--"),
    "absolute only": Style("deletes neurons", "o"),
    "GMM only": Style("deletes neurons", "D", ":"),
    "absolute + GMM": Style("deletes neurons", "*", "-."),  # the paper's proposal, elsewhere called Structured AFR
    "ShortGPT": Style("deletes blocks", "D"),
    "SliceGPT": Style("narrows the stream", "^"),
    "SliceGPT, dense shortcuts": Style("narrows the stream", "s", "--"),
    "SliceGPT, tied": Style("narrows the stream", "D", "-."),
    "SliceGPT, one basis": Style("narrows the stream", "x", ":"),
    "SliceGPT, turned bases": Style("narrows the stream", "o"),
    "SliceGPT + recovery": Style("narrows the stream", "*", ""),
    "dense + recovery": Style("narrows the stream", "P", ""),  # the control of the row above
    "SVD": Style("factors matrices", "s", ":"),
    "FWSVD": Style("factors matrices", "v", "--"),
    "ASVD": Style("factors matrices", "D", "-."),
    "SVD-LLM (W)": Style("factors matrices", "o"),
    "SVD-LLM (W+U)": Style("factors matrices", "^"),
    "SVD-LLM, compressed order": Style("factors matrices", "P", "--"),
    "SVD-LLM": Style("factors matrices", "*"),
    "SparseGPT 2:4": Style("zeroes single weights", "X", ""),
    "Wanda 2:4": Style("zeroes single weights", "P", ""),
    "random neurons": Style("chance", "+", "--"),
    "random, range of seeds": Style("chance", "+", ""),
}
UNKNOWN = Style("something else", "h")

PAPERS = ("COMP", "Structured AFR", "SliceGPT", "SVD-LLM (W)")  # a method of each of the four
NEXT = ("ShortGPT", "CFSP", "LLM-Pruner")  # drawn in colour where there is room
CHANCE = "random neurons"  # the line that every method has to beat
MOST = 6  # lines in colour
TOP = 40  # times dense: what is worse than this has collapsed, and how badly does not matter


def style_of(method: str) -> Style:
    """The style of a method, whose name may go on behind a comma; `UNKNOWN`, dark grey, for one without a line in `STYLE`."""
    return STYLE.get(method, STYLE.get(method.split(", ")[0], UNKNOWN))


def look(method: str) -> dict:
    """The style as keywords of `Axes.plot`, with the method's name as label."""
    style = style_of(method)
    return {"color": style.color, "marker": style.marker, "linestyle": style.line, "label": method}


def row(count: int, width: float = WIDTH / 2, height: float = 3.2) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its panels side by side."""
    size = (width * count, height)
    figure, panels = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, panels[0]


def column(count: int, height: float = 2.8, **shared) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its panels below each other; `height` of each in inches, without what the title takes."""
    size = (WIDTH, height * count + 0.6)
    figure, panels = plt.subplots(count, 1, figsize=size, squeeze=False, layout="constrained", **shared)
    return figure, panels[:, 0]


def headline(figure: Figure, sentence: str) -> None:
    """Write the message of a figure above it, in as many lines as it takes; a number stays with its unit."""
    together = sentence.replace(" %", "\u00a0%")
    lines = textwrap.wrap(together, int(9.2 * figure.get_figwidth()), break_on_hyphens=False)
    figure.suptitle("\n".join(lines).replace("\u00a0", " "), x=0.01, ha="left")


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def change(ratio: float) -> str:
    """By how much something has grown or shrunk, in percent."""
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "\u2212")


def for_each(values: Mapping[str, str]) -> str:
    """Values in a sentence, with what each belongs to: "1.3 (a), 1.2 (b)"."""
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def by_place(number: int, color: str) -> dict:
    """The look of the first, second, ... model where lines of several share a panel: one colour, another marker and dash."""
    marker, line = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))[number % 4]
    return {"color": color, "marker": marker, "linestyle": line}


def plain_numbers(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis with ordinary numbers, `ticks` of them in every decade."""
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter("{x:,.12g}")  # such as 0.05 and 30,000
    axis.set_minor_formatter(NullFormatter())


def doublings(panel: Axes) -> None:
    """Make the x axis logarithmic, with an ordinary number at every power of two."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=2))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_minor_locator(NullLocator())


def perplexity_axis(panels: Sequence[Axes], label: str = "perplexity, times dense") -> None:
    """Logarithmic from the dense model up, in ordinary numbers, cut at `TOP`; the label of the first panel says if it cuts."""
    heights = [y for panel in panels for line in panel.get_lines() for y in line.get_ydata() if y == y]  # a NaN is not drawn
    highest = max(heights, default=1)
    for panel in panels:
        panel.set(yscale="log", ylim=(0.95, TOP if highest > TOP else 1.1 * highest))
        plain_numbers(panel.yaxis, (1, 1.5, 2, 3, 5, 7))
    panels[0].set_ylabel(f"{label}\n(cut at {TOP})" if highest > TOP else label)


def lines_of(table: pd.DataFrame) -> dict[str, tuple]:
    """{method: (per cent removed, perplexity over dense)} of one model, each point once and from small to large."""
    measured = table.dropna(subset="relative")
    ordered = measured.sort_values("removed_decoder").drop_duplicates(["method", "removed_decoder"])
    return {
        method: (100 * part.removed_decoder.to_numpy(), part.relative.to_numpy())
        for method, part in ordered.groupby("method", sort=False)
    }


def curves(panel: Axes, lines: Mapping[str, tuple], bold: Iterable[str] | None = None) -> None:
    """A line for each {method: (x, y)}. Where `bold` names some, those alone have their style; the others are thin and grey."""
    for method, (x, y) in lines.items():
        if bold is None or method in bold:
            chance = style_of(method).removes == "chance"
            panel.plot(x, y, ms=6, lw=1.2 if chance else 2, zorder=3, **look(method))
        else:
            panel.plot(x, y, color=OTHERS, lw=0.9, zorder=2)


def bands(panel: Axes, table: pd.DataFrame, x: str, methods: Iterable[str]) -> None:
    """Intervals of lines: shaded from `low` to `high` of the rows of each method, over their column `x` in percent."""
    for method in methods:
        part = table[table.method == method].sort_values(x).astype({"low": float, "high": float}).dropna(subset=["low", "high"])
        panel.fill_between(100 * part[x], part.low, part.high, color=style_of(method).color, alpha=0.2, lw=0, zorder=1)


def ranges(panel: Axes, x: Sequence, middle: Sequence, low: Sequence, high: Sequence, **looks) -> None:
    """Points at `middle` with bars from `low` to `high`."""
    below = [float(m - least) for m, least in zip(middle, low, strict=True)]
    above = [float(most - m) for m, most in zip(middle, high, strict=True)]
    panel.errorbar(x, middle, [below, above], capsize=3, **looks)


def removed_below(figure: Figure, methods: Iterable[str], others: bool = False) -> None:
    """A legend of the colours below the figure: what the methods remove."""
    shown = {style_of(method).removes for method in methods}
    colours = {name: colour for name, colour in COLOURS.items() if name in shown} | ({"others": OTHERS} if others else {})
    handles = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
    columns = int(figure.get_figwidth() / 1.8)
    figure.legend(handles=handles, ncols=columns, loc="outside lower center", frameon=False)


def apart(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places at least `gap` apart within [low, high], in the order of `wanted`, which rises, and as near to it as possible.

    Less a gap for each place below, they only must not fall, so this is isotonic regression: neighbours that fall are averaged.
    """
    runs: list[list[float]] = []  # [sum, count] of neighbours that have to touch
    for i, place in enumerate(wanted):
        runs.append([place - i * gap, 1])
        while len(runs) > 1 and runs[-2][0] / runs[-2][1] >= runs[-1][0] / runs[-1][1]:
            total, count = runs.pop()
            runs[-1] = [runs[-1][0] + total, runs[-1][1] + count]
    levels = [total / count for total, count in runs for _ in range(int(count))]
    highest = max(high - (len(levels) - 1) * gap, low)
    return [min(max(level, low), highest) + i * gap for i, level in enumerate(levels)]


def line_end(line: Sequence[tuple[float, float]]) -> tuple[float, float, bool]:
    """Where a line in fractions of its panel ends, or leaves it at the top: x, y, and whether it leaves."""
    over = next((i for i, (_, y) in enumerate(line) if y > 1), None)
    if over is None:
        return *line[-1], False
    x, y = line[over]
    if over == 0:
        return x, 1.0, True
    x0, y0 = line[over - 1]
    return x0 + (x - x0) * (1 - y0) / (y - y0), 1.0, True


def label_ends(panel: Axes, lines: Mapping[str, tuple], colours: Mapping[str, str] | None = None, size: float = FONT) -> None:
    """Write the names of {method: (x, y)} right of their lines, an arrow behind those that leave the panel at its top.

    colours: of the names, where they are not names of methods. To be called last: how far labels must be apart depends on the
    height that titles and legends leave to the panel.
    """
    panel.figure.draw_without_rendering()
    gap = 1.3 * size / 72 / (panel.get_window_extent().height / panel.figure.dpi)
    fractions = panel.transScale + panel.transLimits
    ends = {name: line_end(fractions.transform(list(zip(x, y, strict=True)))) for name, (x, y) in lines.items()}
    ends = dict(sorted(ends.items(), key=lambda item: (item[1][1], -item[1][0])))
    places = apart([y for _, y, _ in ends.values()], gap, gap / 2, 1 - gap / 2)
    for (name, (x, y, leaves)), place in zip(ends.items(), places, strict=True):
        color = colours[name] if colours else style_of(name).color
        panel.annotate(
            f"{name} ↑" if leaves else name,
            (x, y),
            (1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            size=size,
            weight="bold",
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5, "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 1},
        )


def lowest(table: pd.DataFrame) -> dict[str, str]:
    """{model: method of lowest perplexity} at the largest size, of the methods that really reached it."""
    largest = table["size"].max()
    fair = table[(table["size"] == largest) & ((table.removed_decoder - largest).abs() < NEAR)]
    best = fair.loc[fair.groupby("model", sort=False).relative.idxmin()]
    return dict(zip(best.model, best.method, strict=True))


def message(table: pd.DataFrame) -> str:
    """What the picture says of these rows, in a sentence."""
    models: dict[str, list[str]] = {}
    for model, method in lowest(table).items():
        models.setdefault(method, []).append(model)
    found = ", ".join(f"{method} on {' and '.join(names)}" for method, names in models.items())
    return f"With {100 * table['size'].max():.0f} % of the decoder removed, perplexity is lowest for {found}"


def highlighted(table: pd.DataFrame, model: str) -> list[str]:
    """The methods with a colour in the panel of a model: those of the papers, its best, those of others, more with room."""
    there, best = list(dict.fromkeys(table[table.model == model].method)), lowest(table)
    wanted = [*PAPERS, best.get(model), *best.values(), *NEXT, *there]
    return [method for method in dict.fromkeys(wanted) if method in there and method != CHANCE][:MOST]


def size_figure(table: pd.DataFrame, beside: bool = False) -> Figure:
    """Perplexity over dense against what is really removed, a panel for each model: the main picture.

    table: rows with model, method, size, removed_decoder, relative, low and high, such as those of `pareto`.
    beside: panels side by side, for a page that is wide.
    """
    table = table[table.method != "dense"]
    models = list(table.model.unique())
    named = {model: [*highlighted(table, model), CHANCE] for model in models}
    figure, panels = row(len(models), 3.9, 4.6) if beside else column(len(models), 3.2, sharex=True)
    lines = {model: lines_of(table[table.model == model]) for model in models}
    for panel, model in zip(panels, models, strict=True):
        curves(panel, lines[model], named[model])
        bands(panel, table[table.model == model], "removed_decoder", named[model][:-1])
        panel.set_title(model)
    for panel in panels if beside else panels[-1:]:
        panel.set_xlabel("decoder parameters really removed, %")
    perplexity_axis(panels)
    methods, coloured = set(table.method), set().union(*named.values())
    removed_below(figure, methods & coloured, any(not set(own) <= set(named[model]) for model, own in lines.items()))
    headline(figure, message(table))
    for panel, model in zip(panels, models, strict=True):
        label_ends(panel, {method: lines[model][method] for method in named[model] if method in lines[model]})
    return figure


# SliceGPT


def axes_figure(points: Sequence, Q: Sequence) -> Figure:
    """Points of a plane, [n, 2], with their principal axes, the columns of Q; beside it in these axes, and what is deleted."""
    points, Q = np.asarray(points), np.asarray(Q)
    turned, gone = points @ Q, COLOURS["narrows the stream"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.8), sharex=True, sharey=True, layout="constrained")
    left.scatter(*points.T, s=14, color=OTHERS)
    for axis, color, name, place in zip(Q.T, (INK, gone), ("q₁, kept", "q₂, deleted"), ((-14, 14), (6, -12)), strict=True):
        left.annotate("", 3 * axis, (0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        where = {"xytext": place, "textcoords": "offset points", "ha": "center", "va": "center"}
        left.annotate(name, 3 * axis, color=color, weight="bold", **where)
    right.scatter(*turned.T, s=14, color=OTHERS)
    right.vlines(turned[:, 0], 0, turned[:, 1], color=gone, lw=1.5)
    right.plot(turned[:, 0], 0 * turned[:, 0], "o", ms=3, color=INK)
    right.text(0, 1.2, "deleted: the distance\nto the first axis", ha="center", color=gone, weight="bold")
    for panel, title in ((left, "X, as it comes"), (right, "X Q, turned")):
        panel.set(title=title, xlim=(-6, 6), ylim=(-4, 4), aspect="equal", xticks=(-5, 0, 5))
    share = (turned[:, 1] ** 2).sum() / (turned**2).sum()
    headline(figure, f"Deleting the second axis loses {percent(share, 1)} of the energy of these points")
    return figure


def energy_figure(shares: Mapping[str, Sequence], levels: Sequence[float], level: float) -> Figure:
    """Energy of the stream that is lost against the share of directions deleted, over all junctions of each model.

    shares: {model: [junction, axis]}, the largest first. level: the one that the title speaks of.
    """
    figure, panels = column(1, 3.4)
    panel, color, lines, lost = panels[0], COLOURS["narrows the stream"], {}, {}
    for number, (model, share) in enumerate(shares.items()):
        tails = 100 * np.asarray(share, dtype=float)[:, ::-1].cumsum(1)  # [junction, directions deleted, less one]
        x, mean = 100 * np.arange(1, tails.shape[1] + 1) / tails.shape[1], tails.mean(0)
        inside = x <= 100 * max(levels)
        panel.fill_between(x[inside], tails.min(0)[inside], tails.max(0)[inside], color=color, alpha=0.15, lw=0)
        lines[model] = x[inside], mean[inside]
        panel.plot(*lines[model], lw=2, **by_place(number, color) | {"marker": ""})
        lost[model] = percent(mean[round(level * len(x)) - 1] / 100, 1)
    top = 1.5 * max(panel.get_ylim())
    panel.plot([0, top], [0, top], color=INK, lw=1, ls=":")
    panel.text(0.65 * top, 0.64 * top, "if all directions\nwere alike", color=INK, va="top")
    panel.set(xlabel="directions deleted, %", ylabel="energy lost, %", ylim=(0, 0.66 * top), xlim=(0, 100 * max(levels)))
    panel.set_xticks([100 * value for value in levels])
    panel.yaxis.get_major_locator().set_params(integer=True)
    headline(figure, f"Energy that is lost with {percent(level)} of the directions: {for_each(lost)}")
    label_ends(panel, lines, dict.fromkeys(lines, color))
    return figure


def step_name(step: int) -> str:
    """What lies between a junction and the next one."""
    return f"{'MLP' if step % 2 else 'attention'} of block {step // 2}"


def angles_figure(angles: Mapping[str, Sequence], widths: Mapping[str, int]) -> Figure:
    """How far the kept subspace turns from one junction to the next: the step that turns most, and the band of all others.

    angles: {model: degrees [step, direction kept], ascending}. widths: d of each model; 2 k - d directions cannot turn.
    """
    figure, panels = column(len(angles), 2.6, sharex=True)
    turns, rest, color = {}, {}, COLOURS["narrows the stream"]
    for panel, (model, found) in zip(panels, angles.items(), strict=True):
        found = np.asarray(found, dtype=float)
        kept = found.shape[1]
        shared = max(2 * kept - widths[model], 0)
        means, x = found[:, shared:].mean(1), np.arange(1, kept + 1)
        most = int(means.argmax())
        others = np.delete(found, most, 0)
        panel.fill_between(x, others.min(0), others.max(0), color=OTHERS, alpha=0.6, lw=0)
        panel.plot(x, np.median(others, 0), color=INK, lw=1.5)
        panel.plot(x, found[most], color=color, lw=2.5)
        panel.set(title=model, ylabel="angle, degrees", ylim=(0, 92), xlim=(shared - 4, kept + 1))
        ends = {f"over the {step_name(most)}": (x, found[most]), "all other steps,\nand their median": (x, np.median(others, 0))}
        turns[model], rest[model] = f"{means[most]:.0f}°", f"{np.delete(means, most).max():.0f}°"
        label_ends(panel, ends, dict(zip(ends, (color, INK), strict=True)))
    panels[-1].set_xlabel("direction kept, from the one that turns least")
    headline(figure, f"One step turns the stream by {for_each(turns)} on average, no other by more than {for_each(rest)}")
    return figure


STORED = ("SliceGPT", "SliceGPT, dense shortcuts", "SliceGPT, tied")  # one function


def layouts_figure(table: pd.DataFrame, level: float) -> Figure:
    """Perplexity over dense against what is removed of the whole model; a grey bar joins what is one function.

    table: rows of SliceGPT's `perplexity`. level: the one that the title speaks of.
    """
    table = table[~table.method.isin(["dense", "no rotation", "dense + recovery"])]
    sparse = table.method.map(lambda method: style_of(method).removes == "zeroes single weights")
    names = table.method.str.removeprefix("SliceGPT, ")
    table = table.assign(gone=100 * table.zeros.where(sparse, table.removed_model), name=names, zeroed=sparse)
    table = table.astype({"low": float, "high": float})  # one window alone has no interval
    models, ends = list(table.model.unique()), []
    figure, panels = column(len(models), 3.5, sharex=True)
    for panel, model in zip(panels, models, strict=True):
        part = table[table.model == model]
        ends.append({})
        for (name, method), rows in part.groupby(["name", "method"], sort=False):
            looks = look(method) | ({"mfc": "none", "mew": 1.5} if rows.zeroed.all() else {})
            ranges(panel, rows.gone, rows.times_dense, rows.low, rows.high, ms=7, zorder=3, **looks)
            ends[-1][name] = (rows.gone, rows.times_dense), style_of(method).color
        for at, rows in part[part.method.isin(STORED)].groupby("ratio"):
            if len(rows) > 1:
                panel.plot(rows.gone, rows.times_dense, color=OTHERS, lw=6, zorder=1)
                place = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                panel.annotate(percent(at), (rows.gone.min(), rows.times_dense.iloc[0]), **place)
        panel.axvline(0, color=INK, lw=1)
        panel.set_title(model)
        panel.margins(x=0.2)
    panels[-1].set_xlabel("parameters removed, % of the model\n(below 0: it grew; hollow: zeros)")
    perplexity_axis(panels)
    same = table[(table.ratio == level) & (table.model == models[0]) & table.method.isin(STORED)]
    said = for_each({row.name: percent(row.gone / 100) for row in same.set_index("method").itertuples(index=False)})
    headline(figure, f"One function, stored in several ways: slicing by {percent(level)} removes {said} of {models[0]}")
    for panel, own in zip(panels, ends, strict=True):
        label_ends(panel, {n: line for n, (line, _) in own.items()}, {n: color for n, (_, color) in own.items()})
    return figure


def calibration_figure(panels_of: Mapping[str, Mapping[str, pd.DataFrame]], label: str, method: str) -> Figure:
    """Perplexity over dense against the amount of calibration text, with the lowest and highest draw.

    panels_of: {what is varied: {model: table of mean, low and high, its index the amount}}. label: of the y axes.
    """
    figure, panels = column(len(panels_of), 2.6, sharey=True)
    color, said = style_of(method).color, []
    for panel, (varied, found) in zip(panels, panels_of.items(), strict=True):
        for number, part in enumerate(found.values()):
            ranges(panel, part.index, part["mean"], part.low, part.high, **by_place(number, color), lw=2)
        doublings(panel)
        panel.set(xlabel=varied, ylabel=label)
        first, last = (f"{next(iter(found.values())).index[place]:,}" for place in (0, -1))
        changes = {model: change(part["mean"].iloc[-1] / part["mean"].iloc[0]) for model, part in found.items()}
        said.append(f"{last} instead of {first} {varied}: {for_each(changes)}")
    headline(figure, f"Perplexity with {said[0]}")
    for panel, words in zip(panels[1:], said[1:], strict=True):
        panel.set_title(words.replace(": ", ":\n"))
    for panel, found in zip(panels, panels_of.values(), strict=True):
        label_ends(panel, {model: (part.index, part["mean"]) for model, part in found.items()}, dict.fromkeys(found, color))
    return figure


def breakdown_figure(table: pd.DataFrame, label: str) -> Figure:
    """Where the time of a prefill goes: a bar for each network, dense first. table: method, then milliseconds of each part."""
    table = table.set_index(table.method.str.removeprefix("SliceGPT, ")).drop(columns="method")
    small = ["norms", "activation", "rest"]
    parts = table.drop(columns=small).assign(**{"the rest": table[small].sum(axis=1)})
    colours = dict(zip(parts, ("#8C8C8C", COLOURS["narrows the stream"], "#BBBBBB", "#DDDDDD"), strict=True))
    figure, panels = column(1, 2.9)
    panel, total, left = panels[0], parts.sum(axis=1), 0
    for part, values in parts.items():
        bars = panel.barh(parts.index, values, left=left, color=colours[part], label=part)
        wide = [f"{value:.0f}" if value > 0.04 * total.max() else "" for value in values]
        panel.bar_label(bars, wide, label_type="center", fontsize=FONT)
        left = left + values
    for place, value in enumerate(total):
        panel.text(value, place, f" {value:.0f} ms", va="center", weight="bold")
    panel.set(xlabel=label, xlim=(0, 1.18 * total.max()))
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    figure.legend(ncols=4, loc="outside lower center", frameon=False, columnspacing=1, handlelength=1.2)
    changes = {method: change(value / total.iloc[0]) for method, value in total.iloc[1:].items()}
    headline(figure, f"Time of a prefill beside the dense one: {for_each(changes)}")
    return figure


# SVD-LLM


def kind_of(matrix: str) -> str:
    """The type of a matrix, such as q_proj."""
    return matrix.rsplit(".", 1)[1]


def dumbbells(panel: Axes, table: pd.DataFrame, columns: Mapping[str, dict]) -> None:
    """A line for each `kind` of matrix: the mean of each column over its matrices, and a bar from the smallest to the largest."""
    kinds = list(table.kind.unique())
    means = table.groupby("kind", sort=False)[list(columns)].mean()
    panel.hlines(range(len(kinds)), means.min(axis=1), means.max(axis=1), color=OTHERS, lw=7, alpha=0.5, zorder=1)
    for number, (column_name, looks) in enumerate(columns.items()):
        part = table.groupby("kind", sort=False)[column_name].agg(["mean", "min", "max"])
        spread = [part["mean"] - part["min"], part["max"] - part["mean"]]
        places = [place + 0.14 * (2 * number - 1) for place in range(len(kinds))]
        panel.errorbar(part["mean"], places, xerr=spread, ls="", ms=7, capsize=2, lw=1, label=column_name, **looks)
    panel.set_yticks(range(len(kinds)), kinds)
    panel.invert_yaxis()


RIVAL = {"color": INK, "marker": "s", "mfc": "white", "mew": 1.5}  # what SVD-LLM is compared with


def spectra_figure(plain: Mapping[str, Sequence], whitened: Mapping[str, Sequence], model: str, held: float = 0.9) -> Figure:
    """How many directions hold most of the energy of W, and of W X, for each type of matrix.

    plain, whitened: {matrix: singular values, falling} of W and of W X. held: the share of the energy.
    """

    def needed(sigma: Sequence) -> float:
        energy = np.square(np.asarray(sigma, dtype=float)).cumsum()
        return 100 * (1 + np.searchsorted(energy, held * energy[-1])) / len(energy)

    rows = [{"kind": kind_of(name), "W": needed(plain[name]), "W X": needed(whitened[name])} for name in plain]
    table = pd.DataFrame(rows)
    figure, panels = column(1, 0.45 * table.kind.nunique() + 0.5)
    dumbbells(panels[0], table, {"W": RIVAL, "W X": {"color": style_of("SVD-LLM (W)").color, "marker": "o"}})
    label = f"directions that hold {percent(held)} of the energy, %"
    panels[0].set(xlabel=label, xlim=(0, 100), title=f"{model}, mean and range")
    figure.legend(ncols=2, loc="outside lower center", frameon=False)
    means = [f"{table[column_name].mean():.0f} %" for column_name in ("W", "W X")]
    sentence = f"{percent(held)} of the energy is in {means[0]} of the directions of W, and in {means[1]} of those of W X"
    headline(figure, f"{sentence} (mean of all matrices)")
    return figure


def loss_figure(table: pd.DataFrame, level: float) -> Figure:
    """What each type of matrix loses of its output by SVD-LLM and by the best of its rivals. table: rows of `matrix_loss`."""
    ours, best = "SVD-LLM (W)", "best of SVD, FWSVD and ASVD"
    table = table.assign(**{best: table[["SVD", "FWSVD", "ASVD"]].min(axis=1)}, kind=table.matrix.map(kind_of))
    models = list(table.model.unique())
    figure, panels = column(len(models), 0.38 * table.groupby("model").kind.nunique().max() + 0.6, sharex=True)
    for panel, model in zip(panels, models, strict=True):
        dumbbells(panel, table[table.model == model], {best: RIVAL, ours: {"color": style_of(ours).color, "marker": "o"}})
        panel.set(title=f"{model}, mean and range", xlim=(0, None))
    panels[-1].set_xlabel("relative loss of the output, ‖(W − W')X‖ / ‖WX‖")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, loc="outside lower center", frameon=False)
    first = f"{(table[ours] <= table[best] + 1e-9).sum()} of {len(table)} matrices"
    means = f"{percent(table[ours].mean())} of the output on average, the best rival {percent(table[best].mean())}"
    headline(figure, f"At {percent(level)}, SVD-LLM loses least on {first}: {means}")
    return figure


RIVALS = ("SVD", "FWSVD", "ASVD")
TRUNCATED = (*RIVALS, "SVD-LLM (W)", "SVD-LLM")
HIGHEST = 1e6  # times dense, of their figure: arrows behind the names of what is above


def ratio_figure(table: pd.DataFrame, printed: Mapping[str, Mapping[float, float]], level: float) -> Figure:
    """Perplexity over dense against the ratio: a panel for each model, and one for the paper's numbers.

    table: rows of SVD-LLM's `perplexity`. printed: {method: {ratio: perplexity over dense}}. level: the title's ratio.
    """
    table = table[table.method != "dense"]
    paper = pd.DataFrame([{"method": m, "ratio": r, "times_dense": v} for m, row in printed.items() for r, v in row.items()])
    sources = {model: part for model, part in table.groupby("model", sort=False)}
    sources["LLaMA-7B, the paper's Table 1"] = paper.assign(low=np.nan, high=np.nan)
    figure, panels = column(len(sources), 2.5, sharex=True)
    drawn, said = [], {}
    for panel, (title, part) in zip(panels, sources.items(), strict=True):
        lines = {m: (100 * rows.ratio, rows.times_dense) for m, rows in part.groupby("method", sort=False)}
        curves(panel, lines, TRUNCATED)
        bands(panel, part, "ratio", TRUNCATED)
        panel.set(title=title, yscale="log", ylabel="times dense", ylim=(0.9, min(1.3 * part.times_dense.max(), HIGHEST)))
        plain_numbers(panel.yaxis, (1, 3) if part.times_dense.max() < 1e3 else (1,))
        drawn.append({m: line for m, line in lines.items() if m in TRUNCATED})
        at = part[part.ratio == level].set_index("method").times_dense
        if len(at):
            said[title.split(",")[0]] = f"{at['SVD-LLM (W)']:.3g} and {at[list(RIVALS)].min():.3g} times dense"
    panels[-1].set_xlabel("ratio R, %")
    grey = Line2D([], [], color=OTHERS, lw=3, label="the other forms of SVD-LLM")
    figure.legend(handles=[grey], loc="outside lower center", frameon=False)
    headline(figure, f"At {percent(level)}, perplexity by SVD-LLM (W) and by its best rival: {for_each(said)}")
    for panel, lines in zip(panels, drawn, strict=True):
        label_ends(panel, lines)
    return figure


def memory_figure(table: pd.DataFrame, printed: Mapping[str, Mapping[float, float]], level: float) -> Figure:
    """Weights and cache of two large models, and what latents save; the paper's measured totals beside the first.

    table: rows of `memory`. printed: {what is compressed: {ratio: total}}, measured by the paper. level: the title's.
    """
    models, color, said = ("Llama-2-7B", "Llama-3-8B"), COLOURS["factors matrices"], {}
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True, layout="constrained")
    for panel, model in zip(panels, models, strict=True):
        part = table[table.model == model].reset_index(drop=True)
        weights, full, latent = (part[f"{what}_bytes"] / 2**30 for what in ("weight", "cache", "latent"))
        panel.bar(part.index, weights, color=OTHERS, label="weights")
        panel.bar(part.index, latent, bottom=weights, color=color, label="cache of latents")
        saved = {"color": "none", "edgecolor": color, "hatch": "///", "label": "what they save"}
        panel.bar(part.index, full - latent, bottom=weights + latent, **saved)
        panel.set_xticks(part.index, [f"{100 * R:.0f}" for R in part.ratio])
        panel.set(title=model, xlabel="ratio R, %")
        panel.grid(axis="x", visible=False)
        at = part.index[part.ratio == level][0]
        said[model] = f"from {full[at]:.1f} to {latent[at]:.1f} GiB"
    for (what, values), marker in zip(printed.items(), ("v", "o"), strict=True):
        places = [list(table[table.model == models[0]].ratio).index(R) for R in values if R in set(table.ratio)]
        looks = {"color": INK, "marker": marker, "mfc": "white", "ls": "", "label": f"LLaMA-7B, paper: {what}"}
        panels[0].plot(places, [v for R, v in values.items() if R in set(table.ratio)], **looks)
    panels[0].set_ylabel("GiB")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=2, loc="outside lower center", frameon=False)
    headline(figure, f"At {percent(level)}, latents shrink the cache {for_each(said)}")
    return figure


def ranks_figure(plans: Mapping[str, Mapping[str, int]], even: Mapping[str, int], title: str) -> Figure:
    """Where the ranks of two plans go, block by block and type by type: multiples of the equal rank, `even`.

    plans: {plan: {matrix: rank}}; a matrix that a plan leaves out stays dense.
    """
    kinds = list(dict.fromkeys(map(kind_of, even)))
    figure, panels = column(len(plans), 0.36 * len(kinds) + 0.7)
    scale = {"cmap": "PuOr_r", "norm": plt.Normalize(0, 2)}
    for panel, (plan, ranks) in zip(panels, plans.items(), strict=True):
        rows = [[ranks.get(name, np.nan) / even[name] for name in even if kind_of(name) == kind] for kind in kinds]
        panel.imshow(rows, aspect="auto", **scale)
        panel.set_facecolor(OTHERS)
        for (y, x), value in np.ndenumerate(rows):
            if len(rows[0]) <= 12 or value != value:
                panel.text(x, y, "all" if value != value else f"{value:.1f}", ha="center", va="center")
        panel.set_yticks(range(len(kinds)), kinds)
        panel.set(title=plan, xlabel="block")
        panel.grid(visible=False)
    bar = {"location": "bottom", "shrink": 0.8, "aspect": 40, "label": "rank, times the equal one (all: whole)"}
    figure.colorbar(plt.cm.ScalarMappable(**scale), ax=panels, **bar)
    said = {}
    for plan, ranks in plans.items():
        shares = pd.Series({name: ranks[name] / even[name] for name in even if name in ranks})
        paying = shares.groupby(shares.index.map(kind_of)).mean()
        payers = ", ".join(paying[paying < 1].sort_values().index)
        less = f" and gives less than the equal rank to {payers}" if payers else ""
        said[plan] = f"leaves {len(even) - len(ranks)} of {len(even)} matrices whole{less}"
    headline(figure, f"{title}: " + "; ".join(f"{plan} {words}" for plan, words in said.items()))
    return figure


# Structured AFR


def clip_figure(parts: Mapping[str, tuple]) -> Figure:
    """The scores of one neuron, the mixture that was fitted to them, and what the clip takes, for each kind of score.

    parts: {score: (which neuron, its values, the lowest and the highest that stay, places, density of the mixture there)}.
    """
    figure, panels = column(len(parts), 2.3)
    color, said = COLOURS["deletes neurons"], {}
    for panel, (score, (neuron, values, low, high, places, density)) in zip(panels, parts.items(), strict=True):
        values = np.sort(np.asarray(values, dtype=float))
        edges = np.linspace(values[0], values[-1], 41)
        clipped = (values < float(low)) | (values > float(high))
        panel.hist([values[~clipped], values[clipped]], edges, stacked=True, color=[OTHERS, color])
        panel.plot(places, np.asarray(density) * len(values) * (edges[1] - edges[0]), color=INK, lw=1.5)
        for bound in (low, high):
            panel.axvline(bound, color=color, ls="--", lw=1.5)
        panel.set(title=f"{score}, {neuron}: {clipped.sum()} of {len(values)} clipped", ylabel="entries", ylim=(0, None))
        said[score] = f"{(values[-1] - values[0]) / float(high - low):.1f}"
    panels[-1].set_xlabel("entry of the neuron's score vector")
    handles = [Line2D([], [], color=INK, label="mixture"), Line2D([], [], color=color, ls="--", label="bounds of the clip")]
    figure.legend(handles=handles, ncols=2, loc="outside lower center", frameon=False)
    headline(figure, f"Where the clip takes most, it divides the range of a neuron's scores by {for_each(said)}")
    return figure


def rank_correlation(x: Sequence, y: Sequence) -> float:
    """Spearman's."""
    return pd.Series(np.asarray(x)).rank().corr(pd.Series(np.asarray(y)).rank())


def premise_figure(found: Mapping[str, tuple]) -> Figure:
    """What deleting a neuron does to the loss, against its score: with the sign, and beside it without.

    found: {model: (signed score of each neuron that was deleted, change of the loss in nats)}.
    """
    shape = {"figsize": (WIDTH, 2.6 * len(found) + 0.9), "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(len(found), 2, sharey="row", **shape)
    color, said = COLOURS["deletes neurons"], {"signed": {}, "absolute": {}}
    for line, (model, (score, loss)) in zip(panels, found.items(), strict=True):
        score, loss = 1000 * np.asarray(score, dtype=float), 1000 * np.asarray(loss, dtype=float)
        for panel, (name, values) in zip(line, {"signed": score, "absolute": np.abs(score)}.items(), strict=True):
            said[name][model] = f"{rank_correlation(values, loss):.2f}".replace("-", "\u2212")
            panel.axhline(0, color=INK, lw=1)
            panel.scatter(values, loss, s=16, color=color, alpha=0.7, lw=0)
            panel.set_title(f"{model}: rank\ncorrelation {said[name][model]}")
        line[0].axvline(0, color=INK, lw=1)
        line[0].set_ylabel("change of the loss,\nthousandths of a nat")
    panels[-1][0].set_xlabel("signed score, thousandths")
    panels[-1][1].set_xlabel("absolute value, thousandths")
    signed, absolute = (" and ".join(values.values()) for values in said.values())
    headline(figure, f"Score against the true change of the loss: rank correlation {signed} with the sign, {absolute} without")
    return figure


def aggregation_figure(table: pd.DataFrame, drawn: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Perplexity over dense against the share of neurons deleted, for the four aggregations and random draws.

    table: rows of `curves`. drawn: {model: {ratio: perplexity over dense of each draw}}.
    """
    models, top = list(table.model.unique()), max(max(levels) for levels in drawn.values())
    figure, panels = column(len(models), 3, sharex=True)
    lines, said = {}, {}
    for panel, model in zip(panels, models, strict=True):
        part = table[table.model == model].sort_values("ratio")
        lines[model] = {m: (100 * rows.ratio, rows.times_dense) for m, rows in part.groupby("method", sort=False)}
        curves(panel, lines[model])
        bands(panel, part, "ratio", lines[model])
        x, values = [100 * ratio for ratio in drawn[model]], [np.asarray(v) for v in drawn[model].values()]
        mean, low, high = ([what(v) for v in values] for what in (np.mean, np.min, np.max))
        ranges(panel, x, mean, low, high, **look(CHANCE) | {"linestyle": ""})
        lines[model][CHANCE] = (x, mean)
        at = part[part.ratio == top].set_index("method").times_dense
        said[model] = f"{at['absolute only']:.2f} and {at['simple mean']:.2f} times dense"
        panel.set_title(model)
    panels[-1].set_xlabel("FFN neurons deleted, %")
    perplexity_axis(panels)
    sentence = f"With {percent(top)} of the neurons deleted, perplexity by absolute only and by the simple mean"
    headline(figure, f"{sentence}: {for_each(said)}")
    for panel, own in zip(panels, lines.values(), strict=True):
        label_ends(panel, own)
    return figure


# COMP


def importance_figure(importance: Mapping[str, Sequence[float]], indices: Mapping[str, Sequence], limit: float = 1.1) -> Figure:
    """Block by block: the importance of each, and the share of its neurons whose condition index exceeds a limit.

    importance: {model: of each block}; indices: {model: condition indices of each block's neurons}.
    """
    figure, (top, bottom) = column(2, 2.4, sharex=True)
    color, spread, above = COLOURS["deletes neurons"], {}, {}
    lines, shares = {}, {}
    for number, model in enumerate(importance):
        looks = by_place(number, color)
        blocks, values = range(len(importance[model])), np.asarray(importance[model], dtype=float)
        lines[model], rest = (blocks, values), np.delete(values, values.argmax())
        spread[model] = f"{rest.max() / rest.min():.1f}"
        over = [np.asarray(found) > limit for found in indices[model]]
        shares[model] = (blocks, [100 * found.mean() for found in over])
        above[model] = percent(np.concatenate(over).mean(), 1)
        top.plot(*lines[model], lw=2, **looks)
        bottom.plot(*shares[model], lw=2, **looks)
    top.set(ylabel="importance", yscale="log")
    plain_numbers(top.yaxis, (1, 2, 5))
    bottom.set(ylabel=f"neurons with an\nindex over {limit:g}, %", xlabel="block", ylim=(0, None))
    bottom.xaxis.get_major_locator().set_params(integer=True)
    sentence = f"All blocks but one lie within a factor of {for_each(spread)} in importance"
    headline(figure, f"{sentence}; neurons with a condition index over {limit:g}: {for_each(above)}")
    for panel, own in ((top, lines), (bottom, shares)):
        label_ends(panel, own, dict.fromkeys(own, color))
    return figure


def diagnostics_figure(table: pd.DataFrame, bound: float) -> Figure:
    """Block by block: neurons removed, variance of the multipliers beside its bound, error with and without them.

    table: rows of `diagnostics`; a block that was removed leaves a gap.
    """
    kept = table[~table.removed.astype(bool)]
    figure, panels = column(3, 1.9, sharex=True)
    color, ends = COLOURS["deletes neurons"], [{}, {}, {}]
    for number, (model, part) in enumerate(table.groupby("model", sort=False)):
        part = part.where(~part.removed.astype(bool))
        looks = by_place(number, color)
        for panel, end, values in zip(panels, ends, (100 * part.cut, part.variance, part.error), strict=True):
            panel.plot(part.block, values, lw=2, **looks)
            end[model] = (part.block, values)
        panels[2].plot(part.block, part.untuned, color=INK, lw=1, ls=looks["linestyle"])
        ends[2][f"{model}, untuned"] = (part.block, part.untuned)
    panels[1].axhline(bound, color=INK, ls=":", lw=1.5)
    panels[1].text(table.block.min(), bound, "bound", va="bottom", color=INK)
    panels[1].set(yscale="log", ylim=(None, 3 * bound))
    plain_numbers(panels[1].yaxis, (1,))
    titles = ("neurons removed, %", "variance of the multipliers", "squared error of the FFN's output")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
    panels[2].set(xlabel="block", ylim=(0, None))
    gained = 1 - kept.error / kept.untuned
    within = f"{(kept.variance <= bound).sum()} of {len(kept)} blocks keep the variance within the bound"
    headline(figure, f"Tuning lowers the error of a block by {percent(gained.min())} to {percent(gained.max())}; {within}")
    for panel, own in zip(panels, ends, strict=True):
        label_ends(panel, own, {name: INK if "untuned" in name else color for name in own})
    return figure


# The comparison


def speed_figure(table: pd.DataFrame) -> Figure:
    """How many times as fast as dense each method's network is, by what the method removes. table: rows of `latency`."""
    table = table.assign(kind=[style_of(method).removes for method in table.method])
    kinds = [kind for kind in COLOURS if kind in set(table.kind)]
    figure, panels = column(2, 0.38 * len(kinds) + 0.5, sharex=True)
    for panel, part in zip(panels, ("prefill", "decode"), strict=True):
        for place, kind in enumerate(kinds):
            own, color = table[table.kind == kind], COLOURS[kind]
            values = own[f"{part}_speedup"]
            panel.plot(own.ideal, [place] * len(own), "|", color=INK, ms=16, mew=1.5, zorder=2)
            panel.hlines(place, values.min(), values.max(), color=color, lw=7, alpha=0.3)
            panel.plot(values, [place] * len(own), "o", color=color, ms=7, alpha=0.8, zorder=3)
        panel.axvline(1, color=INK, lw=1)
        panel.set_yticks(range(len(kinds)), kinds)
        panel.set(title=part, ylim=(len(kinds) - 0.4, -0.6))
        for word, kind in zip(panel.get_yticklabels(), kinds, strict=True):
            word.set(color=COLOURS[kind], weight="bold")
    panels[1].set_xlabel("times as fast as dense (a dot: a method;\nupright: what multiply-adds alone would give)")
    spans = table[table.method != CHANCE].groupby("kind").decode_speedup.agg(["min", "max"]).map("{:.2f}".format)
    spans = spans.loc[[kind for kind in kinds if kind in spans.index]]
    said = {kind: low if low == high else f"{low} to {high}" for kind, low, high in spans.itertuples()}
    headline(figure, f"Decoding, times as fast as dense: {for_each(said)}")
    return figure


def undominated(x: pd.Series, y: pd.Series) -> list[str]:
    """The names, from the smallest x, of the points that no other has both a smaller x and a smaller y than."""
    names, best = [], float("inf")
    for name in x.sort_values().index:
        if y[name] < best:
            names, best = [*names, name], y[name]
    return names


def cost_figure(table: pd.DataFrame, measured: Mapping[str, Mapping[str, float]], model: str) -> Figure:
    """Perplexity over dense, and the seconds and the memory of compressing: a line for each method, the best first.

    table: rows of `cost`. measured: {method: its times_dense, low and high} on the model whose seconds are drawn.
    """
    table = table.set_index("method").join(pd.DataFrame(measured).T.astype(float)).sort_values("times_dense")
    seconds, places, colours = table[f"seconds_{model}"], range(len(table)), [style_of(method).color for method in table.index]
    shape = {"figsize": (WIDTH, 0.24 * len(table) + 1.5), "layout": "constrained", "sharey": True}
    figure, panels = plt.subplots(1, 3, **shape)
    for panel, values in zip(panels, (table.times_dense, seconds, table.peak_mb.astype(float)), strict=True):
        panel.hlines(places, values.min(), values, color=OTHERS, lw=1)
        panel.scatter(values, places, s=36, color=colours, zorder=3)
        panel.set_xscale("log")
    panels[0].hlines(places, table.low, table.high, color=colours, lw=2)
    over = table.times_dense.max() > TOP
    panels[0].set_xlim(0.95, TOP if over else None)
    labels = (f"times dense\n(cut at {TOP})" if over else "times dense", "seconds", "memory, MB")
    for panel, label, ticks in zip(panels, labels, ((1, 3) if over else (1, 1.5, 2, 3), (1,), (1, 3)), strict=True):
        panel.set_xlabel(label)
        plain_numbers(panel.xaxis, ticks)
    panels[0].set_yticks(places, table.index)
    panels[0].invert_yaxis()
    for word, color in zip(panels[0].get_yticklabels(), colours, strict=True):
        word.set(color=color, weight="bold")
    removed_below(figure, table.index)
    chance = table.times_dense.get(CHANCE, math.inf)  # what does not beat it was no compression, however quick
    front = undominated(seconds[table.times_dense < chance], table.times_dense)
    headline(figure, f"On {model}, nothing is both quicker and better than {', '.join(front)}")
    return figure


AIMS = {"next token": {"marker": "s", "mfc": "white"}, "dense model": {"marker": "o"}}  # what a compressed model can learn from


def healing_figure(table: pd.DataFrame, size: float) -> Figure:
    """Perplexity before and after a little training, by what the models learnt from. table: rows of `healing`, at one size."""
    models = list(table.model.unique())
    figure, panels = column(len(models), 0.42 * max(3, table.groupby("model").method.nunique().max()) + 0.5, sharex=True)
    for panel, model in zip(panels, models, strict=True):
        part = table[table.model == model].pivot(index="method", columns="learns_from").sort_values(("before", "dense model"))
        for place, method in enumerate(part.index):
            own, color = part.loc[method], style_of(method).color
            panel.hlines(place, own["after"].min(), own["before"].max(), color=color, lw=1, alpha=0.5)
            panel.plot(own["before"].max(), place, "|", color=color, ms=14, mew=2)
            for aim, looks in AIMS.items():
                value = own[("after", aim)]
                spread = [[value - own[("low", aim)]], [own[("high", aim)] - value]]
                panel.errorbar(value, place, xerr=spread, color=color, ms=7, capsize=3, **looks)
        panel.set(xscale="log", title=model, ylim=(len(part) - 0.4, -0.6))
        panel.set_yticks(range(len(part)), part.index)
        plain_numbers(panel.xaxis, (1, 1.5, 2, 3, 5, 7, 10))
    panels[-1].set_xlabel("perplexity, times dense")
    names = {"before": {"marker": "|", "mew": 2}, **{f"from the {aim}": looks for aim, looks in AIMS.items()}}
    handles = [Line2D([], [], color=INK, ls="", ms=8, label=name, **looks) for name, looks in names.items()]
    figure.legend(handles=handles, ncols=3, loc="outside lower center", frameon=False)
    spans = table.groupby("model", sort=False).agg({"before": ["min", "max"], "after": ["min", "max"]})
    said = [f"{span(a, b)} become {span(c, d)} ({model})" for model, a, b, c, d in spans.itertuples()]
    headline(figure, f"After a little training at {percent(size)}, times dense: {', '.join(said)}")
    return figure


def span(low: float, high: float) -> str:
    """Two numbers with one digit behind the point, or one where they are the same."""
    return f"{low:.1f} to {high:.1f}" if f"{low:.1f}" != f"{high:.1f}" else f"{low:.1f}"


def front_picture(results: Path, profiles: Iterable[str]) -> list[Path]:
    """Draw the comparisons of some profiles as `figures/size.svg` and `.png` of the results folder."""
    tables = [pd.read_csv(Path(results) / profile / "compare" / "tables" / "pareto.csv") for profile in profiles]
    written = Results("front", results)
    with plt.rc_context(LOOK):
        figure = size_figure(pd.concat(tables, ignore_index=True), beside=True)
        written.figure("size", figure)
    plt.close(figure)
    return [Path(results) / name for name in written.files]


def device_figure(table: pd.DataFrame, title: str) -> Figure:
    """Perplexity of files against their bytes, and against how fast they write: the dense model in several kinds, and methods.

    table: rows of `lib.suite.on_device.device_rows` of one model. A line joins the files of one method and kind, from small to
    large shares removed; hollow marks have 16 bits. Small files are on the right, where lines end that remove much.
    """
    figure, panels = column(2, 2.9)
    lines, colours = device_lines(table), {}
    for panel, measure in zip(panels, ("mb", "writes"), strict=True):
        for name, part in lines.items():
            method, fill = part.method.iloc[0], {"mfc": "white"} if set(part.kind) == {"F16"} else {}
            looks = {"color": INK, "marker": "s"} if method == "dense" else look(method)
            colours[name] = looks["color"]
            panel.plot(part[measure], part.times_dense, lw=1.6, ms=6, **looks | fill | {"label": name})
            ranges(panel, part[measure], part.times_dense, part.low, part.high, fmt="none", ecolor=looks["color"])
    panels[0].set(xscale="log", xlabel="MB of the file, from large to small")
    panels[0].invert_xaxis()
    plain_numbers(panels[0].xaxis, (1, 1.5, 2, 3, 5, 7))
    panels[1].set_xlabel("writes, times as fast as dense in F16")
    perplexity_axis(panels)
    removed_below(figure, set(table.method) - {"dense"})
    headline(figure, title)
    for panel, measure in zip(panels, ("mb", "writes"), strict=True):
        label_ends(panel, {name: (part[measure], part.times_dense) for name, part in lines.items()}, colours)
    return figure


def device_lines(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each line of `device_figure` by its name, method and kind: all kinds of the dense model are one line."""
    names = (table.method + ", " + table.kind).where(table.method != "dense", "dense, 16 to 4 bits")
    return dict(iter(table.groupby(names, sort=False)))
