"""A deck of slides for each notebook, for reveal.js: what cells say of themselves, with the outputs of an executed run.

A cell of `notebooks/<paper>.ipynb` becomes a slide by an entry `slide` in its metadata, with these words in Markdown:

- `title`: what the slide claims, where it holds in every run.
- `says`: a pattern. The sentences of the section's outputs that match it are shown, and where there is no `title`, the first of
  them is the title. So a measured claim is never written by hand.
- `text`: a few words below the title.
- `question`, and `answer`, which appears later: a slide of their own. Without an answer, the next slide is the answer.

A cell of code shows its picture, or its first table, or what it printed. The prose around it is in the speaker's notes: that
before it, and that right behind it unless it starts something new, with a heading or with bold words.
"""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import struct
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path

import nbformat
from nbconvert.filters.markdown_mistune import MarkdownWithMath

from lib.suite.markup import Renderer
from lib.suite.results import ROOT
from lib.suite.runs import PROGRESS
from lib.suite.site import ASSETS, Executed, read_run

WORDS, ROWS, LINES = 40, 8, 22  # the most on a slide: words beside its table, rows of the table, lines of printed matrices
BESIDE = 2  # sentences below a table or a picture
SMALLEST = 16  # pixels of the type of a table, on a slide of 720
HEARD = 13  # words that a slide shows of what a model wrote
TALL = "tall"  # the class of a picture that is higher than wide, and of its slide
REVEAL = "https://unpkg.com/reveal.js@5.2.1"
PARTS = ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js")  # of reveal.js
EXERCISES = re.compile(r"## \d+ · Exercises")
LOGGED = re.compile(rf"{PROGRESS.pattern}|files written")  # lines that are no results
STARTS = re.compile(r"#|\*\*")  # how prose begins that belongs to what follows
KEYS = {"title", "says", "text", "question", "answer"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{reveal}/dist/reveal.css">
<style>{style}</style>
</head>
<body>
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="{reveal}/dist/reveal.js"></script>
<script src="{reveal}/plugin/notes/notes.js"></script>
<script>
  if (window.Reveal) {{
    const plugins = window.RevealNotes ? [RevealNotes] : [];
    const size = {{ width: 1280, height: 720, margin: 0, center: false }};
    Reveal.initialize({{ ...size, hash: true, slideNumber: "c/t", transition: "none", plugins }});
  }}
</script>
</body>
</html>
"""


@dataclass
class Slide:
    """One slide: its title and its parts in HTML, the section of the notebook that it belongs to, and the prose behind it."""

    title: str
    parts: list[str]
    section: str = ""
    notes: list[str] = field(default_factory=list)
    kind: str = ""

    @property
    def words(self) -> int:
        """Words that the room reads; tables, pictures and formulas have limits of their own."""
        return words_in(" ".join([self.section, self.title, *self.parts]))

    @property
    def html(self) -> str:
        section = f'<p class="section">{self.section}</p>' if self.section else ""
        shown = f'<div class="slide {self.kind}">{section}<h2>{self.title}</h2>\n{"".join(self.parts)}</div>'
        notes = "".join(html_of(text) for text in self.notes)
        return f'<section>{shown}\n<aside class="notes">{notes}</aside></section>'


def words_in(html: str) -> int:
    """Words of two letters or more, without those of tables and formulas."""
    text = re.sub(r"<table.*?</table>|<math.*?</math>", " ", html, flags=re.DOTALL)
    return len(re.findall(r"[^\W\d_][^\W_][\w'’.-]*", unescape(re.sub(r"<[^>]+>", " ", text))))


def html_of(text: str) -> str:
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)


def inline(text: str) -> str:
    """One paragraph of Markdown, without the paragraph."""
    return re.sub(r"^<p>|</p>\s*$", "", html_of(text))


def deck(run: Executed) -> list[Slide]:
    """The slides of a run. A slide whose outputs the run does not have is left out."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{run.folder.name}.ipynb", as_version=4)
    cells = list(itertools.takewhile(lambda cell: not EXERCISES.match(cell.source), notebook.cells))
    outputs = {cell.id: list(filter(None, map(without_log, cell.outputs))) for cell in run.notebook.cells if "outputs" in cell}
    printed = printed_in_sections(cells, outputs)
    slides, waiting, behind = [title_slide(cells[0])], [], True
    heading = cells[0].source.partition("\n")[0].removeprefix("# ")
    for cell in cells[1:]:
        words = cell.metadata.get("slide", {})
        for text in (part for part in re.split(r"(?m)^(?=##+ )", cell.source) if cell.cell_type == "markdown" and part.strip()):
            heading = heading_of(text, heading)
            behind = behind and not STARTS.match(text)
            (slides[-1].notes if behind else waiting).append(text)
        put_out = outputs.get(cell.id, []) if cell.cell_type == "code" else None
        new = slides_of(words, put_out, heading, printed.get(heading.partition("\n")[0], [])) if words else []
        if new:
            new[0].notes = [*waiting, *new[0].notes]
            slides, waiting = slides + new, []
        behind = bool(new) or (behind and cell.cell_type == "markdown")
    slides[-1].notes += waiting
    return [*slides, made_slide(run)]


