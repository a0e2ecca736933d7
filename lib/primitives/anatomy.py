"""Where things are in each model family, and the two halves of a decoder block.

A family is a record of dotted names. Methods ask for "the readers of the MLP" or "the writer of attention" and never
look at a model's type. A *reader* is a linear layer fed by a norm, a *writer* is one that adds to the residual stream,
a *junction* is the residual stream right before a norm (SliceGPT, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from lib.primitives.refused import reason


@dataclass(frozen=True)
class Half:
    """One residual branch of a block: norm -> readers -> ... -> writer -> add."""

    norm: str
    readers: tuple[str, ...]
    writer: str
    output_norm: str | None = None  # sandwich norm between the writer and the residual add (Gemma 2 and 3)


@dataclass(frozen=True)
class Family:
    """Dotted names of a model family; those of `attention`, `mlp` and `head_norms` are relative to a block."""

    blocks: str
    embeddings: tuple[str, ...]  # every table that writes the first residual stream
    final_norm: str
    attention: Half
    mlp: Half
    attention_module: str = "self_attn"
    head: str = "lm_head"
    neurons: str = "intermediate_size"  # the config's name for the number of neurons of an MLP
    subtracts_mean: bool = False  # LayerNorm does, RMSNorm does not
    gain_offset: float = 0.0  # Gemma stores gain - 1
    parallel: bool = False  # attention and MLP read the same stream and are added together (Phi-2, GPT-NeoX)

    def __post_init__(self):
        if self.attention.norm == self.mlp.norm and not self.parallel:
            raise ValueError(f"both halves name the norm {self.mlp.norm!r}: only the halves of a parallel block can share one")


_LLAMA = Family(
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    attention=Half("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    mlp=Half("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,  # q, k, v carry biases
    "qwen3": _LLAMA,  # q and k are normalised per head, behind the readers; the residual stream is not affected
    "opt": Family(
        blocks="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        attention=Half(
            "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
        ),
        mlp=Half("final_layer_norm", ("fc1",), "fc2"),
        neurons="ffn_dim",
        subtracts_mean=True,
    ),
    "gemma3_text": Family(
        blocks="model.layers",
        embeddings=("model.embed_tokens",),
        final_norm="model.norm",
        attention=Half(
            "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
            "post_attention_layernorm",
        ),
        mlp=Half(
            "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
            "post_feedforward_layernorm",
        ),
        gain_offset=1.0,
    ),
    "phi": Family(
        blocks="model.layers",
        embeddings=("model.embed_tokens",),
        final_norm="model.final_layernorm",
        attention=Half("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
        mlp=Half("input_layernorm", ("mlp.fc1",), "mlp.fc2"),  # the same norm feeds both halves
        subtracts_mean=True,
        parallel=True,
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        attention=Half("input_layernorm", ("attention.query_key_value",), "attention.dense"),
        mlp=Half("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        attention_module="attention",
        subtracts_mean=True,
        parallel=True,
    ),
}  # fmt: skip


def family_of(config) -> Family:
    """The family record of a transformers causal LM. Raises ValueError for an unknown or a post-norm architecture."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not known here: {reason(kind)} Supported are {', '.join(sorted(FAMILIES))}")
    if kind == "opt" and not _is_plain_opt(config):
        raise ValueError(
            "this OPT model (like OPT-350M) normalises after each residual add, projects its embeddings or has no final norm, "
            "so its residual stream is not that of a pre-norm model: use a pre-norm OPT, such as 125M or 1.3B"
        )
    if kind == "phi" and config.qk_layernorm:
        raise ValueError("this Phi model normalises queries and keys, which its family record lacks: use Phi-1, 1.5 or 2")
    if kind == "gpt_neox" and not config.use_parallel_residual:
        raise ValueError("this GPT-NeoX model adds attention before its MLP, but its family record is that of parallel blocks")
    if kind == "gemma3_text" and config.use_bidirectional_attention:
        raise ValueError(
            "this Gemma 3 is bidirectional: like EmbeddingGemma it attends to later tokens, too, so it predicts no next token, "
            "by which models are calibrated and judged here: use a Gemma 3 that writes text"
        )
    return FAMILIES[kind]


def _is_plain_opt(config) -> bool:
    final_norm = not config._remove_final_layer_norm
    return config.do_layer_norm_before and final_norm and config.word_embed_proj_dim == config.hidden_size


def shared_inputs(family: Family) -> tuple[tuple[str, ...], ...]:
    """The matrices of a block, grouped by the input that they share: readers of one norm together, writers alone."""
    attention, mlp = family.attention, family.mlp
    if attention.norm == mlp.norm:  # Phi feeds both halves from one norm
        return attention.readers + mlp.readers, (attention.writer,), (mlp.writer,)
    return attention.readers, (attention.writer,), mlp.readers, (mlp.writer,)


