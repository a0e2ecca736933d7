"""Parameters, bytes and multiply-adds, counted on modules: real ones or, for models larger than this machine, meta ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lib.anatomy import Anatomy, head_size


@dataclass(frozen=True)
class Count:
    """Size of a model: all parameters, those inside the decoder blocks, and multiply-adds per token in matrix products."""

    params: int
    decoder: int
    bytes: int
    macs_per_token: int

    def against(self, dense: Count) -> dict:
        """The columns that every results row carries: what was *really* removed, over the decoder and the whole model.

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
    """Multiply-adds of reading a prompt of `prompt` tokens and predicting the next one: what its time is ideally made of.

    All matrices for every token, but the head for the last one only, and causal attention: n (n + 1) / 2 pairs of tokens.
    """
    anatomy = Anatomy(model)
    config, head = model.config, _macs(anatomy.head)
    pairs = len(anatomy.blocks) * config.num_attention_heads * head_size(config) * prompt * (prompt + 1)
    return (count(model).macs_per_token - head) * prompt + head + pairs


def _macs(module: nn.Module) -> int:
    if hasattr(module, "macs_per_token"):  # modules that do more than one product say so themselves
        return module.macs_per_token
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


# Shapes of the papers' models, from their published configuration files.
_LLAMA_2_7B = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> dict:
    return dict(
        model_type="opt", vocab_size=50272, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip


ARCHITECTURES = {
    "OPT-125M": _opt(768, 12, 12),
    "OPT-1.3B": _opt(2048, 24, 32),
    "OPT-6.7B": _opt(4096, 32, 32),
    "Llama-2-7B": _LLAMA_2_7B,
    "Llama-2-70B": _LLAMA_2_7B
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
    "Llama-3-8B": _LLAMA_2_7B
    | dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192),
    "Llama-3.2-1B": _LLAMA_2_7B
    | dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "Phi-2": dict(
        model_type="phi", vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048, tie_word_embeddings=False,
    ),
}  # fmt: skip

# The other models of the profiles, from their published configuration files too. (The table above is printed by a notebook.)
MORE_ARCHITECTURES = {
    "LLaMA-7B": _LLAMA_2_7B | dict(max_position_embeddings=2048, rms_norm_eps=1e-6),
    "SmolLM2-135M": _LLAMA_2_7B
    | dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "Gemma-3-270M": dict(
        model_type="gemma3_text", vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768, sliding_window=512,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


def meta_model(architecture: str) -> nn.Module:
    """One of the papers' models with its real shapes and no memory: every parameter is a meta tensor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = ARCHITECTURES | MORE_ARCHITECTURES
    if architecture not in known:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(known)}")
    settings = dict(known[architecture])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()
