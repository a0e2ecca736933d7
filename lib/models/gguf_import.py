"""Read a GGUF file as a plain float32 model: dequantised once into a cache of the user, and loaded from there later.

The cache holds ordinary safetensors folders, named by the SHA-256 of the GGUF file that they were made from, so that files of
the same name are not confused. transformers reads the tokenizer and the plain numbers of the configuration. Its reader of weights
is not used, because it leaves out what it has no place for, such as rotary factors and biases of a `llama`. Here, every tensor of
the file and every key on its heads and its rotation is used, or the file is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import gguf
import torch
from torch import nn

from lib.evaluation.console import no_progress_bars
from lib.models.checkpoint import fingerprint
from lib.models.folder import check_numbers, empty_model
from lib.models.output import disk_is_full, no_space

PARTIAL = "partial-"  # what a conversion writes before it is complete
CONVERSION = 2  # raise when the conversion changes: folders of another number are made again
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}  # GGUF's name -> transformers'
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, [head size / 2]
REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
STOP_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# What transformers assumes of a Gemma 3, whatever its file says; the one of 27 billion parameters has other heads.
GEMMA3 = {"attention.key_length": 256, "attention.sliding_window_pattern": 6, "rope.freq_base_swa": 10000.0}


def cache_folder() -> Path:
    """Where converted models are kept: `pared-down/gguf` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pared-down" / "gguf"


def gguf_folder(path: str | Path) -> Path:
    """Folder of the model in any other GGUF file. Raises FileNotFoundError, or ValueError if it cannot be read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file {path}: give the path of an existing .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} does not start like a GGUF file: it is of another format, damaged, or only a pointer to one"
            )
    return converted(path.stem, sha256_of(path), lambda _: path, "the licence of the file's origin applies")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted(name: str, digest: str, source: Callable[[Path], Path], licence: str) -> Path:
    """The cached folder of the GGUF file with this SHA-256; `source(folder)` gives the file's path where it is needed.

    Processes convert one after the other, and those that waited find the folder made.
    """
    target = cache_folder() / f"{name}-{digest[:16]}"
    if target.is_dir() and _problem(target, digest) is None:
        return target
    with _alone(name):
        problem = _problem(target, digest) if target.is_dir() else None
        if target.is_dir() and problem is None:
            return target
        if problem:
            print(f"{name}: the converted copy {problem}; it is made again", flush=True)
        with _unfinished() as partial:
            file, folder = source(partial), partial / "model"
            print(f"{name}: converting its GGUF file once, about a minute for a large vocabulary ({licence})", flush=True)
            _convert(file, folder)
            files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
            record = {"gguf_sha256": digest, "conversion": CONVERSION, "licence": licence, "files": files}
            (folder / "conversion.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)  # the cache changes in this one step
    size = sum(path.stat().st_size for path in target.iterdir())
    place = str(target).replace(str(Path.home()), "~")  # an executed notebook keeps this line
    print(f"{name}: {size / 1e6:,.0f} MB of float32 weights and tokenizer in {place}", flush=True)
    return target


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """This process alone changes the cache within the `with`; what killed ones have left half-written there is removed first."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache_folder().with_name("gguf.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{name}: waiting for another process that is converting a model", flush=True)
        lock.acquire()
    try:
        for left in cache_folder().glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _problem(folder: Path, digest: str) -> str | None:
    """Why a cached folder cannot be used, or None: every file must have its recorded SHA-256."""
    try:
        record = json.loads((folder / "conversion.json").read_text())
        if (record["gguf_sha256"], record["conversion"]) != (digest, CONVERSION):
            return "is of another file or an older conversion"
        changed = [name for name, known in record["files"].items() if sha256_of(folder / name) != known]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is not complete"
    return f"is damaged ({', '.join(changed)})" if changed else None


@contextlib.contextmanager
def _unfinished() -> Iterator[Path]:
    """A folder in the cache that is gone afterwards, also where the disk is full."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=cache_folder()) as partial:
        try:
            yield Path(partial)
        except Exception as error:
            if disk_is_full(error):
                raise no_space(cache_folder(), "nothing was cached") from error
            raise


def check_free(what: str, needed: int, folder: Path) -> None:
    """Raises OSError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{what} needs {needed / 1e6:,.0f} MB in {cache_folder()}, but {free / 1e6:,.0f} MB are free")


