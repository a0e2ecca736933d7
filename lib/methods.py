"""Every method by name: one record each, from which the commands, the comparison and the help texts are made.

To add a method, write one file with a `sweep` and a `Settings`, and one record here (see `lib/README.md`).
"""

from __future__ import annotations

import contextlib
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
    modegpt,
    random_neurons,
    shortgpt,
    sparsegpt,
    svd,
    wanda,
)
from lib.papers import afr, comp, slicegpt, svd_llm
from lib.primitives import layerwise, low_rank
from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import check_inplace, check_share, choose_one
from lib.primitives.structured import shape_without_neurons

# What a ratio is a share of.
OF_BLOCKS = "the blocks' parameters"  # the ratio is the size itself, so no search is needed for an equal size
OF_MATRICES = "the matrices' parameters"
OF_NEURONS = "the FFN neurons"
OF_INNER = "the neurons and groups of every inner block"
OF_UNITS = "the neurons and groups of every block"
OF_COMPETING = "the parameters of the units that compete"
OF_HALVES = "the parameters of every attention, and of the neurons of every FFN"
OF_STREAM = "the stream's directions"
OF_WEIGHTS = "the weights"

TEXT, GRADIENTS, NOTHING = "text", "text and gradients", "nothing"

# What earlier methods may have left of a model that is not stock, see `changes`.
SLICED, FACTORED_ATTENTION, FACTORED_FFN = "a sliced stream", "two-factor layers in attention", "two-factor layers in FFNs"
UNEQUAL = "blocks of unequal widths or with new biases"
NARROW = "narrower attention heads"

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
    for one ratio. settings: a frozen dataclass that checks itself; its fields are what `--set` takes, and its ONLY_WITH, where it
    has one, says which of them are read only with certain values of another. presets: other starting points than its defaults.
    shape: (model, ratio, settings) -> compressed model on the meta device, of the size that the method leaves. on_disk: (model,
    ids, ratio, settings, note) -> a walk over a model whose weights are on disk. takes: what an earlier method may have left;
    every method takes stock models.
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
    takes: tuple[str, ...] = (UNEQUAL,)


def neuron_method(name: str, sweep: Callable, settings: type, needs: str, paper: str, **more) -> Method:
    """A method that removes FFN neurons only."""
    known = {"shape": shape_without_neurons, "takes": (UNEQUAL, FACTORED_ATTENTION)} | more
    return Method(name, sweep, settings, "FFN neurons", OF_NEURONS, needs, paper, EQUAL_WIDTHS, **known)


