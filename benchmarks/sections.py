"""How long each section of the notebooks takes on its own after the set-up, with the notebook's own parameters.

    python -m benchmarks.sections [PAPER ...]

Set-up and section run in a kernel of their own with the machine's threads, one after another, so the time of a section includes
whatever it needs from others. Files are written to a temporary folder only.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
import torch
from nbformat import NotebookNode

from tasks import NOTEBOOKS, papers

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def by_section(notebook: NotebookNode) -> dict[str, list[NotebookNode]]:
    """Code cells of every section by its title; "set-up" are those above the first one, or below a heading without a number."""
    found, section = {}, "set-up"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            title = next(iter(HEADING.findall(cell.source)), section)
            section = title if title[0].isdigit() else "set-up"
        else:
            found.setdefault(section, []).append(cell)
    return found


def seconds(notebook: NotebookNode, cells: list[NotebookNode]) -> list[float]:
    """Wall-clock seconds of each of the cells, run as a notebook of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "section.ipynb")
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata), path)
        done = papermill.execute_notebook(
            str(path), str(path), {"folder": str(Path(folder, "results"))}, progress_bar=False, cwd=str(NOTEBOOKS)
        )
    return [cell.metadata.papermill.duration for cell in done.cells if "injected-parameters" not in cell.metadata.tags]


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    for paper in sys.argv[1:] or papers():
        notebook = nbformat.read(NOTEBOOKS / f"{paper}.ipynb", as_version=4)
        sections = by_section(notebook)
        setup = sections.pop("set-up")
        print(f"{paper}:")
        for section, cells in sections.items():
            spent = seconds(notebook, setup + cells)
            before, own = sum(spent[: len(setup)]), sum(spent[len(setup) :])
            print(f"  {own:5.1f} s after {before:4.1f} s of set-up: {section}", flush=True)


if __name__ == "__main__":
    main()
