"""COMP (Xu et al., arXiv 2501.15255): remove whole blocks first, then FFN neurons, and tune multipliers for those that stay.

The available sources state the pipeline (blocks by cosine, a ratio for every remaining block, neurons by a matrix condition, mask
tuning by least squares, a bound on the variance of the mask), but no formula of the metric, no bound and no settings. What
this file adds is *our COMP reading*; every choice is a field of `Settings`, with its alternatives.

`make_plan` decides blocks and quotas from a handful of numbers. After that everything happens block by block: `prune_block` takes
one block and its calibration batches, and returns which neurons stay and their multipliers. Nothing grows with depth.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from lib.papers.mask_tuning import LARGEST, METRICS, SEQUENTIAL, Sums, System, acceptable, removals
from lib.primitives.anatomy import Anatomy, Family, whole_block
from lib.primitives.calibration import Batch, ResidualStream, resident, run_seeing
from lib.primitives.checks import COUNTS, FROM_ZERO, check_settings, check_share, exact
from lib.primitives.layer_importance import BLOCK_SCORES, Change, layer_scores, lowest, mean_cosine
from lib.primitives.layerwise import Walk, go
from lib.primitives.structured import (
    cut_neurons,
    describe,
    edits_by_number,
    ffn_widths,
    globally,
    remove_blocks,
    remove_neurons,
    unit_params,
)
from lib.primitives.surgery import shape_shell, shell

CHOICES = {
    "layer_score": BLOCK_SCORES,
    "selection": ("one-shot", "iterative"),
    "allocation": ("importance", "uniform", "global"),
    "reference": ("residual", "teacher", "same input"),
    "metric": METRICS,
    "precision": ("float64", "float32"),
}


@dataclass(frozen=True)
class Settings:
    """Every choice that the sources leave open. The defaults are our COMP reading; the rest are the ablations."""

    # blocks
    layer_score: str = "mean cosine"  # or: pooled cosine, relative change
    selection: str = "one-shot"  # or: iterative, scored anew after each removal
    protect_ends: bool = True  # the first and the last block stay
    rho: float | None = None  # share of the ratio that whole blocks should pay; 1: whole blocks only; None: found by trial
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
    variance_bound: float = 0.1  # of the multipliers of a block; infinity switches the check off
    checks: int = 8  # of the variance, per block
    reference: str = "same input"  # the block's own output; or: teacher (the dense model's), residual (and its stream repaired)
    rounds: int = 4
    precision: str = "float64"  # of the n x n matrices; or: float32
    seed: int = 0  # of the random control
    ONLY_WITH: ClassVar = {
        "alpha": ("allocation", ("importance",)), "gamma": ("metric", ("C2",)), "seed": ("metric", ("random",)),
        "variance_bound": ("tune", (True,)), "checks": ("tune", (True,)),
    }  # fmt: skip

    def __post_init__(self):
        check_settings(
            self, **CHOICES, rho="[0, 1]", alpha="[0, 10]", largest_cut="(0, 1)", multiple=COUNTS, gamma="[0, 10]",
            epsilon="(0, 1e+06]", variance_bound="(0, inf]", checks=COUNTS, rounds=COUNTS, seed=FROM_ZERO,
        )  # fmt: skip


# --- the budget -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model for the budget: parameters and neurons of every block, and parameters of one neuron of each."""

    params: list[int]
    widths: list[int]
    neuron: list[int]


def shape_of(model: nn.Module) -> Shape:
    """The `Shape` of a model; meta tensors suffice."""
    anatomy = Anatomy(model)
    params = [sum(p.numel() for p in block.parameters()) for block in anatomy.blocks]
    return Shape(params, ffn_widths(model), [unit_params(block, anatomy.family.mlp) for block in anatomy.blocks])


@dataclass(frozen=True)
class Plan:
    """Blocks that go, and for each block that stays the number of neurons it should lose.

    trials: (number of whole blocks, distance from the dense model) of each, where `rho` was left to them.
    """

    drop: list[int]
    quotas: list[int]
    trials: list[tuple[int, float]] = field(default_factory=list)