def heading_of(text: str, before: str) -> str:
    """The headings that hold after some prose: that of the section, and on a second line that of the part, if there is one."""
    found = re.match(r"(##+) (.+)", text)
    if not found:
        return before
    return found[2] if found[1] == "##" else f"{before.partition(chr(10))[0]}\n{found[2]}"


def printed_in_sections(cells: list, outputs: dict[str, list]) -> dict[str, list[str]]:
    """The lines that the cells of each section printed, by the heading of the section."""
    found, section = {}, ""
    for cell in cells:
        if cell.cell_type == "markdown":
            section = next(iter(re.findall(r"(?m)^##? (.+)", cell.source)[::-1]), section)
        else:
            lines = printed_text(outputs.get(cell.id, [])).splitlines()
            found.setdefault(section, []).extend(line.strip() for line in lines if line.strip())
    return found


def without_log(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without its lines of progress; None if nothing is left of it."""
    if output.output_type != "stream":
        return output
    text = "".join(line for line in output.text.splitlines(keepends=True) if not LOGGED.search(line))
    return nbformat.v4.new_output("stream", name=output.name, text=text) if text.strip() else None


def printed_text(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream").rstrip()


def title_slide(cell: nbformat.NotebookNode) -> Slide:
    """The name of the notebook, and the paper that it is about."""
    title, _, rest = cell.source.partition("\n")
    paper = "".join(html_of(text) for text in re.findall(r"(?m)^\*[^*]+\*$", rest))
    return Slide(inline(title.removeprefix("# ")), [f'<div class="text">{paper}</div>'] if paper else [], "", [rest], "first")


def made_slide(run: Executed) -> Slide:
    facts = {"command": run.command, "commit": run.commit, "code version": run.manifest["code_version"]}
    rows = "".join(f"<p>{name}: <code>{escape(value)}</code></p>" for name, value in facts.items())
    return Slide("How the numbers were made", [f'<div class="text">{rows}</div>'])


def question_slide(words: dict, heading: str) -> Slide:
    parts = [f'<div class="asked">{html_of(words["question"])}</div>']
    if "answer" in words:
        parts.append(f'<div class="answer fragment">{html_of(words["answer"])}</div>')
    return Slide("Question", parts, place(heading), kind="question")


def place(heading: str) -> str:
    """Where in the notebook a slide belongs, such as `section 4`."""
    number = re.match(r"\d+", heading)
    return f"section {number[0]}" if number else ""


def slides_of(words: dict, outputs: list | None, heading: str, printed: list[str]) -> list[Slide]:
    """The slides of one cell: its question, and what it puts out. outputs: None for a cell of text."""
    shown = outputs and set(words) - {"question", "answer"} and output_slide(words, outputs, heading, printed)
    if "question" in words and (shown or "answer" in words or outputs is None):
        return [question_slide(words, heading), *([shown] if shown else [])]
    return [shown] if shown else []


def output_slide(words: dict, outputs: list, heading: str, printed: list[str]) -> Slide | None:
    """What a cell of code puts out, under its claim; None where there is nothing to show. printed: the lines of its section."""
    said = [heard(line) for line in printed if re.search(words["says"], line)] if "says" in words else []
    claimed = bool(said) and "title" not in words
    if claimed:
        title = escape(said.pop(0).rstrip("."))
    else:
        title = inline(words.get("title", re.sub(r"^\d+ · ", "", heading.splitlines()[-1])))
    body = picture(outputs, words.get("title", heading.splitlines()[-1])) or table(outputs, 430 - 70 * min(len(said), BESIDE))
    lines = said if "says" in words or body else printed_text(outputs).splitlines()
    if not (claimed or body or lines):
        return None
    text = f'<div class="text">{html_of(words["text"])}</div>' if "text" in words else ""
    slide = Slide(title, [text, body], place(heading), kind=TALL if f'class="{TALL}"' in body else "")
    shown = fitting(lines, WORDS - slide.words, BESIDE if body else LINES)
    slide.parts.append(listed(shown) if "says" in words else printing(shown))
    if len(shown) < len(lines):
        slide.notes.append("\n".join(["```text", *lines, "```"]))
    return slide


def heard(line: str) -> str:
    """A printed line; one that quotes what a model wrote ends after a few words."""
    before, mark, quoted = line.partition(" times dense: ")
    words = quoted.split()
    return f"{before}{mark}{' '.join(words[:HEARD])} …" if mark and len(words) > HEARD else line


def fitting(lines: list[str], words: int, most: int) -> list[str]:
    """As many of the first lines as have at most so many words in all, and no more than `most`."""
    counts = itertools.accumulate(words_in(escape(line)) for line in lines[:most])
    return [line for line, count in zip(lines, counts, strict=False) if count <= words]


def listed(lines: list[str]) -> str:
    return f'<ul class="text">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def printing(lines: list[str]) -> str:
    """Printed lines as they are, in the largest type that leaves room for all of them."""
    size = min(26, 470 // (1.25 * max(len(lines), 1)), 1140 // (0.62 * max(map(len, lines), default=1)))
    return f'<pre style="font-size: {size:.0f}px">{escape(chr(10).join(lines))}</pre>' if lines else ""


def picture(outputs: list, title: str) -> str:
    """The first picture of some outputs, the drawing that stays sharp where there is one, called by its own title or by this."""
    for output in outputs:
        data = output.get("data", {})
        if "image/svg+xml" in data:
            drawing = data["image/svg+xml"]
            own = re.search(r"<title>(.*?)</title>", drawing, re.DOTALL)
            return image("image/svg+xml", drawing.encode(), unescape(own[1]) if own else f"Plot: {title}")
        if "image/png" in data:
            return image("image/png", base64.b64decode(data["image/png"]), f"Plot: {title}")
    return ""


def image(kind: str, data: bytes, name: str) -> str:
    """A picture in a page. One that is higher than wide is marked, so that it gets the right side of its slide."""
    box = re.search(rb'viewBox="\S+ \S+ (\S+) (\S+)"', data) if kind == "image/svg+xml" else None
    width, height = map(float, box.groups()) if box else (1, 1)
    if kind == "image/png":
        width, height = struct.unpack(">II", data[16:24])  # of its header
    code, look = base64.b64encode(data).decode(), TALL if height > width else "wide"
    return f'<figure class="{look}"><img alt="{escape(name)}" src="data:{kind};base64,{code}"></figure>'


def table(outputs: list, height: int) -> str:
    """The first table of some outputs, in so many pixels: its first rows, and nothing of one that needs too small a type."""
    html = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    found = re.search(r"(<thead>.*?</thead>)\s*<tbody>(.*?)</tbody>", html, re.DOTALL)
    if not found:
        return ""
    head, rows = found[1], re.findall(r"<tr>.*?</tr>", found[2].replace("<td>NaN</td>", "<td>–</td>"), re.DOTALL)
    more = f'<p class="more">The first {ROWS} of {len(rows)} rows.</p>' if len(rows) > ROWS else ""
    shown = [*re.findall(r"<tr.*?</tr>", head, re.DOTALL), *rows[:ROWS]]
    size = min(24, 1150 // (0.62 * characters(shown)), height // (1.6 * len(shown)))
    made = f'<table style="font-size: {size:.0f}px">{head}<tbody>{"".join(rows[:ROWS])}</tbody></table>{more}'
    return made if size >= SMALLEST else ""


def characters(rows: list[str]) -> int:
    """The width of a table in characters. A cell that spans columns needs no more than these; one that spans rows comes first."""
    widths: dict[int, int] = {}
    for row in rows:
        cells = re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row, re.DOTALL)
        for place, (kind, text) in enumerate(reversed(cells)):
            if "colspan" not in kind:
                widths[place] = max(widths.get(place, 0), len(unescape(text)))
    return sum(width + 2 for width in widths.values())


def build_slides(folder: str | Path, site: str | Path, reveal: str | Path = "") -> Path:
    """Write the run in `folder`, `results/<profile>/<paper>`, as reveal.js slides into `slides` of a site. Returns the page.

    reveal: an unpacked reveal.js 4 or 5, which is copied beside the slides; without it the page loads reveal.js from the
    internet when it is opened, and without a network it shows all slides and notes one below the other.

    Raises ValueError if there is no complete run, or if `reveal` is not reveal.js.
    """
    run, site = read_run(Path(folder)), Path(site)
    missing = [part for part in PARTS if reveal and not (Path(reveal) / part).is_file()]
    if missing:
        raise ValueError(f"{reveal} is not an unpacked reveal.js: it holds no {missing[0]}")
    target = site / run.slides
    target.parent.mkdir(parents=True, exist_ok=True)
    if reveal:
        for name in ("dist", "plugin/notes"):
            shutil.copytree(Path(reveal) / name, target.parent / "reveal.js" / name, dirs_exist_ok=True)
        if (Path(reveal) / "LICENSE").is_file():
            shutil.copy(Path(reveal) / "LICENSE", target.parent / "reveal.js")
    style = (ASSETS / "slides.css").read_text(encoding="utf-8")
    slides = "\n".join(slide.html for slide in deck(run))
    page = PAGE.format(title=escape(run.title), reveal="reveal.js" if reveal else REVEAL, style=style, slides=slides)
    target.write_text(page, encoding="utf-8")
    return target
