"""Compress a model and save it: what `invoke compress` does, importable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lib.checkpoint import export, save
from lib.cost import count
from lib.experiment import Calibration
from lib.models import fingerprint, load
from lib.results import Progress, package_versions
from lib.slicegpt import global_axes, kept_width, slice_model, stock_model
from lib.text import load_corpus, sample_blocks


def _slicegpt(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, **settings) -> nn.Module:
    return slice_model(model, ids, ratio, inplace=True, progress=progress, **settings)


def _slicegpt_global(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable, round_interval: int = 8) -> nn.Module:
    return stock_model(model, global_axes(model, ids), kept_width(model.config.hidden_size, ratio, round_interval))


# One line per method: (model, calibration ids, ratio in the paper's own sense, progress, settings) -> compressed model.
METHODS = {"slicegpt": _slicegpt, "slicegpt-global": _slicegpt_global}


def compress(
    model: str,
    out: str | Path,
    method: str = "slicegpt",
    ratio: float = 0.25,
    calibration: Calibration | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
    **settings,
) -> dict:
    """Compress `model` (a name that `load` takes) into the new folder `out`; returns the row of sizes, really counted.

    ratio: the method's own notion, in [0, 1) (SliceGPT: slicing level). calibration: 128 sequences of wiki-a as long as the
    model's positions permit, at most 2,048, unless given. settings: arguments of the method, such as round_interval.
    Raises ValueError or FileExistsError before any long work for arguments that cannot work.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), not {ratio}: 0.25 means a quarter")
    if Path(out).expanduser().exists():
        raise FileExistsError(f"{out} exists: choose another output folder, or remove this one first")
    network, tokenizer = load(model, device, dtype)
    draw = calibration or Calibration("wiki-a", 128, min(2048, network.config.max_position_embeddings))
    generator = torch.Generator().manual_seed(draw.seed)
    ids = sample_blocks(load_corpus(draw.corpus, "train"), tokenizer, draw.samples, draw.length, generator, draw.rule)
    dense, base = count(network), {"name": Path(model).name if Path(model).exists() else model, "weights": fingerprint(network)}
    small = METHODS[method](network, ids, ratio, progress or Progress(), **settings)
    size = count(small)
    row = {"method": method, "ratio": ratio, "bytes": size.bytes, "dense_bytes": dense.bytes} | size.against(dense)
    if hasattr(small, "edits"):
        facts = {"base": base, "calibration": draw.record(), "packages": package_versions(), "settings": settings}
        save(small, tokenizer, out, **facts, **row)
    else:  # an ordinary architecture: anyone can load it
        export(small, tokenizer, out)
    return row