def _ranks(name: str, sweep: Callable, settings: type, needs: str, paper: str, **more) -> Method:
    """A method that replaces matrices by two factors."""
    more |= {"shape": low_rank.shape, "consumes": True}
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
            OF_STREAM, TEXT, _ABLATED, ANYWHERE, slicegpt.stock_shape, consumes=True, takes=(),
        ),
        Method(
            "slicegpt-global", slicegpt.global_sweep, slicegpt.Rounding, "directions of the residual stream, the same everywhere",
            OF_STREAM, TEXT, _ABLATED, ANYWHERE, slicegpt.stock_shape, consumes=True, takes=(),
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
            takes=(UNEQUAL, FACTORED_ATTENTION),
        ),
        Method(
            "fpt", fpt.sweep, fpt.Settings, "FFN neurons and groups of heads", OF_BLOCKS, GRADIENTS, "FPT, arXiv 2204.09656",
            EQUAL_WIDTHS, fpt.shape,
        ),
        Method(
            "comp", comp.sweep, comp.Settings, "blocks, then FFN neurons", OF_BLOCKS, TEXT, "COMP, arXiv 2501.15255",
            EQUAL_WIDTHS, comp.shape, comp.on_disk, takes=(UNEQUAL, FACTORED_ATTENTION),
        ),
        Method(
            "modegpt", modegpt.sweep, modegpt.Settings, "FFN neurons, and channels of heads if asked for", OF_BLOCKS, TEXT,
            "MoDeGPT, arXiv 2408.09632", EQUAL_WIDTHS, modegpt.shape, consumes=True,
        ),
        Method(
            "shortgpt", shortgpt.sweep, shortgpt.Settings, "blocks", OF_BLOCKS, TEXT, "ShortGPT, arXiv 2403.03853", ANYWHERE,
            shortgpt.shape, consumes=True,
        ),
        neuron_method("cfsp", cfsp.sweep, cfsp.Settings, TEXT, "CFSP, arXiv 2409.13199", consumes=True),
        Method(
            "flap", flap.sweep, flap.Settings, "FFN neurons and groups of heads", OF_COMPETING, TEXT, "FLAP, arXiv 2312.11983",
            THIS_SUITE, flap.shape, consumes=True, takes=(UNEQUAL, FACTORED_ATTENTION),
        ),
        Method(
            "lorap", lorap.sweep, lorap.Settings, "ranks of attention, FFN neurons", OF_HALVES, TEXT, "LoRAP, arXiv 2404.09695",
            THIS_SUITE, lorap.shape, consumes=True, takes=(UNEQUAL, FACTORED_ATTENTION),
        ),
        neuron_method("wanda-sp", wanda.sweep_neurons, NoSettings, TEXT, "Wanda-sp without heads, as in CFSP, arXiv 2409.13199",
            consumes=True),
        Method(
            "wanda-sp-heads", wanda.sweep_units, NoSettings, "FFN neurons and groups of heads", OF_UNITS, TEXT,
            "Wanda-sp, arXiv 2312.11983", EQUAL_WIDTHS, wanda.shape, consumes=True,
        ),
        neuron_method("magnitude-neurons", magnitude.sweep_neurons, magnitude.Settings, NOTHING, "a control", consumes=True),
        neuron_method("random-neurons", random_neurons.sweep, random_neurons.Settings, NOTHING, "a control", consumes=True),
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

    Yes, no, true, false, 1 and 0 stand for true and false. Raises ValueError for an unknown method, field or preset, and as the
    record itself does for a value of another type or out of range.
    """
    method, values = method_named(name), dict(values)
    start = method.settings()
    known = [f.name for f in fields(method.settings)]
    if method.presets:
        preset = values.pop("preset", next(iter(method.presets)))
        choose_one(f"preset of {name}", preset, method.presets)
        start, known = method.presets[preset], ["preset", *known]
    hints = typing.get_type_hints(method.settings)
    for key, value in values.items():
        choose_one(f"setting of {name}", key, known)
        values[key] = _as_meant(value, hints[key])
    return replace(start, **values)


YES_OR_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def _as_meant(value: object, kind: object) -> object:
    """A value, as YAML or a caller gives it, in the form that a field of this kind holds; the record checks it."""
    if kind is bool:
        return YES_OR_NO.get(str(value).lower(), value)
    if kind is str and value is None:  # `--set layout=` in YAML
        return ""
    if kind is float and isinstance(value, str):  # 1e-3 and inf, which YAML reads as words
        with contextlib.suppress(ValueError):
            return float(value)
    return tuple(value) if isinstance(value, list) else value


def without_effect(name: str, values: Mapping[str, object]) -> list[str]:
    """A sentence for every setting that is given, and for the ratio, where the other settings leave it without effect."""
    settings = settings_of(name, values)
    return [
        f"{key} has no effect: {name} reads it only with {other}={' or '.join(map(str, wanted))}"
        for key, (other, wanted) in getattr(settings, "ONLY_WITH", {}).items()
        if (key in values or key == "ratio") and getattr(settings, other) not in wanted
    ]


def changes(model: nn.Module) -> list[str]:
    """What earlier methods have left of a model that no stock class can hold; empty for a stock model."""
    found = []
    for edit in getattr(model, "edits", []):
        if edit["edit"] == "low-rank":
            half = Anatomy(model).family.attention
            inside = [name.endswith((*half.readers, half.writer)) for name in edit["ranks"]]
            found += [FACTORED_ATTENTION] * any(inside) + [FACTORED_FFN] * (not all(inside))
        else:
            found.append({"slicegpt": SLICED, "structured": UNEQUAL, "narrow-heads": NARROW}[edit["edit"]])
    return found


def check_changes(model: nn.Module, method: Method, settings: object) -> None:
    """Raise ValueError for a method that cannot work on what earlier methods have left of a model."""
    # Methods for neurons that also cut or factor attention need it in ordinary layers.
    attention = bool(getattr(settings, "attention", False)) or not getattr(settings, "mlp_only", True)
    taken = set(method.takes) - ({FACTORED_ATTENTION} if attention else set())
    if hindered := [change for change in changes(model) if change not in taken]:
        merge = any("two-factor" in change for change in hindered)
        raise ValueError(
            f"{method.name} cannot work on a compressed model with {' and '.join(hindered)}: start from the dense model"
            + (", or multiply the factors first with `invoke merge-to-dense`" if merge else "")
        )


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
    be used up, which saves memory; for one ratio. Raises ValueError as `settings_of`, `check_changes` and the method do.
    """
    method, settings = method_named(name), settings_of(name, values)
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    check_changes(model, method, settings)
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
