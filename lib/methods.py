"""Every method by name: one record each, from which the commands, the comparison and the help texts are made.

To add a method, write one file with a `sweep` and a `Settings`, and one record here (see `lib/README.md`).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn

from lib.baselines import (
    asvd,
    cfsp,
    flap,
    fpt,
    fwsvd,
    llm_pruner,
    lorap,
    magnitude,
    random_neurons,
    shortgpt,
    sparsegpt,
    svd,
    wanda,
)
from lib.papers import afr, comp, slicegpt, svd_llm
from lib.primitives import layerwise, low_rank
from lib.primitives.checks import check_inplace, check_share, choose_one
from lib.primitives.structured import shape_without_neurons

# What a ratio is a share of.
OF_BLOCKS = "the blocks' parameters"  # the ratio is the size itself, so no search is needed for an equal size
OF_MATRICES = "the matrices' parameters"
OF_NEURONS = "the FFN neurons"
OF_INNER = "the neurons and groups of every inner block"
OF_COMPETING = "the parameters of the units that compete"
OF_HALVES = "the parameters of every attention, and of the neurons of every FFN"
OF_STREAM = "the stream's directions"
OF_WEIGHTS = "the weights"

TEXT, GRADIENTS, NOTHING = "text", "text and gradients", "nothing"

# Where a result can be loaded.
ANYWHERE = "any runtime"
EQUAL_WIDTHS = "any runtime where all blocks end equally wide, else this suite"
MERGED = "this suite; any runtime after `invoke merge-to-dense`, at dense size"
THIS_SUITE = "this suite"


@dataclass(frozen=True)
class NoSettings:
    """For methods that have nothing to set."""


@dataclass(frozen=True)
class Method:
    """The record of a method.

    sweep: (model, ids [samples, length], ratios, settings, progress) -> (ratio, model) one by one; what serves every ratio is
    computed once, and the given model stays intact. consumes: `sweep` also takes `inplace=True` and may then use up the model,
    for one ratio. settings: a frozen dataclass that checks itself; its fields are what `--set` takes. presets: other starting
    points than its defaults. shape: (model, ratio, settings) -> compressed model on the meta device, of the size that the
    method leaves. on_disk: (model, ids, ratio, settings, note) -> a walk over a model whose weights are on disk.
    """

    name: str
    sweep: Callable[..., Iterator[tuple[float, nn.Module]]]
    settings: type
    removes: str
    ratio: str  # what the ratio is a share of
    needs: str
    paper: str
    loads: str
    shape: Callable[..., nn.Module] | None = None
    on_disk: Callable[..., layerwise.Walk] | None = None
    consumes: bool = False
    presets: Mapping[str, object] = field(default_factory=dict)


def neuron_method(name: str, sweep: Callable, settings: type, needs: str, paper: str, **more) -> Method:
    """A method that removes FFN neurons only."""
    known = {"shape": shape_without_neurons} | more
    return Method(name, sweep, settings, "FFN neurons", OF_NEURONS, needs, paper, EQUAL_WIDTHS, **known)


def _ranks(name: str, sweep: Callable, settings: type, needs: str, paper: str, **more) -> Method:
    """A method that replaces matrices by two factors."""
    more |= {"shape": low_rank.shape}
    return Method(name, sweep, settings, "ranks of the blocks' matrices", OF_MATRICES, needs, paper, MERGED, **more)


def _zeros(name: str, sweep: Callable, paper: str, on_disk: Callable) -> Method:
    """A method that sets weights to zero, stored dense."""
    known = {"on_disk": on_disk, "consumes": True}
    return Method(name, sweep, layerwise.Pattern, "single weights (set to zero)", OF_WEIGHTS, TEXT, paper, ANYWHERE, **known)


_SLICED, _ABLATED = "SliceGPT, arXiv 2401.15024", "ours, after SliceGPT"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "slicegpt", slicegpt.sweep, slicegpt.Settings, "directions of the residual stream", OF_STREAM, TEXT, _SLICED,
            THIS_SUITE, slicegpt.shape, consumes=True,
        ),
        Method(
            "slicegpt-stock", slicegpt.stock_sweep, slicegpt.Rounding, "directions of the residual stream, without shortcuts",
            OF_STREAM, TEXT, _ABLATED, ANYWHERE, slicegpt.stock_shape, consumes=True,
        ),
        Method(
            "slicegpt-global", slicegpt.global_sweep, slicegpt.Rounding, "directions of the residual stream, the same everywhere",
            OF_STREAM, TEXT, _ABLATED, ANYWHERE, slicegpt.stock_shape, consumes=True,
        ),
        _ranks("svd-llm", svd_llm.sweep, svd_llm.Settings, TEXT, "SVD-LLM, arXiv 2403.07378", on_disk=svd_llm.on_disk),
        _ranks("svd", svd.sweep, NoSettings, NOTHING, "plain SVD"),
        _ranks("fwsvd", fwsvd.sweep, NoSettings, GRADIENTS, "FWSVD, arXiv 2207.00112"),
        _ranks("asvd", asvd.sweep, asvd.Settings, TEXT, "ASVD, arXiv 2312.05821"),
        _zeros("sparsegpt", sparsegpt.sweep, "SparseGPT, arXiv 2301.00774", sparsegpt.on_disk),
        _zeros("wanda", wanda.sweep, "Wanda, arXiv 2306.11695", wanda.on_disk),
        neuron_method("afr", afr.sweep, afr.Settings, GRADIENTS, "Structured AFR, Kobayashi et al. 2025", presets=afr.PRESETS,
            consumes=True),
        Method(
            "llm-pruner", llm_pruner.sweep, llm_pruner.Settings, "FFN neurons and groups of heads of the inner blocks", OF_INNER,
            GRADIENTS, "LLM-Pruner, arXiv 2305.11627", THIS_SUITE, llm_pruner.shape, consumes=True,
        ),
        Method(
            "fpt", fpt.sweep, fpt.Settings, "FFN neurons and groups of heads", OF_BLOCKS, GRADIENTS, "FPT, arXiv 2204.09656",
            EQUAL_WIDTHS,
        ),
        Method(
            "comp", comp.sweep, comp.Settings, "blocks, then FFN neurons", OF_BLOCKS, TEXT, "COMP, arXiv 2501.15255",
            EQUAL_WIDTHS, comp.shape, comp.on_disk,
        ),
        Method(
            "shortgpt", shortgpt.sweep, shortgpt.Settings, "blocks", OF_BLOCKS, TEXT, "ShortGPT, arXiv 2403.03853", ANYWHERE,
            shortgpt.shape, consumes=True,
        ),
        neuron_method("cfsp", cfsp.sweep, cfsp.Settings, TEXT, "CFSP, arXiv 2409.13199"),
        Method(
            "flap", flap.sweep, flap.Settings, "FFN neurons and groups of heads", OF_COMPETING, TEXT, "FLAP, arXiv 2312.11983",
            THIS_SUITE, flap.shape,
        ),
        Method(
            "lorap", lorap.sweep, lorap.Settings, "ranks of attention, FFN neurons", OF_HALVES, TEXT, "LoRAP, arXiv 2404.09695",
            THIS_SUITE, lorap.shape,
        ),
        neuron_method("wanda-sp", wanda.sweep_neurons, NoSettings, TEXT, "Wanda-sp, arXiv 2312.11983"),
        neuron_method("magnitude-neurons", magnitude.sweep_neurons, magnitude.Settings, NOTHING, "a control"),
        neuron_method("random-neurons", random_neurons.sweep, random_neurons.Settings, NOTHING, "a control"),
    )
}  # fmt: skip


def method_named(name: str) -> Method:
    """The record of a method. Raises ValueError, naming all of them, for an unknown one."""
    choose_one("method", name, METHODS)
    return METHODS[name]


def on_disk_method(name: str) -> Method:
    """The record of a method that runs from disk. Raises ValueError, naming these methods, for any other."""
    method = method_named(name)
    if method.on_disk is None:
        known = ", ".join(other.name for other in METHODS.values() if other.on_disk)
        raise ValueError(f"method {name!r} does not run from disk: choose one of {known}")
    return method


def settings_of(name: str, values: Mapping[str, object]) -> object:
    """The settings record of a method with some fields changed, `preset` naming its starting point where there are several.

    Raises ValueError for an unknown method, field or preset, for a value of another type, and as the record itself does.
    """
    method, values = method_named(name), dict(values)
    start = method.settings()
    known = [f.name for f in fields(method.settings)]
    if method.presets:
        preset = values.pop("preset", next(iter(method.presets)))
        choose_one(f"preset of {name}", preset, method.presets)
        start, known = method.presets[preset], ["preset", *known]
    types_ = typing.get_type_hints(method.settings)
    for key, value in values.items():
        choose_one(f"setting of {name}", key, known)
        if value is None and getattr(start, key) == "":
            value = values[key] = ""  # `--set layout=` in YAML
        if not _fits(value, types_[key]):
            raise ValueError(
                f"{key} of {name} is {value!r}: give {_in_words(types_[key])}, as in --set {key}={getattr(start, key)}"
            )
        if isinstance(value, list):
            values[key] = tuple(value)
    return replace(start, **values)


def _fits(value: object, kind: object) -> bool:
    """Whether a value, as YAML or a caller gives it, is of the kind that a field is annotated with."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(part, typing.get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: object) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
    if typing.get_origin(kind) is tuple:
        return "a list"
    return " or ".join(words.get(part, "a list") for part in typing.get_args(kind) or (kind,))


def sweep(
    name: str,
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    progress: Callable | None = None,
    inplace: bool = False,
    **values,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, compressed model) for every ratio; scores and decompositions that serve all are computed once.

    ids: calibration tokens [samples, length]; values: fields of the method's settings. The given model stays intact.
    Results may share tensors with it and with each other, so copy a result before you write into it. inplace: the model may
    be used up, which saves memory; for one ratio. Raises ValueError as `settings_of` and the method do.
    """
    method, settings = method_named(name), settings_of(name, values)
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    options = {"inplace": True} if inplace and method.consumes else {}
    return method.sweep(model, ids, ratios, settings, progress, **options)


def make(
    name: str,
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable | None = None,
    inplace: bool = False,
    **values,
) -> nn.Module:
    """A model compressed at one ratio; arguments and errors are those of `sweep`."""
    return next(iter(sweep(name, model, ids, [ratio], progress, inplace, **values)))[1]
