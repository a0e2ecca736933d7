"""CFSP (Wang et al., arXiv 2409.13199): one forward pass decides how wide each MLP stays, and which of its neurons stay.

Coarse: a block that turns the residual stream by a larger angle keeps more neurons. Fine: neurons are ranked by activation
and weights. In the released code every weight fraction is averaged over the axis it was normalised over, so the weights
cancel and the activation norm alone is left: `code_scores`. `equation8_scores` normalises the down projection over neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import COUNTS, check_inplace, check_settings, check_share, kept_share
from lib.primitives.moments import measure, turning_angles
from lib.primitives.structured import keep_highest, remove_neurons

# The authors divide angles summed over 128 x 1024 tokens by 10,000; this is the same for mean angles, for any number of tokens.
TEMPERATURE = 1e4 / (128 * 1024)


@dataclass(frozen=True)
class Settings:
    fine: str = "code"  # how neurons are ranked: by the released code; or: eq8, the paper's equation
    coarse: bool = True  # widths from the angles; False: the same share of every block
    multiple: int = 1  # widths are rounded to it

    def __post_init__(self):
        check_settings(self, fine=("code", "eq8"), multiple=COUNTS)


@dataclass(frozen=True)
class Scores:
    neurons: list[torch.Tensor]  # [f] of every block
    angles: torch.Tensor  # [L], mean angle per token as a share of π


def code_scores(squares: torch.Tensor) -> torch.Tensor:
    """Activation norm of each neuron from its mean square [f], to which the released score reduces."""
    return squares.sqrt()


def equation8_scores(readers: Sequence[torch.Tensor], writer: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Scores [f] of equation 8 as transcribed by others. readers: [f, d] each; writer: [d, f]; squares: mean squares [f].

    X_j mean_i [|W_d,ij| X_j / Σ_j' |W_d,ij'| X_j' + Σ_readers |W_ji| / Σ_i' |W_ji'|]. The readers' terms reduce to 1/d.
    """
    size = squares.double().sqrt()
    share = _fractions(writer.double().abs() * size, dim=1).mean(0)
    for reader in readers:
        share = share + _fractions(reader.double().abs(), dim=1).mean(1)
    return share * size


def _fractions(t: torch.Tensor, dim: int) -> torch.Tensor:
    return t / t.sum(dim, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny)


def kept_shares(angles: torch.Tensor, ratio: float) -> torch.Tensor:
    """The share of its neurons that each block keeps, [L], 1 - ratio on average, from the turning angles [L].

    In proportion to a sigmoid of the angle's distance from the mean. Where a share would pass 1, all of them move towards
    the mean until the largest is just below.
    """
    gates = torch.sigmoid((angles.double() - angles.double().mean()) / TEMPERATURE)
    mean = float(kept_share(ratio))
    shares = mean * gates / gates.mean()
    if shares.max() > 1:
        shares = mean + (shares - mean) * (1 - mean) / (shares.max() - mean) / 1.05
    return shares


def scores(model: nn.Module, ids: torch.Tensor, fine: str = "code") -> Scores:
    """Neuron scores and angles of the dense model, which serve every ratio. fine: "code" or "eq8"."""
    stream = ResidualStream(model, ids)
    mlp, neurons, angles = stream.anatomy.family.mlp, [], []
    for i, block in enumerate(stream.anatomy.blocks):
        turned: list[torch.Tensor] = []

        def turn(before: torch.Tensor, after: torch.Tensor, turned: list[torch.Tensor] = turned) -> None:
            turned.extend(map(turning_angles, before, after))  # one sequence is in float64 at once

        squares = measure(stream, i, [mlp.writer], advance=True, moved=turn)[mlp.writer].square
        angles.append(torch.cat(turned).mean().item())
        weights = [block.get_submodule(name).weight.detach() for name in (*mlp.readers, mlp.writer)]
        neurons.append(code_scores(squares) if fine == "code" else equation8_scores(weights[:-1], weights[-1], squares))
    return Scores(neurons, torch.tensor(angles, dtype=torch.float64))


def keep(found: Scores, ratio: float, coarse: bool = True, multiple: int = 1) -> list[torch.Tensor]:
    """Which neurons stay. coarse: widths from the angles, equal ones without; multiple: widths rounded to it."""
    shares = kept_shares(found.angles if coarse else torch.zeros_like(found.angles), ratio)
    kept = []
    for score, share in zip(found.neurons, shares.tolist(), strict=True):
        width = int(len(score) * share + 1e-9) if multiple == 1 else round(len(score) * share / multiple) * multiple
        kept.append(keep_highest(score, min(max(width, multiple), len(score))))
    return kept


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of its FFN neurons) for every ratio, from one pass; no repair.

    ids: [samples, tokens]. Raises ValueError, before any work, for a ratio outside [0, 1) and for ids that cannot be used.
    """
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    found = scores(model, ids, settings.fine)
    for ratio in ratios:
        yield ratio, remove_neurons(model, keep(found, ratio, settings.coarse, settings.multiple), inplace=inplace)


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """Remove a share of the FFN neurons; settings: fields of `Settings`."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]
