"""Whether a machine is ready for the workshop: Python, packages, Jupyter and folders. What it lacks is named with the remedy.

Only the standard library and `packaging` are imported here, so that this works where an installation is not complete.
`lib.suite.ready_models` tries the models.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

INSTALL = "pip install -e ."


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is as it should be, what was found, and what to do where it is not."""

    name: str
    ready: bool
    found: str
    remedy: str = ""
    optional: bool = False

    @property
    def line(self) -> str:
        state = "ready" if self.ready else "optional" if self.optional else "NOT READY"
        return f"{state:9}  {self.name}: {self.found}" + ("" if self.ready else f". Do: {self.remedy}")


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def machine(root: Path) -> list[Check]:
    """All checks that need no model. root: the folder of this project."""
    extra = [Requirement(text) for text in project(root)["optional-dependencies"]["device"]]
    return [python(root), packages(root), jupyter(), writable(root / "results"), llama_cpp(extra)]


def python(root: Path, version: str = platform.python_version()) -> Check:
    wanted = project(root)["requires-python"]
    return Check(
        "Python", version in SpecifierSet(wanted), version, f"install Python {wanted} and make a new environment with it"
    )


def packages(root: Path) -> Check:
    """Every package that the project needs, in the range that it names."""
    needed = [Requirement(text) for text in project(root)["dependencies"]]
    wrong = [text for text in map(unfit, needed) if text]
    found = "; ".join(wrong) or f"all {len(needed)} in the ranges of pyproject.toml"
    return Check("packages", not wrong, found, f"{INSTALL}, in the folder of this project")


def unfit(needed: Requirement) -> str:
    """What is wrong with a package; nothing if it is installed in a version that will do."""
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is missing"
    fits = needed.specifier.contains(version, prereleases=True)
    return "" if fits else f"{needed.name} is {version}, not {needed.specifier}"


def jupyter() -> Check:
    """JupyterLab, and a kernel that runs Python for it."""
    wrong = [text for text in map(unfit, map(Requirement, ("jupyterlab", "ipykernel"))) if text]
    return Check("Jupyter", not wrong, "; ".join(wrong) or f"jupyterlab {importlib.metadata.version('jupyterlab')}", INSTALL)


def writable(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("results", True, f"{folder.name}/ can be written")
    except OSError as error:
        remedy = f"make {folder} a folder of your own, with space on its disk"
        return Check("results", False, f"{folder.name}/ cannot be written ({error.strerror})", remedy)


def llama_cpp(needed: list[Requirement]) -> Check:
    wrong = [text for text in map(unfit, needed) if text]
    said = "; ".join(wrong) or "xllamacpp is there"
    return Check("llama.cpp, for exported files", not wrong, said, "pip install -e '.[device]'", optional=True)
