"""Next-token losses of a model, in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of every sequence, summed over the sequences. logits: [b, t, v]; ids: [b, t]."""
    losses = F.cross_entropy(at_least_float32(logits[:, :-1].flatten(0, 1)), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1).sum()


def last_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How badly the last token is predicted *from itself*, summed over the sequences: what the authors' released code uses.

    Their loader masks all labels but the last, and the loss does not shift: no language-model loss, kept for comparison.
    """
    return F.cross_entropy(at_least_float32(logits[:, -1]), ids[:, -1], reduction="sum")


LOSSES = {"lm_shift": next_token_loss, "last_unshifted": last_token_loss}


def sequence_losses(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean next-token loss of each sequence, [samples]: token t is predicted from those before it, padding is not."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # One sequence at a time: with a large vocabulary a float32 copy of all logits would be the largest thing in memory.
    losses = [F.cross_entropy(row[:-1].float(), tokens[1:], reduction="none") for row, tokens in zip(logits, ids, strict=True)]
    losses = torch.stack(losses)
    if mask is None:
        return losses.mean(1)
    real = (mask[:, 1:] * mask[:, :-1]).to(losses)
    return (losses * real).sum(1) / real.sum(1).clamp(min=1)
