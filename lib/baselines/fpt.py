"""FPT (Kwon et al., arXiv 2204.09656): search a mask by Fisher information, rearrange it, tune it by least squares.

Every FFN neuron and every key-value group has a multiplier, 1 in the dense model. The gradients of the loss by these
multipliers, one vector per calibration sequence, decide which become 0; the others are then tuned to compensate, block by block.
The paper prunes encoders under a budget of multiply-adds; here the units are those of a decoder, and the budget is parameters.

Quirks of the method that are kept: the tuning's teacher is not the dense model but one pruned half-way (to the root of the share
that stays); its FFN outputs are whole, its attention is masked; attention of the first block is never tuned; and the first
multipliers outside [-10, 10] end all tuning. Those of the released solver are kept with `literal`. Our changes for decoders:
floors in every block, and no first token in the least squares, because its huge activations would outweigh all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import nn

from lib.papers.mask_tuning import Sums, acceptable
from lib.primitives.anatomy import Anatomy, Half, attention_half, mlp_half
from lib.primitives.calibration import ResidualStream, check_calibration, inputs_of, inputs_on_the_way
from lib.primitives.checks import check_settings, kept_share
from lib.primitives.cost import count
from lib.primitives.linalg import at_least_float32
from lib.primitives.losses import sequence_losses
from lib.primitives.structured import ffn_widths, group_params, kv_groups, neuron_params, remove_groups, remove_neurons
from lib.primitives.surgery import shape_shell, shell

LEAST_GROUPS, LEAST_NEURONS = 1, 16  # left in every block


@dataclass
class Units:
    """One tensor per block for its key-value groups and one for its neurons: masks [n], or gradients [sequences, n]."""

    groups: list[torch.Tensor]
    neurons: list[torch.Tensor]

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Units:
        return Units([f(x) for x in self.groups], [f(x) for x in self.neurons])

    def repeated(self, sequences: int) -> Units:
        """A copy of masks [n] for every sequence, [sequences, n]."""
        return self.map(lambda x: x.repeat(sequences, 1))


def units_of(model: nn.Module) -> Units:
    """A multiplier of 1 for every group and neuron of a model, float64."""
    return Units(
        *([torch.ones(n, dtype=torch.float64, device=model.device) for n in s] for s in (kv_groups(model), ffn_widths(model)))
    )


# --- masks on a running model ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def masked(block: nn.Module, halves: tuple[Half, Half], groups: torch.Tensor, neurons: torch.Tensor) -> Iterator[None]:
    """Multiply the units of a block within the `with`: the inputs of its writers are scaled, in at least float32.

    groups, neurons: [n], or [sequences, n] with a mask of its own for every sequence of the batch.
    """

    def hook(mask: torch.Tensor) -> Callable:
        rows = mask if mask.ndim == 2 else mask[None]

        def scale(_, inputs):
            x = inputs[0]
            units = x.reshape(len(rows), -1, rows.shape[1], x.shape[-1] // rows.shape[1])  # OPT flattens its batches
            wide = torch.promote_types(x.dtype, torch.float32)
            return ((units.to(wide) * rows[:, None, :, None].to(wide)).to(x.dtype).reshape(x.shape),)

        return scale

    handles = [
        block.get_submodule(half.writer).register_forward_pre_hook(hook(mask))
        for half, mask in zip(halves, (groups, neurons), strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def all_masked(model: nn.Module, masks: Units) -> Iterator[None]:
    anatomy = Anatomy(model)
    with contextlib.ExitStack() as stack:
        for block, groups, neurons in zip(anatomy.blocks, masks.groups, masks.neurons, strict=True):
            stack.enter_context(masked(block, anatomy.halves, groups, neurons))
        yield


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight requires a gradient within the `with`: the backward pass is for the masks alone."""
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asking:
            p.requires_grad_(False)
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def mask_gradients(
    model: nn.Module,
    ids: torch.Tensor,
    batch: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Units:
    """∂L_s/∂m at m = 1 for every unit, float64 [sequences, n]; L_s is the mean next-token loss of sequence s.

    ids: [sequences, tokens]. Activations of all blocks are in memory, gradients of weights are not.
    """
    check_calibration(Anatomy(model), ids)
    if ids.shape[1] < 2:
        raise ValueError("sequences of 1 token predict nothing: use at least 2 tokens")
    ones, found = units_of(model), []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        part = ids[rows].to(model.device)
        leaves = ones.repeated(len(part)).map(torch.Tensor.requires_grad_)
        with torch.enable_grad(), _frozen(model), all_masked(model, leaves):
            loss = sequence_losses(model, part).sum()
            gradients = torch.autograd.grad(loss, [*leaves.groups, *leaves.neurons])
        found.append(gradients)
        if progress:
            progress(f"mask gradients of {min(start + batch, len(ids))} of {len(ids)} sequences")
    stacked = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return Units(stacked[: len(ones.groups)], stacked[len(ones.groups) :])


def importance(gradients: Units) -> Units:
    """Diagonal Fisher information F_ii = Σ_s g_si² of every unit, [n]."""
    return gradients.map(lambda g: g.double().square().sum(0))


# --- step 1: search ----------------------------------------------------------------------------------------------------


def search(importance: Units, budget: float | Fraction, costs: tuple[int, int]) -> Units:
    """The binary mask of the largest summed importance whose parameters fit the budget: exact, for these floors.

    importance: [n] per block; costs: parameters of one group and of one neuron. One group and 16 neurons (or all, of fewer) stay
    in every block. For every number of groups, take the best and fill the budget with the best neurons; keep the best sum.
    Raises ValueError for a budget below the floors.
    """
    # 1. Units in the order in which they are kept, and their summed importance.
    group_order, group_floor = _ranked(importance.groups, LEAST_GROUPS)
    neuron_order, neuron_floor = _ranked(importance.neurons, LEAST_NEURONS)
    group_sum, neuron_sum = (
        torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat(parts).double().cpu()[order].cumsum(0)])
        for parts, order in ((importance.groups, group_order), (importance.neurons, neuron_order))
    )
    # 2. The best number of groups, with as many neurons as the rest of the budget holds.
    best, chosen = -1.0, None
    for groups in range(group_floor, len(group_order) + 1):
        neurons = min(len(neuron_order), int((budget - groups * costs[0]) // costs[1]))
        if neurons < neuron_floor:
            break
        value = float(group_sum[groups] + neuron_sum[neurons])
        if value > best:
            best, chosen = value, (groups, neurons)
    if chosen is None:
        least = group_floor * costs[0] + neuron_floor * costs[1]
        raise ValueError(f"a budget of {int(budget)} parameters is below the {least} that one group and 16 neurons a block need: "
                         "use a lower ratio")  # fmt: skip
    return Units(_mask(importance.groups, group_order[: chosen[0]]), _mask(importance.neurons, neuron_order[: chosen[1]]))


def _ranked(scores: Sequence[torch.Tensor], least: int) -> tuple[torch.Tensor, int]:
    """Units of all blocks in the order in which they are kept, and how many are floors: the best `least` of each block."""
    safe = torch.cat([_top(score.cpu(), min(least, len(score))) for score in scores])
    pooled = torch.cat([score.cpu().double() for score in scores])
    by_score = pooled.argsort(descending=True, stable=True)
    return torch.cat([by_score[safe[by_score]], by_score[~safe[by_score]]]), int(safe.sum())


def _top(score: torch.Tensor, n: int) -> torch.Tensor:
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.argsort(descending=True, stable=True)[:n]] = True
    return chosen


def _mask(like: Sequence[torch.Tensor], chosen: torch.Tensor) -> list[torch.Tensor]:
    flat = torch.zeros(sum(len(x) for x in like), dtype=torch.float64)
    flat[chosen] = 1
    return [part.to(x.device) for part, x in zip(flat.split([len(x) for x in like]), like, strict=True)]


def share_kept(model: nn.Module, ratio: float) -> tuple[Fraction, int]:
    """(c, P): the share c that stays of the P parameters in groups and neurons if `ratio` of all decoder parameters goes."""
    units = sum(kv_groups(model)) * group_params(model) + sum(ffn_widths(model)) * neuron_params(model)
    c = 1 - (1 - kept_share(ratio)) * Fraction(count(model).decoder, units)
    if c <= 0:
        raise ValueError(
            f"groups and neurons are {units} parameters, too few to remove {ratio:.0%} of the decoder: lower the ratio"
        )
    return c, units


# --- step 2: rearrangement ---------------------------------------------------------------------------------------------


def rearrange(gradients: torch.Tensor, pruned: int) -> torch.Tensor:
    """A mask [n] with `pruned` zeros P at a small ‖Σ_{i in P} g_i‖², the loss of removing them *together*.

    gradients: [sequences, n]. Greedy, in one pass: start with the smallest F_ii; add every other unit in ascending order, and
    drop the member without which the sum is smallest. With s = Σ g_i, ‖s - g_j‖² = ‖s‖² - 2 ⟨s, g_j⟩ + ‖g_j‖²: one product.
    Never worse than the start.
    """
    n = gradients.shape[1]
    mask = torch.ones(n, dtype=torch.float64, device=gradients.device)
    if pruned in (0, n):
        mask[:pruned] = 0
        return mask
    vectors = gradients.T.double()
    sizes = vectors.square().sum(1)
    order = sizes.argsort(stable=True)
    members = order[: pruned + 1].clone()  # one extra slot for the candidate
    g, size = vectors[members], sizes[members]
    total = g[:-1].sum(0)
    for candidate in order[pruned:]:
        members[-1], g[-1], size[-1] = candidate, vectors[candidate], sizes[candidate]
        total = total + g[-1]
        leaves = (size - 2 * (g @ total)).argmin()
        total = total - g[leaves]
        members[leaves], g[leaves], size[leaves] = members[-1], g[-1], size[-1]
    mask[members[:-1]] = 0
    return mask


# --- step 3: tuning ----------------------------------------------------------------------------------------------------


class WithOnes(Sums):
    """The sums of a layer with a column of ones beside its units, as the released code has it for attention."""

    def __init__(self, weight: torch.Tensor, units: int):
        super().__init__(weight, units)
        self.sums = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self.target_sum, self.entries = 0.0, 0

    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        super().add(x, target)
        self.sums += at_least_float32(x).sum(0, dtype=torch.float64)
        self.target_sum += float(target.sum(dtype=torch.float64))
        self.entries += target.numel()

    def normal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, g) over the units and, last, the column of ones."""
        h, g = super().normal()
        edge = (self.sums * self.weight.double().sum(1)).view(len(g), -1).sum(1)[:, None]
        h = torch.cat([torch.cat([h, edge], 1), torch.cat([edge.T, h.new_full((1, 1), self.entries)], 1)])
        return h, torch.cat([g, g.new_tensor([self.target_sum])])


def solve(h: torch.Tensor, g: torch.Tensor, literal: bool = False) -> torch.Tensor | None:
    """Multipliers m [n] near 1 for the normal equations H m = g, or None where there is no stable solution.

    m = 1 + argmin_x ‖Hx - r‖² + δ²‖x‖² with r = g - H 1, that is x = (H² + δ²I)⁻¹ H r, LSMR with damping δ on the *normal*
    matrix. Literal: δ = 1 on the raw sums, so more data means less damping. Default: δ = 0.01 after H and r are
    divided by tr(H)/n, which does not depend on scale. The loss never rises. One unknown is solved directly. None where the
    damped system passes the solver's condition limit, 10⁸, which the default cannot: its eigenvalues are at most n. The solver's
    limit of iterations does not apply to this closed form.
    """
    n = len(g)
    r = g - h.sum(1)
    if n == 1:
        return 1 + r / h[0, 0]
    scale = 1.0 if literal else h.trace() / n
    damping = 1.0 if literal else 0.01
    h, r = h / scale, r / scale
    if not torch.isfinite(h).all() or not torch.isfinite(r).all():
        return None
    if literal:
        # On raw sums the eigenvalues of H² may exceed the damping so much that only those of H itself are accurate.
        values, vectors = torch.linalg.eigh(h)
        values = values.clamp(min=0)
        damped = values.square() + damping**2
        if damped.max() > 1e16 * damped.min():
            return None
        return 1 + vectors @ (values / damped * (vectors.T @ r))
    damped = h @ h
    damped.diagonal().add_(damping**2)
    return 1 + torch.cholesky_solve((h @ r)[:, None], torch.linalg.cholesky(damped))[:, 0]


def tune(
    model: nn.Module,
    ids: torch.Tensor,
    student: Units,
    teacher: Units,
    literal: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Units:
    """Multipliers for the kept units of a binary mask, so that each half of a block brings the stream to that of the teacher.

    Target: Y_T + R_T - bias - R_S, with outputs and streams of teacher and student, so drift from earlier blocks is repaired too.
    In order, attention (not in block 0) then FFN; the first unacceptable solution is discarded and ends the tuning.
    ids: [samples, tokens]. Raises ValueError for families whose halves run in parallel or are normalised at their end.
    """
    check_tunable(model)
    tuned = Units(list(student.groups), list(student.neurons))
    streams = [ResidualStream(model, ids) for _ in range(2)]
    anatomy = streams[0].anatomy
    parts = ((attention_half, tuned.groups, anatomy.family.attention), (mlp_half, tuned.neurons, anatomy.family.mlp))
    for i, block in enumerate(anatomy.blocks):
        for run, masks, half in parts:
            # 1. The teacher moves over this half and gives the target for the student's stream.
            reached = _advance_teacher(streams[1], i, run, half, teacher)
            # 2. The kept units of the student get the multipliers that come closest to the target.
            if masks[i].any() and not (i == 0 and half is anatomy.family.attention):
                kept = masks[i] != 0
                sums = _measure(streams[0], i, run, half, reached, kept, literal and half is anatomy.family.attention)
                m = solve(*sums.normal(), literal)
                m = None if m is None else m[: sums.units]  # without that of the column of ones
                if not acceptable(m):
                    if progress:
                        progress(f"tuning ends at block {i} {half.writer}: no acceptable multipliers; later masks stay binary")
                    return tuned
                masks[i] = torch.zeros_like(masks[i]).masked_scatter(kept, m)
            # 3. The student moves over this half with the new multipliers.
            with masked(block, anatomy.halves, tuned.groups[i], tuned.neurons[i]):
                streams[0].advance(run, i)
        if progress:
            progress(f"tuned block {i + 1} of {len(anatomy.blocks)}")
    return tuned


def check_tunable(model: nn.Module) -> None:
    """Raise ValueError for a family whose halves do not add their writer's output to the stream one after the other."""
    family = Anatomy(model).family
    if family.parallel or family.attention.output_norm or family.mlp.output_norm:
        kind = model.config.model_type
        raise ValueError(
            f"mask tuning needs writers that add to the stream one after the other, unlike those of {kind}: use tuning=False"
        )


