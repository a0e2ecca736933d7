"""How far a compressed model is from its dense one, token by token: more telling than accuracy where few answers change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.evaluation.perplexity import FLOATS_AT_ONCE, before_head
from lib.evaluation.text import windows


@dataclass(frozen=True)
class Divergence:
    """kl: mean of KL(dense ‖ compressed) in nats; same_top: share of positions where both find the same token most likely."""

    kl: float
    same_top: float
    tokens: int


@torch.no_grad()
def divergence(
    model: nn.Module, dense: nn.Module, tokens: torch.Tensor, length: int, limit: int | None = None, batch: int = 8
) -> Divergence:
    """Compare the next-token distributions of a model with those of its dense model on the windows that perplexity scores.

    tokens: ids [n_tokens] of the joined text, cut as in `perplexity`; every position but the last of a window counts. Softmax is
    in float32, for a few positions at a time, so that logits of whole windows are never in memory for both models.
    """
    kl, same, count = 0.0, 0, 0
    device, rows = next(model.parameters()).device, max(1, FLOATS_AT_ONCE // dense.config.vocab_size)
    for ids in windows(tokens, length)[:limit].split(batch):
        ours, reference = _logits_of(model, ids.to(device)), _logits_of(dense, ids.to(device))
        positions = ids.shape[0] * (length - 1)
        for start in range(0, positions, rows):
            q, p = (F.log_softmax(at(slice(start, start + rows)).float(), dim=-1) for at in (ours, reference))
            kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
        count += positions
    return Divergence(kl / count, same / count, count)


def _logits_of(model: nn.Module, ids: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """A function from rows to logits [rows, vocabulary], over all positions but the last of the windows ids [batch, tokens]."""
    output, hidden = before_head(model, input_ids=ids, use_cache=False)
    if hidden is None:
        whole = output.logits.shape[1] == ids.shape[1]  # a model without a head has been run in full
        logits = (output.logits if whole else model(input_ids=ids, use_cache=False).logits)[:, :-1].flatten(0, 1)
        return lambda rows: logits[rows]
    head, inputs = model.get_output_embeddings(), hidden[:, :-1].flatten(0, 1)
    return lambda rows: head(inputs[rows])
