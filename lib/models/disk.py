"""Compress a model from disk, block by block, for models larger than memory.

The network is built without weights. A block's tensors are read when a method needs them (`lib.primitives.calibration`), the
method edits the block, its tensors go to a file of their own in the output folder, and the block is empty again. In memory are
one block, what the method keeps of it, and the hidden states; nothing grows with depth. The methods are the same functions as in
memory: a module does not depend on where its weights come from.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lib.models.checkpoint import CONFIG, RECORD, digest, is_checkpoint, record_of, stored_tensors
from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import resident
from lib.primitives.layerwise import Walk

INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"
JOB, STATE = "job.json", "state.json"

# --- weights on disk -----------------------------------------------------------------------------------------------------

# Parameters in memory by file and name, as long as they are in use: teacher and student share the tensors of a block.
_LOADED: WeakValueDictionary = WeakValueDictionary()


@dataclass
class Stored:
    """Where the tensors of a module are: its parameters' names -> (file, name in the file). dtype: into which they are read."""

    places: dict[str, tuple[str, str]]
    dtype: torch.dtype

    @contextlib.contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """The module with its weights within the `with`; without them afterwards, unless it had them before."""
        if not any(p.is_meta for p in module.parameters()):
            yield
            return
        self.load(module)
        try:
            yield
        finally:
            empty(module)

    def load(self, module: nn.Module) -> None:
        """Give the module its parameters. Raises ValueError for tensors that are missing, misshapen or not finite."""
        for name, value in self.read(dict(module.named_parameters())):
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._parameters[leaf] = value

    def read(self, wanted: dict[str, torch.Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters one by one, of the shapes of `wanted`. Files are mapped, so nothing else is read."""
        for name, like in wanted.items():
            place = (*self.places[name], self.dtype)
            value = _LOADED.get(place)
            if value is None:
                value = nn.Parameter(_read(*self.places[name]).to(self.dtype), requires_grad=False)
                if value.shape != like.shape:
                    raise ValueError(f"{place[1]} in {place[0]} is {tuple(value.shape)}, but the model needs {tuple(like.shape)}")
                if not finite(value):
                    raise ValueError(f"weight {place[1]} in {place[0]} holds NaN or infinity: download or train the model again")
                _LOADED[place] = value
            yield name, value


def _read(file: str, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be read from {file}: {error}") from error


def finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; tested in pieces, because the test makes copies and embeddings are large."""
    return all(torch.isfinite(part).all() for part in value.detach().flatten().split(2**20))


def empty(module: nn.Module) -> None:
    """Replace every parameter of a module by its shape."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)


def model_on_disk(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense model of a Hugging Face folder with safetensors, sharded or not: every parameter a meta tensor, in eval mode.

    Blocks and embeddings have an attribute `stored`, so their weights are in memory while they are `resident`. `model.stored`
    is that of the whole model. Raises ValueError for a folder that is compressed already or lacks tensors.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder).expanduser()
    if is_checkpoint(folder):
        raise ValueError(f"{folder} holds a compressed model: compress the dense one")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):  # rotary tables are computed, not stored
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    anatomy = Anatomy(model)
    files = files_of(folder)
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name in stored_tensors(model):
        # Some published folders name tensors without the prefix of the whole model.
        found = next((n for n in (name, name.removeprefix(prefix)) if n in files), None)
        if found is None:
            raise ValueError(f"{folder} has no tensor {name}: the folder is not complete, or not of this architecture")
        places[name] = (str(folder / files[found]), found)
    model.stored = Stored(places, dtype)
    for i, block in enumerate(anatomy.blocks):
        block.stored = _part(model.stored, f"{anatomy.family.blocks}.{i}.")
    for name in anatomy.family.embeddings:
        anatomy.get(name).stored = _part(model.stored, f"{name}.")
    return model


def _part(whole: Stored, prefix: str) -> Stored:
    return Stored({n.removeprefix(prefix): place for n, place in whole.places.items() if n.startswith(prefix)}, whole.dtype)


def files_of(folder: Path) -> dict[str, str]:
    """Name of every tensor in a folder -> its file. Raises ValueError where there are no safetensors."""
    if (folder / INDEX).is_file():
        return json.loads((folder / INDEX).read_text())["weight_map"]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}: give a local folder with safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return {name: "model.safetensors" for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def fingerprint_on_disk(model: nn.Module) -> str:
    """The same as `lib.models.checkpoint.fingerprint` of the model in memory, with one tensor in memory at a time."""
    shapes = dict(model.named_parameters(remove_duplicate=False))
    aliases = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in model.state_dict():
            first = aliases[id(shapes[name])]
            [(_, value)] = model.stored.read({first: shapes[name]})
            yield name, value

    return digest(tensors())


# The names of dtypes in safetensors files.
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(file: Path, shapes: dict[str, torch.Tensor], values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a safetensors file tensor by tensor. shapes: of its tensors, meta tensors suffice; values: in the same order.

    safetensors' own writer needs all tensors, and copies them, before the first byte is written.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, like in shapes.items():
        size = like.numel() * like.element_size()
        header[name] = {"dtype": KINDS[like.dtype], "shape": list(like.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, like), (given, value) in zip(shapes.items(), values, strict=True):
            if name != given or value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(f"expected {name} of shape {tuple(like.shape)}, not {given} of {tuple(value.shape)}")
            value.detach().contiguous().flatten().view(torch.uint8).numpy().tofile(out)


# --- the driver ----------------------------------------------------------------------------------------------------------


# Makes the walk over a model on disk: (model, calibration ids, note of an earlier start or {}) -> Walk.
WalkOf = Callable[[nn.Module, torch.Tensor, dict], Walk]


@torch.no_grad()
def compress_on_disk(
    source: str | Path,
    out: str | Path,
    ids: torch.Tensor,
    walk_of: WalkOf,
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    resume: dict | None = None,
    facts: Callable[[nn.Module], dict] = lambda small: {},
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Compress the model in the folder `source` into the new folder `out`; returns its shapes, a model of meta tensors.

    ids: calibration tokens [samples, length]. dtype: of the work and the result (default: the model's own). facts: of the result,
    for its record. resume: the identity of this run, such as method, ratio and settings, in JSON values. With it the hidden
    states behind every block are saved, and an interrupted run continues after the last finished block when the same run is
    started again. `out` appears when it is complete: as a stock folder where the result is stock, else as a checkpoint of this
    suite. Raises ValueError or FileExistsError before any long work.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another output folder, or remove this one first")
    # 1. A model without weights, and a partial folder: a new one or that of an interrupted run.
    _return_freed_memory()
    model = model_on_disk(source, dtype)
    partial_folder = out.with_name(f".{out.name}.partial")
    state = _open(partial_folder, _job(source, ids, model.dtype, resume or {}), resume is not None)
    try:
        # 2. Walk over the blocks, from the last finished one on, as often as the method needs it.
        walk = walk_of(model, ids, state.get("note", {}))
        walk.report = progress
        done = _go_back(walk, partial_folder, state)
        while True:
            for i in range(done, walk.blocks):
                _work(walk, partial_folder, i, resume is not None)
                if progress:
                    progress(f"block {i + 1} of {walk.blocks} on disk")
            if walk.finish():
                break
            done = 0
        # 3. Write everything outside of the blocks; only then does the folder get its name.
        if (source / GENERATION).is_file():
            shutil.copy(source / GENERATION, partial_folder)
        _close(walk, model, partial_folder, tokenizer, facts(walk.model))
        partial_folder.rename(out)
    except BaseException:
        if not (partial_folder / STATE).is_file():  # nothing from which another start could continue
            shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    return walk.model


def _return_freed_memory() -> None:
    """Return the memory of freed matrices to the system at once, for the rest of the process.

    glibc keeps freed pieces of up to 32 MB, the size of a matrix, into which the next matrix may not fit: with a model of a
    billion parameters it held 1.6 GB after twenty blocks, of which 20 MB were in use. Other systems have other allocators.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: larger pieces are mapped one by one


def _job(source: Path, ids: torch.Tensor, dtype: torch.dtype, run: dict) -> dict:
    """Identity of a run; an interrupted run may continue in a partial folder of the same identity only."""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in source.iterdir() if p.is_file())
    tokens = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    job = {"model": str(source.resolve()), "files": files, "tokens": tokens, "samples": list(ids.shape), "dtype": str(dtype)}
    return json.loads(json.dumps(job | run))


def _open(folder: Path, job: dict, resume: bool) -> dict:
    """Make the partial folder, or come back to it; returns the saved state, empty for a new one."""
    if folder.exists() and not (resume and (folder / JOB).is_file()):
        shutil.rmtree(folder)  # left over by a run that was killed
    if folder.exists():
        earlier = json.loads((folder / JOB).read_text())
        other = [name for name in job if earlier.get(name) != job[name]]
        if other:
            raise ValueError(
                f"{folder} is an unfinished run with other {', '.join(other)}: remove it, choose another output folder, or start "
                "with the arguments of that run"
            )
        return json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else {}
    folder.mkdir(parents=True)
    (folder / JOB).write_text(json.dumps(job))
    return {}


def _go_back(walk: Walk, folder: Path, state: dict) -> int:
    """Restore a walk from the saved state; returns the number of finished blocks."""
    done = state.get("done", 0)
    if not done:
        return 0
    walk.recall(state["note"], done)
    for i in range(done):
        _settle(walk, folder, i)
    for j, stream in enumerate(walk.streams):
        stream.hidden.copy_(_read(str(folder / state["hidden"]), str(j)))
    return done


def _work(walk: Walk, folder: Path, i: int, resume: bool) -> None:
    """Read, edit, write and drop one block; then save the state that a restart needs."""
    block = Anatomy(walk.model).blocks[i]
    walk.approach(i)
    with resident(block):
        walk.step(i)
        if broken := [name for name, p in block.named_parameters() if not finite(p)]:
            raise ValueError(f"compressed weights {', '.join(broken)} of block {i} hold NaN or infinity: work in float32")
        named = {f"{Anatomy(walk.model).family.blocks}.{i}.{n}": p for n, p in block.named_parameters()}
        temporary = folder / "block.tmp"
        write_tensors(temporary, named, named.items())
        temporary.replace(folder / _shard(i + 1, walk))
    _settle(walk, folder, i)
    if resume:
        _save_state(walk, folder, i + 1)


def _settle(walk: Walk, folder: Path, i: int) -> None:
    """From now on the weights of block i are those in the output folder."""
    block, prefix = Anatomy(walk.model).blocks[i], f"{Anatomy(walk.model).family.blocks}.{i}."
    places = {name: (str(folder / _shard(i + 1, walk)), prefix + name) for name, _ in block.named_parameters()}
    block.stored = Stored(places, block.stored.dtype)


def _save_state(walk: Walk, folder: Path, done: int) -> None:
    """Write the hidden states, then the state file that names them, then remove older ones: a kill at any moment does no harm."""
    hidden = {str(j): stream.hidden for j, stream in enumerate(walk.streams)}
    note = walk.note()
    file = f"hidden-{note.get('round', 0)}-{done}.safetensors"
    write_tensors(folder / file, hidden, hidden.items())
    (folder / "state.tmp").write_text(json.dumps({"done": done, "hidden": file, "note": note}))
    (folder / "state.tmp").replace(folder / STATE)
    for old in folder.glob("hidden-*.safetensors"):
        if old.name != file:
            old.unlink()


def _shard(number: int, walk: Walk) -> str:
    return f"model-{number:05d}-of-{walk.blocks + 1:05d}.safetensors"


def _close(walk: Walk, dense: nn.Module, folder: Path, tokenizer, provenance: dict) -> None:
    """Copy the tensors outside of the blocks (embeddings, final norm, head), and write index or record, config and tokenizer."""
    model, prefix = walk.model, f"{Anatomy(walk.model).family.blocks}."
    model.tie_weights()
    tensors = stored_tensors(model)
    rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    write_tensors(folder / _shard(walk.blocks + 1, walk), rest, dense.stored.read(rest))
    shards: dict[str, list[str]] = {_shard(number, walk): [] for number in range(1, walk.blocks + 2)}
    for name in tensors:
        block = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else walk.blocks
        shards[_shard(block + 1, walk)].append(name)
    if getattr(model, "edits", None):
        (folder / RECORD).write_text(json.dumps(record_of(model, tensors, shards, provenance), indent=1) + "\n")
    else:
        total = sum(value.numel() * value.element_size() for value in tensors.values())
        places = {name: file for file, names in shards.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n")
        model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.to_json_file(folder / CONFIG)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for pattern in ("hidden-*.safetensors", STATE, JOB):
        for file in folder.glob(pattern):
            file.unlink()
