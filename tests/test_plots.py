"""Figures look alike everywhere: one style per method, labels that can be read, and a title that says what the numbers say."""

import functools
import itertools
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection

from lib.suite import on_device, plots, published
from lib.suite.pages import SHOWN, sizes_of
from lib.suite.plots import CHANCE, COLOURS, STYLE, UNKNOWN, WIDTH, apart, line_end, look, style_of
from lib.suite.results import RESULTS

# Tables whose methods a figure draws, and the rows that it leaves out.
DRAWN = {
    "compare": ["pareto", "latency", "cost"],
    "slicegpt": ["perplexity"],
    "svd_llm": ["perplexity", "comparison_with_paper"],
    "afr": ["curves"],
    "comp": ["ratio_sweep"],
}
LEFT_OUT = {"dense", "no rotation"}
TABLES = [
    pytest.param(path, id="-".join((path.parts[-4], path.parts[-3], path.stem)))
    for paper, names in DRAWN.items()
    for name in names
    for path in sorted(RESULTS.glob(f"*/{paper}/tables/{name}.csv"))
]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def methods_in(path):
    return set(pd.read_csv(path).method) - LEFT_OUT


DRAWN_IN_FRONT = [profile for profile in SHOWN if len(sizes_of(RESULTS, profile)) > 1]


def compared():
    """The rows of all committed comparisons that have curves."""
    paths = [RESULTS / profile / "compare" / "tables" / "pareto.csv" for profile in DRAWN_IN_FRONT]
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)


def test_tables_of_every_paper_are_looked_at():
    assert {table.values[0].parts[-3] for table in TABLES} == set(DRAWN)


@pytest.mark.parametrize("path", TABLES)
def test_every_method_that_is_drawn_has_a_style(path):
    assert methods_in(path)
    assert not methods_in(path) - set(STYLE)


@pytest.mark.parametrize("path", TABLES)
def test_methods_drawn_together_differ(path):
    looks = [(style_of(method).color, style_of(method).marker) for method in methods_in(path)]
    assert len(set(looks)) == len(looks)


def test_colours_are_equal_exactly_where_what_is_removed_is_equal():
    for a, b in itertools.combinations(STYLE.values(), 2):
        assert (a.color == b.color) == (a.removes == b.removes)
    assert len({*COLOURS.values(), plots.OTHERS}) == len(COLOURS) + 1


def test_a_method_without_a_line_in_the_table_has_a_colour_of_its_own():
    assert style_of("a reader's own") == UNKNOWN
    assert look("a reader's own")["label"] == "a reader's own"
    assert UNKNOWN.color not in {style.color for style in STYLE.values()}


def luminance(colour):
    """Relative luminance of a colour, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_of_black_and_white_is_21():
    assert (luminance("#FFFFFF") + 0.05) / (luminance("#000000") + 0.05) == pytest.approx(21)


@pytest.mark.parametrize("method", [*plots.PAPERS, *plots.NEXT, CHANCE])
def test_highlighted_colours_can_be_read_on_white(method):
    assert 1.05 / (luminance(STYLE[method].color) + 0.05) >= 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).map(sorted), st.floats(0.01, 0.1))
def test_places_are_apart_in_order_and_inside(wanted, gap):
    found = apart(wanted, gap)
    assert len(found) == len(wanted)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= -1e-9
    assert found[-1] <= 1 + 1e-9


@given(st.lists(st.integers(0, 20), min_size=1, unique=True).map(sorted))
def test_places_that_are_apart_already_stay(wanted):
    assert apart([place / 20 for place in wanted], 0.05) == pytest.approx([place / 20 for place in wanted])


def test_places_move_as_little_as_possible():
    assert apart([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert apart([0.1, 0.5, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.45, 0.55, 0.9])
    assert apart([1, 1], 0.2) == pytest.approx([0.8, 1])


def test_where_a_line_ends():
    assert line_end([(0, 0.2), (0.5, 0.6)]) == (0.5, 0.6, False)
    assert line_end([(0, 0.5), (1, 1.5), (2, 0.3)]) == (0.5, 1.0, True)  # it leaves, whatever comes after
    assert line_end([(0.3, 7.0), (1, 9.0)]) == (0.3, 1.0, True)


def written(figure):
    """The labels at the ends of lines in each panel, as boxes in pixels by their words."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    return [{text.get_text(): box(text, renderer) for text in panel.texts} for panel in figure.axes]


