"""Wanda (Sun et al., arXiv 2306.11695): remove the weights of small |w| times the size of their input. No repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.layerwise import SQUARES, pruning
from lib.primitives.linalg import Sparsity, check_sparsity, keep_mask
from lib.primitives.moments import walk
from lib.primitives.structured import ffn_widths, in_order, remove_neurons, uniform
from lib.primitives.surgery import linear


def wanda_matrix(weight: torch.Tensor, squared_norms: torch.Tensor, sparsity: Sparsity = (2, 4)) -> torch.Tensor:
    """Set the lowest-scoring weights of every row of a matrix [out, in] to zero; scores S_ij = |W_ij| ‖X_j‖ (equation 1).

    squared_norms: ‖X_j‖² [in], up to a common factor. Weights compete only with those of their row, every m or, for a
    fraction, all of it: the comparison group that the paper found to matter (section 3).
    """
    check_sparsity(sparsity, weight.shape[1])
    scores = weight.double().abs() * squared_norms.double().sqrt()
    return weight.masked_fill(~keep_mask(scores, sparsity), 0)


def remake(sparsity: Sparsity, layer: nn.Linear, squared_norms: torch.Tensor) -> nn.Linear:
    """A linear layer pruned for inputs of the given statistic."""
    return linear(wanda_matrix(layer.weight, squared_norms, sparsity), layer.bias, like=layer.weight)


# Only one number per input channel is accumulated, so this runs where a Gram matrix would not fit.
prune, sweep, on_disk = pruning(SQUARES, remake)


# --- whole neurons (Wanda-sp) --------------------------------------------------------------------------------------------


def wanda_sp_scores(writer: torch.Tensor, squared_norms: torch.Tensor) -> torch.Tensor:
    """mean_i |W_ij| ‖X_j‖ of each neuron, [f]. writer: [d, f]; squared_norms: ‖X_j‖² [f], up to a common factor."""
    return writer.double().abs().mean(0) * squared_norms.double().sqrt()


def neuron_scores(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """`wanda_sp_scores` of every block of the dense model, which serve every ratio."""
    anatomy = Anatomy(model)
    name = anatomy.family.mlp.writer
    statistics = walk(model, ids, [name])
    return [
        wanda_sp_scores(block.get_submodule(name).weight.detach(), moments[name].square)
        for block, moments in zip(anatomy.blocks, statistics, strict=True)
    ]


def sweep_neurons(
    model: nn.Module, ids: torch.Tensor, ratios: Sequence[float], settings: object = None, progress: Callable | None = None
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the neurons of every block by Wanda-sp) for every ratio, from one pass.

    ids: [samples, tokens]; there are no settings. Raises ValueError, before any work, for a ratio outside [0, 1).
    """
    for ratio in ratios:
        uniform(in_order(ffn_widths(model)), ratio)  # raises now rather than after the pass
    found = neuron_scores(model, ids)
    for ratio in ratios:
        yield ratio, remove_neurons(model, uniform(found, ratio))
