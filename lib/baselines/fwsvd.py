"""FWSVD (Hsu et al., arXiv 2207.00112): weigh each input channel of a matrix by how much the loss depends on it.

The importance of a weight is its empirical Fisher information, the mean over sequences of the squared gradient of the
loss. A matrix W is truncated by the SVD of W diag(d), where d_j is the root of the sum over column j.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import check_calibration
from lib.primitives.losses import sequence_losses
from lib.primitives.low_rank import matrices, sweep_of, uniform_ranks


def fisher(
    model: nn.Module,
    ids: torch.Tensor,
    batch: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Σ_i mean_s (∂L_s/∂W_ij)², float64 [n inputs], for every matrix; L_s is the mean next-token loss of sequence s.

    ids: [samples, tokens]. One backward pass a batch, which needs three times the size of its logits.
    The gradient of a sequence is the product of a matrix's inputs and the gradients of its outputs, so nothing of the size of
    the weights is kept.
    """
    check_calibration(Anatomy(model), ids)
    layers = matrices(model)
    totals = {name: torch.zeros(layer.in_features, dtype=torch.float64, device=model.device) for name, layer in layers.items()}
    table = Anatomy(model).get(Anatomy(model).family.embeddings[0])
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        part = ids[rows].to(model.device)
        with torch.enable_grad(), contextlib.ExitStack() as watched:
            first = _watch_entry(watched, table)
            for name, layer in layers.items():
                _watch(watched, layer, totals[name], len(part))
            loss = sequence_losses(model, part).sum()
            torch.autograd.grad(loss, first)  # of the embeddings alone: the hooks see the gradients on the way
        if progress:
            progress(f"gradients of {min(start + batch, len(ids))} of {len(ids)} sequences")
    return {name: total / len(ids) for name, total in totals.items()}


def _watch_entry(watched: contextlib.ExitStack, table: nn.Module) -> list[torch.Tensor]:
    """The output of the embeddings, made a leaf of the graph, so that gradients reach it even if no parameter requires them."""
    first: list[torch.Tensor] = []

    def hook(_, inputs, output):
        first.append(output.detach().requires_grad_())
        return first[0]

    watched.callback(table.register_forward_hook(hook).remove)
    return first


def _watch(watched: contextlib.ExitStack, layer: nn.Linear, total: torch.Tensor, samples: int) -> None:
    """Add the column sums of the squared gradient of each sequence to `total` [n] during the backward pass."""

    def hook(_, inputs, output):
        x = inputs[0].detach()

        def give(gradient):
            sent, back = (t.reshape(samples, -1, t.shape[-1]).float() for t in (x, gradient))  # OPT flattens its batches
            for one_sent, one_back in zip(sent, back, strict=True):
                total.add_((one_back.T @ one_sent).square().sum(0))

        output.register_hook(give)

    watched.callback(layer.register_forward_hook(hook).remove)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: object = None,
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) with every matrix truncated by Fisher-weighted SVD, which minimises Σ_j d_j² ‖(W - W')_j‖².

    ids: calibration tokens [samples, length]; there are no settings.
    """
    plans = [uniform_ranks(model, ratio) for ratio in ratios]
    weights = fisher(model, ids, progress=progress)
    return sweep_of(model, (([name], value.sqrt()) for name, value in weights.items()), ratios, plans, progress, inplace)
