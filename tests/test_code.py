"""A measurement is as old as the code that made it: what a change makes stale, and what it leaves."""

import json
import shutil
import subprocess
import sys

import pytest

from lib.methods import METHODS
from lib.suite import code, results
from lib.suite.code import ASIDE, MEASURING, SHOWING, closure, code_version, modules_of, notebook_modules
from lib.suite.results import Results

PAPERS = sorted((code.ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("module", ["lib.baselines.cfsp", "lib.papers.comp", "lib.suite.experiment", "lib.equal_size"])
def test_a_closure_is_what_python_imports(module):
    """Against the interpreter: the modules of `lib` that a new process holds once it has imported one."""
    show = f"import sys, {module}; print(*[n for n in sys.modules if n.startswith('lib.')])"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, cwd=code.ROOT, check=True)
    imported = {name for name in done.stdout.split() if name.count(".") > 1 or name in ("lib.methods", "lib.equal_size")}
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
    """A copy of lib and notebooks; `changed(path)` says which versions another line in that file changes."""
    shutil.copytree(code.ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copytree(code.ROOT / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def versions():
        code_version.cache_clear()
        by_method = {name: code_version((*MEASURING, *modules_of([method.sweep]))) for name, method in METHODS.items()}
        return by_method | {f"notebook {path.stem}": code_version(notebook_modules(path)) for path in PAPERS}

    def changed(path):
        before = versions()
        with (tmp_path / path).open("a") as file:
            file.write("\nchanged = True\n")
        after = versions()
        return {name for name in before if before[name] != after[name]}

    yield changed
    code_version.cache_clear()


@pytest.mark.parametrize(
    "path",
    [
        "suite/plots.py",
        "suite/pages.py",
        "suite/site.py",
        "suite/slides.py",
        "suite/exercises.py",
        "suite/published.py",
        "suite/diagrams.py",
    ],
)
def test_a_change_of_what_is_shown_makes_nothing_stale(copy, path):
    assert copy(f"lib/{path}") == set()


@pytest.mark.parametrize("path", ["baselines/cfsp.py", "baselines/fpt.py", "papers/comp.py"])
def test_a_change_of_a_method_makes_its_cells_stale_and_no_others(copy, path):
    found, method = copy(f"lib/{path}"), path.split("/")[1].removesuffix(".py")
    assert {name for name in found if not name.startswith("notebook")} == {method}
    assert "notebook slicegpt" not in found
    assert "notebook compare" in found


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
