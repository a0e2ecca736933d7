"""The stored notebooks and committed results are what they claim: executed, parameterised, and free of machine paths."""

import ast
import builtins
import hashlib
import json
import re
import symtable
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from benchmarks.sections import by_section
from lib.suite.results import RAW
from lib.suite.runs import LINK, PROGRESS
from lib.suite.site import read_run
from tasks import NOTEBOOKS, RESULTS, papers

STORED = [pytest.param(NOTEBOOKS / f"{paper}.ipynb", id=paper) for paper in papers()]
MANIFESTS = [
    pytest.param(path, id=path.parent.relative_to(RESULTS).as_posix())
    for path in sorted(RESULTS.glob("*/*/manifest.json"))
    if not path.parent.parent.name.endswith(("interactive", "-custom")) and not path.parent.name.endswith(".partial")
]


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", STORED)
def test_outputs_are_stored_and_in_order(path):
    """nbval compares with stored outputs; a stripped notebook would pass it with nothing compared."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    printing = [cell for cell in cells if shows(cell.source)]
    assert len(printing) > 5
    assert all(cell.outputs for cell in printing)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


def shows(source):
    """Whether a cell prints or draws when it is run, which a function that it only defines does not."""
    statements = [part for part in ast.parse(source).body if not isinstance(part, ast.FunctionDef)]
    return any("print(" in ast.unparse(part) or "plt.show" in ast.unparse(part) for part in statements)


@pytest.mark.parametrize("path", STORED)
def test_one_parameters_cell_and_enough_words(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert sum(cell.cell_type == "markdown" for cell in cells) >= sum(cell.cell_type == "code" for cell in cells)


@pytest.mark.parametrize("path", STORED)
def test_no_cell_gives_the_name_of_a_parameter_to_something_else(path):
    """The manifest records the parameters as they stand at the end."""
    given, *others = (ast.parse(cell.source) for cell in code_cells(path)[1:])
    assert any("parameters" in cell.metadata.get("tags", []) for cell in code_cells(path)[1:2])
    parameters = {target.id for statement in given.body for target in statement.targets}
    for statement in [statement for tree in others for statement in tree.body if not isinstance(statement, ast.FunctionDef)]:
        used = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        stored = {node.id for node in used if isinstance(node.ctx, ast.Store)}
        read = {node.id for node in used if isinstance(node.ctx, ast.Load)}  # such as sizes = sorted(sizes)
        assert not (stored - read) & parameters, ast.unparse(statement)[:80]


@pytest.mark.parametrize("path", STORED)
def test_cells_that_nbval_skips_are_few(path):
    cells = code_cells(path)
    skipped = [cell for cell in cells if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(skipped) <= len(cells) / 2
    assert not [cell for cell in cells if "NBVAL" in cell.source or "nbval-skip" in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("path", STORED)
def test_cells_are_short_and_plots_are_folded(path):
    """Parameters and imports are lists, and need not be."""
    for cell in code_cells(path):
        listed = all(isinstance(part, ast.Import | ast.ImportFrom) for part in ast.parse(cell.source).body)
        assert len(cell.source.splitlines()) <= 25 or listed or "parameters" in cell.metadata.get("tags", []), cell.source[:80]
        if "run.figure(" in cell.source and "run.table(" not in cell.source:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), cell.source[:80]


@pytest.mark.parametrize("path", STORED)
def test_open_tables_are_few(path):
    """What is not a section's main result is folded."""
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    tables = [text for output in outputs if "<table" in (text := output.get("data", {}).get("text/html", ""))]
    assert len([text for text in tables if not text.startswith("<details>")]) <= 5
    assert not [output for output in outputs if output.output_type == "stream" and PROGRESS.search(output.text)]


@pytest.mark.parametrize("path", STORED)
def test_figures_are_few_and_all_made_in_one_place(path):
    """`lib.suite.plots` draws them, where the tests see what a reader sees."""
    code = "\n".join(cell.source for cell in code_cells(path))
    figures = re.findall(r'run\.figure\("(\w+)", fig\)', code)
    assert 3 <= len(figures) <= 6
    assert len(set(figures)) == len(figures) == code.count("run.figure(") == len(re.findall(r"fig = plots\.\w+_figure\(", code))
    assert "subplots(" not in code


def names(statement):
    """Names of a module that one of its statements reads, and those that it binds."""
    nodes = list(ast.walk(statement))
    targets = [part.target for part in nodes if isinstance(part, ast.comprehension | ast.NamedExpr)]
    counted = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    tables = [symtable.symtable(ast.unparse(statement), "cell", "exec")]
    bound = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read = {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and (top or symbol.is_global())}
    return read - counted, bound - counted


