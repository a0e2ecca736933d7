"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune a matrix so that its outputs on real inputs change least.

Columns are fixed from left to right. A pruned weight is compensated by the weights to its right in the same row, by least squares
on the calibration inputs (optimal brain surgeon). All rows share one factorised inverse Gram matrix, which makes the method
affordable (section 3.2).
"""

from __future__ import annotations

import torch
from torch import nn

from lib.primitives.layerwise import GRAM, pruning
from lib.primitives.linalg import Sparsity, check_sparsity, fix_columns, inverse_factor, keep_mask
from lib.primitives.surgery import linear


def sparsegpt_matrix(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: Sparsity = (2, 4), damping: float = 0.01, block: int = 128
) -> torch.Tensor:
    """Prune a matrix [out, in] and update what stays, to keep ‖(W - W')X‖ small (the paper's Algorithm 1).

    gram: XXᵀ [in, in], up to a factor. The lowest w²/U_ii² are removed, computed when their column is reached, from weights
    that already compensate those before: per row for (n, m), and for a fraction over all rows of `block` columns together.
    Inputs that are always zero lose their weights first. Raises ValueError for an impossible sparsity or Gram matrix.
    """
    check_sparsity(sparsity, weight.shape[1])
    factor = inverse_factor(gram, damping)
    sizes = factor.diagonal()

    def decide(columns: torch.Tensor, start: int):
        scores = (columns / sizes[start : start + columns.shape[1]]).square()
        keep = keep_mask(scores.reshape(1, -1), sparsity).view_as(scores)
        return lambda column, i: column.masked_fill(~keep[:, i : i + 1], 0)

    alive = weight.masked_fill(gram.diagonal() == 0, 0)
    span = block if isinstance(sparsity, (int, float)) else sparsity[1]
    return fix_columns(alive, factor, decide, span, block).to(weight.dtype)


def remake(sparsity: Sparsity, layer: nn.Linear, gram: torch.Tensor) -> nn.Linear:
    """A linear layer pruned for inputs of the given statistic."""
    return linear(sparsegpt_matrix(layer.weight, gram, sparsity), layer.bias, like=layer.weight)


prune, sweep, on_disk = pruning(GRAM, remake)
