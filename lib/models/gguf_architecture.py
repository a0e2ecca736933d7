"""Which architecture of GGUF is a model, and how its keys and tensors differ there from those of transformers.

Readers of GGUF know networks by name. A record says what a network of one name may have. A model becomes the first network for
its type that may have all that it has; where there is none, the reasons are given with a way out.

Structured pruning leaves blocks of unequal width. Two architectures take them, with arrays in place of three numbers: neurons,
heads and key-value heads of each block. `deci` is otherwise a `llama`; `openelm` is otherwise a `qwen3` whose head is its table.
A block without neurons would be skipped there together with its attention, and the first block must have attention; our methods
leave every block some of both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import gguf
import torch
from torch import nn

from lib.models.folder import stored_tensors
from lib.primitives.anatomy import Anatomy, has_fixed_rotation, head_size
from lib.primitives.structured import ffn_widths, kv_groups

SILU = ("silu",)
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")  # readers compute all of them by the formula with tanh, in 16 bits
ROPE_TYPES = ("default", "linear", "llama3", "longrope")  # those that can do no more than divide each frequency by a constant
QKV = ("attn_q", "attn_k", "attn_v")
EVERY = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TABLE, OWN, EITHER = "the table", "a matrix of its own", "either"  # what the head may be


@dataclass(frozen=True)
class Architecture:
    """What a network of GGUF may have, and how it differs from that of transformers."""

    unequal: bool = False  # neurons, heads and groups of its own in every block
    factors: bool = False  # a divisor of its own for every rotary frequency; elsewhere there is one for all
    partial: bool = False  # coordinates of a head that are not rotated
    wide: bool = True  # heads that together have another width than the stream
    biases: tuple[str, ...] = ()  # the matrices of a block that may have one
    head: str = EITHER
    activation: tuple[str, ...] = SILU
    pairs: bool = False  # coordinates 2i and 2i + 1 of a head turn together, in transformers i and i + size/2


ARCHITECTURES = {
    "llama": Architecture(factors=True, biases=EVERY, pairs=True),
    "deci": Architecture(unequal=True, factors=True, biases=EVERY, pairs=True),
    "qwen2": Architecture(wide=False, biases=QKV),
    "qwen3": Architecture(),
    "openelm": Architecture(unequal=True, head=TABLE),
    "gemma3": Architecture(activation=GELU),
    "phi2": Architecture(partial=True, wide=False, biases=EVERY, head=OWN, activation=GELU),
    "gptneox": Architecture(partial=True, wide=False, biases=("attn_qkv", *EVERY), head=OWN, activation=GELU),
}
MODEL_TYPES = {  # transformers' name -> GGUF's, the first that fits is taken
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "gemma3_text": ("gemma3",),
    "phi": ("phi2",),
    "gpt_neox": ("gptneox",),
}
# What to do instead, behind a reason.
ALIKE = "compress with a method that leaves all blocks alike, such as `invoke compress --method wanda-sp` or shortgpt"
NO_BIAS = "compress without new biases, as `invoke compress --method flap --set compensate=no` does"
FULL_WIDTH = "remove neurons or blocks only, as `invoke compress --method wanda-sp` or shortgpt does"


class Blocks(NamedTuple):
    """What each block has: neurons, heads and key-value heads."""

    neurons: list[int]
    heads: list[int]
    groups: list[int]

    @property
    def equal(self) -> bool:
        return all(len(set(counts)) == 1 for counts in self)


class Rotation(NamedTuple):
    """How positions turn heads: the base of the frequencies, and a divisor of each, [rotated coordinates / 2] in float32."""

    base: float
    factors: torch.Tensor

    @property
    def size(self) -> int:
        """Coordinates of a head that are rotated."""
        return 2 * len(self.factors)

    @property
    def alike(self) -> bool:
        """Whether one number divides all frequencies."""
        return bool((self.factors == self.factors[0]).all())


@dataclass(frozen=True)
class Network:
    """A model under GGUF's name for it."""

    architecture: str
    model: nn.Module
    blocks: Blocks
    rotation: Rotation


# --- what a model is ----------------------------------------------------------------------------------------------------


