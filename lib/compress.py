"""Compress a model and save it: what `invoke compress` does, importable."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

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
from lib.evaluation.console import Progress
from lib.evaluation.process import package_versions
from lib.evaluation.text import Calibration, load_corpus, sample_blocks
from lib.models import streaming
from lib.models.checkpoint import export, fingerprint, read_record, save
from lib.models.load import DTYPES, load, locate
from lib.papers import afr, comp, svd_llm
from lib.papers.sliced_network import shapes_only, usual_layout
from lib.papers.slicegpt import (
    constant_widths,
    global_axes,
    kept_width,
    slice_globally,
    slice_model,
    slice_without_shortcuts,
    spectra,
    stock_model,
    widths_for_size,
)
from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import check_length
from lib.primitives.checks import check_share, choose_one
from lib.primitives.cost import count
from lib.primitives.linalg import sparsity


def _slicegpt(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable,
    *,
    round_interval: int = 8,
    layout: str = "",
    schedule: str = "constant",
    slice_head: bool = False,
    compensate: bool = False,
    output_norms: str = "refuse",
) -> nn.Module:
    """SliceGPT. layout: empty for `tied` where the model's head shares its embedding table and stays whole, else `low-rank`.

    schedule: `constant`, `variance` (as many parameters as `constant` would leave), or the folder of a sliced model whose
    widths are taken over. output_norms: `exact`, `metric` or `fitted` for Gemma 3, which is refused otherwise.
    """
    layout = layout or usual_layout(model, slice_head)
    cut: float | list[int] = ratio
    if schedule == "variance":
        widths = constant_widths(model, ratio, round_interval, slice_head)
        size = count(shapes_only(model, widths, layout, output_norms)).params
        cut = widths_for_size(model, spectra(model, ids), size, round_interval, layout, slice_head, output_norms)
    elif schedule != "constant":
        cut = saved_widths(schedule)
    return slice_model(
        model, ids, cut, round_interval=round_interval, layout=layout, slice_head=slice_head, compensate=compensate,
        inplace=True, progress=progress, output_norms=output_norms,
    )  # fmt: skip


def saved_widths(folder: str | Path) -> list[int]:
    """The widths, junction by junction, of a sliced model saved in `folder`. Raises ValueError where there are none."""
    for edit in read_record(Path(folder).expanduser())["edits"]:
        if edit.get("edit") == "slicegpt":
            return edit["widths"]
    raise ValueError(f"{folder} holds no sliced model: a schedule is constant, variance, or the folder of a sliced model")


def _slicegpt_global(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, round_interval: int = 8
) -> nn.Module:
    return stock_model(
        slice_globally(model, global_axes(model, ids), kept_width(model.config.hidden_size, ratio, round_interval))
    )


def _slicegpt_stock(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, round_interval: int = 8
) -> nn.Module:
    return stock_model(slice_without_shortcuts(model, ids, ratio, round_interval=round_interval, inplace=True, progress=progress))


def _svd_llm(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable,
    *,
    variant: str = "W",
    order: str = "original",
    allocation: str = "uniform",
) -> nn.Module:
    settings = dict(variant=variant, order=order, allocation=allocation)
    return svd_llm.compress_model(model, ids, ratio, progress=progress, **settings)


def _svd(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable) -> nn.Module:
    return next(svd.sweep(model, [ratio], progress))[1]


def _fwsvd(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable) -> nn.Module:
    return next(fwsvd.sweep(model, ids, [ratio], progress=progress))[1]


def _asvd(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, alpha: float = asvd.ALPHA, search: bool = False
) -> nn.Module:
    return next(asvd.sweep(model, ids, [ratio], alpha=alpha, search=search, progress=progress))[1]


def _sparsegpt(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, pattern: str = "") -> nn.Module:
    return sparsegpt.prune(model, ids, sparsity(ratio, pattern), inplace=True, progress=progress)


def _wanda(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, pattern: str = "") -> nn.Module:
    return wanda.prune(model, ids, sparsity(ratio, pattern), inplace=True, progress=progress)


def _afr(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable,
    *,
    preset: str = "paper",
    allocation: str = "uniform",
    aggregation: str = "",
    checkpointing: bool = False,
) -> nn.Module:
    """Structured AFR. aggregation: empty for the preset's own."""
    changes = {"checkpointing": checkpointing} | ({"aggregation": aggregation} if aggregation else {})
    return afr.prune(model, ids, ratio, preset=preset, allocation=allocation, inplace=True, progress=progress, **changes)


def _in_silence(sweep: Callable) -> Callable:
    """A sweep that is over too soon to report progress."""
    return lambda model, ids, ratios, progress, **settings: sweep(model, ids, ratios, **settings)


