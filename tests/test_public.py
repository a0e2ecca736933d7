"""Links to Colab appear with the public address, and nowhere without it; the installation runs on Colab alone."""

import ast
import subprocess
import sys

import nbformat
import pytest

from lib.suite import public, site
from lib.suite.public import address, colab, with_colab
from lib.suite.results import RESULTS, ROOT
from lib.suite.site import notebook_page, read_run

WHERE = "https://github.com/somebody/suite"
LINK = "https://colab.research.google.com/github/somebody/suite/blob/main/notebooks/afr.ipynb"


def notebook():
    return nbformat.read(ROOT / "notebooks" / "afr.ipynb", as_version=4)


def test_the_address_is_that_of_the_project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\n[project.urls]\nRepository = "{WHERE}.git"\n')
    assert address(tmp_path) == WHERE
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert address(tmp_path) == ""


@pytest.mark.parametrize("where", ["", "https://example.org/somebody/suite"])
def test_nothing_is_shown_without_an_address_that_colab_reads(where):
    assert colab("afr", where) == ""
    assert with_colab(notebook(), "afr", where) == notebook()


def test_a_notebook_with_address_has_a_badge_and_installs_first():
    made = with_colab(notebook(), "afr", WHERE)
    assert made.cells[0].source.splitlines()[:3] == [
        notebook().cells[0].source.splitlines()[0],
        "",
        f"[![Open in Colab]({public.BADGE})]({LINK})",
    ]
    code = [cell.source for cell in made.cells if cell.cell_type == "code"]
    before = [cell.source for cell in notebook().cells if cell.cell_type == "code"]
    assert code[0].endswith(before[0])
    assert code[1:] == before[1:]
    assert with_colab(with_colab(notebook(), "afr", WHERE), "afr", WHERE) == made


def test_the_installation_runs_on_colab_and_there_once(monkeypatch):
    ast.parse(public.INSTALL.format(address=WHERE))
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    monkeypatch.setattr(sys, "path", list(sys.path))
    guard = public.INSTALL.format(address=WHERE)
    exec(guard, {})
    assert ran == []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(guard, {})
    exec(guard, {})
    assert [words[:2] for words in ran] == [["git", "clone"], [sys.executable, "-m"]]
    assert WHERE in ran[0]
    assert sys.path[0] == ran[1][-1] == ran[0][-1]


def test_the_page_of_a_notebook_links_to_colab_with_an_address(monkeypatch):
    run = read_run(RESULTS / "workshop" / "afr")
    monkeypatch.setattr(site, "address", lambda: "")
    assert "colab" not in notebook_page(run).lower()
    monkeypatch.setattr(site, "address", lambda: WHERE)
    assert f'<a href="{LINK}">Open in Colab</a>' in notebook_page(run)
