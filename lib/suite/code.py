"""Which code a number depends on: the modules that computed it, with all that they import, read from their import statements."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURING = ("lib.suite.experiment",)  # what measures every model
# What shows numbers and computes none: an edit there makes no measurement stale.
SHOWING = frozenset(
    f"lib.suite.{name}"
    for name in (
        "claim",
        "claims",
        "claims_afr",
        "claims_comp",
        "claims_slicegpt",
        "claims_svd_llm",
        "code",
        "diagrams",
        "exercises",
        "explorer",
        "front",
        "markup",
        "pages",
        "plots",
        "published",
        "results",
        "runs",
        "site",
        "slides",
        "standing",
        "versions",
    )  # fmt: skip
)

# What makes the files of a model: a measurement names the hash of its weights and of its evaluated tokens instead.
FETCHING = frozenset({"lib.models.gguf_import", "lib.models.packaged"})
ASIDE = SHOWING | FETCHING


def closure(modules: Iterable[str]) -> list[str]:
    """The given modules of `lib` and all that they import, directly or not, without those that change no number, sorted."""
    found, waiting = set(), [name for name in modules if name not in ASIDE]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in _imports(_file(name).read_text(encoding="utf-8")) if other not in ASIDE]
    return sorted(found)


def notebook_modules(path: Path) -> tuple[str, ...]:
    """The modules of `lib` that a notebook imports, sorted; those that change no number left out."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return tuple(sorted(_imports(source) - ASIDE))


def modules_of(things: Iterable[object]) -> tuple[str, ...]:
    """The names of modules, and of the modules in which functions or classes were written, sorted."""
    return tuple(sorted({getattr(thing, "__module__", None) or thing.__name__ for thing in things}))


def _file(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


@functools.lru_cache(maxsize=1024)  # reading a module takes longer than all else here, and many closures hold the same ones
def _imports(source: str) -> frozenset[str]:
    """The modules of `lib` that a text of Python names in its import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lib.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if _file(name).is_file()}
            found |= modules | ({node.module} if modules != inside else set())
    return frozenset(name for name in found if _file(name).is_file())


@functools.cache
def code_version(modules: tuple[str, ...] | None = None) -> str:
    """Hash of the code of the `closure` of these modules; None: of every file of `lib`, embedded models included.

    Pages of text (.md) are left out: what they say changes no number.
    """
    digest = hashlib.sha256()
    if modules is None:
        every = (path for path in (ROOT / "lib").rglob("*") if path.is_file() and path.suffix != ".md")
        files = sorted(path for path in every if "__pycache__" not in path.parts)
    else:
        files = [_file(name) for name in closure(modules)]
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
