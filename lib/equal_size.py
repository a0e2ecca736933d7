"""Methods at equal real size: the ratio at which a method really removes a wanted share of the blocks.

"20 %" means something else for every method: of directions of the stream, of a matrix's parameters, of neurons, of blocks. The
size can be counted on shapes alone, before anything is compressed, so the ratio can be searched.
"""

from __future__ import annotations

import bisect
import functools
import math

from torch import nn

from lib.methods import METHODS, OF_BLOCKS, OF_STREAM, Method, method_named
from lib.primitives.checks import check_share
from lib.primitives.cost import count

STEPS = 512  # ratios are searched in steps of 1/512


def ratios_of(method: Method, model: nn.Module) -> list[float]:
    """The ratios among which a method's is searched, ascending: every width of the stream, or steps of 1 / `STEPS`."""
    d = model.config.hidden_size
    return [1 - k / d for k in range(d, 0, -1)] if method.ratio == OF_STREAM else [i / STEPS for i in range(STEPS)]


def own_ratio(name: str, model: nn.Module, removed: float) -> float:
    """The ratio in [0, 1) of a method that really removes the share `removed` of the blocks' parameters, or nearest to it.

    SliceGPT's shortcuts and norms count; its width and LLM-Pruner's groups change in whole steps, so check the size that was
    reached. Raises ValueError for a method without `shape`, and for a share that it cannot reach within 5 points.
    """
    method = method_named(name)
    check_share(removed, "the share of the blocks to remove", "0.2 removes a fifth of their parameters")
    if method.ratio == OF_BLOCKS:
        return removed
    if method.shape is None:
        known = ", ".join(m.name for m in METHODS.values() if m.shape or m.ratio == OF_BLOCKS)
        raise ValueError(f"the size of {name!r} depends on more than shapes: choose one of {known}")
    dense = count(model)
    method.shape(model, 0.0)  # raises ValueError now if the method does not support this model

    @functools.cache
    def gone(ratio: float) -> float:
        try:
            return count(method.shape(model, ratio)).against(dense)["removed_decoder"]
        except ValueError:  # a layer would be left without any unit
            return math.inf

    ratios = ratios_of(method, model)
    i = bisect.bisect_left(ratios, removed, key=gone)
    best = min(ratios[max(i - 1, 0) : i + 1], key=lambda ratio: abs(gone(ratio) - removed))
    if abs(gone(best) - removed) > 0.05:
        raise ValueError(f"{name} cannot remove {removed:.0%} of this model's blocks: {gone(best):.0%} is the nearest")
    return best
