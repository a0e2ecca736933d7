"""Wanda (Sun et al., arXiv 2306.11695): remove the weights of small |w| times the size of their input. No repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import check_inplace, exact
from lib.primitives.layerwise import SQUARES, pruning
from lib.primitives.linalg import Sparsity, check_sparsity, keep_mask
from lib.primitives.moments import walk
from lib.primitives.structured import ffn_widths, in_order, keep_highest, kv_groups, remove_groups, remove_neurons, uniform
from lib.primitives.surgery import linear, shape_shell


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


# --- whole units (Wanda-sp) ----------------------------------------------------------------------------------------------
#
# Wanda's score, averaged over the outputs of the writer. FLAP's authors, who introduced it as a baseline, remove heads and
# neurons; CFSP's compare with neurons alone. Both take the same share of every block.


def wanda_sp_scores(writer: torch.Tensor, squared_norms: torch.Tensor) -> torch.Tensor:
    """mean_i |W_ij| ‖X_j‖ of each input channel, [n]. writer: [d, n]; squared_norms: ‖X_j‖² [n], up to a common factor."""
    return writer.double().abs().mean(0) * squared_norms.double().sqrt()


def neuron_scores(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """`wanda_sp_scores` of every block of the dense model, which serve every ratio."""
    return unit_scores(model, ids, attention=False)[0]


def unit_scores(model: nn.Module, ids: torch.Tensor, attention: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores of the neurons [f] and the key-value groups [g] of every block of the dense model, which serve every ratio.

    A group's is the sum over the channels of its query heads; the reference scores single heads. Without `attention` the second
    list is empty.
    """
    anatomy, neurons, groups = Anatomy(model), [], []
    mlp, heads = anatomy.family.mlp.writer, anatomy.family.attention.writer
    sizes = kv_groups(model) if attention else []
    for i, moments in enumerate(walk(model, ids, [mlp, heads] if attention else [mlp])):
        found = {
            name: wanda_sp_scores(anatomy.blocks[i].get_submodule(name).weight.detach(), of.square)
            for name, of in moments.items()
        }
        neurons.append(found[mlp])
        if attention:
            groups.append(found[heads].view(sizes[i], -1).sum(1))
    return neurons, groups


def sweep_neurons(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: object = None,
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the neurons of every block by Wanda-sp) for every ratio, from one pass.

    Heads stay, as in CFSP's comparison. ids: [samples, tokens]; there are no settings. Raises ValueError, before any work, for a
    ratio outside [0, 1).
    """
    check_inplace(inplace, ratios)
    for ratio in ratios:
        uniform(in_order(ffn_widths(model)), ratio)  # raises now rather than after the pass
    found = neuron_scores(model, ids)
    for ratio in ratios:
        yield ratio, remove_neurons(model, uniform(found, ratio), inplace=inplace)


def kept_groups(scores: Sequence[torch.Tensor], ratio: float) -> list[torch.Tensor]:
    """Which key-value groups of every block stay. As in the reference the number removed is rounded down, so one stays."""
    return [keep_highest(score, len(score) - int(exact(ratio) * len(score))) for score in scores]


def sweep_units(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: object = None,
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the neurons and of the key-value groups of every block) for every ratio, from one pass.

    The published Wanda-sp. Arguments and errors as for `sweep_neurons`, and ValueError where q, k and v are one matrix.
    """
    check_inplace(inplace, ratios)
    for ratio in ratios:
        shape(model, ratio)  # raises now rather than after the pass
    neurons, groups = unit_scores(model, ids)
    for ratio in ratios:
        small = remove_neurons(model, uniform(neurons, ratio), inplace=inplace)
        yield ratio, remove_groups(small, kept_groups(groups, ratio), inplace=True)


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after a ratio of `sweep_units`, on the meta device."""
    small = remove_neurons(shape_shell(model), uniform(in_order(ffn_widths(model)), ratio), inplace=True)
    return remove_groups(small, kept_groups(in_order(kv_groups(model)), ratio), inplace=True)
