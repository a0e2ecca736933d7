"""Run a paper's notebook into `results/`: resumable, one run at a time, and results are replaced only by complete ones."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import posixpath
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock

from lib.suite.results import RAW, Ledger, ledger_lines, write_atomically

PLACE = re.compile(r"(?:/[^\s/:]+)*/(?=(?:lib|ipykernel_\d+|site-packages)/)")  # the folder of a warning's file on this machine

LONGEST = 250  # characters of what can be a path, and not a prompt
PROGRESS = re.compile(r" at \d+%: perplexity [\d.,]+$| s since the start")  # lines for whoever waits for a run

NAMING = ("model", "what", "on", "method", "level", "ratio", "size")  # settings that tell a reader which cell it is

LINK = re.compile(r"\]\(([^):#\s][^):\s]*)\)")  # in Markdown, to a file


class RunError(Exception):
    """A run that ended without results; the message gives the reason and what is kept."""


@dataclass(frozen=True)
class Run:
    """A notebook with its parameters, and where its results go: `<results>/<profile>/<paper>`, the ledger beside it.

    reuse: start from the measurements of the results that are there, as far as the code that made them is unchanged.
    """

    notebook: Path
    parameters: dict
    results: Path
    profile: str
    reuse: bool = False

    @property
    def paper(self) -> str:
        return self.notebook.stem

    @property
    def target(self) -> Path:
        return self.results / self.profile / self.paper

    @property
    def ledger_file(self) -> Path:
        return self.target.with_name(f"{self.paper}.ledger.jsonl")

    def __str__(self) -> str:
        return f"{self.paper} ({self.profile})"


# Executes a run into a folder; finished cells go to the ledger, which the engine may read, and writes if the kernel does not.
Engine = Callable[[Run, Path, Ledger], None]


def reproduce(run: Run, force: bool = False, engine: Engine | None = None) -> None:
    """Bring `run.target` up to date: nothing to do if the ledger says that this very run is complete, else run and swap.

    engine: `here` unless a cluster does it. Raises RunError if the notebook fails, if another process is at work on the same
    results, or if they cannot be written; earlier results stay whole in every case.
    """
    try:
        run.target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(run.target.with_name(f".{run.paper}.lock"), timeout=0):
            _reproduce(run, force, engine or here)
    except filelock.Timeout as error:
        raise RunError(f"{run}: another run is at work on {run.target}; wait until it ends, or stop it") from error
    except OSError as error:
        raise RunError(f"{run}: {run.target} could not be written ({error}); earlier results are as they were") from error


def reproduce_all(runs: Sequence[Run], force: bool = False, jobs: int = 1) -> None:
    """`reproduce` for all runs, `jobs` of them side by side: each in a process of its own, on one thread.

    One after another, the first RunError ends them. Side by side, a run that fails prints its error and does not stop the others;
    RunError when all have ended, if any failed.
    """
    jobs = min(jobs, len(runs))
    if jobs <= 1:
        for run in runs:
            reproduce(run, force)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_one_of_several) as pool:
        raise_failures(pool.map(functools.partial(attempt, force=force), runs))


def _one_of_several() -> None:
    """Kernels of this process take one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the one that started it ends, even if killed: a pool's process would otherwise wait for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def attempt(run: Run, force: bool = False, engine: Engine | None = None) -> RunError | None:
    """`reproduce`, with the error printed and returned."""
    try:
        reproduce(run, force, engine)
    except RunError as error:
        print(error, flush=True)
        return error


def raise_failures(outcomes: Iterable[RunError | None]) -> None:
    """Wait for all outcomes of `attempt`; RunError that says how many failed, with the first of them."""
    outcomes = list(outcomes)
    if failed := [error for error in outcomes if error]:
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed: {failed[0]}") from failed[0]


