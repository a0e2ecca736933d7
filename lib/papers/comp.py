"""COMP (Xu et al., arXiv 2501.15255): remove whole blocks first, then FFN neurons, and tune multipliers for those that stay.

The sources at hand state the pipeline (blocks by cosine, a ratio for every remaining block, neurons by a matrix condition, mask
tuning by least squares, a bound on the variance of the mask), but no formula of the metric, no bound and no settings. What is
filled in here is *our COMP reading*; every choice is a field of `Settings`, with its alternatives.

`make_plan` decides blocks and quotas from a handful of numbers. After that everything happens block by block: `prune_block` sees
one block and its calibration batches, and hands back which neurons stay and their multipliers. Nothing grows with depth.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import nn

from lib.papers.mask_tuning import LARGEST, METRICS, SEQUENTIAL, Sums, System, removals
from lib.primitives.anatomy import Anatomy, Family
from lib.primitives.calibration import ResidualStream, resident
from lib.primitives.layer_importance import check_score, layer_scores, lowest
from lib.primitives.structured import cut_neurons, describe, ffn_widths, globally, remove_blocks, unit_params
from lib.primitives.surgery import shell

CHOICES = {
    "selection": ("one-shot", "iterative"),
    "allocation": ("importance", "uniform", "global"),
    "reference": ("residual", "teacher", "same input"),
    "metric": tuple(METRICS),
}


@dataclass(frozen=True)
class Settings:
    """Every choice that the sources leave open. The defaults are our COMP reading; the rest are the ablations."""

    # blocks
    layer_score: str = "mean cosine"  # or: pooled cosine, relative change
    selection: str = "one-shot"  # or: iterative, scored anew after each removal
    protect_ends: bool = True  # the first and the last block stay
    rho: float = 0.5  # share of the ratio that whole blocks should pay; 1: whole blocks only
    # how many neurons each block loses
    allocation: str = "importance"  # r ~ exp(-alpha z); or: uniform, global
    alpha: float = 0.2
    largest_cut: float = 0.8  # of one block's neurons
    multiple: int = 1  # widths change in steps of so many neurons
    equal_widths: bool = False  # all blocks equally wide, so that the result is a stock model; quotas are then fixed
    # which neurons, and their multipliers
    metric: str = SEQUENTIAL
    gamma: float = 1.0  # of C2
    epsilon: float = 0.01  # ridge of the multipliers, relative to H_ii
    tune: bool = True
    variance_bound: float = 0.1
    checks: int = 8  # of the variance, per block
    reference: str = "residual"  # teacher's output with the residual's error repaired; or: teacher, same input
    drop_first: bool = True  # leave each sequence's first token, whose activations are massive, out of the sums
    sweeps: int = 4
    precision: torch.dtype = torch.float64  # of the n x n matrices
    seed: int = 0  # of the random control

    def __post_init__(self):
        check_score(self.layer_score)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if not 0 <= self.rho <= 1 or not 0 < self.largest_cut < 1:
            raise ValueError(f"rho is a share in [0, 1] and largest_cut one in (0, 1), not {self.rho} and {self.largest_cut}")
        if not self.epsilon > 0 or not self.variance_bound > 0:
            raise ValueError("epsilon and variance_bound must be positive; variance_bound=math.inf switches the check off")
        if min(self.multiple, self.checks, self.sweeps) < 1:
            raise ValueError("multiple, checks and sweeps count from 1")


# --- the budget -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the budget needs to know of a model: parameters and neurons of every block, parameters of one neuron of each."""

    params: list[int]
    widths: list[int]
    neuron: list[int]


def shape_of(model: nn.Module) -> Shape:
    """The `Shape` of a model; meta tensors do."""
    anatomy = Anatomy(model)
    params = [sum(p.numel() for p in block.parameters()) for block in anatomy.blocks]
    return Shape(params, ffn_widths(model), [unit_params(block, anatomy.family.mlp) for block in anatomy.blocks])


@dataclass(frozen=True)
class Plan:
    """Blocks that go, and for each block that stays the number of neurons it should lose."""

    drop: list[int]
    quotas: list[int]