def _afr_sweep(
    model: nn.Module, ids: torch.Tensor, ratios: Sequence[float], progress: Callable, *, aggregation: str = "", **settings
) -> Iterator[tuple[float, nn.Module]]:
    return afr.sweep(model, ids, ratios, progress=progress, **settings | ({"aggregation": aggregation} if aggregation else {}))


def _llm_pruner(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable,
    *,
    importance: str = "first",
    attention: bool = True,
    fold: str = "neighbours",
    samples: int | None = llm_pruner.SAMPLES,
    length: int | None = llm_pruner.LENGTH,
) -> nn.Module:
    """LLM-Pruner. samples, length: how much of the calibration set it reads, 10 x 64 as its reference; None for all of it."""
    settings = dict(importance=importance, attention=attention, fold=fold, samples=samples, length=length)
    return llm_pruner.prune(model, ids, ratio, inplace=True, **settings)


def _fpt(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *,
    rearrangement: bool = True, tuning: bool = True, literal: bool = False,
) -> nn.Module:  # fmt: skip
    settings = dict(rearrangement=rearrangement, tuning=tuning, literal=literal)
    return fpt.prune(model, ids, ratio, progress=progress, **settings)


def _comp(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    progress: Callable,
    *,
    rho: float = 0.5,
    metric: str = "C1",
    reference: str = "residual",
    variance_bound: float = 0.1,
    multiple: int = 1,
    equal_widths: bool = False,
) -> nn.Module:
    """COMP. equal_widths: every block as wide as the others, so that the result is a stock model that anyone can load."""
    settings = comp.Settings(
        rho=rho, metric=metric, reference=reference, variance_bound=variance_bound, multiple=multiple, equal_widths=equal_widths
    )
    return comp.prune(model, ids, ratio, settings, progress=progress)[0]


def _comp_sweep(
    model: nn.Module, ids: torch.Tensor, ratios: Sequence[float], progress: Callable, **settings
) -> Iterator[tuple[float, nn.Module]]:
    return comp.sweep(model, ids, ratios, comp.Settings(**settings), progress=progress)


def _shortgpt(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, choice: str = "one-shot", after_norm: bool = False
) -> nn.Module:
    """ShortGPT: the whole number of blocks nearest to the ratio."""
    count = shortgpt.blocks_for(model, ratio)
    return shortgpt.prune(model, ids, count, inplace=True, choice=choice, after_norm=after_norm)


def _cfsp(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *,
    fine: str = "code", coarse: bool = True, multiple: int = 1,
) -> nn.Module:  # fmt: skip
    return cfsp.prune(model, ids, ratio, fine=fine, coarse=coarse, multiple=multiple)


def _flap(
    model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, attention: bool = True, compensate: bool = True
) -> nn.Module:
    return flap.prune(model, ids, ratio, attention=attention, compensate=compensate)


def _lorap(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, mlp_only: bool = False) -> nn.Module:
    return lorap.prune(model, ids, ratio, mlp_only=mlp_only)


def _wanda_sp(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable) -> nn.Module:
    return wanda.prune_neurons(model, ids, ratio)


def _magnitude_neurons(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, order: int = 2) -> nn.Module:
    return magnitude.prune_neurons(model, ratio, order=order)


def _random_neurons(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, *, seed: int = 0) -> nn.Module:
    return random_neurons.prune(model, ratio, torch.Generator().manual_seed(seed))


# One line per method: (model, calibration ids, ratio in the paper's own sense, progress, settings) -> compressed model.
METHODS = {
    "slicegpt": _slicegpt,
    "slicegpt-stock": _slicegpt_stock,
    "slicegpt-global": _slicegpt_global,
    "svd-llm": _svd_llm,
    "svd": _svd,
    "fwsvd": _fwsvd,
    "asvd": _asvd,
    "sparsegpt": _sparsegpt,
    "wanda": _wanda,
    "afr": _afr,
    "llm-pruner": _llm_pruner,
    "fpt": _fpt,
    "comp": _comp,
    "shortgpt": _shortgpt,
    "cfsp": _cfsp,
    "flap": _flap,
    "lorap": _lorap,
    "wanda-sp": _wanda_sp,
    "magnitude-neurons": _magnitude_neurons,
    "random-neurons": _random_neurons,
}


# Where most of the work serves every ratio: (model, calibration ids, ratios, progress, settings) -> (ratio, model) one by one.
SWEEPS = {
    "svd-llm": svd_llm.sweep,
    "svd": lambda model, ids, ratios, progress: svd.sweep(model, ratios, progress),
    "fwsvd": fwsvd.sweep,
    "asvd": asvd.sweep,
    "afr": _afr_sweep,
    "fpt": fpt.sweep,
    "comp": _comp_sweep,
    "llm-pruner": _in_silence(llm_pruner.sweep),
    "cfsp": _in_silence(cfsp.sweep),
    "flap": _in_silence(flap.sweep),
    "wanda-sp": _in_silence(wanda.sweep_neurons),
}


