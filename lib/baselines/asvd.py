"""ASVD (Yuan et al., arXiv 2312.05821): weigh each input channel by the size of its activations, then truncate.

A matrix W is truncated by the SVD of W S with S = diag(mean_t |X_jt|^α). Ranks are uniform, or chosen by the paper's
search: truncate one matrix at a time, note the perplexity, and cut where it rises least.

What differs from the authors' code: decompositions are exact, not random; the search leaves the LM head out, among its
candidates and in the budget, because the ratio counts the matrices of the blocks for every method here; trials are ordered by the
mean loss, in which they have the order of their perplexities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.anatomy import replaced, shared_inputs
from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import check_settings, kept_share
from lib.primitives.losses import sequence_losses
from lib.primitives.low_rank import (
    Ranks,
    block_name,
    factored,
    matrices,
    narrowed,
    rank_for,
    shapes,
    sweep_of,
    uniform_ranks,
)

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # removed shares that the search tries on each matrix


@dataclass(frozen=True)
class Settings:
    alpha: float = 0.5  # power of the activations' size; 0 is plain SVD
    search: bool = False  # choose ranks by the paper's search instead of one ratio for all matrices

    def __post_init__(self):
        check_settings(self, alpha="[0, 10]")


def mean_magnitudes(model: nn.Module, ids: torch.Tensor) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """mean_t |X_jt|, float64 [n], of every distinct input of the dense model, with the names of the matrices that share it."""
    stream = ResidualStream(model, ids)
    family = stream.anatomy.family
    for i, block in enumerate(stream.anatomy.blocks):
        sums = {
            group: torch.zeros(block.get_submodule(group[0]).in_features, dtype=torch.float64, device=stream.device)
            for group in shared_inputs(family)
        }
        stream.observe(i, {g[0]: lambda x, total=total: total.add_(x.double().abs().sum(0)) for g, total in sums.items()}, True)
        for group, total in sums.items():
            yield tuple(block_name(family, i, name) for name in group), total / ids.numel()


def roots(model: nn.Module, ids: torch.Tensor, alpha: float = Settings.alpha) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The diagonals of S, by the matrices that share an input; α = 0 is plain SVD."""
    return ((names, size**alpha) for names, size in mean_magnitudes(model, ids))


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) with every matrix truncated by activation-scaled SVD, of uniform rank or with the rank `search`.

    ids: calibration tokens [samples, length]. One set of trials serves all ratios. Decompositions are float64.
    """
    plans = [uniform_ranks(model, ratio) for ratio in ratios]
    if settings.search:
        every = {(name, max(CANDIDATES)): 0.0 for name in matrices(model)}
        for ratio in ratios:
            search_ranks(every, shapes(model), ratio)  # raises now rather than after the trials
    found = list(roots(model, ids, settings.alpha))
    if settings.search:
        trials = sensitivities(model, ids, found, progress)
        plans = [search_ranks(trials, shapes(model), ratio) for ratio in ratios]
    return sweep_of(model, found, ratios, plans, progress, inplace)


# --- the rank search -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    ids: torch.Tensor,
    roots: Sequence[tuple[Sequence[str], torch.Tensor]],
    progress: Callable[[str], None] | None = None,
) -> dict[tuple[str, float], float]:
    """Mean loss on the calibration set with one matrix truncated, for every (matrix, removed share).

    The loss orders the trials as the perplexity does. Each matrix is decomposed once.
    """
    layers, found = matrices(model), {}
    for names, root in roots:
        for name in names:
            m, n = layers[name].weight.shape
            widest = factored(layers[name], root, rank_for(m, n, min(CANDIDATES)))
            for share in CANDIDATES:
                with replaced(model, name, narrowed(widest, rank_for(m, n, share))):
                    found[name, share] = calibration_loss(model, ids)
            if progress:
                progress(f"tried {len(found) // len(CANDIDATES)} of {len(layers)} matrices")
    return found


def calibration_loss(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean next-token loss over the sequences of a calibration set."""
    return torch.cat([sequence_losses(model, part) for part in ids.to(model.device).split(8)]).mean().item()


def search_ranks(trials: Mapping[tuple[str, float], float], shapes: Mapping[str, tuple[int, int]], ratio: float) -> Ranks:
    """Ranks for a ratio from the trials: accept trials from the least harmful on until enough parameters are gone.

    A matrix takes the highest removed share that was accepted for it; without one it stays dense. Raises ValueError if all
    trials together do not reach the ratio.
    """
    wanted = kept_share(ratio) * sum(m * n for m, n in shapes.values())
    ranks: Ranks = {}
    kept = {name: m * n for name, (m, n) in shapes.items()}
    for name, share in sorted(trials, key=trials.get):
        if sum(kept.values()) <= wanted:
            return ranks
        m, n = shapes[name]
        k = rank_for(m, n, share)
        if k * (m + n) < kept[name]:
            ranks[name], kept[name] = k, k * (m + n)
    if sum(kept.values()) <= wanted:
        return ranks
    raise ValueError(f"the rank search tries at most {max(CANDIDATES):.0%} on each matrix, which does not remove {ratio:.0%}")
