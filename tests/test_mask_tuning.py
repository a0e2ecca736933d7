"""Scores, multipliers and the sequential removal against explicit matrices, dense least squares and brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.papers import mask_tuning
from lib.papers.mask_tuning import (
    FLOOR,
    METRICS,
    Sums,
    System,
    condition_indices,
    downdated_condition,
    removal_condition,
    removals,
    ridge_scale,
    ridged_inverse,
    tuned,
)
from lib.suite.experiments import TRAPS
from tests.conftest import relative

SMALL = 1e-9  # a ridge that leaves what an unridged formula says


def layer(n: int = 12, d: int = 5, tokens: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [t, n], weight [n, d] and what the wanted output is beyond their product [t, d]."""
    generator = torch.Generator().manual_seed(seed)
    x, w, beyond = (torch.randn(*shape, generator=generator).double() for shape in ((tokens, n), (n, d), (tokens, d)))
    return x, w * torch.linspace(0.5, 2, n).double()[:, None], 0.3 * beyond


def system(x: torch.Tensor, w: torch.Tensor, beyond: torch.Tensor | None = None, keep_gram: bool = False) -> System:
    sums = Sums(w)
    sums.add(x, beyond)
    return sums.system(keep_gram)


def columns(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A [t d, n], what a neuron adds to the output, divided by √t."""
    return torch.einsum("tn,nd->tdn", x, w).flatten(0, 1) / len(x) ** 0.5


def fresh(x, w, beyond, keep: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Multipliers [kept] by dense least squares with the ridge as extra equations, nothing shared with the library."""
    a = columns(x, w)
    energies = a.square().sum(0)
    ridge = (epsilon * energies.clamp(min=FLOOR * energies.mean())).sqrt()[keep]
    wanted = (x @ w + beyond).flatten() / len(x) ** 0.5
    return torch.linalg.lstsq(torch.cat([a[:, keep], ridge.diag()]), torch.cat([wanted, ridge]), driver="gelsd").solution


def walk(s: System, count: int, **options) -> tuple[list[int], torch.Tensor]:
    """The first `count` neurons that go, and the multipliers [n] then."""
    steps, gone = removals(s, **options), []
    m = next(steps)[1]
    for _ in range(count):
        i, m = next(steps)
        gone.append(i)
    return gone, m.clone()


def others(n: int, gone: list[int]) -> torch.Tensor:
    return torch.tensor([i for i in range(n) if i not in set(gone)])


# --- the system -----------------------------------------------------------------------------------------------------------


def test_system_is_that_of_the_explicit_matrix():
    x, w, beyond = layer()
    s, a = system(x, w, beyond, keep_gram=True), columns(x, w)
    wanted = (x @ w + beyond).flatten() / len(x) ** 0.5
    assert relative(s.h, a.T @ a) < 1e-12
    assert relative(s.drift, a.T @ wanted - s.h.sum(1)) < 1e-12
    assert relative(s.gram, x.T @ x / len(x)) < 1e-12
    assert relative(s.energy, x.square().mean(0)) < 1e-12
    assert s.wanted == pytest.approx(float(wanted.square().sum()), rel=1e-12)
    m = torch.randn(12, generator=torch.Generator().manual_seed(3)).double()
    loss = float((a @ m - wanted).square().sum())
    assert s.loss(m) == pytest.approx(loss, rel=1e-12)
    assert s.error(m) == pytest.approx(loss / float(wanted.square().sum()), rel=1e-12)


@given(st.lists(st.integers(1, 39), max_size=5), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_any_cut_into_batches_and_repeated_data_give_the_same_system(cuts, repeats):
    x, w, beyond = layer()
    whole, sums = system(x, w, beyond), Sums(w)
    edges = [0, *sorted(set(cuts)), 40]
    for _ in range(repeats):
        for start, end in itertools.pairwise(edges):
            sums.add(x[start:end], beyond[start:end])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_tuning, "PANEL", 5)  # does not divide n
        s = sums.system()
    assert relative(s.h, whole.h) < 1e-12
    assert relative(s.drift, whole.drift) < 1e-12
    assert s.gap == pytest.approx(whole.gap, rel=1e-12)


def test_half_precision_activations_are_not_summed_in_half_precision():
    x, w, beyond = layer()
    x, w, beyond = x.bfloat16(), w.bfloat16(), beyond.bfloat16()
    s, exact = system(x, w, beyond), system(x.double(), w.double(), beyond.double())
    assert relative(s.h, exact.h) < 1e-6
    assert relative(s.drift, exact.drift) < 1e-5


def test_no_token_and_broken_activations_are_refused():
    x, w, _ = layer()
    with pytest.raises(ValueError, match="no token"):
        Sums(w).system()
    x[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        system(x, w)


# --- one neuron's score ---------------------------------------------------------------------------------------------------


def distances(a: torch.Tensor) -> torch.Tensor:
    """Distance of every column from the span of the others, by dense least squares."""
    found = []
    for i in range(a.shape[1]):
        rest = a[:, others(a.shape[1], [i])]
        found.append((a[:, i] - rest @ torch.linalg.lstsq(rest, a[:, i : i + 1], driver="gelsd").solution[:, 0]).norm())
    return torch.stack(found)


def test_c1_is_the_distance_from_the_span_of_the_others():
    x, w, _ = layer()
    s, a = system(x, w, keep_gram=True), columns(x, w)
    assert relative(METRICS["C1 once"](s, epsilon=SMALL), distances(a)) < 1e-6
    assert relative(METRICS["C0"](s), a.norm(dim=0)) < 1e-12
    assert relative(condition_indices(s, SMALL), a.norm(dim=0) / distances(a)) < 1e-6
    assert relative(METRICS["C1-G"](s, epsilon=SMALL), w.norm(dim=1) * distances(x / 40**0.5)) < 1e-6


def test_condition_index_is_one_for_columns_at_right_angles_and_for_the_dead():
    x, w, _ = layer(n=6)
    x = torch.linalg.qr(x).Q * torch.arange(1, 7)
    x[:, 2] = 0
    assert relative(condition_indices(system(x, w)), torch.ones(6).double()) < 1e-12


def invariances(x, w):
    generator = torch.Generator().manual_seed(8)
    n, d = w.shape
    c = torch.rand(n, generator=generator).double() + 0.2
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator).double()).Q
    order = torch.randperm(n, generator=generator)
    every = torch.arange(n)
    yield "neuron scale", x * c, w / c[:, None], 1.0, every
    yield "output rotation", x, w @ rotation, 1.0, every
    yield "all inputs scaled", x * 7, w, 7.0, every
    yield "permutation", x[:, order], w[order], 1.0, order


