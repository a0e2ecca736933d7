"""Write a stock or a pruned model as one GGUF file, for llama.cpp and the programs built on it.

GGUF is a header of typed keys followed by tensors. Every key that a reader could otherwise guess from the width is
written, because the guess would be wrong for a sliced model, whose heads keep their size while the width shrinks. One tensor
is in memory at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import struct
import tempfile
import warnings
from dataclasses import replace
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
from lib.models.gguf_architecture import (
    Network,
    Rotation,
    add_shape,
    as_in_file,
    check_config,
    network_of,
    rotation_of,
    tensors_of,
)
from lib.models.output import check_output, written_whole
from lib.primitives.checks import choose_one

TOKENIZER = "tokenizer.json"
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

# What to do about rows of other lengths. An MLP of another width is filled up, so it has none.
STREAM_OF_32 = "`invoke compress --method slicegpt-stock --set round_interval=32` leaves a stream that is a multiple of 32 wide"
HEADS_OF_32 = "The outputs of attention have rows as long as all heads together: a method that keeps all heads keeps their length"

# A byte-level tokenizer first splits text into words by a regular expression; GGUF stores only a name for it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}  # SentencePiece's tokens for the bytes of unknown characters


def to_gguf(folder: str | Path, out: str | Path, dtype: str = "float16", fill: int = 1) -> Path:
    """Convert a stock model folder, or a structurally pruned model of this suite, to the new GGUF file `out`. Returns `out`.

    dtype: float16, bfloat16, float32, Q8_0, Q4_1 or Q4_0, of the matrices; norms and biases are always float32, and with 4 bits
    the table and the head have Q8_0. These types hold rows of whole blocks of 32 numbers: an MLP of another width gets neurons of
    zeros, which change nothing, and any other matrix keeps 16 bits, with a warning; `kinds` counts them. fill: MLPs get such
    neurons up to a multiple of it, as 256 for a file that another tool will quantise. A sliding window that is shorter than the
    model's positions becomes the context length, because readers ignore windows, other than those of a Gemma 3: up to that length
    they agree. Readers compute GELU by the formula with tanh in 16 bits, so models with it (Gemma 3, Phi-2, GPT-NeoX) differ
    slightly.

    Raises FileNotFoundError for an incomplete folder, FileExistsError for an existing file, and ValueError, with the reason, for
    a model or tokenizer that readers of GGUF would run differently: all before anything is written. A weight too large for
    `dtype` raises ValueError when it is written; the file is complete or absent. Format: docs/gguf.md in the repository of ggml.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    _check_arguments(folder, out, dtype, fill)
    model, places = _described(folder)
    take_generation_config(model, folder)  # raises for a damaged file
    network = _filled(network_of(model), dtype, fill)
    writer = _writer(network, folder.resolve().name, dtype)
    _add_tokenizer(writer, folder, model.config)
    tensors = _tensors(network, dtype)
    check_output(out, sum(tensor.size for tensor in tensors))
    _warn_of_rows(tensors, dtype)
    try:
        with written_whole(out) as partial, contextlib.closing(writer):
            _write_header(writer, partial, tensors, network.rotation)
            _write_tensors(writer, network, tensors, places, dtype)
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
        check_config(config)
        bare, writer = (gguf.GGUFWriter(None, "llama") for _ in range(2))
        _add_tokenizer(writer, Path(folder), config)
        none = [], Rotation(1.0, torch.ones(1))  # no tensors, and no rotary factors
        self.tokenizer = _written_bytes(writer, *none) - _written_bytes(bare, *none)
        self.rotation = rotation_of(empty_model(config))  # meta tensors have none

    def __call__(self, model: nn.Module) -> int:
        _check_edits(getattr(model, "edits", []))
        check_config(model.config)
        network = _filled(network_of(model, self.rotation), self.dtype)
        tensors = _tensors(network, self.dtype)
        stretch = [] if self.rotation.alike else [self.rotation.factors.nbytes]
        header = _written_bytes(_writer(network, self.name, self.dtype), tensors, self.rotation) + self.tokenizer
        return _padded(header) + sum(map(_padded, [*stretch, *(tensor.size for tensor in tensors)]))


