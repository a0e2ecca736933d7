"""Multipliers for neurons: which neurons a linear layer can lose, and how much the others must grow to compensate.

A layer y = Σ_i x_i w_iᵀ with a multiplier m_i per input neuron is linear in m. Its loss is a quadratic form in m, `System`,
of the size of the layer's width, whatever the number of tokens. This file scores it, solves it and updates it after removals.
The functions are pure and independent of models. The sources of COMP (arXiv 2501.15255) state that a least-squares problem and
a matrix condition decide; the formulas are our reading of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lib.primitives.linalg import add_gram, at_least_float32

DEAD = 1e-12  # a neuron whose H_ii is at most this share of the mean contributes nothing
FLOOR = 0.01  # the ridge's scale of a neuron is at least this share of the mean H_ii
PANEL = 1024  # columns of a system's matrix that are made at once
LARGEST = 10.0  # larger multipliers are a sign of a badly conditioned system


@dataclass
class System:
    """The loss of all multipliers, ℓ(m) = (m-1)ᵀH(m-1) - 2 rᵀ(m-1) + γ: mean squared error per token against a wanted output.

    h: H = XᵀX/N ∘ WWᵀ [n, n]; drift: r = g - H1 [n], from the difference between the wanted output and the layer's own (zero if
    they are equal); gap: γ, the loss at m = 1; weight: W [n, d], one row per neuron; energy: mean x_i² [n]; gram: XᵀX/N [n, n],
    kept only where a metric reads it.
    """

    h: torch.Tensor
    drift: torch.Tensor
    gap: float
    weight: torch.Tensor
    energy: torch.Tensor
    gram: torch.Tensor | None = None

    @property
    def wanted(self) -> float:
        """β, the mean squared norm of the wanted output."""
        return float(self.h.sum() + 2 * self.drift.sum()) + self.gap

    def loss(self, m: torch.Tensor) -> float:
        """ℓ(m) for multipliers [n], 0 where a neuron is gone."""
        change = m.to(self.h) - 1
        return float(change @ (self.h @ change) - 2 * self.drift @ change) + self.gap

    def error(self, m: torch.Tensor) -> float:
        """ℓ(m) relative to the wanted output's energy."""
        return self.loss(m) / self.wanted if self.wanted > 0 else 0.0

    @property
    def dead(self) -> torch.Tensor:
        """Which neurons [n] have no output: no activation, or no weight."""
        diagonal = self.h.diagonal()
        return diagonal <= DEAD * diagonal.mean()


