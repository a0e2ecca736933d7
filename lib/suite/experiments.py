"""Measurements that a notebook makes to explain a method; no method needs them."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from lib.papers.sliced_network import check_sliceable
from lib.papers.slicegpt import Settings, constant_widths, decompose, junctions
from lib.primitives.calibration import ResidualStream


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