def head_size(config) -> int:
    """Channels of one attention head: `head_dim` of the config, or hidden_size / num_attention_heads where it has none."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_fixed_rotation(config) -> bool:
    """Whether positions are rotated in the same way in texts of every length: not by dynamic or by real long RoPE."""
    rope = config.rope_parameters
    rotations = [rope] if "rope_type" in rope else rope.values()  # Gemma 3 has two
    dynamic = any("dynamic" in rotation["rope_type"] for rotation in rotations)
    return not dynamic and all(rotation.get("short_factor") == rotation.get("long_factor") for rotation in rotations)


@dataclass
class Anatomy:
    """A model seen through its family record. Holds no weights of its own."""

    model: nn.Module
    family: Family = field(init=False)

    def __post_init__(self):
        self.family = family_of(self.model.config)

    def get(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def put(self, name: str, module: nn.Module) -> None:
        self.model.set_submodule(name, module)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get(self.family.blocks)

    @property
    def head(self) -> nn.Linear:
        return self.get(self.family.head)

    @property
    def width(self) -> int:
        """Size d of the residual stream of the dense model."""
        return self.model.config.hidden_size

    @property
    def positions(self) -> int:
        """Longest sequence the model was made for."""
        return self.model.config.max_position_embeddings

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.family.attention, self.family.mlp

    @property
    def steps(self) -> tuple[tuple[Callable, tuple[Half, ...]], ...]:
        """A block from junction to junction: the function that runs each step, and the halves that it adds to the stream."""
        attention, mlp = self.halves
        if self.family.parallel:
            return ((whole_block, (attention, mlp)),)
        return (attention_half, (attention,)), (mlp_half, (mlp,))

    @property
    def junctions(self) -> int:
        """Points of the residual stream before a norm: 2 L + 1, or L + 1 where blocks are parallel."""
        return len(self.steps) * len(self.blocks) + 1


def norm_gain(norm: nn.Module, family: Family) -> torch.Tensor | float:
    """Multiplicative gain [d] of a norm in float64, 1.0 where it has none; Gemma's stored offset is added."""
    weight = getattr(norm, "weight", None)
    return 1.0 if weight is None else weight.detach().double() + family.gain_offset


def norm_offset(norm: nn.Module) -> torch.Tensor | None:
    """Additive offset [d] of a norm in float64, or None."""
    bias = getattr(norm, "bias", None)
    return None if bias is None else bias.detach().double()


def norm_epsilon(norm: nn.Module) -> float:
    """The norm's own epsilon; families differ (1e-5, 1e-6), and a wrong one changes the function."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return getattr(norm, name)
    raise ValueError(f"{type(norm).__name__} shows no epsilon: name its attribute in lib/primitives/anatomy.py")


# --- running half a block ---------------------------------------------------------------------------------------------
#
# The model's own block does the work. Its forward is never copied: to run only the attention half we stop at the MLP
# norm, whose input is the junction we want; to run only the MLP half we silence attention, which then adds zero.


class _Stop(Exception):
    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


@contextlib.contextmanager
def _stopping_at(norm: nn.Module) -> Iterator[None]:
    def stop(_, inputs):
        raise _Stop(inputs[0])

    handle = norm.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


class _Silent(nn.Module):
    """Stands in for attention and adds nothing."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


@contextlib.contextmanager
def replaced(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Swap the submodule `name` of `parent` for the duration of a `with` block."""
    original = parent.get_submodule(name)
    parent.set_submodule(name, module)
    try:
        yield
    finally:
        parent.set_submodule(name, original)


def attention_half(block: nn.Module, family: Family, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Residual stream after attention, the junction before the MLP norm. x, result: [batch, tokens, d]."""
    with _stopping_at(block.get_submodule(family.mlp.norm)):
        try:
            block(x, **kwargs)
        except _Stop as stopped:
            return stopped.hidden.view(x.shape)  # OPT flattens batch and tokens before its MLP
    raise RuntimeError(f"{type(block).__name__} never called {family.mlp.norm}: its family record is wrong")


def whole_block(block: nn.Module, family: Family, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Residual stream after a whole block. x, result: [batch, tokens, d]."""
    return block(x, **kwargs)


def mlp_half(block: nn.Module, family: Family, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Residual stream after the MLP, given the one after attention. x, result: [batch, tokens, d]."""
    with replaced(block, family.attention_module, _Silent()):
        return block(x, **kwargs)


def half_names(model: nn.Module, half: str = "mlp") -> list[list[str]]:
    """Names of the readers and the writer of every block's `mlp` or `attention`, readers first."""
    family = Anatomy(model).family
    part = getattr(family, half)
    return [[f"{family.blocks}.{i}.{name}" for name in (*part.readers, part.writer)] for i in range(len(Anatomy(model).blocks))]