def blocks_to_drop(ratio: float, blocks: int, rho: float) -> int:
    """⌊rho ratio L⌋ in exact arithmetic; whole blocks only (rho = 1): ratio L to the nearest block."""
    exact = Fraction(ratio).limit_denominator(10**6) * blocks
    return round(exact) if rho == 1 else math.floor(exact * Fraction(rho).limit_denominator(10**6))


def neurons_to_cut(shape: Shape, drop: Sequence[int], ratio: float, settings: Settings) -> int:
    """Neurons that the remaining blocks must lose together, so that `ratio` of all blocks' parameters is gone.

    None where whole blocks alone are asked for. Raises ValueError for a ratio that neurons cannot pay.
    """
    if settings.rho == 1:
        return 0
    left = [i for i in range(len(shape.params)) if i not in set(drop)]
    owed = ratio * sum(shape.params) - sum(shape.params[i] for i in drop)
    total = max(0, round(owed / (sum(shape.neuron[i] for i in left) / len(left))))
    room = sum(most(shape.widths[i], settings) for i in left)
    if total > room:
        raise ValueError(
            f"removing {ratio:.0%} of the blocks' parameters takes {total} neurons beyond {len(drop)} whole blocks, but at most "
            f"{room} may go at largest_cut={settings.largest_cut}: lower the ratio, or raise rho or largest_cut"
        )
    return total


def most(width: int, settings: Settings) -> int:
    """Neurons that a block may lose: its largest cut, a whole number of steps, and never its last neuron."""
    room = min(math.floor(settings.largest_cut * width), width - 1)
    return room - room % settings.multiple


def layer_ratios(scores: Sequence[float], mean: float, alpha: float = 0.2, largest: float = 0.8) -> list[float]:
    """r_l = min(c exp(-alpha z_l), largest) with the given mean, z the standardised logarithm of the blocks' importance.

    c is found by bisection, so what the limit cuts off goes to the others. Raises ValueError if the mean is beyond the limit.
    """
    if not 0 <= mean <= largest:
        raise ValueError(f"blocks cannot lose {mean:.0%} of their neurons on average where {largest:.0%} is the most")
    logs = torch.tensor(list(scores), dtype=torch.float64).clamp(min=1e-12).log()
    spread = logs.std(correction=0)
    z = (logs - logs.mean()) / spread if spread > 1e-12 else torch.zeros_like(logs)
    shape = (-alpha * z).exp()
    low, high = 0.0, largest / float(shape.min()) + 1  # at `high` every block is at the limit
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * shape).clamp(max=largest).mean()) < mean else (low, middle)
    return (high * shape).clamp(max=largest).tolist()


def quotas_from(ratios: Sequence[float], widths: Sequence[int], total: int, settings: Settings) -> list[int]:
    """Whole numbers near ratios x widths that add up to `total`, each a multiple of the step and within what a block may lose.

    Rounded down, then the largest remainders get one step more. The sum is `total` to within half a step.
    """
    step = settings.multiple
    limits = [most(n, settings) for n in widths]
    if settings.equal_widths:
        each = min(round(total / len(widths) / step) * step, min(limits))
        return [each] * len(widths)
    wished = [r * n for r, n in zip(ratios, widths, strict=True)]
    quotas = [min(int(w / step) * step, limit) for w, limit in zip(wished, limits, strict=True)]
    while total - sum(quotas) >= (step + 1) / 2:
        free = [i for i in range(len(quotas)) if quotas[i] + step <= limits[i]]
        if not free:
            break
        quotas[max(free, key=lambda i: wished[i] - quotas[i])] += step
    return quotas


def make_plan(shape: Shape, scores: Sequence[float], drop: Sequence[int], ratio: float, settings: Settings) -> Plan:
    """Quotas for the blocks outside `drop`, from the importance of all blocks: allocation `importance` or `uniform`."""
    left = [i for i in range(len(shape.params)) if i not in set(drop)]
    widths = [shape.widths[i] for i in left]
    total = neurons_to_cut(shape, drop, ratio, settings)
    alpha = 0.0 if settings.allocation == "uniform" else settings.alpha
    mean = min(total / sum(widths), settings.largest_cut)
    ratios = layer_ratios([scores[i] for i in left], mean, alpha, settings.largest_cut)
    return Plan(sorted(drop), quotas_from(ratios, widths, total, settings))


