"""The claims of the four papers, judged by runs: the table of each notebook, and the page `results/claims.md`.

A claim is a record in the module of its notebook, `claims_slicegpt` and so on. What it measures is found in the raw measurements
of a run, and the verdict follows from the number's interval alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd
from IPython.display import display

from lib.suite import claims_afr, claims_comp, claims_compare, claims_slicegpt, claims_svd_llm
from lib.suite.claim import UNTESTABLE, VERDICTS, Evidence, judge, shown
from lib.suite.results import RAW, Results, markdown

COUNTED = "shapes and random networks"

CLAIMS = {
    "slicegpt": claims_slicegpt.CLAIMS,
    "svd_llm": claims_svd_llm.CLAIMS,
    "afr": claims_afr.CLAIMS,
    "comp": claims_comp.CLAIMS,
    "compare": claims_compare.CLAIMS,
}


def table(paper: str, evidence: Evidence) -> pd.DataFrame:
    """The claims of a paper judged by one run: a row for each claim and model, and one for each that no run can decide."""
    rows = []
    for claim in CLAIMS[paper]:
        about = {"claim": claim.statement, "where": claim.where, "the paper": claim.printed}
        if claim.measure is None:
            rows.append(about | {"model": "any", "here": claim.reason, "verdict": UNTESTABLE})
        for model in evidence.models() if claim.measure else ():
            evidence.draws.clear()
            found = claim.measure(evidence, model)
            if found is not None:
                here = shown(claim, found, evidence.draws)
                rows.append(about | {"model": model, "here": here, "verdict": judge(found, claim.range)})
    return pd.DataFrame(rows, columns=["claim", "where", "the paper", "model", "here", "verdict"])


def show(run: Results) -> None:
    """Write the table `claims` of a notebook run, and show each claim whole, with the number that decides it."""
    rows = table(run.paper, Evidence.of(run)).to_dict("records")
    note = "Intervals: 95 %, paired over windows or questions; with several draws of the calibration text, over all of them."
    found = run.table("claims", rows, note=note)[["claim", "model", "here", "verdict"]]
    with pd.option_context("display.max_colwidth", None):
        display(found.set_index(["claim", "model"]))


def judged(results: Path, profiles: Iterable[str]) -> dict[str, pd.DataFrame]:
    """{paper: its claims, judged by every committed run that keeps its raw measurements}."""
    found = {}
    for paper in CLAIMS:
        folders = [results / profile / paper for profile in profiles]
        frames = [table(paper, Evidence.committed(folder)) for folder in folders if (folder / RAW).is_file()]
        found[paper] = pd.concat(frames, ignore_index=True).drop_duplicates() if frames else table(paper, Evidence([]))
    return found


def page(found: dict[str, pd.DataFrame], models: Collection[str]) -> str:
    """`results/claims.md`: every claim with its number, interval and verdict; found: as `judged` gives it."""
    return f"{TOP}{summary(found, models)}\n" + "\n".join(f"## {paper}\n\n{markdown(frame)}" for paper, frame in found.items())


def summary(found: dict[str, pd.DataFrame], models: Collection[str]) -> str:
    """How many claims nothing here decides, and for each of the models how many are reproduced, contradicted and undecided."""
    every = pd.concat(found.values())
    untested = every[every.verdict == UNTESTABLE].claim.nunique()
    lines = [f"- Of {every.claim.nunique()} claims of the four papers, {untested} cannot be tested here."]
    tested = every[every.verdict != UNTESTABLE]
    # What is counted or timed stands beside shapes and random networks, which are no language models.
    real = tested.model.where(tested.model.isin(models), COUNTED)
    for model in [model for model in (*models, COUNTED) if (real == model).any()]:
        counts = tested[real == model].verdict.value_counts()
        lines.append(f"- On {model}: " + ", ".join(f"{counts.get(v, 0)} {v}" for v in VERDICTS) + ".")
    return "\n".join(lines) + "\n"


TOP = """# Are the papers' claims true here?

This page is written by `invoke reproduce` from the raw measurements of the committed runs (`lib/suite/claims.py`); changes
made by hand are lost. A claim says in which range a number must lie. It is *reproduced* where the whole 95 % interval lies in
that range, *contradicted* where it lies outside, and *undecided* where it reaches over an end of it. Perplexities are compared
over the same windows, accuracies over the same questions. Behind a number stands how many draws of the calibration text it is
from, "1 and 3" where methods differ in that, as they do where one reads no text. The interval covers all draws that there are;
where a method that reads text has one, another draw may give another verdict.

"""