class Sums:
    """The sums of a layer's least-squares problem over batches of activations, in any order and of any size.

    weight: W [features, d], one row per input channel. units: a multiplier for every channel, or for this many groups of
    neighbouring channels, equally large. precision: the dtype of the matrix of the sums, [features, features].
    """

    def __init__(self, weight: torch.Tensor, units: int | None = None, precision: torch.dtype = torch.float64):
        n = len(weight)
        self.weight, self.units = weight.detach(), units or n
        self.gram = torch.zeros(n, n, dtype=precision, device=weight.device)
        self.cross = torch.zeros(n, dtype=torch.float64, device=weight.device)
        self.gap, self.tokens = 0.0, 0

    def add(self, x: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """x: activations [t, features]; target: [t, d], the wanted sum of the weighted channels (None: 0).

        If the target is the wanted output minus xW, the sums are those for the change of the multipliers.
        """
        if x.dtype == self.gram.dtype:
            self.gram.addmm_(x.T, x)
        else:
            add_gram(self.gram, x)
        self.tokens += len(x)
        if target is not None:
            x, target = at_least_float32(x), at_least_float32(target)
            self.cross += (x * (target @ self.weight.to(x).T)).sum(0, dtype=torch.float64)
            self.gap += float(target.double().square().sum())

    def normal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, g) over the units: Σ XᵀX ∘ WWᵀ and Σ x ∘ (target Wᵀ). The matrix of the sums is overwritten, panel by panel."""
        h, weight = self.gram, self.weight.to(self.gram.dtype)
        for start in range(0, len(h), PANEL):
            part = slice(start, start + PANEL)
            h[:, part] *= weight @ weight[part].T
        if self.units == len(h):
            return h, self.cross
        each = len(h) // self.units
        return h.view(self.units, each, self.units, each).sum((1, 3)), self.cross.view(self.units, each).sum(1)

    def system(self, keep_gram: bool = False) -> System:
        """The system of a layer with a multiplier per channel, from targets that were the wanted output *minus* its own."""
        if not self.tokens:
            raise ValueError("no token to calibrate on: give longer sequences")
        if not torch.isfinite(self.gram.diagonal()).all() or not math.isfinite(self.gap):
            raise ValueError("activations hold NaN or infinity: run the model in float32 or bfloat16, and check its weights")
        self.gram /= self.tokens
        gram, energy = self.gram.clone() if keep_gram else None, self.gram.diagonal().clone()
        h, drift = self.normal()
        return System(h, (drift / self.tokens).to(h), self.gap / self.tokens, self.weight, energy, gram)


# --- solving --------------------------------------------------------------------------------------------------------------


def ridge_scale(h: torch.Tensor) -> torch.Tensor:
    """D [n], what the ridge of a neuron is relative to: H_ii, but at least `FLOOR` of the mean. 0 marks a dead neuron.

    A ridge relative to H_ii alone cannot hold back a neuron that is nearly dead: a little drift gives it a multiplier of 10^4,
    which hardly changes the output, but is beyond every bound. Measured on trained weights: neurons of 10^-11 of the mean,
    multipliers up to 90,000, and no removal accepted.
    """
    diagonal, mean = h.diagonal(), h.diagonal().mean()
    return torch.where(diagonal <= DEAD * mean, torch.zeros_like(diagonal), diagonal.clamp(min=FLOOR * mean))


def ridged_inverse(h: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """(H + diag(ridge))⁻¹ [n, n], ridge [n]: ε times `ridge_scale`.

    A dead neuron (ridge 0) is cut off from the others and gets the diagonal 1. Raises ValueError where the ridge is too small
    for the precision.
    """
    dead = ridge == 0
    ridged = h.clone().T  # H is symmetric, and LAPACK works in place on columns: one matrix beside H, not two
    if dead.any():
        ridged[dead] = 0
        ridged[:, dead] = 0
    ridged.diagonal().add_(torch.where(dead, torch.ones_like(ridge), ridge))
    failed = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(ridged, out=(ridged, failed))
    if failed:
        raise ValueError("the neurons' system is singular with so small a ridge: use a larger epsilon, 0.01 by default")
    return torch.cholesky_inverse(ridged, out=ridged).T


def acceptable(m: torch.Tensor | None) -> bool:
    """Whether multipliers [n] exist, are finite and at most `LARGEST` in size."""
    return m is not None and bool(torch.isfinite(m).all()) and float(m.abs().max()) <= LARGEST


def tuned(system: System, keep: torch.Tensor, epsilon: float = 0.01) -> torch.Tensor:
    """The multipliers [kept] that bring the kept neurons closest to the wanted output, shrunk towards 1.

    Solves (H_SS + ε D_S)(m_S - 1) = g_S - H_SS 1 by Cholesky; keep: sorted indices S. Without removals and
    drift the result is exactly 1.
    """
    gone = torch.ones(len(system.h), dtype=torch.bool, device=system.h.device)
    gone[keep] = False
    right = system.drift[keep] + system.h[keep][:, gone].sum(1)
    part = system.h[keep][:, keep]
    right = torch.where(system.dead[keep], torch.zeros_like(right), right)
    return 1 + ridged_inverse(part, epsilon * ridge_scale(system.h)[keep]) @ right


def removals(
    system: System, epsilon: float = 0.01, order: Sequence[int] | None = None, panel: int = 64
) -> Iterator[tuple[int | None, torch.Tensor]]:
    """Remove neurons one after the other; yields (None, m) before the first and (neuron, m [n]) after each. m is one buffer.

    The next one has the least m_i²/Q_ii, with Q = (H + εD)⁻¹ of those still there (D: `ridge_scale`): exactly the growth of
    the ridged loss after all others are re-tuned. m stays its exact minimiser: m -= m_i Q_:i / Q_ii, Q -= Q_:i Q_i: / Q_ii.
    With `order` the neurons go in that order instead, with the same tuning. Dead neurons cost nothing and go first.

    The downdates of `panel` removals are kept as columns and applied in one matrix product: only one row and the diagonal
    of Q need to be up to date at each step.
    """
    q = ridged_inverse(system.h, epsilon * ridge_scale(system.h))
    n, dead = len(q), system.dead
    m = 1 + q @ torch.where(dead, torch.zeros_like(system.drift), system.drift)
    yield None, m
    diagonal = q.diagonal().clone()
    gone = torch.zeros_like(dead)
    columns, used = q.new_zeros(panel, n), 0
    for step in range(n):
        # 1. Choose a neuron.
        if order is None:
            cost = (m.square() / diagonal).masked_fill_(dead, 0).masked_fill_(gone, math.inf)
            i = int(cost.argmin())
        else:
            i = int(order[step])
        # 2. Its column of Q, up to date and scaled, gives the change of the multipliers and of the diagonal.
        column = q[i] - columns[:used, i] @ columns[:used]
        column /= column[i].clone().clamp_(min=torch.finfo(q.dtype).tiny).sqrt()
        columns[used] = column
        used += 1
        m -= (m[i] / column[i]) * column
        gone[i] = True
        m[gone] = 0
        diagonal -= column.square()
        # 3. Bring all of Q up to date once in a while.
        if used == panel:
            q.addmm_(columns.T, columns, alpha=-1)
            used = 0
        yield i, m


# --- scoring --------------------------------------------------------------------------------------------------------------
#
# The lowest score goes first. C1, the default, is not in this list: it is `removals`, scored anew after each removal.


def sensitivity(system: System, **_) -> torch.Tensor:
    """C0 [n]: the norm ‖x_i‖‖w_i‖ of a neuron's contribution, the cost of deleting it without repair."""
    return system.h.diagonal().clamp(min=0).sqrt()


