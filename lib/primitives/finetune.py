"""Recovery fine-tuning: train a compressed model, by low-rank adapters (LoRA) that are merged into its weights or as a whole.

A linear layer y = W x becomes y = W x + (α/r) B A x with W frozen, A [r, in] random and B [out, r] zero, so training
starts at the compressed model. Afterwards W + (α/r) B A is one matrix of the old shape: the model is no larger than before.
SliceGPT trains all linear layers of the blocks at once; SVD-LLM its left factors, then its right ones. What is minimised is the
next-token loss, or the distance from the dense model (`lib.primitives.distillation`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

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

    rank: int | None = 32  # paper; None: no adapters, the layers' own weights are trained
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
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    state: Path | None = None,
) -> Recovered:
    """Fine-tune a compressed model on text so that it recovers some of its loss, without growing by a single weight.

    ids, validation: token ids [samples, length], every position real. targets: parts of names, see `linear_layers`; all
    other parameters (norms, embeddings, head, shortcuts) stay as they are. With `validation` the adapters of the lowest
    validation loss are kept, the untrained ones (step 0) included, and training stops after `patience` evaluations in a row
    without a new lowest. The model given is left alone, or gets the merged weights with `inplace`; tensors shared with other
    models are never written to. The result depends on the seed alone, and the caller's random state is not touched.

    loss: of the model on ids [b, length], a scalar; None: the mean next-token loss. state: a file in which the run notes where it
    is at every evaluation; a run that finds one goes on from there, with the same result. It stays for whoever gave it to
    remove, once the recovered model is safe.

    Raises ValueError before any work for ids, targets or settings that do not fit the model, and for a state of another run;
    later if the loss is not finite.
    Source: SliceGPT, recovery fine-tuning, and its released script.
    """
    names = linear_layers(model, targets)
    for blocks in (ids,) if validation is None else (ids, validation):
        check_calibration(Anatomy(model), blocks)
        if blocks.shape[1] < 2:
            raise ValueError("sequences of 1 token have no next token to predict: use longer ones")
    steps = settings.planned_steps(len(ids))
    if settings.rank is None and model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights in {model.dtype} are too coarse to be trained: load the model in float32, or give LoRA a rank")
    run = Training(settings, steps, loss or mean_loss, state, progress)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        adapted = with_adapters(model, names, settings)
        history, step = run.train(adapted, ids, validation)
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
    Without a rank the layers have new weights instead, equal to the old ones, which can be trained.
    """
    # New parameters over the same memory: those of the given model must stay trainable.
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    adapted = copy.deepcopy(model, frozen | {id(buffer): buffer for buffer in model.buffers()})
    if settings.rank is None:
        for name in names:
            layer = adapted.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        adapted = _with_low_rank(adapted, names, settings)
    if settings.gradient_checkpointing:
        # Not reentrant, because a sliced block passes its residual from norm to writer outside of the arguments.
        for block in Anatomy(adapted).blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return adapted


def _with_low_rank(model: nn.Module, names: Sequence[str], settings: LoRA) -> nn.Module:
    """The model itself with adapters on the layers `names`."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
    from peft.functional import cast_adapter_dtype

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(names), bias="none"
    )
    adapted = inject_adapter_in_model(config, model)
    cast_adapter_dtype(adapted, "default")  # half precision to float32
    return adapted


@torch.no_grad()
def merge(adapted: nn.Module, names: Sequence[str], into: nn.Module) -> None:
    """Give the layers `names` of `into` the weights W + (α/r) B A of `adapted`, summed in float64 and cast once, or its own.

    The weights are new parameters; the adapted layers are dropped one by one, so that no layer is held twice for long.
    """
    for name in names:
        layer, old = adapted.get_submodule(name), into.get_submodule(name).weight
        weight = layer.weight
        if hasattr(layer, "get_delta_weight"):
            weight = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
        into.get_submodule(name).weight = parameter(weight, like=old).requires_grad_(old.requires_grad)
        adapted.set_submodule(name, nn.Identity())


def rate(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate at `step` of `steps`: linearly up over `warmup` steps, then down to zero after the last.

    The released code computes its decay for the whole training split and a gradient accumulation that never happens, not for
    the steps that it runs.
    """
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


