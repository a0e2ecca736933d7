"""Next-token losses, in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lib.primitives.linalg import at_least_float32


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Loss in nats of predicting each next token, [b, t - 1]; callers reduce. logits: [b, t, v]; ids: [b, t].

    One sequence at a time: with a large vocabulary a float32 copy of all logits would be the largest thing in memory.
    """
    pairs = zip(logits, ids, strict=True)
    return torch.stack([F.cross_entropy(at_least_float32(row[:-1]), own[1:], reduction="none") for row, own in pairs])


def sequence_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of a model on each sequence of ids [b, t]: [b]."""
    return next_token_losses(model(input_ids=ids, use_cache=False).logits, ids).mean(1)


def mean_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of a model over all tokens of ids [b, t]: what training minimises."""
    return next_token_losses(model(input_ids=ids, use_cache=False).logits, ids).mean()


def summed_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of every sequence, summed over the sequences."""
    return next_token_losses(logits, ids).mean(1).sum()


def last_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How badly the last token is predicted *from itself*, summed over the sequences: what AFR's released code uses.

    Its loader masks all labels but the last, and its loss does not shift them; kept only for comparison.
    """
    return F.cross_entropy(at_least_float32(logits[:, -1]), ids[:, -1], reduction="sum")


LOSSES = {"lm_shift": summed_loss, "last_unshifted": last_token_loss}
