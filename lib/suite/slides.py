"""Slides of an executed notebook, for reveal.js: which cells are slides follows from the notebook by a rule."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

from lib.suite.site import Executed, Words, read_run

EXERCISES = re.compile(r"## \d+ · Exercises")
LOGGED = re.compile(r" at \d+%: perplexity | s since the start|files written")  # lines that report progress


class Slides(Words, SlidesExporter):
    raw_template = """
{%- extends 'reveal/index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>
  :root { --jp-content-font-size1: 25px; --jp-ui-font-size1: 20px; --jp-code-font-size: 21px; --jp-content-line-height: 1.4; }
  .reveal .slides h1, .reveal .slides h2, .reveal .slides h3 { text-transform: none; }
  .reveal h1 { font-size: 2em; } .reveal h2 { font-size: 1.6em; } .reveal h3 { font-size: 1.2em; }
  .reveal .slides section section { max-height: 100%; overflow: auto; text-align: left; }
  .reveal .jp-Cell { padding: 0; }
  .reveal :is(.jp-RenderedImage, .jp-RenderedSVG) img { margin: 0 auto; width: 100%; max-height: 660px; object-fit: contain; }
  .reveal .dataframe td { white-space: nowrap; }
  .reveal .jp-OutputArea-output pre { box-shadow: none; width: auto; }
  .formula { display: block; text-align: center; margin: 0.6em 0; } .formula.inline { display: inline; margin: 0; }
</style>{% endblock %}
{% block footer_js %}
<script src="{{ resources.reveal.url_prefix }}/dist/reveal.js"></script>
<script>
  Reveal.initialize({ hash: true, width: 1200, height: 720, center: false, slideNumber: "h.v", transition: "none" });
</script>
{% endblock %}
"""


def slide_cells(run: Executed) -> list[nbformat.NotebookNode]:
    """The cells of a notebook as slides, each marked with its slide type.

    A `#` or `##` heading starts a slide. Stacked below it: the text under a `###` heading, every other text cell, and every
    code cell that shows a table or a figure. Printed lines stay on the slide before them. Left out are lines of
    progress, code, and the exercises at the end.
    """
    cells = []
    for cell in itertools.takewhile(lambda cell: not EXERCISES.match(cell.source), run.notebook.cells):
        if cell.cell_type == "markdown":
            cells += [text_slide(part) for part in re.split(r"(?m)^(?=##+ )", cell.source) if part.strip()]
        elif cell.cell_type == "code" and (outputs := [o for o in map(without_log, cell.outputs) if o]):
            kind = "-" if all(output.output_type == "stream" for output in outputs) else "subslide"
            metadata = {"slideshow": {"slide_type": kind}}
            cells.append(nbformat.v4.new_code_cell(cell.source, outputs=outputs, metadata=metadata))
    version = run.manifest["code_version"]
    made = f"## How the numbers were made\n\n`{run.command}`\n\nCommit `{run.commit}`, code version `{version}`"
    return [*cells, text_slide(made)]


def text_slide(source: str) -> nbformat.NotebookNode:
    kind = "slide" if re.match("##? ", source) else "subslide"
    return nbformat.v4.new_markdown_cell(source, metadata={"slideshow": {"slide_type": kind}})


def without_log(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without its lines of progress; None if nothing is left of it."""
    if output.output_type != "stream":
        return output
    text = "".join(line for line in output.text.splitlines(keepends=True) if not LOGGED.search(line))
    return nbformat.v4.new_output("stream", name=output.name, text=text) if text.strip() else None


def build_slides(folder: str | Path, site: str | Path, reveal: str | Path = "") -> Path:
    """Write the run in `folder`, `results/<profile>/<paper>`, as reveal.js slides into `slides` of a site. Returns the page.

    reveal: an unpacked reveal.js 4 or 5, which is copied beside the slides; without it the page loads nbconvert's version of
    reveal.js from the internet when it is opened.

    Raises ValueError if there is no complete run, or if `reveal` is not reveal.js.
    """
    run, site = read_run(Path(folder)), Path(site)
    if reveal and not (Path(reveal) / "dist" / "reveal.js").is_file():
        raise ValueError(f"{reveal} is not an unpacked reveal.js: it holds no dist/reveal.js")
    target = site / run.slides
    target.parent.mkdir(parents=True, exist_ok=True)
    exporter = Slides(exclude_input=True, exclude_output_prompt=True, exclude_input_prompt=True, reveal_theme="white")
    if reveal:
        shutil.copytree(Path(reveal) / "dist", target.parent / "reveal.js" / "dist", dirs_exist_ok=True)
        if (Path(reveal) / "LICENSE").is_file():
            shutil.copy(Path(reveal) / "LICENSE", target.parent / "reveal.js")
        exporter.reveal_url_prefix = "reveal.js"
    run.notebook.cells = slide_cells(run)
    body, _ = exporter.from_notebook_node(run.notebook, {"metadata": {"name": run.title}})
    target.write_text(body)
    return target
