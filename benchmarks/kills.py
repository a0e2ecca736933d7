"""Kill `invoke reproduce` at random moments, start it again each time, and compare with an undisturbed run.

    python -m benchmarks.kills [--kills 50] [--against results] [--profile workshop] [--paper slicegpt] [--jobs 2] ...

Both runs work in copies of the project, so the results of this folder are not touched. `--against` names results that the same
code has made already, and replaces the undisturbed run. Half of the kills end the whole process group, the other half only the
task, whose kernel lives on for about a second and may still write. In the end all tables must be equal, measured times and
memory aside, and no unfinished folder may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
MEASURED = re.compile(
    "seconds|tokens_per_s|speed|scoring_ms|share_of_ideal|peak_mb|^saved"
)  # columns that a clock or the system fills
CLOCKED = "latency_breakdown.csv"  # a table of nothing else, one column for each part of the work


def copy_of_project(place: Path) -> Path:
    """The code without results or history, importable before the installed one."""
    place.mkdir()
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tasks.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, place / name)
    return place


def start(project: Path, words: list[str]) -> subprocess.Popen:
    log = (project / "log.txt").open("a")
    environment = os.environ | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "invoke", "reproduce", *words]
    return subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(project: Path, words: list[str]) -> None:
    if status := start(project, words).wait():
        sys.exit(f"invoke reproduce ended with {status}; the end of its output:\n{(project / 'log.txt').read_text()[-2000:]}")


def kill_at_random(project: Path, words: list[str], kills: int, longest: float, chance: random.Random) -> int:
    """Kills as many runs as wanted, each after 0 to `longest` seconds; returns how many were still running then."""
    hit = 0
    for i in range(kills):
        process, group = start(project, words), i % 2 == 0
        try:
            if status := process.wait(chance.uniform(0, longest)):
                sys.exit(f"kill {i}: the run had failed by itself with {status}\n{(project / 'log.txt').read_text()[-2000:]}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
            process.wait()
            hit += 1
        records = sum(path.read_text().count("\n") for path in (project / "results").rglob("*.ledger.jsonl"))
        print(f"kill {i + 1}, {'task and kernel' if group else 'task alone'}: {records} records in the ledgers", flush=True)
    return hit


def differences(one: Path, two: Path) -> list[str]:
    """What differs between results in folder `two` and those of the same papers in `one`, measured columns aside."""
    runs = [path.parent.relative_to(two) for path in two.glob("*/*/manifest.json")]
    tables = [
        {(run / "tables" / p.name).as_posix() for run in runs for p in (place / run).glob("tables/*.csv")} for place in (one, two)
    ]
    found = [f"only in one of them: {name}" for name in tables[0] ^ tables[1]]
    for name in sorted(tables[0] & tables[1]):
        if name.endswith(CLOCKED):
            continue
        frames = [pd.read_csv(place / name, dtype=str) for place in (one, two)]  # digit for digit
        for column in frames[0].columns if list(frames[0]) == list(frames[1]) else ["other columns"]:
            if MEASURED.search(column):
                continue
            if column not in frames[0] or not frames[0][column].equals(frames[1][column]):
                found.append(f"{name}: {column}")
    left = [p.name for p in two.rglob("*") if p.name.endswith((".partial", ".retired"))]
    return found + [f"left over: {name}" for name in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds until a kill, at most: long enough to get on a little"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", type=Path, help="results of an undisturbed run of this code, instead of making one")
    found, words = parser.parse_known_args()  # the rest is for `invoke reproduce`
    if found.against and not found.against.is_dir():
        parser.error(f"no folder {found.against}: --against takes one that holds results by profile, such as results")
    with tempfile.TemporaryDirectory() as place:
        killed, whole = copy_of_project(Path(place) / "killed"), found.against
        if whole is None:
            calm = copy_of_project(Path(place) / "calm")
            begun = time.time()
            finish(calm, words)
            print(f"undisturbed: {time.time() - begun:.0f} s", flush=True)
            whole = calm / "results"
        hit = kill_at_random(killed, words, found.kills, found.longest, random.Random(found.seed))
        finish(killed, words)
        wrong = differences(whole, killed / "results")
        tables = len(list((killed / "results").rglob("tables/*.csv")))
        print(f"{hit} of {found.kills} runs were killed while at work; {tables} tables compared: {wrong or 'all equal'}")
        sys.exit(bool(wrong) or not tables)


if __name__ == "__main__":
    main()
