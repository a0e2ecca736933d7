"""How long each section of the notebooks takes with their own parameters, the cells above it having run.

    python -m benchmarks.sections [PAPER ...]

One notebook after another, in a kernel of its own with the machine's threads. Nothing is written but to a temporary folder.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import papermill
import torch

from tasks import NOTEBOOKS, papers

HEADING = re.compile(r"^## (\d+ · .+)$", re.MULTILINE)


def seconds(paper: str, folder: Path) -> dict[str, float]:
    """Wall-clock seconds by section; what precedes the first is the set-up."""
    path = NOTEBOOKS / f"{paper}.ipynb"
    done = papermill.execute_notebook(
        str(path), str(folder / path.name), {"folder": str(folder)}, progress_bar=False, cwd=str(NOTEBOOKS)
    )
    found, section = {}, "set-up"
    for cell in done.cells:
        if cell.cell_type == "markdown":
            section = next(iter(HEADING.findall(cell.source)), section)
        else:
            found[section] = found.get(section, 0.0) + cell.metadata.papermill.duration
    return found


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    for paper in sys.argv[1:] or papers():
        with tempfile.TemporaryDirectory() as folder:
            found = seconds(paper, Path(folder))
        print(f"{paper}: {sum(found.values()):.0f} s")
        for section, spent in found.items():
            print(f"  {spent:5.1f} s  {section}", flush=True)


if __name__ == "__main__":
    main()