@pytest.mark.parametrize("name", ["C0", "C1 once", "C2", "trap 1", "trap 2"])
def test_scores_do_not_depend_on_how_a_layer_is_written(name):
    x, w, _ = layer()
    score = (METRICS | TRAPS)[name]
    scores = score(system(x, w))
    for what, x2, w2, factor, order in invariances(x, w):
        expected = scores[order] * (factor if name in ("C0", "C1 once", "C2") else 1)
        assert relative(score(system(x2, w2)), expected) < 1e-8, what


def test_sequential_removal_does_not_depend_on_how_a_layer_is_written():
    x, w, _ = layer()
    gone, m = walk(system(x, w), 7)
    for what, x2, w2, _, order in invariances(x, w):
        gone2, m2 = walk(system(x2, w2), 7)
        assert [int(order[i]) for i in gone2] == gone, what
        assert relative(m2, m[order]) < 1e-9, what


# --- sequential removal and tuning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [200, 4], ids=["many tokens", "fewer equations than neurons"])
@pytest.mark.parametrize("panel", [1, 7, 64])
def test_every_step_is_a_fresh_solve_and_costs_what_the_score_says(tokens, panel):
    x, w, beyond = layer(n=30, tokens=tokens)
    s, epsilon, gone = system(x, w, beyond), 0.01, []
    ridge = epsilon * ridge_scale(s.h)

    def objective(m):
        return s.loss(m) + float((ridge * (m - 1).square()).sum())

    def best(gone):
        keep, m = others(30, gone), torch.zeros(30).double()
        m[keep] = fresh(x, w, beyond, keep, epsilon)
        return m

    before = objective(best([]))
    steps = removals(s, epsilon, panel=panel)
    assert relative(next(steps)[1], best([])) < 1e-8
    for i, m in steps:
        if len(gone) < 4:  # brute force: no other removal costs less
            costs = {j: objective(best([*gone, j])) for j in range(30) if j not in gone}
            assert costs[i] == pytest.approx(min(costs.values()), rel=1e-9)
        gone.append(i)
        assert relative(m, best(gone)) < 1e-7 if len(gone) < 30 else not m.any()
        assert objective(m) > before - 1e-9
        before = objective(m)
    assert sorted(gone) == list(range(30))


def test_tuned_is_the_fresh_solve_and_the_walk_reaches_the_same():
    x, w, beyond = layer()
    s = system(x, w, beyond)
    gone, m = walk(s, 5)
    keep = others(12, gone)
    assert relative(tuned(s, keep), fresh(x, w, beyond, keep, 0.01)) < 1e-8
    assert relative(tuned(s, keep), m[keep]) < 1e-9


def test_order_is_followed_and_tuned_all_the_same():
    x, w, beyond = layer()
    s, order = system(x, w, beyond), [7, 2, 11, 0, 1, 3, 4, 5, 6, 8, 9, 10]
    gone, m = walk(s, 4, order=order)
    assert gone == order[:4]
    assert relative(m[others(12, gone)], fresh(x, w, beyond, others(12, gone), 0.01)) < 1e-8


