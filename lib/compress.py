"""Compress a model and save it: what `invoke compress` does, importable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lib.budgets import Budget, cache_bytes, fitting_ratio, made_within
from lib.evaluation.console import Progress
from lib.evaluation.process import package_versions
from lib.evaluation.text import Calibration, load_corpus, sample_blocks
from lib.methods import Method, check_changes, make, method_named, on_disk_method, settings_of
from lib.models import disk
from lib.models.checkpoint import check_readable, export, fingerprint, is_checkpoint, read_record, save
from lib.models.folder import config_of, load_tokenizer, positions
from lib.models.load import known_config, load, locate, torch_dtype, usable_device
from lib.models.output import check_output, reserved
from lib.papers import slicegpt
from lib.primitives.anatomy import Anatomy, family_of
from lib.primitives.calibration import check_length
from lib.primitives.checks import check_share
from lib.primitives.cost import Count, count
from lib.primitives.surgery import shape_shell


@dataclass
class _Work:
    """One compression: what is asked for, and what is said of the result. about: where that comes from, for its record."""

    method: str
    values: dict
    ratio: float
    budget: Budget | None
    measured: Callable[[nn.Module], float] | None  # what a model has of the budget
    dense: Count
    about: dict

    def made(self, shapes: nn.Module, networks: Iterator[nn.Module], ids: torch.Tensor, progress: Callable) -> nn.Module:
        """What the method makes of the dense model, of which each attempt uses up one; at a higher ratio if the budget asks it.

        shapes: the dense model on the meta device.
        """

        def make_at(ratio: float) -> nn.Module:
            return make(self.method, next(networks), ids, ratio, progress, inplace=True, **self.values)

        if not self.budget:
            return make_at(self.ratio)
        settings = settings_of(self.method, self.values)
        self.ratio, small = made_within(self.method, shapes, self.budget, self.measured, settings, self.ratio, make_at)
        return small

    def sizes(self, small: nn.Module) -> dict:
        size = count(small)
        row = {"method": self.method, "ratio": self.ratio, "bytes": size.bytes, "dense_bytes": self.dense.bytes}
        row |= {"cache_bytes": cache_bytes(small)}
        return row | size.against(self.dense) | ({"budget": self.measured(small)} if self.measured else {})

    def facts(self, small: nn.Module) -> dict:
        return self.about | self.sizes(small)


def compress(
    model: str,
    out: str | Path,
    method: str = "slicegpt",
    ratio: float | Budget = 0.25,
    calibration: Calibration | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    streamed: bool = False,
    within: Budget | None = None,
    **values,
) -> dict:
    """Compress `model` (a name that `load` takes) into the new folder `out`; returns the row of counted sizes.

    ratio: in [0, 1), in the method's own sense (see `lib.methods`), or a budget, for the lowest ratio whose shapes keep to it.
    within: the budget, where `ratio` was found for one. What is made larger than its budget, because data decide on its shape,
    is made again at a higher ratio, unless `streamed`; the row says under `budget` what the result has of it. calibration: 128
    sequences of wiki-a, as long as the model's positions permit but at most 2,048, unless given. dtype: of the work and of the
    result; the model's own unless given. streamed: work from the model's folder block by block, without loading it whole
    (`lib.models.disk`); an interrupted run continues when it is started again. values: fields of the method's settings; a
    slicegpt `schedule` may also be the folder of a sliced model, whose widths are taken over. Raises ValueError,
    FileExistsError, PermissionError or OSError, before any long work, for impossible arguments, for a result that could not be
    saved, and while another process writes to `out`.
    """
    values = with_saved_widths(method, values)
    record, settings = (on_disk_method if streamed else method_named)(method), settings_of(method, values)
    if not isinstance(ratio, Budget):
        check_share(ratio)
    with reserved(Path(out).expanduser()) as out:
        if streamed:
            _check_streamed(model, device)
        draw = calibration or Calibration("wiki-a", 128, usual_length(model))
        text = load_corpus(draw.corpus, "train")
        network, tokenizer = _open(model, device, dtype, streamed)
        check_changes(network, record, settings)
        budget = ratio if isinstance(ratio, Budget) else within
        measured = budget and budget.size_of(network, locate(model), out.name)
        ratio = fitting_ratio(method, network, ratio, measured, settings) if isinstance(ratio, Budget) else ratio
        check_finished(record, settings, network, ratio, out)
        check_length(Anatomy(network), draw.length)  # raises now, before many long sequences are drawn
        ids = sample_blocks(text, tokenizer, draw.samples, draw.length, torch.Generator().manual_seed(draw.seed), draw.rule)
        weights = disk.fingerprint_on_disk(network) if streamed else fingerprint(network)
        about = _provenance(model, weights, draw, ids, values)
        work, progress = _Work(method, values, ratio, budget, measured, count(network), about), Progress()
        if streamed:
            run = {"method": method, "ratio": ratio, "settings": asdict(settings)}
            small = disk.compress_on_disk(
                locate(model), out, ids, lambda network, ids, note: record.on_disk(network, ids, ratio, settings, note),
                tokenizer=tokenizer, dtype=network.dtype, resume=run, facts=work.facts, progress=progress,
            )  # fmt: skip
            return work.sizes(small)
        shapes, networks = shape_shell(network), _anew(network, model, device, dtype)
        del network  # or it would stay in memory when it is read again
        small = work.made(shapes, networks, ids, progress)
        plain = not hasattr(small, "edits")  # an ordinary architecture, which plain transformers loads
        export(small, tokenizer, out) if plain else save(small, tokenizer, out, **work.facts(small))
        return work.sizes(small)


def _anew(network: nn.Module, model: str, device: str, dtype: str | None) -> Iterator[nn.Module]:
    """A model that the work on it uses up, and then the same one, read again, as often as it is asked for."""
    yield network
    del network
    while True:
        yield _open(model, device, dtype, False)[0]


def _provenance(model: str, weights: str, draw: Calibration, ids: torch.Tensor, values: dict) -> dict:
    """Where a compressed model comes from, for its record. weights: fingerprint of the dense ones."""
    base = {"name": Path(model).name if Path(model).exists() else model, "weights": weights}
    tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()  # identifies the samples that rule and seed gave
    calibrated = {"calibration": draw.record() | {"tokens_sha256": tokens}}
    return {"base": base} | calibrated | {"packages": package_versions(), "settings": values}


def check_finished(method: Method, settings: object, model: nn.Module, ratio: float, out: Path) -> None:
    """Raise, before any work, for a result that could not be saved: ValueError by its shape, OSError by its size on the disk.

    Where data decide on the shape, it is one of the same size, or the dense one.
    """
    finished = method.shape(model, ratio, settings) if method.shape else shape_shell(model)
    check_readable(finished)
    check_output(out, count(finished).bytes)


def usual_length(model: str) -> int:
    """Tokens of a calibration sequence where none are asked for: the positions of the model, at most 2,048.

    Raises ValueError for a model that no method here compresses, and as `load` for one that cannot be found or read.
    """
    config = known_config(model)
    family_of(config)
    return min(2048, positions(config))


def with_saved_widths(method: str, values: dict) -> dict:
    """The settings, with the widths of a sliced model in place of a slicegpt `schedule` that names its folder."""
    schedule = values.get("schedule")
    if method != "slicegpt" or not isinstance(schedule, str) or schedule in slicegpt.SCHEDULES:
        return values
    return values | {"schedule": saved_widths(schedule)}


def saved_widths(folder: str | Path) -> list[int]:
    """The widths, junction by junction, of a sliced model saved in `folder`. Raises ValueError where there are none."""
    folder = Path(folder).expanduser()
    for edit in read_record(folder)["edits"] if is_checkpoint(folder) else ():
        if edit.get("edit") == "slicegpt":
            return edit["widths"]
    raise ValueError(f"{folder} holds no sliced model: a schedule is constant, variance, or the folder of a sliced model")


def _check_streamed(model: str, device: str) -> None:
    """Raise ValueError for what compressing from disk does not do."""
    if usable_device(device).type != "cpu":
        raise ValueError(f"compressing from disk works on the CPU, not on {device!r}")
    if not Path(locate(model)).is_dir():
        raise ValueError(f"compressing from disk needs a local folder, which {model!r} is not: download the model first")


def _open(model: str, device: str, dtype: str | None, streamed: bool) -> tuple[nn.Module, object]:
    """The model and its tokenizer; streamed: without its weights. Raises ValueError for models that no method here compresses."""
    kind, source = torch_dtype(dtype), locate(model)
    if not is_checkpoint(source) and Path(source).is_dir():
        family_of(config_of(source))  # raises now, before the weights are read
    return (disk.model_on_disk(source, kind), load_tokenizer(source)) if streamed else load(model, device, kind)