def foreign_names(notebook):
    """(section, name) for every name that a section takes from another section, or binds though the set-up has given it."""
    given, found = set(dir(builtins)), []
    for section, cells in by_section(notebook).items():
        own = set()
        for statement in [statement for cell in cells for statement in ast.parse(cell.source).body]:
            read, bound = names(statement)
            if section == "set-up":
                given |= set() if isinstance(statement, ast.For) else bound  # what a loop leaves behind is not for others
                continue
            simple = isinstance(statement, ast.Assign | ast.AugAssign)  # the right side is read before the left one is bound
            taken = read - given - own - (set() if simple else bound)
            again = set() if isinstance(statement, ast.Import | ast.ImportFrom) else bound & given
            found += [(section, name) for name in sorted(taken | again)]
            own |= bound
    return found


@pytest.mark.parametrize("path", STORED)
def test_every_section_runs_on_its_own_after_the_set_up(path):
    assert foreign_names(nbformat.read(path, as_version=4)) == []


def test_names_of_other_sections_are_found():
    new = nbformat.v4
    sections = {
        "": "import math\nfor s in (1, 2):\n    rows = []\ndef f(x):\n    return x + y",
        "## 1 · a": "y = 1\nfor row in range(3):\n    last = row\ntotal = [k for k in range(y) if (half := k / 2) and half]",
        "## 2 · b": "def g(a):\n    return a + y\nprint(last, math.pi)\ntotal += [1]",
        "## Set-up": "z = 0",
        "## 3 · c": "z = f = 3\nimport math\nfor row in (1,):\n    s = row\nprint(row, rows, later)\nlater = 1\nrow = row + 1",
    }
    cells = [cell for title, code in sections.items() for cell in (new.new_markdown_cell(title), new.new_code_cell(code))]
    second = [("2 · b", "y"), ("2 · b", "last"), ("2 · b", "total")]
    third = [("3 · c", name) for name in ("f", "z", "later", "rows")]
    assert foreign_names(new.new_notebook(cells=cells)) == second + third


@pytest.mark.parametrize("path", [*STORED, *(pytest.param(p.values[0], id=p.id) for p in MANIFESTS)])
def test_links_to_files_lead_somewhere(path):
    """In the notebooks, and in their executed copies, which lie deeper."""
    path = path if path.suffix == ".ipynb" else path.parent / f"{path.parent.name}.ipynb"
    words = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = LINK.findall(words)
    assert links
    for link in links:
        assert (path.parent / link.split("#")[0]).exists(), link


# Means over draws with their extremes; accuracies and texts beside which a perplexity stands.
WITHOUT_INTERVALS = {"calibration_size", "accuracy", "says"}


@pytest.mark.parametrize("path", MANIFESTS)
def test_tables_that_compare_carry_intervals(path):
    """Wherever a perplexity stands, the interval of its ratio to the dense model stands beside it."""
    run = read_run(path.parent)
    if run.outdated:
        pytest.skip("the run is older than its notebook, as its page says")
    tables = {file.stem: set(pd.read_csv(file).columns) for file in (path.parent / "tables").glob("*.csv")}
    wanted = {"perplexity", "relative", "times_dense"}
    assert {name for name, columns in tables.items() if columns & wanted and "low" not in columns} <= WITHOUT_INTERVALS


def test_results_are_there():
    assert {path.values[0].parent.name for path in MANIFESTS} >= set(papers())


@pytest.mark.parametrize("path", MANIFESTS)
def test_manifest_lists_the_files_as_they_are(path):
    manifest = json.loads(path.read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == digest, name
    on_disk = {p.relative_to(path.parent).as_posix() for kind in ("tables", "figures") for p in (path.parent / kind).iterdir()}
    raw = {RAW} if (path.parent / RAW).is_file() else set()
    assert on_disk | raw == set(manifest["files"])
    assert raw or path.parent.parent.name != "workshop"
    assert (path.parent / f"{path.parent.name}.ipynb").is_file()


@pytest.mark.parametrize("path", MANIFESTS)
def test_no_path_of_a_machine_is_committed(path):
    texts = [p for p in path.parent.rglob("*") if p.suffix in (".json", ".ipynb", ".csv", ".md", ".svg")]
    for text in [*texts, *NOTEBOOKS.glob("*.ipynb")]:
        content = text.read_text()
        for word in (str(Path.home()) + "/", str(NOTEBOOKS.parent) + "/", "/site-packages/"):
            assert word not in content, text.name


COMPARED = ["model", "method", "ratio", "perplexity", "params", "removed_decoder", "removed_model"]


@pytest.mark.parametrize("path", MANIFESTS)
def test_perplexity_tables_have_the_columns_of_the_suite(path):
    for table in path.parent.glob("tables/perplexity.csv"):
        frame = pd.read_csv(table)
        assert [column for column in frame.columns if column in COMPARED] == COMPARED
        assert frame.ratio.between(0, 1, inclusive="left").all()
        assert (frame[frame.method == "dense"].removed_model == 0).all()


def test_lock_names_the_versions_of_the_committed_results():
    lock = dict(line.split("==") for line in (NOTEBOOKS.parent / "requirements.lock").read_text().splitlines() if "==" in line)
    lock = {name.lower().replace("_", "-"): version for name, version in lock.items()}
    for path in RESULTS.glob("workshop/*/manifest.json"):
        for name, version in json.loads(path.read_text())["packages"].items():
            assert lock[name] == version.split("+")[0]
