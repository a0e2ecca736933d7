"""Gaussian mixtures of one dimension, fitted to every row of a matrix at once, and the tails that they flag.

Structured AFR clips a neuron's outlying scores before it averages them (equation 3): fit mixtures of 1 to 5 components by
EM, choose one by BIC, call the scores of the lowest 2 % of density *low*, and replace the unbroken runs of low scores at
both ends of the sorted row by the score where the run ends. A model has hundreds of thousands of rows, so many of them take
each EM step together, on some 200 weighted cells a row.

Every row is brought to *robust units* first, z = (x - median) / (IQR / 1.349): thresholds and floors then mean the same for
scores of any size. A row whose IQR is 0 is all zeros in these units and is never clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from lib.primitives.linalg import at_least_float32
from lib.primitives.threads import one_thread_each

COMPONENTS = (1, 2, 3, 4, 5)
# Least variance of a component, in robust units. With a lower floor a single extreme score would get a component of its own,
# look dense, and not be clipped.
FLOOR = 1e-2
# A row is done when its mean log-likelihood changes by less. This is part of the method: converged fits clip other scores in a
# fifth of the rows, though of the neurons removed at 20 % only one in thirty changes (`python -m benchmarks.mixtures`).
TOLERANCE, ITERATIONS = 1e-4, 100
WIDEST, NARROWEST = 0.5, 0.005  # shares of the first and the last shell of the scale start, before they are normalised
SINGLES, GROWTH = 64, 16  # values at each end that stay alone; further inside a cell holds a 16th of the values beyond it
SHORT = 512  # shorter rows are not summed up
LEAVE = 0.25  # the share of the rows that must be done before the others are copied into tensors of their own
WORK = {"cpu": 2**20, "cuda": 2**26}  # numbers in one temporary: so many that operations take longer than their calls


@dataclass(frozen=True)
class Mixtures:
    """One mixture per row, in robust units. K is the largest number of components; those beyond `chosen` have weight 0."""

    weights: torch.Tensor  # [f, K]
    means: torch.Tensor  # [f, K]
    variances: torch.Tensor  # [f, K]
    log_likelihood: torch.Tensor  # [f], mean over the values of a row; of the cells where they are binned
    chosen: torch.Tensor  # [f], int64
    bic: torch.Tensor  # [f, number of candidates], lower is better

    def of(self, rows: slice) -> Mixtures:
        """The mixtures of some rows."""
        return Mixtures(**{name: value[rows] for name, value in vars(self).items()})

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of values in robust units. z, result: [f, m]."""
        return torch.logsumexp(_joint(_squares(z, self.means), self.weights, self.variances), dim=1)


@dataclass(frozen=True)
class Cells:
    """Sorted values in cells: their number, [c], the same for all rows; their mean and variance, [f, c]."""

    counts: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor | None  # None: every value is a cell


# --- what callers use -------------------------------------------------------------------------------------------------


def fit(
    x: torch.Tensor,
    components: Sequence[int] = COMPONENTS,
    *,
    binned: bool = True,
    start: str = "scale",
    floor: float = FLOOR,
) -> Mixtures:
    """The mixture of lowest BIC for every row of x [f, m], of the numbers of components given; of equal ones the smaller.

    binned: long rows are summed up in cells first, see `cells`. start: "scale" or "quantile", see `starts`. floor: the least
    variance, in robust units. The arithmetic is that of x's dtype, at least float32. Raises ValueError for NaN or infinity,
    and for rows too short. Structured AFR, equation 3.
    """
    components = _checked(x, components, start, floor)
    numbers = components[-1] * len(_sizes(x.shape[1], binned))
    return _joined(_in_parts(x, numbers, lambda z, _: _fit(z, components, binned, start, floor)))


