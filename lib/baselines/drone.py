"""DRONE (Chen et al., NeurIPS 2021): the best product of two thin matrices for given inputs, from the inputs themselves.

It minimises the same ‖(W - W')X‖ as SVD-LLM and reaches the same minimum. It needs all inputs in memory, X [n, T], and a singular
value decomposition of them, where SVD-LLM needs a sum over tokens [n, n]. The comparison of SVD-LLM's appendix A.5.
"""

from __future__ import annotations

import torch


def truncate(w: torch.Tensor, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors u [m, k] and v [k, n] of the matrix W' of rank k that minimises ‖(W - W')X‖; in the precision of `w`.

    w: weights [m, n]; x: inputs [n, tokens], one token in a column. With W = U_W Σ_W V_Wᵀ and X = U_X Σ_X V_Xᵀ, cut to their
    ranks, Z = Σ_W V_Wᵀ U_X Σ_X has the singular values of WX, and W' = U_W Z_k Σ_X⁻¹ U_Xᵀ for the best Z_k of rank k. Raises
    ValueError where W or X has a rank below k.
    """
    left, size, right = _compact(w)
    axes, energy, _ = _compact(x)
    if not 0 < k <= min(len(size), len(energy)):
        raise ValueError(f"no rank {k} here: the weights have rank {len(size)} and the inputs {len(energy)}")
    u, sigma, v = torch.linalg.svd((size[:, None] * right) @ (axes * energy), full_matrices=False)
    return left @ (u[:, :k] * sigma[:k]), (v[:k] / energy) @ axes.T


def _compact(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of a matrix without the values that are zero to working precision."""
    u, sigma, v = torch.linalg.svd(a, full_matrices=False)
    rank = int((sigma > sigma[0] * max(a.shape) * torch.finfo(a.dtype).eps).sum())
    return u[:, :rank], sigma[:rank], v[:rank]
