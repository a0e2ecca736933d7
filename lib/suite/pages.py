"""The pages that show results, written from the tables under `results/`: the table of README.md, and all of results/README.md.

The tables of lib/README.md on where results can go are written along with them, from the records of the methods. Nothing is
computed here: the same tables give the same pages, byte for byte. Only the profiles whose results are committed are
shown, so a run with parameters of one's own leaves the pages as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.papers.afr import PAPER
from lib.suite import claims, destinations, on_device
from lib.suite.plots import front_picture
from lib.suite.results import RAW, markdown, write_atomically
from lib.suite.standing import FIRST, LEVEL, NEAR, leaders

SHOWN = {  # profiles whose results are committed, those that a reader should see first in front
    "smollm2-135m": "SmolLM2-135M",
    "workshop": "The two embedded models",
    "gemma-3-270m": "Gemma 3 270M",
}
PAPERS = {
    "slicegpt": "SliceGPT",
    "svd_llm": "SVD-LLM",
    "afr": "Structured AFR",
    "comp": "COMP",
    "compare": "All methods at equal size",
}
MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "wiki-a-llama": "wiki-a-llama",
    "wiki-a-opt": "wiki-a-opt",
    "gemma-3-270m": "Gemma 3 270M",
}
SIZES = (0.2, 0.5)  # of the columns of README.md
BEGIN = "<!-- The lines from here to the next comment are written by `invoke reproduce`. -->"
END = "<!-- End of the lines that `invoke reproduce` writes. -->"


@dataclass(frozen=True)
class Part:
    """One table of results/README.md: the rows of a paper's table `perplexity` at one of its own ratios, and the dense models."""

    paper: str
    ratio: float
    title: str
    words: str
    shown: Callable[[pd.DataFrame], pd.Series] = lambda frame: frame.method.notna()  # which methods; all, unless given


PARTS = (
    Part(
        "slicegpt",
        0.25,
        "SliceGPT and its rivals at a slicing level of 25 %",
        """Low-rank shortcuts (the rows `SliceGPT`), dense shortcuts and tied tables are one function stored in three sizes. The
rows 2:4 set half of the weights in the blocks' matrices to zero and store them dense, so no parameter is removed.""",
    ),
    Part(
        "svd_llm",
        0.2,
        "SVD-LLM and its rivals with 20 % of the blocks' matrices removed",
        "`SVD-LLM` without letters includes fine-tuning with LoRA; the other rows were not tuned after compression.",
    ),
    Part(
        "afr",
        0.2,
        "Structured AFR and the best of its rivals with 20 % of the FFN neurons removed",
        "Unstructured AFR sets 20 % of the weights to zero instead and removes no parameter. All rivals are in the notebook.",
        lambda frame: frame.method.isin(["dense", "unstructured AFR", *PAPER, "CFSP", "FLAP, neurons", "LLM-Pruner"]),
    ),
    Part(
        "comp",
        0.2,
        "COMP and its rivals with 20 % of the blocks' parameters removed",
        """The ratio of each method is solved for, so that this share is really gone; ShortGPT removes whole blocks, as many as
come nearest. Every formula of COMP is our reading of the paper.""",
    ),
)


def write_pages(root: Path) -> str:
    """Write the pages of the project in `root` anew, and draw their picture. Returns one line that says what was done.

    Pages are written only if every table that they show is there, so a project without some of the results keeps its pages.
    """
    missing = [name for name in sources() if not (root / name).is_file()]
    if missing:
        return f"pages: left as they are, because {missing[0]} is missing"
    front_picture(root / "results", [profile for profile in SHOWN if len(sizes_of(root / "results", profile)) > 1])
    written = [name for name, text in pages(root).items() if _replace(root / name, text)]
    return f"pages: {' and '.join(written)} written from the tables" if written else "pages: up to date with the tables"


def sizes_of(results: Path, profile: str) -> list[float]:
    """The sizes that a comparison has; its curves need two."""
    table = pd.read_csv(results / profile / "compare" / "tables" / "pareto.csv")
    return sorted(table[table.method != "dense"]["size"].unique())


def sources() -> list[str]:
    """The files that the pages are made of, as paths from the root of the project."""
    tables = [f"results/{profile}/compare/tables/pareto.csv" for profile in SHOWN]
    for profile in ("smollm2-135m", "workshop"):
        tables += [f"results/{profile}/compare/tables/{table}.csv" for table in ("standing", "device", "healing")]
    tables += [f"results/workshop/{part.paper}/tables/perplexity.csv" for part in PARTS]
    judged = [f"workshop/{paper}" for paper in claims.CLAIMS] + ["smollm2-135m/compare"]
    return ["README.md", "lib/README.md", *tables, *(f"results/{run}/{RAW}" for run in judged)]


