"""A measurement is as old as the code that made it: what a change makes stale, and what it leaves."""

import functools
import json
import linecache
import shutil
import subprocess
import sys

import pytest
import torch

from lib.methods import METHODS
from lib.suite import code, results
from lib.suite.code import ASIDE, MEASURING, SHOWING, closure, code_version, modules_of, notebook_modules
from lib.suite.results import Results

IMPORTED = ("lib.baselines.cfsp", "lib.papers.comp", "lib.suite.experiment", "lib.equal_size")
SHOW = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    held = [name for name in sys.modules if name.split(".")[0] == "lib"]
    print(*held)
    for name in held:
        del sys.modules[name]
"""
PAPERS = sorted((code.ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def imported_by():
    """{module: the modules of `lib` that a new process holds once it has imported it}; other packages stay imported."""
    done = subprocess.run([sys.executable, "-c", SHOW, *IMPORTED], capture_output=True, text=True, cwd=code.ROOT, check=True)
    return {name: set(held.split()) for name, held in zip(IMPORTED, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize("module", IMPORTED)
def test_a_closure_is_what_python_imports(module, imported_by):
    """Against the interpreter."""
    imported = {name for name in imported_by[module] if name.count(".") > 1 or name in ("lib.methods", "lib.equal_size")}
    # An import inside a function is a dependence, too, though none that has happened yet.
    later = {"lib.evaluation.shared_context"}
    assert imported - ASIDE <= set(closure([module])) <= (imported | later) - ASIDE


def test_notebooks_name_their_modules():
    assert {"lib.papers.comp", "lib.primitives.finetune", "lib.suite.experiment"} <= set(notebook_modules(PAPERS[1]))
    assert PAPERS[1].stem == "comp"
    for path in PAPERS:
        found = notebook_modules(path)
        assert not set(found) & SHOWING
        assert set(MEASURING) <= set(found)
        assert closure(found)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of lib and notebooks; `changed(path, ...)` says which versions another line in these files changes."""
    shutil.copytree(code.ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copytree(code.ROOT / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def versions():
        code_version.cache_clear()
        by_method = {name: code_version((*MEASURING, *modules_of([method.sweep]))) for name, method in METHODS.items()}
        return by_method | {f"notebook {path.stem}": code_version(notebook_modules(path)) for path in PAPERS}

    def changed(*paths):
        before = versions()
        for path in paths:
            with (tmp_path / path).open("a") as file:
                file.write("\nchanged = True\n")
        after = versions()
        return {name for name in before if before[name] != after[name]}

    yield changed
    code_version.cache_clear()


def test_a_change_of_what_is_shown_makes_nothing_stale(copy):
    shown = ("plots", "pages", "site", "slides", "exercises", "published", "diagrams")
    assert copy(*(f"lib/suite/{name}.py" for name in shown)) == set()


@pytest.mark.parametrize("path", ["baselines/cfsp.py", "baselines/fpt.py", "papers/comp.py"])
def test_a_change_of_a_method_makes_its_cells_stale_and_no_others(copy, path):
    found, method = copy(f"lib/{path}"), path.split("/")[1].removesuffix(".py")
    assert {name for name in found if not name.startswith("notebook")} == {method}
    assert "notebook slicegpt" not in found
    assert "notebook compare" in found


SAYS = """
def root(x):
    if x < 0:
        raise ValueError("negative")
    return x**0.5
"""


def test_what_a_module_only_says_makes_nothing_stale():
    before = code._computed(SAYS)
    for old, new in (
        ("    if x < 0", '    """The root of x."""\n    if x < 0'),
        ("    if x < 0", "    # No root there.\n    if x < 0"),
        ('"negative"', 'f"{x} is negative: {reason(x)}"'),
        ("\ndef", "\nfrom lib.primitives.refused import reason\n\ndef"),
        ("\ndef", '\n"""Roots."""\ndef'),
    ):
        assert old in SAYS
        assert code._computed(SAYS.replace(old, new, 1)) == before, new


def test_what_it_computes_or_refuses_does():
    before = code._computed(SAYS)
    for old, new in (
        ("0.5", "0.25"),
        ("x < 0", "x <= 0"),
        ("ValueError", "KeyError"),
        ("\ndef", "\nfrom lib.primitives.linalg import root\n\ndef"),
        ("    return", "    print(x)\n    return"),
    ):
        assert code._computed(SAYS.replace(old, new, 1)) != before, new


def test_a_change_of_a_primitive_makes_all_stale_that_use_it(copy):
    assert copy("lib/primitives/gradients.py") >= {"afr", "llm-pruner", "notebook afr", "notebook compare"}
    assert copy("lib/primitives/anatomy.py") == {*METHODS, *(f"notebook {path.stem}" for path in PAPERS)}
    assert copy("lib/evaluation/perplexity.py") == {*METHODS, *(f"notebook {path.stem}" for path in PAPERS)}


def test_a_ledger_forgets_what_other_code_made(copy, tmp_path):
    """A cell that is asked for again: remembered after a change of a figure or another method, computed after one of its own."""

    def computed():
        code_version.cache_clear()
        run, seen = Results("compare", tmp_path / "results" / "compare"), []
        run.cell(lambda: seen.append("CFSP"), by=[METHODS["cfsp"].sweep], method="CFSP")
        run.cell(lambda: seen.append("FLAP"), by=[METHODS["flap"].sweep], method="FLAP")
        run.cell(lambda: seen.append("all"), what="everything that the notebook imports")
        return seen

    assert computed() == ["CFSP", "FLAP", "all"]
    copy("lib/suite/plots.py")
    assert computed() == []
    copy("lib/baselines/flap.py")
    assert computed() == ["FLAP", "all"]
    records = (tmp_path / "results" / "compare.ledger.jsonl").read_text().splitlines()
    assert json.loads(records[0])["modules"] == ["lib.suite.experiment", "lib.baselines.cfsp"]


def test_code_version_covers_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "weights.bin").write_bytes(b"1")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    versions = []
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "lib" / "a.py").write_text(text)
        code_version.cache_clear()
        versions.append(code_version())
    (tmp_path / "lib" / "weights.bin").write_bytes(b"2")  # an embedded model trained again
    code_version.cache_clear()
    versions.append(code_version())
    code_version.cache_clear()
    assert len(set(versions)) == 3


