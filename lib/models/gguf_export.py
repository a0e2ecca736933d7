"""Write a stock or a pruned model as one GGUF file, for llama.cpp and the programs built on it.

GGUF is a header of typed keys followed by tensors. Every key that a reader could otherwise guess from the width is
written, because the guess would be wrong for a sliced model, whose heads keep their size while the width shrinks. One tensor
is in memory at a time.

Structured pruning leaves blocks of unequal width, which readers refuse in a `llama`. Their architecture `deci` is the same
network with arrays in place of three numbers: neurons, heads and key-value heads of each block. A block without neurons would be
skipped there together with its attention, and the first block must have attention; our methods leave every block some of both.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy
import pandas as pd
import torch
from torch import nn

from lib.models.checkpoint import described, is_checkpoint, places_in, way_to_stock
from lib.models.folder import (
    CONFIG,
    GENERATION,
    Place,
    config_of,
    empty_model,
    load_tokenizer,
    places_of,
    plain,
    read,
    stored_tensors,
    take_generation_config,
)
from lib.models.output import check_output, written_whole
from lib.primitives.anatomy import Anatomy, has_fixed_rotation, head_size
from lib.primitives.checks import choose_one
from lib.primitives.structured import ffn_widths, kv_groups

TOKENIZER = "tokenizer.json"
MODEL_TYPES = ("llama", "mistral", "qwen2")
DTYPES = {  # ours -> GGUF's names for a matrix and for a file of it
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float32": ("F32", "ALL_F32"),
    "Q8_0": ("Q8_0", "MOSTLY_Q8_0"),  # 8.5 bits: blocks of 32 numbers with one scale
    "Q4_1": ("Q4_1", "MOSTLY_Q4_1"),  # 5 bits: a scale and a least value
    "Q4_0": ("Q4_0", "MOSTLY_Q4_0"),  # 4.5 bits
}
PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
TABLES = ("token_embd.weight", "output.weight")  # 8 bits in a file of 4, as llama.cpp's own tool keeps them in more bits
ROPE_TYPES = ("default", "linear", "llama3", "longrope")  # those that can do no more than divide each frequency by a constant

# A byte-level tokenizer first splits text into words by a regular expression; GGUF stores only a name for it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}  # SentencePiece's tokens for the bytes of unknown characters


def to_gguf(folder: str | Path, out: str | Path, dtype: str = "float16") -> Path:
    """Convert a stock model folder, or a structurally pruned model of this suite, to the new GGUF file `out`. Returns `out`.

    dtype: float16, bfloat16, float32, Q8_0, Q4_1 or Q4_0, of the matrices; norms and biases are always float32, and with 4 bits
    the table and the head have Q8_0. A matrix whose rows are no multiple of 32 numbers keeps 16 bits, with a warning; `kinds`
    counts them. A sliding window that is shorter than the model's positions becomes the context length, because readers
    ignore windows: up to that length they agree.

    Raises FileNotFoundError for an incomplete folder, FileExistsError for an existing file, and ValueError, with the reason, for
    a model or tokenizer that readers of GGUF would run differently: all before anything is written. A weight too large for
    `dtype` raises ValueError when it is written; the file is complete or absent. Format: docs/gguf.md in the repository of ggml.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    _check_arguments(folder, out, dtype)
    model, places = _described(folder)
    take_generation_config(model, folder)  # raises for a damaged file
    factors = _rope_factors(model)
    writer = _writer(model, factors, folder.resolve().name, dtype)
    _add_tokenizer(writer, folder, model.config)
    tensors = _tensors(writer.arch, model, dtype)
    check_output(out, sum(tensor.size for tensor in tensors.values()))
    _warn_of_rows(tensors, dtype)
    try:
        with written_whole(out) as partial, contextlib.closing(writer):
            _write_header(writer, partial, tensors, factors)
            _write_tensors(writer, tensors, places, factors, dtype)
    except (struct.error, OverflowError) as error:  # each key has a type of its own
        raise ValueError(f"a number in the configuration of {folder} has no place in GGUF: {error}") from error
    return out


