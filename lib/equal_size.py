"""Methods at equal real size: which ratio of its own must a method be given so that a wanted share of the blocks is gone?

A "20 %" is another thing for every method: of directions of the stream, of a matrix's parameters, of neurons, of blocks. What
is left can be counted on shapes alone, before anything is compressed, so the ratio can be searched.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from lib.baselines import flap, llm_pruner, lorap, shortgpt
from lib.papers import comp
from lib.papers.sliced_network import shapes_only, usual_layout
from lib.papers.slicegpt import constant_widths
from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import check_share
from lib.primitives.cost import count
from lib.primitives.low_rank import block_name, replay, uniform_ranks
from lib.primitives.structured import (
    ffn_widths,
    kv_groups,
    remove_blocks,
    remove_groups,
    remove_neurons,
    separate_readers,
    uniform,
)
from lib.primitives.surgery import shape_shell

STEPS = 512  # own ratios are searched in steps of 1/512
ASKED = ("comp", "fpt", "shortgpt")  # their own ratio is that very share; ShortGPT's to the nearest block


def _sliced(model: nn.Module, ratio: float) -> nn.Module:
    return shapes_only(model, constant_widths(model, ratio, round_interval=1), usual_layout(model))


def _low_rank(model: nn.Module, ratio: float) -> nn.Module:
    return replay(shape_shell(model), uniform_ranks(model, ratio)) if ratio else shape_shell(model)


def _in_order(sizes: list[int]) -> list[torch.Tensor]:
    """Scores by which the first units go: which ones they are does not change the count."""
    return [torch.arange(float(n)) for n in sizes]


def _without_neurons(model: nn.Module, ratio: float) -> nn.Module:
    return remove_neurons(shape_shell(model), uniform(_in_order(ffn_widths(model)), ratio), inplace=True)


def _without_units(model: nn.Module, ratio: float) -> nn.Module:
    """LLM-Pruner: neurons and whole groups of heads, the outer blocks spared."""
    spared = llm_pruner.protected(len(ffn_widths(model)))
    small = remove_neurons(shape_shell(model), llm_pruner.choose(_in_order(ffn_widths(model)), ratio, spared), inplace=True)
    return remove_groups(small, llm_pruner.choose(_in_order(kv_groups(model)), ratio, spared, whole=True), inplace=True)


def _without_competing_units(model: nn.Module, ratio: float) -> nn.Module:
    """FLAP: neurons and groups of heads share one budget, and a bias makes up for those of a half that are gone.

    As if both had evenly spread scores. Others change which units go, not how many parameters, to within one unit and the
    biases of halves that lose nothing.
    """
    widths, groups = ffn_widths(model), kv_groups(model)
    kept = flap.choose(model, [torch.arange(n) / n for n in widths], [torch.arange(n) / n for n in groups], ratio)
    shift = torch.zeros(model.config.hidden_size, device="meta")
    small = shape_shell(model)
    for remove, keep, sizes in zip((remove_neurons, remove_groups), kept, (widths, groups), strict=True):
        biases = [None if len(stay) == n else shift for stay, n in zip(keep, sizes, strict=True)]
        small = remove(small, keep, bias=biases, inplace=True)
    return small


def _low_rank_attention_without_neurons(model: nn.Module, ratio: float) -> nn.Module:
    """LoRAP: its own ranks for the four matrices of attention, and every block loses the same share of its neurons."""
    small, anatomy = _without_neurons(model, ratio), Anatomy(model)
    names = [*separate_readers(anatomy), anatomy.family.attention.writer]
    sizes = [tuple(anatomy.blocks[0].get_submodule(name).weight.shape) for name in names]
    ranks = zip(names, lorap.attention_ranks(sizes, ratio), strict=True) if ratio else ()
    found = {name: rank for name, rank in ranks if rank is not None}
    every = {block_name(anatomy.family, i, name): rank for i in range(len(anatomy.blocks)) for name, rank in found.items()}
    return replay(small, every) if every else small


def _without_blocks(model: nn.Module, ratio: float) -> nn.Module:
    return remove_blocks(shape_shell(model), list(range(shortgpt.blocks_for(model, ratio))), inplace=True)


def _without_blocks_and_neurons(model: nn.Module, ratio: float) -> nn.Module:
    """COMP with its defaults: blocks first, neurons of the others for the rest."""
    settings, shape = comp.Settings(), comp.shape_of(model)
    drop = list(range(comp.blocks_to_drop(ratio, len(shape.params), settings.rho)))
    owed = comp.neurons_to_cut(shape, drop, ratio, settings)
    small = remove_blocks(shape_shell(model), drop, inplace=True)
    widths = ffn_widths(small)
    cuts = [owed // len(widths) + (i < owed % len(widths)) for i in range(len(widths))]
    return remove_neurons(small, [torch.arange(n - cut) for n, cut in zip(widths, cuts, strict=True)], inplace=True)


# What a method of `lib.compress.METHODS` makes of a model, as shapes: (model, its own ratio) -> model on the meta device.
SHAPES: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "slicegpt": _sliced,
    "svd-llm": _low_rank,
    "svd": _low_rank,
    "fwsvd": _low_rank,
    "asvd": _low_rank,
    "afr": _without_neurons,
    "wanda-sp": _without_neurons,
    "cfsp": _without_neurons,  # blocks share the cut out among themselves; the sum is the same to within a neuron a block
    "flap": _without_competing_units,
    "lorap": _low_rank_attention_without_neurons,
    "magnitude-neurons": _without_neurons,
    "random-neurons": _without_neurons,
    "llm-pruner": _without_units,
    "comp": _without_blocks_and_neurons,
    "shortgpt": _without_blocks,
}


def own_ratio(method: str, model: nn.Module, removed: float) -> float:
    """The ratio in [0, 1) of `method` that really removes the share `removed` of the blocks' parameters, or nearest to it.

    SliceGPT's shortcuts and norms count; its width and LLM-Pruner's groups change in whole steps, so look at what was reached.
    Raises ValueError for a method whose size the shapes do not tell, and for a share that it cannot reach within 5 points.
    """
    check_share(removed, "the share of the blocks to remove", "0.2 removes a fifth of their parameters")
    if method in ASKED:
        return removed
    if method not in SHAPES:
        raise ValueError(f"the size of {method!r} depends on more than shapes: choose one of {', '.join([*SHAPES, *ASKED])}")
    dense = count(model)
    SHAPES[method](model, 0.0)  # a method that cannot take this model at all says so

    @functools.cache
    def gone(ratio: float) -> float:
        try:
            return count(SHAPES[method](model, ratio)).against(dense)["removed_decoder"]
        except ValueError:  # a layer would be left without any unit
            return math.inf

    d = model.config.hidden_size
    ratios = [1 - k / d for k in range(d, 0, -1)] if method == "slicegpt" else [i / STEPS for i in range(STEPS)]
    i = bisect.bisect_left(ratios, removed, key=gone)
    best = min(ratios[max(i - 1, 0) : i + 1], key=lambda ratio: abs(gone(ratio) - removed))
    if abs(gone(best) - removed) > 0.05:
        raise ValueError(f"{method} cannot remove {removed:.0%} of this model's blocks: {gone(best):.0%} is the nearest")
    return best
