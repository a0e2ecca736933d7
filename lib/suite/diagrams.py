"""Drawings of a decoder block, with what a method removes from it in colour: SVG that the notebooks show.

The stream runs down the left side. Each half of the block reads it behind a norm, with a *reader*, and adds the output of a
*writer*. A matrix is drawn as `nn.Linear` stores it: as wide as its input and as high as its output. Whatever is in colour is
gone, in the colour that figures have for it (`lib.suite.plots.COLOURS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from IPython.display import SVG

from lib.suite.plots import COLOURS

WIDTH, BLOCK_HEIGHT = 360, 280  # pixels of a drawing that is as wide as a phone; those of the block in it
FONT = 13  # pixels: 9 points and more, also where a phone makes the drawing a little smaller
LINE = 18  # pixels from one line of text to the next
KEPT, INK = "#E4E4E4", "#333333"
D = 48  # width of the stream
STREAM = 16  # its left side
NEURON = 12  # height of a row, or width of a column, that stands for one neuron or one head
CHANNELS = 4  # height or width of the channels that a head loses
LOST = 12  # of the stream's D directions, those that SliceGPT deletes
RANK = 10  # of a factor


@dataclass(frozen=True)
class Half:
    """Attention or MLP: the names of its matrices and of what is between them, the height of its middle, its inner width."""

    reader: str
    writer: str
    between: str
    middle: int
    inner: int

    @property
    def matrices(self) -> tuple[tuple[float, float, float, float], ...]:
        """(left, top, width, height) of reader and writer."""
        return (132, self.middle - self.inner / 2, D, self.inner), (256, self.middle - D / 2, self.inner, D)

    @property
    def adds(self) -> float:
        """Where on the stream the half adds its output."""
        return self.middle + self.inner / 2 + 16


ATTENTION, MLP = Half("q, k, v", "o", "attention", 62, 60), Half("gate, up", "down", "SiLU, ×", 198, 84)
HALVES = (ATTENTION, MLP)


def rect(left: float, top: float, width: float, height: float, fill: str, line: str = INK) -> str:
    box = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {box} fill="{fill}" stroke="{line}"/>'


def words(left: float, base: float, text: str, anchor: str = "start", colour: str = INK, weight: str = "normal") -> str:
    place = f'x="{left:g}" y="{base:g}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-weight="{weight}">{escape(text)}</text>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through points, with a head where it ends, to the left or to the right."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    (before, _), (x, y) = points[-2:]
    back = x - 6 if x > before else x + 6
    head = f"{back:g},{y - 4:g} {x:g},{y:g} {back:g},{y + 4:g}"
    return f'<polyline points="{path}" fill="none" stroke="{INK}"/><polygon points="{head}" fill="{INK}"/>'


# --- what is removed, each in its colour: () -> shapes ----------------------------------------------------------------------


def directions(colour: str) -> str:
    """Part of the stream, of the readers' inputs and of the writers' outputs."""
    shapes = [rect(STREAM + D - LOST, 0, LOST, BLOCK_HEIGHT, colour)]
    for half in HALVES:
        (left, top, width, height), (left2, top2, width2, height2) = half.matrices
        shapes += [rect(left + width - LOST, top, LOST, height, colour), rect(left2, top2 + height2 - LOST, width2, LOST, colour)]
    return "".join(shapes)


def factors(half: Half, colour: str) -> str:
    """All of the matrices of a half but two thin factors."""
    shapes = []
    for left, top, width, height in half.matrices:
        shapes += [
            rect(left, top, width, height, colour),
            rect(left, top, RANK, height, KEPT),
            rect(left + RANK, top, width - RANK, RANK, KEPT),
        ]
    return "".join(shapes)


def ranks(colour: str) -> str:
    return "".join(factors(half, colour) for half in HALVES)


def units(half: Half, gone: Sequence[int], colour: str) -> str:
    """Some rows of the reader, and the same columns of the writer."""
    (left, top, width, _), (left2, top2, _, height2) = half.matrices
    rows = [rect(left, top + NEURON * i, width, NEURON, colour) for i in gone]
    return "".join(rows + [rect(left2 + NEURON * i, top2, NEURON, height2, colour) for i in gone])


def neurons(colour: str) -> str:
    return units(MLP, (1, 4, 5), colour)


def heads(colour: str) -> str:
    return units(ATTENTION, (3,), colour) + neurons(colour)


def channels(colour: str) -> str:
    """Some channels of every head, and neurons."""
    (left, top, width, height), (left2, top2, _, height2) = ATTENTION.matrices
    ends = [NEURON * (head + 1) - CHANNELS for head in range(int(height / NEURON))]
    rows = [rect(left, top + end, width, CHANNELS, colour) for end in ends]
    return "".join(rows + [rect(left2 + end, top2, CHANNELS, height2, colour) for end in ends]) + neurons(colour)


def factored_attention(colour: str) -> str:
    """All of the attention's matrices but two thin factors, and neurons."""
    return factors(ATTENTION, colour) + neurons(colour)


