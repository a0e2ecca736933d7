"""Save a compressed model and load it again: safetensors, a stock config, the tokenizer, and one record of the edits.

Loading builds the stock model without memory, replays the shape edits from the record and assigns the tensors. Nothing is
guessed from names or ratios, nothing is unpickled, and the dense model is never allocated. A folder is written whole or
not at all.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lib.models.folder import (
    CONFIG,
    GENERATION,
    INDEX,
    Place,
    config_of,
    empty_model,
    name_in_stock,
    stored_tensors,
    take_generation_config,
)
from lib.models.output import check_output, written_whole
from lib.papers import sliced_network
from lib.primitives import low_rank, narrow_heads, structured
from lib.primitives.anatomy import FAMILIES
from lib.primitives.surgery import cast, refusal

SCHEMA = 2
RECORD, WEIGHTS, STOCK_WEIGHTS = "compression.json", "compressed{suffix}.safetensors", "model{suffix}.safetensors"
SHARD_BYTES = 4 * 2**30

# One line per method: the name that its edits carry in `model.edits`, and the function that repeats one on shapes.
REPLAY = {
    "slicegpt": sliced_network.replay,
    "low-rank": low_rank.replay,
    "structured": structured.replay,
    "narrow-heads": narrow_heads.replay,
}
# Why each of them keeps a model from being stock, and what to do instead.
WAYS = {
    "slicegpt": "slicegpt added shortcuts to it. Compress with method slicegpt-stock, which needs none",
    "low-rank": "its matrices are low-rank, in two factors. Multiply them with invoke merge-to-dense",
    "narrow-heads": (
        "modegpt left its attention heads narrower than any class has them. Compress with `--method modegpt "
        "--set attention=none`, which leaves the heads whole"
    ),
    "structured": (
        "structured pruning left its blocks unequally wide, or with heads or biases that its class does not have. Compress with "
        "a method that leaves all blocks equally wide, such as wanda-sp"
    ),
}


class CheckpointError(ValueError):
    """A folder that is not a checkpoint of this suite, or one that is damaged; the message says what and where."""


# --- writing ------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, tokenizer, folder: str | Path, **provenance) -> Path:
    """Write a compressed model to `folder`, which must not exist yet. Returns the folder.

    provenance: where the model comes from (base model, calibration, settings), in JSON values, for the record.
    Raises ValueError for a model without edits, and, before anything is written, for one that could not be read back;
    FileExistsError for an existing folder, OSError if the disk is full; in every case no folder is left behind.
    """
    if not getattr(model, "edits", None):
        raise ValueError("this model has no record of edits: save a dense model with its own save_pretrained")
    json.dumps(provenance)  # raises before anything is written if it is not JSON
    return _write(model, tokenizer, folder, WEIGHTS, provenance)


def export(model: nn.Module, tokenizer, folder: str | Path) -> Path:
    """Write a model that is an ordinary architecture to `folder`, for any runtime that reads Hugging Face folders.

    Raises ValueError, naming the part, for a model that no stock class can hold; otherwise as `save`.
    """
    if edits := getattr(model, "edits", None):
        raise ValueError(f"not a stock model: {way_to_stock(edits)}. Or save it with lib.models.checkpoint.save")
    return _write(model, tokenizer, folder, STOCK_WEIGHTS, {})


def way_to_stock(edits: list[dict]) -> str:
    """Why edits keep a model from being stock, and what to do instead."""
    done = {edit.get("edit") for edit in edits}
    return ". ".join(way for edit, way in WAYS.items() if edit in done)


def _write(model: nn.Module, tokenizer, folder: str | Path, pattern: str, provenance: dict) -> Path:
    tensors = stored_tensors(model)
    folder = check_output(folder, sum(value.nbytes for value in tensors.values()))
    check_readable(model)
    shards, stock = _shards(tensors, pattern), not getattr(model, "edits", None)
    with written_whole(folder) as partial:
        partial.mkdir()
        for file, names in shards.items():
            named = {name_in_stock(name, model) if stock else name: tensors[name].contiguous() for name in names}
            save_file(named, partial / file, metadata={"format": "pt"})
        describe_folder(partial, model, tensors, shards, tokenizer, provenance)
    return folder


def describe_folder(
    folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], shards: dict[str, list[str]], tokenizer, provenance: dict
) -> None:
    """Write everything but the weights: record or index, configurations and tokenizer. Meta tensors suffice.

    shards: file name -> names of the tensors in it.
    """
    if getattr(model, "edits", None):
        (folder / RECORD).write_text(json.dumps(record_of(model, tensors, shards, provenance), indent=1) + "\n")
    elif len(shards) > 1:
        total = sum(value.numel() * value.element_size() for value in tensors.values())
        places = {name_in_stock(name, model): file for file, names in shards.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n")
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.to_json_file(folder / CONFIG)
    # Its own save_pretrained refuses sampling settings of greedy generation, which many published models have.
    model.generation_config.to_json_file(folder / GENERATION)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def record_of(model: nn.Module, tensors: dict[str, torch.Tensor], shards: dict[str, list[str]], provenance: dict) -> dict:
    """The record of a model's edits and of the tensors in each file; meta tensors suffice. shards: file name -> tensor names."""
    return {
        "schema": SCHEMA,
        "edits": model.edits,
        "dtype": str(model.dtype).removeprefix("torch."),
        "shards": {
            file: {name: {"shape": list(tensors[name].shape), "dtype": str(tensors[name].dtype)} for name in names}
            for file, names in shards.items()
        },
        "provenance": provenance,
    }


