"""What the paper on Structured AFR claims (Kobayashi et al., 2025, Tables 1 to 4), and which measurements decide it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from lib.evaluation.paired import Interval
from lib.primitives.cost import count
from lib.primitives.structured import ffn_widths, remove_neurons, uniform
from lib.primitives.surgery import shape_shell
from lib.suite import published
from lib.suite.architectures import meta_model
from lib.suite.claim import ABOVE, BELOW, POSITIVE, Claim, Evidence, accuracy, exactly, ratio

PROPOSAL = "absolute + GMM"
RATIOS = (0.2, 0.5)


def _printed(ours: str, other: str, r: float) -> str:
    means = (f"{name} {published.afr_average(r, name):.2f}" for name in (ours, other.removesuffix(", neurons")))
    return f"mean accuracy of five tasks, recomputed: {', '.join(means)}"


def _perplexity(statement: str, where: str, ours: str, other: str, r: float) -> Claim:
    number = f"perplexity of {ours} over that of {other}"
    return Claim(
        "afr", f"{statement}, at {100 * r:.0f} %.", where, _printed(ours, other, r), number, BELOW, ratio(ours, other, r)
    )


def _accuracy(statement: str, where: str, ours: str, other: str, r: float) -> Claim:
    number = f"accuracy of {ours} minus that of {other}, in points"
    return Claim(
        "afr", f"{statement}, at {100 * r:.0f} %.", where, _printed(ours, other, r), number, POSITIVE, accuracy(ours, other, r)
    )


@functools.cache
def llama_3_8b(removed: float) -> int:
    """Parameters of Llama-3-8B without a share of its FFN neurons, counted on shapes."""
    model = meta_model("Llama-3-8B")
    keep = uniform([torch.arange(float(n)) for n in ffn_widths(model)], removed)
    return count(remove_neurons(shape_shell(model), keep, inplace=True)).params


def _counted(value: Callable[[], float]) -> Callable[[Evidence, str], Interval | None]:
    """A number that is the same whatever was measured: it stands beside the first model of a run."""
    return lambda evidence, model: exactly(value()) if model == evidence.models()[0] else None


def _around(value: float, half: float) -> tuple[float, float]:
    """The numbers that are printed as this one."""
    return value - half, value + half


def _size(r: float) -> Claim:
    size = published.AFR_TABLE_4[r]["params"] / 1e9
    statement = f"Without {100 * r:.0f} % of its neurons Llama-3-8B has {size:.2f} billion parameters."
    measure = _counted(lambda: llama_3_8b(r) / 1e9)
    return Claim("afr", statement, "Table 4", f"{size:.2f} billion", "billions, counted", _around(size, 0.005), measure)


def _gigabytes(r: float) -> Claim:
    printed = published.AFR_TABLE_4[r]["vram_gb"]
    return Claim(
        "afr", f"Without {100 * r:.0f} % of its neurons Llama-3-8B takes {printed} GB.", "Table 4", f"{printed} GB",
        "decimal GB of the weights, at two bytes each", _around(printed, 0.01), _counted(lambda: 2 * llama_3_8b(r) / 1e9),
    )  # fmt: skip


def _each(claim: Callable[..., Claim], *parts: str) -> tuple[Claim, ...]:
    return tuple(claim(*parts, r) for r in RATIOS)


CLAIMS = (
    *_each(_perplexity, "Zeroing single weights costs less than deleting neurons by the simple mean", "Table 1",
           "unstructured AFR", "simple mean"),
    *_each(_perplexity, "Averaging with signs is better than the simple mean", "Table 2", "absolute only", "simple mean"),
    *_each(_perplexity, "Clipping by mixtures helps the simple mean", "Table 2", "GMM only", "simple mean"),
    *_each(_perplexity, "Clipping helps the signed mean too", "Table 2", PROPOSAL, "absolute only"),
    *_each(_perplexity, "Signs help clipped scores too", "Table 2", PROPOSAL, "GMM only"),
    *_each(_accuracy, "The proposal answers more questions than the simple mean", "Table 2", PROPOSAL, "simple mean"),
    *_each(_accuracy, "The proposal is ahead of LLM-Pruner", "Table 3", PROPOSAL, "LLM-Pruner"),
    *_each(_accuracy, "The proposal is ahead of LoRAP", "Table 3", PROPOSAL, "LoRAP, neurons"),
    *_each(_accuracy, "The proposal is ahead of CFSP", "Table 3", PROPOSAL, "CFSP"),
    *_each(_size),
    *_each(_gigabytes),
    Claim("afr", "Inference is faster by 1.10 at 20 % and by 1.57 at 50 %.", "Table 4", "22.98, 20.89 and 14.64 ms per sample",
          range=ABOVE, reason="neither hardware nor batch size is stated; the notebook times a random Llama beside the ideal"),
)  # fmt: skip
