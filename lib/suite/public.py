"""What notebooks and pages say once this repository has a public address: links that open a notebook in Colab.

The address is `Repository` below `[project.urls]` in pyproject.toml. As long as it is not there, nothing is shown.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from nbformat import NotebookNode

from lib.suite.results import ROOT

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
MARK = "# On Colab, the suite is installed first."
INSTALL = (
    MARK
    + """
import subprocess
import sys

if "google.colab" in sys.modules and "/content/suite" not in sys.path:
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "/content/suite"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "/content/suite"], check=True)
    sys.path.insert(0, "/content/suite")

"""
)


def address(root: Path = ROOT) -> str:
    """The public address of this repository; empty if it has none."""
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return declared.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def colab(paper: str, where: str) -> str:
    """Where Colab opens a notebook of the repository at the address `where`, which is on GitHub; empty if it is not."""
    if urlsplit(where).hostname != "github.com":
        return ""
    return f"https://colab.research.google.com/github{urlsplit(where).path}/blob/main/notebooks/{paper}.ipynb"


def with_colab(notebook: NotebookNode, paper: str, where: str) -> NotebookNode:
    """The notebook with a badge below its title and a guarded installation in its first cell of code; as it is without address.

    Doing it again changes nothing.
    """
    link = colab(paper, where)
    title = notebook.cells[0]
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if link and BADGE not in title.source:
        heading, _, rest = title.source.partition("\n")
        title.source = f"{heading}\n\n[![Open in Colab]({BADGE})]({link})\n{rest}"
    if link and not code.source.startswith(MARK):
        code.source = INSTALL.format(address=where) + code.source
    return notebook