def blocks_to_drop(ratio: float, blocks: int, rho: float) -> int:
    """⌊rho ratio L⌋ in exact arithmetic; whole blocks only (rho = 1): ratio L to the nearest block."""
    wanted = exact(ratio) * blocks
    return round(wanted) if rho == 1 else math.floor(wanted * exact(rho))


def neurons_to_cut(shape: Shape, drop: Sequence[int], ratio: float, settings: Settings) -> int:
    """Neurons that the remaining blocks must lose together, so that `ratio` of all blocks' parameters is gone.

    0 if only whole blocks are to go. Raises ValueError for a ratio that the neurons cannot make up.
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
    """Neurons that a block may lose: its largest cut, rounded down to whole steps, and never all of its neurons."""
    room = min(math.floor(settings.largest_cut * width), width - 1)
    return room - room % settings.multiple


def layer_ratios(scores: Sequence[float], mean: float, alpha: float = 0.2, largest: float = 0.8) -> list[float]:
    """r_l = min(c exp(-alpha z_l), largest) with the given mean, z the standardised logarithm of the blocks' importance.

    c is found by bisection, so the other blocks make up for those at the limit. Raises ValueError if the mean is beyond it.
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


def block_counts(model: nn.Module, ratio: float, settings: Settings) -> list[int]:
    """How many whole blocks may go: the number that `rho` says, or all with which neurons can make up the rest; shapes suffice.

    Raises ValueError where neurons cannot, and for blocks that a record of edits names by number.
    """
    shape = shape_of(model)
    free = [i for i in range(len(shape.params)) if i not in protected(len(shape.params), settings)]
    if settings.rho is not None:
        count = blocks_to_drop(ratio, len(shape.params), settings.rho)
        lowest([0.0] * len(free), count)
        neurons_to_cut(shape, free[:count], ratio, settings)
        if count:
            remove_blocks(shape_shell(model), free[:count], inplace=True)
        return [count]
    largest = 0 if edits_by_number(model) else min(math.floor(exact(ratio) * len(shape.params)), len(free))
    counts = []
    for count in range(largest + 1):
        with contextlib.suppress(ValueError):
            neurons_to_cut(shape, free[:count], ratio, settings)
            counts.append(count)
    return counts or [neurons_to_cut(shape, free[:largest], ratio, settings)]  # raises


def choose_blocks(model: nn.Module, ids: torch.Tensor, scores: list[float], count: int, settings: Settings) -> list[int]:
    """The sorted blocks that go, so many of them, by the importance of all blocks in the dense model."""
    ends = protected(len(scores), settings)
    if settings.selection == "one-shot" or count < 2:
        return lowest(scores, count, ends)
    lowest(scores, count, ends)  # raises now if so many cannot go
    left, current = list(range(len(scores))), shell(model)
    for _ in range(count):
        now = layer_scores(current, ids, settings.layer_score)
        [worst] = lowest(now, 1, tuple(i for i, block in enumerate(left) if block in ends))
        left.pop(worst)
        remove_blocks(current, [worst], inplace=True)
    return [i for i in range(len(scores)) if i not in left]