def check_config(config) -> None:
    """Raise ValueError for a configuration that no architecture of GGUF can express."""
    kind = config.model_type
    if kind not in MODEL_TYPES:
        raise ValueError(f"model type {kind!r} has no GGUF export here: supported are {', '.join(MODEL_TYPES)}")
    used, known = getattr(config, "hidden_activation", None) or config.hidden_act, ARCHITECTURES[MODEL_TYPES[kind][0]].activation
    if used not in known:
        raise ValueError(f"activation {used!r} cannot be written: readers of GGUF apply {known[0]} in every such model")
    rotations = config.rope_parameters
    for rope in [rotations] if "rope_type" in rotations else rotations.values():  # Gemma 3 has two
        scaling = rope["rope_type"]
        if scaling not in ROPE_TYPES:
            raise ValueError(f"rotary scaling {scaling!r} is not translated to GGUF: supported are {', '.join(ROPE_TYPES)}")
        if scaling == "longrope" and not (has_fixed_rotation(config) and rope.get("attention_factor") == 1.0):
            raise ValueError(
                "rotary scaling 'longrope' is translated only with the same factors for all lengths, and attention 1"
            )
    if kind == "gemma3_text":
        _check_gemma(config)
    if kind == "gpt_neox" and not config.attention_bias:
        raise ValueError("this GPT-NeoX has attention without biases, which readers of GGUF demand")


def _check_gemma(config) -> None:
    if config.use_bidirectional_attention:
        raise ValueError("this Gemma 3 attends to later tokens, which a GGUF `gemma3` does not")
    if config.attn_logit_softcapping:
        raise ValueError("this Gemma 3 bounds the scores of attention (attn_logit_softcapping), which a GGUF `gemma3` does not")
    if (rope := config.rope_parameters["sliding_attention"])["rope_type"] != "default":
        raise ValueError(f"rotary scaling {rope['rope_type']!r} of the blocks with a window has no place in a GGUF `gemma3`")


def _blocks_of(model: nn.Module) -> Blocks:
    anatomy, size, config = Anatomy(model), head_size(model.config), model.config
    readers = anatomy.family.attention.readers
    if len(readers) == 1:  # GPT-NeoX keeps q, k and v in one matrix, which is never cut
        every = [config.num_attention_heads] * len(anatomy.blocks)
        return Blocks(ffn_widths(model), every, every)
    heads = [block.get_submodule(readers[0]).out_features // size for block in anatomy.blocks]
    return Blocks(ffn_widths(model), heads, kv_groups(model))


def rotation_of(model: nn.Module) -> Rotation:
    """Of a Gemma 3, the rotation of the blocks that see the whole text, where it has any."""
    config, table = model.config, model.base_model.rotary_emb
    if "rope_type" in config.rope_parameters:
        rope, used = config.rope_parameters, table.inv_freq
    else:
        kind = "full_attention" if "full_attention" in config.layer_types else "sliding_attention"
        rope, used = config.rope_parameters[kind], getattr(table, f"{kind}_inv_freq")
    base, size = rope["rope_theta"], 2 * len(used)
    if rope["rope_type"] == "longrope":  # a model that was read from a GGUF file: the very factors of that file
        return Rotation(base, torch.tensor(rope["short_factor"], dtype=torch.float32))
    plain = 1.0 / base ** (torch.arange(0, size, 2).float() / size)  # rounded as transformers rounds them
    factors = (plain.double() / used.double()).float()
    return Rotation(base, torch.where((factors - 1).abs() < 1e-5, 1.0, factors))


def network_of(model: nn.Module, rotation: Rotation | None = None) -> Network:
    """A model whose configuration passed `check_config`, under GGUF's name for it. rotation: needed if all is on the meta device.

    Raises ValueError, with the reasons and a way out, if no architecture for models of its type may have all that it has.
    """
    blocks, rotation = _blocks_of(model), rotation or rotation_of(model)
    found = {name: _hindrance(name, model, blocks, rotation) for name in MODEL_TYPES[model.config.model_type]}
    if fitting := [name for name, hindrance in found.items() if hindrance is None]:
        return Network(fitting[0], model, blocks, rotation)
    reasons = "; ".join(f"as {name!r} it cannot run, because {reason}" for name, (reason, _) in found.items())
    ways = ", or ".join(dict.fromkeys(way for _, way in found.values() if way))
    raise ValueError(f"no GGUF architecture is this {model.config.model_type}: {reasons}" + f". Instead, {ways}" * bool(ways))


def _hindrance(name: str, model: nn.Module, blocks: Blocks, rotation: Rotation) -> tuple[str, str] | None:
    """Why a model is not an architecture, and what to do instead, or None."""
    may, size, config = ARCHITECTURES[name], head_size(model.config), model.config
    if not (may.unequal or blocks.equal):
        return "its blocks are of unequal widths", ALIKE
    if not may.partial and rotation.size != size:
        return f"only {rotation.size} of the {size} coordinates of a head are rotated", ""
    if not (may.factors or rotation.alike):
        return "each of its rotary frequencies was stretched by a number of its own", ""
    if not may.wide and (together := blocks.heads[0] * size) != config.hidden_size:
        return f"its heads together are {together} wide and the stream is {config.hidden_size}", FULL_WIDTH
    if may.head == TABLE and not config.tie_word_embeddings:
        return "its head is another matrix than its table", ALIKE
    biased = {tensor.split(".")[2] for tensor in tensors_of(name, model) if re.fullmatch(r"blk\..*\.bias", tensor)}
    if unknown := sorted(layer for layer in biased - set(may.biases) if not layer.endswith("norm")):
        return f"its {unknown[0]} has a bias", NO_BIAS
    return None


# --- keys ---------------------------------------------------------------------------------------------------------------


def add_shape(writer, network: Network) -> None:
    """Give a writer of GGUF the keys of a network."""
    config, blocks, rotation = network.model.config, network.blocks, network.rotation
    gemma = config.model_type == "gemma3_text"
    window = None if gemma else getattr(config, "sliding_window", None)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window or float("inf")))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for add, counts in zip(
        (writer.add_feed_forward_length, writer.add_head_count, writer.add_head_count_kv), blocks, strict=True
    ):
        add(counts[0] if blocks.equal else counts)
    for add in (writer.add_key_length, writer.add_value_length):
        add(head_size(config))
    writer.add_rope_dimension_count(rotation.size)
    writer.add_rope_freq_base(rotation.base)
    if rotation.alike and rotation.factors[0] != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation.factors[0].item())
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    if network.architecture == "gptneox":
        writer.add_parallel_residual(True)
    if gemma:
        _add_gemma(writer, config)


