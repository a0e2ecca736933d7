"""What a model folder says before its weights are read: configuration, tokenizer, and the name, shape and file of every tensor.

Whatever cannot become the model that was meant is refused here, for every path of the suite alike: loading into memory,
compressing from disk, and export.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lib.evaluation.console import no_progress_bars
from lib.primitives.refused import text_alone

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# Other names of tensors in files: the beginning of the name in the present class -> that in the file. Files without the prefix of
# the whole model ("layers.0" for "model.layers.0") are known too, for all families.
OTHER_NAMES = {"gpt_neox": {"lm_head.": "embed_out."}}
# Tables that are computed, which old files store.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")

# The most that a configuration may count of each. A larger number is damage, and would take hours or all memory to build.
LARGEST = {"num_hidden_layers": 1000, "n_layer": 1000} | dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "head_dim", "num_attention_heads",
     "num_key_value_heads", "max_position_embeddings", "sliding_window", "n_embd", "n_inner", "n_head", "n_positions"), 2**24,
)  # fmt: skip

SCALE = "_scale_inv"  # behind the name of a weight in FP8: the factor of each of its tiles


# --- the configuration --------------------------------------------------------------------------------------------------


def config_of(source: str | Path):
    """The configuration of a local folder, or of a model that the hub knows by `source`.

    Raises ValueError for one that is damaged, that needs code of its own, or that is no language model; for weights that are
    quantised other than in FP8, with the remedy; OSError where the hub does not give it.
    """
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir():
        _check_code(folder)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if folder.is_dir():  # any inconsistent number fails somewhere inside the library
            raise ValueError(f"{folder}/{CONFIG} cannot be read: {_reason(error)}") from error
        if isinstance(error, OSError):
            raise
        raise ValueError(f"the configuration of {source} cannot be read: {_reason(error)}") from error
    if not (config.dtype is None or (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point)):
        raise ValueError(f"{source}/{CONFIG} has dtype {config.dtype!r}, in which no model works")
    if hasattr(config, "text_config") or hasattr(config, "vision_config"):
        raise ValueError(f"{source} is of type {config.model_type!r}, for more than text: {text_alone(config)}")
    _check_quantisation(source, config)
    return config


def _check_code(folder: Path) -> None:
    """Raise ValueError for a configuration that is no JSON object, or whose model type only code of its own explains."""
    from transformers import CONFIG_MAPPING

    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/{CONFIG} cannot be read: {_reason(error)}") from error
    kind = said.get("model_type") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " It needs code of its own, which is never run here." if isinstance(said, dict) and "auto_map" in said else ""
        raise ValueError(f"{folder}/{CONFIG} names the model type {kind!r}, which transformers does not know.{own}")
    check_numbers(f"{folder}/{CONFIG}", said)


def check_numbers(where: str, said: dict) -> None:
    """Raise ValueError for numbers that no model has, before a class tries to build one, or fails when the model is run."""
    for name, value in said.items():
        if isinstance(value, dict):
            check_numbers(where, value)
        if type(value) not in (int, float):
            continue
        if name in LARGEST and not 1 <= value <= LARGEST[name]:
            raise ValueError(f"{where} has {name} {value}: models have 1 to {LARGEST[name]:,}")
        if name.endswith(("dropout", "pdrop", "rotary_factor", "rotary_pct")) and not 0 <= value <= 1:
            raise ValueError(f"{where} has {name} {value}: it is a share from 0 to 1")


def _reason(error: Exception) -> str:
    """The words of an error in one line; some carry the stack of another language, which is cut off."""
    return textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__


def quantised(config) -> dict | None:
    """What a configuration says about quantised weights, or None."""
    said = getattr(config, "quantization_config", None)
    return said if said is None or isinstance(said, dict) else said.to_dict()


def _check_quantisation(source: str | Path, config) -> None:
    """Raise ValueError for quantised weights, unless they are FP8 in tiles, which becomes other numbers exactly."""
    said = quantised(config)
    if said is None:
        return
    kind = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & said.keys() else "unknown")
    plain = said.get("activation_scheme", "dynamic") == "dynamic" and said.get("fmt", "e4m3") == "e4m3"
    if kind == "fp8" and plain and said.get("weight_block_size"):
        return
    raise ValueError(
        f"the weights of {source} are quantised ({kind}), which cannot be undone exactly: give the model in 16 or 32 bits that "
        "they were made from, or write one with dequantize() of transformers and save_pretrained"
    )


def plain(config):
    """The configuration without a word on quantisation, which has been undone; in place."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_model(config, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a configuration in eval mode, every parameter a meta tensor. Raises ValueError for impossible ones.

    dtype: that of the configuration unless given.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):  # rotary tables are computed, not stored
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as error:  # any inconsistent number in a config fails somewhere inside the library
        raise ValueError(f"{CONFIG} does not describe a language model: {_reason(error)}") from error
    model.tie_weights()  # parameters on the meta device were made one by one, tied ones too
    return model.eval()


def take_generation_config(model: nn.Module, folder: Path) -> None:
    """Give a model what its folder says on generation, such as stop tokens. Raises ValueError for a damaged file."""
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # the library raises errors of many types for values that it does not expect
            raise ValueError(f"{folder / GENERATION} cannot be read: {_reason(error)}") from error
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            said = getattr(model.generation_config, name)
            if not all(type(token) is int for token in (said if isinstance(said, list) else [said]) if token is not None):
                raise ValueError(f"{folder / GENERATION} names the {name} {said!r}, which is no number of a token")


