"""Unstructured gradient scores: SNIP (Lee et al., ICLR 2019), ReFer and AFR (Nitta et al., 2024 and 2025).

Single FFN weights with small |θ ∂/∂θ| of the loss (SNIP), of the features' singular values (ReFer), or of both, standardised
and added (AFR), become zero under one threshold for the whole model. Nothing gets smaller or faster; Structured
AFR starts from these scores, and they are its upper reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.papers.afr import standardise
from lib.primitives.anatomy import half_names
from lib.primitives.gradients import summed
from lib.primitives.linalg import check_sparsity, keep_mask
from lib.primitives.surgery import linear, shell


def weight_scores(model: nn.Module, ids: torch.Tensor, scores: Sequence[str] = ("refer", "snip"), **passes) -> list[torch.Tensor]:
    """The score [out, in] of every FFN matrix, block by block: Σ over sequences of |W g|, standardised over all of them, added.

    passes: fields of `lib.primitives.gradients.Passes`. Memory: one float32 copy of the FFN weights for each score.
    """
    names = [name for part in half_names(model) for name in part]
    found = summed(model, ids, names, "absolute", scores=scores, **passes)
    standard = [standardise([maps[name] for name in names]) for maps in found.values()]
    return [sum(parts[1:], parts[0]) for parts in zip(*standard, strict=True)]


@torch.no_grad()
def zero_lowest(model: nn.Module, scores: Sequence[torch.Tensor], ratio: float, *, inplace: bool = False) -> nn.Module:
    """A model with the share `ratio` of its FFN weights at zero that score lowest over all matrices; of equals the later ones."""
    check_sparsity(float(ratio), 1)
    names = [name for part in half_names(model) for name in part]
    stays = keep_mask(torch.cat([score.flatten() for score in scores])[None], float(ratio))[0]
    small = model if inplace else shell(model)
    for name, keep in zip(names, stays.split([score.numel() for score in scores]), strict=True):
        layer = small.get_submodule(name)
        weight = layer.weight.masked_fill(~keep.view_as(layer.weight).to(layer.weight.device), 0)
        small.set_submodule(name, linear(weight, layer.bias, like=layer.weight))
    return small


def prune(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    *,
    scores: Sequence[str] = ("refer", "snip"),
    inplace: bool = False,
    progress: Callable | None = None,
    **passes,
) -> nn.Module:
    """Zero a share of the FFN weights by AFR, or by one of its parts alone: scores ("snip",) or ("refer",).

    One threshold can empty a layer, a known weakness of SNIP. Raises ValueError, before any long work, for a ratio outside
    [0, 1) and for arguments that `lib.primitives.gradients.each_gradient` rejects.
    """
    check_sparsity(float(ratio), 1)
    found = weight_scores(model, ids, scores, progress=progress, **passes)
    return zero_lowest(model, found, ratio, inplace=inplace)
