"""Rebuild a model layer by layer: measure the inputs of a block's linear layers, replace the layers, walk on.

SparseGPT, Wanda and GPTQ share this walk. All layers of a block are measured in one pass, before any of them is replaced;
the next block then sees what the rebuilt ones hand it. One block's statistics are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, shared_inputs
from lib.primitives.calibration import ResidualStream
from lib.primitives.linalg import Sparsity, add_gram, add_squares, check_sparsity
from lib.primitives.surgery import shell


@dataclass(frozen=True)
class Statistic:
    """What is summed over the inputs x [n, d] of a layer: `add(total, x)` into float64 of shape [d] or [d, d]."""

    order: int
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def zeros(self, d: int, device: torch.device) -> torch.Tensor:
        return torch.zeros([d] * self.order, dtype=torch.float64, device=device)


GRAM = Statistic(2, add_gram)
SQUARES = Statistic(1, add_squares)


def block_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name (for messages) and module of every reader and writer of every block."""
    anatomy = Anatomy(model)
    for i, block in enumerate(anatomy.blocks):
        for names in shared_inputs(anatomy.family):
            for name in names:
                yield f"block {i} {name}", block.get_submodule(name)


def check_prunable(model: nn.Module, sparsity: Sparsity) -> None:
    """Raise ValueError unless every block of the model is made of ordinary linear layers that the sparsity fits."""
    for name, layer in block_layers(model):
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, not an ordinary linear layer: prune the dense model")
        check_sparsity(sparsity, layer.in_features)


@torch.no_grad()
def replace_layers(model: nn.Module, remake: Callable[[nn.Module], nn.Module], inplace: bool = False) -> nn.Module:
    """A model whose readers and writers are `remake(layer)`; no data needed. The given one stays intact unless `inplace`."""
    anatomy = Anatomy(model if inplace else shell(model))
    for block in anatomy.blocks:
        for names in shared_inputs(anatomy.family):
            for name in names:
                block.set_submodule(name, remake(block.get_submodule(name)))
    return anatomy.model


@torch.no_grad()
def rebuild(
    model: nn.Module,
    ids: torch.Tensor,
    statistic: Statistic,
    remake: Callable[[nn.Module, torch.Tensor], nn.Module],
    *,
    mask: torch.Tensor | None = None,
    batch: int = 8,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """A model whose readers and writers are `remake(layer, total)`, with `total` the statistic of the layer's inputs.

    ids: calibration tokens [samples, length]; mask: 1 for real tokens (None: all). The given model stays intact, unless
    `inplace`. Raises ValueError, before any work, for ids or weights that cannot be calibrated on.
    """
    stream = ResidualStream(model if inplace else shell(model), ids, mask, batch)
    blocks = stream.anatomy.blocks
    for i in range(len(blocks)):
        rebuild_block(stream, i, statistic, remake)
        if progress:
            progress(f"rebuilt block {i + 1} of {len(blocks)}")
    return stream.anatomy.model


def rebuild_block(stream: ResidualStream, i: int, statistic: Statistic, remake: Callable) -> None:
    """Measure block i where the stream stands in front of it, replace its layers, and move the stream behind it."""
    block = stream.anatomy.blocks[i]
    for names, total in _measure(stream, i, statistic):
        for name in names:
            block.set_submodule(name, remake(block.get_submodule(name), total))
    stream.advance_block(i)


def _measure(stream: ResidualStream, block: int, statistic: Statistic) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """The statistic of every distinct input of a block, with the names of the layers that share it."""
    totals: dict[str, torch.Tensor] = {}

    def add_to(name: str) -> Callable[[torch.Tensor], None]:
        def add(x: torch.Tensor) -> None:
            if name not in totals:
                totals[name] = statistic.zeros(x.shape[-1], x.device)
            statistic.add(totals[name], x)

        return add

    groups = shared_inputs(stream.anatomy.family)
    stream.observe(block, {names[0]: add_to(names[0]) for names in groups})
    return [(names, totals[names[0]]) for names in groups]
