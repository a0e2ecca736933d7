"""Distillation: a compressed model learns from what its dense model predicts, instead of from the next token alone.

At every position the dense model gives a distribution over the whole vocabulary, and the compressed one is to give the same.
Source: Hinton, Vinyals and Dean, arXiv 1503.02531, with the divergence of softened distributions times the temperature squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.primitives.checks import check_settings
from lib.primitives.linalg import at_least_float32

PIECE = 128  # positions whose distributions over the vocabulary are in memory at once


@dataclass(frozen=True)
class Distillation:
    """How much a model learns from its dense model, and how soft the distributions are that it learns from."""

    share: float = 1.0  # of the divergence from the dense model in the loss; the rest is the next-token loss
    temperature: float = 1.0  # of both softmaxes

    def __post_init__(self):
        check_settings(self, share="[0, 1]", temperature="(0, inf)")

    def loss_from(self, dense: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """The loss of `lib.primitives.finetune.recover` against a dense model of the same vocabulary.

        The dense model reads every batch once more: nothing of the size of tokens x vocabulary is kept between steps.
        """

        def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = dense(input_ids=ids, use_cache=False).logits
            logits = model(input_ids=ids, use_cache=False).logits
            if logits.shape != wanted.shape:
                raise ValueError(
                    f"the dense model has {wanted.shape[-1]} words and the compressed one {logits.shape[-1]}: a model learns "
                    "only from one of the same vocabulary"
                )
            rows = zip(logits[:, :-1].flatten(0, 1).split(PIECE), wanted[:, :-1].flatten(0, 1).split(PIECE), strict=True)
            words = ids[:, 1:].flatten().split(PIECE)
            parts = [
                checkpoint(self.summed, own, dense_own, next_words, use_reentrant=False)
                for (own, dense_own), next_words in zip(rows, words, strict=True)
            ]
            return torch.stack(parts).sum() / ids[:, 1:].numel()

        return loss

    def summed(self, logits: torch.Tensor, wanted: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """share T² KL(dense ‖ own) + (1 - share) next-token loss, summed over positions.

        logits, wanted: [n, v], of the compressed and the dense model; ids: [n], the tokens that came next.
        """
        logits, wanted = at_least_float32(logits), at_least_float32(wanted)
        total = logits.new_zeros(())
        if self.share > 0:
            own, target = ((part / self.temperature).log_softmax(-1) for part in (logits, wanted))
            divergence = F.kl_div(own, target, reduction="sum", log_target=True)
            total = total + self.share * self.temperature**2 * divergence
        if self.share < 1:
            total = total + (1 - self.share) * F.cross_entropy(logits, ids, reduction="sum")
        return total
