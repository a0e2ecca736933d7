"""What a model says: its own continuation of a prompt, in which everybody can hear what a perplexity means."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def greedy_text(model: nn.Module, tokenizer, prompt: str, tokens: int = 40) -> str:
    """The prompt's continuation by at most so many tokens, always the most likely one; shorter where the model ends its text."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    settings = dict(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)  # whatever the checkpoint asks for
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=padding, **settings)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
