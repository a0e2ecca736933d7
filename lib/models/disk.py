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
from torch import nn

from lib.models.checkpoint import check_readable, describe_folder, digest, is_checkpoint
from lib.models.folder import (
    Place,
    config_of,
    empty_model,
    name_in_stock,
    places_of,
    plain,
    read,
    stored_tensors,
    take_generation_config,
)
from lib.models.output import disk_is_full, no_space, partial_of, readable, reserved
from lib.primitives.anatomy import Anatomy, family_of
from lib.primitives.calibration import resident
from lib.primitives.layerwise import Walk

JOB, STATE = "job.json", "state.json"

# --- weights on disk -----------------------------------------------------------------------------------------------------

# Parameters in memory by file and name, as long as they are in use: teacher and student share the tensors of a block.
_LOADED: WeakValueDictionary = WeakValueDictionary()


@dataclass
class Stored:
    """Where the tensors of a module are, by its parameters' names. dtype: into which they are read."""

    places: dict[str, Place]
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
        """Give the module its parameters. Raises ValueError for tensors that are not finite."""
        for name, value in self.read(dict(module.named_parameters())):
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._parameters[leaf] = value

    def read(self, wanted: dict[str, torch.Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters one by one, of the shapes of `wanted`. Files are mapped, so nothing else is read."""
        for name, like in wanted.items():
            place = self.places[name]
            value = _LOADED.get((place, self.dtype))
            if value is None:
                value = nn.Parameter(read(place).to(self.dtype), requires_grad=False)
                if value.shape != like.shape:
                    raise ValueError(
                        f"{place.name} in {place.file} is {tuple(value.shape)}, but the model needs {tuple(like.shape)}"
                    )
                if not finite(value):
                    raise ValueError(f"weight {place.name} in {place.file} holds NaN or infinity: get or train the model again")
                _LOADED[place, self.dtype] = value
            yield name, value


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

    Blocks, embeddings and final norm have an attribute `stored`, so their weights are in memory while they are `resident`;
    `model.stored` is that of the whole model. Raises ValueError for a folder that is compressed already, and as
    `lib.models.folder` does.
    """
    folder = Path(folder).expanduser()
    if is_checkpoint(folder):
        raise ValueError(f"{folder} holds a compressed model: compress the dense one")
    config = config_of(folder)
    family = family_of(config)
    model = empty_model(plain(config), dtype)
    take_generation_config(model, folder)
    anatomy = Anatomy(model)
    model.stored = Stored(places_of(model, folder), model.dtype)
    for i, block in enumerate(anatomy.blocks):
        block.stored = _part(model.stored, f"{family.blocks}.{i}.")
    for name in (*family.embeddings, family.final_norm):
        anatomy.get(name).stored = _part(model.stored, f"{name}.")
    return model


def _part(whole: Stored, prefix: str) -> Stored:
    return Stored({n.removeprefix(prefix): place for n, place in whole.places.items() if n.startswith(prefix)}, whole.dtype)


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


def write_tensors(file: Path, shapes: dict[str, torch.Tensor], values: Iterable[torch.Tensor]) -> None:
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
        for (name, like), value in zip(shapes.items(), values, strict=True):
            if value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(f"expected {name} of shape {tuple(like.shape)}, not {tuple(value.shape)}")
            out.write(value.detach().contiguous().flatten().view(torch.uint8).numpy())


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
    with reserved(out):
        # 1. A model without weights, and a partial folder: a new one or that of an interrupted run.
        _return_freed_memory()
        model = model_on_disk(source, dtype)
        partial = partial_of(out)
        try:
            state = _open(partial, _job(source, ids, model.dtype, resume or {}), resume is not None)
            # 2. Walk over the blocks, from the last finished one on, as often as the method needs it.
            walk = walk_of(model, ids, state.get("note", {}))
            walk.report = progress
            _walk(walk, partial, state, resume is not None)
            # 3. Write everything outside of the blocks; only then does the folder get its name.
            _close(walk, model, partial, tokenizer, facts(walk.model))
            readable(partial)
            partial.rename(out)
        except BaseException as error:
            goes_on = (partial / STATE).is_file()
            if not goes_on:  # nothing from which another start could continue
                shutil.rmtree(partial, ignore_errors=True)
            if disk_is_full(error):
                stays = f"finished blocks stay in {partial}, from where the same command goes on"
                raise no_space(out, stays if goes_on else "nothing is left of it") from error
            raise
    return walk.model


def _walk(walk: Walk, folder: Path, state: dict, resume: bool) -> None:
    """All rounds of a walk over the blocks, from the saved state on."""
    done = _go_back(walk, folder, state)
    while True:
        for i in range(done, walk.blocks):
            _work(walk, folder, i, resume)
            if walk.report:
                walk.report(f"block {i + 1} of {walk.blocks} on disk")
        if walk.finish():
            return
        done = 0


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
    if folder.exists() and not (resume and (folder / STATE).is_file()):
        shutil.rmtree(folder)  # left over by a run that was killed before a block was finished: its job may be cut short, too
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
        stream.hidden.copy_(read(Place(str(folder / state["hidden"]), str(j))))
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
        write_tensors(temporary, named, named.values())
        temporary.replace(folder / _shard(i + 1, walk))
    _settle(walk, folder, i)
    if resume:
        _save_state(walk, folder, i + 1)


def _settle(walk: Walk, folder: Path, i: int) -> None:
    """From now on the weights of block i are those in the output folder."""
    block, prefix = Anatomy(walk.model).blocks[i], f"{Anatomy(walk.model).family.blocks}.{i}."
    places = {name: Place(str(folder / _shard(i + 1, walk)), prefix + name) for name, _ in block.named_parameters()}
    block.stored = Stored(places, block.stored.dtype)


def _save_state(walk: Walk, folder: Path, done: int) -> None:
    """Write the hidden states, then the state file that names them, then remove older ones: a kill at any moment does no harm."""
    hidden = {str(j): stream.hidden for j, stream in enumerate(walk.streams)}
    note = walk.note()
    file = f"hidden-{note.get('round', 0)}-{done}.safetensors"
    write_tensors(folder / file, hidden, hidden.values())
    (folder / "state.tmp").write_text(json.dumps({"done": done, "hidden": file, "note": note}))
    (folder / "state.tmp").replace(folder / STATE)
    for old in folder.glob("hidden-*.safetensors"):
        if old.name != file:
            old.unlink()


def _shard(number: int, walk: Walk) -> str:
    return f"model-{number:05d}-of-{walk.blocks + 1:05d}.safetensors"


def _close(walk: Walk, dense: nn.Module, folder: Path, tokenizer, provenance: dict) -> None:
    """Copy the tensors outside of the blocks (embeddings, final norm, head), and describe the folder."""
    model, prefix = walk.model, f"{Anatomy(walk.model).family.blocks}."
    model.tie_weights()
    check_readable(model)
    tensors, stock = stored_tensors(model), not getattr(model, "edits", None)
    shards: dict[str, list[str]] = {_shard(number, walk): [] for number in range(1, walk.blocks + 2)}
    for name in tensors:
        block = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else walk.blocks
        shards[_shard(block + 1, walk)].append(name)
    rest = {name: tensors[name] for name in shards[_shard(walk.blocks + 1, walk)]}
    write_tensors(
        folder / _shard(walk.blocks + 1, walk),
        {name_in_stock(name, model) if stock else name: value for name, value in rest.items()},
        (value for _, value in dense.stored.read(rest)),
    )
    describe_folder(folder, model, tensors, shards, tokenizer, provenance)
    for pattern in ("hidden-*.safetensors", STATE, JOB):
        for file in folder.glob(pattern):
            file.unlink()
