"""The site shows every committed number, says where it comes from, and needs no network; slides follow from the headings."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest

from lib.suite.results import RESULTS
from lib.suite.site import build_site, find_runs, one_line, read_run, results_page, sortable
from lib.suite.slides import build_slides, slide_cells
from tasks import named_values

PAPERS = ("slicegpt", "afr", "compare")
RUNS = [RESULTS / "workshop" / paper for paper in PAPERS]


class Page(HTMLParser):
    """What a page links to, what it loads, its ids, and the cells of its sortable tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids, self.tables, self.text = [], [], set(), [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.loaded += [found[key] for key in ("src", "srcset", "data", "poster") if key in found and tag != "a"]
        self.loaded += [found["href"]] if tag == "link" else []
        if tag == "table" and found.get("class") == "sortable":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag == "td" and self.tables:
            self.tables[-1][-1].append(found.get("data-value", ""))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of two committed runs, of one of them with slides, and its pages by path."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("site")
    for run in RUNS:
        shutil.copytree(run, results / "workshop" / run.name)
    shutil.copytree(RUNS[0], results / "interactive" / "slicegpt")
    build_slides(RUNS[0], out)
    build_site(results, out)
    return out, {path: Page(path) for path in out.rglob("*.html") if path.parent.name != "slides"}


def local(links):
    return [link for link in links if not link.startswith(("http://", "https://", "data:"))]


def test_every_local_link_resolves(site):
    out, pages = site
    assert len(pages) > 2 * len(PAPERS) + 1
    checked = 0
    for path, page in pages.items():
        for link in local(page.links + page.loaded):
            name, anchor = urldefrag(link)
            target = (path.parent / unquote(name)).resolve() if name else path
            assert target.is_relative_to(out), f"{path.name} links out of the site: {link}"
            assert target.is_file(), f"{path}: {link}"
            if anchor:
                assert anchor in pages[target].ids, f"{path}: {link}"
            checked += 1
    assert checked > 100


def test_links_between_notebooks_lead_to_those_that_are_there(site):
    """The comparison names all four papers; two of them have a page here, of the others the words remain."""
    out, pages = site
    page = pages[out / "workshop" / "compare" / "notebook.html"]
    assert {link for link in page.links if link.startswith("../") and link.endswith("notebook.html")} == {
        "../slicegpt/notebook.html",
        "../afr/notebook.html",
    }
    assert "SVD-LLM, Structured AFR, COMP." in page.text


def test_nothing_is_loaded_from_a_network(site):
    out, pages = site
    for path, page in pages.items():
        assert page.loaded, path
        assert not [source for source in page.loaded if not source.startswith("data:") and ":" in source], path
        text = re.sub(r"data:[^\"']+", "", path.read_text())
        assert not re.search(r"url\(|@import|<script[^>]*>[^<]", text), f"{path} carries styles or scripts that nobody checks"
    for name in ("style.css", "sort.js"):
        assert not re.search(r"https?:|url\(|@import|fetch\(", (out / name).read_text()), name


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_table_is_there_with_every_value(site, run):
    out, pages = site
    page = pages[out / "workshop" / run.name / "index.html"]
    files = sorted((run / "tables").glob("*.csv"))
    assert len(page.tables) == len(files) > 5
    for path, shown in zip(files, page.tables, strict=True):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        assert f"table-{path.stem}" in page.ids
        body = shown[1:]  # the first row holds the headings
        assert [len(row) for row in body] == [len(row) for row in rows], path.name
        numbers = [[text if is_number(text) else "" for text in row] for row in rows]
        assert body == numbers, path.name  # in full precision, in order
        written = path.with_suffix(".md").read_text().splitlines()[-1]
        assert written.startswith("|") or written.replace("`", "") in page.text


def is_number(text):
    return bool(re.fullmatch(r"-?(\d+\.?\d*(e[+-]?\d+)?|inf|nan)", text))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_figure_is_there_and_says_how_it_was_made(site, run):
    out, pages = site
    folder = out / "workshop" / run.name
    page = pages[folder / "index.html"]
    for path in (run / "figures").iterdir():
        assert (folder / "figures" / path.name).read_bytes() == path.read_bytes()
        assert f"figures/{path.name}" in page.links
        assert f"figures/{path.stem}.png" in page.loaded
    manifest = json.loads((run / "manifest.json").read_text())
    shown = len(list((run / "tables").glob("*.csv"))) + len(list((run / "figures").glob("*.png")))
    made = f"invoke reproduce --profile workshop --paper {run.name}, commit {manifest['commit']}."
    assert page.text.count(made) == shown
    assert "Changed after the run" not in page.text
    for part in (manifest["code_version"], manifest["commit"], f"{manifest['seconds']:,.0f} ("):
        assert part in pages[out / "index.html"].text


def test_index_lists_the_runs_but_not_interactive_ones(site):
    out, pages = site
    index = pages[out / "index.html"]
    assert "Structured AFR: which neurons does nobody miss?" in index.text
    assert "interactive" not in index.text
    assert [link for link in index.links if "slides" in link] == ["slides/workshop-slicegpt.html"]


def test_formulas_are_drawn_by_the_browser_alone(site):
    out, _ = site
    text = (out / "workshop" / "slicegpt" / "notebook.html").read_text()
    sources = [cell.source for cell in read_run(RUNS[0]).notebook.cells if cell.cell_type == "markdown"]
    words = "\n".join(re.sub(r"`[^`]*`", "", source) for source in sources)
    blocks = len(re.findall(r"\$\$.+?\$\$", words, re.DOTALL))
    inline = len(re.findall(r"\$[^$]+\$", re.sub(r"\$\$.+?\$\$", "", words, flags=re.DOTALL)))
    assert text.count('display="block"') == blocks > 1
    assert text.count("<math") == blocks + inline > 20
    rest = re.sub(r"<pre.*?</pre>|<math.*?</math>", "", text, flags=re.DOTALL)
    assert "$" not in rest
    assert not re.findall(r"<m[io]>\\", text), "a command of TeX that was not converted"


def test_a_table_that_was_edited_after_the_run_is_marked(tmp_path):
    run = tmp_path / "results" / "workshop" / "slicegpt"
    shutil.copytree(RUNS[0], run)
    edited = run / "tables" / "precision.csv"
    edited.write_text(edited.read_text().replace(",0.25,", ",0.35,"))
    text = results_page(read_run(run))
    assert text.count("Changed after the run") == 1


def test_strange_cells_are_shown_as_they_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n"<b>&""x""",\n0.00012345678,12345.6\n')
    html = sortable(path)
    assert "&lt;b&gt;&amp;&quot;x&quot;" in html
    assert 'data-value="0.00012345678" title="0.00012345678">0.0001235<' in html
    assert ">12,346<" in html


@pytest.mark.parametrize("value", [[0.1, 1e-5], "2:4", None, 3, {"lr": 2e-3, "steps": 30}, "", ["a b", "c"]])
def test_the_command_of_a_custom_run_reads_its_parameters_back(value):
    assert named_values([f"x={one_line(value)}"]) == {"x": value}


def test_nothing_to_build_from_is_said_before_anything_is_written(tmp_path):
    (tmp_path / "results" / "interactive" / "slicegpt").mkdir(parents=True)
    shutil.copy(RUNS[0] / "manifest.json", tmp_path / "results" / "interactive" / "slicegpt")
    with pytest.raises(ValueError, match="no complete run to build from: `invoke reproduce` makes one"):
        build_site(tmp_path / "results", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def copy_of_a_run(tmp_path):
    run = tmp_path / "results" / "workshop" / "slicegpt"
    run.mkdir(parents=True)
    for name in ("manifest.json", "slicegpt.ipynb"):
        shutil.copy(RUNS[0] / name, run)
    return run


def test_an_incomplete_run_says_how_to_make_it_again(tmp_path):
    again = "`invoke reproduce --profile workshop --paper slicegpt`"
    run = copy_of_a_run(tmp_path)
    assert [found.name for found in find_runs(tmp_path / "results")] == ["workshop/slicegpt"]
    (run / "slicegpt.ipynb").rename(run / "other.ipynb")
    with pytest.raises(ValueError, match=f"holds no slicegpt.ipynb: {again}"):
        find_runs(tmp_path / "results")
    (run / "slicegpt.ipynb").write_text("{")
    with pytest.raises(ValueError, match=f"is damaged .*: {again}"):
        find_runs(tmp_path / "results")
    (run / "other.ipynb").replace(run / "slicegpt.ipynb")
    (run / "manifest.json").write_text('{"paper": "slicegpt"}')
    with pytest.raises(ValueError, match=f"lacks code_version, commit, .*: {again}"):
        find_runs(tmp_path / "results")
    (run / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"holds no manifest.json: {again}"):
        build_slides(run, tmp_path / "site")
    with pytest.raises(ValueError, match="holds no dist/reveal.js"):
        build_slides(RUNS[0], tmp_path / "site", tmp_path)
    assert not (tmp_path / "site").exists()


def test_a_run_in_another_setting_lists_its_parameters(tmp_path):
    run = read_run(copy_of_a_run(tmp_path))
    run.manifest |= {"profile": "workshop-custom", "parameters": {"levels": [0.1, 0.2], "corpus": "my file.txt"}}
    words = "invoke reproduce --profile workshop --paper slicegpt --set 'levels=[0.1, 0.2]' --set 'corpus=my file.txt'"
    assert run.command == words


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_section_starts_a_slide(run):
    notebook = read_run(run).notebook
    slides = slide_cells(read_run(run))
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [line for line in re.findall(r"^##? .+", sources, re.MULTILINE) if not line.endswith("Exercises")]
    starts = [cell.source.splitlines()[0] for cell in slides if cell.metadata.slideshow.slide_type == "slide"]
    assert starts == [*headings, "## How the numbers were made"]
    assert len(headings) > 10
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "display_data"]
    shown = [output for cell in slides for output in cell.get("outputs", []) if output.output_type == "display_data"]
    assert shown == pictures
    printed = "".join(output.text for cell in slides for output in cell.get("outputs", []) if output.output_type == "stream")
    assert re.search(r"perplexity,? \d", printed)
    assert " at 20%: perplexity" not in printed


def test_slides_show_outputs_without_code_and_load_reveal_alone(tmp_path):
    stub = tmp_path / "reveal"
    (stub / "dist").mkdir(parents=True)
    (stub / "dist" / "reveal.js").write_text("// stands for reveal.js\n")
    path = build_slides(RUNS[0], tmp_path / "site", stub)
    page = Page(path)
    assert (path.parent / "reveal.js" / "dist" / "reveal.js").read_text() == "// stands for reveal.js\n"
    loaded = [source for source in page.loaded if not source.startswith("data:")]
    assert loaded
    assert all(source.startswith("reveal.js/dist/") for source in loaded)
    assert "import matplotlib" not in page.text
    assert path.read_text().count("<section") > nbformat_headings(RUNS[0])


def nbformat_headings(run):
    cells = nbformat.read(run / f"{run.name}.ipynb", as_version=4).cells
    return sum(len(re.findall(r"^## ", cell.source, re.MULTILINE)) for cell in cells if cell.cell_type == "markdown")


PROBE = """<!DOCTYPE html><body><script>
const found = [];
const frames = %s.flatMap((page) => [390, 1440].map((width) => [page, width]));
let left = frames.length;
for (const [page, width] of frames) {
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 800px`;
  frame.onload = () => {
    const inside = frame.contentDocument, table = inside.querySelector("table.sortable");
    const broken = [...inside.images].filter((image) => !image.naturalWidth).length;
    const columns = [];
    for (const click of table ? [1, 2] : []) {
      const [head] = [...table.tHead.rows[0].cells].filter((cell) => cell.innerText.match(/perplexity|relative/));
      head.firstChild.click();
      columns.push([...table.tBodies[0].rows].map((row) => Number(row.cells[head.cellIndex].dataset.value)));
    }
    found.push([page, width, inside.documentElement.scrollWidth, broken, columns]);
    if (!--left) document.body.innerHTML = `<pre>${JSON.stringify(found)}</pre>`;
  };
  frame.src = page;
  document.body.append(frame);
}
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_no_page_is_wider_than_a_phone_and_tables_sort(site, tmp_path):
    out, pages = site
    names = [path.relative_to(out).as_posix() for path in pages]
    (out / "probe.html").write_text(PROBE % json.dumps(names))
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    words += "--disable-component-update --disable-sync --enable-logging=stderr "
    words += "--allow-file-access-from-files --virtual-time-budget=20000"
    command = ["chromium", *words.split(), f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{out}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (out / "probe.html").unlink()
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1])
    assert len(found) == 2 * len(names)
    sorted_tables = 0
    for name, width, scroll_width, broken, columns in found:
        assert scroll_width <= width, name
        assert not broken, name
        for column, descending in zip(columns, (False, True), strict=False):
            assert column == sorted(column, reverse=descending), name
            assert len(set(column)) > 3
            sorted_tables += 1
    assert sorted_tables == 4 * len(PAPERS)


def test_slides_end_before_the_exercises(tmp_path):
    run = read_run(RUNS[0])
    before = [cell.source for cell in slide_cells(run)]
    run.notebook.cells += [
        nbformat.v4.new_markdown_cell("## 99 · Exercises\n\nTwo."),
        nbformat.v4.new_markdown_cell("### Exercise 1"),
    ]
    assert [cell.source for cell in slide_cells(run)] == before
