"""Figures look alike everywhere: one style per method, labels that can be read, and a picture that says what its rows say."""

import itertools
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.suite import plots
from lib.suite.pages import SHOWN
from lib.suite.plots import COLOURS, HIGHLIGHTED, STYLE, UNKNOWN, apart, line_end, look, style_of
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


def compared():
    """The rows of all committed comparisons."""
    paths = [RESULTS / profile / "compare" / "tables" / "pareto.csv" for profile in SHOWN]
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


@pytest.mark.parametrize("method", HIGHLIGHTED)
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
    box = plt.Text.get_window_extent
    return [{text.get_text(): box(text, renderer) for text in panel.texts} for panel in figure.axes]


def without_arrow(labels):
    return {name.removesuffix(" ↑") for name in labels}


def crowd():
    """Rows of one model whose highlighted methods all end at nearly the same perplexity, and one that leaves the panel."""
    rows = [("random neurons", 0.2, 1e3), ("random neurons", 0.5, 1e6)]
    rows += [(method, p, 1 + 10 * p + i / 100) for i, method in enumerate(HIGHLIGHTED[:-1]) for p in (0.2, 0.5)]
    frame = pd.DataFrame(rows, columns=["method", "size", "relative"])
    return frame.assign(model="toy", removed_decoder=frame["size"])


@pytest.mark.parametrize("table", [compared(), crowd()], ids=["committed", "crowd"])
def test_labels_at_the_ends_of_lines_neither_overlap_nor_leave_the_figure(table):
    figure = plots.size_figure(table)
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
    assert [panel.get_title() for panel in figure.axes] == ["wiki-a-llama", "wiki-a-opt", "gemma-3-270m"]
    for panel, labels in zip(figure.axes, written(figure), strict=True):
        rows = table[(table.model == panel.get_title()) & (table.method != "dense")]
        assert without_arrow(labels) == set(HIGHLIGHTED) & set(rows.method)
        assert len(panel.get_lines()) == rows.method.nunique()
        shown = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
        for method in without_arrow(labels):
            own = rows[rows.method == method][["removed_decoder", "relative"]]
            own = own.drop_duplicates("removed_decoder").sort_values("removed_decoder")  # a size may be reached twice
            assert np.allclose(shown[method], own.to_numpy() * [100, 1])
    assert set(HIGHLIGHTED) <= set(table.method)


def test_the_title_is_what_the_rows_say():
    rows = [
        ("a", "COMP", 0.2, 0.2, 1.0),
        ("a", "CFSP", 0.5, 0.5, 3.0),
        ("a", "COMP", 0.5, 0.5, 4.0),
        ("b", "CFSP", 0.5, 0.5, 2.0),
    ]
    rows += [("b", "ShortGPT", 0.5, 0.4, 1.5), ("c", "COMP", 0.5, 0.5, 5.0)]  # ShortGPT is better because it is larger
    table = pd.DataFrame(rows, columns=["model", "method", "size", "removed_decoder", "relative"])
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
    panel = plots.row(1)[1][0]
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


def test_points_lie_where_they_were_measured():
    clouds = {"COMP": ([1.0, 2.0], [1.1, 1.2]), "SVD": ([3.0, 4.0], [2.0, 2.5])}
    _, panels = plots.scatter({"perplexity": {"seconds": clouds}, "accuracy": {"seconds": clouds}})
    assert [row[0].get_ylabel() for row in panels] == ["perplexity", "accuracy"]
    for panel in panels.flat:
        assert {line.get_label(): line.get_xydata().T.tolist() for line in panel.get_lines()} == {
            method: [list(x), list(y)] for method, (x, y) in clouds.items()
        }
        assert {line.get_linestyle() for line in panel.get_lines()} == {"None"}


def test_bars_reach_from_the_lowest_to_the_highest():
    panel = plots.row(1)[1][0]
    plots.ranges(panel, [1, 2], [3, 5], [2, 5], [6, 7], label="x")
    [bars] = panel.containers
    low_and_high = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert low_and_high == [[2, 6], [5, 7]]


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_front_picture_is_drawn_from_the_committed_tables(tmp_path):
    for profile in SHOWN:
        folder = tmp_path / profile / "compare" / "tables"
        folder.mkdir(parents=True)
        shutil.copy(RESULTS / profile / "compare" / "tables" / "pareto.csv", folder)
    paths = plots.front_picture(tmp_path, SHOWN)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["figures/size.svg", "figures/size.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in plots.front_picture(tmp_path, SHOWN)] == first
    committed = texts(RESULTS / "figures" / "size.svg")
    assert texts(paths[0]) == committed
    assert plots.message(compared()) in " ".join(committed)  # the title may take two lines
    assert (RESULTS / "figures" / "size.png").is_file()
