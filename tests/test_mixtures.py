"""Batched mixtures: every step an ascent, the answers of scikit-learn, and exactly the tails that the density rule flags."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mixtures import agreement, heavy_tailed, real_scores
from lib.papers import mixtures
from lib.papers.mixtures import (
    FLOOR,
    cells,
    clipped,
    expectation_maximisation,
    fit,
    low_density_tails,
    robust,
    starts,
    trimmed_mean,
    winsorised,
)

SEEDS = st.integers(0, 2**31)


def scores(rows=16, values=300, seed=0):
    return heavy_tailed(rows, values, seed).double()


def sorted_robust(x):
    return robust(x.sort(dim=1).values)


def normal_density(z, mean, variance):
    return math.exp(-((z - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def tails_by_hand(z, mixture, row):
    """The rule of the paper for one sorted row, value by value."""
    parts = [[float(v) for v in t[row]] for t in (mixture.weights, mixture.means, mixture.variances)]
    density = [sum(w * normal_density(float(v), mu, s) for w, mu, s in zip(*parts, strict=True)) for v in z]
    threshold = torch.tensor(density, dtype=torch.float64).quantile(0.02).item()
    low = [p < threshold for p in density]
    left = next((i for i, flag in enumerate(low) if not flag), len(low))
    right = next((i for i, flag in enumerate(reversed(low)) if not flag), len(low))
    return left, right


# --- expectation and maximisation ------------------------------------------------------------------------------------


def literal_em(z, weights, means, variances, steps):
    """EM on one row as in a textbook, in plain numbers."""
    z, w, mu, s = z.tolist(), weights.tolist(), means.tolist(), variances.tolist()
    for _ in range(steps):
        joint = [[w[k] * normal_density(v, mu[k], s[k]) for k in range(len(w))] for v in z]
        share = [[p / sum(row) for p in row] for row in joint]
        for k in range(len(w)):
            mass = sum(row[k] for row in share)
            w[k], mu[k] = mass / len(z), sum(row[k] * v for row, v in zip(share, z, strict=True)) / mass
            s[k] = max(FLOOR, sum(row[k] * (v - mu[k]) ** 2 for row, v in zip(share, z, strict=True)) / mass)
    likelihood = sum(math.log(sum(w[k] * normal_density(v, mu[k], s[k]) for k in range(len(w)))) for v in z) / len(z)
    return w, mu, s, likelihood


@pytest.mark.parametrize("start", ["scale", "quantile"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_textbook_em(monkeypatch, k, start):
    monkeypatch.setattr(mixtures, "ITERATIONS", 7)
    monkeypatch.setattr(mixtures, "TOLERANCE", -1.0)
    data = cells(sorted_robust(scores(3, 90)))
    begin = starts(data, k, start)
    found = expectation_maximisation(data, *begin)
    for row in range(3):
        expected = literal_em(data.means[row], *(t[row] for t in begin), 7)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[row], torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("values", [300, 4096])
def test_likelihood_never_falls(monkeypatch, values):
    data = cells(sorted_robust(scores(6, values)))
    assert (data.variances is None) == (values == 300)
    monkeypatch.setattr(mixtures, "TOLERANCE", -1.0)
    for k in (2, 3, 5):
        path = []
        for steps in range(0, 30, 3):
            monkeypatch.setattr(mixtures, "ITERATIONS", steps)
            path.append(expectation_maximisation(data, *starts(data, k), floor=1e-12)[3])
        path = torch.stack(path)
        assert (path.diff(dim=0) > -1e-12).all()
        assert (path[-1] - path[0]).max() > 1e-3


def test_a_frozen_row_does_not_depend_on_its_neighbours():
    x = scores(12, 400)
    together, alone = fit(x), [fit(row[None]) for row in x]
    for name, value in vars(together).items():
        torch.testing.assert_close(value, torch.cat([vars(one)[name] for one in alone]), rtol=1e-9, atol=1e-9)


def test_rows_in_chunks_and_repeats_give_the_same(monkeypatch):
    x = scores(20, 400).float()
    whole = clipped(x)
    assert torch.equal(clipped(x), whole)
    monkeypatch.setitem(mixtures.WORK, "cpu", 5000)
    torch.testing.assert_close(clipped(x), whole)


def test_bic_counts_parameters_and_prefers_fewer_components():
    x = scores(5, 350)
    found = fit(x, (1, 2, 3))
    data = cells(sorted_robust(x))
    for i, k in enumerate((1, 2, 3)):
        likelihood = 350 * expectation_maximisation(data, *starts(data, k))[3]
        torch.testing.assert_close(found.bic[:, i], -2 * likelihood + (3 * k - 1) * math.log(350))
    assert torch.equal(found.chosen, found.bic.argmin(dim=1) + 1)
    assert ((found.weights > 0).sum(dim=1) == found.chosen).all()
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_one_component_is_mean_and_variance():
    x = scores(4, 200)
    z, found = sorted_robust(x), fit(x, (1,))
    torch.testing.assert_close(found.means[:, 0], z.mean(1))
    torch.testing.assert_close(found.variances[:, 0], z.var(dim=1, correction=0))


def test_two_far_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1, 300, generator=generator) - 10, torch.randn(1, 700, generator=generator) * 2 + 10], dim=1)
    found = fit(x.double(), start="quantile", binned=False)
    assert found.chosen.item() == 2
    torch.testing.assert_close(found.weights[0, :2].sort().values, torch.tensor([0.3, 0.7]).double(), atol=1e-3, rtol=0)


# --- cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [512, 577, 640, 1000, 4096, 12288])
def test_cells_keep_count_mean_and_variance(values):
    z = sorted_robust(scores(4, values))
    data = cells(z)
    assert data.counts.sum() == values
    assert (data.counts[:64] == 1).all()
    assert (data.counts[-64:] == 1).all()
    assert torch.equal(data.means[:, :64], z[:, :64])
    assert torch.equal(data.means[:, -64:], z[:, -64:])
    torch.testing.assert_close(data.means @ data.counts, z.sum(1))
    torch.testing.assert_close((data.means.square() + data.variances) @ data.counts, z.square().sum(1))
    assert len(data.counts) < 640 + 128


def test_cells_grow_towards_the_middle_and_short_rows_stay():
    assert len(cells(torch.zeros(1, 576)).counts) == 182
    assert len(cells(torch.zeros(1, 4096)).counts) == 248
    assert cells(torch.zeros(1, 511)).variances is None
    assert cells(torch.zeros(1, 4096), binned=False).variances is None
    counts = cells(torch.zeros(1, 4097)).counts
    assert torch.equal(counts, counts.flip(0))
    beyond = counts.cumsum(0) - counts
    inner = (beyond >= 64) & (beyond < 2048)
    assert (counts[inner] <= beyond[inner] / 16).all()


def test_binned_fits_choose_and_clip_as_unbinned_ones():
    x = heavy_tailed(64, 4096)
    binned, whole = fit(x), fit(x, binned=False)
    assert (binned.chosen == whole.chosen).float().mean() > 0.95
    for ours, theirs in zip(low_density_tails(x, binned), low_density_tails(x, whole), strict=True):
        assert (ours - theirs).abs().max() <= 2


def test_rows_as_wide_as_a_small_model_are_clipped_as_without_cells():
    x = heavy_tailed(400, 576)
    binned, whole = fit(x), fit(x.double(), binned=False)
    assert (binned.chosen == whole.chosen).double().mean() >= 0.98
    torch.testing.assert_close(binned.log_likelihood.double(), whole.log_likelihood, atol=2e-3, rtol=0)
    same = [ours == theirs for ours, theirs in zip(low_density_tails(x, binned), low_density_tails(x, whole), strict=True)]
    assert (same[0] & same[1]).double().mean() >= 0.98


# --- scikit-learn ------------------------------------------------------------------------------------------------------


def test_agrees_with_scikit_learn_on_real_scores():
    found = agreement(real_scores(120))
    assert (found["chosen, ours"] == found["chosen, scikit-learn"]).float().mean() >= 0.95
    assert (found["chosen, ours, binned"] == found["chosen, scikit-learn"]).float().mean() >= 0.95


@pytest.mark.parametrize("x", [lambda: scores(6, 2000), lambda: real_scores(20)], ids=["synthetic", "real"])
def test_log_likelihoods_of_scikit_learn(x):
    """With the floor out of the way: it is a least variance here, a summand there."""
    found = agreement(x().double(), floor=1e-9)
    torch.testing.assert_close(found["likelihood, ours"], found["likelihood, scikit-learn"].double(), atol=1e-3, rtol=0)


# --- tails -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, values=st.sampled_from([50, 64, 201, 700]))
def test_tails_by_hand(seed, values):
    x = scores(3, values, seed)
    mixture = fit(x)
    left, right = low_density_tails(x, mixture)
    z, result = sorted_robust(x), clipped(x)
    assert (left + right <= math.ceil(0.02 * values)).all()
    for row in range(3):
        assert (left[row], right[row]) == tails_by_hand(z[row], mixture, row)
        ordered = x[row].sort().values.clone()
        if left[row]:
            ordered[: left[row]] = ordered[left[row] - 1]
        if right[row]:
            ordered[values - right[row] :] = ordered[values - right[row]]
        assert torch.equal(result[row].sort().values, ordered)


def test_nothing_but_tails_moves():
    x = scores()
    moved = clipped(x) != x
    left, right = low_density_tails(x, fit(x))
    # The innermost flagged score of each run is where the others go: it stays.
    assert torch.equal(moved.sum(1), (left - 1).clamp(min=0) + (right - 1).clamp(min=0))
    assert (x[moved].abs() > clipped(x)[moved].abs()).all()


@pytest.mark.parametrize(("values", "flagged"), [(4096, 82), (12288, 246), (101, 2), (100, 2), (10, 1)])
def test_one_component_flags_the_two_per_cent_farthest_from_the_mean(values, flagged):
    x = scores(6, values)
    left, right = low_density_tails(x, fit(x, (1,), binned=False))
    assert (left + right == flagged).all()
    for row in range(6):
        far = (x[row] - x[row].mean()).abs().argsort(descending=True)[:flagged]
        assert left[row] == (x[row, far] < x[row].mean()).sum()


def test_a_density_with_one_peak_flags_the_whole_share():
    x = scores(40, 1000)
    mixture = fit(x)
    z = sorted_robust(x)
    steps = mixture.log_density(z).diff(dim=1).sign()
    unimodal = (steps.diff(dim=1) <= 0).all(dim=1)
    assert unimodal.sum() > 10
    left, right = low_density_tails(x, mixture)
    assert (left + right)[unimodal].eq(20).all()


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-30, 30), shift=st.integers(-3, 3))
def test_order_scale_and_sign_do_not_matter(seed, exponent, shift):
    x = scores(4, 300, seed)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(clipped(x[:, order]), clipped(x)[:, order])
    moved = clipped(x) != x
    assert torch.equal(clipped((x + shift) * 2.0**exponent) != (x + shift) * 2.0**exponent, moved)
    left, right = low_density_tails(x, fit(x))
    mirrored = low_density_tails(-x, fit(-x))
    assert torch.equal(mirrored[0], right)
    assert torch.equal(mirrored[1], left)


def test_isolated_extreme_scores_are_clipped():
    """The floor's reason: with a tiny one an extreme score gets a component of its own and looks dense."""
    x = scores(64, 1024)
    x[:, 0] = x.abs().amax(dim=1) * 300
    x[:, 1] = -x[:, 0] / 2
    result = clipped(x)
    assert (result[:, :2].abs().amax(dim=1) < x[:, 0] / 100).all()


