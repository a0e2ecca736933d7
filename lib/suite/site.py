"""A static site, made of executed notebooks and of the tables and figures beside them.

Nothing is computed here, and the pages load nothing from a network: formulas are converted to MathML, which browsers
display. Every table and figure carries the command and the commit that made it, as its manifest records them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from html import escape
from pathlib import Path

import nbformat
import yaml
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from lib.suite.results import ROOT, rounded

try:
    from latex2mathml.converter import convert
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("formulas are converted by the package latex2mathml: pip install -e '.[site]'") from error

ASSETS = Path(__file__).parent.parent / "assets" / "site"
LINKED = re.compile(r"\]\((?:\.\./)+(lib/[^)#\s]+)\)")  # how notebooks link to code


@dataclass
class Executed:
    """One complete run of a notebook: the folder `results/<profile>/<paper>`, its manifest, and the executed notebook."""

    folder: Path
    manifest: dict
    notebook: nbformat.NotebookNode

    @property
    def name(self) -> str:
        return f"{self.manifest['profile']}/{self.manifest['paper']}"

    @property
    def title(self) -> str:
        return next(re.findall(r"^# (.+)", cell.source)[0] for cell in self.notebook.cells if cell.source.startswith("# "))

    @property
    def command(self) -> str:
        """The command for the same run; that of a custom one lists all of its parameters."""
        profile = self.manifest["profile"].removesuffix("-custom")
        words = ["invoke", "reproduce", "--profile", profile, "--paper", self.manifest["paper"]]
        if self.manifest["profile"].endswith("-custom"):
            for name, value in self.manifest["parameters"].items():
                words += ["--set", f"{name}={one_line(value)}"]
        return shlex.join(words)

    @property
    def slides(self) -> str:
        return f"slides/{self.manifest['profile']}-{self.manifest['paper']}.html"

    @property
    def commit(self) -> str:
        return self.manifest["commit"] or "unknown (made outside a git checkout)"


def one_line(value: object) -> str:
    """A parameter as YAML on one line, as `--set NAME=VALUE` reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def find_runs(results: Path) -> list[Executed]:
    """Every complete run below `results`, interactive ones left out.

    Raises ValueError where there is none, for a damaged manifest, and for a manifest without its notebook.
    """
    manifests = [
        path
        for path in sorted(Path(results).glob("*/*/manifest.json"))
        if path.parent.parent.name != "interactive" and path.parent.suffix not in (".partial", ".retired")
    ]
    if not manifests:
        raise ValueError(f"{results} holds no complete run to build from: `invoke reproduce` makes one")
    return [read_run(path.parent) for path in manifests]


def read_run(folder: Path) -> Executed:
    """The run in `results/<profile>/<paper>`; ValueError, with the command that makes it again, if it is incomplete."""
    profile, paper = folder.parts[-2:]
    again = f"`invoke reproduce --profile {profile.removesuffix('-custom')} --paper {paper}`"
    notebook = folder / f"{paper}.ipynb"
    for path in (folder / "manifest.json", notebook):
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}: {again} makes it")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        run = Executed(folder, manifest, nbformat.read(notebook, as_version=4))
        missing = {"paper", "profile", "parameters", "commit", "code_version", "machine", "seconds", "files"} - set(manifest)
    except (json.JSONDecodeError, nbformat.reader.NotJSONError) as error:
        raise ValueError(f"the manifest or the notebook in {folder} is damaged ({error}): {again} makes them new") from error
    if missing:
        raise ValueError(f"{folder}/manifest.json lacks {', '.join(sorted(missing))}: {again} makes it new")
    return run


class Renderer(IPythonRenderer):
    """Markdown of a notebook to HTML that needs no script: formulas as MathML, links to code as pages below `code`.

    `papers` are the notebooks whose pages are neighbours of this one. A link to a file without a page becomes plain text: slides
    are used alone, code can have moved since the run, and a profile may leave out notebooks.
    """

    code, papers = "", frozenset()

    def inline_math(self, body: str) -> str:
        return f'<span class="formula inline">{convert(body)}</span>'

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{convert(body, display="block")}</span>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if ":" in url or url.startswith("#"):
            return super().link(text, url, title)
        path, mark, anchor = url.replace("../", "").partition("#")
        paper = Path(path).stem
        if path.endswith(".ipynb") and paper in self.papers:
            return super().link(text, f"../{paper}/notebook.html{mark}{anchor}", title)
        if self.code and path.startswith("lib/") and (ROOT / path).exists():
            return super().link(text, f"{self.code}/{path}.html", title)
        return text


