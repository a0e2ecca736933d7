"""Where numbers go: a ledger that lets a run resume, tables, figures, and the manifest that says how they were made.

A notebook opens one `Results`, asks it for cells (computed once, remembered in the ledger), writes tables and figures
through it and closes it. Every file is written whole or not at all.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from lib.evaluation.console import Progress
from lib.evaluation.process import package_versions
from lib.suite.code import MEASURING, ROOT, code_version, modules_of, notebook_code, notebook_modules

RESULTS = ROOT / "results"
RAW = "raw.parquet"


def content_key(settings: dict, modules: Iterable[str] | None = None) -> str:
    """Hash of settings, package versions and the code that computes: equal keys mean an equal computation.

    modules: those that compute, with all that they import (`lib.suite.code`); None: all of `lib`.
    """
    code = code_version(None if modules is None else tuple(modules))
    text = json.dumps({"settings": settings, "code": code, "packages": package_versions()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk, half a file would only fill it further
        raise


class Ledger:
    """Append-only record of finished computations, one JSON line each, found again by content key.

    Without a path it lives in memory only and forgets with the process.
    """

    def __init__(self, path: Path | None):
        self.path = path and Path(path)
        self.records: dict[str, dict] = {}
        if not self.path or not self.path.is_file():
            return
        text = self.path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                warnings.warn(
                    f"{self.path.name}, line {number} is damaged (a run was killed while writing it): it will be computed again",
                    stacklevel=2,
                )
        if text and not text.endswith("\n"):  # close the damaged line, or the next record would be glued to it
            with self.path.open("a") as file:
                file.write("\n")

    def append(self, settings: dict, result: object, seconds: float, modules: Iterable[str] | None = None) -> None:
        record = {"key": content_key(settings, modules), "settings": settings, "modules": modules and list(modules)}
        record |= {"result": result, "seconds": round(seconds, 3), "commit": _commit()}
        line = json.dumps(record) + "\n"
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.records[record["key"]] = json.loads(line)

    def __contains__(self, settings: dict) -> bool:
        return content_key(settings) in self.records

    def cell(self, settings: dict, compute: Callable[[], object], modules: Iterable[str] | None = None) -> object:
        """The result of `compute` under `settings`: from the ledger if it is there, computed and recorded if not."""
        key = content_key(settings, modules)
        if key not in self.records:
            start = time.time()
            self.append(settings, compute(), time.time() - start, modules)
        return self.records[key]["result"]


def made_by(settings: dict, *functions: Callable | None) -> dict:
    """The settings of a cell, with a hash of the notebook's functions that compute it, if there are any."""
    code = notebook_code(*functions)
    return settings if code is None else settings | {"made_by": code}