def _padded(size: int) -> int:
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _written_bytes(writer, tensors: list[Tensor], rotation: Rotation) -> int:
    """Bytes of a file without its tensors' data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(writer):
        path = Path(folder) / "header"
        _write_header(writer, path, tensors, rotation)
        writer.flush()
        return path.stat().st_size


def _writer(network: Network, name: str, dtype: str) -> gguf.GGUFWriter:
    """A writer that has all keys of the network."""
    writer = gguf.GGUFWriter(None, network.architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    add_shape(writer, network)
    return writer


def kinds(path: str | Path) -> pd.DataFrame:
    """What the tensors of a GGUF file are kept in: a row for each type, with the number of `tensors` and their `bytes`."""
    tensors = [{"type": t.tensor_type.name, "bytes": int(t.n_bytes)} for t in gguf.GGUFReader(path).tensors]
    return pd.DataFrame(tensors).groupby("type").bytes.agg(tensors="count", bytes="sum").reset_index()


def _check_arguments(folder: Path, out: Path, dtype: str, fill: int) -> None:
    choose_one("dtype of a GGUF file", dtype, DTYPES)
    if type(fill) is not int or fill < 1:
        raise ValueError(f"fill is {fill!r}: give a whole number of neurons, such as 256, or 1 for none")
    check_output(out)
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a model folder in the Hugging Face format, with its tokenizer")


# --- what the folder holds ----------------------------------------------------------------------------------------------


def _described(folder: Path) -> tuple[nn.Module, dict[str, Place]]:
    """The folder's model without weights, and where they are. Raises ValueError for one that readers would run differently."""
    if is_checkpoint(folder):
        model, record = described(folder)
        _check_edits(record["edits"])
        check_config(model.config)
        return model, places_in(model, folder, record)
    config = plain(config_of(folder))
    check_config(config)
    model = empty_model(config)
    return model, places_of(model, folder)


def _check_edits(edits: list[dict]) -> None:
    """Raise ValueError, with the way out, for edits that leave modules which no architecture of GGUF has.

    Blocks of unequal widths are not among them: whether an architecture holds these depends on the family.
    """
    if hindering := [edit for edit in edits if edit["edit"] != "structured"]:
        raise ValueError(f"no GGUF architecture is this compressed model: {way_to_stock(hindering)}")


# --- the header ---------------------------------------------------------------------------------------------------------


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
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            name = "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            name = SPLITS.get(words)
    if name is None or any(step["type"] != "NFC" for step in _steps(spec["normalizer"], "normalizers")):
        raise ValueError(
            "the tokenizer splits or normalises text in a way that cannot be exported (supported are those of GPT-2, Llama 3, "
            f"Qwen 2 and SmolLM): {json.dumps([spec['normalizer'], spec['pre_tokenizer']])}"
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
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}  # no spaces are left
    match _steps(spec["normalizer"], "normalizers"), _steps(spec["pre_tokenizer"], "pretokenizers"):
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return scheme != "never"
        case [{"type": "Prepend", "prepend": "▁"}, replace], [] if replace == metaspace:
            return True
        case [replace], split if replace == metaspace and split in ([], [idle]):
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
    """A tensor of the file: its name there, the tensors of the model that it is made of, shape, type, and bytes."""

    name: str
    parts: list[str]
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    size: int