# --- functions of a notebook ----------------------------------------------------------------------------------------------


def cell_of(source: str, names: str, place: str = "cell-1") -> list:
    """What a cell of a notebook defines: names of a module `__main__`, whose text can be looked up."""
    scope = {"__name__": "__main__", "functools": functools, "torch": torch}
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    exec(compile(source, place, "exec"), scope)
    return [scope[name] for name in names.split()]


NESTED = """
limit = 3
def helper(x):
    return x + 1
table = {"a": helper}
@functools.cache
def compute(x):
    def inside(y):
        return table["a"](y) + limit
    return inside(x)
other = lambda: compute(1)
"""


def test_functions_of_the_library_and_data_have_no_code_of_a_notebook():
    assert code.notebook_code(torch.relu, closure, 3, None, [1, 2]) is None


@pytest.mark.parametrize("name", ["compute", "other"])
def test_what_a_function_of_a_notebook_names_counts(name):
    [before] = cell_of(NESTED, name)
    found = code.notebook_code(before)
    assert found == code.notebook_code(*cell_of(NESTED, name))
    for old, new in (("x + 1", "x + 2"), ("+ limit", "- limit"), ("inside(x)", "inside(x + 1)")):
        assert code.notebook_code(*cell_of(NESTED.replace(old, new), name)) != found, new


def test_what_it_does_not_name_does_not_count():
    found = code.notebook_code(*cell_of(NESTED, "compute"))
    for other in (
        NESTED.replace("return x + 1", "return x + 1  # more"),
        "\n\n" + NESTED,
        NESTED + "def more():\n    return 7\n",
    ):
        assert code.notebook_code(*cell_of(other, "compute")) == found
    assert code.notebook_code(*cell_of(NESTED.replace("limit = 3", "limit = 4"), "compute")) == found  # data: in the settings


def test_a_lambda_of_a_cell_counts_with_the_cell():
    before, after = NESTED, NESTED.replace("limit = 3", "limit = 4")
    assert code.notebook_code(*cell_of(before, "other")) != code.notebook_code(*cell_of(after, "other"))
    shown = f"# a comment\n{NESTED}\nprint(limit)\nfor x in ():\n    print(x)\n    fold(x, 'a title')\n"
    same = NESTED + "\nfor x in ():\n    display(x)\n"
    assert code.notebook_code(*cell_of(shown, "other")) == code.notebook_code(*cell_of(same, "other"))
    inside = "def outer():\n    limit = {}\n    return lambda: 1\nmade = outer()\n"
    assert len({code.notebook_code(*cell_of(inside.format(i), "outer")) for i in (3, 4)}) == 2
    assert len({code.notebook_code(*cell_of(inside.format(i), "made")) for i in (3, 4)}) == 1


def test_functions_that_functions_hold_count():
    source = "def outer(f):\n    return lambda: f(1)\ndef one(x):\n    return x\ndef two(x):\n    return -x\n"
    outer, one, two = cell_of(source, "outer one two")
    assert code.notebook_code(outer(one)) != code.notebook_code(outer(two))
    assert code.notebook_code(functools.partial(torch.relu, one)) != code.notebook_code(functools.partial(torch.relu, two))
    assert code.notebook_code({"a": [one]}) == code.notebook_code(one)


def test_functions_that_call_each_other():
    source = "def one(x):\n    return two(x)\ndef two(x):\n    return one(x)\n"
    assert code.notebook_code(*cell_of(source, "one")) == code.notebook_code(*cell_of(source, "two")) is not None