def _convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of the GGUF file `path` as a plain folder, and read it back to check that it is the same."""
    from transformers import AutoModelForCausalLM

    reader, settings, tokenizer = _parts(path)
    with _damage_named(path):
        model = _empty_model(path, reader, settings)
        places = _places(path, reader, model)
    needed = sum(4 * parameter.numel() for parameter in model.parameters())
    check_free(path.name, needed, folder.parent)
    with _damage_named(path):
        _fill(path, reader, model, places)
    del reader  # it holds an object for each token
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written = fingerprint(model)
        del model  # two copies need not fit into memory
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if fingerprint(again) != written:
        raise ValueError(f"{path.name}: the converted model does not read back as it was written. Nothing was cached")


# --- what the file says -------------------------------------------------------------------------------------------------


def _parts(path: Path) -> tuple:
    """The file's reader, the settings that transformers finds in it, by their names in a config, and the tokenizer.

    Raises ValueError for a damaged file or an architecture that is not known.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    with _damage_named(path):
        reader = gguf.GGUFReader(path)
        architecture = _architecture(reader)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path.name} is of architecture {architecture!r}, which is not read here: known are {', '.join(ARCHITECTURES)}"
        )
    _check_layout(path, reader)
    with _damage_named(path), no_progress_bars():
        settings, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return reader, settings, tokenizer


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the errors that damaged files raise, which are of many types, into a ValueError with the file's name."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(path.name):  # a refusal from here, which says more
            raise
        raise ValueError(
            f"{path.name} cannot be read as a model ({type(error).__name__}: {error}): the file is damaged or cut short, or "
            "transformers does not know its kind. Nothing was cached"
        ) from error


