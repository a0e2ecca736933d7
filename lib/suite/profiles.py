"""Profiles: one parameter file per model, and what a run of it would do, counted on meta tensors before anything is loaded.

A profile maps papers to the parameters of their notebooks; its `about` says which model that is, what is reduced and why,
what it needs that this machine may lack, and which published tables its numbers stand beside.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.evaluation.text import HUB_CORPORA
from lib.methods import METHODS
from lib.papers.sliced_network import shapes_only
from lib.papers.slicegpt import constant_widths
from lib.primitives.checks import choose_one
from lib.primitives.cost import Count, count
from lib.suite.architectures import meta_model

ABOUT = ("model", "architecture", "needs", "settings", "tables", "refused")
NEEDS = ("gpu", "hub", "licence", "package")


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
class Work:
    """What one notebook computes, counted from its parameters: how often each kind of work is done."""

    compressed: int  # passes over the calibration set, most often one for each model made
    evaluated: int  # models scored by perplexity
    examined: int  # of these, how many face the zero-shot tasks
    tuning_tokens: int  # tokens that go forward and backward through a model


def _slicegpt_work(p: dict) -> Work:
    """Of notebooks/slicegpt.ipynb: three layouts, bases, controls, rivals, calibration sizes, variants, schedules."""
    levels, draws = len(p["levels"]), len(p["calibration_sizes"]) * len(p["seeds"])
    made = 5 * levels + 4 + 2 + 1 + draws + 6 + 2 * (levels // 2) + 5
    return Work(made, 1 + made, 2 + levels, p["recovery"]["steps"] * p["recovery"]["batch"] * p["length"])


def _svd_llm_work(p: dict) -> Work:
    """Of notebooks/svd_llm.ipynb: six methods and adapters, ablations, calibration sizes, equal bytes, bits, allocations."""
    ratios, tuned, draws = len(p["ratios"]), len(p["lora_ratios"]), len(p["calibration_sizes"]) * len(p["seeds"])
    made = 7 * ratios + 3 * tuned + draws + len(p["sources"]) + 1 + min(3, ratios) + 6 + 2 * ratios + 7
    evaluated = made - 7 + 1 + 3
    rounds = ratios + 4 * tuned + 1  # each of two stages
    return Work(made, evaluated, 1 + 7 * ratios, 2 * rounds * p["lora"]["steps"] * p["lora"]["batch"] * p["lora_length"])


def _afr_work(p: dict) -> Work:
    """Of notebooks/afr.ipynb: six ways of AFR, eleven rivals and random ones, variants. Neurons deleted one by one to
    see what they are worth are left out: they cost 4 sequences each, from their block on."""
    ratios, variants = len(p["ratios"]), (len(p["ablations"]) or 25) + 4
    made = (16 + len(p["seeds"]) + variants) * ratios + 4 * len(p["sweep"])
    backward = 3 + 2 * variants + 4 + ratios  # SNIP and ReFer pass once each; LLM-Pruner's kinds, and LLM-Pruner itself
    tokens = backward * p["samples"] * p["length"]
    return Work(6 + ratios, 1 + made, 1 + 6 * ratios, tokens)


def _comp_work(p: dict) -> Work:
    """Of notebooks/comp.ipynb: seven methods, five of them swept, draws, splits, metrics, choices."""
    sweep, seeds, sizes = len(p["sweep"]), len(p["seeds"]), len(p["calibration_sizes"])
    splits = 2 if p["whole_blocks"] in p["sweep"] else 4
    pruned = 1 + sweep + 2 * seeds - 1 + splits + 2 + 7 + 9 + sizes * seeds + 1  # COMP: layer scores, then teacher and student
    others = 6 + 4 * sweep + 3 * (seeds - 1) + 6
    backward = 1 + (seeds - 1) + 1 + sweep + seeds  # LLM-Pruner on all text, and FPT's masks
    tokens = backward * p["samples"] * p["length"] + p["lora"]["steps"] * p["lora"]["batch"] * p["lora_length"]
    return Work(3 * pruned + others, 1 + pruned + others, 8, tokens)


WORK: dict[str, Callable[[dict], Work]] = {
    "slicegpt": _slicegpt_work,
    "svd_llm": _svd_llm_work,
    "afr": _afr_work,
    "comp": _comp_work,
}


def _sliced(model: nn.Module, level: float, p: dict) -> Count:
    return count(shapes_only(model, constant_widths(model, level, p["round_interval"]), "low-rank"))


def _method(name: str) -> Callable:
    """(model, ratio, parameters) -> size of what a method makes at its own ratio."""

    def after(model: nn.Module, ratio: float, p: dict) -> Count:
        return count(METHODS[name].shape(model, ratio))

    return after


AFTER = {  # the levels of a notebook, and the model at one of them
    "slicegpt": (lambda p: p["levels"], _sliced),
    "svd_llm": (lambda p: p["ratios"], _method("svd-llm")),
    "afr": (lambda p: p["ratios"], _method("afr")),
    "comp": (lambda p: sorted([p["ratio"], *p["sweep"]]), _method("comp")),
}


def documents_scored(p: dict) -> int:
    """Documents of all zero-shot tasks of a run under its limit; a task that is not known counts as 2,000."""
    limit = p.get("limit") or 10**9
    return sum(57 * min(limit, 246) if task == "mmlu" else min(limit, DOCUMENTS.get(task, 2000)) for task in p.get("tasks", []))


@functools.cache
def _dense(architecture: str) -> tuple[Count, object]:
    """Size and configuration of a dense model."""
    model = meta_model(architecture)
    return count(model), model.config


def params_after(paper: str, parameters: dict, architecture: str) -> dict[float, int]:
    """{level or ratio: parameters that are left} for every level of a notebook's sweep, counted on the compressed shapes."""
    levels, after = AFTER[paper]
    model = meta_model(architecture)
    return {level: after(model, level, parameters).params for level in levels(parameters)}