class Results:
    """The folder of one notebook run: `tables/`, `figures/`, `manifest.json`, and a ledger beside it.

    folder: where to write; empty for `results/interactive/<paper>`, which is not under version control. Papermill passes
    the folder in, so the same notebook serves reading, `invoke reproduce` and the tests.
    """

    def __init__(self, paper: str, folder: str | Path = "", profile: str = "interactive"):
        self.paper, self.profile = paper, profile
        self.folder = Path(folder) if folder else RESULTS / "interactive" / paper
        # The ledger lives outside the folder, which `invoke reproduce` replaces as a whole when a run is complete. Someone
        # who edits a cell and runs it again wants a new number: interactive runs remember nothing.
        name = self.folder.name.removesuffix(".partial")
        self.ledger = Ledger(self.folder.with_name(f"{name}.ledger.jsonl") if folder else None)
        self.files: list[str] = []
        self.started = time.time()
        self.asked: dict[str, bool] = {}  # key of each cell -> whether an earlier start has measured it
        self.progress = Progress()
        self.notebook = ROOT / "notebooks" / f"{paper}.ipynb"
        self.modules = notebook_modules(self.notebook) if self.notebook.is_file() else None

    def cell(self, compute: Callable[[], object], by: Iterable = (), **settings) -> object:
        """One expensive result (JSON values), computed once per settings, code and package versions.

        by: modules, or functions of them, that compute it beside those that measure every model; without them, all that the
        notebook imports. The notebook's own functions that `compute` calls count as well. A change of other modules, or of
        another cell of the notebook, leaves the result valid.
        """
        settings = made_by(settings, compute)
        key, modules = self._key(by, settings)
        self.asked.setdefault(key, key in self.ledger.records)
        return self.ledger.cell(settings, compute, modules)

    def remembered(self, by: Iterable = (), **settings) -> object:
        """The result of a cell that the ledger has. Raises KeyError for one that it lacks."""
        key, _ = self._key(by, settings)
        self.asked.setdefault(key, key in self.ledger.records)
        return self.ledger.records[key]["result"]

    def missing(self, by: Iterable = (), **settings) -> bool:
        """Whether a cell still has to be computed: lets a sweep skip the preparation that only that cell needs."""
        return self._key(by, settings)[0] not in self.ledger.records

    def _key(self, by: Iterable, settings: dict) -> tuple[str, tuple[str, ...] | None]:
        modules = (*MEASURING, *modules_of(by)) if by else self.modules
        return content_key(settings, modules), modules

    def table(self, name: str, rows: list[dict], note: str = "") -> pd.DataFrame:
        """Write `tables/<name>.csv` at full precision and `.md` rounded, with `note` below it; returns the table."""
        frame = pd.DataFrame(rows)
        self._write(f"tables/{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        self._write(f"tables/{name}.md", markdown(frame) + (f"\n{note}\n" if note else ""))
        return frame

    def figure(self, name: str, figure) -> None:
        """Write `figures/<name>.svg` and `.png`, the same bytes for the same numbers."""
        import io

        import matplotlib

        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "pared-down", "svg.fonttype": "none"}):
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                figure.savefig(buffer, format=kind, metadata=metadata, dpi=150, bbox_inches="tight")
            self._write(f"figures/{name}.{kind}", buffer.getvalue())

    def finish(self, values: dict) -> dict:
        """Write `raw.parquet`, every measurement of this run, and `manifest.json`, which says how the files were made.

        That is: parameters, code, packages, machine, and the SHA-256 of every file. values: the variables of the
        notebook, of which its parameters are recorded; all of them for a run without a notebook in `notebooks`.
        """
        torch = sys.modules.get("torch")  # a run that has not imported it computed nothing with it, and it takes seconds
        names = parameter_names(self.notebook) if self.notebook.is_file() else list(values)
        parameters = {name: values[name] for name in names}

        measured = [self.ledger.records[key] for key in self.asked]
        self._write(RAW, raw_frame(measured).to_parquet(index=False, compression="zstd"))
        manifest = {
            "paper": self.paper,
            "profile": self.profile,
            "parameters": parameters,
            "code_version": code_version(),
            "commit": _commit(),
            "packages": package_versions(),
            "machine": {
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads() if torch else None,
                "accelerator": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
            },
            "seconds": round(time.time() - self.started, 1),
            "cells_computed": len(self.asked) - sum(self.asked.values()),
            "cells_from_ledger": sum(self.asked.values()),
            "seconds_from_ledger": round(sum(self.ledger.records[key]["seconds"] for key, old in self.asked.items() if old), 1),
            "files": {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in sorted(self.files)},
        }
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        return manifest

    def _write(self, name: str, data: str | bytes) -> None:
        write_atomically(self.folder / name, data)
        self.files.append(name)


def parameter_names(notebook: Path) -> list[str]:
    """The names that the parameters cell of a notebook assigns, without those of a run: `profile` and `folder`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))
    names = [target.id for line in ast.parse(source).body if isinstance(line, ast.Assign) for target in line.targets]
    return [name for name in names if name not in ("profile", "folder")]


def rounded(value: object) -> str:
    """One value as a table shows it: four significant digits, counts with thousands separators, nothing for a missing one."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, its values `rounded`."""

    def show(value: object) -> str:
        return rounded(value).replace("|", "\\|")

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(show(v) for v in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def raw_frame(records: Iterable[dict]) -> pd.DataFrame:
    """Records of a ledger as a table, a row for each, in which settings and result are JSON texts."""
    return pd.DataFrame(
        {name: value if name in ("key", "seconds", "commit") else json.dumps(value) for name, value in record.items()}
        for record in records
    )


def ledger_lines(raw: Path) -> str:
    """The lines of the ledger from which `Results` wrote the file `raw`. Raises ValueError for a file of another kind."""
    try:
        rows = pd.read_parquet(raw).to_dict("records")
        whole = [row | {name: json.loads(row[name]) for name in ("settings", "modules", "result")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{raw} holds no measurements ({error}): remove it, or start without them") from error
    return "".join(json.dumps(record) + "\n" for record in whole)


@functools.cache
def _commit() -> str | None:
    """Short id of the checked-out commit, marked where `lib` or notebooks differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", "lib", "notebooks")
        return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