def whole(colour: str) -> str:
    """Both halves, to the last matrix."""
    return "".join(rect(*matrix, colour) for half in HALVES for matrix in half.matrices)


def weights(colour: str) -> str:
    """Two of every four weights."""
    shapes = []
    for half in HALVES:
        for left, top, width, height in half.matrices:
            places = [(i, j) for j in range(int(height / 6)) for i in range(int(width / 6)) if (i + j // 2 + j) % 2]
            shapes += [rect(left + 6 * i, top + 6 * j, 6, 6, colour, colour) for i, j in places]
    return "".join(shapes)


# --- the block --------------------------------------------------------------------------------------------------------------


def dense(labels: bool) -> str:
    """The block before anything is removed: stream, norms, matrices, and the ways between them."""
    shapes = [rect(STREAM, 0, D, BLOCK_HEIGHT, KEPT)]
    for half in HALVES:
        reader, writer = half.matrices
        edge, middle, end = STREAM + D, half.middle, writer[0] + writer[2] / 2
        shapes += [
            arrow((edge, middle), (reader[0], middle)),
            f'<circle cx="{(edge + reader[0]) / 2:g}" cy="{middle}" r="9" fill="white" stroke="{INK}"/>',
            arrow((reader[0] + D, middle), (writer[0], middle)),
            arrow((end, writer[1] + D), (end, half.adds), (edge, half.adds)),
            rect(*reader, KEPT),
            rect(*writer, KEPT),
        ]
        if labels:
            shapes += [
                words(reader[0] + D / 2, reader[1] - 5, half.reader, "middle"),
                words(end, writer[1] - 5, half.writer, "middle"),
                words((edge + reader[0]) / 2, middle - 14, "norm", "middle"),
                words((reader[0] + D + writer[0]) / 2, middle - 6, half.between, "middle"),
            ]
    return "".join(shapes)


def drawing(height: float, label: str, body: str) -> SVG:
    """A drawing on white, which screen readers call by its label."""
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" style="max-width: 100%; height: auto"'
    return SVG(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif" font-size="{FONT}">'
        f'<title>{escape(label)}</title><rect width="100%" height="100%" fill="white"/>{body}</svg>'
    )


def shortcuts() -> str:
    """SliceGPT's new matrices on the residual path."""
    colour = COLOURS["narrows the stream"]
    return "".join(
        rect(STREAM + 8, half.adds - 34, 20, 20, "white", colour) + words(STREAM + 18, half.adds - 19, "S", "middle")
        for half in HALVES
    )


def another_block() -> str:
    """COMP's other kind of removal, below the block."""
    reader, _ = MLP.matrices
    box = rect(reader[0], BLOCK_HEIGHT + 6, 100, 22, COLOURS["deletes blocks"])
    return rect(STREAM, BLOCK_HEIGHT, D, 34, KEPT) + box + words(reader[0] + 110, BLOCK_HEIGHT + 22, "a whole block")


@dataclass(frozen=True)
class Picture:
    """What a paper removes: its kind, what else it does to the block, how much higher that makes the drawing, and the words."""

    removes: str
    mark: Callable[[str], str]
    text: tuple[str, ...]
    extra: Callable[[], str] | None = None
    more: int = 0


PICTURES = {
    "SliceGPT": Picture(
        "narrows the stream",
        directions,
        (
            "Directions of the stream are deleted: columns of",
            "every reader, rows of every writer. S is new, a",
            "shortcut matrix for what goes past.",
        ),
        shortcuts,
    ),
    "SVD-LLM": Picture(
        "factors matrices",
        ranks,
        ("Every matrix becomes the product of two thin", "ones. The stream and all widths stay."),
    ),
    "Structured AFR": Picture(
        "deletes neurons",
        neurons,
        ("Neurons of the MLP are deleted: rows of gate and", "up, columns of down. The stream stays."),
    ),
    "COMP": Picture(
        "deletes neurons",
        neurons,
        (
            "Neurons are deleted, and some blocks whole.",
            "Multipliers of the neurons that stay make up",
            "for what is missing.",
        ),
        another_block,
        36,
    ),
}


def block(paper: str) -> SVG:
    """A decoder block with what a paper removes from it in colour. paper: a name of `PICTURES`, else KeyError."""
    picture = PICTURES[paper]
    colour = COLOURS[picture.removes]
    parts = [dense(labels=True), picture.mark(colour), picture.extra() if picture.extra else ""]
    below = BLOCK_HEIGHT + picture.more + 2 * LINE
    key = rect(STREAM, below - LINE - 11, 12, 12, colour) + words(STREAM + 20, below - LINE, "in colour: gone", weight="bold")
    text = "".join(words(STREAM, below + LINE * i, line) for i, line in enumerate(picture.text))
    label = f"A decoder block and what {paper} removes from it. {' '.join(picture.text)}"
    height = below + LINE * len(picture.text) + 24
    shifted = f'<g transform="translate(0 26)">{"".join(parts)}{key}{text}</g>'
    return drawing(height, label, words(STREAM + D / 2, 17, "stream", "middle") + shifted)


# Kind of removal, what it marks, what the comparison calls it, and who does it: all methods of the comparison but chance.
KINDS = (
    ("narrows the stream", directions, "narrows the stream", ("SliceGPT",)),
    ("factors matrices", ranks, "factors matrices", ("SVD, FWSVD, ASVD,", "SVD-LLM")),
    ("deletes neurons", neurons, "deletes neurons", ("Structured AFR, COMP,", "CFSP, Wanda-sp,", "magnitude")),
    ("deletes neurons", heads, "neurons and heads", ("LLM-Pruner, FLAP, FPT,", "Wanda-sp with heads")),
    ("deletes neurons", channels, "neurons and channels", ("MoDeGPT",)),
    ("deletes neurons", factored_attention, "neurons and ranks", ("LoRAP",)),
    ("deletes blocks", whole, "deletes blocks", ("ShortGPT, COMP in part",)),
    ("zeroes single weights", weights, "zeroes single weights", ("SparseGPT, Wanda",)),
)


def removals() -> SVG:
    """All kinds of removal, one small block for each."""
    scale, column = 0.46, WIDTH / 2
    row = 170 + LINE * max(len(methods) for *_, methods in KINDS)
    panels = []
    for place, (removes, mark, title, methods) in enumerate(KINDS):
        left, top = column * (place % 2), row * (place // 2)
        small = f'<g transform="translate(0 28) scale({scale})">{dense(labels=False)}{mark(COLOURS[removes])}</g>'
        lines = [words(STREAM * scale, 28 + BLOCK_HEIGHT * scale + LINE * i, line) for i, line in enumerate(methods, 1)]
        head = words(STREAM * scale, 18, title, weight="bold")
        panels.append(f'<g transform="translate({left:g} {top})">{head}{small}{"".join(lines)}</g>')
    titles = ", ".join(title for _, _, title, _ in KINDS)
    label = f"{len(KINDS)} decoder blocks, each with another part in colour, which is gone: {titles}"
    return drawing(row * (len(KINDS) / 2), label, "".join(panels))
