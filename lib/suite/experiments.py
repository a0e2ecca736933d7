"""Measurements that one notebook makes to explain a method; no method needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.papers.mask_tuning import System, removal_condition, ridge_scale, ridged_inverse, scaled_weights
from lib.papers.sliced_network import check_sliceable
from lib.papers.slicegpt import Settings, constant_widths, decompose, junctions
from lib.primitives.anatomy import half_names
from lib.primitives.calibration import ResidualStream
from lib.primitives.losses import sequence_losses

# --- SliceGPT: how much do neighbouring subspaces differ? -----------------------------------------------------------------------


def principal_angles(
    model: nn.Module, ids: torch.Tensor, level: float, round_interval: int = Settings.round_interval
) -> torch.Tensor:
    """Angles [steps, k] in degrees, ascending, between the subspaces kept at neighbouring junctions of a sliced network.

    The cosines of these angles are the singular values of the shortcuts AᵀB of SliceGPT. Angles of zero belong to directions
    that both junctions keep.
    """
    check_sliceable(model)
    stream = ResidualStream(model, ids)
    widths = constant_widths(model, level, round_interval, slice_head=True)
    kept = [found.axes[:, : widths[0]] for found in junctions(stream, decompose(stream), widths)]
    # From the sines of the dropped part, because the arc cosine of a number near 1 loses all digits.
    angles = []
    for a, b in itertools.pairwise(kept):
        sine = torch.linalg.svdvals(a - b @ (b.T @ a)).clamp(max=1)
        angles.append(torch.rad2deg(torch.asin(sine)).flip(0))
    return torch.stack(angles)


# --- Structured AFR: do the scores of a neuron agree in sign, and what does its deletion really cost? -------------------------


@torch.no_grad()
def deletion_losses(model: nn.Module, ids: torch.Tensor, neurons: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """True change of the mean next-token loss when one neuron alone is deleted, which a score approximates.

    ids: [samples, tokens]; neurons: for every block those to try, one forward pass each. Result: [neurons of the block] each,
    float64.
    """

    def loss() -> torch.Tensor:
        return sequence_losses(model, ids.to(model.device)).sum().double() / len(ids)

    dense, found = loss(), []
    for names, chosen in zip(half_names(model), neurons, strict=True):
        writer, changes = model.get_submodule(names[-1]), []
        for j in chosen:
            hook = writer.register_forward_pre_hook(
                lambda _, inputs, j=j: (inputs[0].index_fill(-1, torch.tensor(int(j), device=model.device), 0),)
            )
            try:
                changes.append(loss() - dense)
            finally:
                hook.remove()
        found.append(torch.stack(changes))
    return found


# --- COMP: two readings of "the condition of the matrix" that remove the wrong neurons ----------------------------------------


def condition_of_columns(system: System, epsilon: float = 0.01, **_) -> torch.Tensor:
    """Trap 1 [n]: κ_F of the system after a removal. It removes the *largest* neuron first, which alone sets the condition."""
    ridge = epsilon * ridge_scale(system.h)
    q, diagonal = ridged_inverse(system.h, ridge).double(), (system.h.diagonal() + ridge).double()
    after = (diagonal.sum() - diagonal) * (q.trace() - q.square().sum(1) / q.diagonal())
    return after.clamp(min=0).sqrt()


def condition_alone(system: System, **_) -> torch.Tensor:
    """Trap 2 [n]: the ratio of C2 without the magnitude. A massive neuron carries tr B, so it goes first."""
    return removal_condition(scaled_weights(system))


TRAPS: dict[str, Callable[..., torch.Tensor]] = {"trap 1": condition_of_columns, "trap 2": condition_alone}