def protected(blocks: int, settings: Settings) -> tuple[int, ...]:
    return (0, blocks - 1) if settings.protect_ends else ()


def choose_blocks(
    model: nn.Module, ids: torch.Tensor, scores: list[float], ratio: float, settings: Settings, mask=None, batch: int = 8
) -> list[int]:
    """The sorted blocks that go, by the importance of all blocks in the dense model."""
    ends = protected(len(scores), settings)
    count = blocks_to_drop(ratio, len(scores), settings.rho)
    if settings.selection == "one-shot" or count < 2:
        return lowest(scores, count, ends)
    lowest(scores, count, ends)  # raises where so many cannot go
    left, current = list(range(len(scores))), shell(model)
    for _ in range(count):
        now = layer_scores(current, ids, settings.layer_score, mask=mask, batch=batch)
        [worst] = lowest(now, 1, tuple(i for i, block in enumerate(left) if block in ends))
        left.pop(worst)
        remove_blocks(current, [worst], inplace=True)
    return [i for i in range(len(scores)) if i not in left]


# --- one block ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One batch of a block's calibration: what enters it in the pruned model, and what the dense model makes of its own.

    hidden: [b, t, d], with the block's keyword arguments; real: bool [b, t], the tokens that count; output: [b, t, d], the
    dense block's output on the dense model's stream; ffn: [b, t, d], that of its FFN alone. None where no teacher runs.
    """

    hidden: torch.Tensor
    kwargs: dict
    real: torch.Tensor
    output: torch.Tensor | None = None
    ffn: torch.Tensor | None = None


@torch.no_grad()
def run_block(block: nn.Module, family: Family, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, ...]:
    """Output [b, t, d] of a block, the activations [b, t, n] that enter its FFN's writer, and what that puts out [b, t, d]."""
    seen = {}

    def see(_, inputs, output):
        seen["x"], seen["y"] = inputs[0], output

    handle = block.get_submodule(family.mlp.writer).register_forward_hook(see)
    try:
        output = block(hidden, **kwargs)
    finally:
        handle.remove()
    rows = hidden.shape[:2]  # OPT flattens batch and tokens before its FFN
    return output, seen["x"].reshape(*rows, -1), seen["y"].reshape(*rows, -1)


@torch.no_grad()
def block_system(block: nn.Module, family: Family, batches: Iterable[Batch], settings: Settings) -> System:
    """The least-squares system of one block's neurons, from its calibration batches.

    The wanted output is Y_T + R_T - R_S (`residual`), Y_T (`teacher`), or what the block itself puts out (`same input`): T is
    the dense model on its own stream, S the pruned one, Y the FFN's output, R the residual that it is added to.
    """
    sums = Sums(block.get_submodule(family.mlp.writer).weight.T, settings.precision)
    for batch in batches:
        output, x, y = run_block(block, family, batch.hidden, batch.kwargs)
        beyond = None
        if settings.reference == "residual":  # Y_T + R_T is the dense block's output, Y + R_S the pruned prefix's
            beyond = (batch.output - output)[batch.real]
        elif settings.reference == "teacher":
            beyond = (batch.ffn - y)[batch.real]
        sums.add(x[batch.real], beyond)
    return sums.system(keep_gram=settings.metric == "C1-G")


@dataclass
class Pruned:
    """What became of one block: `keep` and `scale` go to `lib.primitives.structured.cut_neurons`, the rest to the log."""

    keep: torch.Tensor  # sorted indices of the neurons that stay
    scale: torch.Tensor | None  # their multipliers [kept]; None: all are 1
    removed: int
    variance: float = 0.0
    largest: float = 1.0  # |multiplier|
    error: float = 0.0  # relative squared error of the FFN's output on the calibration tokens
    untuned: float = 0.0  # the same with multipliers 1


