"""The site shows every committed number, says where it comes from, and needs no network."""

import csv
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urldefrag

import nbformat
import pandas as pd
import pytest

from lib.suite import diagrams, front
from lib.suite.markup import boxed, mathml, sortable
from lib.suite.results import RESULTS, ROOT
from lib.suite.site import LARGE, build_site, find_runs, notebook_page, one_line, read_run, results_page
from lib.suite.slides import build_slides
from tasks import named_values

PAPERS = ("slicegpt", "afr", "compare")
RUNS = [RESULTS / "workshop" / paper for paper in PAPERS]


EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}  # have no end


class Page(HTMLParser):
    """What a page links to, what it loads, its ids, the cells of its sortable tables, and what is wrong with its elements."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids, self.tables, self.text = [], [], set(), [], ""
        self.open, self.faults, self.elements, self.sortable = [], [], [], False
        self.feed(path.read_text())
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_endtag(self, tag):
        if tag in EMPTY or not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> ends {self.open[-1:]}, line {self.getpos()[0]}")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.open.pop()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        self.open += [tag] if tag not in EMPTY else []
        if len(found) < len(attributes) or found.get("id") in self.ids:
            self.faults.append(f"<{tag}> repeats an attribute or an id: {attributes}")
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.loaded += [found[key] for key in ("src", "srcset", "data", "poster") if key in found and tag != "a"]
        self.loaded += [found["href"]] if tag == "link" else []
        if tag == "table":
            self.sortable = "sortable" in found.get("class", "").split()
            if self.sortable:
                self.tables.append([])
        elif tag == "tr" and self.sortable:
            self.tables[-1].append([])
        elif tag == "td" and self.sortable:
            self.tables[-1][-1].append(found.get("data-value", ""))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of two committed runs, of one of them with slides, and its pages by path."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("site")
    for run in RUNS:
        shutil.copytree(run, results / "workshop" / run.name)
    shutil.copytree(RESULTS / "figures", results / "figures")
    shutil.copy(RESULTS / "gemma-3-270m" / "README.md", results / "workshop")
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
            if target.name == "explorer.html" and anchor:
                assert f'"{dict(parse_qsl(anchor))["model"].split("/")[1]}"' in (out / "tables.js").read_text(), link
            elif anchor:
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
    assert sorted(path.name for path in out.glob("*.js")) == ["explorer.js", "page.js", "tables.js"]
    for path in [out / "style.css", *out.glob("*.js")]:
        assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", path.read_text()), path.name


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_table_is_there_with_every_value(site, run):
    out, pages = site
    page = pages[out / "workshop" / run.name / "index.html"]
    files = sorted((run / "tables").glob("*.csv"))
    large = [path for path in files if pd.read_csv(path).shape[0] > LARGE[0] or pd.read_csv(path).shape[1] > LARGE[1]]
    assert {path.name for path in large} <= {"principal_angles.csv", "spectrum.csv"}, "no one reads these; all others are shown"
    for path in files:
        assert f"tables/{path.name}" in page.links
    files = [path for path in files if path not in large]
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
        assert f"figures/{path.stem}.svg" in page.loaded
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
    assert text.count('display="block"') == blocks > 0  # the page has few of these
    assert text.count("<math") == blocks + inline > 20
    rest = re.sub(r"<pre.*?</pre>|<math.*?</math>", "", text, flags=re.DOTALL)
    assert "$" not in rest
    assert not re.findall(r"<m[io]>\\", text), "a command of TeX that was not converted"


def test_html_is_well_formed_and_no_id_is_used_twice(site):
    _, pages = site
    for path, page in pages.items():
        assert page.faults == [], path


def test_the_check_of_html_would_notice(tmp_path):
    for number, (text, fault) in enumerate(
        {"<p><b>x</p>": "ends", "<div>": "not closed", "<i id=a></i><i id=a></i>": "repeats", "<br></br>": "ends"}.items()
    ):
        path = tmp_path / f"{number}.html"
        path.write_text(text)
        assert any(fault in words for words in Page(path).faults), text


def test_pictures_choices_and_scrolling_boxes_have_names(site):
    out, pages = site
    pictures = 0
    for path, page in pages.items():
        for tag, found in page.elements:
            if tag == "img":
                assert len(found.get("alt") or "") > 5, path
                pictures += 1
            if tag == "svg":
                assert found["role"] == "img", path
            if found.get("class") == "scroll":
                assert found["tabindex"] == "0", path
                assert found["role"] == "region", path
                assert found["aria-label"], path
        text = path.read_text()
        for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            assert len(ElementTree.fromstring(drawing).findtext("{http://www.w3.org/2000/svg}title")) > 20
        assert len(re.findall(r"<label>[^<]+<select", text)) == text.count("<select"), path
    assert pictures > 20
    assert sum(tag == "svg" for tag, _ in pages[out / "index.html"].elements) == 4


def test_numbers_in_special_letters_are_characters_of_their_own():
    """Browsers ignore `mathvariant` on numbers, and the product of two bold ones would read eleven."""
    shown = mathml(r"\mathbf{1}\mathbf{1}^\top + \mathbb{1} + \mathbf{20} + 10")
    assert "mathvariant" not in shown
    assert re.findall("<mn>(.*?)</mn>", shown) == ["𝟏", "𝟏", "𝟙", "𝟐𝟎", "10"]
    for path in [*RESULTS.glob("*/*/*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]:
        cells = nbformat.read(path, as_version=4).cells
        words = "\n".join(re.sub(r"`[^`]*`", "", cell.source) for cell in cells if cell.cell_type == "markdown")
        for formula in re.findall(r"\$\$?([^$]+)\$", words):
            assert not re.search(r"<m[no][^>]*mathvariant", mathml(formula)), f"{path}: {formula}"


def test_code_is_folded_and_cells_link_to_what_they_wrote(site):
    out, pages = site
    folder = out / "workshop" / "compare"
    text, page = (folder / "notebook.html").read_text(), pages[folder / "notebook.html"]
    code = [cell for cell in read_run(RUNS[2]).notebook.cells if cell.cell_type == "code"]
    shown = [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    assert len(shown) == len(code) - 1, "the parameters that the run replaced are left out"
    assert text.count('<details class="code"') == text.count('<div class="input_area">') == len(shown) > 20
    assert "NBVAL_IGNORE_OUTPUT" not in text
    assert text.count('id="code"') == 1
    for path in (RUNS[2] / "tables").glob("*.csv"):
        assert f"tables/{path.name}" in page.links, "the data of every table can be downloaded where it is made"
    for name in ("size", "cost", "latency"):
        assert f"figures/{name}.svg" in page.links
        assert f'alt="Plot: {name.capitalize()}"' in text


def test_the_contents_name_every_section_and_neighbours_follow_the_reading_order(site):
    out, pages = site
    for paper, before, after in (("slicegpt", [], ["afr"]), ("afr", ["slicegpt"], ["compare"]), ("compare", ["afr"], [])):
        path = out / "workshop" / paper / "notebook.html"
        cells = read_run(RESULTS / "workshop" / paper).notebook.cells
        sources = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        sections = len(re.findall(r"^###? ", sources, re.MULTILINE))
        contents = re.search(r'<details class="contents".*?</details>', path.read_text(), re.DOTALL)[0]
        assert contents.count("<li ") == sections > 8
        elements = pages[path].elements
        around = {kind: [found["href"] for _, found in elements if found.get("rel") == kind] for kind in ("prev", "next")}
        assert {kind: set(links) for kind, links in around.items()} == {
            "prev": {f"../{other}/notebook.html" for other in before},
            "next": {f"../{other}/notebook.html" for other in after},
        }


def test_diagrams_are_called_by_their_titles(tmp_path):
    run = read_run(copy_of_a_run(tmp_path))
    drawing, bare = diagrams.block("COMP").data, '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    output = lambda data: nbformat.v4.new_output("execute_result", {"image/svg+xml": data, "text/plain": "SVG"})  # noqa: E731
    cell = nbformat.v4.new_code_cell('run.figure("shape", f)', outputs=[output(drawing), output(bare)])
    run.notebook.cells = [nbformat.v4.new_markdown_cell("# Title"), cell]
    alts = re.findall(r'<img alt="([^"]+)"', notebook_page(run))
    assert alts == [re.search("<title>(.*?)</title>", drawing)[1], "Plot: Shape"]


def test_the_code_of_a_toy_is_open(tmp_path):
    run = read_run(copy_of_a_run(tmp_path))
    new, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    run.notebook.cells = [new("# Title"), code("a"), new("## 1 · The method on a toy"), code("b"), new("### Part"), code("c")]
    run.notebook.cells += [new("## 2 · The model\n\nNo toy."), code("d")]
    found = re.findall(r'<details class="code"( open="")?><summary>Code, 1 line: (\w)</summary>', notebook_page(run))
    assert [(bool(shown), name) for shown, name in found] == [(False, "a"), (True, "b"), (True, "c"), (False, "d")]


def test_wide_tables_scroll_in_boxes():
    plain, grouped = "<table><tr><th>a</th></tr></table>", '<table><tr><th rowspan="2">a</th></tr></table>'
    found = boxed(f"<p>{plain}</p>{grouped}")
    assert found.count('class="scroll"') == 2
    assert found.count('class="grouped"') == 1
    assert found.index("grouped") > found.index("</p>")


# --- the start ------------------------------------------------------------------------------------------------------------


def test_the_leaderboard_shows_every_method_at_every_size(site):
    """Against the tables: the mean over draws where it was taken, `first` and `level` as there, other sizes named."""
    out, pages = site
    once = pd.read_csv(RUNS[2] / "tables" / "pareto.csv").query("method != 'dense'")
    standing = pd.read_csv(RUNS[2] / "tables" / "standing.csv").set_index(["model", "method", "size"])
    boards = dict(zip(once.model.unique(), pages[out / "index.html"].tables, strict=True))
    text = (out / "index.html").read_text()
    for model, board in boards.items():
        own = once[once.model == model]
        assert len(board) - 1 == own.method.nunique()
        sizes = sorted(own["size"].unique())
        html = re.search(rf'<section class="board" id="board-workshop-{model}">.*?</section>', text, re.DOTALL)[0]
        lines = {re.search(r"</span>([^<]+)</td>", line)[1]: line for line in re.findall(r"<tr><td>.*?</tr>", html)}
        assert set(lines) == set(own.method)
        for row in own.itertuples():
            cell = re.findall(r"<td class=.number.*?</td>", lines[row.method])[sizes.index(row.size)]
            key = (model, row.method, row.size)
            value = standing.relative[key] if key in standing.index else row.relative
            assert float(re.search('data-value="([^"]+)"', cell)[1]) == pytest.approx(value, rel=1e-12), key
            named = re.findall("<small>(.*?)</small>", cell)
            place = standing.standing[key] if key in standing.index else None
            other = abs(row.removed_decoder - row.size) >= 0.015
            assert named == [place] * (place in ("first", "level")) + [f"at {100 * row.removed_decoder:.0f} %"] * other, key
        at_20 = [standing.relative.get((model, m, 0.2), own.query("method == @m and size == 0.2").relative.item()) for m in lines]
        assert at_20 == sorted(at_20)


def test_verdicts_are_counted_and_every_claim_is_shown(site):
    out, pages = site
    tables = [pd.read_csv(run / "tables" / "claims.csv") for run in RUNS if (run / "tables" / "claims.csv").is_file()]
    claims = pd.concat(tables)
    assert len(pages[out / "claims.html"].tables[0]) - 1 == len(claims) > 50
    text = (out / "index.html").read_text()
    table = re.search(r'<table class="verdicts">.*?</table>', text, re.DOTALL)[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr><td>.*?</tr>", table)]
    kinds = ["reproduced", "contradicted", "undecided", "not testable here"]
    total = [sum(int(row[2 + i] or 0) for row in rows) for i in range(4)]
    assert total == [int((claims.verdict == kind).sum()) for kind in kinds]
    for paper, name in (("slicegpt", "SliceGPT"), ("afr", "Structured AFR")):
        own = pd.read_csv(RESULTS / "workshop" / paper / "tables" / "claims.csv")
        [row] = [row for row in rows if row[:2] == [name, "wiki-a-llama"]]
        assert [int(n or 0) for n in row[2:6]] == [int(((own.model == "wiki-a-llama") & (own.verdict == k)).sum()) for k in kinds]
    assert {row[1] for row in rows} == {"wiki-a-llama", "wiki-a-opt", "shapes and random networks", "nothing here"}


def test_each_paper_has_a_sentence_and_a_drawing(site):
    out, pages = site
    index = pages[out / "index.html"]
    for paper, idea in front.IDEAS.items():
        assert idea in index.text
        assert (f"workshop/{paper}/notebook.html" in index.links) == (paper in PAPERS)
    assert "figures/size.svg" in index.loaded
    assert "invoke reproduce" in index.text


def test_what_is_said_about_runs_and_the_plan_are_pages(site):
    out, pages = site
    about = pages[out / "workshop" / "about.html"]
    assert "Gemma 3 270M: another family" in about.text
    plan = pages[out / "plan.html"]
    assert "claims.html" in plan.links
    for page in ("index.html", "notebook.html"):
        assert "../about.html" in pages[out / "workshop" / "afr" / page].links
    assert {"plan.html", "library.html", "workshop/about.html"} <= set(pages[out / "index.html"].links)
    assert "torch.export" in pages[out / "library.html"].text


def test_a_start_without_comparison_or_claims_is_a_start(tmp_path):
    copy_of_a_run(tmp_path)
    build_site(tmp_path / "results", tmp_path / "site")
    text = (tmp_path / "site" / "index.html").read_text()
    assert "The four papers" in text
    assert "leaderboard" not in text
    assert "verdicts" not in text
    assert "No run has judged the claims" in (tmp_path / "site" / "claims.html").read_text()


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
    assert not (tmp_path / "site").exists()


def test_a_run_in_another_setting_lists_its_parameters(tmp_path):
    run = read_run(copy_of_a_run(tmp_path))
    run.manifest |= {"profile": "workshop-custom", "parameters": {"levels": [0.1, 0.2], "corpus": "my file.txt"}}
    words = "invoke reproduce --profile workshop --paper slicegpt --set 'levels=[0.1, 0.2]' --set 'corpus=my file.txt'"
    assert run.command == words


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<!DOCTYPE html><body><script>
const found = [];
const frames = %s.flatMap((page) => [390, 1440].map((width) => [page, width]));
const look = %s;
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
(async () => {
  for (const [page, width] of frames) {
    const frame = document.createElement("iframe");
    frame.style = `border: 0; width: ${width}px; height: 800px`;
    frame.src = page;
    const loaded = new Promise((done) => (frame.onload = done));
    document.body.append(frame);
    await loaded;
    found.push([page, width, await look(frame.contentWindow, frame.contentDocument)]);
    frame.remove();
  }
  document.body.textContent = "";
  document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(found) }));
})();
</script>"""