def positions(config) -> int:
    """Longest sequence that a model was made for, in tokens. Raises ValueError where its configuration does not say so."""
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ValueError(f"the configuration of this {config.model_type} model does not name its positions: give --length")
    return found


# --- the tokenizer ------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | Path):
    """The tokenizer of a folder or hub id. Raises ValueError for a folder where it is missing or damaged."""
    from transformers import AutoTokenizer

    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the library raises errors of many types, and without files it asks for other packages
        if not Path(source).is_dir():
            raise
        if not any((Path(source) / file).is_file() for file in TOKENIZERS):
            tokenizer = None
        else:
            raise ValueError(f"the tokenizer in {source} cannot be read: {_reason(error)}") from error
    if tokenizer is None or len(tokenizer) < 2:
        raise ValueError(f"the model folder {source} has no tokenizer files: add those of the original model")
    return tokenizer


# --- the tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: its shape, and its dtype in the words of safetensors."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where a tensor is read from: the file and its name there. scale: the place of the scales by which it is multiplied."""

    file: str
    name: str
    scale: Place | None = None


def headers(folder: Path) -> dict[str, Header]:
    """Every tensor in a folder by its name in the files. Only headers are read.

    Raises ValueError where there are no safetensors, and, naming the file, for one that is missing, cut short or damaged.
    """
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({_reason(error)}): download the model again") from error
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: give a local folder with safetensors")
    found = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file} is missing, cut short or damaged ({error}): download the model again") from error
        found |= {name: Header(str(folder / file), tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
    return found


def places_of(model: nn.Module, folder: Path) -> dict[str, Place]:
    """The place of every tensor of a model (`stored_tensors`), in its order. Meta tensors suffice.

    Raises ValueError that names the first tensor which is missing, has another shape, is quantised, or belongs to no module, and
    a head that is stored beside the embedding to which the configuration ties it, but is another matrix.
    """
    wanted, found = stored_tensors(model), headers(folder)
    places, used = {}, set()
    for name, like in wanted.items():
        stored = next((other for other in _names(name, model) if other in found), None)
        if stored is None:
            raise ValueError(f"{folder} has no tensor {name}: the folder is not complete, or not of the model in its {CONFIG}")
        header, scale = found[stored], found.get(stored + SCALE)
        if header.shape != tuple(like.shape):
            raise ValueError(
                f"{stored} in {header.file} is {header.shape}, but the model in {CONFIG} needs {tuple(like.shape)}: "
                "weights and configuration are of different models"
            )
        if header.dtype not in ("F64", "F32", "F16", "BF16") and (header.dtype != "F8_E4M3" or scale is None):
            raise ValueError(f"{stored} in {header.file} is quantised to {header.dtype}: give a model in 16 or 32 bits")
        places[name] = Place(header.file, stored, Place(scale.file, stored + SCALE) if scale else None)
        used |= {stored, stored + SCALE}
    aliases = {other for name in model.state_dict() for other in _names(name, model)}  # such as a tied head, stored all the same
    for name in sorted(found.keys() - used - aliases):
        if not COMPUTED.search(name):
            raise ValueError(f"{name} in {found[name].file} belongs to no part of the model in {CONFIG}: is it of another model?")
    _check_ties(model, wanted, places, found)
    return places


def _check_ties(model: nn.Module, wanted: dict, places: dict[str, Place], found: dict[str, Header]) -> None:
    """Raise ValueError for a tensor that a tie of the configuration would replace by another one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    firsts = {id(value): name for name, value in reversed(parameters.items())}
    for name in parameters.keys() - wanted.keys():
        stored = next((other for other in _names(name, model) if other in found), None)
        first = places[firsts[id(parameters[name])]]
        if stored is None or stored == first.name:
            continue
        if not torch.equal(read(Place(found[stored].file, stored)).float(), read(first).float()):
            raise ValueError(
                f"{stored} in {found[stored].file} is another matrix than {first.name}, although {CONFIG} ties the two: set "
                "tie_word_embeddings to false there, or get the model again"
            )


def name_in_stock(name: str, model: nn.Module) -> str:
    """The name of a tensor in published files of this family, which all versions of transformers read."""
    for start, other in OTHER_NAMES.get(model.config.model_type, {}).items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def _names(name: str, model: nn.Module) -> list[str]:
    """The names that files may have for a tensor of a model."""
    return [name, name_in_stock(name, model), name.removeprefix(f"{model.base_model_prefix}.")]


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with a shared tensor (a tied head) under its first name only."""
    firsts, all_names = (dict(model.named_parameters(remove_duplicate=once)) for once in (True, False))
    return {name: value for name, value in model.state_dict().items() if name in firsts or name not in all_names}


def read(place: Place) -> torch.Tensor:
    """A tensor from its file, which is mapped, so that nothing else is read. One in FP8 is multiplied by its scales, in float32.

    Raises ValueError, naming both, where it cannot be read.
    """
    try:
        with safe_open(place.file, framework="pt") as tensors:
            value = tensors.get_tensor(place.name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{place.name} cannot be read from {place.file}: {error}") from error
    return value if place.scale is None else _scaled(value, read(place.scale))


def _scaled(value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W [m, n] in float32 from FP8 numbers [m, n] and one scale for each tile, [m / a, n / b]."""
    if any(size % count for size, count in zip(value.shape, scales.shape, strict=True)):
        raise ValueError(f"FP8 weights of shape {tuple(value.shape)} do not divide into {tuple(scales.shape)} tiles")
    a, b = (size // count for size, count in zip(value.shape, scales.shape, strict=True))
    return value.float() * scales.float().repeat_interleave(a, 0).repeat_interleave(b, 1)