def low_density_tails(x: torch.Tensor, mixtures: Mixtures, share: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the lowest and of the highest values of each row form an unbroken run of low density, int64 [f] each.

    Low: strictly below the empirical `share` quantile of the row's own densities; together they are at most ⌈share m⌉ unless
    the quantile is 0.
    """
    numbers = mixtures.means.shape[1] * x.shape[1]
    found = _in_parts(x, numbers, lambda z, rows: _tails(z, mixtures.of(rows).log_density(z), share))
    left, right = (torch.cat(run) for run in zip(*found, strict=True))
    return left, right


def clipped(x: torch.Tensor, share: float = 0.02, *, binned: bool = True) -> torch.Tensor:
    """x [f, m] with the outlying scores of each row replaced by the innermost outlying one, in place of the same entries.

    So `clipped(x).mean(1).abs()` is the paper's score (equation 4), and `clipped(x).abs().mean(1)` its variant without signs.
    One mixture for a whole layer is `clipped(x.reshape(1, -1)).view_as(x)`. Arguments and errors as for `fit`.
    """
    return clip_runs(x, *runs(x, share, binned=binned))


def runs(x: torch.Tensor, share: float = 0.02, *, binned: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """How many outlying scores each row of x [f, m] has at its low and at its high end, int64 [f] each, by a mixture of its own.

    `low_density_tails` of `fit`. Arguments and errors as for `fit`.
    """
    return low_density_tails(x, fit(x, binned=binned), share)


def clip_runs(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x [f, m] with the `left` lowest and the `right` highest scores of each row replaced by the innermost of these.

    left, right: int64 [f], as from `runs`, of x or of other scores of the same rows.
    """
    low = _boundary(x, left, largest=False).masked_fill_(left == 0, -torch.inf)
    high = _boundary(x, right, largest=True).masked_fill_(right == 0, torch.inf)
    return x.clamp(low[:, None], high[:, None])


def winsorised(x: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """x [f, m] with the lowest and highest ⌊share m⌋ of each row replaced by the next score inside. A control for `clipped`."""
    k = _count(x, share)
    ordered = x.sort(dim=1).values
    return x.clamp(ordered[:, k, None], ordered[:, -k - 1, None])


def trimmed_mean(x: torch.Tensor, share: float = 0.02) -> torch.Tensor:
    """Mean [f] of each row of x [f, m] without its lowest and highest ⌊share m⌋. The released code's rule; a control."""
    k = _count(x, share)
    return x.sort(dim=1).values[:, k : x.shape[1] - k].mean(1)


# --- rows in robust units, summed up in cells -------------------------------------------------------------------------


def robust(ordered: torch.Tensor) -> torch.Tensor:
    """Sorted rows [f, m] in robust units, (x - median) / (IQR / 1.349); zeros where the IQR is 0.

    Quartiles are order statistics at the same distance from both ends, so a row and its negative get the same unit.
    """
    m = ordered.shape[1]
    median = (ordered[:, (m - 1) // 2] + ordered[:, m // 2])[:, None] / 2
    unit = (ordered[:, m - 1 - m // 4] - ordered[:, m // 4])[:, None] / 1.349  # the IQR of a standard normal
    return torch.where(unit > 0, (ordered - median) / torch.where(unit > 0, unit, 1), 0)


def cells(z: torch.Tensor, binned: bool = True) -> Cells:
    """Sum up sorted rows [f, m]: 64 values at each end stay alone, and further inside neighbours share larger and larger cells.

    576 values become 182 cells and 4096 become 248. Rows of fewer than 512, and all rows without `binned`, stay as they are.
    On the scores of SmolLM2's neurons the 182 cells clip the same scores as the 576 values in all but a few rows in a
    thousand: `python -m benchmarks.mixtures`.
    """
    sizes = _sizes(z.shape[1], binned)
    if len(sizes) == z.shape[1]:
        return Cells(torch.ones_like(z[0]), z, None)
    # Values alone are split together: there are many of them.
    inner = [torch.var_mean(part, dim=1, correction=0) for part in z[:, SINGLES:-SINGLES].split(sizes[SINGLES:-SINGLES], dim=1)]
    variance, mean = (torch.stack(parts, dim=1) for parts in zip(*inner, strict=True))
    pad = torch.nn.functional.pad
    return Cells(
        torch.tensor(sizes).to(z),
        torch.cat([z[:, :SINGLES], mean, z[:, -SINGLES:]], dim=1),
        pad(variance, (SINGLES, SINGLES)),
    )


def _sizes(m: int, binned: bool) -> list[int]:
    """How many values each cell of a row of m holds, from the low end to the high one.

    The tails decide what is clipped, and there the density changes most from one value to the next.
    """
    if m < SHORT or not binned:
        return [1] * m
    sizes, beyond = [1] * SINGLES, SINGLES
    while beyond < m // 2:
        sizes.append(min(beyond // GROWTH, m // 2 - beyond))
        beyond += sizes[-1]
    return [*sizes, *[1] * (m % 2), *reversed(sizes)]


# --- expectation and maximisation -------------------------------------------------------------------------------------


def starts(data: Cells, k: int, start: str = "scale", floor: float = FLOOR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, means and variances [f, k] to start EM from.

    "scale": order the values by |z| and cut them into shells that hold geometrically fewer of them, one component each. It
    suits scores that are heavy-tailed about one centre. "quantile": k neighbouring groups of equal mass.
    """
    z, counts = data.means, data.counts
    if start == "scale":
        shares = torch.logspace(math.log10(WIDEST), math.log10(NARROWEST), k, dtype=torch.float64)
        order = z.abs().argsort(dim=1, stable=True)
    else:
        shares = torch.ones(k, dtype=torch.float64)
        order = torch.arange(z.shape[1], device=z.device).expand_as(z)
    ends = (shares / shares.sum()).cumsum(0)[:-1].to(z) * counts.sum()
    middle = counts[order].cumsum(1) - counts[order] / 2  # of each cell, in values from the beginning
    shell = torch.empty_like(order).scatter_(1, order, torch.bucketize(middle, ends))
    members = (shell[:, None] == torch.arange(k, device=z.device)[:, None]) * counts
    weights, means = _weights_and_means(members, z)
    return weights, means, _variances(members, _squares(z, means, data.variances), floor)


def _fit(z: torch.Tensor, components: list[int], binned: bool, start: str, floor: float) -> Mixtures:
    """The chosen mixture of each sorted row."""
    data = cells(z, binned)
    m, best = z.shape[1], None
    for k in components:
        found = expectation_maximisation(data, *starts(data, k, start, floor), floor)
        bic = -2 * m * found[3] + (3 * k - 1) * math.log(m)
        padded = (_widened(t, components[-1], value) for t, value in zip(found[:3], (0, 0, 1), strict=True))
        now = Mixtures(*padded, found[3], torch.full_like(bic, k).long(), bic[:, None])
        best = now if best is None else _better(best, now)
    return best


def expectation_maximisation(
    data: Cells, weights: torch.Tensor, means: torch.Tensor, variances: torch.Tensor, floor: float = FLOOR
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Improve a start until each row's mean log-likelihood stands still: weights, means, variances [f, k], likelihood [f].

    The result of a row is taken when it is done, so it does not depend on the other rows. For a bin the log-density is averaged
    over its values, by adding the variance inside the bin to the squared distance: so each step remains an ascent.
    """
    z, inside, counts = data.means, data.variances, data.counts
    m, results = counts.sum(), [torch.empty_like(t) for t in (weights, means, variances, z[:, 0])]
    rows, last = torch.arange(len(z), device=z.device), torch.full_like(z[:, 0], -torch.inf)
    going = torch.ones_like(rows, dtype=torch.bool)
    squares = _squares(z, means, inside)
    for step in range(ITERATIONS + 1):
        # 1. Expectation: how much of each cell belongs to each component.
        joint = _joint(squares, weights, variances)
        peak = joint.amax(dim=1, keepdim=True)
        members = joint.sub_(peak).clamp_(min=_least_exponent(z.dtype)).exp_()
        total = members.sum(dim=1, keepdim=True)
        likelihood = (total.log() + peak)[:, 0] @ counts / m
        # 2. Results of the rows that are done. When they are many, the others go on without them.
        done = going & ((likelihood - last).abs() < TOLERANCE) if step < ITERATIONS else going
        if done.any():
            for result, value in zip(results, (weights, means, variances, likelihood), strict=True):
                result[rows[done]] = value[done]
            going = going & ~done
            left = going.nonzero()[:, 0]
            if not len(left):
                break
            if len(left) <= (1 - LEAVE) * len(rows):
                rows, z, members, total, likelihood, going = (t[left] for t in (rows, z, members, total, likelihood, going))
                inside = None if inside is None else inside[left]
        # 3. Maximisation for the others.
        last = likelihood
        members *= counts / total
        weights, means = _weights_and_means(members, z)
        squares = _squares(z, means, inside)
        variances = _variances(members, squares, floor)
    return tuple(results)


def _least_exponent(dtype: torch.dtype) -> float:
    """Lower limit of the exponents: smaller results would be denormal numbers, which are many times slower on a CPU."""
    return 0.9 * math.log(torch.finfo(dtype).tiny)


def _squares(z: torch.Tensor, means: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Squared distance of every cell to every component, [f, k, c], with the variance inside the cell."""
    squares = (z[:, None] - means[..., None]).square_()
    return squares if inside is None else squares.add_(inside[:, None])


def _joint(squares: torch.Tensor, weights: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """log π_k N(z | μ_k, σ_k²), [f, k, c], from squared distances."""
    heights = weights.log() - (2 * math.pi * variances).log() / 2
    return torch.addcmul(heights[..., None], squares, (-0.5 / variances)[..., None])


def _weights_and_means(members: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """members: how much of each cell belongs to each component, [f, k, c]."""
    mass = members.sum(dim=2)
    means = (members * z[:, None]).sum(dim=2) / mass.clamp(min=torch.finfo(z.dtype).tiny)
    return mass / mass.sum(dim=1, keepdim=True), means


def _variances(members: torch.Tensor, squares: torch.Tensor, floor: float) -> torch.Tensor:
    mass = members.sum(dim=2).clamp(min=torch.finfo(members.dtype).tiny)
    return ((members * squares).sum(dim=2) / mass).clamp(min=floor)


def _widened(t: torch.Tensor, k: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(t, (0, k - t.shape[1]), value=value)


def _better(a: Mixtures, b: Mixtures) -> Mixtures:
    """Row by row the mixture of lower BIC, `a` where they are equal; b is one candidate, a the best of all before it."""
    lower = b.bic[:, 0] < a.bic.amin(dim=1)

    def pick(name: str) -> torch.Tensor:
        first, second = getattr(a, name), getattr(b, name)
        return torch.where(lower[:, None] if first.ndim == 2 else lower, second, first)

    parts = {name: pick(name) for name in ("weights", "means", "variances", "log_likelihood", "chosen")}
    return Mixtures(**parts, bic=torch.cat([a.bic, b.bic], dim=1))


# --- tails ------------------------------------------------------------------------------------------------------------


def _tails(z: torch.Tensor, density: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the low runs at both ends of sorted rows."""
    m = z.shape[1]
    place = math.ceil(exact(share) * (m - 1))  # below the interpolated quantile is below the next order statistic
    low = density < density.kthvalue(place + 1, dim=1, keepdim=True).values
    return _run(low), _run(low.flip(1))


def _run(flags: torch.Tensor) -> torch.Tensor:
    """Length of the leading block of True in each row."""
    return flags.long().cumprod(dim=1).sum(dim=1)


def _boundary(x: torch.Tensor, run: torch.Tensor, largest: bool) -> torch.Tensor:
    """The run-th smallest or largest score of each row of x [f, m], the first where run [f] is 0."""
    ends = x.topk(max(1, int(run.max())), dim=1, largest=largest).values
    return ends.gather(1, (run - 1).clamp(min=0)[:, None])[:, 0]


# --- rows ------------------------------------------------------------------------------------------------------------


def _checked(x: torch.Tensor, components: Sequence[int], start: str, floor: float) -> list[int]:
    """The candidates in ascending order. Raises ValueError for arguments that cannot be fitted."""
    if x.ndim != 2 or len(x) < 1 or x.shape[1] < 4:
        raise ValueError(f"scores must be [rows, values] with at least 4 values a row, not {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("scores hold NaN or infinity: compute gradients in float32 or bfloat16, not in float16")
    if not components or min(components) < 1:
        raise ValueError(f"components must be numbers from 1 on, such as (1, 2, 3, 4, 5), not {components}")
    if start not in ("scale", "quantile"):
        raise ValueError(f"start must be scale or quantile, not {start!r}")
    if not floor > 0:
        raise ValueError(f"the floor of the variances must be above 0, not {floor}: 0.01 is a tenth of a robust unit squared")
    return sorted(set(components))


def _in_parts(x: torch.Tensor, numbers: int, take: Callable[[torch.Tensor, slice], object]) -> list:
    """take(z, rows) for every few rows of x [f, m], sorted and in robust units; `numbers` of a row are in one temporary."""
    few = max(1, WORK["cpu" if x.device.type == "cpu" else "cuda"] // numbers)

    def run(first: int) -> object:
        rows = slice(first, first + few)
        return take(robust(at_least_float32(x[rows].detach()).sort(dim=1).values), rows)

    starts = range(0, len(x), few)
    return one_thread_each(run, starts) if x.device.type == "cpu" else [run(first) for first in starts]


def _joined(parts: list[Mixtures]) -> Mixtures:
    return Mixtures(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def exact(share: float) -> Fraction:
    if not 0 <= share < 0.5:
        raise ValueError(f"the share of a tail must be in [0, 0.5), not {share}: 0.02 is two per cent")
    return Fraction(share).limit_denominator(10**6)


def _count(x: torch.Tensor, share: float) -> int:
    return int(exact(share) * x.shape[1])
