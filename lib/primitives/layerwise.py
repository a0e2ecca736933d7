"""Walk over a model block by block: measure the inputs of a block's layers, replace the layers, go on to the next block.

A `Walk` edits a model in memory (`go`), or one whose weights are on disk, a block at a time (`lib.models.disk`).
SparseGPT, Wanda and GPTQ share one, `LayerWalk`: all layers of a block are measured in one pass, before any of them is
replaced, and the next block is measured on the outputs of the rebuilt ones. One block's statistics are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, shared_inputs
from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import check_inplace, check_settings
from lib.primitives.linalg import Sparsity, add_gram, add_squares, check_sparsity, pattern_of, sparsity
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


class Walk:
    """One pass over the blocks of `model`, each of which is edited while the `streams` stand in front of it.

    `note()` returns, in JSON values, what a new walk needs to continue after the first `done` blocks; `recall(note, done)`
    restores it, on shapes.
    """

    model: nn.Module
    streams: list[ResidualStream]
    report: Callable[[str], None] | None = None  # takes what a step has to say

    @property
    def blocks(self) -> int:
        return len(Anatomy(self.model).blocks)

    def approach(self, i: int) -> None:
        """Bring the streams in front of block i, before its weights are loaded."""

    def step(self, i: int) -> None:
        """Edit block i and move the streams behind it."""
        raise NotImplementedError

    def note(self) -> dict:
        return {}

    def recall(self, note: dict, done: int) -> None:
        pass

    def finish(self) -> bool:
        """Describe the finished model; False if all blocks must be walked once more."""
        return True


@torch.no_grad()
def go(walk: Walk, what: str, progress: Callable[[str], None] | None = None) -> nn.Module:
    """Take all steps of a walk in memory; returns its model. what: a word for what is done to a block, such as `pruned`."""
    walk.report = progress
    while True:
        for i in range(walk.blocks):
            walk.approach(i)
            walk.step(i)
            if progress:
                progress(f"{what} block {i + 1} of {walk.blocks}")
        if walk.finish():
            return walk.model


class LayerWalk(Walk):
    """Replaces every reader and writer by `remake(layer, total)`, with `total` the statistic of the layer's inputs."""

    def __init__(self, stream: ResidualStream, statistic: Statistic, remake: Callable[[nn.Module, torch.Tensor], nn.Module]):
        self.model, self.streams = stream.anatomy.model, [stream]
        self.statistic, self.remake = statistic, remake

    def step(self, i: int) -> None:
        [stream] = self.streams
        block = stream.anatomy.blocks[i]
        for names, total in _measure(stream, i, self.statistic):
            for name in names:
                block.set_submodule(name, self.remake(block.get_submodule(name), total))
        if i < self.blocks - 1:  # nobody needs the last block's output
            stream.advance_block(i)


def rebuild(
    model: nn.Module,
    ids: torch.Tensor,
    statistic: Statistic,
    remake: Callable[[nn.Module, torch.Tensor], nn.Module],
    *,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """`LayerWalk` of a model in memory, on calibration tokens ids [samples, length].

    The given model stays intact, unless `inplace`. Raises ValueError, before any work, for ids or weights that cannot be
    calibrated on.
    """
    stream = ResidualStream(model if inplace else shell(model), ids)
    return go(LayerWalk(stream, statistic, remake), "rebuilt", progress)


@dataclass(frozen=True)
class Pattern:
    """Settings of the methods that set weights to zero."""

    pattern: str = ""  # like 2:4, which keeps 2 of 4 consecutive weights; empty: the share given by the ratio

    def __post_init__(self):
        check_settings(self)
        if self.pattern:
            pattern_of(self.pattern)


def pruning(statistic: Statistic, remake: Callable) -> tuple[Callable, Callable, Callable]:
    """(prune, sweep, on_disk) of a method that sets weights of every linear layer of the blocks to zero, block after block.

    remake: (sparsity, layer, statistic of its inputs) -> the pruned layer.
    """

    def prune(
        model: nn.Module, ids: torch.Tensor, sparsity: Sparsity = (2, 4), inplace: bool = False, progress: Callable | None = None
    ) -> nn.Module:
        """The pruned model, on calibration tokens ids [samples, length]; biases, norms, embeddings and head stay.

        sparsity: (n, m) keeps n of m consecutive weights of a row (2:4, 4:8), a fraction removes that share. The result is a
        stock model with zeros. Stored dense, as it is here, it saves no memory and no time: that takes a sparse format and
        kernels for it. The given model stays intact, unless `inplace`. Raises ValueError, before any work, for a sparsity that
        does not fit, for ids that cannot be used and for models that are not dense.
        """
        check_prunable(model, sparsity)
        return rebuild(model, ids, statistic, partial(remake, sparsity), inplace=inplace, progress=progress)

    def sweep(model, ids, ratios, settings=Pattern(), progress=None, inplace=False) -> Iterator[tuple[float, nn.Module]]:
        """(ratio, model with that share of the weights of every matrix at zero) for every ratio."""
        check_inplace(inplace, ratios)
        found = [sparsity(ratio, settings.pattern) for ratio in ratios]
        return ((ratio, prune(model, ids, share, inplace, progress)) for ratio, share in zip(ratios, found, strict=True))

    def on_disk(model, ids, ratio, settings, note) -> LayerWalk:
        share = sparsity(ratio, settings.pattern)
        check_prunable(model, share)
        return LayerWalk(ResidualStream(model, ids), statistic, partial(remake, share))

    return prune, sweep, on_disk


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
