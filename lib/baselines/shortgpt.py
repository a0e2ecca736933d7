"""ShortGPT (Men et al., arXiv 2403.03853): remove the decoder blocks that change the residual stream least. No repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import check_inplace, check_settings, check_share
from lib.primitives.layer_importance import layer_scores, lowest
from lib.primitives.structured import remove_blocks
from lib.primitives.surgery import shape_shell, shell


def block_influence(model: nn.Module, ids: torch.Tensor, *, after_norm: bool = False) -> list[float]:
    """Block Influence of every block, 1 - the mean cosine of a token before and after it (equation 1).

    ids: [samples, length]; after_norm: score the last block as the published code does (see `layer_scores`).
    """
    return layer_scores(model, ids, after_norm=after_norm)


@torch.no_grad()
def angular_distances(model: nn.Module, ids: torch.Tensor, run: int) -> list[float]:
    """arccos(cosine)/π between the last token's states before block i and before block i + run, for every i (Gromov et al.)."""
    stream = ResidualStream(model, ids)
    blocks = len(stream.anatomy.blocks)
    if not 1 <= run <= blocks:
        raise ValueError(f"cannot remove a run of {run} from {blocks} blocks")
    last = [stream.hidden[:, -1].to(torch.float64, copy=True)]
    for block in range(blocks):
        stream.advance_block(block)
        last.append(stream.hidden[:, -1].to(torch.float64, copy=True))
    pairs = zip(last, last[run:], strict=False)
    return [float(torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos().mean() / math.pi) for a, b in pairs]


@dataclass(frozen=True)
class Settings:
    choice: str = "one-shot"  # or: iterative (scored anew after each removal), angular (a contiguous run of blocks)
    after_norm: bool = False  # score the last block behind the final norm, as the published code does

    def __post_init__(self):
        check_settings(self, choice=("one-shot", "iterative", "angular"))


def chosen_blocks(model: nn.Module, ids: torch.Tensor, count: int, settings: Settings = Settings()) -> list[int]:
    """The `count` blocks that go, sorted. Raises ValueError if none would be left."""
    choice, after_norm = settings.choice, settings.after_norm
    total = len(Anatomy(model).blocks)
    if not 0 <= count < total:
        raise ValueError(f"cannot remove {count} of {total} blocks: leave at least one")
    if choice == "angular":
        if not count:
            return []
        distances = angular_distances(model, ids, count)
        first = distances.index(min(distances))
        return list(range(first, first + count))
    if choice == "iterative":
        left, current = list(range(total)), shell(model)
        for _ in range(count):
            [worst] = lowest(layer_scores(current, ids, after_norm=after_norm), 1)
            left.pop(worst)
            remove_blocks(current, [worst], inplace=True)
        return sorted(set(range(total)) - set(left))
    return lowest(block_influence(model, ids, after_norm=after_norm), count)


def blocks_for(model: nn.Module, ratio: float) -> int:
    """The number of blocks whose parameters come closest to a share of all blocks' parameters; at least one block stays."""
    total = len(Anatomy(model).blocks)
    return min(total - 1, round(ratio * total))


def prune(model: nn.Module, ids: torch.Tensor, count: int, settings: Settings = Settings(), inplace: bool = False) -> nn.Module:
    """A stock model without the `count` blocks of least influence on calibration tokens ids [samples, length].

    The given model stays intact, unless `inplace`. Raises ValueError as `chosen_blocks` and `remove_blocks` do.
    """
    return remove_blocks(model, chosen_blocks(model, ids, count, settings), inplace=inplace)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without the whole number of blocks nearest to that share of the blocks' parameters), scored once for all."""
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    scores = block_influence(model, ids, after_norm=settings.after_norm) if settings.choice == "one-shot" else None
    for ratio in ratios:
        count = blocks_for(model, ratio)
        drop = lowest(scores, count) if scores else chosen_blocks(model, ids, count, settings)
        yield ratio, remove_blocks(model, drop, inplace=inplace)


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after a ratio, on the meta device: all blocks are equally large."""
    return remove_blocks(shape_shell(model), list(range(blocks_for(model, ratio))), inplace=True)
