"""Magnitude pruning: remove the smallest weights, whatever their inputs. The control that every other rule must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import check_inplace, check_settings
from lib.primitives.layerwise import check_prunable, replace_layers
from lib.primitives.linalg import Sparsity, check_sparsity, keep_mask
from lib.primitives.structured import remove_neurons, uniform
from lib.primitives.surgery import linear


def magnitude_matrix(weight: torch.Tensor, sparsity: Sparsity = (2, 4)) -> torch.Tensor:
    """Set the smallest |w| of a matrix [out, in] to zero: of every m in a row or, for a fraction, of the whole matrix."""
    check_sparsity(sparsity, weight.shape[1])
    keep = keep_mask(weight.abs().reshape(1, -1), sparsity).view_as(weight)
    return weight.masked_fill(~keep, 0)


def prune(model: nn.Module, sparsity: Sparsity = (2, 4), *, inplace: bool = False) -> nn.Module:
    """Prune every linear layer of the blocks by magnitude, without any data.

    Sparsity, result and errors are those of `lib.primitives.layerwise.pruning`.
    """
    check_prunable(model, sparsity)

    def remake(layer: nn.Linear) -> nn.Linear:
        return linear(magnitude_matrix(layer.weight, sparsity), layer.bias, like=layer.weight)

    return replace_layers(model, remake, inplace)


# --- whole neurons -----------------------------------------------------------------------------------------------------


def neuron_norms(readers: Sequence[torch.Tensor], writer: torch.Tensor, order: int = 2) -> torch.Tensor:
    """Sum over the matrices of the norm of each neuron's weights, [f]. readers: [f, d] each; writer: [d, f]; order 1 or 2."""
    return sum(w.double().norm(p=order, dim=1) for w in (*readers, writer.T))


def neuron_scores(model: nn.Module, order: int = 2) -> list[torch.Tensor]:
    """`neuron_norms` of every block."""
    anatomy = Anatomy(model)
    mlp = anatomy.family.mlp
    found = []
    for block in anatomy.blocks:
        *readers, writer = (block.get_submodule(name).weight.detach() for name in (*mlp.readers, mlp.writer))
        found.append(neuron_norms(readers, writer, order))
    return found


@dataclass(frozen=True)
class Settings:
    order: int = 2  # of the norm: 1 or 2

    def __post_init__(self):
        check_settings(self, order=(1, 2))


def sweep_neurons(
    model: nn.Module,
    ids: torch.Tensor | None,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of the neurons of every block, smallest norms first); needs no data."""
    check_inplace(inplace, ratios)
    found = neuron_scores(model, settings.order)
    for ratio in ratios:
        yield ratio, remove_neurons(model, uniform(found, ratio), inplace=inplace)