class FileSize:
    """Bytes of the GGUF files of models with the tokenizer of `folder`, counted before they are written; meta tensors suffice.

    name: of the folder that will be exported. Raises ValueError, here or for a model, where `to_gguf` would.
    """

    def __init__(self, folder: str | Path, name: str, dtype: str):
        choose_one("dtype of a GGUF file", dtype, DTYPES)
        if not (Path(folder) / TOKENIZER).is_file():
            raise ValueError(f"a GGUF file is counted with its tokenizer, and {folder} is no local folder that has a {TOKENIZER}")
        self.name, self.dtype = name, dtype
        config = plain(config_of(folder))
        _check_config(config)
        bare, writer = (gguf.GGUFWriter(None, "llama") for _ in range(2))
        _add_tokenizer(writer, Path(folder), config)
        none = {}, torch.ones(1)  # no tensors, and no rotary factors
        self.tokenizer = _written_bytes(writer, *none) - _written_bytes(bare, *none)
        self.factors = _rope_factors(empty_model(config))

    def __call__(self, model: nn.Module) -> int:
        _check_config(model.config)
        writer = _writer(model, self.factors, self.name, self.dtype)
        tensors = _tensors(writer.arch, model, self.dtype)
        stretch = [] if self.factors.eq(1).all() else [self.factors.nbytes]
        header = _written_bytes(writer, tensors, self.factors) + self.tokenizer
        return _padded(header) + sum(map(_padded, [*stretch, *(tensor.size for tensor in tensors.values())]))


def _padded(size: int) -> int:
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _written_bytes(writer, tensors: dict[str, Tensor], factors: torch.Tensor) -> int:
    """Bytes of a file without its tensors' data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(writer):
        path = Path(folder) / "header"
        _write_header(writer, path, tensors, factors)
        writer.flush()
        return path.stat().st_size


def _writer(model: nn.Module, factors: torch.Tensor, name: str, dtype: str) -> gguf.GGUFWriter:
    """A writer that has all keys of the network."""
    blocks = _blocks(model)
    writer = gguf.GGUFWriter(None, _architecture(model, factors, blocks))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    _add_shape(writer, model.config, blocks)
    return writer


def kinds(path: str | Path) -> pd.DataFrame:
    """What the tensors of a GGUF file are kept in: a row for each type, with the number of `tensors` and their `bytes`."""
    tensors = [{"type": t.tensor_type.name, "bytes": int(t.n_bytes)} for t in gguf.GGUFReader(path).tensors]
    return pd.DataFrame(tensors).groupby("type").bytes.agg(tensors="count", bytes="sum").reset_index()


def _check_arguments(folder: Path, out: Path, dtype: str) -> None:
    choose_one("dtype of a GGUF file", dtype, DTYPES)
    check_output(out)
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a model folder in the Hugging Face format, with its tokenizer")


# --- what the folder holds ----------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """What each block has: neurons, heads and key-value heads."""

    neurons: list[int]
    heads: list[int]
    groups: list[int]

    @property
    def equal(self) -> bool:
        return all(len(set(counts)) == 1 for counts in self)


def _described(folder: Path) -> tuple[nn.Module, dict[str, Place]]:
    """The folder's model without weights, and where they are. Raises ValueError for one that readers would run differently."""
    if is_checkpoint(folder):
        model, record = described(folder)
        if {edit["edit"] for edit in record["edits"]} != {"structured"}:
            raise ValueError(f"no GGUF architecture is the model in {folder}: {way_to_stock(record['edits'])}")
        _check_config(model.config)
        return model, places_in(model, folder, record)
    config = plain(config_of(folder))
    _check_config(config)
    model = empty_model(config)
    return model, places_of(model, folder)


