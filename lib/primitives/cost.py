"""Parameters, bytes and multiply-adds, counted on modules: real ones or, for models larger than this machine, meta ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lib.primitives.anatomy import Anatomy, head_size


@dataclass(frozen=True)
class Count:
    """Size of a model: all parameters, those inside the decoder blocks, and multiply-adds per token in matrix products."""

    params: int
    decoder: int
    bytes: int
    macs_per_token: int

    def against(self, dense: Count) -> dict:
        """Columns of every results row: the shares that were *really* removed, of the decoder and of the whole model.

        Negative numbers mean that the model grew.
        """
        return {
            "params": self.params,
            "removed_decoder": 1 - self.decoder / dense.decoder,
            "removed_model": 1 - self.params / dense.params,
        }


def count(model: nn.Module) -> Count:
    """Count a model; tensors that are shared (tied heads) count once."""
    unique = {id(p): p for p in model.parameters()}.values()
    blocks = {id(p): p for p in Anatomy(model).blocks.parameters()}.values()
    return Count(
        params=sum(p.numel() for p in unique),
        decoder=sum(p.numel() for p in blocks),
        bytes=sum(p.numel() * p.element_size() for p in unique),
        macs_per_token=sum(_macs(module) for module in model.modules()),
    )


def prefill_macs(model: nn.Module, prompt: int) -> int:
    """Multiply-adds of reading a prompt of `prompt` tokens and predicting the next one: what its ideal time depends on.

    All matrices for every token, but the head for the last one only, and causal attention: n (n + 1) / 2 pairs of tokens.
    """
    anatomy = Anatomy(model)
    config, head = model.config, _macs(anatomy.head)
    pairs = len(anatomy.blocks) * config.num_attention_heads * head_size(config) * prompt * (prompt + 1)
    return (count(model).macs_per_token - head) * prompt + head + pairs


def _macs(module: nn.Module) -> int:
    if hasattr(module, "macs_per_token"):  # modules with more than one product count their own
        return module.macs_per_token
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
