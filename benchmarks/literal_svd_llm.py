"""SVD-LLM's training-free procedure as it was published, written down literally, to test and time this library against.

Every linear layer has a Gram matrix of its own, summed in float32 while the whole model runs, and all of their Cholesky
factors are held in float64 before the first truncation. A matrix is then truncated by an explicit inverse of its factor
and a full singular value decomposition in float32. Calibration sequences run one by one, as in the released code.
Written from the description for this repository; the authors' code is not used.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from lib.primitives.low_rank import matrices


@torch.no_grad()
def gram_matrices(model: nn.Module, ids: torch.Tensor, batch: int = 1) -> dict[str, torch.Tensor]:
    """Σ xᵀx [n, n] in float32 for every matrix by name; q, k and v get three equal ones."""
    grams = {}

    def add(name, _, inputs):
        x = inputs[0].flatten(0, -2).float()
        grams[name] = grams.get(name, 0) + x.T @ x

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in matrices(model).items()]
    for part in ids.split(batch):
        model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def whitening(gram: torch.Tensor) -> torch.Tensor:
    """S with SSᵀ = G, lower triangular in float64; where that fails, once more with the lowest eigenvalue lifted to 1e-6."""
    gram = gram.double()
    try:
        return torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:
        gram = gram + (1e-6 - torch.linalg.eigvalsh(gram)[0]) * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.cholesky(gram)


def profile(model: nn.Module, ids: torch.Tensor, batch: int = 1) -> dict[str, torch.Tensor]:
    """The whitening matrices of the whole model."""
    return {name: whitening(gram) for name, gram in gram_matrices(model, ids, batch).items()}


def factors(w: torch.Tensor, s: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_k Σ_k^½ [m, k] and Σ_k^½ V_kᵀ S⁻¹ [k, n] in float32."""
    try:
        inverse = torch.linalg.inv(s)
    except torch.linalg.LinAlgError:
        s = s + 1e-6 * torch.eye(len(s), dtype=torch.float64)
        inverse = torch.linalg.inv(s)
    u, sigma, vt = torch.linalg.svd(w.float() @ s.float(), full_matrices=False)
    root = torch.diag(sigma[:k].sqrt())
    return u[:, :k] @ root, root @ vt[:k] @ inverse.float()


@torch.no_grad()
def truncated(model: nn.Module, roots: dict[str, torch.Tensor], ratio: float) -> nn.Module:
    """A copy of the model with two layers in the place of every matrix."""
    model = copy.deepcopy(model)
    for name, layer in matrices(model).items():
        m, n = layer.weight.shape
        u, v = factors(layer.weight, roots[name], int(m * n * (1 - ratio) / (m + n)))
        first, second = nn.Linear(n, len(v), bias=False), nn.Linear(len(v), m, bias=layer.bias is not None)
        first.weight.data, second.weight.data = v, u
        if layer.bias is not None:
            second.bias.data = layer.bias.data
        model.set_submodule(name, nn.Sequential(first, second))
    return model


def literal_svd_llm(model: nn.Module, ids: torch.Tensor, ratio: float, batch: int = 1) -> nn.Module:
    """One ratio from scratch."""
    return truncated(model, profile(model, ids, batch), ratio)
