"""The house keeps its shape: imports run only downwards, nothing goes in circles, functions stay short."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LIB = Path(__file__).parent.parent / "lib"
# From the ground up: a module imports from its own floor and those before it. "" is the root of lib.
FLOORS = ("primitives", "evaluation", "papers", "baselines", "models", "", "suite")
FILES = sorted(path for path in LIB.rglob("*.py") if path.name != "__init__.py")
# Imported in a function because it imports lm-eval, in seconds.
HEAVY = {(f"evaluation.{name}", "evaluation.shared_context") for name in ("zero_shot", "spoken")}
LONGEST, MOST = 60, 9  # lines of a function; its parameters


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(LIB).with_suffix("").parts)


MODULES = {name_of(path) for path in FILES}


def imported(path: Path) -> list[tuple[str, bool]]:
    """(module of lib, whether the import stands inside a function) for every import in a file."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            package = node.module.removeprefix("lib").lstrip(".")
            for alias in node.names:
                inside = f"{package}.{alias.name}".lstrip(".")
                found.append((inside if inside in MODULES else package, node not in top))
        elif isinstance(node, ast.Import):
            found += [(alias.name.removeprefix("lib."), node not in top) for alias in node.names if alias.name.startswith("lib.")]
    return found


def floor(module: str) -> int:
    return FLOORS.index(module.rpartition(".")[0])


def edges() -> set[tuple[str, str]]:
    return {(name_of(path), module) for path in FILES for module, _ in imported(path)}


def test_every_import_is_of_a_module_that_is_there():
    assert len(edges()) > 150
    assert {module for _, module in edges()} <= MODULES
    assert {path.parent.name for path in FILES} == {"lib", *FLOORS[:-2], "suite"}


def test_imports_run_only_downwards():
    assert [(low, high) for low, high in edges() if floor(high) > floor(low)] == []


def test_nothing_goes_in_circles():
    graph = {name: set() for name in MODULES}
    for importer, module in edges():
        graph[importer].add(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_no_import_hides_in_a_function():
    """Where one does, it is because of what it takes to import, not because of a circle."""
    assert {(name_of(path), module) for path in FILES for module, hidden in imported(path) if hidden} == HEAVY


def test_papers_and_rivals_stand_alone():
    papers = [{"slicegpt", "sliced_network"}, {"svd_llm", "latent_cache"}, {"afr", "mixtures"}, {"comp", "mask_tuning"}]
    for importer, module in edges():
        if floor(importer) == floor(module) == FLOORS.index("papers"):
            assert any({importer.split(".")[1], module.split(".")[1]} <= paper for paper in papers), (importer, module)
        assert not floor(importer) == floor(module) == FLOORS.index("baselines"), (importer, module)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path)) for path in FILES])
def test_functions_are_short_and_take_few_arguments(path):
    for function in functions(path):
        given = function.args
        parameters = [a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
        assert function.end_lineno - function.lineno < LONGEST, function.name
        assert len(parameters) <= MOST, function.name


def test_the_checks_would_notice(tmp_path):
    """The same reading of imports, on a file that does all that is forbidden."""
    file = tmp_path / "file.py"
    file.write_text("from lib.suite import runs\nfrom lib.suite.results import Results\n\ndef f():\n    import lib.compress\n")
    assert imported(file) == [("suite.runs", False), ("suite.results", False), ("compress", True)]
    assert floor("suite.runs") > floor("compress") > floor("models.load") > floor("primitives.linalg")