def prune_system(system: System, quota: int, settings: Settings, epsilon: float, bound: float) -> Pruned:
    """Remove up to `quota` neurons of a block; the most at which the variance of the multipliers is within `bound` count.

    The variance and the largest multiplier are checked `settings.checks` times on the way. A violation does not end the walk:
    what the wanted output asks of a weak neuron can lift the variance, and goes when the neuron goes. A block whose neurons
    put out nothing loses them by index, with a warning and without tuning.
    """
    n = len(system.h)
    if not system.h.trace() > 0:
        warnings.warn("an FFN puts out nothing on the calibration tokens: its neurons go in order, untuned", stacklevel=2)
        return Pruned(torch.arange(quota, n), None, quota)
    if not settings.tune:
        bound = math.inf
    order = None
    if METRICS[settings.metric] is not None:
        score = METRICS[settings.metric](system, epsilon=epsilon, gamma=settings.gamma, seed=settings.seed)
        order = score.argsort(stable=True).tolist()
    step = -(-max(1, quota // settings.checks) // settings.multiple) * settings.multiple
    if not settings.tune and order is not None:  # no multiplier is asked for: nothing to solve
        return _finish(system, order[:quota], torch.ones_like(system.drift), settings)
    steps, m = _start(system, epsilon, order, bound) if settings.tune else _removals(system, epsilon, order)
    gone, accepted = [], (0, m.clone())
    stays = torch.ones(n, dtype=torch.bool, device=m.device)
    while len(gone) < quota:
        neuron, m = next(steps)
        gone.append(neuron)
        stays[neuron] = False
        checked = len(gone) % step == 0 or len(gone) == quota
        if checked and (bound == math.inf or _calm(m[stays], bound)):  # without a bound the quota must be met
            accepted = (len(gone), m.clone())
    return _finish(system, gone[: accepted[0]], accepted[1], settings)


def _removals(system: System, epsilon: float, order: Sequence[int] | None) -> tuple[Iterator, torch.Tensor]:
    """The walk of `removals`, and the multipliers before its first removal."""
    steps = removals(system, epsilon, order)
    return steps, next(steps)[1]


def _start(system: System, epsilon: float, order: Sequence[int] | None, bound: float) -> tuple[Iterator, torch.Tensor]:
    """The walk under the first of ε, 10ε, 100ε, ... at which the multipliers are within bounds before anything is removed.

    Where the reference differs from what the block puts out, repairing the difference alone moves the multipliers, deep in a
    model far beyond the bound. Fewer removals would not mend that; a larger ridge does, and lets the check see the cut alone.
    """
    steps, m = _removals(system, epsilon, order)
    for _ in range(8):
        if _calm(m, bound):
            break
        epsilon *= 10
        del steps  # and its matrix, before there is another one
        steps, m = _removals(system, epsilon, order)
    return steps, m


def _calm(m: torch.Tensor, bound: float) -> bool:
    """Whether the multipliers of kept neurons are finite, at most `LARGEST` in size and of a variance within the bound."""
    return bool(torch.isfinite(m).all()) and float(m.var(correction=0)) <= bound and float(m.abs().max()) <= LARGEST


def _finish(system: System, gone: list[int], m: torch.Tensor, settings: Settings) -> Pruned:
    """Accept the multipliers, or fall back to 1 where they are not finite, too large or no better than none."""
    stays = torch.ones(len(m), dtype=torch.bool, device=m.device)
    stays[gone] = False
    plain = stays.to(m)
    untuned, scale = system.error(plain), None
    if settings.tune and not (m[stays] == 1).all():
        full = m * plain
        sound = bool(torch.isfinite(full).all()) and float(full.abs().max()) <= LARGEST
        if sound and system.loss(full) <= system.loss(plain):
            scale = m[stays].clone()
        else:
            reason = "exceed 10 or are not finite" if not sound else "raise the loss"
            warnings.warn(f"tuned multipliers of an FFN {reason}: its neurons keep the multiplier 1", stacklevel=3)
    keep = stays.nonzero()[:, 0]
    if scale is None:
        return Pruned(keep, None, len(gone), error=untuned, untuned=untuned)
    error, largest = system.error(m * plain), float(scale.abs().max())
    return Pruned(keep, scale, len(gone), float(scale.var(correction=0)), largest, error, untuned)


def prune_block(
    block: nn.Module,
    family: Family,
    batches: Iterable[Batch],
    quota: int,
    settings: Settings,
    epsilon: float | None = None,
    bound: float | None = None,
) -> Pruned:
    """Which neurons of one block stay, and their multipliers. The block itself is not changed.

    batches: the block's calibration, read once. epsilon and bound: those of the sweep, by default those of the settings. Holds
    two n x n matrices, whatever the number of tokens and blocks.
    """
    epsilon, bound = epsilon or settings.epsilon, settings.variance_bound if bound is None else bound
    if quota == 0 and (settings.reference == "same input" or not settings.tune):
        return Pruned(torch.arange(block.get_submodule(family.mlp.writer).in_features), None, 0)
    return prune_system(block_system(block, family, batches, settings), quota, settings, epsilon, bound)


# --- all blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """What one sweep asks of one block."""

    quota: int
    epsilon: float
    bound: float


@dataclass
class Sweep:
    """One walk over the blocks: what each is asked for, and what those before could not pay.

    `ask(i)` before a block and `paid(result)` after it, in order. A shortfall is spread evenly over the blocks to come.
    """

    demands: list[Demand]
    room: list[int]  # neurons that each block may lose
    step: int = 1
    results: list[Pruned] = field(default_factory=list)

    def ask(self, i: int) -> Demand:
        share = -(-self.short // (len(self.demands) - i)) if self.short > 0 else 0
        share = -(-share // self.step) * self.step
        return replace(self.demands[i], quota=min(self.demands[i].quota + share, self.room[i]))

    def paid(self, result: Pruned) -> None:
        self.results.append(result)

    @property
    def short(self) -> int:
        """Neurons that the blocks so far were to lose and have not."""
        done = len(self.results)
        return sum(d.quota for d in self.demands[:done]) - sum(r.removed for r in self.results)


def first_sweep(plan: Plan, widths: Sequence[int], settings: Settings) -> Sweep:
    """Quotas as planned. The variance is not checked where widths must stay equal, nor in a sweep that is also the last."""
    bound = math.inf if settings.equal_widths or settings.sweeps == 1 else settings.variance_bound
    demands = [Demand(quota, settings.epsilon, bound) for quota in plan.quotas]
    return Sweep(demands, [most(n, settings) for n in widths], settings.multiple)


def next_sweep(last: Sweep, number: int, settings: Settings) -> Sweep | None:
    """The sweep after one that came short (None: it did not): ten times the ridge, twice the variance; the last has no bound.

    The calmer half of the blocks (by the variance reached) is asked for the shortfall; if it has no room, the others are too.
    """
    if last.short <= 0:
        return None
    quotas = [result.removed for result in last.results]
    calm = sorted(range(len(quotas)), key=lambda i: last.results[i].variance)
    for asked in (calm[: -(-len(calm) // 2)], calm):
        short = last.short + sum(r.removed for r in last.results) - sum(quotas)
        while short > 0:
            free = [i for i in asked if quotas[i] + last.step <= last.room[i]]
            if not free:
                break
            for i in free[: -(-short // last.step)]:
                quotas[i] += last.step
                short -= last.step
    final = number == settings.sweeps - 1
    before = [result.removed for result in last.results]
    demands = [
        Demand(quota, d.epsilon * 10, math.inf if final else d.bound * 2)
        if quota > old or final
        else Demand(quota, d.epsilon, d.bound)
        for quota, old, d in zip(quotas, before, last.demands, strict=True)
    ]
    return Sweep(demands, last.room, last.step)


@dataclass
class Report:
    """What was decided and what came of it: importance of every block, blocks removed, one result per block that stays."""

    scores: list[float]
    plan: Plan
    results: list[Pruned]
    sweeps: int

    def rows(self) -> list[dict]:
        """One row per block of the dense model."""
        left = iter(self.results)
        rows = []
        for i, score in enumerate(self.scores):
            row = {"block": i, "importance": score, "removed": i in self.plan.drop}
            if not row["removed"]:
                r = next(left)
                row |= {"neurons": r.removed, "cut": r.removed / (r.removed + len(r.keep)), "variance": r.variance}
                row |= {"largest": r.largest, "error": r.error, "untuned": r.untuned}
            rows.append(row)
        return rows


def check(model: nn.Module, ratio: float, settings: Settings) -> None:
    """Raise ValueError for a ratio that cannot be met, or a model whose wanted output is not known."""
    if Anatomy(model).family.mlp.output_norm and settings.reference != "same input":
        raise ValueError("this family normalises what its FFN puts out before adding it: use reference='same input'")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), not {ratio}: 0.2 removes a fifth of the blocks' parameters")
    shape = shape_of(model)
    count = blocks_to_drop(ratio, len(shape.params), settings.rho)
    ends = protected(len(shape.params), settings)
    middle = [i for i in range(len(shape.params)) if i not in ends]
    lowest([0.0] * len(shape.params), count, ends)
    neurons_to_cut(shape, middle[:count], ratio, settings)


def decide(
    model: nn.Module, ids: torch.Tensor, scores: list[float], ratio: float, settings: Settings, mask=None, batch: int = 8
) -> Plan:
    """The plan for a ratio, from the importance of every block (`layer_scores`)."""
    drop = choose_blocks(model, ids, scores, ratio, settings, mask, batch)
    plan = make_plan(shape_of(model), scores, drop, ratio, settings)
    if settings.allocation == "global":
        plan = replace(plan, quotas=_global_quotas(model, ids, plan, settings, mask, batch))
    return plan


@torch.no_grad()
def prune(
    model: nn.Module,
    ids: torch.Tensor,
    ratio: float,
    settings: Settings | None = None,
    *,
    mask: torch.Tensor | None = None,
    batch: int = 8,
    progress=None,
) -> tuple[nn.Module, Report]:
    """A model with about `ratio` of its blocks' parameters removed by COMP, and a report. The given model stays intact.

    ids: calibration tokens [samples, length]; mask: 1 for real tokens (None: all). ratio: removed share of the parameters of
    all decoder blocks, met to within one neuron (or `settings.multiple`); with rho = 1, to the nearest block. Raises
    ValueError, before any long work, for a ratio that cannot be met and for ids, weights or families that cannot be used.
    """
    settings = settings or Settings()
    check(model, ratio, settings)
    scores = layer_scores(model, ids, settings.layer_score, mask=mask, batch=batch)
    return _prune(model, ids, scores, ratio, settings, mask, batch, progress)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings | None = None,
    *,
    mask: torch.Tensor | None = None,
    batch: int = 8,
    progress=None,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, what `prune` makes of the model) for every ratio; the importance of the blocks is measured once.

    Arguments are those of `prune`, and so are the errors: all ratios are checked before any long work.
    """
    settings = settings or Settings()
    for ratio in ratios:
        check(model, ratio, settings)

    def run() -> Iterator[tuple[float, nn.Module]]:
        scores = layer_scores(model, ids, settings.layer_score, mask=mask, batch=batch)
        for ratio in ratios:
            yield ratio, _prune(model, ids, scores, ratio, settings, mask, batch, progress)[0]

    return run()


@torch.no_grad()
def _prune(model, ids, scores: list[float], ratio: float, settings: Settings, mask, batch, progress) -> tuple[nn.Module, Report]:
    """`prune` with known importance of the blocks."""
    plan = decide(model, ids, scores, ratio, settings, mask, batch)
    left = [n for i, n in enumerate(ffn_widths(model)) if i not in plan.drop]
    if not plan.drop and not sum(plan.quotas):
        return shell(model), Report(scores, plan, [Pruned(torch.arange(n), None, 0) for n in left], 0)
    turn, number = first_sweep(plan, left, settings), 0
    while True:
        walk = Walk(model, ids, plan, turn, settings, mask, batch)
        for i in range(len(left)):
            walk.approach(i)
            walk.step(i)
            if progress:
                progress(f"pruned block {i + 1} of {len(left)}")
        following = next_sweep(turn, number + 1, settings) if number + 1 < settings.sweeps else None
        if following is None:
            return describe(walk.small), Report(scores, plan, turn.results, number + 1)
        turn, number = following, number + 1


class Walk:
    """One sweep over the blocks: a copy of the dense model that is pruned in place, its stream, and the dense model's.

    `approach(i)` and `step(i)` for every block of `small` in order. One block is needed in memory at a time.
    """

    def __init__(
        self, model: nn.Module, ids, plan: Plan, sweep: Sweep, settings: Settings, mask=None, batch: int = 8,
        stream_of=ResidualStream,
    ):  # fmt: skip
        self.small = remove_blocks(model, plan.drop) if plan.drop else shell(model)
        self.sweep, self.settings = sweep, settings
        self.student = stream_of(self.small, ids, mask, batch)
        self.teacher = None if settings.reference == "same input" else stream_of(model, ids, mask, batch)
        self.kept = [i for i in range(len(Anatomy(model).blocks)) if i not in plan.drop]

    def approach(self, i: int) -> None:
        """Bring the dense model's stream through the removed blocks in front of block i."""
        if self.teacher:
            for skipped in range(self.kept[i - 1] + 1 if i else 0, self.kept[i]):
                self.teacher.advance_block(skipped)

    def step(self, i: int) -> None:
        """Prune block i, where both streams stand in front of it, and move them behind it."""
        student, teacher, dense = self.student, self.teacher, self.kept[i]
        demand, block = self.sweep.ask(i), student.anatomy.blocks[i]
        with resident(block, *([teacher.anatomy.blocks[dense]] if teacher else [])):
            batches = _batches(student, i, teacher, dense, self.settings)
            family = student.anatomy.family
            result = prune_block(block, family, batches, demand.quota, self.settings, demand.epsilon, demand.bound)
            for _ in batches:  # the teacher moves on even where nothing was asked
                pass
        self.sweep.paid(result)
        cut_result(student.anatomy, block, result)
        student.advance_block(i)


def cut_result(anatomy: Anatomy, block: nn.Module, result: Pruned) -> None:
    """Make a block what was decided for it."""
    if result.removed or result.scale is not None:
        cut_neurons(anatomy, block, result.keep, result.scale)


def _batches(student: ResidualStream, i: int, teacher: ResidualStream | None, dense: int, settings: Settings) -> Iterator[Batch]:
    """The calibration of block i of the pruned model, block `dense` of the teacher, which moves on batch by batch."""
    for rows in student._slices():
        real = counted(student.ids[rows], None if student.mask is None else student.mask[rows], settings.drop_first)
        batch = Batch(student.hidden[rows], student._block_kwargs(rows, i), real.to(student.device))
        if teacher:
            block, kwargs = teacher.anatomy.blocks[dense], teacher._block_kwargs(rows, dense)
            batch.output, _, batch.ffn = run_block(block, teacher.anatomy.family, teacher.hidden[rows], kwargs)
            teacher.hidden[rows] = batch.output
        yield batch


def counted(ids: torch.Tensor, mask: torch.Tensor | None, drop_first: bool) -> torch.Tensor:
    """Which tokens [samples, length] count: the real ones without each sequence's first, unless it has no other."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().clone()
    if drop_first:
        first = real.to(torch.int64).argmax(1)
        longer = (real.sum(1) > 1).nonzero()[:, 0]
        real[longer, first[longer]] = False
    return real


def _global_quotas(model, ids, plan, settings, mask, batch) -> list[int]:
    """Quotas by one threshold over all blocks' scores, each divided by the norm of its FFN's output; one pass, dense model."""
    small = remove_blocks(model, plan.drop) if plan.drop else shell(model)
    stream, alone = ResidualStream(small, ids, mask, batch), replace(settings, reference="same input")
    rank = METRICS[settings.metric] or METRICS["C1 once"]
    scores = []
    for i, block in enumerate(stream.anatomy.blocks):
        system = block_system(block, stream.anatomy.family, _batches(stream, i, None, i, alone), alone)
        found = rank(system, epsilon=settings.epsilon, gamma=settings.gamma, seed=settings.seed)
        scores.append(found / max(system.wanted, 1e-300) ** 0.5)
        stream.advance_block(i)
    widths, total = ffn_widths(small), sum(plan.quotas)
    least = max(n - most(n, settings) for n in widths)
    keep = globally(scores, Fraction(total, sum(widths)), least)
    wished = [1 - len(stay) / n for stay, n in zip(keep, widths, strict=True)]
    return quotas_from(wished, widths, total, settings)