def test_constant_rows_and_rows_without_spread_are_left_alone():
    x = scores(4, 200)
    x[1] = 3.0
    x[2, :180] = 0.0  # IQR 0 with outliers
    result = clipped(x)
    assert torch.equal(result[1:3], x[1:3])
    assert not torch.equal(result[[0, 3]], x[[0, 3]])


def test_one_mixture_for_a_whole_layer():
    x = scores(40, 200)
    result = clipped(x.reshape(1, -1)).view_as(x)
    assert len(set(result[result != x].tolist())) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    x = scores(8, 300).to(dtype)
    result = clipped(x)
    assert result.dtype == dtype
    left, right = low_density_tails(x, fit(x))
    assert ((result != x).sum(1) <= left + right).all()
    assert (result != x).any()


# --- controls ----------------------------------------------------------------------------------------------------------


def test_controls_by_hand():
    x = torch.arange(200.0).repeat(2, 1)
    x[0, 0], x[0, 199] = -1e4, 1e6
    expected = torch.arange(200.0).clamp(2, 197)
    assert torch.equal(winsorised(x)[0], expected)
    assert torch.equal(winsorised(x.flip(1))[0], expected.flip(0))
    assert trimmed_mean(x)[0] == torch.arange(4.0, 196.0).mean()
    assert torch.equal(winsorised(x, 0.0), x)
    assert trimmed_mean(torch.arange(4096.0)[None] ** 2)[0] == (torch.arange(81.0, 4015.0) ** 2).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(torch.zeros(5)), "at least 4 values"),
        (lambda: clipped(torch.zeros(2, 3)), "at least 4 values"),
        (lambda: clipped(torch.full((2, 8), torch.nan)), "NaN or infinity"),
        (lambda: fit(torch.zeros(2, 8), (0, 1)), "numbers from 1 on"),
        (lambda: fit(torch.zeros(2, 8), ()), "numbers from 1 on"),
        (lambda: fit(torch.zeros(2, 8), start="k-means"), "scale or quantile"),
        (lambda: fit(torch.zeros(2, 8), floor=0.0), "above 0"),
        (lambda: clipped(torch.zeros(2, 8), share=0.5), "share of a tail"),
        (lambda: winsorised(torch.zeros(2, 8), 0.7), "share of a tail"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