@torch.no_grad()
def _advance_teacher(stream: ResidualStream, block: int, run: Callable, half: Half, masks: Units) -> torch.Tensor:
    """Move the teacher over a half; returns the target for the student's stream, R_T + Y_T [samples, tokens, d].

    For attention that is the masked teacher's stream. For the FFN it is the teacher's stream with *all* neurons active: the
    released code records activations before its masks are applied.
    """
    anatomy = stream.anatomy
    module, mask = anatomy.blocks[block], masks.neurons[block]
    if half is anatomy.family.attention:
        with masked(module, anatomy.halves, masks.groups[block], mask):
            stream.advance(run, block)
        return stream.hidden
    # One pass for both: the masked stream moves on, and the contribution of the masked neurons is added to the target.
    less = (mask != 1).nonzero()[:, 0]
    weight = module.get_submodule(half.writer).weight.detach()[:, less].T
    reached = torch.empty_like(stream.hidden)
    for batch in stream.inputs(block):
        # The hook that notes the writer's inputs was registered first, so it runs before the mask is applied.
        with inputs_of(module.get_submodule(half.writer)) as seen, masked(module, anatomy.halves, masks.groups[block], mask):
            output = run(module, anatomy.family, batch.hidden, batch.kwargs)
        x = seen[0][..., less].view(*output.shape[:2], -1)  # OPT flattens batch and tokens before its FFN
        reached[batch.rows] = (x * (1 - mask[less]).to(x)) @ weight + output
        stream.hidden[batch.rows] = output
    return reached