def pages(root: Path) -> dict[str, str]:
    """Every generated page as it should be, by its path from the root of the project."""
    results = root / "results"
    judged = claims.judged(results, SHOWN)
    return {
        "README.md": _with_part(root / "README.md", f"{claims.summary(judged, MODELS)}\n{equal_sizes(results)}"),
        "lib/README.md": _with_part(root / "lib/README.md", destinations.part()),
        "results/README.md": results_page(results),
        "results/claims.md": claims.page(judged, MODELS),
    }


def _with_part(path: Path, made: str) -> str:
    """The text of a page with its generated part made anew. Raises ValueError for a page without one place for it."""
    text, around = path.read_text(encoding="utf-8"), re.escape(BEGIN) + ".*?" + re.escape(END)
    if len(re.findall(around, text, re.S)) != 1:
        name = path.relative_to(path.parents[path.parent.name == "lib"])
        raise ValueError(f"{name} needs one place for its table, between these two lines:\n{BEGIN}\n{END}")
    return re.sub(around, lambda _: f"{BEGIN}\n{made}{END}", text, flags=re.S)


def _replace(path: Path, text: str) -> bool:
    """Write a file if its text is another one; whether it was."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomically(path, text)
    return True


# --- the table of README.md -----------------------------------------------------------------------------------------------


def equal_sizes(results: Path) -> str:
    """Perplexity over that of the dense model for every method, at two real sizes of all models, and where it comes from.

    Means over the draws where a comparison has drawn several; in bold what is not told apart from the lowest.
    """
    standing, once = pd.concat(_compared(results, "standing")), pd.concat(_compared(results, "pareto"))
    once = once[once["size"].isin(SIZES)].set_index(["method", "model", "size"])
    over = standing.set_index(["method", "model", "size"])
    values = over.relative.combine_first(once.relative)
    there = {key[1:] for key in values.index}
    columns = [(model, size) for model in MODELS for size in SIZES if (model, size) in there]
    cells = pd.Series({key: _cell(value, key, once, over) for key, value in values.items()}).unstack([1, 2])[columns]
    order = values.unstack([1, 2])[columns[0]].sort_index().sort_values(kind="stable").index
    shown = cells.loc[order].fillna("n/a").reset_index(names="method")
    heads = {size: f"{100 * size:.0f} %" for size in SIZES}
    first = {model: size for model, size in reversed(columns)}
    shown.columns = ["method", *(f"{MODELS[m]}, {heads[s]}" if s == first[m] else heads[s] for m, s in columns)]
    source = ", ".join(f"`results/{profile}/compare/tables/pareto.csv`" for profile in SHOWN)
    made = ", ".join(f"`{command(profile, 'compare')}`" for profile in SHOWN)
    said = [
        f"- {MODELS[model]}, {100 * size:.0f} % removed: {leaders(part.to_dict('records'))}."
        for (model, size), part in standing[standing.model == columns[0][0]].groupby(["model", "size"], sort=False)
    ]  # of the model that stands first; of the others, the bold numbers say it
    said += healed(results, columns[0][0])
    said += [f"- In llama.cpp, {line}." for line in on_devices(results)]
    return f"{markdown(shown)}\n" + "\n".join(said) + f"\n\nFrom {source},\nmade by {made}.\n"


def healed(results: Path, model: str) -> list[str]:
    """What a little training repaired, a sentence for each method of a model that was trained."""
    said, trained = [], pd.concat(_compared(results, "healing"))
    for method, rows in trained[trained.model == model].groupby("method", sort=False):
        after = " and ".join(
            f"{row.after:.2f} [{row.low:.2f}, {row.high:.2f}] from the {row.learns_from}" for row in rows.itertuples()
        )
        first = rows.iloc[0]
        gone = f"{MODELS[model]}, {method} with {100 * first['size']:.0f} % removed"
        said.append(f"- {gone}: {first.before:.2f} times dense; after learning from {first.tokens:,} tokens, {after}.")
    return said


def on_devices(results: Path) -> list[str]:
    """Whether files of pruned models are the better deal, and of which, a line for each model of which files were run."""
    said = []
    for _, part in [each for table in _compared(results, "device") for each in table.groupby("model", sort=False)]:
        tried = part.method[part.method != on_device.DENSE].str.removesuffix(", trained").unique()
        said.append(f"{on_device.headline(part.to_dict('records'))} (pruned by {' and '.join(tried)}, no other was run)")
    return said


def _compared(results: Path, name: str) -> list[pd.DataFrame]:
    """A table of every committed comparison that has it."""
    paths = [results / profile / "compare" / "tables" / f"{name}.csv" for profile in SHOWN]
    return [pd.read_csv(path) for path in paths if path.is_file()]


def _cell(value: float, key: tuple[str, str, float], once: pd.DataFrame, over: pd.DataFrame) -> str:
    """One value of the table: in bold where it is not behind the lowest, with the size in brackets where that is another one."""
    if key in over.index:
        return f"**{relative(value)}**" if over.standing[key] in (FIRST, LEVEL) else relative(value)
    removed = once.removed_decoder[key]
    return relative(value) + ("" if abs(removed - key[2]) < NEAR else f" ({100 * removed:.0f} %)")


def relative(value: float) -> str:
    """A perplexity over that of the dense model, to the digits that matter."""
    if value < 1e5:
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def command(profile: str, paper: str) -> str:
    """What to type for the results of one paper; other models than the embedded ones read their text from a folder."""
    if profile == "workshop":
        return f"invoke reproduce --paper {paper}"
    return f"invoke reproduce --profile {profile} --paper {paper} --data-dir DIR"


# --- results/README.md ----------------------------------------------------------------------------------------------------


def results_page(results: Path) -> str:
    """Where every run is, and one table of each paper."""
    runs = "\n".join(f"## {title} (`{profile}`)\n\n{runs_of(results, profile)}" for profile, title in SHOWN.items())
    return f"{TOP}\n{runs}\n{TABLES}\n" + "\n".join(paper_table(results, part) for part in PARTS)


def runs_of(results: Path, profile: str) -> str:
    """Links to the executed notebook, the tables and the figures of every paper of a profile, and the command that makes them."""
    rows = []
    for paper, title in PAPERS.items():
        if (results / profile / paper / "manifest.json").is_file():
            files = json.loads((results / profile / paper / "manifest.json").read_text(encoding="utf-8"))["files"]
            count = {kind: sum(name.startswith(kind) for name in files) // 2 for kind in ("tables", "figures")}  # in two formats
            links = [f"[{title}]({profile}/{paper}/{paper}.ipynb)"]
            links += [f"[{count[kind]} {kind}]({profile}/{paper}/{kind})" for kind in count]
            rows.append([*links, f"`{command(profile, paper)}`"])
    return markdown(pd.DataFrame(rows, columns=["executed notebook", "tables", "figures", "command"]))


def paper_table(results: Path, part: Part) -> str:
    """One paper's rows at one ratio, with the file and the command that they come from."""
    name = f"workshop/{part.paper}/tables/perplexity.csv"
    frame = pd.read_csv(results / name)
    # Sparsity 2:4 is the share 0.5 of zeros, whatever the slicing level beside it.
    wanted = (frame.ratio == part.ratio) | (frame.method == "dense") | frame.method.str.contains("2:4")
    frame = frame[wanted & part.shown(frame)]
    rows = [
        {
            "model": row.model,
            "method": row.method if row.method == "dense" or "2:4" in row.method else f"{row.method}, {row.ratio:.0%}",
            "perplexity": f"{row.perplexity:.2f}",
            "times dense": f"{row.times_dense:.3f}" + (f" [{row.low:.3f}, {row.high:.3f}]" if row.method != "dense" else ""),
            "parameters": row.params,
            "removed": f"{100 * row.removed_model:.1f} %",
        }
        for row in frame.itertuples()
    ]
    windows, length = sorted(frame.windows.unique(), reverse=True), frame.length.iloc[0]
    fewer = f" ({windows[-1]} for the rows of wider intervals, whose perplexity is estimated from them)" if windows[1:] else ""
    made = (
        f"{windows[0]} windows of {length} tokens{fewer}. From [`{name}`]({name}), made by `{command('workshop', part.paper)}`."
    )
    return f"### {part.title}\n\n{part.words}\n\n{markdown(pd.DataFrame(rows))}\n{made}\n"