def without_arrow(labels):
    return {name.removesuffix(" ↑") for name in labels}


CROWD = [*plots.PAPERS, *plots.NEXT[:2]]


def crowd():
    """Rows of one model whose highlighted methods all end at nearly the same perplexity, and one that leaves the panel."""
    rows = [(CHANCE, 0.2, 1e3), (CHANCE, 0.5, 1e6)]
    rows += [(method, p, 1 + 10 * p + i / 100) for i, method in enumerate(CROWD) for p in (0.2, 0.5)]
    frame = pd.DataFrame(rows, columns=["method", "size", "relative"])
    return frame.assign(model="toy", removed_decoder=frame["size"], low=0.9 * frame.relative, high=1.1 * frame.relative)


@pytest.mark.parametrize("table", [compared(), crowd()], ids=["committed", "crowd"])
def test_labels_at_the_ends_of_lines_neither_overlap_nor_leave_the_figure(table):
    figure = plots.size_figure(table, beside=True)
    names = written(figure)
    panels = [panel.get_window_extent() for panel in figure.axes]
    for number, (panel, labels) in enumerate(zip(panels, names, strict=True)):
        assert len(labels) >= 6
        assert not [pair for pair in itertools.combinations(labels, 2) if labels[pair[0]].overlaps(labels[pair[1]])]
        right = panels[number + 1].x0 if number + 1 < len(panels) else figure.bbox.x1
        for box in labels.values():
            assert panel.x1 < box.x0 < box.x1 < right
            assert panel.y0 <= box.y0 < box.y1 <= panel.y1 + 1


def test_an_arrow_marks_the_lines_that_leave_the_panel():
    labels = written(plots.size_figure(crowd()))[0]
    assert [name for name in labels if name.endswith("↑")] == ["random neurons ↑"]


def test_the_picture_has_a_panel_for_each_model_and_the_methods_of_its_rows():
    table = compared()
    figure = plots.size_figure(table)
    assert [panel.get_title() for panel in figure.axes] == ["smollm2-135m", "wiki-a-llama", "wiki-a-opt", "gemma-3-270m"]
    for panel, labels in zip(figure.axes, written(figure), strict=True):
        rows = table[(table.model == panel.get_title()) & (table.method != "dense")]
        bold = plots.highlighted(table[table.method != "dense"], panel.get_title())
        assert without_arrow(labels) == {*bold, CHANCE} & set(rows.method)
        assert len(panel.get_lines()) == rows.method.nunique()
        shown = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
        for method in without_arrow(labels):
            own = rows[rows.method == method][["removed_decoder", "relative"]]
            own = own.drop_duplicates("removed_decoder").sort_values("removed_decoder")  # a size may be reached twice
            assert np.allclose(shown[method], own.to_numpy() * [100, 1])
        assert len(panel.collections) == len(bold)  # a band of intervals for each, empty where a model lacks the method


def test_the_papers_methods_and_the_best_of_each_model_are_in_colour():
    table = compared()
    for model, best in plots.lowest(table).items():
        bold, there = plots.highlighted(table, model), set(table[table.model == model].method)
        assert len(bold) == plots.MOST
        assert {*plots.PAPERS, best} & there <= set(bold)
        assert CHANCE not in bold
    few = table[table.method.isin(["FLAP", "SVD", CHANCE])]
    assert set(plots.highlighted(few, "wiki-a-opt")) == {"FLAP", "SVD"}  # where there is room, all are


def test_the_title_is_what_the_rows_say():
    rows = [
        ("a", "COMP", 0.2, 0.2, 1.0),
        ("a", "CFSP", 0.5, 0.5, 3.0),
        ("a", "COMP", 0.5, 0.5, 4.0),
        ("b", "CFSP", 0.5, 0.5, 2.0),
    ]
    rows += [("b", "ShortGPT", 0.5, 0.4, 1.5), ("c", "COMP", 0.5, 0.5, 5.0)]  # ShortGPT is better because it is larger
    table = pd.DataFrame(rows, columns=["model", "method", "size", "removed_decoder", "relative"]).assign(low=None, high=None)
    assert plots.lowest(table) == {"a": "CFSP", "b": "CFSP", "c": "COMP"}
    words = "With 50 % of the decoder removed, perplexity is lowest for CFSP on a and b, COMP on c"
    assert plots.message(table) == words
    assert plots.size_figure(table).get_suptitle().replace("\n", " ") == words


