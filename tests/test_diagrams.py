"""The drawings of what methods remove: well-formed, readable on a phone, and marked where the method really cuts."""

import ast
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.font_manager
import nbformat
import pytest
from PIL import ImageFont

from lib.suite import diagrams, plots
from tasks import NOTEBOOKS

SVG = "{http://www.w3.org/2000/svg}"
FONT = ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), 130)  # wider than what browsers use
DRAWINGS = {name: diagrams.block(name) for name in diagrams.PICTURES} | {"all": diagrams.removals()}


def shapes(drawing, kind):
    return ElementTree.fromstring(drawing.data).iter(SVG + kind)


def coloured(svg, colour):
    """(left, top, width, height) of the rectangles of a colour in some SVG."""
    found = ElementTree.fromstring(f"<svg>{svg}</svg>").iter("rect")
    return {tuple(float(r.get(side)) for side in ("x", "y", "width", "height")) for r in found if r.get("fill") == colour}


@pytest.mark.parametrize("name", DRAWINGS)
def test_text_is_nine_points_where_a_phone_shows_the_drawing_and_stays_inside(name):
    root = ElementTree.fromstring(DRAWINGS[name].data)
    assert float(root.get("width")) <= 390
    assert float(root.get("font-size")) * 0.75 >= 9
    assert root.get("role") == "img"
    assert len(root.find(SVG + "title").text) > 20
    column = diagrams.WIDTH if name != "all" else diagrams.WIDTH / 2
    texts = list(shapes(DRAWINGS[name], "text"))
    assert len(texts) >= 8
    for text in texts:
        width = FONT.getlength(text.text) / 130 * diagrams.FONT * (1.1 if text.get("font-weight") == "bold" else 1)
        left = float(text.get("x")) - (width / 2 if text.get("text-anchor") == "middle" else 0)
        assert left >= 0, text.text
        assert left + width <= column, text.text


@pytest.mark.parametrize("name", diagrams.PICTURES)
def test_each_paper_has_the_colour_of_its_kind(name):
    colour = plots.style_of(name).color
    assert colour == plots.COLOURS[diagrams.PICTURES[name].removes]
    assert colour in {rect.get("fill") for rect in shapes(diagrams.block(name), "rect")}
    assert colour in plots.COLOURS.values()


def test_all_kinds_but_chance_are_drawn_in_their_colours():
    shown = {rect.get("fill") for rect in shapes(diagrams.removals(), "rect")}
    kinds = [kind for kind in plots.COLOURS if kind not in ("chance", "something else")]
    assert {plots.COLOURS[kind] for kind in kinds} <= shown
    assert {removes for removes, *_ in diagrams.KINDS} == set(kinds)


def compared():
    """The methods of the comparison, from the cell of its notebook that lists them."""
    cells = nbformat.read(NOTEBOOKS / "compare.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.source.startswith("field = {")]
    return list(ast.literal_eval(ast.parse(source).body[0].value))


def test_every_method_of_the_comparison_is_drawn_with_the_kind_that_figures_give_it():
    by_name = {}
    for removes, _, _, lines in diagrams.KINDS:
        by_name |= dict.fromkeys(" ".join(lines).split(", "), removes)
    wanted = {re.sub(r" \(.*\)", "", name).replace(", with", " with"): plots.STYLE[name].removes for name in compared()}
    assert len(wanted) > 15
    assert {name: removes for name, removes in wanted.items() if removes != "chance"}.items() <= by_name.items()


def test_marks_lie_where_the_method_cuts():
    """Rows of readers and columns of writers for neurons, the other way round for directions of the stream, each as often."""
    (reader, writer), colour = diagrams.MLP.matrices, "red"
    rows, columns = (
        {box for box in coloured(diagrams.neurons(colour), colour) if box[2 + i] == matrix[2 + i] and box[i] == matrix[i]}
        for i, matrix in ((0, reader), (1, writer))
    )
    assert {(top - reader[1]) for _, top, _, _ in rows} == {left - writer[0] for left, _, _, _ in columns}
    assert len(rows | columns) == len(coloured(diagrams.neurons(colour), colour)) == 2 * len(rows)
    lost = coloured(diagrams.directions(colour), colour)
    for half in diagrams.HALVES:
        (left, top, width, height), (left2, top2, width2, height2) = half.matrices
        assert (left + width - diagrams.LOST, top, diagrams.LOST, height) in lost
        assert (left2, top2 + height2 - diagrams.LOST, width2, diagrams.LOST) in lost
    assert len(lost) == 5
    assert coloured(diagrams.whole(colour), colour) == {matrix for half in diagrams.HALVES for matrix in half.matrices}
    attention, mlp = set(diagrams.ATTENTION.matrices), coloured(diagrams.neurons(colour), colour)
    assert coloured(diagrams.factored_attention(colour), colour) == attention | mlp
    (reader, writer), narrow = diagrams.ATTENTION.matrices, coloured(diagrams.channels(colour), colour)
    inside = {(x - reader[0], y - reader[1]) for x, y, width, _ in narrow - mlp if width == reader[2]}
    assert {y // diagrams.NEURON for _, y in inside} == set(range(int(reader[3] / diagrams.NEURON)))  # of every head
    assert {(x - writer[0], y - writer[1]) for x, y, _, height in narrow - mlp if height == writer[3]} == {
        (y, x) for x, y in inside
    }


PAPERS = {"slicegpt": "SliceGPT", "svd_llm": "SVD-LLM", "afr": "Structured AFR", "comp": "COMP"}
CALLS = {paper: f'block("{name}")' for paper, name in PAPERS.items()} | {"compare": "removals()"}


@pytest.mark.parametrize(("paper", "call"), CALLS.items())
def test_each_notebook_begins_with_its_diagram(paper, call):
    cells = nbformat.read(NOTEBOOKS / f"{paper}.ipynb", as_version=4).cells
    assert cells[1].source == f"from lib.suite import diagrams\n\ndiagrams.{call}"