def collinearity(system: System, epsilon: float = 0.01, **_) -> torch.Tensor:
    """C1 ranked once [n]: (H⁻¹)_ii^-½, the cost of deleting a neuron when the others are re-tuned. 0 for a dead one.

    It is C0 divided by Stewart's collinearity index √(H_ii (H⁻¹)_ii) of the column. Of two equal neurons both look replaceable.
    """
    return ridged_inverse(system.h, epsilon * ridge_scale(system.h)).diagonal().rsqrt().masked_fill(system.dead, 0)


def collinearity_of_inputs(system: System, epsilon: float = 0.01, **_) -> torch.Tensor:
    """C1-G [n]: ‖w_i‖ (G⁻¹)_ii^-½, the right score if all of W could be refitted and not only multipliers."""
    inverse = ridged_inverse(system.gram, epsilon * ridge_scale(system.gram))
    scores = system.weight.to(system.h).norm(dim=1) * inverse.diagonal().rsqrt()
    return scores.masked_fill(system.dead, 0)


def condition_indices(system: System, epsilon: float = 0.01) -> torch.Tensor:
    """Stewart's κ_i = √(H_ii (H⁻¹)_ii) [n] of every neuron, at least about 1; 1 for a dead one."""
    ridge = epsilon * ridge_scale(system.h)
    index = ((system.h.diagonal() + ridge) * ridged_inverse(system.h, ridge).diagonal()).sqrt()
    return torch.where(system.dead, torch.ones_like(index), index)


def removal_condition(u: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """κ_F(B_-i)/κ_F(B) [n] of B = Σ u_i u_iᵀ when one row of u [n, d] is taken out, κ_F² = tr B tr B⁻¹, in closed form.

    A neuron that alone supplies an output direction has leverage 1 up to the ridge, and a very large ratio.
    """
    u = u.double()
    b = u.T @ u
    values, vectors = torch.linalg.eigh(b)
    values = values.clamp(min=0) + epsilon * values.sum() / len(b)
    z = (u @ vectors).square()
    leverage = (z / values).sum(1).clamp(max=1 - 1e-12)
    trace, inverse = values.sum(), values.reciprocal().sum()
    after = (trace - z.sum(1)) * (inverse + (z / values.square()).sum(1) / (1 - leverage))
    return (after.clamp(min=0) / (trace * inverse)).sqrt()


def scaled_weights(system: System) -> torch.Tensor:
    return system.energy.double().clamp(min=0).sqrt()[:, None] * system.weight.double()


def downdated_condition(system: System, gamma: float = 1.0, **_) -> torch.Tensor:
    """C2 [n]: C0 times (κ_F(B_-i)/κ_F(B))^γ, with B the second moment of the rows ‖x_i‖ w_i in output space."""
    return sensitivity(system).double() * removal_condition(scaled_weights(system)) ** gamma


def weight_norm(system: System, **_) -> torch.Tensor:
    """‖w_i‖ [n], no data."""
    return system.weight.double().norm(dim=1)


def random_scores(system: System, seed: int = 0, **_) -> torch.Tensor:
    """Random scores [n]: the control."""
    return torch.rand(len(system.h), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(system.h.device)


SEQUENTIAL = "C1"
METRICS: dict[str, Callable[..., torch.Tensor] | None] = {
    SEQUENTIAL: None,
    "C1 once": collinearity,
    "C1-G": collinearity_of_inputs,
    "C0": sensitivity,
    "C2": downdated_condition,
    "weight norm": weight_norm,
    "random": random_scores,
}
