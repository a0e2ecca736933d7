"""LLM-Pruner (Ma et al., arXiv 2305.11627): remove the units whose removal changes the loss least, by a Taylor expansion.

Units are FFN neurons and key-value groups, with everything in the matrices around them that belongs to them. The inner
blocks lose the same share each; the first and last ones stay whole. Fine-tuning, which the paper adds, is not part of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, half_names, head_size
from lib.primitives.calibration import check_calibration
from lib.primitives.checks import COUNTS, FROM_ZERO, check_blocks, check_inplace, check_settings, check_share, choose_one, exact
from lib.primitives.gradients import each_gradient, summed
from lib.primitives.losses import at_least_float32
from lib.primitives.structured import (
    Keep,
    ffn_widths,
    in_order,
    keep_highest,
    kept_count,
    kv_groups,
    remove_groups,
    remove_neurons,
)
from lib.primitives.surgery import shape_shell

# Effect of removing a weight w whose loss gradient is g, with F the mean over sequences of the squared gradient.
#   first: w g; second: w² F; mix: w g - ½ w² F; each by absolute value before the weights of a unit are added.
#   vector: w g, and the absolute value after they are added.
IMPORTANCES = ("first", "second", "mix", "vector")
# Which query heads belong to key-value group i of g: `neighbours`, as in attention, are [i q, (i + 1) q).
# `strided` are i, i + g, i + 2 g, ..., which the reference adds up when it folds the longer score vector.
FOLDS = ("neighbours", "strided")


@dataclass(frozen=True)
class Settings:
    importance: str = "first"  # see IMPORTANCES
    attention: bool = True  # remove key-value groups as well as neurons
    fold: str = "neighbours"  # see FOLDS
    samples: int | None = 10  # used part of the calibration set: 10 x 64 as in the reference script; None for all of it
    length: int | None = 64
    protect: tuple[int, ...] | None = None  # blocks that stay whole; None: the outer ones, see `protected`
    ONLY_WITH: ClassVar = {"fold": ("attention", (True,))}

    def __post_init__(self):
        check_settings(self, importance=IMPORTANCES, fold=FOLDS, samples=COUNTS, length="[2, inf)", protect=FROM_ZERO)


def channel_scores(model: nn.Module, ids: torch.Tensor, names: Sequence[str], importance: str = "first") -> dict[str, list]:
    """Importance of the channels of every named matrix: {name: [rows [out], columns [in]]}, at least float32.

    ids: [samples, length]. One backward pass for each sequence. Their gradients add up to that of the whole batch, from which
    the reference takes the first order; w g is kept in full until then.
    """
    choose_one("importance", importance, IMPORTANCES)
    samples, found = len(ids), {}

    def channels(effect: torch.Tensor) -> list[torch.Tensor]:
        if importance == "vector":
            return [effect.sum(1).abs(), effect.sum(0).abs()]
        return [effect.abs().sum(1), effect.abs().sum(0)]

    def take(_, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        effect = (at_least_float32(weight) * at_least_float32(gradient)).square() / samples
        old = found.get(name, [0.0, 0.0])
        found[name] = [before + new for before, new in zip(old, channels(effect), strict=True)]

    if importance == "second":
        each_gradient(model, ids, names, take)
        return found
    # Terms of either sign meet inside an absolute value, so they are needed in full.
    effects = summed(model, ids, names, "signed")["snip"]
    if importance == "mix":
        for name, square in summed(model, ids, names, "squared")["snip"].items():
            effects[name] -= 0.5 * at_least_float32(model.get_submodule(name).weight.detach()).square() * square
    return {name: channels(effect / samples) for name, effect in effects.items()}


def unit_scores(
    model: nn.Module, ids: torch.Tensor, importance: str = "first", half: str = "mlp", fold: str = "neighbours"
) -> list[torch.Tensor]:
    """Importance [units] of the FFN neurons (half `mlp`) or key-value groups (`attention`) of every block.

    Rows of the readers and columns of the writer, added over the matrices; for attention also over the channels of a head
    and the query heads of a group, see FOLDS.
    """
    choose_one("fold", fold, FOLDS)
    names = [name for part in half_names(model, half) for name in part]
    return per_unit(model, channel_scores(model, ids, names, importance), half, fold)


def per_unit(model: nn.Module, found: dict[str, list], half: str, fold: str = "neighbours") -> list[torch.Tensor]:
    """Importance [units] of every block from that of the channels, see `unit_scores`."""
    blocks = half_names(model, half)
    matrices = [[*(found[name][0] for name in part[:-1]), found[part[-1]][1]] for part in blocks]
    if half == "mlp":
        return [sum(parts[1:], parts[0]) for parts in matrices]
    size = head_size(model.config)

    def per_group(channels: torch.Tensor, groups: int) -> torch.Tensor:
        heads = channels.view(-1, size).sum(1)
        return heads.view(groups, -1).sum(1) if fold == "neighbours" else heads.view(-1, groups).sum(0)

    return [sum(per_group(part, g) for part in parts) for parts, g in zip(matrices, kv_groups(model), strict=True)]


def protected(blocks: int) -> list[int]:
    """The blocks that stay whole: six of 32, rounded to the nearest number, of which a third, rounded too, are the last ones.

    Of 32 blocks these are the reference's 0-3 and 30-31; of 18 there are three (0, 1 and 17), of 8 two (0 and 7).
    """
    total = (12 * blocks + 32) // 64
    last = (2 * total + 3) // 6
    return [*range(total - last), *range(blocks - last, blocks)]


def choose(scores: Sequence[torch.Tensor], ratio: float, protect: Sequence[int] = (), whole: bool = False) -> Keep:
    """Which units stay. whole: round the number of removed units down, not that of kept ones, as the reference does for heads.

    A fifth of 8 groups is then 1, not 2.
    """

    def kept(n: int) -> int:
        return n - int(exact(ratio) * n) if whole else kept_count(n, ratio)

    return [None if block in protect else keep_highest(score, kept(len(score))) for block, score in enumerate(scores)]


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model whose inner blocks lack that share of their neurons and key-value groups) for every ratio.

    All from one set of scores. The given model stays intact, unless `inplace`, which takes one ratio. Blocks end unequal, so a
    result is saved by `lib.models.checkpoint`. Raises ValueError, before any work, for impossible arguments.
    """
    check_calibration(Anatomy(model), ids)
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    groups = kv_groups(model) if settings.attention else []  # raises now if q, k and v are one matrix
    ids, spared = ids[: settings.samples, : settings.length], settings.protect
    spared = protected(len(half_names(model))) if spared is None else spared
    check_blocks(spared, len(half_names(model)))
    for ratio in ratios:
        choose(in_order(ffn_widths(model)), ratio, spared)  # raises now rather than after the gradients
    # One set of backward passes for both halves, although the attention's w g are then kept beside those of the neurons.
    names = [name for half in (("mlp", "attention") if groups else ("mlp",)) for part in half_names(model, half) for name in part]
    channels = channel_scores(model, ids, names, settings.importance)
    neurons = per_unit(model, channels, "mlp")
    heads = per_unit(model, channels, "attention", settings.fold) if groups else []
    for ratio in ratios:
        small = remove_neurons(model, choose(neurons, ratio, spared), inplace=inplace)
        if groups:
            small = remove_groups(small, choose(heads, ratio, spared, whole=True), inplace=True)
        yield ratio, small


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """A model pruned at one ratio; settings: fields of `Settings`."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after a ratio, on the meta device: fewer neurons and groups of heads in all but the outer blocks."""
    spared = protected(len(ffn_widths(model)))
    small = remove_neurons(shape_shell(model), choose(in_order(ffn_widths(model)), ratio, spared), inplace=True)
    return remove_groups(small, choose(in_order(kv_groups(model)), ratio, spared, whole=True), inplace=True)