def test_an_axis_that_is_cut_says_so():
    for highest, cut in ((1e7, True), (3.0, False)):
        panel = plots.row(1)[1][0]
        plots.curves(panel, {"COMP": ([10, 50], [1.1, highest])})
        plots.perplexity_axis([panel])
        assert ("cut at 40" in panel.get_ylabel()) == cut
        assert panel.get_ylim() == pytest.approx((0.95, 40 if cut else 3.3))


def test_a_model_that_could_not_be_measured_leaves_a_gap():
    table = crowd()
    table.loc[table.method == "COMP", "relative"] = [1.5, float("nan")]
    [panel] = plots.size_figure(table).axes
    assert [line.get_xydata().tolist() for line in panel.get_lines() if line.get_label() == "COMP"] == [[[20, 1.5]]]
    assert "COMP" in written(panel.figure)[0]


def test_logarithmic_axes_have_ordinary_numbers():
    panel = plots.column(1)[1][0]
    plots.curves(panel, {"SVD": ([512, 8192], [1, 30000])})
    panel.set_yscale("log")
    plots.plain_numbers(panel.yaxis, (1, 3))
    plots.doublings(panel)
    panel.figure.draw_without_rendering()
    for axis, some in ((panel.yaxis, {"1", "300", "10,000"}), (panel.xaxis, {"512", "1,024", "8,192"})):
        words = {tick.get_text() for tick in axis.get_ticklabels()}
        assert some <= words
        assert all(re.fullmatch(r"[\d,.]+", word) for word in words)


def test_others_are_thin_and_grey_where_some_are_bold():
    panel = plots.row(1)[1][0]
    plots.curves(panel, {"COMP": ([1, 2], [1, 2]), "SVD": ([1, 2], [2, 3])}, bold=("COMP",))
    bold, thin = panel.get_lines()
    assert (bold.get_color(), bold.get_marker()) == (STYLE["COMP"].color, STYLE["COMP"].marker)
    assert thin.get_color() == plots.OTHERS
    assert thin.get_linewidth() < bold.get_linewidth()


def test_bars_reach_from_the_lowest_to_the_highest():
    panel = plots.row(1)[1][0]
    plots.ranges(panel, [1, 2], [3, 5], [2, 5], [6, 7], label="x")
    [bars] = panel.containers
    low_and_high = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert low_and_high == [[2, 6], [5, 7]]


def committed(paper, name, profile="workshop"):
    return pd.read_csv(RESULTS / profile / paper / "tables" / f"{name}.csv")