def test_residuals_of_single_and_joint_removals_follow_the_closed_form():
    x, w, _ = layer()
    s, a = system(x, w), columns(x, w)
    q = ridged_inverse(s.h, SMALL * ridge_scale(s.h))
    for gone in ([3], [1, 4, 8]):
        keep = others(12, gone)
        rest = a.sum(1) - a[:, keep] @ torch.linalg.lstsq(a[:, keep], a.sum(1)[:, None], driver="gelsd").solution[:, 0]
        ones = torch.ones(len(gone)).double()
        closed = float(ones @ torch.linalg.solve(q[gone][:, gone], ones))
        assert closed == pytest.approx(float(rest.square().sum()), rel=1e-6)


def test_float32_and_float64_remove_the_same_neurons():
    x, w, beyond = layer(n=200, d=24, tokens=600)
    double, single = system(x, w, beyond), Sums(w.float(), precision=torch.float32)
    single.add(x.float(), beyond.float())
    (gone, m), (gone32, m32) = walk(double, 60), walk(single.system(), 60)
    assert gone32 == gone
    assert (m32.double() - m).abs().max() < 1e-4


def test_nothing_pruned_and_nothing_else_wanted_gives_exactly_one():
    x, w, _ = layer()
    s = system(x, w, torch.zeros(40, 5).double())
    assert (tuned(s, torch.arange(12)) == 1).all()
    assert (walk(s, 0)[1] == 1).all()
    assert s.loss(torch.ones(12)) == 0


@given(st.integers(0, 50), st.integers(1, 11), st.sampled_from([1e-4, 0.01, 1.0]))
@settings(max_examples=30, deadline=None)
def test_tuning_never_raises_the_loss(seed, count, epsilon):
    x, w, beyond = layer(seed=seed)
    s = system(x, w, beyond)
    gone, m = walk(s, count, epsilon=epsilon)
    plain = torch.ones(12).double()
    plain[gone] = 0
    assert s.loss(m) <= s.loss(plain) * (1 + 1e-12)


def test_multipliers_go_to_one_and_their_variance_falls_as_the_ridge_grows():
    x, w, beyond = layer(n=30, tokens=200)
    s, keep = system(x, w, beyond), torch.arange(3, 30)
    found = [tuned(s, keep, epsilon) for epsilon in (1e-4, 1e-2, 1, 1e2, 1e8)]
    variances = [float(m.var(correction=0)) for m in found]
    assert variances == sorted(variances, reverse=True)
    assert variances[0] > 1e-3
    assert (found[-1] - 1).abs().max() < 1e-6


def test_multipliers_may_be_negative():
    x, w, _ = layer(n=3)
    beyond = -3 * x[:, :1] * w[:1]  # the output of neuron 0 is wanted with the sign turned round, twice over
    assert tuned(system(x, w, beyond), torch.arange(3), SMALL)[0] == pytest.approx(-2, abs=1e-6)


# --- hard layers ----------------------------------------------------------------------------------------------------------


