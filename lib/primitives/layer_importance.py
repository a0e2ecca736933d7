"""How much a decoder block changes what passes through it: the scores by which whole blocks are removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import choose_one


@dataclass
class Change:
    """Sums over tokens from which every score of a block is computed. Batches of any size can be added."""

    cosines: float = 0.0
    tokens: int = 0
    inner: float = 0.0
    before: float = 0.0
    after: float = 0.0
    moved: float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x, y: hidden states [t, d] before and after the block. A zero vector has the cosine 0."""
        x, y = x.double(), y.double()
        inner, sizes = (x * y).sum(-1), x.norm(dim=-1) * y.norm(dim=-1)
        self.cosines += float(torch.where(sizes > 0, inner / sizes.clamp(min=1e-300), torch.zeros_like(inner)).sum())
        self.tokens += len(x)
        self.inner += float(inner.sum())
        self.before += float(x.square().sum())
        self.after += float(y.square().sum())
        self.moved += float((y - x).square().sum())


def mean_cosine(change: Change) -> float:
    """1 - mean cosine of a token before and after: ShortGPT's Block Influence. 0 for a block that does nothing, at most 2."""
    return 1 - change.cosines / change.tokens


def pooled_cosine(change: Change) -> float:
    """1 - |Σ⟨x, y⟩| / ‖X‖‖Y‖: the other reading of COMP's formula. Tokens of huge norm dominate it."""
    size = (change.before * change.after) ** 0.5
    return 1 - abs(change.inner) / size if size else 1.0


def relative_change(change: Change) -> float:
    """‖Y - X‖ / ‖X‖."""
    return (change.moved / change.before) ** 0.5 if change.before else 0.0


BLOCK_SCORES: dict[str, Callable[[Change], float]] = {
    "mean cosine": mean_cosine,
    "pooled cosine": pooled_cosine,
    "relative change": relative_change,
}


def check_score(score: str) -> None:
    choose_one("score of a block", score, BLOCK_SCORES)


@torch.no_grad()
def layer_scores(
    model: nn.Module,
    ids: torch.Tensor,
    score: str = "mean cosine",
    *,
    after_norm: bool = False,
) -> list[float]:
    """The score of every block on calibration tokens ids [samples, length].

    One pass with the stream of one depth in memory. after_norm: compare the last block's input with its output *after* the
    final norm, as code that reads transformers' tuple of hidden states does; by default the block's own output is taken.
    """
    check_score(score)
    stream = ResidualStream(model, ids)
    final_norm = stream.anatomy.get(stream.anatomy.family.final_norm)
    scores = []
    for block in range(len(stream.anatomy.blocks)):
        change, last = Change(), after_norm and block == len(stream.anatomy.blocks) - 1

        def add(before: torch.Tensor, after: torch.Tensor, change: Change = change, last: bool = last) -> None:
            for x, y in zip(before, after, strict=True):  # one sequence is in float64 at once
                change.add(x, final_norm(y) if last else y)

        stream.observe(block, {}, advance=True, moved=add)
        scores.append(BLOCK_SCORES[score](change))
    return scores


def lowest(scores: list[float], count: int, protect: tuple[int, ...] = ()) -> list[int]:
    """Sorted indices of the `count` blocks of the lowest scores outside `protect`; of equal ones the lower index goes.

    Raises ValueError if there are not so many, or if a score is NaN.
    """
    free = [i for i in range(len(scores)) if i not in protect]
    if any(score != score for score in scores):
        raise ValueError("the score of a block is NaN: the model's weights or activations are broken")
    if not 0 <= count <= len(free):
        raise ValueError(f"cannot remove {count} of {len(free)} blocks that may go: lower the ratio or the blocks' share of it")
    return sorted(sorted(free, key=lambda i: scores[i])[:count])