PLANE = np.array([[3.0, 0.1], [-3.0, 0.1], [1.0, -0.2], [-1.0, 0.0]])
SHARES = {"a": np.tile([0.5, 0.3, 0.15, 0.05], (3, 1)), "b": [[0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.2, 0.0]]}
ANGLES = {"a": [[0, 10, 20], [0, 60, 80], [0, 0, 4]], "b": [[0, 30, 31], [0, 1, 2], [0, 0, 90]]}
AMOUNTS = pd.DataFrame({"mean": [2.0, 1.5], "low": [1.8, 1.4], "high": [2.5, 1.6]}, index=[512, 8192])
PARTS = {"matrices": 60.0, "shortcuts": 0.0, "attention": 30.0, "norms": 5.0, "activation": 3.0, "rest": 2.0}
BREAKDOWN = [{"method": "dense"} | PARTS, {"method": "SliceGPT"} | PARTS | {"matrices": 40.0, "shortcuts": 10.0}]
PLAIN = {"0.q_proj": [1, 1, 1, 1], "1.q_proj": [9, 1, 1, 1], "0.up_proj": [9, 1, 1, 1]}
WHITENED = {name: [9, 1, 1, 1] for name in PLAIN}
LOSSES = {
    "model": "a",
    "matrix": ["0.q", "1.q", "0.v"],
    "SVD": [0.5, 0.6, 0.2],
    "FWSVD": [0.4, 0.7, 0.3],
    "ASVD": [0.6, 0.5, 0.4],
}
LOSSES |= {"SVD-LLM (W)": [0.3, 0.3, 0.3]}
EVEN = {"b0.q_proj": 10, "b1.q_proj": 10, "b0.up_proj": 20, "b1.up_proj": 20}
PLANS = {"one": {"b0.q_proj": 15, "b0.up_proj": 10, "b1.up_proj": 20}, "other": EVEN}
CLIP = ("block 0, neuron 1", [-9.0, *np.linspace(-1, 1, 98), 11.0], -1.0, 1.0, [-1.0, 1.0], [0.5, 0.5])
DELETED = {"a": ([-2.0, -1.0, 1.0, 2.0], [-0.2, -0.1, 0.1, 0.2]), "b": ([3.0, -1.0, 2.0, -4.0], [0.3, -0.1, 0.2, -0.4])}
IMPORTANCE, INDICES = {"a": [9.0, 1.0, 2.0]}, {"a": [[1.0, 1.2], [1.0, 1.05], [1.3, 1.4]]}
CURVES = [
    {
        "model": "a",
        "method": method,
        "ratio": ratio,
        "times_dense": 1 + ratio * k,
        "low": 1 + 0.9 * ratio * k,
        "high": 1 + 1.1 * ratio * k,
    }
    for k, method in enumerate(("absolute only", "absolute + GMM", "GMM only", "simple mean"), 2)
    for ratio in (0.0, 0.2, 0.5)
]
TUNED = [
    {"model": "a", "block": block, "removed": gone, "cut": 0.2, "variance": variance, "error": error, "untuned": 0.5}
    for block, gone, variance, error in ((0, False, 0.01, 0.4), (1, True, None, None), (2, False, 0.2, 0.5))
]
COSTS = [("COMP", 2.0, 90.0), ("CFSP", 1.0, 30.0), ("SVD", 0.5, None), (CHANCE, 0.1, 9.0), ("FPT", 3.0, 50.0)]
COST = pd.DataFrame(COSTS, columns=["method", "seconds_a", "peak_mb"])
TIMES = {"COMP": 1.1, "CFSP": 1.2, "SVD": 2.5, CHANCE: 1.5, "FPT": 1.15}
TIMES = {method: {"times_dense": value, "low": value - 0.05, "high": value + 0.05} for method, value in TIMES.items()}
HEALED = [
    {
        "model": model,
        "method": method,
        "learns_from": aim,
        "before": before,
        "after": after,
        "low": 0.95 * after,
        "high": 1.1 * after,
    }
    for model in ("a", "b")
    for method, before, aims in (("CFSP", 2.5, (1.5, 1.4)), ("SVD-LLM (W)", 11.0, (3.0, 2.8)))
    for aim, after in zip(plots.AIMS, aims, strict=True)
]
PRINTED = {
    method: {R: value / published.SVD_LLM_TABLE_1_DENSE for R, value in row.items()}
    for method, row in published.SVD_LLM_TABLE_1.items()
}
DEVICE = committed("compare", "device").query("model == 'wiki-a-llama'")
MADE = {
    "axes": (plots.axes_figure, PLANE, np.eye(2)),
    "energy": (plots.energy_figure, SHARES, [0.25, 0.5], 0.5),
    "angles": (plots.angles_figure, ANGLES, {"a": 5, "b": 4}),
    "layouts": (plots.layouts_figure, committed("slicegpt", "perplexity"), 0.25),
    "calibration": (
        plots.calibration_figure,
        {"tokens": {"a": AMOUNTS}, "words": {"a": AMOUNTS, "b": 2 * AMOUNTS}},
        "times",
        "SliceGPT",
    ),
    "breakdown": (plots.breakdown_figure, pd.DataFrame(BREAKDOWN), "milliseconds"),
    "spectra": (plots.spectra_figure, PLAIN, WHITENED, "a"),
    "loss": (plots.loss_figure, pd.DataFrame(LOSSES), 0.4),
    "ratio": (plots.ratio_figure, committed("svd_llm", "perplexity"), PRINTED, 0.4),
    "memory": (plots.memory_figure, committed("svd_llm", "memory"), published.SVD_LLM_FIGURE_4, 0.4),
    "ranks": (plots.ranks_figure, PLANS, EVEN, "a at 40 %"),
    "clip": (plots.clip_figure, {"refer": CLIP, "snip": CLIP}),
    "premise": (plots.premise_figure, DELETED),
    "aggregation": (plots.aggregation_figure, pd.DataFrame(CURVES), {"a": {0.2: [2.0, 3.0], 0.5: [5.0, 7.0]}}),
    "importance": (plots.importance_figure, IMPORTANCE, INDICES),
    "diagnostics": (plots.diagnostics_figure, pd.DataFrame(TUNED), 0.1),
    "size": (plots.size_figure, crowd()),
    "speed": (plots.speed_figure, committed("compare", "latency")),
    "cost": (plots.cost_figure, COST, TIMES, "a"),
    "healing": (plots.healing_figure, pd.DataFrame(HEALED), 0.5),
    "device": (plots.device_figure, DEVICE, on_device.headline(DEVICE.to_dict("records"))),
}


