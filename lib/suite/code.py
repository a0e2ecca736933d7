"""Which code a number depends on: the modules that computed it, with all that they import, read from their import statements."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import linecache
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

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
        "claims_compare",
        "claims_slicegpt",
        "claims_svd_llm",
        "code",
        "destinations",
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
        "tables",
        "versions",
    )  # fmt: skip
)

# What makes the files of a model: a measurement names the hash of its weights and of its evaluated tokens instead.
FETCHING = frozenset({"lib.models.gguf_import", "lib.models.packaged"})
REFUSING = frozenset({"lib.primitives.refused"})  # reasons in words
ASIDE = SHOWING | FETCHING | REFUSING


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

    What a module says changes no number, so its comments, docstrings and messages of errors do not count, and pages of text
    (.md) neither.
    """
    digest = hashlib.sha256()
    if modules is None:
        every = (path for path in (ROOT / "lib").rglob("*") if path.is_file() and path.suffix != ".md")
        parts = {path: path.read_bytes() for path in sorted(every) if "__pycache__" not in path.parts}
    else:
        parts = {path: _computed(path.read_text(encoding="utf-8")) for path in map(_file, closure(modules))}
    for path, part in parts.items():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + part)
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def _computed(source: str) -> bytes:
    """What a text of Python computes: the program without what it only says."""
    return ast.unparse(_Silenced().visit(ast.parse(source))).encode()


class _Silenced(ast.NodeTransformer):
    """Takes out docstrings, what errors say, and imports of what changes no number. When an error is raised still counts."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module in ASIDE else node


class _Unshown(_Silenced):
    """Takes out of a cell, besides, what it only shows."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        called = getattr(node.value, "func", None)
        return None if getattr(called, "id", None) in ("display", "fold", "print") else super().visit_Expr(node)


def notebook_code(*things: object) -> str | None:
    """Hash of functions that a notebook defines, with all of its functions that they name; None where there are none.

    What the library's functions do is in `code_version`, and what data they work on in a cell's settings. The compiled code
    counts, so comments, and cells that define nothing of it, change nothing. A lambda that stands in a cell by itself, outside
    any function, counts with all of its cell that makes what it works on: not with comments, nor with what the cell shows.
    """
    found: dict[str, str] = {}
    for thing in things:
        _collect(thing, found)
    if not found:
        return None
    text = "\n".join(f"{name} {said}" for name, said in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(thing: object, found: dict[str, str]) -> None:
    """Add the functions of a notebook that a thing is, holds or names to {name and hash: what it does}."""
    if isinstance(thing, functools.partial):
        inside = (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, dict):
        inside = thing.values()
    elif isinstance(thing, (list, tuple)):
        inside = thing
    else:
        function = inspect.unwrap(thing) if callable(thing) else None
        if not isinstance(function, FunctionType) or function.__module__ != "__main__":
            return
        name = f"{function.__qualname__} {hashlib.sha256(_said(function.__code__).encode()).hexdigest()}"
        if name in found:
            return
        found[name], inside = _said(function.__code__), _named(function)
        if function.__qualname__ == "<lambda>":
            cell = ast.parse("".join(linecache.getlines(function.__code__.co_filename)))
            found[name] += ast.unparse(_Unshown().visit(cell))
    for other in inside:
        _collect(other, found)


def _named(function: FunctionType) -> Iterator[object]:
    """What the variables that a function reads hold now: globals of its notebook, and those of functions around it."""
    for code in _codes(function.__code__):
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable without a value yet
            continue
    yield from function.__defaults__ or ()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A compiled function and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _said(code: CodeType) -> str:
    """What a compiled function does, without where it stands."""
    constants = [_said(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants))