@torch.no_grad()
def _measure(
    stream: ResidualStream, block: int, run: Callable, half: Half, reached: torch.Tensor, kept: torch.Tensor, ones: bool
) -> Sums:
    """Sums of the kept units of a half over the student's inputs and the stream to be reached, without first tokens.

    kept: bool [n]; ones: with the released code's column of ones.
    """
    anatomy = stream.anatomy
    writer = anatomy.blocks[block].get_submodule(half.writer)
    features = kept.repeat_interleave(writer.in_features // len(kept)).nonzero()[:, 0]
    sums = (WithOnes if ones else Sums)(writer.weight.detach().T[features], int(kept.sum()))
    bias = 0 if writer.bias is None else writer.bias.detach()
    for batch in stream.inputs(block):
        x = inputs_on_the_way(run, anatomy.blocks[block], anatomy.family, batch, half.writer)
        target = reached[batch.rows] - batch.hidden - bias
        sums.add(x[:, 1:].flatten(0, 1)[:, features], target[:, 1:].flatten(0, 1))
    return sums


# --- the method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    rearrangement: bool = True  # the second step
    tuning: bool = True  # the third step
    literal: bool = False  # the released solver
    ONLY_WITH: ClassVar = {"literal": ("tuning", (True,))}

    def __post_init__(self):
        check_settings(self)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
) -> Iterator[tuple[float, nn.Module]]:
    """Prune a model at several ratios with FPT; yields (ratio, model). One set of gradients serves all.

    ids: calibration tokens [sequences, length]. ratios: removed shares of the decoder's parameters, met from below to within
    one neuron. The given model stays intact. Raises ValueError, before any work, for ratios, ids or families that cannot be
    used.
    """
    shares = [share_kept(model, ratio) for ratio in ratios]
    if settings.tuning:
        check_tunable(model)
    costs = group_params(model), neuron_params(model)
    plain = units_of(model)
    for c, units in shares:
        search(plain, c * units, costs)  # raises now rather than after the gradients

    def run() -> Iterator[tuple[float, nn.Module]]:
        gradients = mask_gradients(model, ids, progress=progress)
        for ratio, (c, units) in zip(ratios, shares, strict=True):
            if ratio == 0:
                yield ratio, shell(model)
                continue
            student, teacher = (search(importance(gradients), budget * units, costs) for budget in (c, float(c) ** 0.5))
            if settings.rearrangement:
                student = Units(
                    *(
                        [rearrange(g, int((m == 0).sum())) for g, m in zip(gs, ms, strict=True)]
                        for gs, ms in ((gradients.groups, student.groups), (gradients.neurons, student.neurons))
                    )
                )
            kept = student.map(lambda m: m.nonzero()[:, 0])
            if settings.tuning:
                student = tune(model, ids, student, teacher, settings.literal, progress)
            yield ratio, fold(model, student, kept)

    return run()