def plan(paper: str, parameters: dict, architecture: str, device: str = "A100", throughput: float = 0.0) -> dict:
    """What a notebook would do with its full `parameters` on a model of `architecture`, without weights.

    throughput: operations a second; 0 takes REACHED of the device's published figure. Returns cells, parameters, operations
    (two per multiply-add), peak memory, disk and hours. Perplexity, zero-shot, calibration and tuning are counted in passes of
    the whole network; decompositions, which no matrix throughput describes, are left out.

    Raises ValueError for an unknown device, or a paper whose work is not counted here.
    """
    choose_one("device", device, DEVICES)
    if paper not in WORK:
        raise ValueError(f"the work of {paper!r} is not counted yet: choose one of {', '.join(WORK)}")
    (dense, config), work = _dense(architecture), WORK[paper](parameters)
    width = 4 if parameters.get("dtype", "float32") == "float32" else 2
    length = parameters["length"]
    per_token = 2 * dense.macs_per_token
    scored = parameters["windows"] * length if parameters.get("windows") else WIKITEXT2_TEST_TOKENS
    tokens = {
        "calibration": work.compressed * parameters["samples"] * length,
        "perplexity": work.evaluated * scored,
        "zero_shot": work.examined * documents_scored(parameters) * TOKENS_PER_DOCUMENT,
        "tuning": 3 * work.tuning_tokens,  # backward costs twice the forward pass
    }
    operations = {name: n * per_token for name, n in tokens.items()}
    speed = throughput or REACHED * DEVICES[device].operations
    inner = max(getattr(config, "intermediate_size", 0), getattr(config, "ffn_dim", 0))
    stream = parameters["samples"] * length * config.hidden_size * width
    weights = dense.params * width
    return {
        "cells": work.evaluated,
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
    if "hub" in needs:
        lacks.append(f"{needs['hub']} from the hub")
    if "licence" in needs:
        lacks.append(f"its licence ({needs['licence']})")
    corpora = {p.get(key) for p in profile.papers.values() for key in ("corpus", "evaluation")}
    if corpora & set(HUB_CORPORA) and not data_dir:
        lacks.append("the corpora and benchmarks (hub, or --data-dir)")
    return lacks
