"""The bounds of the dependencies are read as pip reads them, and the tests that are run with them are there."""

import tomllib
from pathlib import Path

import pytest
from invoke import Exit
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tasks
from lib.suite import versions
from lib.suite.runs import RunError

ROOT = Path(__file__).parent.parent
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARTS = (DECLARED["dependencies"], *DECLARED["optional-dependencies"].values())
REQUIREMENTS = [Requirement(text) for part in PARTS for text in part]


def test_constraints_are_the_lower_bounds():
    """pip's own reading: every dependency but the project itself is pinned to a version that is allowed, and to its bound."""
    pinned = {found.name: found.specifier for found in map(Requirement, versions.constraints(ROOT, "oldest").splitlines())}
    assert set(pinned) == {requirement.name for requirement in REQUIREMENTS} - {"pared-down"}
    for requirement in REQUIREMENTS:
        if requirement.name != "pared-down":
            (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
            assert pinned[requirement.name] == SpecifierSet(f"=={bound}")
            assert requirement.specifier.contains(bound)
    assert not versions.constraints(ROOT, "newest")


def test_bounds_are_read_in_every_form(tmp_path):
    text = '[project]\ndependencies = ["a-b[c,d]>=1.2,<2", "e<4,>= 3.0.1"]\noptional-dependencies.x = ["me[y]", "f.g>=0.5"]\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert versions.constraints(tmp_path, "oldest") == "a-b==1.2\ne==3.0.1\nf.g==0.5\n"


def test_files_to_run_are_there():
    assert [name for name in versions.FILES if not (ROOT / f"tests/test_{name}.py").is_file()] == []


@pytest.mark.parametrize(("fails", "message"), [("pip", "do not install together"), ("pytest", "tests fail"), ("", None)])
def test_a_failure_is_one(monkeypatch, capsys, fails, message):
    """Whichever step fails, the task does; both ends are tried where none is given."""
    monkeypatch.setattr(versions, "environment", lambda folder: folder)
    monkeypatch.setattr(versions, "installed", lambda python, names: "torch==0")
    monkeypatch.setattr(versions, "run", lambda python, root, module, *words: int(module == fails))
    if message is None:
        tasks.test_versions.body(None)
        assert capsys.readouterr().out.count("all tests passed") == 2
        return
    with pytest.raises(RunError, match=message):
        versions.check_bound(ROOT, "oldest")
    with pytest.raises(Exit, match=message) as stop:
        tasks.test_versions.body(None)
    assert stop.value.code == 1
    with pytest.raises(Exit, match="unknown bound 'old': choose one of oldest, newest"):
        tasks.test_versions.body(None, bound="old")