def check_readable(model: nn.Module) -> None:
    """Raise CheckpointError for a model whose configuration and edits do not describe it, so that its folder could not be read.

    Meta tensors suffice, so that a method's result is checked by its shapes before any work.
    """
    if reason := refusal(model.config):
        kind = type(model.config).__name__
        raise CheckpointError(f"the compressed model cannot be saved, because {kind} refuses its shape: {reason}")
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    again = _repeated(empty_model(config, model.dtype), json.loads(json.dumps(getattr(model, "edits", []))), "the record")
    found, wanted = ({n: tuple(t.shape) for n, t in stored_tensors(m).items()} for m in (again, model))
    _same_names("the record and the compressed model", set(found), set(wanted))
    if wrong := [name for name in wanted if found[name] != wanted[name]]:
        name = wrong[0]
        raise CheckpointError(
            f"the compressed model cannot be saved: {name} is {wanted[name]}, but would be read as {found[name]}"
        )


def _shards(tensors: dict[str, torch.Tensor], pattern: str) -> dict[str, list[str]]:
    """File name -> tensor names, in order, at most SHARD_BYTES a file (a larger tensor has a file of its own)."""
    groups, size = [[]], 0
    for name, value in tensors.items():
        if groups[-1] and size + value.nbytes > SHARD_BYTES:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += value.nbytes
    count = len(groups)
    suffixes = [""] if count == 1 else [f"-{i:05d}-of-{count:05d}" for i in range(1, count + 1)]
    return {pattern.format(suffix=suffix): names for suffix, names in zip(suffixes, groups, strict=True)}


# --- reading ------------------------------------------------------------------------------------------------------------


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / RECORD).is_file()