def _add_gemma(writer, config) -> None:
    """The window of a Gemma 3, the blocks that have one, and their rotation."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if any(sliding):  # llama.cpp aborts at a window that no block has
        usual = [i % 6 < 5 for i in range(len(sliding))]
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(6 if sliding == usual else sliding)  # an array where blocks are gone
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


# --- tensors ------------------------------------------------------------------------------------------------------------


def tensors_of(architecture: str, model: nn.Module) -> dict[str, list[str]]:
    """{tensor of the file: the tensors of the model of which it is made, one above the other}, in the order of the file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    found = {}
    for name in stored_tensors(model):
        place = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name) if architecture == "openelm" else name
        found.setdefault(names.get_name(place, (".weight", ".bias")), []).append(name)
    if ARCHITECTURES[architecture].head == OWN:
        found.setdefault("output.weight", found["token_embd.weight"])
    return found


def as_in_file(network: Network, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the model, as it stands in the file under this name."""
    layer, config, blocks, architecture = name.split(".")[-2], network.model.config, network.blocks, network.architecture
    if ARCHITECTURES[architecture].pairs and layer in ("attn_q", "attn_k"):
        return interleave(value, head_size(config))
    if architecture == "gptneox" and layer == "attn_qkv":  # q, k and v of each head -> all of q, all of k, all of v
        return value.unflatten(0, (blocks.heads[0], 3, -1)).transpose(0, 1).flatten(0, 2)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        gain = value.double() + Anatomy(network.model).family.gain_offset
        return gain * _query_scale(config, blocks) if layer == "attn_q_norm" else gain
    return value


def interleave(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder the rows of q or k, [heads · size, ...], from transformers' rotary layout to that of a GGUF `llama` or `deci`.

    transformers rotates coordinates i and i + size/2 of a head together, these two rotate 2i and 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _query_scale(config, blocks: Blocks) -> float:
    """By what the queries of a Gemma 3 are multiplied, so that its scores of attention have the scale of the configuration.

    Readers divide scores by the root of the head's size, and in a network of 62 blocks, which they take for the one of 27 billion
    parameters, by that of the width per head.
    """
    theirs = config.hidden_size // blocks.heads[0] if config.num_hidden_layers == 62 else head_size(config)
    return (theirs / config.query_pre_attn_scalar) ** 0.5
