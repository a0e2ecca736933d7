"""Budgets as people have them, parameters, bytes or a share of the model, and the ratio of a method that keeps to one.

Sizes are counted on shapes, of the very file that will be written, so the ratio is found before anything is compressed.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.equal_size import ratios_of
from lib.methods import OF_WEIGHTS, method_named
from lib.models.gguf_export import FileSize
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
ATTEMPTS = 4  # at a model that is within its budget, each at a higher ratio


@dataclass(frozen=True)
class Budget:
    """The most that a compressed model may have. of: `params`, `bytes`, or `share` of the dense model's parameters.

    file: the matrices' type in the GGUF file whose bytes count (`lib.models.gguf_export.DTYPES`); empty for the bytes of all
    parameters, as `invoke compress` saves them.
    """

    of: str
    most: float
    file: str = ""

    def size_of(
        self, dense: nn.Module, folder: str | Path, name: str, stored: torch.dtype | None = None
    ) -> Callable[[nn.Module], float]:
        """The measure of this budget on models made from `dense`.

        folder: of its tokenizer; name: of the result's folder; stored: the type of the numbers that are saved, where it is not
        that of the models that are measured.
        """
        if self.of == "bytes" and self.file:
            return FileSize(folder, name, self.file)
        whole, share = count(dense).params, (stored or dense.dtype).itemsize / dense.dtype.itemsize
        return {
            "params": lambda model: count(model).params,
            "bytes": lambda model: count(model).bytes * share,
            "share": lambda model: count(model).params / whole,
        }[self.of]

    def said(self, size: float) -> str:
        """A size in the words of this budget."""
        if self.of == "bytes":
            return f"{size / 1e6:,.1f} MB" + (f" in {self.file}" if self.file else "")
        return f"{size:,.0f} parameters" if self.of == "params" else f"{size:.1%} of the parameters"


def cache_bytes(model: nn.Module) -> int:
    """Bytes of keys and values that a model keeps for each token of its context, in its own type; meta tensors suffice."""
    anatomy = Anatomy(model)
    readers = anatomy.family.attention.readers
    kept = [[block.get_submodule(name).out_features for name in readers] for block in anatomy.blocks]
    # Where queries, keys and values are one matrix, a third of its outputs each.
    numbers = sum(sum(sizes[1:]) if len(sizes) == 3 else sizes[0] * 2 // 3 for sizes in kept)
    return numbers * model.dtype.itemsize


def quantity(text: str) -> float:
    """A number with a unit: 80MB, 100M, 1.5 G, 512MiB, 0.3 or 30%. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|[KMG]?I?)B?\s*", text.upper())
    if not found or (found[2] not in UNITS and found[2] != "%"):
        raise ValueError(f"{text!r} is no size: write it like 80MB, 100M, 1.5G, 0.3 or 30%")
    return float(found[1]) * (0.01 if found[2] == "%" else UNITS[found[2]])


def fitting_ratio(name: str, model: nn.Module, budget: Budget, size: Callable[[nn.Module], float], settings: object) -> float:
    """The lowest ratio of a method at which `size` of the result is within the budget.

    model: dense, meta tensors suffice. Where data decide which block loses how much, the shape is one of the same size. Raises
    ValueError for a method whose size depends on more than shapes, for a budget that the dense model keeps to already, for one
    that the method cannot reach, with the smallest size that it can, and, as `size` does, for what no file can hold.
    """
    method = method_named(name)
    if method.ratio == OF_WEIGHTS:
        raise ValueError(
            f"{name} only sets weights to zero, and its zeros are stored like other numbers: its result is as large as the dense "
            "model at any ratio, so a smaller one takes another method"
        )
    if method.shape is None:
        raise ValueError(f"the size that {name} leaves is known only afterwards: `invoke compress` takes it with a ratio alone")
    if (dense := size(model)) <= budget.most:
        raise ValueError(f"the dense model has {budget.said(dense)} and is within the budget of {budget.said(budget.most)}")
    method.shape(model, 0.0, settings)  # raises where the method cannot work on this model at all

    refused: dict[float, ValueError] = {}

    @functools.cache
    def at(ratio: float) -> float:
        try:
            small = method.shape(model, ratio, settings)
        except ValueError:  # a layer would be left without any unit
            return -math.inf
        try:
            return size(small)
        except ValueError as reason:  # no file can hold it
            refused[ratio] = reason
            return -math.inf

    ratios = ratios_of(method, model)
    i = bisect.bisect_left(ratios, True, key=lambda ratio: at(ratio) <= budget.most)
    if i < len(ratios) and ratios[i] in refused:
        raise refused[ratios[i]]
    if i == len(ratios) or at(ratios[i]) == -math.inf:
        last = bisect.bisect_left(ratios, True, key=lambda ratio: at(ratio) == -math.inf) - 1
        least, most = budget.said(at(ratios[last])), budget.said(budget.most)
        raise ValueError(f"{name} leaves at least {least} of this model, and the budget is {most}")
    return ratios[i]


def made_within(
    name: str,
    model: nn.Module,
    budget: Budget,
    size: Callable[[nn.Module], float],
    settings: object,
    ratio: float,
    make_at: Callable[[float], nn.Module],
) -> tuple[float, nn.Module]:
    """(ratio, model): what a method makes at a ratio, or at a higher one while that is more than the budget.

    Where data decide which block loses how much, a result can be larger than the one of equal blocks that `fitting_ratio` counts.
    model: dense, meta tensors suffice. What is more than the budget in the last of `ATTEMPTS`, or where no ratio is higher, is
    returned as it is.
    """
    dense, step = size(model), 0.0
    for _ in range(ATTEMPTS - 1):
        small = make_at(ratio)
        found = size(small)
        if found <= budget.most:
            return ratio, small
        # Higher in proportion to the overrun, and never by less than before: rows are filled up, so sizes change in steps.
        step = max(step, ratio * (found - budget.most) / (dense - found) if found < dense else 0.0)
        higher = next((other for other in ratios_of(method_named(name), model) if other > ratio and other >= ratio + step), None)
        if higher is None or not _exists(name, model, higher, settings):
            return ratio, small
        del small  # before the next one is made
        ratio, step = higher, higher - ratio
    return ratio, make_at(ratio)


def _exists(name: str, model: nn.Module, ratio: float, settings: object) -> bool:
    """Whether a ratio leaves some of every layer."""
    try:
        method_named(name).shape(model, ratio, settings)
    except ValueError:
        return False
    return True