def load_checkpoint(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The compressed model saved in `folder`, in eval mode, with the bits that were saved (or cast to `dtype`).

    Raises CheckpointError for anything that does not fit together: schema, edits, config, tensor names, shapes, dtypes.
    """
    folder = Path(folder).expanduser()
    model, record = described(folder)
    expected = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
    tensors = {}
    for file, names in record["shards"].items():
        tensors |= _read_shard(folder, file, names, expected)
    shared = set(model.state_dict()) - set(tensors)
    model.load_state_dict(tensors, strict=not shared, assign=True)
    model.tie_weights()  # tie the head to the embedding again, if the config says they are tied
    return (cast(model, dtype) if dtype else model).to(device).eval()


def described(folder: Path) -> tuple[nn.Module, dict]:
    """The compressed model of a folder, with its parameters on the meta device, and the folder's record.

    Raises CheckpointError as `load_checkpoint`; the files of weights are not opened.
    """
    record = read_record(folder)
    model = _empty_model(folder, record)
    recorded = {name for shard in record["shards"].values() for name in shard}
    _same_names("the record and the edited model", recorded, set(stored_tensors(model)))
    return model, record


def places_in(model: nn.Module, folder: Path, record: dict) -> dict[str, Place]:
    """The place of every tensor of a compressed model, in the model's order; headers are read and checked, weights are not.

    Raises CheckpointError for a file that is missing, damaged or of another model.
    """
    expected, places = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}, {}
    for file, names in record["shards"].items():
        try:
            with safe_open(folder / file, framework="pt") as shard:
                _same_names(file, set(shard.keys()), set(names))
                shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}/{file} is missing or damaged: {error}") from error
        if wrong := [name for name in names if shapes[name] != expected[name]]:
            name = wrong[0]
            raise CheckpointError(
                f"tensor {name} in {file} has shape {shapes[name]}, but the edited model needs {expected[name]}"
            )
        places |= {name: Place(str(folder / file), name) for name in names}
    return {name: places[name] for name in expected}


def read_record(folder: Path) -> dict:
    """The record of edits and provenance of the compressed model in `folder`. Raises CheckpointError where it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable {RECORD}: it is not a compressed model of this suite") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{RECORD} is not valid JSON: the record is damaged ({error})") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise CheckpointError(f"{folder}/{RECORD} has schema {found!r}; this version reads schema {SCHEMA}")
    fits = (
        isinstance(record.get("edits"), list)
        and all(isinstance(edit, dict) for edit in record["edits"])
        and record["edits"]
        and record.get("dtype") in ("float64", "float32", "bfloat16", "float16")
        and isinstance(record.get("shards"), dict)
        and all(isinstance(shard, dict) and Path(file).name == file for file, shard in record["shards"].items())
        and all(isinstance(facts, dict) for shard in record["shards"].values() for facts in shard.values())
    )
    if not fits:
        raise CheckpointError(f"{folder}/{RECORD} lacks edits, dtype or shards in the form that `save` writes: it was changed")
    return record


def _empty_model(folder: Path, record: dict) -> nn.Module:
    """The stock model of config.json with its parameters on the meta device, edited as the record says."""
    try:
        config = config_of(folder)
        if config.model_type not in FAMILIES:
            raise ValueError(f"{folder}/{CONFIG} is of model type {config.model_type!r}, which no method here compresses")
        model = empty_model(config, getattr(torch, record["dtype"]))
        take_generation_config(model, folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return _repeated(model, record["edits"], f"{folder}/{RECORD}")


def _repeated(model: nn.Module, edits: list[dict], where: str) -> nn.Module:
    """A stock model of meta tensors, edited as a record says. Raises CheckpointError for what cannot be repeated."""
    for edit in edits:
        settings = {name: value for name, value in edit.items() if name != "edit"}
        if not isinstance(edit.get("edit"), str) or edit["edit"] not in REPLAY:
            raise CheckpointError(f"unknown edit {edit.get('edit')!r} in {where}: known are {', '.join(REPLAY)}")
        replay = REPLAY[edit["edit"]]
        try:
            inspect.signature(replay).bind(model, **settings)
            model = replay(model, **settings)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"edit {edit} in {where} cannot be repeated: {error}") from error
    return model


def _read_shard(folder: Path, file: str, names: dict, expected: dict[str, tuple]) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with safe_open(folder / file, framework="pt") as shard:
            _same_names(file, set(shard.keys()), set(names))
            for name, facts in names.items():
                value = shard.get_tensor(name)
                if tuple(value.shape) != expected[name] or list(value.shape) != facts.get("shape"):
                    shape = tuple(value.shape)
                    raise CheckpointError(
                        f"tensor {name} in {file} has shape {shape}, but the edited model needs {expected[name]}"
                    )
                if str(value.dtype) != facts.get("dtype"):
                    raise CheckpointError(f"tensor {name} in {file} is {value.dtype}, but the record says {facts.get('dtype')}")
                tensors[name] = value
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}/{file} is missing or damaged: {error}") from error
    return tensors


def _same_names(where: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        missing, extra = sorted(wanted - found)[:3], sorted(found - wanted)[:3]
        raise CheckpointError(f"{where} disagree on tensors: missing {missing}, not expected {extra} (first three of each)")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all tensors, to recognise a model by its weights and not by its name."""
    return digest(model.state_dict().items())


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The `fingerprint` of named tensors, one at a time."""
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