def shape(model: nn.Module, ratio: float, settings: Settings = Settings()) -> nn.Module:
    """The model after a ratio, on the meta device, as if the importance per parameter of both kinds of units was evenly spread.

    Other gradients change which units go, not how many parameters, to within one neuron.
    """
    c, units = share_kept(model, ratio)
    if settings.tuning:
        check_tunable(model)
    sizes, costs = (kv_groups(model), ffn_widths(model)), (group_params(model), neuron_params(model))
    even = Units(*([torch.arange(1, n + 1) * cost / n for n in own] for own, cost in zip(sizes, costs, strict=True)))
    kept = search(even, c * units, costs).map(lambda m: m.nonzero()[:, 0])
    fewer = remove_groups(shape_shell(model), kept.groups, inplace=True)
    return remove_neurons(fewer, kept.neurons, inplace=True)


def fold(model: nn.Module, masks: Units, kept: Units) -> nn.Module:
    """The model with only the kept units and their multipliers in the writers, so that no mask remains."""
    scales = Units(
        *([m[k] for m, k in zip(ms, ks, strict=True)] for ms, ks in ((masks.groups, kept.groups), (masks.neurons, kept.neurons)))
    )
    fewer = remove_groups(model, kept.groups, scale=scales.groups)
    return remove_neurons(fewer, kept.neurons, scale=scales.neurons, inplace=True)


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """Prune a model at one ratio with FPT; settings: fields of `Settings`."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]