TOP = """# All results

This page is written by `invoke reproduce` from the tables in this folder (`lib/suite/pages.py`); changes made by hand are lost.
The comparison of all methods at equal size is in the [README of the project](../README.md#what-came-out).

The results of one notebook are in `results/<profile>/<paper>`: the executed notebook, `tables` (`.csv` at full precision, `.md`
rounded and with a note on how the numbers were measured), `figures` (`.svg` and `.png`) and `manifest.json`, which records
parameters, code, package versions, machine, and the checksum of every file. `raw.parquet`, in the runs of the present code, holds
every measurement with the settings that identify it: the summed loss of each window, and of each question whether it was
answered correctly and by what margin. `lib.evaluation.paired` makes intervals of them, and `invoke reproduce --reuse` starts
from them where the code that computed them is unchanged. `invoke site` makes a website of the results.

[Which claims of the papers are true here](claims.md) is judged from these files. What is particular to the real models is in
[`smollm2-135m`](smollm2-135m/README.md) and [`gemma-3-270m`](gemma-3-270m/README.md). The papers' own models are run with
the other [profiles](../notebooks/params/README.md).
"""

TABLES = """## One table of each paper

Perplexity on the held-out Wikipedia text, for the two embedded models. `times dense` divides it by that of the dense model, with
the 95 % interval of this ratio over the windows, in which both models read the same text; how a method varies with its
calibration set is not in it. `removed` is the share of all parameters of the model that is gone, which is another number than
the slicing level or the ratio of a method. The two models are tiny. The notebooks discuss what they show about large ones and
what they do not.
"""
