"""How far a compressed model is from its dense one, token by token: more telling than accuracy where few answers change.

The dense model reads the windows once (`Reference`). Each compressed model reads them once as well, and that pass gives its
perplexity, its divergence and the share of equal top tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.evaluation.perplexity import Perplexity, before_head, from_head, logits_in_pieces, of_losses
from lib.evaluation.text import windows


@dataclass(frozen=True)
class Divergence:
    """kl: mean of KL(dense ‖ compressed) in nats; same_top: share of positions where both find the same token most likely."""

    kl: float
    same_top: float
    tokens: int


class Reference:
    """A dense model on the windows of a text, to which others are compared.

    tokens: ids [n_tokens] of the joined text, cut as in `lib.evaluation.perplexity.perplexity`. Kept are the inputs of the head,
    [positions, d] of each batch, from which the logits come a few at a time; a model that changes its logits after the
    head is run again for every comparison.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, tokens: torch.Tensor, length: int, limit: int | None = None, batch: int = 8):
        self.dense, self.length = dense, length
        self.batches = windows(tokens, length)[:limit].split(batch)
        self.read = [self._read(ids) for ids in self.batches]

    def _read(self, ids: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """The inputs of the head, and the size of the vocabulary."""
        output, hidden = before_head(self.dense, input_ids=ids.to(next(self.dense.parameters()).device), use_cache=False)
        return None if hidden is None else (hidden[:, :-1].flatten(0, 1), output.logits.shape[-1])

    def logits(self, batch: int) -> Iterator[torch.Tensor]:
        """Float32 logits of a batch of windows in pieces, as `logits_in_pieces` gives them."""
        read = self.read[batch]
        return logits_in_pieces(self.dense, self.batches[batch]) if read is None else from_head(self.dense, *read)


@torch.no_grad()
def compared(model: nn.Module, reference: Reference) -> tuple[Perplexity, Divergence]:
    """Perplexity of a model, and its divergence from the dense one, from one pass over the reference's windows.

    Every position but the last of a window counts. Softmax is in float32. model: of the same vocabulary and device.
    """
    kl, same, summed = 0.0, 0, []
    for batch, ids in enumerate(reference.batches):
        targets, losses, first = ids[:, 1:].flatten(), [], 0
        for ours, dense in zip(logits_in_pieces(model, ids), reference.logits(batch), strict=True):
            q, p = F.log_softmax(ours, dim=-1), F.log_softmax(dense, dim=-1).to(ours.device)
            own = targets[first : first + len(q)].to(q.device)
            losses.append(F.nll_loss(q, own, reduction="none").cpu())
            kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            first += len(q)
        summed.append(torch.cat(losses).view(len(ids), -1).sum(1, dtype=torch.float64))
    found = of_losses(torch.cat(summed), reference.length)
    return found, Divergence(kl / found.tokens, same / found.tokens, found.tokens)