def browse(out, tmp_path, pages, look):
    """[(page, width, what the function `look` in JavaScript found)] of pages, as a phone and as a wide screen show them.

    A message on the console, such as an error that nobody caught, is a failure.
    """
    (out / "probe.html").write_text(PROBE % (json.dumps(pages), look))
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    words += "--disable-component-update --disable-sync --enable-logging=stderr "
    words += "--allow-file-access-from-files --virtual-time-budget=60000"
    command = [BROWSER, *words.split(), f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{out}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (out / "probe.html").unlink()
    assert "CONSOLE" not in done.stderr
    found = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    assert len(found) == 2 * len(pages)
    return found


LAYOUT = """(window, inside) => {
  const cells = [...inside.querySelectorAll("table.sortable > thead th")], columns = [];
  const [head] = cells.filter((cell) => cell.innerText.match(/perplexity|relative|value|20/)), table = head?.closest("table");
  const hints = [...inside.querySelectorAll(".scroll")].map((box) => [
    box.scrollWidth > box.clientWidth + 1, box.previousElementSibling.offsetHeight > 0 ]);
  for (const click of head ? [1, 2] : []) {
    head.firstChild.click();
    columns.push([...table.tBodies[0].rows].map((row) => Number(row.cells[head.cellIndex].dataset.value)));
  }
  const broken = [...inside.images].filter((image) => !image.naturalWidth).length;
  return { wide: inside.documentElement.scrollWidth, broken, columns, hints };
}"""


@pytest.mark.skipif(not BROWSER, reason="needs the browser chromium")
def test_no_page_is_wider_than_a_phone_and_tables_sort(site, tmp_path):
    out, pages = site
    names = [path.relative_to(out).as_posix() for path in pages]
    sorted_tables, hints = [], 0
    for name, width, found in browse(out, tmp_path, names, LAYOUT):
        assert found["wide"] <= width, name
        assert not found["broken"], name
        for column, descending in zip(found["columns"], (False, True), strict=False):
            assert column == sorted(column, reverse=descending), name
            assert len(set(column)) > 3
            sorted_tables.append(name)
        for wide, said in found["hints"]:
            assert said == wide, f"{name} at {width}: a table that scrolls sideways says so, and no other does"
            hints += wide
    assert hints > 20
    assert {"index.html", "explorer.html", "workshop/compare/index.html"} <= set(sorted_tables)


EXPLORE = """async (window, inside) => {
  const at = (id) => inside.getElementById(id);
  const box = at("chart"), row = () => at("rows").tBodies[0].rows[0].innerText.split("\\t").slice(0, 2);
  const seen = () => ({
    hash: window.location.hash, link: at("link").hash, says: at("says").textContent, note: at("note").textContent,
    dots: inside.querySelectorAll("#chart circle, #chart path").length, rows: at("rows").tBodies[0].rows.length,
    first: row(), fits: box.scrollWidth <= box.clientWidth,
    chosen: ["model", "size", "axis"].map((id) => at(id).value),
  });
  const states = [seen()];
  for (const [id, value] of [["size", "0.5"], ["model", "workshop/wiki-a-opt"], ["axis", "accuracy"], ["axis", "decode"]]) {
    at(id).value = value;
    at(id).dispatchEvent(new window.Event("change", { bubbles: true }));
    states.push(seen());
  }
  window.location.hash = "model=workshop%2Fwiki-a-llama&size=0.4&axis=kept";
  await wait(500);
  states.push(seen());
  return states;
}"""


@pytest.mark.skipif(not BROWSER, reason="needs the browser chromium")
def test_controls_of_the_explorer_change_what_is_shown_and_the_link_keeps_it(site, tmp_path):
    out, _ = site
    once = pd.read_csv(RUNS[2] / "tables" / "pareto.csv")
    dense, once = once[once.method == "dense"].set_index("model").params, once[once.method != "dense"]
    for _, _, states in browse(out, tmp_path, ["explorer.html"], EXPLORE):
        chosen = [state["chosen"] for state in states]
        assert chosen[0] == ["workshop/wiki-a-llama", "0.2", "perplexity"]
        assert chosen[1] == ["workshop/wiki-a-llama", "0.5", "perplexity"]
        assert chosen[2] == ["workshop/wiki-a-opt", "0.5", "perplexity"]
        assert chosen[3] == ["workshop/wiki-a-opt", "0.5", "accuracy"]
        assert chosen[4] == ["workshop/wiki-a-opt", "0.2", "decode"]  # measured at one size alone
        assert chosen[5] == ["workshop/wiki-a-llama", "0.4", "kept"]
        for state in states:
            assert state["dots"] == state["rows"] == once.method.nunique()
            assert state["says"].startswith(state["chosen"][0].split("/")[1])
            assert state["fits"]
            assert state["note"]
        for state in states[1:5]:
            assert dict(parse_qsl(state["hash"][1:])) == dict(zip(("model", "size", "axis"), state["chosen"], strict=True))
            assert state["hash"] == state["link"]
        assert len({json.dumps(state["says"]) for state in states}) == len(states)
        best = once[(once.model == "wiki-a-llama") & (once["size"] == 0.4)].params.min()
        assert f"{100 * best / dense['wiki-a-llama']:.1f} %" in states[5]["first"][1]


START = """(window, inside) => {
  const shown = () => [...inside.querySelectorAll(".board")].filter((part) => part.offsetHeight).map((part) => part.id);
  const choice = inside.getElementById("board"), all = [...choice.options].map((option) => option.value), seen = [shown()];
  choice.value = all[1];
  choice.dispatchEvent(new window.Event("change", { bubbles: true }));
  return { all, seen: [...seen, shown()], choice: choice.offsetHeight };
}"""
NOTEBOOK = """async (window, inside) => {
  const cells = [...inside.querySelectorAll("details.code")];
  const button = inside.getElementById("code"), contents = inside.querySelector(".contents");
  const open = () => cells.filter((cell) => cell.open).length, counts = [open()];
  counts.push(inside.querySelectorAll("details.code[open]").length);
  for (const click of [1, 2]) button.click(), counts.push(open());
  const beside = contents.open;
  window.scrollTo(0, 5000);
  await wait(300);
  return { cells: cells.length, counts, beside, top: contents.getBoundingClientRect().top };
}"""


@pytest.mark.skipif(not BROWSER, reason="needs the browser chromium")
def test_the_start_shows_one_model_and_a_notebook_opens_its_code_with_one_click(site, tmp_path):
    out, _ = site
    for _, _, found in browse(out, tmp_path, ["index.html"], START):
        assert found["all"] == ["board-workshop-wiki-a-llama", "board-workshop-wiki-a-opt"]
        assert found["seen"] == [[found["all"][0]], [found["all"][1]]]
        assert found["choice"] > 0
    for _, width, found in browse(out, tmp_path, ["workshop/slicegpt/notebook.html"], NOTEBOOK):
        before, toys, *after = found["counts"]
        assert before == toys < found["cells"]
        assert after == [found["cells"], 0]
        assert found["beside"] == (width == 1440)
        assert found["top"] == 0, "the contents stay in sight"


AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
FAULTS = """async (window, inside) => {
  const script = inside.createElement("script"), loaded = new Promise((done) => (script.onload = done));
  script.src = "%s";
  inside.head.append(script);
  await loaded;
  const { violations } = await window.axe.run(inside, { resultTypes: ["violations"] });
  return violations.map(({ id, impact, nodes }) => [impact, id, nodes[0].html]);
}"""


@pytest.mark.skipif(not BROWSER or not AXE.is_file(), reason="needs the browser chromium, and `npm install --no-save axe-core`")
def test_axe_finds_no_serious_fault_of_accessibility(site, tmp_path):
    out, _ = site
    names = ["index.html", "explorer.html", "claims.html", "plan.html", "library.html"]
    names += [f"workshop/{paper}/{name}.html" for paper in ("slicegpt", "compare") for name in ("notebook", "index")]
    for name, width, faults in browse(out, tmp_path, names, FAULTS % AXE.as_uri()):
        assert [fault for fault in faults if fault[0] in ("serious", "critical")] == [], f"{name} at {width}"


def rerun(folder, paper="afr", change=None):
    """The present notebook as if a run had just made it, with parameters of its own; `change` works on its cells."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{paper}.ipynb", as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = nbformat.v4.new_code_cell("limit = 7", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place + 1, given)
    if change:
        change(notebook.cells)
    target = folder / "workshop" / paper
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(RESULTS / "workshop" / paper / "manifest.json", target)
    nbformat.write(notebook, target / f"{paper}.ipynb")
    return read_run(target)


def test_a_run_that_is_older_than_its_notebook_says_so(tmp_path):
    assert not rerun(tmp_path / "new").outdated
    older = rerun(tmp_path / "old", change=lambda cells: cells[-1].update(source="Other words."))
    assert older.outdated
    said = notebook_page(older)
    assert "This run is older than the notebook" in said
    assert f"<code>{older.command}</code>" in said
    assert "This run is older" not in notebook_page(rerun(tmp_path / "new"))


def test_pages_leave_out_lines_of_progress(tmp_path):
    def log(cells):
        cell = next(cell for cell in cells if cell.cell_type == "code")
        cell.outputs = [
            nbformat.v4.new_output("stream", text="sliced layer 3 of 8 to width 120; 4 s since the start\nthe outcome is seven\n")
        ]

    page = notebook_page(rerun(tmp_path, change=log))
    assert "the outcome is seven" in page
    assert "since the start" not in page
