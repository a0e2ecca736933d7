"""The start of the site: the picture, who is ahead on each model, the four papers, their claims, and how to run it all."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from urllib.parse import urlencode

import pandas as pd

from lib.suite import diagrams
from lib.suite.claim import UNTESTABLE, VERDICTS
from lib.suite.claims import COUNTED
from lib.suite.markup import page, scrolling, sortable_rows
from lib.suite.pages import MODELS, PAPERS, relative
from lib.suite.plots import COLOURS, TOP, message, style_of
from lib.suite.standing import FIRST, LEVEL, NEAR

TITLE = "Four papers on compressing language models"
CLAIM_COLUMNS = ("paper", "claim", "verdict", "model", "here", "the paper", "where")
IDEAS = {
    "slicegpt": "Turn the stream of vectors between the blocks to its principal axes, and delete the axes that carry least.",
    "svd_llm": "Replace every matrix by two thin ones, chosen so that the output for real inputs changes least.",
    "afr": "Delete neurons by a score whose sign counts: it says whether a neuron helps or harms, and outliers are kept from it.",
    "comp": "Delete blocks, then neurons, and scale what stays so that it makes up for what is missing, in closed form.",
}
RUN = """<pre><code>pip install -e . &amp;&amp; invoke reproduce    # every table and figure, into results/workshop
invoke reproduce --paper slicegpt         # one notebook
invoke compress --model path/or/hub-id --method comp --ratio 0.25 --out small   # a model of your own
invoke site                               # these pages</code></pre>
<p>Python 3.11 or newer, in a clone of the repository. Two cores are enough, and nothing is fetched from a model hub: two small
models and their text come with the code. A run that was interrupted continues where it stopped.</p>"""


# --- who is ahead -----------------------------------------------------------------------------------------------------------


def standings(folder: Path) -> pd.DataFrame:
    """A row for each model, method and size of a comparison: relative, low, high, removed_decoder, standing (empty where none).

    folder: of a run of the notebook `compare`. Where several calibration texts were drawn, `relative` is the mean over them.
    """
    keys = ["model", "method", "size"]
    once = pd.read_csv(folder / "tables" / "pareto.csv").set_index(keys)
    wanted = ["relative", "low", "high", "removed_decoder", "standing"]
    once = once.reindex(columns=wanted)[once.index.get_level_values("method") != "dense"]
    path = folder / "tables" / "standing.csv"
    if not path.is_file():
        return once.reset_index()
    over = pd.read_csv(path).set_index(keys).reindex(columns=wanted)
    return over.combine_first(once).reset_index()


def board_cell(row: object) -> str:
    """One value of a leaderboard: darker where it is nearer to the dense model."""
    if row is None or row.relative != row.relative:
        return '<td class="number">n/a</td>'
    shade = 1 - min(max(math.log(row.relative) / math.log(TOP), 0), 1) ** 0.5  # the root: most numbers are near 1
    other = abs(row.removed_decoder - row.size) >= NEAR
    ahead = row.standing in (FIRST, LEVEL)
    words = relative(row.relative) + (f" <small>at {100 * row.removed_decoder:.0f} %</small>" if other else "")
    words = f"<strong>{words}</strong> <small>{row.standing}</small>" if ahead else words
    title = f"{row.relative:.4g}" + (f" [{row.low:.4g}, {row.high:.4g}]" if row.low == row.low else "")
    return f'<td class="number" data-value="{row.relative}" title="{title}" style="--shade: {shade:.3f}">{words}</td>'


def board(profile: str, model: str, rows: pd.DataFrame) -> str:
    """The leaderboard of a model: methods by sizes, the best at the smallest size first."""
    sizes = sorted(rows["size"].unique())
    found = {(row.method, row.size): row for row in rows.itertuples()}
    first = rows[rows["size"] == (0.2 if 0.2 in sizes else sizes[0])].sort_values("relative", kind="stable").method
    head = "".join(f'<th class="number"><button>{100 * size:.0f} %</button></th>' for size in sizes)
    lines = []
    for method in [*first, *(m for m in rows.method.unique() if m not in set(first))]:
        removes = style_of(method).removes
        dot = f'<span class="dot" style="background: {COLOURS[removes]}" title="{removes}"></span>'
        cells = "".join(board_cell(found.get((method, size))) for size in sizes)
        lines.append(f"<tr><td>{dot}{escape(method)}</td>{cells}</tr>")
    table = f'<table class="sortable leaderboard"><thead><tr><th><button>method</button></th>{head}</tr></thead>'
    table += "<tbody>" + "\n".join(lines) + "</tbody></table>"
    link = "explorer.html#" + urlencode({"model": f"{profile}/{model}"})
    box = scrolling(table, f"Leaderboard of {model}")
    return (
        f'<section class="board" id="{board_id(profile, model)}"><h3>{escape(model)}</h3>\n{box}\n'
        f'<p><a href="{escape(link)}">{escape(model)} in the explorer</a>, with intervals, accuracy, time and memory</p>\n'
        "</section>"
    )


def compared(comparisons: Mapping[str, Path]) -> list[str]:
    """The names of all models that were compared."""
    found = [pd.read_csv(folder / "tables" / "pareto.csv").model for folder in comparisons.values()]
    return list(dict.fromkeys(name for models in found for name in models))


def board_id(profile: str, model: str) -> str:
    return f"board-{profile}-{model}".replace("/", "-")


def leaderboards(comparisons: Mapping[str, Path]) -> str:
    """The leaderboards of all models of {profile: folder of its comparison}, and the choice between them."""
    tables = {profile: standings(folder) for profile, folder in comparisons.items()}
    parts = {(p, model): part for p, table in tables.items() for model, part in table.groupby("model", sort=False)}
    if not parts:
        return ""
    options = "".join(
        f'<option value="{board_id(profile, model)}">{escape(model if model == profile else f"{model} ({profile})")}</option>'
        for profile, model in parts
    )
    kinds = {style_of(method).removes for part in parts.values() for method in part.method}
    legend = "".join(
        f'<li><span style="background: {colour}"></span>{kind}</li>' for kind, colour in COLOURS.items() if kind in kinds
    )
    words = (
        "Perplexity over that of the dense model when this share of the decoder's parameters is gone, without fine-tuning; where "
        "a method could only remove another share, that stands beside the number. The darker, the nearer to the dense model. "
        "<strong>first</strong> has the lowest perplexity; <strong>level</strong> cannot be told apart from it by windows and "
        "calibration texts. Where there is no such mark, the method is behind, or was drawn too seldom to say."
    )
    boards = "\n".join(board(profile, model, part) for (profile, model), part in parts.items())
    return (
        f'<h2 id="leaderboard">Who is ahead at equal size?</h2>\n<p>{words}</p>\n<ul class="legend">{legend}</ul>\n'
        f'<p class="choice" hidden><label>model <select id="board" autocomplete="off">{options}</select></label></p>\n{boards}'
    )


def picture(comparisons: Mapping[str, Path], drawn: bool) -> str:
    """The main picture, if there is one, called by what it says."""
    found = [pd.read_csv(folder / "tables" / "pareto.csv") for folder in comparisons.values()]
    if not drawn or not found:
        return ""
    table = pd.concat(found)
    said = f"Plot: perplexity of compressed models against their size. {message(table[table.method != 'dense'])}."
    return (
        f'<figure><img src="figures/size.svg" alt="{escape(said)}"></figure>'
        '<p class="made">The same as a table: <a href="#leaderboard">who is ahead at equal size</a>; chosen and compared: '
        '<a href="explorer.html">the explorer</a>.</p>'
    )


# --- papers and claims ------------------------------------------------------------------------------------------------------


def papers(pages: Mapping[str, str]) -> str:
    """The idea of each paper in a sentence, beside what it removes. pages: {paper: its notebook page}."""
    cards = []
    for paper, idea in IDEAS.items():
        name = PAPERS[paper]
        link = f'<p><a href="{pages[paper]}">Read the notebook</a></p>' if paper in pages else ""
        cards.append(f'<section class="card paper"><h3>{name}</h3><p>{idea}</p>{link}{diagrams.block(name).data}</section>')
    return f'<h2 id="papers">The four papers</h2>\n<div class="cards">{"".join(cards)}</div>'


def claim_rows(folders: Iterable[Path]) -> list[dict]:
    """The rows of the tables `claims` of some runs, each with its paper, none twice. folders: results/<profile>/<paper>."""
    rows = []
    for folder in folders:
        path = folder / "tables" / "claims.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows += [{"paper": PAPERS.get(folder.name, folder.name)} | row for row in csv.DictReader(file)]
    return list({tuple(row.items()): row for row in rows}.values())


def verdicts(rows: list[dict], models: Iterable[str]) -> str:
    """How many claims of each paper are decided on each of the models, and how, as a table.

    What is counted on shapes or timed on random networks stands together, and so do the claims that nothing here can test.
    """
    if not rows:
        return ""
    models, counts = set(models), {}
    for row in rows:
        on = row["model"] if row["model"] in models else "nothing here" if row["verdict"] == UNTESTABLE else COUNTED
        counts.setdefault((row["paper"], on), Counter())[row["verdict"]] += 1
    lines = "".join(verdict_line(paper, on, count) for (paper, on), count in counts.items())
    head = "".join(f'<th class="number {kind.split()[0]}">{kind}</th>' for kind in (*VERDICTS, UNTESTABLE))
    table = f'<table class="verdicts"><thead><tr><th>paper</th><th>on</th>{head}<th>share</th></tr></thead>'
    return (
        '<h2 id="claims">Are the papers’ claims true here?</h2>\n<p>A claim says in which range a number must lie. It is '
        "<em>reproduced</em> where the whole 95 % interval of that number lies in the range, <em>contradicted</em> where it lies "
        "outside, and <em>undecided</em> where it reaches over an end.</p>\n"
        f"{scrolling(f'{table}<tbody>{lines}</tbody></table>', 'Verdicts')}\n"
        '<p><a href="claims.html">Every claim, with its number and its interval</a></p>'
    )


def verdict_line(paper: str, on: str, count: Mapping[str, int]) -> str:
    kinds = (*VERDICTS, UNTESTABLE)
    cells = "".join(f'<td class="number">{count[kind] or ""}</td>' for kind in kinds)
    parts = (f'<span class="{kind.split()[0]}" style="flex-grow: {count[kind]}"></span>' for kind in kinds if count[kind])
    bar = f'<div class="bar" aria-hidden="true">{"".join(parts)}</div>'
    return f"<tr><td>{escape(paper)}</td><td>{escape(on)}</td>{cells}<td>{bar}</td></tr>\n"


def claims_page(rows: list[dict]) -> str:
    """Every claim of `claim_rows`, as one sortable table."""
    body = "<p>No run has judged the claims.</p>"
    if rows:
        header = [name for name in CLAIM_COLUMNS if name in rows[0]]
        body = sortable_rows(header, ([row[name] for name in header] for row in rows), "Claims")
    head = "<h1>Every claim of the papers, and what was measured here</h1>"
    return page("Claims", f'<main class="claims">\n{head}\n{body}\n</main>', "", kind="wide")


def index_page(comparisons: Mapping[str, Path], runs: Iterable[Path], pages: Mapping[str, str], cards: str, drawn: bool) -> str:
    """The start. comparisons, pages: as above; runs: all folders; cards: the runs as HTML; drawn: is there a main picture?"""
    parts = [
        f"<h1>{TITLE}</h1>\n<p>What SliceGPT, SVD-LLM, Structured AFR and COMP remove from a model, what it costs, and how "
        "their rivals do at the same size: measured, with intervals, in notebooks that can be read, rerun and changed.</p>",
        picture(comparisons, drawn),
        leaderboards(comparisons),
        papers(pages),
        verdicts(claim_rows(runs), {*MODELS, *compared(comparisons)}),
        f'<h2 id="run">Run it</h2>\n{RUN}',
        f'<h2 id="notebooks">All notebooks, tables and figures</h2>\n{cards}',
    ]
    return page(TITLE, "<main>\n" + "\n".join(part for part in parts if part) + "\n</main>", "")
