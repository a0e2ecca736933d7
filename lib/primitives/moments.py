"""Statistics of activations for the forward-only rules: mean and mean square of every channel, and turning angles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.calibration import ResidualStream

CHUNK = 256  # rows that are in float64 at once


@dataclass
class Moments:
    """Mean [n] and mean square [n] of each channel of the inputs of one layer, over all tokens, in float64."""

    mean: torch.Tensor
    square: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        return (self.square - self.mean.square()).clamp(min=0)


def measure(
    stream: ResidualStream,
    block: int,
    names: Sequence[str],
    advance: bool = False,
    moved: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, Moments]:
    """Moments of the inputs of some layers of a block, by name; `advance` and `moved` as in `ResidualStream.observe`."""
    module, sums = stream.anatomy.blocks[block], {}

    def add_to(sum_: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(x: torch.Tensor) -> None:
            for chunk in x.split(CHUNK):
                chunk = chunk.to(torch.float64, copy=True)
                sum_[0] += chunk.sum(0)
                sum_[1] += chunk.square_().sum(0)

        return add

    for name in names:
        features = module.get_submodule(name).in_features
        sums[name] = torch.zeros(2, features, dtype=torch.float64, device=stream.device)
    stream.observe(block, {name: add_to(sum_) for name, sum_ in sums.items()}, advance, moved=moved)
    return {name: Moments(*(sum_ / stream.ids.numel())) for name, sum_ in sums.items()}


def walk(model: nn.Module, ids: torch.Tensor, names: Sequence[str]) -> Iterator[dict[str, Moments]]:
    """`measure` of every block of the dense model in turn."""
    stream = ResidualStream(model, ids)
    last = len(stream.anatomy.blocks) - 1
    for block in range(last + 1):
        yield measure(stream, block, names, advance=block < last)  # nobody needs the last block's output


@torch.no_grad()
def turning_angles(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Angle of every token [...] between the residual stream before and after a block, as a share of π. Both: [..., d]."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
    return cosine.arccos() / math.pi
