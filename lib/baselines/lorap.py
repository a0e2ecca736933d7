"""LoRAP (Li et al., arXiv 2404.09695): attention matrices become low rank, MLPs lose neurons.

Attention is truncated after its input channels are weighed by their norms (AWSVD); values and outputs get three times the
parameters of queries and keys. Neurons are scored without gradients; the least important 1 % stay, because the authors found
them to matter. Block after block: each is measured on the outputs of the compressed ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import check_inplace, check_settings, exact, kept_share
from lib.primitives.low_rank import block_name, factored, put, rank_for, replay
from lib.primitives.moments import measure
from lib.primitives.structured import cut_neurons, describe, ffn_widths, kept_count, separate_readers, shape_without_neurons
from lib.primitives.surgery import shell

SPARED = 0.01


@dataclass(frozen=True)
class Settings:
    mlp_only: bool = False  # attention stays dense

    def __post_init__(self):
        check_settings(self)


def neuron_scores(
    readers: Sequence[torch.Tensor], writer: torch.Tensor, inputs: torch.Tensor, activations: torch.Tensor
) -> torch.Tensor:
    """Σ_readers ‖W_j: c‖ + ‖W_d,:j‖ c_j, [f]. readers: [f, d]; writer: [d, f]; mean squares of inputs [d], activations [f]."""
    across = sum((reader.double().square() @ inputs.double()).sqrt() for reader in readers)
    return across + writer.double().norm(dim=0) * activations.double().sqrt()


def keep(scores: torch.Tensor, ratio: float, spared: float = SPARED) -> torch.Tensor:
    """Sorted indices of the neurons that stay, by scores [f]: the lowest are removed, except the very lowest share `spared`."""
    f = len(scores)
    removed = f - kept_count(f, ratio)
    first = min(int(exact(spared) * f), f - removed)
    order = scores.argsort(stable=True)
    return torch.cat([order[:first], order[first + removed :]]).sort().values


def attention_shares(ratio: float) -> tuple[float, float]:
    """Shares of the parameters that (queries, keys) and (values, outputs) keep, 1 : 3, and (2 q - 1) : 1 where 1.5 q passes 1."""
    q = kept_share(ratio)
    wide = min(Fraction(1), Fraction(3, 2) * q)
    return float(2 * q - wide), float(wide)


def attention_ranks(sizes: Sequence[tuple[int, int]], ratio: float) -> list[int | None]:
    """Ranks of q, k, v and o from their sizes (m, n); None stays dense. Each is a share of the matrix's own break-even rank.

    The authors' rule assumes square matrices: with grouped queries a key matrix could grow.
    """
    narrow, wide = attention_shares(ratio)
    shares = (narrow, narrow, wide, wide)
    return [None if share == 1 else rank_for(m, n, 1 - share) for (m, n), share in zip(sizes, shares, strict=True)]


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of its neurons and, unless `mlp_only`, of the parameters of attention); a pass for each.

    Raises ValueError, before any work, for a ratio that leaves no rank or no neuron, and for ids that cannot be used.
    """
    check_inplace(inplace, ratios)
    for ratio in ratios:
        for width in ffn_widths(model):
            kept_count(width, ratio)
    return ((ratio, _compress(model if inplace else shell(model), ids, ratio, settings.mlp_only)) for ratio in ratios)


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """Remove one share; settings: fields of `Settings`. The given model stays intact."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]


@torch.no_grad()
def _compress(model: nn.Module, ids: torch.Tensor, ratio: float, mlp_only: bool) -> nn.Module:
    """The given model, compressed in place."""
    stream = ResidualStream(model, ids)
    anatomy, layers = stream.anatomy, {}
    mlp, attention = anatomy.family.mlp, anatomy.family.attention
    names = [] if mlp_only or ratio == 0 else [*separate_readers(anatomy), attention.writer]
    plans = [
        attention_ranks([tuple(block.get_submodule(name).weight.shape) for name in names], ratio) if names else []
        for block in anatomy.blocks
    ]
    for i, block in enumerate(anatomy.blocks):
        # 1. Measure the block as it is, behind the compressed ones.
        inputs = [mlp.readers[0], mlp.writer, *([names[0], names[-1]] if names else [])]
        moments = measure(stream, i, inputs)
        # 2. Cut neurons.
        weights = [block.get_submodule(name).weight.detach() for name in (*mlp.readers, mlp.writer)]
        found = neuron_scores(weights[:-1], weights[-1], moments[mlp.readers[0]].square, moments[mlp.writer].square)
        cut_neurons(anatomy, block, keep(found, ratio))
        # 3. Truncate attention, and go on to the next block.
        for name, rank in zip(names, plans[i], strict=True):
            if rank is not None:
                root = moments[name if name == attention.writer else names[0]].square.sqrt()
                layer = factored(block.get_submodule(name), root, rank)
                layers[block_name(anatomy.family, i, name)] = layer
                block.set_submodule(name, layer)
        if i < len(anatomy.blocks) - 1:  # nobody needs the last block's output
            stream.advance_block(i)
    return put(describe(anatomy.model), layers)


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after a ratio, on the meta device: ranks of the four matrices of attention, and equal widths of all blocks."""
    small, anatomy = shape_without_neurons(model, ratio), Anatomy(model)
    names = [*separate_readers(anatomy), anatomy.family.attention.writer]
    sizes = [tuple(anatomy.blocks[0].get_submodule(name).weight.shape) for name in names]
    ranks = zip(names, attention_ranks(sizes, ratio), strict=True) if ratio else ()
    found = {name: rank for name, rank in ranks if rank is not None}
    every = {block_name(anatomy.family, i, name): rank for i in range(len(anatomy.blocks)) for name, rank in found.items()}
    return replay(small, every) if every else small