def _check_layout(path: Path, reader) -> None:
    """Raise ValueError for tensors that do not lie one behind the other, as llama.cpp demands: they would be bytes of others."""
    expected = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise ValueError(
                f"{path.name}: tensor {tensor.name} does not begin where the one before it ends: the file is damaged"
            )
        expected += -(-tensor.n_bytes // reader.alignment) * reader.alignment


def _architecture(reader) -> str:
    return reader.fields["general.architecture"].contents()


def _keys(path: Path, reader) -> dict:
    """The file's keys with their values, without the name of the architecture in front, and without lists.

    Raises ValueError for the lack of one that transformers would replace by its default, which is that of another model.
    """
    prefix = f"{_architecture(reader)}."
    single = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
    keys = {name.removeprefix(prefix): field.contents() for name, field in single.items()}
    if lacking := [name for name in REQUIRED if name not in keys]:
        raise ValueError(f"{path.name} has no single value for {prefix}{lacking[0]}: it is damaged, or of an unknown kind")
    for name, known in GEMMA3.items() if prefix == "gemma3." else ():
        found = keys.get(name, "as a list" if prefix + name in reader.fields else known)
        if found != known:
            raise ValueError(f"{path.name} has {prefix}{name} {found}, and only {known} is supported")
    return keys


def _config(path: Path, reader, settings: dict):
    """The config of the file's network: `settings` of transformers' reader, and what that one leaves out or guesses.

    Raises ValueError, naming the key, for what a config cannot express.
    """
    from transformers import CONFIG_MAPPING

    keys, kind = _keys(path, reader), ARCHITECTURES[_architecture(reader)]
    heads = keys["attention.head_count"]
    size = keys.get("attention.key_length", keys["embedding_length"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.get(name, size) != size:
            raise ValueError(f"{path.name} has {name} {keys[name]} for heads of size {size}, which no config here can express")
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "rope_theta")}
    settings |= {"head_dim": size, "num_key_value_heads": keys.get("attention.head_count_kv", heads)}
    for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        settings[f"{name}_token_id"] = keys.get(f"tokenizer.ggml.{stored}_token_id")
    rope = _rope(keys, _rope_divisors(path, reader, keys, size))
    if kind == "gemma3_text":  # its scaling is for the layers that see the whole text
        rope = {"sliding_attention": {"rope_type": "default", "rope_theta": GEMMA3["rope.freq_base_swa"]}, "full_attention": rope}
    if kind == "llama":
        kind, biases = _biases(reader)
        settings |= biases
    check_numbers(path.name, settings)
    return CONFIG_MAPPING[kind](**settings | {"rope_parameters": rope})


def _biases(reader) -> tuple[str, dict]:
    """The config of a `llama` and its settings, by the biases that the file has.

    Biases on q, k and v alone are a Qwen 2, which has the same parameters; a Llama has them on the output of attention as well.
    """
    layers = {tensor.name.split(".")[-2] for tensor in reader.tensors if tensor.name.endswith(".bias")}
    if layers == {"attn_q", "attn_k", "attn_v"}:
        return "qwen2", {}
    return "llama", {"attention_bias": "attn_output" in layers, "mlp_bias": "ffn_down" in layers}


def _rope_divisors(path: Path, reader, keys: dict, size: int) -> torch.Tensor:
    """What each rotary frequency is divided by, [head size / 2] in float32: ones, if the context was never extended."""
    kind = keys.get("rope.scaling.type", "linear")  # the default of llama.cpp
    if kind not in ("none", "linear") or keys.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError(f"{path.name} has rope.scaling.type {kind!r}, or an attn_factor: only none and linear are supported")
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0  # zero means that there is none
    own = [_dequantised(path, tensor) for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    divisors = own[0] if own else torch.ones(size // 2)
    if divisors.shape != (size // 2,):
        raise ValueError(f"{path.name}: {ROPE_FACTORS} has shape {tuple(divisors.shape)} for heads of size {size}")
    return divisors if kind == "none" else divisors * factor


def _rope(keys: dict, divisors: torch.Tensor) -> dict:
    """transformers' rope_parameters for plain frequencies that are divided by `divisors`, [head size / 2].

    LongRoPE with the same factors for short and long texts, and attention that is not scaled, is nothing but fixed divisors.
    """
    plain = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    factors = divisors.tolist()
    if set(factors) == {1.0}:
        return plain
    if len(set(factors)) == 1:
        return plain | {"rope_type": "linear", "factor": factors[0]}
    length = {"original_max_position_embeddings": keys["context_length"], "factor": 1.0, "attention_factor": 1.0}
    return plain | length | {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}


# --- the network --------------------------------------------------------------------------------------------------------


def _empty_model(path: Path, reader, settings: dict) -> nn.Module:
    """The model of the file without weights; generation with it stops at every stop token of the file."""
    config, keys = _config(path, reader, settings), _keys(path, reader)
    model = empty_model(config, torch.float32)
    stops = list(dict.fromkeys(keys[name] for name in STOP_KEYS if name in keys))
    if stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return model


def _places(path: Path, reader, model: nn.Module) -> dict[str, str]:
    """Name of the tensor in the file -> name of the parameter. Raises ValueError, naming the first, if they do not fit."""
    architecture = _architecture(reader)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    parameters = dict(model.named_parameters())  # a tied head is no parameter of its own
    places = {names.get_name(name, (".weight", ".bias")): name for name in parameters}
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    if architecture == "llama":
        shapes.pop(ROPE_FACTORS, None)  # it is in the config
    for name in shapes:
        if name not in places:
            raise ValueError(f"{path.name}: no module of a {architecture} takes the tensor {name}")
    for name, place in places.items():
        if name not in shapes:
            raise ValueError(f"{path.name} lacks the tensor {name} of a {architecture} with its settings")
        if shapes[name] != (shape := tuple(parameters[place].shape)):
            raise ValueError(f"{path.name}: tensor {name} has shape {shapes[name]} and should have {shape}")
    return places


def _fill(path: Path, reader, model: nn.Module, places: dict[str, str]) -> None:
    """Give the model the file's tensors, in float32."""
    architecture, config, tensors = _architecture(reader), model.config, {}
    for tensor in reader.tensors:
        if tensor.name not in places:
            continue
        value = _dequantised(path, tensor)
        for part, heads in ((".attn_q.", config.num_attention_heads), (".attn_k.", config.num_key_value_heads)):
            if architecture == "llama" and part in tensor.name:
                value = _halves(value, heads)
        if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            value = value - 1  # a file holds the whole gain, transformers what is added to 1
        tensors[places[tensor.name]] = value
    model.load_state_dict(tensors, strict=False, assign=True)  # a tied head is not among them
    model.tie_weights()


def _dequantised(path: Path, tensor) -> torch.Tensor:
    """The tensor in float32. Raises ValueError for a type that the package gguf cannot dequantise."""
    try:
        return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise ValueError(f"{path.name}: tensor {tensor.name} cannot be read ({error})") from error


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k, [heads · size, ...], from the rotary layout of a GGUF `llama` to that of transformers.

    A `llama` rotates coordinates 2i and 2i + 1 of a head together, transformers rotates i and i + size/2.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
