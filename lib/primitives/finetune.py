"""Recovery fine-tuning: train low-rank adapters (LoRA) on a compressed model and merge them into its weights.

A linear layer y = W x becomes y = W x + (α/r) B A x with W frozen, A [r, in] random and B [out, r] zero, so training
starts at the compressed model. Afterwards W + (α/r) B A is one matrix of the old shape: the model is no larger than before.
SliceGPT trains all linear layers of the blocks at once; SVD-LLM its left factors, then its right ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import check_calibration
from lib.primitives.checks import COUNTS, FROM_ZERO, check_settings
from lib.primitives.losses import mean_loss
from lib.primitives.surgery import parameter, shell

MAX_NORM = 1.0  # of the gradient; default of the trainer that the released script of SliceGPT uses


@dataclass(frozen=True)
class LoRA:
    """Settings of one recovery run; the defaults are those published for SliceGPT. Raises ValueError for impossible ones."""

    rank: int = 32  # paper
    alpha: float = 10  # paper; the adapters are scaled by alpha / rank
    dropout: float = 0.05  # README of the released code; on the input of the adapters
    lr: float = 2e-4  # this line and the next two: defaults of the released script
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 400  # steps of linear warm-up; default of the released script
    steps: int | None = None  # None: one pass over the ids, as the released script
    batch: int = 3  # sequences a step; README of the released code
    evaluate_every: int = 16  # steps; README of the released code
    patience: int = 5  # evaluations in a row without a better validation loss; default of the released script
    gradient_checkpointing: bool = True  # released script: compute each block twice, keep only its input
    seed: int = 0  # ours

    def __post_init__(self):
        counts = dict.fromkeys(("rank", "steps", "batch", "evaluate_every", "patience"), COUNTS)
        not_negative = dict.fromkeys(("weight_decay", "warmup", "seed"), FROM_ZERO)
        check_settings(self, alpha="(0, inf)", lr="(0, inf)", dropout="[0, 1)", betas="[0, 1)", **counts, **not_negative)

    def planned_steps(self, samples: int) -> int:
        """Steps of a run over `samples` sequences. Raises ValueError if the warm-up would not end within them."""
        steps = math.ceil(samples / self.batch) if self.steps is None else self.steps
        if self.warmup >= steps:
            raise ValueError(
                f"{self.warmup} warm-up steps do not end within a run of {steps}: give LoRA a smaller warmup (a tenth of the "
                "steps is usual), more steps or more ids"
            )
        return steps

    def record(self) -> dict:
        """The settings in JSON values."""
        return asdict(self) | {"betas": list(self.betas)}


@dataclass(frozen=True)
class Recovered:
    """A recovered model and how it was reached.

    history: one row every `evaluate_every` steps, {step, train_loss: mean since the row before, validation_loss}, losses in
    nats per token, None where there is none. step: the one whose adapters were merged, the best on the validation ids.
    """

    model: nn.Module
    history: list[dict]
    step: int


def recover(
    model: nn.Module,
    ids: torch.Tensor,
    settings: LoRA,
    targets: Sequence[str] | None = None,
    validation: torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    inplace: bool = False,
) -> Recovered:
    """Fine-tune a compressed model on text so that it recovers some of its loss, without growing by a single weight.

    ids, validation: token ids [samples, length], every position real. targets: parts of names, see `linear_layers`; all
    other parameters (norms, embeddings, head, shortcuts) stay as they are. With `validation` the adapters of the lowest
    validation loss are kept, the untrained ones (step 0) included, and training stops after `patience` evaluations in a row
    without a new lowest. The model given is left alone, or gets the merged weights with `inplace`; tensors shared with other
    models are never written to. The result depends on the seed alone, and the caller's random state is not touched.

    Raises ValueError before any work for ids, targets or settings that do not fit the model; later if the loss is not finite.
    Source: SliceGPT, recovery fine-tuning, and its released script.
    """
    names = linear_layers(model, targets)
    for blocks in (ids,) if validation is None else (ids, validation):
        check_calibration(Anatomy(model), blocks)
        if blocks.shape[1] < 2:
            raise ValueError("sequences of 1 token have no next token to predict: use longer ones")
    steps = settings.planned_steps(len(ids))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        adapted = with_adapters(model, names, settings)
        history, step = _train(adapted, ids, settings, steps, validation, progress)
    recovered = (model if inplace else shell(model)).eval()
    merge(adapted, names, recovered)
    return Recovered(recovered, history, step)


def linear_layers(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Names of the linear layers inside the decoder blocks: all of them, or those that a target chooses.

    A target is a dotted part of a name: `q_proj`, `mlp`, `self_attn.o_proj`, or `u` where a layer is factored into `u` and
    `v`. Layers that compute something else than W x + b are left out: an adapter on them could not be merged into W. Raises
    ValueError, with the names there are, for a target that chooses nothing.
    """
    anatomy = Anatomy(model)
    found = {  # full name -> name within its block
        f"{anatomy.family.blocks}.{i}.{name}": name
        for i, block in enumerate(anatomy.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }
    if targets is None:
        return list(found)
    for target in targets:
        if not any(_is_part(target, name) for name in found):
            known = ", ".join(dict.fromkeys(found.values()))
            raise ValueError(f"no linear layer is called {target!r}: this model has {known}")
    if not targets:
        raise ValueError("no targets, nothing to train: leave targets out to train every linear layer of the blocks")
    return [name for name in found if any(_is_part(target, name) for target in targets)]


def _is_part(target: str, name: str) -> bool:
    return f".{target}." in f".{name}."


def with_adapters(model: nn.Module, names: Sequence[str], settings: LoRA) -> nn.Module:
    """A copy of the model for training: new adapters on the layers `names`, everything else frozen and shared in memory.

    Adapters are at least float32, whatever the dtype of the model. A starts random (from torch's global generator), B zero.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
    from peft.functional import cast_adapter_dtype

    # New parameters over the same memory: those of the given model must stay trainable.
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    adapted = copy.deepcopy(model, frozen | {id(buffer): buffer for buffer in model.buffers()})
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(names), bias="none"
    )
    adapted = inject_adapter_in_model(config, adapted)
    cast_adapter_dtype(adapted, "default")  # half precision to float32
    if settings.gradient_checkpointing:
        # Not reentrant, because a sliced block passes its residual from norm to writer outside of the arguments.
        for block in Anatomy(adapted).blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return adapted


@torch.no_grad()
def merge(adapted: nn.Module, names: Sequence[str], into: nn.Module) -> None:
    """Give the layers `names` of `into` the weights W + (α/r) B A of `adapted`, summed in float64 and cast once.

    The weights are new parameters; the adapted layers are dropped one by one, so that no layer is held twice for long.
    """
    for name in names:
        layer, old = adapted.get_submodule(name), into.get_submodule(name).weight
        weight = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
        into.get_submodule(name).weight = parameter(weight, like=old).requires_grad_(old.requires_grad)
        adapted.set_submodule(name, nn.Identity())


def rate(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate at `step` of `steps`: linearly up over `warmup` steps, then down to zero after the last.

    The released code computes its decay for the whole training split and a gradient accumulation that never happens, not for
    the steps that it runs.
    """
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def _train(
    adapted: nn.Module,
    ids: torch.Tensor,
    settings: LoRA,
    steps: int,
    validation: torch.Tensor | None,
    progress: Callable[[str], None] | None,
) -> tuple[list[dict], int]:
    """Train the adapters in place, ending with the best ones; returns the history and the step that they are from."""
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.warmup, steps))
    batches = _batches(ids, settings)
    history, losses = [], []
    best_loss, best_step, best, stale = math.inf, steps, [], 0
    for step in range(steps + 1):
        # 1. Every few steps: note the losses, keep the best adapters, stop without progress.
        due = step % settings.evaluate_every == 0 or step == steps
        if due and (losses or validation is not None):
            row = {"step": step, "train_loss": sum(losses) / len(losses) if losses else None, "validation_loss": None}
            losses = []
            if validation is not None:
                loss = row["validation_loss"] = _mean_loss(adapted, validation, settings.batch)
                _checked(loss, "validation loss", step, settings)
                stale += 1
                if loss < best_loss:
                    best_loss, best_step, best, stale = loss, step, [p.detach().clone() for p in adapters], 0
            history.append(row)
            if progress:
                progress(f"recovery step {step} of {steps}: {_in_words(row)}")
            if step == steps or stale == settings.patience:
                break
        # 2. One step of training.
        adapted.train()
        loss = mean_loss(adapted, next(batches).to(adapters[0].device))
        losses.append(_checked(loss.item(), "loss", step, settings))
        optimizer.zero_grad()
        loss.backward()
        _checked(nn.utils.clip_grad_norm_(adapters, MAX_NORM).item(), "gradient's norm", step, settings)
        optimizer.step()
        schedule.step()
    # 3. Back to the best adapters.
    if best:
        with torch.no_grad():
            for adapter, value in zip(adapters, best, strict=True):
                adapter.copy_(value)
    return history, best_step


def _batches(ids: torch.Tensor, settings: LoRA) -> Iterator[torch.Tensor]:
    """Batches [b, length] without end, in a new order each time the ids are through."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from ids[torch.randperm(len(ids), generator=generator)].split(settings.batch)


@torch.no_grad()
def _mean_loss(adapted: nn.Module, ids: torch.Tensor, batch: int) -> float:
    adapted.eval()
    device = next(adapted.parameters()).device
    return sum(mean_loss(adapted, part.to(device)).item() * len(part) for part in ids.split(batch)) / len(ids)


def _checked(value: float, what: str, step: int, settings: LoRA) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"the {what} is {value} at step {step}: lower the learning rate ({settings.lr:g}), or load the model in float32 or "
            "bfloat16 if it is in float16"
        )
    return value


def _in_words(row: dict) -> str:
    losses = {"training": row["train_loss"], "validation": row["validation_loss"]}
    return ", ".join(f"{name} loss {value:.3f}" for name, value in losses.items() if value is not None) or "start"