def shape(model: nn.Module, ratio: float, settings: Settings = Settings()) -> nn.Module:
    """The model after a ratio, on the meta device: blocks go first, then neurons, as many from each of the others.

    Where trials find how many blocks go, as few as may: the others have the same parameters to within norms and a neuron.
    """
    found = shape_of(model)
    drop = list(range(block_counts(model, ratio, settings)[0]))
    owed = neurons_to_cut(found, drop, ratio, settings)
    small = remove_blocks(shape_shell(model), drop, inplace=True)
    widths = ffn_widths(small)
    cuts = [owed // len(widths) + (i < owed % len(widths)) for i in range(len(widths))]
    return remove_neurons(small, [torch.arange(n - cut) for n, cut in zip(widths, cuts, strict=True)], inplace=True)


# --- one block ------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A batch in front of a block of the pruned model, with the outputs of the dense model there.

    output: [b, t, d], the dense block's output on the dense model's stream; ffn: [b, t, d], that of its FFN alone. None
    without a teacher.
    """

    batch: Batch
    output: torch.Tensor | None = None
    ffn: torch.Tensor | None = None


@torch.no_grad()
def block_system(
    block: nn.Module, family: Family, pairs: Iterable[Pair], settings: Settings, run: Callable = whole_block
) -> System:
    """The least-squares system of one block's neurons, from its calibration.

    run: the step from the student's stream in `pairs` to the block's output, the FFN alone where attention has been added.
    The wanted output is Y_T + R_T - R_S (`residual`), Y_T (`teacher`), or the block's own output (`same input`): T is
    the dense model on its own stream, S the pruned one, Y the FFN's output, R the residual that it is added to.

    Every token counts alike, the first of a sequence too: in trained models its activations are massive, all later tokens attend
    to it, and the one or two neurons that make them must look as indispensable as they are.
    """
    sums = Sums(block.get_submodule(family.mlp.writer).weight.T, precision=getattr(torch, settings.precision))
    for batch, wanted_output, wanted_ffn in pairs:
        output, x, y = run_seeing(run, block, family, batch, family.mlp.writer)
        beyond = None
        if settings.reference == "residual":  # Y_T + R_T is the dense block's output, Y + R_S the pruned prefix's
            beyond = wanted_output - output
        elif settings.reference == "teacher":
            beyond = wanted_ffn - y
        sums.add(x.flatten(0, 1), None if beyond is None else beyond.flatten(0, 1))
    return sums.system(keep_gram=settings.metric == "C1-G")


@dataclass
class Pruned:
    """The result for one block: `keep` and `scale` go to `lib.primitives.structured.cut_neurons`, the rest to the log."""

    keep: torch.Tensor  # sorted indices of the neurons that stay
    scale: torch.Tensor | None  # their multipliers [kept]; None: all are 1
    removed: int
    variance: float = 0.0
    largest: float = 1.0  # |multiplier|
    error: float = 0.0  # relative squared error of the FFN's output on the calibration tokens
    untuned: float = 0.0  # the same with multipliers 1


def prune_system(system: System, quota: int, settings: Settings, epsilon: float, bound: float) -> Pruned:
    """Remove up to `quota` neurons of a block: as many as leave the variance of the multipliers within `bound`.

    A block whose FFN has no output loses neurons by index, with a warning and without tuning.
    """
    if not system.h.trace() > 0:
        warnings.warn("an FFN puts out nothing on the calibration tokens: its neurons go in order, untuned", stacklevel=2)
        return Pruned(torch.arange(quota, len(system.h)), None, quota)
    order = None  # C1 chooses as it goes
    if METRICS[settings.metric] is not None:
        score = METRICS[settings.metric](system, epsilon=epsilon, gamma=settings.gamma, seed=settings.seed)
        order = score.argsort(stable=True).tolist()
    if settings.tune:
        return _prune_tuned(system, quota, order, settings, epsilon, bound)
    if order is None:
        order = [neuron for neuron, _ in islice(removals(system, epsilon), 1, quota + 1)]
    return _finish(system, order[:quota], torch.ones_like(system.drift), settings)


def _prune_tuned(
    system: System, quota: int, order: Sequence[int] | None, settings: Settings, epsilon: float, bound: float
) -> Pruned:
    """Remove neurons one by one, tuning the others after each, and go back to the last check that passed.

    The variance and the largest multiplier are checked `settings.checks` times on the way. If a check fails, removal continues:
    a weak neuron can receive a large multiplier that raises the variance, and the variance falls again when that neuron is
    removed.
    """
    every = -(-max(1, quota // settings.checks) // settings.multiple) * settings.multiple
    steps, m = _start(system, epsilon, order, bound)
    gone, accepted = [], (0, m.clone())
    stays = torch.ones(len(m), dtype=torch.bool, device=m.device)
    for neuron, m in islice(steps, quota):
        gone.append(neuron)
        stays[neuron] = False
        checked = len(gone) % every == 0 or len(gone) == quota
        if checked and (bound == math.inf or _calm(m[stays], bound)):  # without a bound the quota must be met
            accepted = (len(gone), m.clone())
    return _finish(system, gone[: accepted[0]], accepted[1], settings)


def _removals(system: System, epsilon: float, order: Sequence[int] | None) -> tuple[Iterator, torch.Tensor]:
    """The steps of `removals`, and the multipliers before its first removal."""
    steps = removals(system, epsilon, order)
    return steps, next(steps)[1]


def _start(system: System, epsilon: float, order: Sequence[int] | None, bound: float) -> tuple[Iterator, torch.Tensor]:
    """The removals under the first of ε, 10ε, 100ε, ... at which the multipliers are within bounds before anything is removed.

    Where the reference differs from the block's own output, repairing that difference already moves the multipliers, deep in a
    model far beyond the bound. Fewer removals would not help; a larger ridge does, so that the check judges the cut alone.
    """
    steps, m = _removals(system, epsilon, order)
    for _ in range(8):
        if _calm(m, bound):
            break
        epsilon *= 10
        del steps  # frees its matrix before the next one is made
        steps, m = _removals(system, epsilon, order)
    return steps, m


def _calm(m: torch.Tensor, bound: float) -> bool:
    """Whether the multipliers of kept neurons are finite and at most `LARGEST` in size, with a variance within the bound."""
    return acceptable(m) and float(m.var(correction=0)) <= bound


def _finish(system: System, gone: list[int], m: torch.Tensor, settings: Settings) -> Pruned:
    """Accept the multipliers, or fall back to 1 if they are not finite, too large or raise the loss."""
    stays = torch.ones(len(m), dtype=torch.bool, device=m.device)
    stays[gone] = False
    plain = stays.to(m)
    untuned, scale = system.error(plain), None
    if settings.tune and not (m[stays] == 1).all():
        full = m * plain
        sound = acceptable(full)
        if sound and system.loss(full) <= system.loss(plain):
            scale = m[stays].clone()
        else:
            reason = f"exceed {LARGEST:g} or are not finite" if not sound else "raise the loss"
            warnings.warn(f"tuned multipliers of an FFN {reason}: its neurons keep the multiplier 1", stacklevel=3)
    keep = stays.nonzero()[:, 0]
    if scale is None:
        return Pruned(keep, None, len(gone), error=untuned, untuned=untuned)
    error, largest = system.error(m * plain), float(scale.abs().max())
    return Pruned(keep, scale, len(gone), float(scale.var(correction=0)), largest, error, untuned)


# --- all blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """The task of one block in one round: neurons to remove, ridge, and bound on the variance."""

    quota: int
    epsilon: float
    bound: float


def prune_block(
    block: nn.Module,
    family: Family,
    pairs: Iterable[Pair],
    demand: Demand,
    settings: Settings,
    run: Callable = whole_block,
) -> Pruned:
    """Which neurons of one block stay, and their multipliers. The block itself is not changed.

    pairs: the block's calibration, read once; run: as in `block_system`. Holds two n x n matrices, whatever the number of tokens
    and blocks.
    """
    if demand.quota == 0 and (settings.reference == "same input" or not settings.tune):
        return Pruned(torch.arange(block.get_submodule(family.mlp.writer).in_features), None, 0)
    system = block_system(block, family, pairs, settings, run)
    return prune_system(system, demand.quota, settings, demand.epsilon, demand.bound)


@dataclass
class Round:
    """One pass over the blocks: the demand on each, and the shortfall of those before it.

    Call `ask(i)` before block i and `paid(result)` after it, in order. A shortfall is spread evenly over the later blocks.
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
        """Neurons that the blocks so far should have lost and have not."""
        done = len(self.results)
        return sum(d.quota for d in self.demands[:done]) - sum(r.removed for r in self.results)


def first_round(plan: Plan, widths: Sequence[int], settings: Settings) -> Round:
    """Quotas as planned. The variance is not checked if widths must stay equal or if there is only one round."""
    bound = math.inf if settings.equal_widths or settings.rounds == 1 else settings.variance_bound
    demands = [Demand(quota, settings.epsilon, bound) for quota in plan.quotas]
    return Round(demands, [most(n, settings) for n in widths], settings.multiple)


def next_round(last: Round, number: int, settings: Settings) -> Round | None:
    """The round after one with a shortfall, or None if there is none.

    1. The shortfall is spread over the blocks of low variance in the last round (`redistributed`).
    2. Blocks with a higher quota get ten times the ridge and twice the bound on the variance; in the last round all blocks
       get ten times the ridge and no bound.
    """
    if last.short <= 0:
        return None
    final = number == settings.rounds - 1
    demands = []
    for quota, result, before in zip(redistributed(last), last.results, last.demands, strict=True):
        relaxed = Demand(quota, before.epsilon * 10, math.inf if final else before.bound * 2)
        demands.append(relaxed if final or quota > result.removed else replace(before, quota=quota))
    return Round(demands, last.room, last.step)


def redistributed(last: Round) -> list[int]:
    """Quotas that make up for a shortfall.

    The half of the blocks with the lower variance loses one step more each, again and again until the shortfall is gone; the
    others follow only when these have no room.
    """
    quotas, short = [result.removed for result in last.results], last.short
    calm = sorted(range(len(quotas)), key=lambda i: last.results[i].variance)
    for asked in (calm[: -(-len(calm) // 2)], calm):
        while short > 0 and (free := [i for i in asked if quotas[i] + last.step <= last.room[i]]):
            for i in free[: -(-short // last.step)]:
                quotas[i] += last.step
                short -= last.step
    return quotas


@dataclass
class Report:
    """Plan and outcome: importance of every block, blocks removed, one result per block that stays."""

    scores: list[float]
    plan: Plan
    results: list[Pruned]
    rounds: int

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
    """Raise ValueError for a ratio that cannot be met, or a family for which the reference is not defined."""
    if Anatomy(model).family.mlp.output_norm and settings.reference != "same input":
        raise ValueError("this family normalises the FFN's output before adding it: use reference='same input'")
    check_share(ratio)
    block_counts(model, ratio, settings)


def decide(model: nn.Module, ids: torch.Tensor, scores: list[float], ratio: float, settings: Settings) -> Plan:
    """The plan for a ratio, from the importance of every block (`layer_scores`)."""
    counts = block_counts(model, ratio, settings)
    if settings.rho is None:
        return by_trials(model, ids, scores, counts, ratio, settings)
    return plan_for(model, ids, scores, counts[0], ratio, settings)


def plan_for(model: nn.Module, ids: torch.Tensor, scores: list[float], count: int, ratio: float, settings: Settings) -> Plan:
    """The plan with which so many whole blocks go."""
    drop = choose_blocks(model, ids, scores, count, settings)
    plan = make_plan(shape_of(model), scores, drop, ratio, settings)
    if settings.allocation == "global":
        plan = replace(plan, quotas=_global_quotas(model, ids, plan, settings))
    return plan


def by_trials(
    model: nn.Module, ids: torch.Tensor, scores: list[float], counts: Sequence[int], ratio: float, settings: Settings
) -> Plan:
    """The plan whose trial stays nearest to the dense model: one more block goes, as long as that is nearer than without it.

    Each trial has the same size, and is the whole method on half of the calibration sequences; the other half says how far it is
    from the dense model (`Trial.distance`). So the price of a block is compared with that of the neurons that would go in its
    place, in one unit. A single sequence is both halves.
    """
    half = max(1, len(ids) // 2)
    seen, judging = ids[:half], ids[half:] if len(ids) > 1 else ids
    if len(counts) == 1:
        return plan_for(model, ids, scores, counts[0], ratio, settings)
    dense, trials = last_states(model, judging), []
    for count in counts:
        plan = plan_for(model, seen, scores, count, ratio, settings)
        trials.append((count, Trial(model, seen, judging, plan, settings).distance(dense)))
        if len(trials) > 1 and trials[-1][1] >= trials[-2][1]:
            break
    best, _ = min(trials, key=lambda trial: trial[1])
    return replace(plan_for(model, ids, scores, best, ratio, settings), trials=trials)


def prune(
    model: nn.Module, ids: torch.Tensor, ratio: float, settings: Settings = Settings(), progress: Callable | None = None
) -> tuple[nn.Module, Report]:
    """A model with about `ratio` of its blocks' parameters removed by COMP, and a report. The given model stays intact.

    ids: calibration tokens [samples, length]. ratio: removed share of the parameters of all decoder blocks, met to within one
    neuron (or `settings.multiple`); with rho = 1, to the nearest block. Raises ValueError, before any long work, for a ratio
    that cannot be met and for ids, weights or families that cannot be used.
    """
    check(model, ratio, settings)
    return _prune(model, ids, layer_scores(model, ids, settings.layer_score), ratio, settings, progress)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model pruned by `prune`) for every ratio; the importance of the blocks is measured once.

    Arguments are those of `prune`, and so are the errors: all ratios are checked before any long work.
    """
    for ratio in ratios:
        check(model, ratio, settings)

    def run() -> Iterator[tuple[float, nn.Module]]:
        scores = layer_scores(model, ids, settings.layer_score)
        for ratio in ratios:
            yield ratio, _prune(model, ids, scores, ratio, settings, progress)[0]

    return run()


def _prune(
    model: nn.Module, ids: torch.Tensor, scores: list[float], ratio: float, settings: Settings, progress: Callable | None
) -> tuple[nn.Module, Report]:
    """`prune` with known importance of the blocks."""
    plan = decide(model, ids, scores, ratio, settings)
    if not plan.drop and not sum(plan.quotas):
        return shell(model), Report(scores, plan, [Pruned(torch.arange(n), None, 0) for n in ffn_widths(model)], 0)
    walk = CompWalk(model, ids, plan, settings)
    small = go(walk, "pruned", progress)
    return small, Report(scores, plan, walk.round.results, walk.number + 1)


class CompWalk(Walk):
    """COMP's rounds over the blocks that stay: a copy of the dense model that is pruned in place, with one or two streams.

    The student's stream is that of the copy; the teacher's, which some references need, that of the dense model. One block of
    each is in memory at a time.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, plan: Plan, settings: Settings, batch: int | None = None):
        self.dense, self.ids, self.plan, self.settings, self.batch = model, ids, plan, settings, batch
        self.kept = [i for i in range(len(Anatomy(model).blocks)) if i not in plan.drop]
        widths = ffn_widths(model)
        self._begin(first_round(plan, [widths[i] for i in self.kept], settings), 0)

    def _begin(self, turn: Round, number: int) -> None:
        self.round, self.number = turn, number
        self.model = remove_blocks(self.dense, self.plan.drop) if self.plan.drop else shell(self.dense)
        self.student = ResidualStream(self.model, self.ids, self.batch)
        alone = self.settings.reference == "same input"
        self.teacher = None if alone else ResidualStream(self.dense, self.ids, self.batch)
        self.streams = [stream for stream in (self.student, self.teacher) if stream]

    def approach(self, i: int) -> None:
        """Bring the dense model's stream through the removed blocks in front of block i."""
        if self.teacher:
            for skipped in range(self.kept[i - 1] + 1 if i else 0, self.kept[i]):
                self.teacher.advance_block(skipped)

    @torch.no_grad()
    def step(self, i: int) -> None:
        anatomy, dense = self.student.anatomy, self.kept[i]
        block = anatomy.blocks[i]
        with resident(block, *([self.teacher.anatomy.blocks[dense]] if self.teacher else [])):
            *before, (run, _) = anatomy.steps  # attention, where it comes before the FFN, runs once: only the FFN is cut
            for attend, _ in before:
                self.student.advance(attend, i)
            pairs = _pairs(self.student, i, self.teacher, dense)
            result = prune_block(block, anatomy.family, pairs, self.round.ask(i), self.settings, run)
            for _ in pairs:  # moves the teacher on if prune_block did not read the pairs
                pass
        self.round.paid(result)
        cut_result(anatomy, block, result)
        if i < self.blocks - 1:  # nobody needs the last block's output
            self.student.advance(run, i)

    def finish(self) -> bool:
        following = None
        if self.number + 1 < self.settings.rounds:
            following = next_round(self.round, self.number + 1, self.settings)
        if following is None:
            describe(self.model)
            return True
        self._begin(following, self.number + 1)
        return False

    def note(self) -> dict:
        results = [asdict(r) | {"keep": r.keep.tolist(), "scale": r.scale is not None} for r in self.round.results]
        demands = [asdict(d) for d in self.round.demands]
        return {"plan": asdict(self.plan), "round": self.number, "demands": demands, "results": results}

    def recall(self, note: dict, done: int) -> None:
        self.number, self.round.demands = note["round"], [Demand(**d) for d in note["demands"]]
        for block, facts in zip(self.student.anatomy.blocks, note["results"][:done], strict=False):
            keep = torch.tensor(facts["keep"])
            scale = torch.ones(len(keep)) if facts["scale"] else None  # the saved weights contain the multipliers
            result = Pruned(**facts | {"keep": keep, "scale": scale})
            cut_result(self.student.anatomy, block, result)
            self.round.paid(result)


class Trial(CompWalk):
    """COMP on some calibration sequences, `ids`; others, `judging`, pass through the pruned blocks and judge the result."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, judging: torch.Tensor, plan: Plan, settings: Settings):
        self.judging = judging
        super().__init__(model, ids, plan, settings)

    def _begin(self, turn: Round, number: int) -> None:
        super()._begin(turn, number)
        self.judge = ResidualStream(self.model, self.judging)

    def step(self, i: int) -> None:
        with resident(self.judge.anatomy.blocks[i]):  # what is left of it, until both streams are behind it
            super().step(i)
            self.judge.advance_block(i)

    @torch.no_grad()
    def distance(self, dense: torch.Tensor) -> float:
        """1 - mean cosine of the judging tokens' last states and those of the dense model, `dense` [samples, length, d]."""
        go(self, "tried")
        change, norm = Change(), self.judge.anatomy.get(self.judge.anatomy.family.final_norm)
        with resident(norm):
            for ours, theirs in zip(self.judge.hidden, dense, strict=True):
                change.add(norm(theirs), norm(ours))
        return mean_cosine(change)


def last_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The residual stream behind the last block, [samples, length, d]."""
    stream = ResidualStream(model, ids)
    for i in range(len(stream.anatomy.blocks)):
        stream.advance_block(i)
    return stream.hidden


def on_disk(model: nn.Module, ids: torch.Tensor, ratio: float, settings: Settings, note: dict) -> CompWalk:
    """The walk over a model on disk: a first pass decides what each block loses, unless an earlier start has noted it."""
    if note:
        return CompWalk(model, ids, Plan(**note["plan"]), settings)
    check(model, ratio, settings)
    scores = layer_scores(model, ids, settings.layer_score)
    return CompWalk(model, ids, decide(model, ids, scores, ratio, settings), settings)


def cut_result(anatomy: Anatomy, block: nn.Module, result: Pruned) -> None:
    """Apply its result to a block."""
    if result.removed or result.scale is not None:
        cut_neurons(anatomy, block, result.keep, result.scale)


def _pairs(student: ResidualStream, i: int, teacher: ResidualStream | None, dense: int) -> Iterator[Pair]:
    """The calibration of block i of the pruned model, block `dense` of the teacher, which moves on batch by batch."""
    if teacher is None:
        yield from map(Pair, student.inputs(i))
        return
    block, family = teacher.anatomy.blocks[dense], teacher.anatomy.family
    for batch, own in zip(student.inputs(i), teacher.inputs(dense), strict=True):
        output, _, ffn = run_seeing(whole_block, block, family, own, family.mlp.writer)
        teacher.hidden[own.rows] = output
        yield Pair(batch, output, ffn)


@torch.no_grad()
def _global_quotas(model: nn.Module, ids: torch.Tensor, plan: Plan, settings: Settings) -> list[int]:
    """Quotas by one threshold over all blocks' scores, each divided by the norm of its FFN's output; one pass, dense model."""
    small = remove_blocks(model, plan.drop) if plan.drop else shell(model)
    stream, alone = ResidualStream(small, ids), replace(settings, reference="same input")
    rank = METRICS[settings.metric] or METRICS["C1 once"]
    scores = []
    for i, block in enumerate(stream.anatomy.blocks):
        *before, (run, _) = stream.anatomy.steps
        with resident(block):
            for attend, _ in before:
                stream.advance(attend, i)
            system = block_system(block, stream.anatomy.family, _pairs(stream, i, None, i), alone, run)
            found = rank(system, epsilon=settings.epsilon, gamma=settings.gamma, seed=settings.seed)
        scores.append(found / max(system.wanted, 1e-300) ** 0.5)
        if i < len(stream.anatomy.blocks) - 1:
            stream.advance(run, i)
    widths, total = ffn_widths(small), sum(plan.quotas)
    least = max(n - most(n, settings) for n in widths)
    keep = globally(scores, Fraction(total, sum(widths)), least)
    wished = [1 - len(stay) / n for stay, n in zip(keep, widths, strict=True)]
    return quotas_from(wished, widths, total, settings)