def _check_config(config) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model type {config.model_type!r} has no GGUF export here: supported are {', '.join(MODEL_TYPES)}")
    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act!r} cannot be written: readers of GGUF apply silu in every such model")
    if (kind := config.rope_parameters["rope_type"]) not in ROPE_TYPES:
        raise ValueError(f"rotary scaling {kind!r} is not translated to GGUF: supported are {', '.join(ROPE_TYPES)}")
    if kind == "longrope" and not (has_fixed_rotation(config) and config.rope_parameters.get("attention_factor") == 1.0):
        raise ValueError("rotary scaling 'longrope' is translated only with the same factors for all lengths, and attention 1")


def _blocks(model: nn.Module) -> Blocks:
    anatomy, size = Anatomy(model), head_size(model.config)
    query = anatomy.family.attention.readers[0]
    heads = [block.get_submodule(query).out_features // size for block in anatomy.blocks]
    return Blocks(ffn_widths(model), heads, kv_groups(model))


def _rope_factors(model: nn.Module) -> torch.Tensor:
    """The divisor of each rotary frequency, [head size / 2] in float32: ones, unless the model's context was extended."""
    used, size, rope = model.model.rotary_emb.inv_freq, head_size(model.config), model.config.rope_parameters
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)  # rounded as transformers rounds them
    if used.shape != plain.shape:
        raise ValueError(f"only {2 * len(used)} of the {size} coordinates of a head are rotated: readers of GGUF rotate all")
    if rope["rope_type"] == "longrope":  # a model that was read from a GGUF file: the very factors of that file
        return torch.tensor(rope["short_factor"], dtype=torch.float32)
    factors = (plain.double() / used.double()).float()
    return torch.where((factors - 1).abs() < 1e-5, 1.0, factors)


# --- the header ---------------------------------------------------------------------------------------------------------


def _architecture(model: nn.Module, factors: torch.Tensor, blocks: Blocks) -> str:
    """GGUF's name for the network: `deci` for unequal blocks, `llama` for a Mistral, and for a Qwen 2 that would not load.

    llama.cpp loads a `qwen2` only if its heads together are as wide as the stream, without rotary factors, and without biases
    other than on q, k and v. Its `llama` and `deci` have none of these limits.
    """
    if not blocks.equal:
        return "deci"
    config = model.config
    square = blocks.heads[0] * head_size(config) == config.hidden_size
    usual = not any(name.endswith(("o_proj.bias", "down_proj.bias")) for name in stored_tensors(model))
    return "qwen2" if config.model_type == "qwen2" and square and usual and factors.eq(1).all() else "llama"


def _add_shape(writer, config, blocks: Blocks) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or float("inf")))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for add, counts in zip(
        (writer.add_feed_forward_length, writer.add_head_count, writer.add_head_count_kv), blocks, strict=True
    ):
        add(counts[0] if blocks.equal else counts)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer, folder: Path, config) -> None:
    """Describe the folder's tokenizer as transformers would use it.

    Byte-level BPE is described by its merges, SentencePiece BPE by scores. Two differences remain. Readers do not
    normalise text, while a Qwen 2 composes accents first (NFC), so text with decomposed accents differs. Readers put a space
    before every text of a SentencePiece model, while some tokenizer files do not if it starts with one.
    """
    tokenizer = load_tokenizer(folder)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_bpe(spec)
    merges = spec["model"]["merges"]
    tokens, types = _token_table(spec, config.vocab_size)
    if spec["model"]["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        _check_sentencepiece(spec)
        writer.add_add_space_prefix(_starts_with_space(spec))
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(spec))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, config, _stop_tokens(folder, config))


