"""Where the result of each method runs, as a table made from the records of the methods.

What a method leaves follows from its record: a stock model, blocks of unequal widths, matrices in two factors, or shortcuts.
Where that runs is a fact about each place, written down once below. Whatever is called tested is tried, for every method, by
tests/test_destinations.py; the rest stands in the sources of the place.
"""

from __future__ import annotations

from dataclasses import fields

import pandas as pd

from lib.methods import ANYWHERE, EQUAL_WIDTHS, MERGED, METHODS, Method
from lib.models.gguf_architecture import ARCHITECTURES, MODEL_TYPES, TABLE
from lib.primitives.anatomy import FAMILIES
from lib.suite.results import markdown

TRANSFORMERS, LLAMA_CPP, QUANTISED = "plain transformers", "llama.cpp", "llama.cpp, quantised"
VLLM, TORCH_EXPORT, SUITE = "vLLM", "`torch.export`, for ExecuTorch", "this suite"
PLACES = (TRANSFORMERS, LLAMA_CPP, QUANTISED, VLLM, TORCH_EXPORT, SUITE)
TESTED, SOURCE = "yes, tested", "yes, by its source"

# What a method leaves.
STOCK, UNEQUAL, FACTORS, SHORTCUTS = "a stock model", "blocks of unequal widths", "two-factor layers", "shortcuts between blocks"
# Of the methods whose record says that they may leave equal widths, those that do so with their default settings.
EQUAL_BY_DEFAULT = ("afr", "wanda-sp", "wanda-sp-heads", "magnitude-neurons", "random-neurons")

ONE_WIDTH = "no, because its classes have one width for all blocks"
OTHER_FORM = "no, because it takes a width for each block only from a folder of a `DeciLMForCausalLM`, which is not written here"
NO_FACTORS = "no, because it has no layers in two factors; after `invoke merge-to-dense`, which makes these dense again, {}"
NO_SHORTCUTS = "no, because it has no shortcuts between blocks; `slicegpt-stock` needs none"
AS_DECI = f"{TESTED}, as `deci`"
RUNS = {
    STOCK: {TRANSFORMERS: TESTED, LLAMA_CPP: TESTED, QUANTISED: TESTED, VLLM: SOURCE},
    UNEQUAL: {TRANSFORMERS: ONE_WIDTH, LLAMA_CPP: AS_DECI, QUANTISED: AS_DECI, VLLM: OTHER_FORM},
    FACTORS: dict.fromkeys((TRANSFORMERS, LLAMA_CPP, QUANTISED), NO_FACTORS.format(TESTED)) | {VLLM: NO_FACTORS.format(SOURCE)},
    SHORTCUTS: dict.fromkeys((TRANSFORMERS, LLAMA_CPP, QUANTISED, VLLM), NO_SHORTCUTS),
}


def leaves(method: Method) -> str:
    """What a method leaves with its default settings, by its record."""
    if method.loads == ANYWHERE or (method.loads == EQUAL_WIDTHS and method.name in EQUAL_BY_DEFAULT):
        return STOCK
    if method.loads == MERGED or "ranks" in method.removes:
        return FACTORS
    return SHORTCUTS if "stream" in method.removes else UNEQUAL


def cells(method: Method) -> dict[str, str]:
    """For each place whether a method's result runs there: yes, tested; yes, by its source; or no, because of something."""
    kind, settings = leaves(method), {field.name for field in fields(method.settings)}
    found = RUNS[kind] | {TORCH_EXPORT: TESTED, SUITE: TESTED}
    if kind == UNEQUAL and "equal_widths" in settings:
        for place, yes in ((TRANSFORMERS, TESTED), (VLLM, SOURCE)):
            found[place] += f"; with `--set equal_widths=yes`, {yes}"
    if "round_interval" in settings and kind != SHORTCUTS:  # a stream of any width, and rows as long
        found[QUANTISED] += "; all matrices with `--set round_interval=32`"
    return found


def table() -> str:
    """The table in Markdown: methods whose results run at the same places share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in METHODS.values():
        answers = cells(method)
        rows.setdefault(tuple(answers[place] for place in PLACES), []).append(f"`{method.name}`")
    lines = [[", ".join(names), *answers] for answers, names in rows.items()]
    return markdown(pd.DataFrame(lines, columns=["method", *PLACES]))


def families() -> str:
    """What llama.cpp calls the models of each family, in Markdown."""
    rows = []
    for family in FAMILIES:
        names = MODEL_TYPES.get(family, ())
        equal = [name for name in names if not ARCHITECTURES[name].unequal]
        unequal = [
            f"`{name}`" + " if the head is the table" * (ARCHITECTURES[name].head == TABLE)
            for name in names
            if ARCHITECTURES[name].unequal
        ]
        reason = "its architecture has one width for all blocks" if names else "llama.cpp has no architecture for it"
        absent = f"no, because {reason}"
        rows.append([family, " or ".join(f"`{name}`" for name in equal) or absent, *(unequal or [absent])])
    return markdown(pd.DataFrame(rows, columns=["family", "blocks of equal widths", "blocks of unequal widths"]))


def part() -> str:
    """The generated part of lib/README.md."""
    return f"{table()}\n{families()}"
