"""The page on which readers choose a model, a size and a measure, and the committed tables that it draws.

Nothing is computed here: the tables go into `tables.js` as they are, and the script of the page, `lib/assets/site/explorer.js`,
takes from them what was chosen.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

from lib.suite.markup import page, scrolling
from lib.suite.plots import COLOURS, TOP, style_of
from lib.suite.standing import NEAR

# Those that the script reads, if present.
TABLES = ("pareto", "standing", "seeds", "healing", "other_measures", "cost", "latency", "device", "says")
NUMBERS = ("value", "low", "high", "removed, %", "bytes")  # columns of the page's table, between `method` and the others
WORDS = ("standing", "interval", "what it does", "how it continues the prompt")


def value_of(text: str) -> str | float | None:
    """A cell of a csv file: a number where it is one, None where it is empty or not a number."""
    try:
        number = float(text)
    except ValueError:
        return text or None
    return None if math.isnan(number) else number


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value_of(text) for name, text in row.items()} for row in csv.DictReader(file)]


def note_of(path: Path) -> str:
    """The text below the table in a Markdown file; empty without text or file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return " ".join(line for line in lines if not line.startswith("|")).strip()


def tables_of(folder: Path) -> dict[str, dict]:
    """{table: its rows and its note} of those in the folder of a comparison that the explorer reads."""
    found = {name: folder / "tables" / f"{name}.csv" for name in TABLES}
    return {
        name: {"rows": rows_of(path), "note": note_of(path.with_suffix(".md"))} for name, path in found.items() if path.is_file()
    }


def suite(comparisons: Mapping[str, Path]) -> dict:
    """What the script of the explorer needs. comparisons: {profile: the folder of its run of the notebook `compare`}.

    `size` of a profile is the one at which costs and speed were measured.
    """
    profiles = {}
    for profile, folder in comparisons.items():
        parameters = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parameters"]
        profiles[profile] = {"size": parameters.get("size"), "tables": tables_of(folder)}
    removes = {}
    for found in profiles.values():
        for table, content in found["tables"].items():
            for row in content["rows"]:
                # A file for llama.cpp goes by its method and its kind, as in the script.
                name = f"{row['method']}, {row['kind']}" if table == "device" else row["method"]
                removes[name] = style_of(row["method"]).removes
    return {"near": NEAR, "top": TOP, "colours": COLOURS, "removes": removes, "profiles": profiles}


def script(comparisons: Mapping[str, Path]) -> str:
    """The file `tables.js`. It is JSON but for infinite numbers, which JavaScript calls as Python does."""
    return f"const SUITE = {json.dumps(suite(comparisons), ensure_ascii=False)};\n"


def explorer_page() -> str:
    """The page without numbers, which its script adds."""
    choices = "".join(
        f'<label>{words} <select id="{name}"></select></label>'
        for name, words in (("model", "model"), ("size", "size"), ("axis", "measure"))
    )
    head = "".join(
        f"<th{' class=number' if name in NUMBERS else ''}><button>{name}</button></th>" for name in ("method", *NUMBERS, *WORDS)
    )
    table = f'<table class="sortable" id="rows"><thead><tr>{head}</tr></thead><tbody></tbody></table>'
    without = "This page draws its picture with JavaScript. The tables that it reads are among those of each comparison."
    body = f"""<main>
<h1>Which method, for this model and at this size?</h1>
<form id="choices">{choices}<a id="link" href="#">link to this choice</a></form>
<noscript><p>{without}</p></noscript>
<h2 id="says" aria-live="polite">Nothing was compared</h2>
<div id="chart"></div>
<ul id="legend" class="legend"></ul>
<p id="note" class="note"></p>
<p id="missing" class="note"></p>
<h2>The same as a table</h2>
{scrolling(table, "Values of the chosen measure")}
</main>"""
    return page("Explorer", body, "", scripts=("tables.js", "explorer.js"))
