"""Plain SVD: the nearest low-rank matrix, whatever its inputs are. The baseline of every low-rank method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lib.primitives.low_rank import matrices, sweep_of, uniform_ranks


def sweep(
    model: nn.Module,
    ids: torch.Tensor | None,
    ratios: Sequence[float],
    settings: object = None,
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) with every matrix truncated by its own SVD, which minimises ‖W - W'‖; `ids` and `settings` are not used."""
    plans = [uniform_ranks(model, ratio) for ratio in ratios]
    return sweep_of(model, [([name], None) for name in matrices(model)], ratios, plans, progress, inplace)