@functools.cache
def made(name):
    """A figure as a notebook makes it, laid out."""
    draw, *given = MADE[name]
    with plt.rc_context(plots.LOOK):
        figure = draw(*given)
        plt.close(figure)
        FigureCanvasAgg(figure).draw()
    return figure


def said(name):
    return made(name).get_suptitle().replace("\n", " ")


def box(text, renderer):
    """Where a text stands, without the arrow of an annotation."""
    return plt.Text.get_window_extent(text, renderer)


def words_of(figure):
    """Every text of a figure, those beyond the ends of its axes too."""
    return [text for text in figure.findobj(plt.Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", MADE)
def test_figures_can_be_read_on_a_phone(name):
    figure = made(name)
    assert min(text.get_fontsize() for text in words_of(figure)) >= 9  # points, of a figure that is as wide as a phone
    assert figure.get_figwidth() == WIDTH
    assert figure.get_tightbbox().width <= WIDTH + 0.1  # names at the lines do not make it wider


@pytest.mark.parametrize("name", MADE)
def test_a_title_is_a_sentence_above_the_panels(name):
    figure = made(name)
    title, renderer = figure._suptitle, figure.canvas.get_renderer()
    own = box(title, renderer)
    assert len(said(name).split()) >= 6
    assert title.get_weight() == "bold"
    assert figure.bbox.x0 <= own.x0 < own.x1 <= figure.bbox.x1
    for panel in figure.axes:
        texts = [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        assert [text.get_text() for text in texts if text.get_text() and box(text, renderer).y1 > own.y0 + 1] == []
    assert not re.search(r"\d\n%", figure.get_suptitle())  # a number stays with its unit


@pytest.mark.parametrize("name", MADE)
def test_names_in_a_panel_do_not_overlap(name):
    renderer = made(name).canvas.get_renderer()
    for panel in made(name).axes:
        boxes = [box(text, renderer) for text in panel.texts if text.get_text()]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


LOGARITHMIC = {"layouts", "calibration", "ratio", "aggregation", "importance", "diagnostics", "size", "cost", "healing", "device"}


@pytest.mark.parametrize("name", MADE)
def test_logarithmic_axes_of_figures_have_ordinary_numbers(name):
    axes = [axis for panel in made(name).axes for axis in (panel.xaxis, panel.yaxis) if axis.get_scale() == "log"]
    numbers = [tick.get_text() for axis in axes for tick in axis.get_ticklabels() if tick.get_visible() and tick.get_text()]
    assert bool(numbers) == (name in LOGARITHMIC)
    assert all(re.fullmatch(r"[\d,.]+", number) for number in numbers)


def test_titles_say_what_the_numbers_say():
    assert said("axes") == "Deleting the second axis loses 0.3 % of the energy of these points"  # 0.06 of 20.06
    assert said("energy") == "Energy that is lost with 50 % of the directions: 20.0 % (a), 25.0 % (b)"
    assert said("angles") == "One step turns the stream by 70° (a), 90° (b) on average, no other by more than 15° (a), 31° (b)"
    assert said("calibration") == "Perplexity with 8,192 instead of 512 tokens: −25 % (a)"
    assert made("calibration").axes[1].get_title() == "8,192 instead of 512 words:\n−25 % (a), −25 % (b)"
    assert said("breakdown") == "Time of a prefill beside the dense one: −10 % (SliceGPT)"
    assert said("loss").startswith(
        "At 40 %, SVD-LLM loses least on 2 of 3 matrices: 30 % of the output on average, the best rival 37 %"
    )
    assert said("clip") == "Where the clip takes most, it divides the range of a neuron's scores by 10.0 (refer), 10.0 (snip)"
    assert said("premise").endswith("rank correlation 1.00 and 1.00 with the sign, 0.00 and −0.20 without")
    assert said("aggregation").endswith("by absolute only and by the simple mean: 2.00 and 3.50 times dense (a)")
    assert said("importance").startswith("All blocks but one lie within a factor of 2.0 (a) in importance;")
    assert said("importance").endswith("neurons with a condition index over 1.1: 50.0 % (a)")
    assert (
        said("diagnostics")
        == "Tuning lowers the error of a block by 0 % to 20 %; 1 of 2 blocks keep the variance within the bound"
    )
    assert said("cost") == "On a, nothing is both quicker and better than CFSP, COMP"
    assert said("ranks").startswith(
        "a at 40 %: one leaves 1 of 4 matrices whole and gives less than the equal rank to up_proj; other leaves 0"
    )
    # Of directions, 4 and 1 and 1 of 4 hold nine tenths of W, and 1 of 4 of W X.
    assert (
        said("spectra")
        == "90 % of the energy is in 50 % of the directions of W, and in 25 % of those of W X (mean of all matrices)"
    )


def test_titles_agree_with_other_tables():
    lost = committed("slicegpt", "energy_lost").groupby("model")["lost_at_0.25"].mean()
    spectra = {
        model: part.drop(columns=["model", "axis"]).T for model, part in committed("slicegpt", "spectrum").groupby("model")
    }
    title = plots.energy_figure(spectra, [0.1, 0.25, 0.5], 0.25).get_suptitle().replace("\n", " ")
    assert title.endswith(", ".join(f"{100 * value:.1f} % ({model})" for model, value in lost.items()))
    table = committed("slicegpt", "perplexity").set_index(["model", "method", "ratio"]).removed_model
    for method in ("SliceGPT", "SliceGPT, dense shortcuts"):
        words = f"{100 * table['wiki-a-llama', method, 0.25]:.0f} % ({method.removeprefix('SliceGPT, ')})"
        assert words in said("layouts")
    table = committed("svd_llm", "perplexity").set_index(["model", "ratio", "method"]).sort_index().times_dense
    for model in ("wiki-a-llama", "wiki-a-opt"):
        ours, rivals = table[model, 0.4, "SVD-LLM (W)"], table[model, 0.4][["SVD", "FWSVD", "ASVD"]]
        assert f"{ours:.3g} and {rivals.min():.3g} times dense ({model})" in said("ratio")
    table = committed("svd_llm", "memory").set_index(["model", "ratio"])
    for model in ("Llama-2-7B", "Llama-3-8B"):
        row = table.loc[(model, 0.4)]
        assert f"from {row.cache_bytes / 2**30:.1f} to {row.latent_bytes / 2**30:.1f} GiB ({model})" in said("memory")
    decode = committed("compare", "latency").set_index("method").decode_speedup
    assert f"{decode['ShortGPT']:.2f} (deletes blocks)" in said("speed")
    assert f"{decode['SliceGPT']:.2f} (narrows the stream)" in said("speed")


def spans(panel):
    """(lowest, highest) of every error bar in a panel."""
    bars = [segment[:, 1] for bar in panel.containers for part in bar.lines[2] for segment in part.get_segments()]
    return {tuple(np.round(bar, 6)) for bar in bars if len(set(bar)) > 1}


def shaded(panel):
    """(lowest, highest) of the bands of a panel."""
    bands = [band for band in panel.collections if isinstance(band, PolyCollection)]
    heights = [path.vertices[:, 1] for band in bands for path in band.get_paths() if len(path.vertices)]
    return [(y.min(), y.max()) for y in heights]


def test_intervals_are_drawn():
    assert spans(made("calibration").axes[0]) == {(1.8, 2.5), (1.4, 1.6)}
    assert spans(made("aggregation").axes[0]) == {(2.0, 3.0), (5.0, 7.0)}  # of the random draws
    bands = shaded(made("aggregation").axes[0])
    assert sorted(high for _, high in bands) == pytest.approx([1 + 1.1 * 0.5 * k for k in (2, 3, 4, 5)])
    rows = committed("slicegpt", "perplexity").query("model == 'wiki-a-llama' and method == 'SliceGPT'")
    assert {(round(low, 6), round(high, 6)) for low, high in zip(rows.low, rows.high, strict=True)} <= spans(
        made("layouts").axes[0]
    )
    rows = committed("svd_llm", "perplexity").query("model == 'wiki-a-llama' and method in @plots.TRUNCATED").groupby("method")
    assert sorted(high for _, high in shaded(made("ratio").axes[0])) == pytest.approx(sorted(rows.high.max()))
    assert sorted(high for _, high in shaded(made("size").axes[0])) == pytest.approx(
        sorted(1.1 * (6 + i / 100) for i in range(6))
    )
    bars = made("cost").axes[0].collections[-1].get_segments()
    assert np.allclose(sorted(tuple(bar[:, 0]) for bar in bars), sorted((t["low"], t["high"]) for t in TIMES.values()))


def test_files_are_named_where_their_lines_end():
    names = {"dense, 16 to 4 bits": plots.INK}
    names |= {f"{row.method}, {row.kind}": style_of(row.method).color for row in DEVICE.itertuples() if row.method != "dense"}
    for panel in made("device").axes:
        assert {text.get_text(): text.get_color() for text in panel.texts} == names
    left, right = made("device").axes[0].get_xlim()
    assert left > right, "small files are on the right, where much is removed"


def test_a_removed_block_leaves_a_gap():
    [line] = [line for line in made("diagnostics").axes[0].get_lines() if line.get_marker() == "o"]
    assert line.get_ydata() == pytest.approx([20, np.nan, 20], nan_ok=True)


def test_what_has_collapsed_is_cut_and_said_to_be():
    times = TIMES | {"SVD": {"times_dense": 2e9, "low": None, "high": None}}
    panel = plots.cost_figure(COST, times, "a").axes[0]
    assert (panel.get_xlabel(), panel.get_xlim()[1]) == ("times dense\n(cut at 40)", 40)
    assert made("cost").axes[0].get_xlabel() == "times dense"
    table = committed("svd_llm", "perplexity").query("model == 'wiki-a-llama'")
    table = table.assign(times_dense=table.times_dense.where(table.method != "SVD", 1e9))
    names = set(written(plots.ratio_figure(table, PRINTED, 0.4))[0])
    assert {"SVD ↑", "SVD-LLM", "SVD-LLM (W)"} <= names


def test_colours_say_what_is_removed():
    for name, kind in (("calibration", "narrows the stream"), ("ratio", "factors matrices"), ("aggregation", "deletes neurons")):
        labels = {text.get_color() for panel in made(name).axes for text in panel.texts}
        assert labels == {COLOURS[kind]} | ({COLOURS["chance"]} if name == "aggregation" else set())
    ticks = {text.get_text(): text.get_color() for text in made("cost").axes[0].get_yticklabels()}
    assert ticks == {method: style_of(method).color for method in TIMES}
    assert list(ticks) == sorted(TIMES, key=lambda method: TIMES[method]["times_dense"])
    ticks = {text.get_text(): text.get_color() for text in made("speed").axes[0].get_yticklabels()}
    assert ticks == {kind: COLOURS[kind] for kind in ticks}
    assert len(ticks) == 5


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_front_picture_is_drawn_from_the_committed_tables(tmp_path):
    for profile in SHOWN:
        folder = tmp_path / profile / "compare" / "tables"
        folder.mkdir(parents=True)
        shutil.copy(RESULTS / profile / "compare" / "tables" / "pareto.csv", folder)
    paths = plots.front_picture(tmp_path, DRAWN_IN_FRONT)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["figures/size.svg", "figures/size.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in plots.front_picture(tmp_path, DRAWN_IN_FRONT)] == first
    committed = texts(RESULTS / "figures" / "size.svg")
    assert texts(paths[0]) == committed
    assert plots.message(compared()) in " ".join(committed)  # the title may take two lines
    assert (RESULTS / "figures" / "size.png").is_file()
