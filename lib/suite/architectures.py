"""Shapes of the models of the papers and of the profiles, for models without memory."""

from __future__ import annotations

import torch
from torch import nn

from lib.primitives.checks import choose_one

# Shapes of the papers' models and of small models of today, each from the `config.json` that its publisher put on the hub.
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


# The other models of the profiles, from the same source. (A notebook prints the table above.)
MORE_ARCHITECTURES = {
    "LLaMA-7B": _LLAMA_2_7B | dict(max_position_embeddings=2048, rms_norm_eps=1e-6),
    "SmolLM2-135M": _LLAMA_2_7B
    | dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "SmolLM2-360M": _LLAMA_2_7B
    | dict(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, max_position_embeddings=8192, tie_word_embeddings=True,
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
    choose_one("architecture", architecture, known)
    settings = dict(known[architecture])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()
