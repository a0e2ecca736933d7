"""A static site, made of executed notebooks and of the tables and figures beside them.

Nothing is computed here, and the pages load nothing from a network: formulas are converted to MathML, which browsers
display. Every table and figure carries the command and the commit that made it, as its manifest records them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from lib.suite import explorer, front
from lib.suite.markup import Words, boxed, page, readme_page, sortable
from lib.suite.pages import PAPERS
from lib.suite.public import address, colab
from lib.suite.results import ROOT
from lib.suite.runs import LINK, PROGRESS

ASSETS = Path(__file__).parent.parent / "assets" / "site"
LARGE = (250, 40)  # rows, columns: a larger table is data of a plot, which is downloaded and not read
OUTDATED = "This run is older than the notebook, whose words, tables and figures have changed since. It is made anew by"
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
    def about(self) -> str:
        """A link to what is said about all runs of the profile, if anything is."""
        return '<a href="../about.html">About these runs</a>' if (self.folder.parent / "README.md").is_file() else ""

    @property
    def outdated(self) -> bool:
        """Whether the notebook has got other words or other code since this run; not where it is no notebook of the suite."""
        present = ROOT / "notebooks" / f"{self.folder.name}.ipynb"
        return present.is_file() and sources(nbformat.read(present, as_version=4)) != sources(self.notebook)

    @property
    def slides(self) -> str:
        return f"slides/{self.manifest['profile']}-{self.manifest['paper']}.html"

    @property
    def commit(self) -> str:
        return self.manifest["commit"] or "unknown (made outside a git checkout)"


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells of a notebook say and compute, without the parameters that a run was given and where links lead from it."""
    return [LINK.sub("]", cell.source) for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


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


def spoken(path: Path) -> str:
    return path.stem.replace("_", " ").capitalize()


def table_part(run: Executed, path: Path) -> str:
    """A table of a run: sortable, with its note, and as a download; one that is `LARGE` as a download alone."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows, columns = len(lines) - 1, lines[0].count(",") + 1
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(explorer.note_of(path.with_suffix(".md"))))
    large = rows > LARGE[0] or columns > LARGE[1]
    shown = f"<p>Data of a plot: {rows} rows and {columns} columns, to download.</p>" if large else sortable(path)
    return (
        f'<h2 id="table-{path.stem}">{spoken(path)}</h2>\n{shown}\n<p class="note">{words}</p>\n{made_by(run, path)}'
        f'<p class="made"><a href="tables/{path.name}" download>{path.name}</a>, at full precision</p>'
    )


def figure_part(run: Executed, files: list[Path]) -> str:
    """A figure of a run, which is there in several formats: the drawing that stays sharp is shown."""
    links = ", ".join(f'<a href="figures/{path.name}">{path.name}</a>' for path in files)
    name, shown = spoken(files[0]), max(files, key=lambda path: path.suffix == ".svg")
    image = f'<img src="figures/{shown.name}" alt="Plot: {name}">'
    return (
        f'<h2 id="figure-{files[0].stem}">Figure: {name}</h2>\n<figure>{image}</figure>\n'
        f'{made_by(run, shown)}<p class="made">{links}</p>'
    )


def results_page(run: Executed) -> str:
    """Every figure and every table of one run."""
    tables, figures = sorted((run.folder / "tables").glob("*.csv")), {}
    for path in sorted((run.folder / "figures").glob("*.*")):
        figures.setdefault(path.stem, []).append(path)
    parts = [figure_part(run, files) for files in figures.values()] + [table_part(run, path) for path in tables]
    contents = "".join(f'<li><a href="#figure-{name}">Figure: {spoken(Path(name))}</a></li>' for name in figures)
    contents += "".join(f'<li><a href="#table-{path.stem}">{spoken(path)}</a></li>' for path in tables)
    made = f"<details><summary>How this was made</summary>{facts(run)}</details>"
    contents = f'<nav aria-label="Contents"><ul class="list">{contents}</ul></nav>'
    head = f"<h1>Figures and tables: {escape(run.title)}</h1>{made}\n{contents}"
    body = f"<main>\n{head}\n" + "\n".join(parts) + "\n</main>"
    return page(f"Figures and tables: {run.title}", body, links=f'<a href="notebook.html">Notebook</a>{run.about}')


class NotebookPage(Words, HTMLExporter):
    """A notebook, as `prepared`, whose code is folded under its first line, and whose pictures say what they show."""

    code = "../../code"
    raw_template = """
{%- extends 'basic/index.html.j2' -%}
{% block input %}
<details class="code"{{ cell.metadata.open }}><summary>{{ cell.metadata.summary | escape_html }}</summary>{{ super() }}</details>
{% endblock input %}
{% block data_svg %}
<div class="output_svg output_subarea"><img alt="{{ output.metadata.alt | escape_html }}"
src="data:image/svg+xml;base64,{{ output.data['image/svg+xml'] | text_base64 }}"></div>
{% endblock data_svg %}
{% block codecell %}{{ super() }}{{ cell.metadata.files }}{% endblock codecell %}
"""


def prepared(run: Executed) -> nbformat.NotebookNode:
    """A copy of a run's notebook, without parameters that the run replaced, whose cells say what their pictures and files are.

    Code is folded, but in a section that has `toy` in its heading: there the code is the method, and to be read.
    """
    notebook = nbformat.from_dict(run.notebook)
    replaced = any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    notebook.cells = [c for c in notebook.cells if not (replaced and "parameters" in c.metadata.get("tags", []))]
    toy = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            without_progress(cell)
            describe(run, cell)
            cell.metadata["open"] = " open" if toy else ""
        for heading in re.findall(r"(?m)^## (.+)", cell.source) if cell.cell_type == "markdown" else ():
            toy = "toy" in heading
    return notebook


def without_progress(cell: nbformat.NotebookNode) -> None:
    """Take out lines that a long run printed to say how far it is."""
    for output in cell.outputs:
        if output.output_type == "stream":
            output.text = "".join(line for line in output.text.splitlines(keepends=True) if not PROGRESS.search(line))
    cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text.strip()]


def describe(run: Executed, cell: nbformat.NotebookNode) -> None:
    """Write into the metadata of a cell of code what its page says of it."""
    cell.source = cell.source.removeprefix("# NBVAL_IGNORE_OUTPUT\n")  # of runs from before nbval's marks were tags
    lines = cell.source.splitlines() or [""]
    count = "1 line" if len(lines) == 1 else f"{len(lines)} lines"
    made = re.findall(r'run\.(table|figure)\(\s*"(\w+)"', cell.source)
    made += [("table", "claims")] * ("claims.show(run)" in cell.source)
    figures = [spoken(Path(name)) for kind, name in made if kind == "figure"]
    cell.metadata |= {"summary": f"Code, {count}: {lines[0]}", "files": file_links(run, made)}
    cell.metadata["alt"] = f"Plot: {', '.join(figures)}" if figures else "A plot that the text beside it explains"
    for output in cell.outputs:
        drawing = output.get("data", {}).get("image/svg+xml")
        if drawing:
            title = re.search(r"<title>(.*?)</title>", drawing, re.DOTALL)
            output.metadata["alt"] = unescape(title[1]) if title else cell.metadata["alt"]


def file_links(run: Executed, made: list[tuple[str, str]]) -> str:
    """Links to the files that a cell wrote, of those that are in the run's folder: (`table` or `figure`, name)."""
    links = []
    for kind, name in made:
        if kind == "table" and (run.folder / "tables" / f"{name}.csv").is_file():
            links.append(f'<a href="tables/{name}.csv" download>data: {name}.csv</a>')
        if kind == "figure" and (run.folder / "figures" / f"{name}.svg").is_file():
            links.append(f'<a href="figures/{name}.svg">figure: {name}.svg</a>')
    return f'<p class="made files">{" · ".join(links)}</p>' if links else ""


def neighbours(run: Executed, papers: Sequence[str]) -> str:
    """Links to the notebooks before and after this one, in the order of `papers`."""
    place = papers.index(run.folder.name) if run.folder.name in papers else 0
    before, after = papers[max(place - 1, 0) : place], papers[place + 1 : place + 2]
    links = [f'<a rel="prev" href="../{paper}/notebook.html">← {PAPERS.get(paper, paper)}</a>' for paper in before]
    links += [f'<a rel="next" href="../{paper}/notebook.html">{PAPERS.get(paper, paper)} →</a>' for paper in after]
    return f'<p class="neighbours links">{"".join(links)}</p>' if links else ""


def notebook_page(run: Executed, papers: Sequence[str] = ()) -> str:
    """The executed notebook, with folded code, its outputs and its contents; links lead to the notebooks `papers`, in order."""
    exporter = NotebookPage(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.papers = frozenset(papers)
    body, _ = exporter.from_notebook_node(prepared(run))
    body = boxed(body)
    sections = "".join(
        f'<li class="level{level}"><a href="#{anchor}">{words}</a></li>'
        for level, anchor, words in re.findall(r'<h([23]) id="([^"]+)">(.*?)<a class="anchor', body)
    )
    contents = f'<summary>Contents</summary><nav aria-label="Contents"><ul>{sections}</ul></nav>'
    contents = f'<details class="contents" open>{contents}</details>'
    made = f"<details><summary>How this was made</summary>{facts(run)}</details>"
    around = neighbours(run, papers)
    opens = colab(run.folder.name, address())
    around += f'<p><a href="{opens}">Open in Colab</a></p>' if opens else ""
    tools = f'<div class="tools">{around}<button id="code" aria-pressed="false">Show all code</button></div>'
    older = f'<p class="note">{OUTDATED} <code>{escape(run.command)}</code></p>\n' if run.outdated else ""
    return page(
        run.title,
        f"{contents}\n<main>{tools}\n{older}{body}\n{around}{made}</main>",
        links=f'<a href="index.html">Figures and tables</a>{run.about}',
        kind="notebook",
    )


def code_page(path: str) -> str:
    """The file of this repository, or every Python file of the folder, that a notebook links to."""
    files = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    parts = [
        f"<h2>{file.relative_to(ROOT)}</h2>\n{highlight(file.read_text(), PythonLexer(), HtmlFormatter())}" for file in files
    ]
    up = "../" * (path.count("/") + 1)
    said = '<p class="note">As it was when this site was built; the results name the commit that they were made with.</p>'
    return page(path, f"<main>\n<h1>{path}</h1>{said}\n" + "\n".join(parts) + "\n</main>", up)


def run_cards(runs: list[Executed], out: Path) -> str:
    """One card for every run, by profile, the workshop's first."""
    parts = []
    for profile in dict.fromkeys(run.manifest["profile"] for run in runs):
        parts.append(f"<h3>{escape(profile)}</h3>\n<div class=cards>")
        for run in (run for run in runs if run.manifest["profile"] == profile):
            links = f'<a href="{run.name}/notebook.html">Notebook</a><a href="{run.name}/index.html">Figures and tables</a>'
            links += f'<a href="{run.slides}">Slides</a>' if (out / run.slides).is_file() else ""
            made = f"<details><summary>How this was made</summary>{facts(run, packages=False)}</details>"
            parts.append(f'<section class="card"><h4>{escape(run.title)}</h4>\n<p class="links">{links}</p>\n{made}</section>')
        parts.append("</div>")
        if (out / profile / "about.html").is_file():
            parts.append(f'<p><a href="{profile}/about.html">About the runs of {escape(profile)}</a></p>')
    parts.append(
        '<p>To teach with them: <a href="plan.html">the plan of a half-day workshop</a>. To use them: <a href="library.html">the '
        "methods, and where each result can run</a>.</p>"
    )
    return "\n".join(parts)


def reading_order(run: Executed) -> tuple:
    """The workshop's runs first; within a profile, the papers as a reader takes them."""
    profile, paper = run.folder.parent.name, run.folder.name
    return profile != "workshop", profile, list(PAPERS).index(paper) if paper in PAPERS else len(PAPERS), paper


def style() -> str:
    """The stylesheet, with the colours of code in the light and in the dark theme."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "monokai"))
    own = (ASSETS / "style.css").read_text()
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}.highlight {{ background: none; }}\n"


def build_site(results: str | Path, out: str | Path) -> Path:
    """Write the site of every complete run below `results` into the folder `out`. Returns its index page.

    Raises ValueError, before anything is written, if there is no run or a damaged one.
    """
    results, out = Path(results), Path(out)
    runs = sorted(find_runs(results), key=reading_order)
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_run(run, [other.folder.name for other in runs if other.folder.parent == run.folder.parent], out)
    linked = {path for run in runs for cell in run.notebook.cells for path in LINKED.findall(cell.source)}
    for path in sorted(path for path in linked if (ROOT / path).exists()):
        target = out / "code" / f"{path}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code_page(path), encoding="utf-8")
    (out / "style.css").write_text(style(), encoding="utf-8")
    for name in ("page.js", "explorer.js"):
        shutil.copy(ASSETS / name, out)
    write_readmes(runs, results, out)
    write_start(runs, results, out)
    return out / "index.html"


def write_run(run: Executed, papers: Sequence[str], out: Path) -> None:
    """The pages of one run, its tables and its figures. papers: the notebooks of its profile, in order."""
    folder = out / run.name
    folder.mkdir(parents=True)
    for kind in ("tables", "figures"):
        if (run.folder / kind).is_dir():
            shutil.copytree(run.folder / kind, folder / kind, ignore=shutil.ignore_patterns("*.md"))
    (folder / "index.html").write_text(results_page(run), encoding="utf-8")
    (folder / "notebook.html").write_text(notebook_page(run, papers), encoding="utf-8")


def write_readmes(runs: list[Executed], results: Path, out: Path) -> None:
    """What is said about the runs of each profile, the plan of the workshop, and the library with where each result can go."""
    pages = {"results/claims.md": "claims.html", "notebooks/README.md": "plan.html", "lib/README.md": "library.html"}
    for run in runs:
        pages[f"results/{run.name}/{run.folder.name}.ipynb"] = f"{run.name}/notebook.html"
        pages |= {f"results/{run.name}{kind}": f"{run.name}/index.html" for kind in ("", "/tables", "/figures")}
        pages.setdefault(f"notebooks/{run.folder.name}.ipynb", f"{run.name}/notebook.html")
    texts = {profile: results / profile / "README.md" for profile in dict.fromkeys(run.folder.parent.name for run in runs)}
    texts = {profile: path for profile, path in texts.items() if path.is_file()}
    pages |= {f"results/{profile}/README.md": f"{profile}/about.html" for profile in texts}
    for profile, path in texts.items():
        text = readme_page(path, f"results/{profile}", pages, "../")
        (out / profile / "about.html").write_text(text, encoding="utf-8")
    for folder, name in (("notebooks", "plan.html"), ("lib", "library.html")):
        (out / name).write_text(readme_page(ROOT / folder / "README.md", folder, pages, ""), encoding="utf-8")


def write_start(runs: list[Executed], results: Path, out: Path) -> None:
    """The start, the explorer with its tables, and the page of claims."""
    comparisons = {run.manifest["profile"]: run.folder for run in runs if run.manifest["paper"] == "compare"}
    drawn = (results / "figures" / "size.svg").is_file()
    if drawn:
        (out / "figures").mkdir()
        shutil.copy(results / "figures" / "size.svg", out / "figures")
    notebooks: dict[str, str] = {}
    for run in runs:
        notebooks.setdefault(run.folder.name, f"{run.name}/notebook.html")
    folders = [run.folder for run in runs]
    pages = {
        "tables.js": explorer.script(comparisons),
        "explorer.html": explorer.explorer_page(),
        "claims.html": front.claims_page(front.claim_rows(folders)),
        "index.html": front.index_page(comparisons, folders, notebooks, run_cards(runs, out), drawn),
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
