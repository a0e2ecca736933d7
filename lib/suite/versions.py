"""The version bounds in pyproject.toml, tested: tests that meet other libraries, run in a fresh environment at either end."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from lib.suite.runs import RunError

BOUNDS = ("oldest", "newest")
FLOOR = re.compile(r"([\w.-]+).*?>=\s*([\w.]+)")  # the name of a requirement, and its lower bound
# Files in tests/ that meet other libraries: transformers in every family and file format, peft, lm-eval, pandas and so on.
FILES = (
    "models", "folder", "checkpoint", "disk", "output", "structured", "finetune", "gguf", "gguf_families", "gguf_import",
    "destinations", "evaluate", "paired", "shared_context", "benchmark_tasks", "latent_cache", "text", "compress", "results",
    "plots", "cluster", "site", "slides", "tasks",
)  # fmt: skip


def floors(root: Path) -> dict[str, str]:
    """Lower bound of every dependency in pyproject.toml, those of the extras included, by its name."""
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*declared["dependencies"], *itertools.chain(*declared["optional-dependencies"].values())]
    return dict(found.groups() for text in requirements if (found := FLOOR.match(text)))


def constraints(root: Path, bound: str) -> str:
    """What pip is told: for `oldest`, exactly the lower bounds; for `newest` nothing, so that it chooses within the bounds."""
    return "".join(f"{name}=={floor}\n" for name, floor in floors(root).items()) if bound == "oldest" else ""


def check_bound(root: Path, bound: str) -> None:
    """Install the project with its extra `dev` at one end of the bounds, in a temporary environment, and run FILES there.

    Raises RunError where the versions do not install together or a test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder))
        given = Path(folder) / "constraints.txt"
        given.write_text(constraints(root, bound), encoding="utf-8")
        print(f"{bound}: installing into a fresh environment", flush=True)
        if run(python, root, "pip", "install", "--quiet", "--constraint", str(given), "--editable", ".[dev]"):
            raise RunError(f"{bound}: these versions do not install together")
        print(f"{bound}: {installed(python, floors(root))}", flush=True)
        files = [f"tests/test_{name}.py" for name in FILES]
        shared = ("-n", str(os.cpu_count()), "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider")
        if run(python, root, "pytest", *shared, *files):
            raise RunError(f"{bound}: tests fail with these versions")
        print(f"{bound}: all tests passed", flush=True)


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment in a folder."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(python: Path, root: Path, *words: str) -> int:
    """Exit status of a module that an environment's Python runs in the project, on one thread and with its own packages alone."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), "-m", *words], cwd=root, env=own, check=False).returncode


def installed(python: Path, names: Iterable[str]) -> str:
    """The versions of some packages in an environment, as name==version; those that are not installed are left out."""
    script = (
        "import importlib.metadata as m, sys\nfor name in sys.argv[1:]:\n"
        "    if any(m.distributions(name=name)): print(f'{name}=={m.version(name)}')"
    )
    words = [str(python), "-I", "-c", script, *names]
    return " ".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