@dataclass
class Training:
    """One run over `steps` steps: what it minimises, where it notes how far it is, and what it has reached so far."""

    settings: LoRA
    steps: int
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    state: Path | None = None
    progress: Callable[[str], None] | None = None
    history: list[dict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last row of the history
    best_loss: float = math.inf
    best_step: int | None = None
    best: list[torch.Tensor] = field(default_factory=list)
    stale: int = 0  # evaluations since the best one

    def train(self, adapted: nn.Module, ids: torch.Tensor, validation: torch.Tensor | None) -> tuple[list[dict], int]:
        """Train the adapters in place, ending with the best ones; returns the history and the step that they are from."""
        settings = self.settings
        adapters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.warmup, self.steps))
        parts = {"optimizer": optimizer, "schedule": schedule}
        begun = self._resume(adapters, parts, ids)
        batches = islice(_batches(ids, settings), begun, None)
        for step in range(begun, self.steps + 1):
            # 1. Every few steps: note the losses, keep the best adapters, stop without progress.
            due = step % settings.evaluate_every == 0 or step == self.steps
            if due and (self.losses or validation is not None) and not (step == begun and self.history):
                self._look(adapted, adapters, validation, step)
            if step == self.steps or self.stale == settings.patience:
                break
            if due and self.state and step > begun:
                self._note(step, adapters, parts, ids)
            # 2. One step of training.
            adapted.train()
            loss = self.loss(adapted, next(batches).to(adapters[0].device))
            self.losses.append(_checked(loss.item(), "loss", step, settings))
            optimizer.zero_grad()
            loss.backward()
            _checked(nn.utils.clip_grad_norm_(adapters, MAX_NORM).item(), "gradient's norm", step, settings)
            optimizer.step()
            schedule.step()
        # 3. Back to the best adapters.
        if self.best:
            _set(adapters, self.best)
        return self.history, self.steps if self.best_step is None else self.best_step

    def _look(self, adapted: nn.Module, adapters: list[nn.Parameter], validation: torch.Tensor | None, step: int) -> None:
        """A row of the history, and the adapters themselves where they are the best so far."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        row, self.losses = {"step": step, "train_loss": mean, "validation_loss": None}, []
        if validation is not None:
            loss = row["validation_loss"] = self._validation_loss(adapted, validation)
            _checked(loss, "validation loss", step, self.settings)
            self.stale += 1
            if loss < self.best_loss:
                self.best_loss, self.best_step, self.stale = loss, step, 0
                self.best = [p.detach().clone() for p in adapters]
        self.history.append(row)
        if self.progress:
            self.progress(f"recovery step {step} of {self.steps}: {_in_words(row)}")

    @torch.no_grad()
    def _validation_loss(self, adapted: nn.Module, ids: torch.Tensor) -> float:
        adapted.eval()
        device = next(adapted.parameters()).device
        parts = ids.split(self.settings.batch)
        return sum(self.loss(adapted, part.to(device)).item() * len(part) for part in parts) / len(ids)

    def _same(self, adapters: list[nn.Parameter], ids: torch.Tensor) -> dict:
        """What must be equal for a run to go on where another stopped."""
        shapes = [tuple(p.shape) for p in adapters]
        return {"settings": self.settings.record(), "steps": self.steps, "shapes": shapes, "ids": ids.cpu()}

    def _note(self, step: int, adapters: list[nn.Parameter], parts: dict, ids: torch.Tensor) -> None:
        """Write where the run is, in one piece: a run that is killed while it writes leaves the last state."""
        reached = {name: getattr(self, name) for name in REACHED}
        saved = {"of": self._same(adapters, ids), "step": step, "reached": reached, "random": torch.get_rng_state()}
        saved |= {"adapters": [p.detach() for p in adapters], **{name: part.state_dict() for name, part in parts.items()}}
        new = self.state.with_name(self.state.name + ".new")
        torch.save(saved, new)
        new.replace(self.state)

    def _resume(self, adapters: list[nn.Parameter], parts: dict, ids: torch.Tensor) -> int:
        """The step at which to begin: that of the state, which is taken over, or 0 without one."""
        if self.state is None or not self.state.exists():
            return 0
        saved, own = torch.load(self.state, weights_only=True), self._same(adapters, ids)
        same_ids = torch.equal(saved["of"].pop("ids"), own.pop("ids"))
        if not same_ids or saved["of"] != own:
            raise ValueError(f"{self.state} is of a run with other text, settings or layers: remove it, or name another file")
        for name, value in saved["reached"].items():
            setattr(self, name, value)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        _set(adapters, saved["adapters"])
        torch.set_rng_state(saved["random"])
        return saved["step"]


REACHED = ("history", "losses", "best_loss", "best_step", "best", "stale")


@torch.no_grad()
def _set(adapters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for adapter, value in zip(adapters, values, strict=True):
        adapter.copy_(value)


def _batches(ids: torch.Tensor, settings: LoRA) -> Iterator[torch.Tensor]:
    """Batches [b, length] without end, in a new order each time the ids are through."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from ids[torch.randperm(len(ids), generator=generator)].split(settings.batch)


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