def _filled(network: Network, dtype: str, fill: int = 1) -> Network:
    """The network with MLPs as wide as whole blocks of the numbers that a type holds together, and a multiple of `fill`."""
    step = math.lcm(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[DTYPES[dtype][0]]][0], fill)
    widths = [-(-width // step) * step for width in network.blocks.neurons]
    return replace(network, blocks=network.blocks._replace(neurons=widths))


def _shape(network: Network, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in the file, where an MLP may have more neurons than in the model."""
    block, layer = re.match(r"(?:blk\.(\d+)\.)?(.*)", name).groups()
    if layer.startswith(("ffn_gate.", "ffn_up.")):
        return network.blocks.neurons[int(block)], *shape[1:]
    return (shape[0], network.blocks.neurons[int(block)]) if layer == "ffn_down.weight" else shape


def _tensors(network: Network, dtype: str) -> list[Tensor]:
    """The tensors of the file in order. Rows that do not divide into the blocks of a type stay in 16 bits."""
    stored, found = stored_tensors(network.model), []
    for name, parts in tensors_of(network.architecture, network.model).items():
        shape = _shape(network, name, (sum(len(stored[part]) for part in parts), *stored[parts[0]].shape[1:]))
        wished = gguf.GGMLQuantizationType[_wished(name, shape, dtype)]
        kind = wished if shape[-1] % gguf.GGML_QUANT_SIZES[wished][0] == 0 else gguf.GGMLQuantizationType.F16
        found.append(Tensor(name, parts, shape, kind, _bytes(shape, kind)))
    return found


def _warn_of_rows(tensors: list[Tensor], dtype: str) -> None:
    """Warn of matrices that stay in 16 bits although fewer were asked for, with what that costs and how to avoid it."""
    left = [t for t in tensors if t.kind.name == "F16" != _wished(t.name, t.shape, dtype)]
    if not left:
        return
    more = sum(t.size - _bytes(t.shape, gguf.GGMLQuantizationType[_wished(t.name, t.shape, dtype)]) for t in left)
    lengths = [t.shape[-1] for t in left]
    heads = [".attn_output." in t.name for t in left]  # all other rows are as long as the stream is wide
    ways = [STREAM_OF_32] * (not all(heads)) + [HEADS_OF_32] * any(heads)
    warnings.warn(
        f"{len(left)} matrices with rows of {min(lengths)} to {max(lengths)} numbers, no multiple of 32, stay in 16 bits: "
        f"{more / 1e6:.1f} MB more than in {dtype}. {'. '.join(ways)}",
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


def _write_header(writer, path: Path, tensors: list[Tensor], rotation: Rotation) -> None:
    """The keys, and names, shapes and types of all tensors."""
    if not rotation.alike:
        factors = rotation.factors
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.size, raw_dtype=tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(writer, network: Network, tensors: list[Tensor], places: dict[str, Place], dtype: str) -> None:
    """Each tensor, in the order of the header, read from its safetensors files just before it is written."""
    if not network.rotation.alike:
        writer.write_tensor_data(network.rotation.factors.numpy())
    for tensor in tensors:
        value = as_in_file(network, tensor.name, torch.cat([read(places[part]) for part in tensor.parts]))
        more = [n for have, want in zip(value.shape, tensor.shape, strict=True) for n in (want - have, 0)]
        value = nn.functional.pad(value, more[::-1])  # the last dimension comes first there
        writer.write_tensor_data(_stored(tensor.parts[0], value, tensor.kind, dtype))


def _stored(name: str, value: torch.Tensor, kind: gguf.GGMLQuantizationType, dtype: str) -> numpy.ndarray:
    """The bytes of a tensor in a type of GGUF. Raises ValueError, naming it, for numbers that the type cannot hold."""
    if not torch.isfinite(value).all():
        raise ValueError(f"tensor {name} holds NaN or infinity: the model is damaged")
    value = value.to(PLAIN.get(kind.name, torch.float32)).contiguous()
    try:
        if kind.name not in PLAIN:
            with numpy.errstate(over="raise"):  # the scale of a block has 16 bits
                return gguf.quants.quantize(value.numpy(), kind)
        fits = bool(torch.isfinite(value).all())
    except FloatingPointError:
        fits = False
    if not fits:
        raise ValueError(f"tensor {name} holds numbers too large for {dtype}: use bfloat16 or float32")
    return value.view(torch.uint8).numpy()
