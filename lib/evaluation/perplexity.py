"""Token perplexity by the papers' protocol, with its definition, and the head applied to a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from lib.evaluation.text import windows


@dataclass(frozen=True)
class Perplexity:
    """A token perplexity together with everything that defines it."""

    perplexity: float
    tokens: int  # scored: length - 1 in each window
    windows: int
    length: int
    losses: tuple[float, ...]  # summed loss of each window in nats, from which differences between models get their intervals
    definition: str = "exp of the mean next-token loss in nats, non-overlapping windows, first token of each unscored"

    def record(self) -> dict:
        return asdict(self)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, length: int, limit: int | None = None, batch: int = 8) -> Perplexity:
    """Perplexity by the protocol of the papers (GPTQ, SparseGPT, SliceGPT): one sequence of tokens, windows of `length`.

    tokens: ids [n_tokens] of the joined text; the tail shorter than a window is dropped; `limit` keeps the first windows.
    Log-softmax is float32 whatever the model's dtype. Raises ValueError if the window exceeds the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)  # BLOOM and Mamba take any length
    if positions is not None and length > positions:
        raise ValueError(f"windows of {length} tokens exceed the model's {positions} positions: use shorter windows")
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(f"{limit or 'all'} windows of {length} tokens score nothing: use at least 1 window of 2 tokens")
    blocks = windows(tokens, length)[:limit]
    return of_losses(torch.cat([_summed_losses(model, ids) for ids in blocks.split(batch)]), length)


def of_losses(losses: torch.Tensor, length: int) -> Perplexity:
    """The record of windows of `length` tokens with these summed losses in nats, float64 [windows]."""
    scored = len(losses) * (length - 1)
    return Perplexity(float((losses.sum() / scored).exp()), scored, len(losses), length, tuple(losses.tolist()))


FLOATS_AT_ONCE = 2**23  # logits in float32 at a time: 32 MB, so that the softmax stays in the processor's cache
ROWS_AT_ONCE = 8  # times as many rows in one product of the head: long products are fast


def head_inputs(model: nn.Module, **inputs) -> tuple[ModelOutput, torch.Tensor | None]:
    """The model's output for `inputs`, with logits of the last position alone, and the inputs of its head, [batch, tokens, d].

    None, and all logits, for a model without a head, `model.get_output_embeddings()`; None for one that calls it several times.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return model(**inputs), None
    seen: list[torch.Tensor] = []

    def last_position(_, given):
        seen.append(given[0])
        return (given[0][:, -1:],)

    handle = head.register_forward_pre_hook(last_position)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return output, seen[0] if len(seen) == 1 else None


def before_head(model: nn.Module, **inputs) -> tuple[ModelOutput, torch.Tensor | None]:
    """`head_inputs`, with None also for a model that changes its logits after the head, which shows at the last position."""
    output, hidden = head_inputs(model, **inputs)
    if hidden is None:
        return output, None
    # A model spread over devices computes its logits on the last of them, and returns them on the first.
    alone = model.get_output_embeddings()(hidden[:, -1:]).to(output.logits.device)
    same = torch.allclose(output.logits, alone, rtol=0, atol=0, equal_nan=True)  # NaN logits still compare as equal
    return output, hidden if same else None


def logits_in_pieces(model: nn.Module, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Float32 logits of every position but the last of the windows ids [batch, tokens], in their order: [rows, vocabulary] each.

    Never all logits at once: the head is applied to a few hidden states at a time, where its outputs are the logits.
    """
    ids = ids.to(next(model.parameters()).device)
    output, hidden = before_head(model, input_ids=ids, use_cache=False)
    if hidden is not None:
        yield from from_head(model, hidden[:, :-1].flatten(0, 1), output.logits.shape[-1])
        return
    whole = output.logits.shape[1] == ids.shape[1]  # a model without a head has been run in full
    logits = (output if whole else model(input_ids=ids, use_cache=False)).logits[:, :-1].flatten(0, 1)
    yield from (piece.float() for piece in logits.split(rows_at_once(logits.shape[-1])))


def from_head(model: nn.Module, hidden: torch.Tensor, vocabulary: int) -> Iterator[torch.Tensor]:
    """The same pieces from the inputs of the head, [positions, d]."""
    head, rows = model.get_output_embeddings(), rows_at_once(vocabulary)
    for x in hidden.split(ROWS_AT_ONCE * rows):
        yield from (logits.float() for logits in head(x).split(rows))


def rows_at_once(vocabulary: int) -> int:
    return max(1, FLOATS_AT_ONCE // vocabulary)


def _summed_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next tokens, summed over each window of ids [batch, tokens]: [batch] in float64, on the CPU."""
    targets, losses, first = ids[:, 1:].flatten(), [], 0
    for logits in logits_in_pieces(model, ids):
        own = targets[first : first + len(logits)].to(logits.device)
        losses.append(F.cross_entropy(logits, own, reduction="none").cpu())
        first += len(logits)
    return torch.cat(losses).view(len(ids), -1).sum(1, dtype=torch.float64)
