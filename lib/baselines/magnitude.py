"""Magnitude pruning: remove the smallest weights, whatever their inputs. The control that every other rule must beat."""

from __future__ import annotations

import torch
from torch import nn

from lib.layerwise import check_prunable, replace_layers
from lib.linalg import Sparsity, check_sparsity, keep_mask
from lib.surgery import linear


def magnitude_matrix(weight: torch.Tensor, sparsity: Sparsity = (2, 4)) -> torch.Tensor:
    """Set the smallest |w| of a matrix [out, in] to zero: of every m in a row or, for a fraction, of the whole matrix."""
    check_sparsity(sparsity, weight.shape[1])
    keep = keep_mask(weight.abs().reshape(1, -1), sparsity).view_as(weight)
    return weight.masked_fill(~keep, 0)


def prune(model: nn.Module, sparsity: Sparsity = (2, 4), *, inplace: bool = False) -> nn.Module:
    """Prune every linear layer of the blocks by magnitude, without any data.

    Sparsity, result and errors are those of `lib.baselines.sparsegpt.prune`.
    """
    check_prunable(model, sparsity)

    def remake(layer: nn.Linear) -> nn.Linear:
        return linear(magnitude_matrix(layer.weight, sparsity), layer.bias, like=layer.weight)

    return replace_layers(model, remake, inplace)
