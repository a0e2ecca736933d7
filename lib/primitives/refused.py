"""Why models of some architectures cannot be taken: what their blocks have that no record of a family can say."""

from __future__ import annotations

LINEAR = (
    "most of its layers have linear attention, whose state is not made of keys and values by heads, so there is nothing that the "
    "methods for attention could remove"
)
CONVOLUTION = "most of its layers are short convolutions in the place of attention"
PER_LAYER = "a second table of embeddings feeds every layer, so what the stream carries is not all that a block reads"
EXPERTS = (
    "a token reads a few of many experts (a mixture of experts), and the methods rank the neurons of one MLP that all tokens read"
)
POST_NORM = "its blocks normalise what attention and MLP write, not what they read, so no norm can be folded into the readers"
FUSED = "readers of the same input are fused in one matrix, and a record names query, key and value, or gate and up, apart"

REASONS = (
    dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"), LINEAR)
    | dict.fromkeys(("lfm2", "lfm2_moe"), CONVOLUTION)
    | dict.fromkeys(("gemma4", "gemma4_text", "gemma3n", "gemma3n_text"), PER_LAYER)
    | dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v2", "deepseek_v3", "phimoe"), EXPERTS
    )
    | dict.fromkeys(("olmo2", "olmo3", "exaone4"), POST_NORM)
    | dict.fromkeys(("phi3", "glm", "glm4", "gpt2", "bloom", "gpt_bigcode", "falcon", "mpt"), FUSED)
)


def reason(kind: str) -> str:
    """Why models of a type of transformers cannot be taken, or how a new family is added: a sentence for an error."""
    return f"{REASONS[kind]}." if kind in REASONS else "A new family is one record in lib/primitives/anatomy.py."


def text_alone(config) -> str:
    """What to do with a model for more than text: give its text model, or why that cannot be taken either."""
    kind = getattr(getattr(config, "text_config", None), "model_type", "")
    if kind in REASONS:
        return f"its text model alone cannot be taken either: {REASONS[kind]}"
    return "give a folder of its text model alone"
