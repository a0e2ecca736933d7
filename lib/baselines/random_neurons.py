"""Remove FFN neurons drawn at random: the control that a score has to beat. Run several seeds and report the spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.checks import FROM_ZERO, check_inplace, check_settings
from lib.primitives.structured import ffn_widths, remove_neurons, uniform


def scores(model: nn.Module, generator: torch.Generator) -> list[torch.Tensor]:
    """A random score for every neuron, [f] of each block."""
    return [torch.rand(f, generator=generator, dtype=torch.float64) for f in ffn_widths(model)]


@dataclass(frozen=True)
class Settings:
    seed: int = 0  # of the draw

    def __post_init__(self):
        check_settings(self, seed=FROM_ZERO)


def sweep(
    model: nn.Module,
    ids: torch.Tensor | None,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the neurons of every block, at random); a lower ratio keeps what a higher one keeps."""
    check_inplace(inplace, ratios)
    found = scores(model, torch.Generator().manual_seed(settings.seed))
    for ratio in ratios:
        yield ratio, remove_neurons(model, uniform(found, ratio), inplace=inplace)
