"""ShortGPT (Men et al., arXiv 2403.03853): remove the decoder blocks that change the residual stream least. No repair."""

from __future__ import annotations

import math

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import ResidualStream
from lib.primitives.layer_importance import layer_scores, lowest
from lib.primitives.structured import remove_blocks
from lib.primitives.surgery import shell


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


def chosen_blocks(
    model: nn.Module,
    ids: torch.Tensor,
    count: int,
    *,
    choice: str = "one-shot",
    after_norm: bool = False,
) -> list[int]:
    """The `count` blocks that go, sorted. choice: `one-shot` (the paper), `iterative` (scored anew after each removal) or
    `angular` (the contiguous run with the least angular distance). Raises ValueError if none would be left."""
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
    if choice != "one-shot":
        raise ValueError(f"unknown choice {choice!r}: choose one-shot, iterative or angular")
    return lowest(block_influence(model, ids, after_norm=after_norm), count)


def prune(model: nn.Module, ids: torch.Tensor, count: int, *, inplace: bool = False, **choice) -> nn.Module:
    """A stock model without the `count` blocks of least influence on calibration tokens ids [samples, length].

    choice: keyword arguments of `chosen_blocks`. The given model stays intact, unless `inplace`. Raises ValueError as
    `chosen_blocks` and `remove_blocks` do.
    """
    return remove_blocks(model, chosen_blocks(model, ids, count, **choice), inplace=inplace)


def blocks_for(model: nn.Module, ratio: float) -> int:
    """The number of blocks whose parameters come closest to a share of all blocks', and at least one block stays."""
    total = len(Anatomy(model).blocks)
    return min(total - 1, round(ratio * total))
