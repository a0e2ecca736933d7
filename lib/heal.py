"""Train a compressed model a little, on text or on what its dense model says there: what `invoke heal` does, importable."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from lib.evaluation.console import Progress
from lib.evaluation.text import Calibration, load_corpus, sample_blocks
from lib.models.checkpoint import export, fingerprint, is_checkpoint, read_record, save
from lib.models.load import load, locate, torch_dtype
from lib.models.output import check_output, reserved
from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import check_length
from lib.primitives.cost import count
from lib.primitives.distillation import Distillation
from lib.primitives.finetune import LoRA, recover

HELD_OUT = 8  # sequences of the validation split that decide which step is kept
SPARSE = 0.1  # share of exact zeros from which a model counts as one whose zeros are meant


def heal(
    model: str,
    out: str | Path,
    text: Calibration,
    settings: LoRA,
    dense: str = "",
    distillation: Distillation | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict:
    """Train `model` (a name or folder that `load` takes) on `text` and save the best step in the new folder `out`.

    dense: the model that it was made from, from whose distributions it learns as `distillation` says (by default from nothing
    else); without one it learns the next token. The loss on `HELD_OUT` sequences of the corpus' validation split chooses the
    step, the untrained model included. An interrupted run leaves its state beside `out` and goes on from there when it is
    started again. Returns {"step", "steps", "before", "after"}, the last two the loss on the held-out sequences in nats a
    token: the divergence from the dense model, or the next-token loss.

    Raises ValueError, FileExistsError or OSError, before any training, for impossible arguments, a dense model of another
    vocabulary, a sparse model, whose zeros training would fill, the state of another training beside `out`, and a result that
    could not be saved.
    """
    if distillation and not dense:
        raise ValueError("learning from the dense model needs one: give the model that was compressed as `dense`")
    held_text = load_corpus(text.corpus, "validation")
    with reserved(Path(out).expanduser()) as out:
        network, tokenizer = load(model, device, torch_dtype(dtype))
        check_output(out, count(network).bytes)
        check_length(Anatomy(network), text.length)
        _check_trainable(network, model, settings)
        loss, aim = None, None
        if dense:
            teacher, words = load(dense, device, network.dtype)
            if words.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{dense} and {model} have different vocabularies: a model learns from the one it was made of")
            loss = (distillation or Distillation()).loss_from(teacher)
            aim = asdict(distillation or Distillation()) | {"dense": fingerprint(teacher)}
        generator = torch.Generator().manual_seed(text.seed)
        ids = sample_blocks(load_corpus(text.corpus, text.split), tokenizer, text.samples, text.length, generator, text.rule)
        held = sample_blocks(held_text, tokenizer, HELD_OUT, text.length, generator, text.rule)
        state = _state_of(out, {"model": fingerprint(network), "aim": aim})
        found = recover(network, ids, settings, validation=held, progress=Progress(), inplace=True, loss=loss, state=state)
        losses = {row["step"]: row["validation_loss"] for row in found.history}
        row = {"step": found.step, "steps": found.history[-1]["step"], "before": losses[0], "after": losses[found.step]}
        about = text.record() | row | {"settings": settings.record(), "dense": Path(dense).name if dense else None}
        about["distillation"] = asdict(distillation or Distillation()) if dense else None
        _save(found.model, tokenizer, out, locate(model), about)
        state.unlink(missing_ok=True)
        return row


def _check_trainable(network: nn.Module, model: str, settings: LoRA) -> None:
    """Raise ValueError for weights that cannot be trained, or that are not what they were when they have been."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    if zeros > SPARSE:
        raise ValueError(
            f"{zeros:.0%} of the weights of {model} are zeros, which training would fill: heal what a method has made smaller"
        )
    if settings.rank is None and network.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the weights of {model} are in {network.dtype}, too coarse to train them all: give --dtype float32")


def _state_of(out: Path, training: dict) -> Path:
    """The file beside `out` for the state of a training. Raises ValueError where there is that of another one."""
    identity = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()[:12]
    state = out.with_name(f".{out.name}.{identity}.training")
    named = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{12}}\.training")
    if others := [path for path in out.parent.iterdir() if named.fullmatch(path.name) and path != state]:
        raise ValueError(f"{others[0]} is the state of another training into {out}: start that one again, or remove the file")
    return state


def _save(model: nn.Module, tokenizer, out: Path, source: str, healed: dict) -> None:
    """Write the trained model in the form of the one that it was, with the provenance of both."""
    if is_checkpoint(source):
        save(model, tokenizer, out, **read_record(Path(source))["provenance"] | {"healed": healed})
    else:
        export(model, tokenizer, out)