def _reproduce(run: Run, force: bool, engine: Engine) -> None:
    import nbformat  # late: it takes a second, and a command that only catches RunError does without

    cells = nbformat.read(run.notebook, as_version=4).cells
    if run.reuse and not force and not run.ledger_file.is_file() and (run.target / RAW).is_file():
        write_atomically(run.ledger_file, ledger_lines(run.target / RAW))
    if force:
        run.ledger_file.unlink(missing_ok=True)
    complete = {"run": run.paper, "parameters": run.parameters, "files": local_state(run.parameters, run.notebook.parent)}
    # The engine is part of the key: results from a cluster are computed again here, because timings depend on where they ran.
    complete |= {"text": [cell.source for cell in cells], "engine": getattr(engine, "func", engine).__name__}
    ledger = Ledger(run.ledger_file)
    if complete in ledger and (run.target / "manifest.json").is_file():
        print(f"{run}: up to date in {run.target}, nothing to do; --force computes it again", flush=True)
        return
    # Work in a folder of its own and swap at the end: earlier results stay until the new ones are complete.
    partial = run.target.with_name(f"{run.paper}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"{run}: running, progress below; a second start continues where a killed one stopped", flush=True)
    start = time.time()
    engine(run, partial, ledger)
    replace_folder(partial, run.target)
    Ledger(run.ledger_file).append(complete, "complete", time.time() - start)
    print(f"{run}: done in {time.time() - start:.0f} s, see {run.target}", flush=True)


def here(run: Run, partial: Path, ledger: Ledger) -> None:
    """The engine of one machine: the notebook's kernel reads and writes the ledger itself."""
    try:
        execute(run.notebook, run.parameters, run.profile, partial)
    except RunError as error:
        raise RunError(f"{error}\nThe notebook up to there is {partial / run.notebook.name}") from error


@dataclass(frozen=True)
class Labelled:
    """Output of a notebook whose lines start with a label, because several notebooks may print at once."""

    label: str
    out: object

    def write(self, text: str) -> None:
        self.out.write("".join(f"{self.label}: {line}" for line in text.splitlines(keepends=True)))

    def flush(self) -> None:
        self.out.flush()


def execute(notebook: Path, parameters: dict, profile: str, folder: Path, place: Path | None = None) -> None:
    """Execute a notebook into `folder` with papermill. Raises RunError with the failing cell; the notebook up to it is there.

    place: the folder that relative paths in its parameters start from; None for the notebook's own.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    output = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook), str(output), parameters | {"folder": str(folder), "profile": profile},
            log_output=True, stdout_file=Labelled(notebook.stem, sys.stdout), stderr_file=sys.stderr, progress_bar=False,
            cwd=str(place or notebook.parent),
        )  # fmt: skip
    except DeadKernelError as error:
        raise RunError(
            f"{notebook.stem} ({profile}): its kernel died, most often because memory ran out. Finished cells are kept for the "
            "next start; use a smaller model, fewer samples or a machine with more memory"
        ) from error
    except papermill.PapermillExecutionError as error:
        raise RunError(
            f"{notebook.stem} ({profile}) failed in cell {error.exec_count}: {error.ename}: {error.evalue}. "
            "Finished cells are kept for the next start"
        ) from error
    tidy(output)
    relink(output)


def relink(path: Path) -> None:
    """Make the links of an executed notebook, which are relative to `notebooks/`, relative to `results/<profile>/<paper>/`."""
    import nbformat  # late: it takes a second, and a command that only catches RunError does without

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda found: f"]({posixpath.normpath('../../../notebooks/' + found[1])})", cell.source)
    nbformat.write(notebook, path)


def with_parameters(notebook: Path, parameters: dict, folder: Path) -> Path:
    """A copy of a stored notebook in `folder`, with parameters in a cell below its own, and with its outputs, for nbval."""
    import nbformat

    copy = nbformat.read(notebook, as_version=4)
    place = next(i for i, cell in enumerate(copy.cells) if "parameters" in cell.metadata.get("tags", []))
    chosen = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    copy.cells.insert(place + 1, nbformat.v4.new_code_cell(chosen))
    nbformat.write(copy, folder / notebook.name)
    return folder / notebook.name


def tidy(path: Path) -> None:
    """Remove from an executed notebook where and when it ran, and its lines of progress."""
    import nbformat  # late: it takes a second, and a command that only catches RunError does without

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = PLACE.sub("", output.text).splitlines(keepends=True)
                output.text = "".join(line for line in lines if not PROGRESS.search(line))
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines()
            cell.source = "\n".join(line for line in lines if not line.startswith("folder = "))
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def local_state(parameters: dict, place: Path) -> str:
    """A hash of name, size and time of every local file that a run would read: models and texts by path, the data directory.

    place: where the run works, which relative paths start from.
    A hash, because ledgers are committed, and where files lie is a fact about one machine.
    """
    named = [os.environ.get("PARED_DATA_DIR", "")]
    for value in parameters.values():
        named += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    files = []
    for path in (place / Path(name).expanduser() for name in named if name and len(name) < LONGEST):
        files += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    found = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def slowest(runs: Iterable[Run], since: float, count: int = 10) -> str:
    """A table of the cells that took longest, of the runs whose results were written since then; empty where none was.

    A cell that an earlier start has measured counts with the seconds that it took then.
    """
    import pandas as pd  # late: it takes a second, and a command that only catches RunError does without

    cells = []
    for run in runs:
        raw = run.target / RAW
        if raw.is_file() and raw.stat().st_mtime >= since:
            found = pd.read_parquet(raw, columns=["settings", "seconds"]).itertuples(index=False)
            cells += [(seconds, f"{run.paper}: {cell_name(json.loads(settings))}") for settings, seconds in found]
    if not cells:
        return ""
    lines = [f"{seconds:9.1f}  {name}" for seconds, name in sorted(cells, reverse=True)[:count]]
    return "\n".join([f"  seconds  slowest of {len(cells)} cells, as they were measured", *lines])


def cell_name(settings: dict) -> str:
    """What a reader calls a cell: its model, method and share, or whatever plain settings it has."""
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float) and name != "made_by"}
    told = [name for name in NAMING if name in plain]
    if not told:
        return ", ".join(f"{name} {value}" for name, value in plain.items())
    return ", ".join(f"{plain[name]:.0%}" if isinstance(plain[name], float) else str(plain[name]) for name in told)


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`."""
    retired = old.with_name(f"{old.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)
