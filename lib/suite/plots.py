"""How figures look: a colour for each thing that a method removes, a marker for each method, and the few ways to draw them.

`STYLE` is the one table that every figure of every profile follows. Nothing is measured here: the functions take axes and
numbers, and return what they drew on or nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from lib.suite.results import Results

LOOK = {
    "figure.figsize": (7, 3.6),
    "figure.dpi": 144,
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
OTHERS = "#BBBBBB"  # lines that only show where the field is


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

HIGHLIGHTED = ("COMP", "Structured AFR", "SliceGPT", "SVD-LLM (W)", "CFSP", "ShortGPT", "random neurons")
NEAR = 0.015  # a model counts at a size when what was really removed is within this of it
TOP = 40  # times dense: what is worse than this has collapsed, and how badly does not matter


def style_of(method: str) -> Style:
    """The style of a method; `UNKNOWN`, dark grey, for one without a line in `STYLE`."""
    return STYLE.get(method, UNKNOWN)


def look(method: str) -> dict:
    """The style as keywords of `Axes.plot`, with the method's name as label."""
    style = style_of(method)
    return {"color": style.color, "marker": style.marker, "linestyle": style.line, "label": method}


def row(count: int, width: float = 4.8, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its panels side by side."""
    size = (width * count, height)
    figure, panels = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, panels[0]


def plain_numbers(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis with ordinary numbers, `ticks` of them in every decade."""
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter("{x:,g}")
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
    panels[0].set_ylabel(f"{label} (cut at {TOP})" if highest > TOP else label)


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
        if bold is None:
            panel.plot(x, y, ms=5, lw=1.2, **look(method))
        elif method in bold:
            panel.plot(x, y, ms=6, lw=2.2, zorder=3, **look(method))
        else:
            panel.plot(x, y, color=OTHERS, lw=0.9, zorder=2)


def ranges(panel: Axes, x: Sequence, middle: Sequence, low: Sequence, high: Sequence, **looks) -> None:
    """Points at `middle` with bars from `low` to `high`."""
    below = [float(m - least) for m, least in zip(middle, low, strict=True)]
    above = [float(most - m) for m, most in zip(middle, high, strict=True)]
    panel.errorbar(x, middle, [below, above], capsize=3, **looks)


def scatter(grid: Mapping[str, Mapping[str, Mapping[str, tuple]]]) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """A panel of points for each {y label: {x label: {method: (x, y)}}}; the first row is perplexity over dense."""
    columns = list(next(iter(grid.values())))
    shape = {"figsize": (5 * len(columns), 0.8 + 3.2 * len(grid)), "squeeze": False, "sharex": "col", "sharey": "row"}
    figure, panels = plt.subplots(len(grid), len(columns), layout="constrained", **shape)
    for axes, (label, clouds) in zip(panels, grid.items(), strict=True):
        axes[0].set_ylabel(label)
        for panel, cloud in zip(axes, clouds.values(), strict=True):
            for method, (x, y) in cloud.items():
                panel.plot(x, y, ms=7, **look(method) | {"linestyle": ""})
    for panel, label in zip(panels[-1], columns, strict=True):
        panel.set_xlabel(label)
    perplexity_axis(panels[0], next(iter(grid)))
    methods_below(figure, cloud)
    return figure, panels


def methods_below(figure: Figure, methods: Iterable[str], columns: int = 6) -> None:
    """A legend of methods below the figure, those of one colour beside each other."""
    order = list(COLOURS)
    methods = sorted(methods, key=lambda method: order.index(style_of(method).removes))
    handles = [Line2D([], [], ms=6, **look(method)) for method in methods]
    figure.legend(handles=handles, fontsize=8, ncols=columns, handlelength=3, loc="outside lower center", frameon=False)


def removed_below(figure: Figure, methods: Iterable[str], others: bool = False) -> None:
    """A legend of the colours below the figure: what the methods remove."""
    shown = {style_of(method).removes for method in methods}
    colours = {name: colour for name, colour in COLOURS.items() if name in shown} | ({"others": OTHERS} if others else {})
    handles = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
    columns = int(figure.get_figwidth() / 1.9)
    figure.legend(handles=handles, ncols=columns, loc="outside lower center", frameon=False)


def by_depth(count: int) -> list:
    """A colour for each of `count` places on the way from the embedding to the head."""
    return [plt.cm.viridis(i / max(count - 1, 1)) for i in range(count)]


def depth_bar(figure: Figure, panels: Sequence[Axes], count: int, label: str) -> None:
    """The bar that explains the colours `by_depth`."""
    scale = plt.cm.ScalarMappable(cmap="viridis", norm=plt.Normalize(0, max(count - 1, 1)))
    figure.colorbar(scale, ax=panels, label=label)


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


def label_ends(panel: Axes, lines: Mapping[str, tuple], size: float = 10) -> None:
    """Write the names of {method: (x, y)} right of their lines, an arrow behind those that leave the panel at its top.

    To be called last: how far labels must be apart depends on the height that titles and legends leave to the panel.
    """
    panel.figure.draw_without_rendering()
    gap = 1.3 * size / 72 / (panel.get_window_extent().height / panel.figure.dpi)
    fractions = panel.transScale + panel.transLimits
    ends = {name: line_end(fractions.transform(list(zip(x, y, strict=True)))) for name, (x, y) in lines.items()}
    ends = dict(sorted(ends.items(), key=lambda item: (item[1][1], -item[1][0])))
    places = apart([y for _, y, _ in ends.values()], gap, gap / 2, 1 - gap / 2)
    for (name, (x, y, leaves)), place in zip(ends.items(), places, strict=True):
        color = style_of(name).color
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


def size_figure(table: pd.DataFrame) -> Figure:
    """Perplexity over dense against what is really removed, a panel for each model: the main picture.

    table: rows of `pareto`, that is model, method, size, removed_decoder, relative.
    """
    table = table[table.method != "dense"]
    models = list(table.model.unique())
    figure, panels = row(len(models), 3.9 if len(models) > 1 else 6.2, 4.6)
    lines = {model: lines_of(table[table.model == model]) for model in models}
    for panel, model in zip(panels, models, strict=True):
        curves(panel, lines[model], HIGHLIGHTED)
        panel.set(title=model, xlabel="decoder parameters really removed, %")
    perplexity_axis(panels)
    methods = table.method.unique()
    removed_below(figure, [method for method in methods if method in HIGHLIGHTED], any(m not in HIGHLIGHTED for m in methods))
    title = textwrap.fill(message(table), int(10 * figure.get_figwidth()), break_on_hyphens=False)
    figure.suptitle(title, weight="bold", size=12)
    for panel, model in zip(panels, models, strict=True):
        label_ends(panel, {method: lines[model][method] for method in HIGHLIGHTED if method in lines[model]})
    return figure


def front_picture(results: Path, profiles: Iterable[str]) -> list[Path]:
    """Draw the comparisons of some profiles as `figures/size.svg` and `.png` of the results folder."""
    tables = [pd.read_csv(Path(results) / profile / "compare" / "tables" / "pareto.csv") for profile in profiles]
    written = Results("front", results)
    with plt.rc_context(LOOK):
        figure = size_figure(pd.concat(tables, ignore_index=True))
        written.figure("size", figure)
    plt.close(figure)
    return [Path(results) / name for name in written.files]


def device_figure(table: pd.DataFrame, title: str) -> Figure:
    """Perplexity of files against their bytes, and against how fast they write: the dense model in several kinds, and methods.

    table: rows of `lib.suite.on_device.device_rows` of one model. A line joins the files of one method and kind, from small to
    large shares removed; hollow marks have 16 bits.
    """
    figure, panels = row(2, 4.8, 4.4)
    for panel, column in zip(panels, ("mb", "writes"), strict=True):
        for (method, kind), part in device_lines(table).items():
            looks = {"color": "black", "marker": "s"} if method == "dense" else look(method)
            fill = {"mfc": "white"} if kind == "F16" else {}
            panel.plot(part[column], part.times_dense, lw=1.6, ms=7, **looks | fill | {"label": f"{method}, {kind}"})
            below, above = part.times_dense - part.low, part.high - part.times_dense
            panel.errorbar(part[column], part.times_dense, [below, above], fmt="none", ecolor=looks["color"], capsize=3)
    panels[0].set(xscale="log", xlabel="MB of the file")
    plain_numbers(panels[0].xaxis, (1, 1.5, 2, 3, 5, 7))
    panels[1].set(xlabel="writes, times as fast as dense in 16 bits")
    perplexity_axis(panels)
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", frameon=False)
    figure.suptitle(textwrap.fill(title, 90), weight="bold", size=12)
    return figure


def device_lines(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of each line of `device_figure`, {(method, kind): rows}: all kinds of the dense model are one line."""
    kinds = table.kind.where(table.method != "dense", "16 to 4 bits")
    return dict(iter(table.groupby([table.method, kinds], sort=False)))