def _stop_tokens(folder: Path, config) -> list[int]:
    """The tokens at which transformers ends a text: those of generation_config.json, or of the config if there is none."""
    file = folder / GENERATION
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def _add_special_tokens(writer, tokenizer, config, stops: list[int]) -> None:
    """Special tokens, where a tokenizer puts them, and the chat template.

    GGUF has three places for tokens that end a text: the tokenizer's own is `eos`, the others are `eot` and `eom` in their
    order. Raises ValueError for more of them.
    """
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        own, declared = (getattr(source, f"{name}_token_id", None) for source in (tokenizer, config))
        chosen = declared if own is None else own
        if chosen is not None:
            ids[name] = chosen[0] if isinstance(chosen, list) else chosen
            getattr(writer, f"add_{name}_token_id")(ids[name])
    others = [token for token in dict.fromkeys(stops) if token != ids.get("eos")]
    if len(others) > 2:
        raise ValueError(f"generation stops at the tokens {[ids.get('eos'), *others]}, but GGUF has places for three")
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(token)
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for bos, eos in itertools.product((False, True), repeat=2):
        if whole == [ids.get("bos")] * bos + bare + [ids.get("eos")] * eos:
            break
    else:
        raise ValueError(f"the tokenizer turns {bare} into {whole}: GGUF can only put bos before and eos after a text")
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def _check_bpe(spec: dict) -> None:
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} cannot be exported: GGUF export supports BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[setting]:
            raise ValueError(f"the tokenizer's {setting} {model[setting]!r} has no place in GGUF")
    for token in spec["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise ValueError(f"the tokenizer's token {token['content']!r} absorbs its surroundings, which GGUF cannot express")


def _token_table(spec: dict, rows: int) -> tuple[list[str], list[int]]:
    """Text and GGUF type of the token of each embedding row; rows without a token are marked unused."""
    table = {i: (f"[unused {i}]", gguf.TokenType.UNUSED) for i in range(rows)}
    falls_back = spec["model"]["byte_fallback"]
    for token, i in spec["model"]["vocab"].items():
        table[i] = token, gguf.TokenType.BYTE if falls_back and token in BYTE_TOKENS else gguf.TokenType.NORMAL
    for token in spec["added_tokens"]:
        table[token["id"]] = token["content"], gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    unknown = spec["model"]["unk_token"]
    if falls_back and unknown is not None:  # a byte-level tokenizer has no unknown text
        table[spec["model"]["vocab"][unknown]] = unknown, gguf.TokenType.UNKNOWN
    if len(table) > rows:
        raise ValueError(f"the tokenizer's id {max(table)} exceeds the model's {rows} embeddings: wrong tokenizer?")
    tokens, types = zip(*(table[i] for i in range(rows)), strict=True)
    return list(tokens), [int(kind) for kind in types]


def _split_name(spec: dict) -> str:
    """GGUF's name for the regular expression that splits text into words in a byte-level tokenizer."""
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    name = None
    match steps:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            name = "gpt-2"
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            name = SPLITS.get(words)
    if name is None or any(step["type"] != "NFC" for step in _steps(spec["normalizer"], "normalizers")):
        raise ValueError(
            "the tokenizer splits or normalises text in a way that cannot be exported (supported are those of GPT-2, Llama 3 and "
            f"Qwen 2): {json.dumps([spec['normalizer'], spec['pre_tokenizer']])}"
        )
    if spec["model"]["ignore_merges"] != (name == "llama-bpe"):
        raise ValueError(f"readers of GGUF try whole words before merges with tokenizers of kind llama-bpe alone, not {name}")
    return name


def _check_sentencepiece(spec: dict) -> None:
    """Raise ValueError for merges that scores cannot replace: readers join any neighbours that together are a token."""
    plain = spec["model"]["vocab"].keys() - {token["content"] for token in spec["added_tokens"]}
    if absent := BYTE_TOKENS - plain:
        raise ValueError(f"the tokenizer falls back on bytes, but has no token {min(absent)}: it is damaged")
    merges = {tuple(pair) for pair in spec["model"]["merges"]}
    for token in plain:
        for pair in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if plain.issuperset(pair) and pair not in merges:
                raise ValueError(
                    f"the tokenizer never joins {pair[0]!r} and {pair[1]!r} to its token {token!r}, as SentencePiece would: GGUF "
                    "cannot express a byte fallback with other merges"
                )


def _starts_with_space(spec: dict) -> bool:
    """Whether a SentencePiece tokenizer puts a space before each text. Raises ValueError if it does more to texts."""
    metaspace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match _steps(spec["normalizer"], "normalizers"), _steps(spec["pre_tokenizer"], "pretokenizers"):
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return scheme != "never"
        case [{"type": "Prepend", "prepend": "▁"}, replace], [] if replace == metaspace:
            return True
        case [replace], [] if replace == metaspace:
            return False
    found = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    raise ValueError(f"this SentencePiece tokenizer does more than replace spaces, which GGUF cannot express: {found}")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's score of each token, minus the rank of its merge: readers join the pair of the highest score first."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _steps(stage: dict | None, name: str) -> list[dict]:
    """The steps of a tokenizer's stage, which may be absent, one step or a sequence."""
    return [] if stage is None else stage[name] if stage["type"] == "Sequence" else [stage]


# --- the tensors --------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of the file: its name there, shape, type, and bytes."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    size: int


def _tensors(architecture: str, model: nn.Module, dtype: str) -> dict[str, Tensor]:
    """{name in the model: the tensor of the file}. Rows that do not divide into the blocks of a type stay in 16 bits."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    found = {}
    for name, value in stored_tensors(model).items():
        theirs, shape = names.get_name(name, (".weight", ".bias")), tuple(value.shape)
        wished = gguf.GGMLQuantizationType[_wished(theirs, shape, dtype)]
        kind = wished if shape[-1] % gguf.GGML_QUANT_SIZES[wished][0] == 0 else gguf.GGMLQuantizationType.F16
        found[name] = Tensor(theirs, shape, kind, _bytes(shape, kind))
    return found


def _warn_of_rows(tensors: dict[str, Tensor], dtype: str) -> None:
    """Warn of matrices that stay in 16 bits although fewer were asked for, with what that costs."""
    left = [t for t in tensors.values() if t.kind.name == "F16" != _wished(t.name, t.shape, dtype)]
    if not left:
        return
    more = sum(t.size - _bytes(t.shape, gguf.GGMLQuantizationType[_wished(t.name, t.shape, dtype)]) for t in left)
    lengths = [t.shape[-1] for t in left]
    warnings.warn(
        f"{len(left)} matrices with rows of {min(lengths)} to {max(lengths)} numbers, no multiple of 32, stay in 16 bits: "
        f"{more / 1e6:.1f} MB more than in {dtype}. Compress with `--set multiple=32` where the method has it",
        stacklevel=3,
    )


def _wished(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """GGUF's type for a tensor, if the length of its rows allows it."""
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if dtype.startswith("Q4") and name in TABLES else DTYPES[dtype][0]


def _bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() * size // block


def _interleave(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder the rows of q or k, [heads · size, ...], from transformers' rotary layout to that of a GGUF `llama` or `deci`.

    transformers rotates coordinates i and i + size/2 of a head together, these two rotate 2i and 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _write_header(writer, path: Path, tensors: dict[str, Tensor], factors: torch.Tensor) -> None:
    """The keys, and names, shapes and types of all tensors."""
    if not factors.eq(1).all():
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
    for tensor in tensors.values():
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.size, raw_dtype=tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(writer, tensors: dict[str, Tensor], places: dict[str, Place], factors: torch.Tensor, dtype: str) -> None:
    """Each tensor, in the order of the header, read from its safetensors file just before it is written."""
    if not factors.eq(1).all():
        writer.write_tensor_data(factors.numpy())
    for name, tensor in tensors.items():
        value = read(places[name])
        if writer.arch in ("llama", "deci") and (".q_proj." in name or ".k_proj." in name):
            value = _interleave(value, 2 * len(factors))
        writer.write_tensor_data(_stored(name, value, tensor.kind, dtype))


def _stored(name: str, value: torch.Tensor, kind: gguf.GGMLQuantizationType, dtype: str) -> numpy.ndarray:
    """The bytes of a tensor in a type of GGUF. Raises ValueError, naming it, for numbers that the type cannot hold."""
    value = value.to(PLAIN.get(kind.name, torch.float32)).contiguous()
    if not torch.isfinite(value).all():
        raise ValueError(f"tensor {name} holds NaN, or numbers too large for {dtype}: use bfloat16 or float32")
    return value.view(torch.uint8).numpy() if kind.name in PLAIN else gguf.quants.quantize(value.numpy(), kind)