class Words:
    """How exporters of pages and of slides convert Markdown."""

    code, papers = "", frozenset()

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = Renderer(escape=False)
        renderer.code, renderer.papers = self.code, self.papers
        return MarkdownWithMath(renderer=renderer).render(source)


class NotebookPage(Words, HTMLExporter):
    code = "../../code"


def page(title: str, body: str, up: str = "../../") -> str:
    """A whole HTML page; `up` is the relative path from its folder to the root of the site."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<link rel="stylesheet" href="{up}style.css">\n'
        f'</head>\n<body>\n{body}\n<script src="{up}sort.js"></script>\n</body>\n</html>\n'
    )


def facts(run: Executed, packages: bool = True) -> str:
    """How a run was made, from its manifest; the date is that of its commit, if it is in the git history."""
    manifest, machine = run.manifest, run.manifest["machine"]
    words = ["git", "show", "-s", "--format=%cs", run.commit.split()[0]]
    date = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    computed, remembered = manifest.get("cells_computed", "?"), manifest.get("cells_from_ledger", "?")
    rows = {
        "profile": manifest["profile"],
        "command": f"<code>{escape(run.command)}</code>",
        "commit": f"<code>{escape(run.commit)}</code>" + (f' of <span class="date">{date}</span>' if date else ""),
        "code version": f"<code>{escape(manifest['code_version'])}</code>",
        "machine": f"{machine['system']}, {machine['cores']} cores, {machine['accelerator'] or 'no accelerator'}",
        "packages": ", ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items()),
        "seconds": f"{manifest['seconds']:,.0f} ({computed} results computed, {remembered} kept from an earlier start)",
    }
    if not packages:
        del rows["packages"]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items()) + "</dl>"


def made_by(run: Executed, path: Path) -> str:
    """The line below a table or figure: command and commit, and a warning if the file has changed since the run."""
    name = path.relative_to(run.folder).as_posix()
    same = run.manifest["files"].get(name) == hashlib.sha256(path.read_bytes()).hexdigest()
    warning = "" if same else " <strong>Changed after the run: its hash is not the manifest's.</strong>"
    return f'<p class="made"><code>{escape(run.command)}</code>, commit <code>{escape(run.commit)}</code>.{warning}</p>'


def sortable(path: Path) -> str:
    """A csv file as a sortable HTML table: values are shown rounded, and in full in the title and for sorting."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)

    def cell(text: str) -> tuple[str, bool]:
        try:
            shown = rounded(float(text))
        except ValueError:
            return f"<td>{escape(text)}</td>", False
        return f'<td class="number" data-value="{text}" title="{text}">{shown}</td>', True

    body = [[cell(text) for text in row] for row in rows]
    numbers = [any(row[i][1] for row in body) for i in range(len(header))]
    head = "".join(
        f"<th{' class=number' if number else ''}><button>{escape(name)}</button></th>"
        for name, number in zip(header, numbers, strict=True)
    )
    lines = "".join("<tr>" + "".join(html for html, _ in row) + "</tr>\n" for row in body)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def note(path: Path) -> str:
    """The text below the table in a Markdown file; empty without text or file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return " ".join(line for line in lines if not line.startswith("|")).strip()


def spoken(path: Path) -> str:
    return path.stem.replace("_", " ").capitalize()


def results_page(run: Executed) -> str:
    """Every table and every figure of one run."""
    tables, figures = sorted((run.folder / "tables").glob("*.csv")), {}
    for path in sorted((run.folder / "figures").glob("*.*")):  # png before svg
        figures.setdefault(path.stem, []).append(path)
    parts = []
    for path in tables:
        words = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(note(path.with_suffix(".md"))))
        words = f'<p class="note">{words}</p>'
        parts.append(
            f'<h2 id="table-{path.stem}">{spoken(path)}</h2>\n{sortable(path)}\n{words}\n{made_by(run, path)}'
            f'<p class="made"><a href="tables/{path.name}">{path.name}</a>, at full precision</p>'
        )
    for files in figures.values():
        links = ", ".join(f'<a href="figures/{path.name}">{path.name}</a>' for path in files)
        name = spoken(files[0])
        image = f'<img src="figures/{files[0].name}" alt="Plot: {name}">'
        parts.append(
            f'<h2 id="figure-{files[0].stem}">Figure: {name}</h2>\n<figure>{image}</figure>\n'
            f'{made_by(run, files[0])}<p class="made">{links}</p>'
        )
    contents = "".join(f'<li><a href="#table-{path.stem}">{spoken(path)}</a></li>' for path in tables)
    contents += "".join(f'<li><a href="#figure-{name}">Figure: {spoken(Path(name))}</a></li>' for name in figures)
    top = '<nav><a href="../../index.html">All papers</a><a href="notebook.html">Notebook</a></nav>'
    head = f"<h1>Tables and figures: {escape(run.title)}</h1>{facts(run)}"
    head += f"<details open><summary>Contents</summary><ul>{contents}</ul></details>"
    return page(f"Tables and figures: {run.title}", f"{top}\n{head}\n" + "\n".join(parts))


def notebook_page(run: Executed, papers: frozenset[str] = frozenset()) -> str:
    """The executed notebook, with its code, its outputs and a list of its sections; links lead to the neighbours `papers`."""
    exporter = NotebookPage(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.papers = papers
    body, _ = exporter.from_notebook_node(run.notebook)
    body = body.replace('alt="No description has been provided for this image"', 'alt="A figure that the text explains"')
    sections = "".join(
        f'<li><a href="#{anchor}">{words}</a></li>'
        for anchor, words in re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor', body)
    )
    top = '<nav><a href="../../index.html">All papers</a><a href="index.html">Tables and figures</a></nav>'
    contents = f"<details><summary>Sections</summary><ul>{sections}</ul></details>"
    made = f"<details><summary>How this was made</summary>{facts(run)}</details>"
    return page(run.title, f"{top}\n{contents}{made}\n<main>{body}</main>")


def code_page(path: str) -> str:
    """The file of this repository, or every Python file of the folder, that a notebook links to."""
    files = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    parts = [
        f"<h2>{file.relative_to(ROOT)}</h2>\n{highlight(file.read_text(), PythonLexer(), HtmlFormatter())}" for file in files
    ]
    up = "../" * (path.count("/") + 1)
    said = '<p class="note">As it was when this site was built; the results name the commit that they were made with.</p>'
    return page(path, f'<nav><a href="{up}index.html">All papers</a></nav>\n<h1>{path}</h1>{said}\n' + "\n".join(parts), up)


def index_page(runs: list[Executed], out: Path) -> str:
    """One card for every run, by profile."""
    parts = [
        "<h1>Four papers on compressing language models</h1>\n<p>Executed notebooks, and every table and figure that they wrote, "
        "each with the command and the commit that made it.</p>"
    ]
    for profile in sorted({run.manifest["profile"] for run in runs}, key=lambda name: (name != "workshop", name)):
        parts.append(f"<h2>Profile {escape(profile)}</h2>\n<div class=cards>")
        for run in (run for run in runs if run.manifest["profile"] == profile):
            links = f'<a href="{run.name}/notebook.html">Notebook</a><a href="{run.name}/index.html">Tables and figures</a>'
            links += f'<a href="{run.slides}">Slides</a>' if (out / run.slides).is_file() else ""
            made = facts(run, packages=False)
            parts.append(f'<section class="card"><h3>{escape(run.title)}</h3>\n<nav>{links}</nav>\n{made}</section>')
        parts.append("</div>")
    return page("Four papers on compressing language models", "\n".join(parts), "")


def style() -> str:
    """The stylesheet, with the colours of code in the light and in the dark theme."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "monokai"))
    own = (ASSETS / "style.css").read_text()
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}.highlight {{ background: none; }}\n"


def build_site(results: str | Path, out: str | Path) -> Path:
    """Write the site of every complete run below `results` into the folder `out`. Returns its index page.

    Raises ValueError, before anything is written, if there is no run or a damaged one.
    """
    out = Path(out)
    runs = find_runs(Path(results))
    out.mkdir(parents=True, exist_ok=True)
    linked = set()
    for run in runs:
        folder = out / run.name
        folder.mkdir(parents=True)
        for kind in ("tables", "figures"):
            if (run.folder / kind).is_dir():
                shutil.copytree(run.folder / kind, folder / kind, ignore=shutil.ignore_patterns("*.md"))
        (folder / "index.html").write_text(results_page(run))
        neighbours = frozenset(other.folder.name for other in runs if other.folder.parent == run.folder.parent)
        (folder / "notebook.html").write_text(notebook_page(run, neighbours))
        linked |= {path for cell in run.notebook.cells for path in LINKED.findall(cell.source)}
    for path in sorted(path for path in linked if (ROOT / path).exists()):
        target = out / "code" / f"{path}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code_page(path))
    (out / "style.css").write_text(style())
    shutil.copy(ASSETS / "sort.js", out)
    (out / "index.html").write_text(index_page(runs, out))
    return out / "index.html"