def sweep(
    method: str, model: nn.Module, ids: torch.Tensor, ratios: Sequence[float], progress: Callable | None = None, **settings
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, what `METHODS` makes of the model) for every ratio; scores and decompositions that serve all are computed once.

    ids: calibration tokens [samples, length]; settings: arguments of the method. The given model stays intact; what is made of
    it may share tensors with it and among itself, so copy a result before you write into it. Raises ValueError as
    `check_settings` and the method do.
    """
    check_settings(method, settings)
    progress = progress or (lambda text: None)
    if method in SWEEPS:
        return SWEEPS[method](model, ids, ratios, progress=progress, **settings)
    return ((ratio, METHODS[method](copy.deepcopy(model), ids, ratio, progress, **settings)) for ratio in ratios)


def check_settings(method: str, settings: dict) -> None:
    """Raise ValueError for an unknown method or a setting that it does not take, naming those that it does."""
    choose_one("method", method, METHODS)
    known = [p.name for p in inspect.signature(METHODS[method]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise ValueError(f"unknown setting {name!r} of {method}: choose one of {', '.join(known)}")


def compress(
    model: str,
    out: str | Path,
    method: str = "slicegpt",
    ratio: float = 0.25,
    calibration: Calibration | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
    streamed: bool = False,
    **settings,
) -> dict:
    """Compress `model` (a name that `load` takes) into the new folder `out`; returns the row of sizes, really counted.

    ratio: the method's own notion, in [0, 1) (SliceGPT: slicing level; low rank: share of the matrices' parameters; pruning:
    share of their weights that become 0, all of which are still stored). calibration: 128 sequences of wiki-a as long as the
    model's positions permit, at most 2,048, unless given. settings: arguments of the method (see METHODS), such as
    round_interval. streamed: work from the model's folder block by block, without loading it whole (`lib.models.streaming`); an
    interrupted run goes on where it was when it is started again.
    Raises ValueError or FileExistsError before any long work for arguments that cannot work.
    """
    check_settings(method, settings)
    check_share(ratio)
    if Path(out).expanduser().exists():
        raise FileExistsError(f"{out} exists: choose another output folder, or remove this one first")
    network, tokenizer = _open_on_disk(model, method, device, dtype) if streamed else load(model, device, dtype)
    draw = calibration or Calibration("wiki-a", 128, min(2048, network.config.max_position_embeddings))
    check_length(Anatomy(network), draw.length)  # now, not when many long sequences have been drawn
    generator = torch.Generator().manual_seed(draw.seed)
    ids = sample_blocks(load_corpus(draw.corpus, "train"), tokenizer, draw.samples, draw.length, generator, draw.rule)
    dense, progress = count(network), progress or Progress()
    weights = streaming.fingerprint(network) if streamed else fingerprint(network)

    def sizes(small: nn.Module) -> dict:
        size = count(small)
        return {"method": method, "ratio": ratio, "bytes": size.bytes, "dense_bytes": dense.bytes} | size.against(dense)

    def facts(small: nn.Module) -> dict:
        tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()  # which samples were drawn, beyond the rule and the seed
        return {
            "base": {"name": Path(model).name if Path(model).exists() else model, "weights": weights},
            "calibration": draw.record() | {"tokens_sha256": tokens},
            "packages": package_versions(),
            "settings": settings,
        } | sizes(small)

    if streamed:
        small = streaming.compress_on_disk(
            locate(model), out, ids, method, ratio, tokenizer=tokenizer, dtype=network.dtype, resume=True, facts=facts,
            progress=progress, **settings,
        )  # fmt: skip
        return sizes(small)
    small = METHODS[method](network, ids, ratio, progress, **settings)
    if hasattr(small, "edits"):
        save(small, tokenizer, out, **facts(small))
    else:  # an ordinary architecture: anyone can load it
        export(small, tokenizer, out)
    return sizes(small)


def _open_on_disk(model: str, method: str, device: str, dtype: str) -> tuple[nn.Module, object]:
    """The model of a local folder without its weights, and its tokenizer. Raises ValueError for what cannot be streamed."""
    if method not in streaming.METHODS:
        raise ValueError(f"method {method!r} does not run from disk: choose one of {', '.join(streaming.METHODS)}")
    if torch.device(device).type != "cpu" or dtype not in DTYPES:
        raise ValueError(f"streaming works on the CPU, in {', '.join(DTYPES)}, not on {device!r} in {dtype!r}")
    folder = locate(model)
    if not Path(folder).is_dir():
        raise ValueError(f"streaming reads a local folder, and {model!r} is none: download the model first")
    return streaming.model_on_disk(folder, DTYPES[dtype]), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
