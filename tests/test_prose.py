"""What the Markdown of the notebooks says must hold in every run: it quotes no measurement of ours."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from lib.suite import published
from lib.suite.results import ROOT

NOTEBOOKS = ROOT / "notebooks"

# What is no statement about a measurement: code, formulas, links, tags, names of models and papers, places in papers and pages.
PLACES = "[Tt]ables?|[Ff]igures?|[Ss]ections?|[Ee]quations?|[Tt]heorem|[Ee]xercise|[Aa]ppendix|[Cc]ells?"
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|arXiv:? ?\d{4}\.\d{4,5}|\d{4}\.\d{5}"
    rf"|(?:{PLACES})\s+[\d.]+(?:(?:,| and| to)\s+[\d.]+)*"
    r"|[A-Z][\w.]*-[\w.]*\d[\w.]*(?:-[\w.]+)*|\b\d:\d\b|\[\d+\]",
    re.S,
)
UNIT = r"\s*(?:%|per cent|percent|points?\b|times\b|seconds?\b|minutes?\b|ms\b|[KMG]i?B\b|tokens/s)"
NUMBER = re.compile(rf"(?<![\w.])[-+−]?(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)({UNIT})?", re.S)


def numbers_in(thing: object) -> set[float]:
    """Every number of a nested structure, as it is and in per cent."""
    if isinstance(thing, bool) or thing is None:
        return set()
    if isinstance(thing, int | float):
        return {round(float(thing), 6), round(100 * thing, 6), round(100 - 100 * thing, 6)}
    if isinstance(thing, dict):
        return numbers_in([*thing, *thing.values()])
    if isinstance(thing, list | tuple | set):
        return set().union(*(numbers_in(part) for part in thing)) if thing else set()
    return {round(float(number), 6) for number in re.findall(r"\d+\.\d+", thing)} if isinstance(thing, str) else set()


def known_to(notebook: dict, paper: str) -> set[float]:
    """Numbers that a page may name: published ones, and parameters of this notebook."""
    printed = numbers_in([value for name, value in vars(published).items() if name.isupper()])
    source = "".join(next(c["source"] for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])))
    defaults = [ast.literal_eval(line.value) for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    profiles = [yaml.safe_load(path.read_text()).get(paper) for path in NOTEBOOKS.glob("params/*.yaml")]
    return printed | numbers_in(defaults) | numbers_in(profiles)


def measured_looking(text: str, known: set[float]) -> list[str]:
    """Numbers with a decimal point, a unit or thousands that the page cannot know without measuring."""
    found = []
    for match in NUMBER.finditer(NOT_PROSE.sub(" ", text)):
        digits, unit = match[1].rstrip(","), match[2]
        value = round(float(digits.replace(",", "")), 6)
        if ("." in digits or "," in digits or unit) and value not in known:
            found.append(match[0].strip())
    return found


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_markdown_quotes_no_measurement(path):
    """A cell tagged `worked` is left out: its numbers follow by hand from what it states."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    known = known_to(notebook, path.stem)
    cells = [(i, c) for i, c in enumerate(notebook["cells"]) if c["cell_type"] == "markdown"]
    found = {
        i: numbers
        for i, c in cells
        if "worked" not in c["metadata"].get("tags", []) and (numbers := measured_looking("".join(c["source"]), known))
    }
    assert not found, f"{path.name}: say these with code that measured them: {found}"


def test_a_quoted_measurement_is_found():
    known = numbers_in([0.2, {"SliceGPT 25%": 7.24}])
    assert measured_looking("At 20 % the paper has 7.24 (Table 1), see `x = 3.3` and $0.5$.", known) == []
    assert measured_looking("COMP is 2.1 % better, 37.10 against 38.02; 1,024 tokens.", known) == [
        "2.1 %",
        "37.10",
        "38.02",
        "1,024",
    ]


def test_notebooks_are_where_they_are_looked_for():
    assert len(list(Path(NOTEBOOKS).glob("*.ipynb"))) == 5
