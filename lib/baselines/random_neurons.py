"""Remove FFN neurons drawn at random: the control that a score has to beat. Run several seeds and report the spread."""

from __future__ import annotations

import torch
from torch import nn

from lib.primitives.structured import ffn_widths, remove_neurons, uniform


def scores(model: nn.Module, generator: torch.Generator) -> list[torch.Tensor]:
    """A random score for every neuron, [f] of each block."""
    return [torch.rand(f, generator=generator, dtype=torch.float64) for f in ffn_widths(model)]


def prune(model: nn.Module, ratio: float, generator: torch.Generator) -> nn.Module:
    """Remove the same share of the neurons of every block, at random. Raises ValueError for a ratio outside [0, 1)."""
    return remove_neurons(model, uniform(scores(model, generator), ratio))
