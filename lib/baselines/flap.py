"""FLAP (An et al., arXiv 2312.11983): remove channels that hardly fluctuate, and put their mean into a bias.

A channel that is always near its mean can be replaced by the mean, at a loss of Var(x_j) ‖W_:j‖² (WIFV). Scores are
standardised in each block, so that heads and neurons of all blocks compete for one budget of parameters (AL-AM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import check_inplace, check_settings, kept_share
from lib.primitives.moments import walk
from lib.primitives.structured import (
    channels,
    ffn_widths,
    group_params,
    in_order,
    kv_groups,
    neuron_params,
    remove_groups,
    remove_neurons,
)
from lib.primitives.surgery import shape_shell


@dataclass(frozen=True)
class Settings:
    attention: bool = True  # key-value groups compete too; False: neurons only
    compensate: bool = True  # add the mean of the removed channels as a bias

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Scores:
    """Neuron scores [f] and activation means [f] of every block; the same of key-value groups, [g] and [channels]."""

    neurons: list[torch.Tensor]
    means: list[torch.Tensor]
    groups: list[torch.Tensor]  # empty where attention is not touched
    group_means: list[torch.Tensor]


def fluctuation(variance: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """WIFV [n]: variance of each input channel [n] times the squared norm of its column of the writer [d, n]."""
    return variance.double() * writer.double().square().sum(0)


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1; zeros where all scores are equal."""
    deviation = scores.std(correction=0)
    return (scores - scores.mean()) / torch.where(deviation > 0, deviation, 1)


def group_scores(fluctuations: torch.Tensor, groups: int) -> torch.Tensor:
    """Scores [groups] of attention from those of its channels. Squared once more, as the released code does."""
    return standardised(fluctuations.square()).view(groups, -1).mean(1)


def scores(model: nn.Module, ids: torch.Tensor, *, attention: bool = True) -> Scores:
    """Scores and means of the dense model, which serve every ratio. `attention` includes key-value groups."""
    anatomy = Anatomy(model)
    mlp, other = anatomy.family.mlp.writer, anatomy.family.attention.writer
    sizes, found = kv_groups(model) if attention else [], Scores([], [], [], [])
    for i, moments in enumerate(walk(model, ids, [mlp, other] if attention else [mlp])):
        block = anatomy.blocks[i]
        found.neurons.append(standardised(fluctuation(moments[mlp].variance, block.get_submodule(mlp).weight.detach())))
        found.means.append(moments[mlp].mean)
        if attention:
            loss = fluctuation(moments[other].variance, block.get_submodule(other).weight.detach())
            found.groups.append(group_scores(loss, sizes[i]))
            found.group_means.append(moments[other].mean)
    return found


def allocate(scores: Sequence[torch.Tensor], costs: Sequence[int], ratio: float) -> list[torch.Tensor]:
    """Which units of each list stay: the highest scores of all lists while the parameters fit, at least one unit a list.

    costs: parameters of one unit of each list. The units kept hold at most 1 - ratio of all parameters, and less than one
    unit below it. Raises ValueError where that leaves no unit for some list.
    """
    sizes = [len(score) for score in scores]
    pooled = torch.cat([score.double().cpu() for score in scores])
    if not torch.isfinite(pooled).all():
        raise ValueError("scores hold NaN or infinity: check the weights and the calibration text")
    cost = torch.cat([torch.full((n,), c) for n, c in zip(sizes, costs, strict=True)])
    budget = int(kept_share(ratio) * int(cost.sum()))
    if sum(costs) > budget:
        raise ValueError(f"removing {ratio:.0%} cannot leave one unit in every block: use a lower ratio")
    best = torch.cat([torch.arange(n) == score.argmax().cpu() for n, score in zip(sizes, scores, strict=True)])
    order = torch.where(best, torch.inf, pooled).argsort(descending=True, stable=True)
    stays = torch.zeros(len(pooled), dtype=torch.bool)
    stays[order[cost[order].cumsum(0) <= budget]] = True
    return [part.nonzero()[:, 0] for part in stays.split(sizes)]


def choose(
    model: nn.Module, neurons: Sequence[torch.Tensor], groups: Sequence[torch.Tensor], ratio: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Which neurons and which key-value groups of every block stay, from their scores; `groups` empty: neurons alone compete."""
    costs = [neuron_params(model)] * len(neurons) + ([group_params(model)] * len(groups) if groups else [])
    kept = allocate([*neurons, *groups], costs, ratio)
    return kept[: len(neurons)], kept[len(neurons) :]


def compensation(writer: torch.Tensor, means: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Mean contribution [d] of the removed channels, for a writer [d, n], means [n] and the indices that stay."""
    gone = torch.ones(len(means), dtype=torch.bool, device=means.device)
    gone[keep.to(means.device)] = False
    return writer.double()[:, gone] @ means[gone]


@torch.no_grad()
def cut(model: nn.Module, found: Scores, ratio: float, *, compensate: bool = True, inplace: bool = False) -> nn.Module:
    """The model without a share of the parameters of its neurons (and groups, if they are scored), from known scores.

    The given model stays intact, unless `inplace`.
    """
    anatomy = Anatomy(model)
    neurons, groups = choose(model, found.neurons, found.groups, ratio)

    def biases(writer: str, means: list[torch.Tensor], stay: list[torch.Tensor]) -> list[torch.Tensor | None]:
        if not compensate:
            return []
        return [
            None if len(keep) == len(mean) else compensation(block.get_submodule(writer).weight, mean, keep)
            for block, mean, keep in zip(anatomy.blocks, means, stay, strict=True)
        ]

    shifts = biases(anatomy.family.mlp.writer, found.means, neurons)
    smaller = remove_neurons(model, neurons, bias=shifts, inplace=inplace)
    if not groups:
        return smaller
    sizes = [len(mean) // len(score) for mean, score in zip(found.group_means, found.groups, strict=True)]
    wide = [channels(keep, size) for keep, size in zip(groups, sizes, strict=True)]
    shifts = biases(anatomy.family.attention.writer, found.group_means, wide)
    return remove_groups(smaller, groups, bias=shifts, inplace=True)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the parameters of neurons and key-value groups) for every ratio, from one pass.

    Least fluctuation goes first, with bias compensation. ratio: of the parameters of the units that compete. Raises ValueError,
    before any work, for a ratio outside [0, 1) and for ids that cannot be used.
    """
    check_inplace(inplace, ratios)
    units = in_order(ffn_widths(model)), in_order(kv_groups(model)) if settings.attention else []
    for ratio in ratios:
        choose(model, *units, ratio)  # raises now rather than after the pass
    found = scores(model, ids, attention=settings.attention)
    for ratio in ratios:
        yield ratio, cut(model, found, ratio, compensate=settings.compensate, inplace=inplace)


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """Remove one share; settings: fields of `Settings`."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after a ratio, on the meta device, as if both kinds of units had evenly spread scores.

    Other scores change which units go, not how many parameters, to within one unit and the biases of halves that lose nothing.
    """
    widths, groups = ffn_widths(model), kv_groups(model)
    kept = choose(model, [torch.arange(n) / n for n in widths], [torch.arange(n) / n for n in groups], ratio)
    shift = torch.zeros(model.config.hidden_size, device="meta")
    small = shape_shell(model)
    for remove, keep, sizes in zip((remove_neurons, remove_groups), kept, (widths, groups), strict=True):
        biases = [None if len(stay) == n else shift for stay, n in zip(keep, sizes, strict=True)]
        small = remove(small, keep, bias=biases, inplace=True)
    return small