def with_twins() -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons 0 and 1 are the same, and as strong as the strongest other."""
    x, w, _ = layer()
    x[:, 1], w[1] = x[:, 0], w[0]
    x[:, :2] *= 4
    return x, w


def test_of_twins_one_goes_and_the_other_doubles():
    s = system(*with_twins())
    (first,), m = walk(s, 1, epsilon=1e-6)
    assert first in (0, 1)
    assert m[1 - first] == pytest.approx(2, abs=1e-4)
    gone, _ = walk(s, 2, epsilon=1e-6)
    assert not {0, 1} <= set(gone)


def test_ranked_once_both_twins_go():
    """What is wrong with scoring only once, and why C1 is sequential: each twin looks replaceable by the other."""
    s = system(*with_twins())
    assert set(METRICS["C1 once"](s, epsilon=1e-6).argsort()[:2].tolist()) == {0, 1}


@pytest.mark.parametrize("where", ["activations", "weights"])
def test_dead_neurons_score_zero_go_first_and_keep_one(where):
    x, w, beyond = layer()
    dead = [2, 9]
    if where == "activations":
        x[:, dead] = 0
    else:
        w[dead] = 0
    s = system(x, w, beyond, keep_gram=True)
    assert s.dead.nonzero()[:, 0].tolist() == dead
    for name in ("C0", "C1 once", "C1-G", "C2"):
        scores = METRICS[name](s)
        assert (scores[dead] == 0).all(), name
        assert (scores[others(12, dead)] > 0).all(), name
    assert (tuned(s, torch.arange(12))[dead] == 1).all()
    start, m = walk(s, 0)[1], walk(s, 2)[1]
    assert set(walk(s, 2)[0]) == set(dead)
    assert (start[dead] == 1).all()
    assert relative(m[others(12, dead)], start[others(12, dead)]) < 1e-12


def test_nearly_dead_neurons_are_held_by_the_ridge():
    """10^-11 of the mean is alive, and a ridge relative to it would leave a multiplier of thousands for the least drift."""
    x, w, _ = layer(tokens=400)
    x[:, 5] *= 1e-6
    beyond = 0.01 * torch.randn(400, 5, generator=torch.Generator().manual_seed(2)).double()
    s = system(x, w, beyond)
    assert not s.dead.any()
    unheld = 1 + s.drift[5] / (s.h[5, 5] * 1.01)
    assert unheld.abs() > 100
    assert (walk(s, 0)[1] - 1).abs().max() < 0.1
    assert walk(s, 1)[0] == [5]


def test_a_massive_neuron_stays_but_the_traps_take_it_first():
    x, w, _ = layer(n=16, d=12, tokens=300)
    w = w / w.norm(dim=1, keepdim=True)
    x[:, 6] *= 100
    s = system(x, w)
    for name in ("C0", "C1 once", "C2"):
        assert int(METRICS[name](s).argmax()) == 6, name
    assert 6 not in walk(s, 15)[0]
    for name, trap in TRAPS.items():
        assert int(trap(s).argmin()) == 6, name


def test_a_layer_of_the_dead_has_finite_scores():
    x, w, _ = layer()
    s = system(torch.zeros_like(x), w)
    assert s.dead.all()
    assert s.error(torch.zeros(12)) == 0
    assert (METRICS["C1 once"](s) == 0).all()
    assert (METRICS["C0"](s) == 0).all()
    assert (tuned(s, torch.arange(3, 12)) == 1).all()


def test_a_system_without_ridge_that_is_singular_is_refused():
    s = system(*with_twins())
    with pytest.raises(ValueError, match="larger epsilon"):
        ridged_inverse(s.h - 1e-6 * torch.eye(12), 0.0 * ridge_scale(s.h) + 1e-300)


# --- C2 -------------------------------------------------------------------------------------------------------------------


def ridged(u: torch.Tensor, epsilon: float) -> torch.Tensor:
    b = u.T @ u
    return b + epsilon * b.trace() / len(b) * torch.eye(len(b)).double()


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_condition_after_a_removal_is_that_of_the_matrix(epsilon):
    _, u, _ = layer(n=14, d=5)
    b = ridged(u, epsilon)
    for i, ratio in enumerate(removal_condition(u, epsilon)):
        after = b - torch.outer(u[i], u[i])
        frobenius = [(m.trace() * torch.linalg.inv(m).trace()).sqrt() for m in (after, b)]
        assert float(ratio) == pytest.approx(float(frobenius[0] / frobenius[1]), rel=1e-8)


def test_the_only_supplier_of_an_output_direction_is_kept():
    """Leverage 1 up to the ridge: the condition explodes, but stays a number, and γ says how much that counts."""
    x, w, _ = layer()
    w[:, 4] = 0
    w[3] = torch.tensor([0, 0, 0, 0, 0.2]).double()
    s = system(x, w)
    ratio = removal_condition(s.energy.sqrt()[:, None] * w)
    assert torch.isfinite(ratio).all()
    assert int(ratio.argmax()) == 3
    assert ratio[3] > 20
    assert int(METRICS["C0"](s).argmin()) == 3  # by magnitude alone it would go first
    assert relative(downdated_condition(s, gamma=0.0), METRICS["C0"](s)) < 1e-12
    assert int(downdated_condition(s).argmin()) != 3
    assert torch.isfinite(removal_condition(w, epsilon=1e-15)).all()  # leverage 1 to the last digit


def test_trap_one_is_the_condition_of_the_system_without_a_neuron():
    x, w, _ = layer()
    s = system(x, w)
    b = s.h + 0.01 * torch.diag(ridge_scale(s.h))
    brute = []
    for i in range(12):
        rest = others(12, [i])
        part = b[rest][:, rest]
        brute.append((part.trace() * torch.linalg.inv(part).trace()).sqrt())
    assert relative(TRAPS["trap 1"](s), torch.stack(brute)) < 1e-9


def test_controls_know_nothing_of_the_data():
    x, w, _ = layer()
    a, b = system(x, w), system(3 * x.flip(0) + 1, w)
    assert relative(METRICS["weight norm"](a), w.norm(dim=1)) < 1e-12
    for name in ("weight norm", "random"):
        assert torch.equal(METRICS[name](a, seed=4), METRICS[name](b, seed=4))
    assert not torch.equal(METRICS["random"](a, seed=4), METRICS["random"](a, seed=5))
