"""Gram matrices, principal axes and shortcuts, against plain float64 computations and points anyone can draw."""

import pytest
import torch

from lib.primitives.linalg import (
    add_gram,
    add_squares,
    complete,
    inverse_factor,
    principal_axes,
    random_rotation,
    remove_mean,
    symmetric_shortcut,
)


def orthonormality_error(q):
    return (q.T @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_principal_axes_of_points_on_a_line():
    points = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-3.0, -3.0]], dtype=torch.float64)
    values, axes = principal_axes(points.T @ points)
    assert torch.allclose(values, torch.tensor([28.0, 0.0], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(axes[:, 0].abs(), torch.full((2,), 0.5**0.5, dtype=torch.float64))


def test_principal_axes_match_the_singular_vectors():
    x = torch.randn(50, 8, dtype=torch.float64, generator=generator())
    values, axes = principal_axes(x.T @ x)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(values, s**2)
    assert torch.allclose((axes * vh.T).sum(0).abs(), torch.ones(8, dtype=torch.float64))  # equal up to sign
    assert orthonormality_error(axes) < 1e-12


def test_damping_does_not_change_the_kept_subspace():
    """The published code adds 1 % of the mean diagonal before eigh; a multiple of I cannot move an eigenvector."""
    x = torch.randn(200, 16, dtype=torch.float64, generator=generator()) * torch.logspace(0, -2, 16, dtype=torch.float64)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for k in (4, 8, 12):
        projectors = [q[:, :k] @ q[:, :k].T for q in (principal_axes(gram)[1], principal_axes(damped)[1])]
        assert torch.allclose(*projectors, atol=1e-10)


def test_equal_eigenvalues_give_the_same_projector():
    basis = random_rotation(6, generator())
    gram = basis @ torch.diag(torch.tensor([5.0, 5.0, 5.0, 1.0, 1.0, 0.0], dtype=torch.float64)) @ basis.T
    axes = principal_axes(gram)[1]
    assert torch.allclose(axes[:, :3] @ axes[:, :3].T, basis[:, :3] @ basis[:, :3].T, atol=1e-12)


def test_chunked_float32_gram_with_massive_activations():
    """Dynamic range 1e4 and two coordinates 1,000 times larger still: every entry is accurate relative to its own scale."""
    x = torch.randn(20_000, 64, generator=generator()) * torch.logspace(0, -4, 64)
    x[:, 3] *= 1e3
    x[::100, 40] += 1e3
    exact = x.double().T @ x.double()
    ours = add_gram(torch.zeros(64, 64, dtype=torch.float64), x)
    scale = exact.diagonal().sqrt()
    assert ((ours - exact).abs() / (scale[:, None] * scale)).max() < 1e-6
    for k in (8, 32):
        a, b = principal_axes(ours)[1][:, :k], principal_axes(exact)[1][:, :k]
        assert torch.linalg.matrix_norm(a @ a.T - b @ b.T, 2) < 1e-4


def test_gram_streams_into_the_same_total():
    x = torch.randn(10_000, 12, dtype=torch.float64, generator=generator())
    total = torch.zeros(12, 12, dtype=torch.float64)
    for part in x.split(777):
        add_gram(total, part)
    assert torch.allclose(total, x.T @ x, rtol=1e-12)


def test_bad_gram_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        principal_axes(torch.full((3, 3), float("nan"), dtype=torch.float64))


def test_random_rotation_is_orthogonal_seeded_and_uniform():
    q = random_rotation(40, generator(3))
    assert orthonormality_error(q) < 1e-13
    assert torch.equal(q, random_rotation(40, generator(3)))
    assert not torch.allclose(q, random_rotation(40, generator(4)))
    # Haar: the trace of a random rotation has mean 0 and variance 1; QR without the sign fix has mean far from 0
    g = generator(5)
    traces = torch.stack([random_rotation(8, g).trace() for _ in range(2000)])
    assert traces.mean().abs() < 0.1
    assert abs(traces.var() - 1) < 0.15


@pytest.mark.parametrize("k", [1, 7, 10, 15, 19, 20])
def test_symmetric_shortcut(k):
    d = 20
    a, axes = random_rotation(d, generator(1))[:, :k], random_rotation(d, generator(2))
    b, c = symmetric_shortcut(a, axes, k)
    assert orthonormality_error(b) < 1e-12
    assert torch.allclose(b @ b.T, axes[:, :k] @ axes[:, :k].T, atol=1e-12)  # the same subspace
    assert torch.allclose(a.T @ b, torch.eye(k, dtype=torch.float64) - c @ c.T, atol=1e-12)
    assert c.shape == (k, min(k, d - k))


@pytest.mark.parametrize(("j", "k"), [(4, 4), (4, 9), (12, 15), (15, 15), (12, 20)])
def test_symmetric_shortcut_is_the_polar_form(j, k):
    """Against singular value decompositions of AᵀB itself; with a next subspace that is wider, too."""
    d = 20
    before, axes = random_rotation(d, generator(1)), random_rotation(d, generator(2))
    a, kept = before[:, :j], axes[:, :k]
    b, c = symmetric_shortcut(a, axes, k, outside=before[:, j:])
    left, cosine, _ = torch.linalg.svd(a.T @ kept)
    polar = left @ torch.diag(cosine) @ left.T
    assert torch.allclose(a.T @ b, torch.cat([polar, torch.zeros(j, k - j)], dim=1), atol=1e-12)
    assert torch.allclose(torch.eye(j) - c @ c.T, polar, atol=1e-12)
    assert orthonormality_error(b) < 1e-12
    assert torch.allclose(b @ b.T, kept @ kept.T, atol=1e-12)
    assert torch.allclose(c.square().sum(0), (1 - cosine).flip(0)[: min(j, d - k)].sort(descending=True)[0], atol=1e-12)


def test_symmetric_shortcut_between_orthogonal_subspaces():
    """A principal angle of 90 degrees, where AᵀB is singular and its polar form not unique: any basis will do."""
    d, k = 8, 5
    before = random_rotation(d, generator(1))
    axes = before[:, [5, 6, 2, 3, 4, 0, 1, 7]]  # two kept directions change places with two deleted ones
    b, c = symmetric_shortcut(before[:, :k], axes, k, outside=before[:, k:])
    assert orthonormality_error(b) < 1e-12
    assert torch.allclose(b @ b.T, axes[:, :k] @ axes[:, :k].T, atol=1e-12)
    assert torch.allclose(before[:, :k].T @ b, torch.eye(k, dtype=torch.float64) - c @ c.T, atol=1e-12)
    assert torch.allclose(c.square().sum(0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12)


def test_symmetric_shortcut_keeps_tiny_angles():
    """Two subspaces 1e-9 apart: sin/√(1 + cos) keeps the angle, 1 - cos computed directly would be zero."""
    d, k, angle = 6, 3, 1e-9
    a = torch.eye(d, dtype=torch.float64)[:, :k]
    turn = torch.eye(d, dtype=torch.float64)
    turn[0, 0] = turn[3, 3] = torch.cos(torch.tensor(angle))
    turn[3, 0], turn[0, 3] = angle, -angle
    _, c = symmetric_shortcut(a, turn, k)
    assert abs(c.norm().item() - angle / 2**0.5) < 1e-13


def test_complete_starts_with_the_given_columns():
    a = random_rotation(9, generator())[:, :4]
    q = complete(a)
    assert torch.equal(q[:, :4], a)
    assert orthonormality_error(q) < 1e-12
    assert complete(q) is q


def test_remove_mean_is_the_centring_matrix():
    x = torch.randn(4, 7, dtype=torch.float64, generator=generator())
    m = torch.eye(7, dtype=torch.float64) - 1 / 7
    assert torch.allclose(remove_mean(x), x @ m)
    assert torch.allclose(remove_mean(x.T, dim=0), m @ x.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squares_are_the_diagonal_of_the_gram(dtype):
    x = (torch.randn(10_000, 12, generator=generator()) * torch.logspace(2, -2, 12)).to(dtype)
    total = torch.zeros(12, dtype=torch.float64)
    for part in x.split(777):
        add_squares(total, part)
    assert torch.allclose(total, x.double().square().sum(0), rtol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("tokens", [4, 200])
def test_inverse_factor(tokens, damping):
    x = torch.randn(tokens, 16, dtype=torch.float64, generator=generator())
    x[:, 5] = 0
    gram = x.T @ x
    damped = gram + damping * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    damped[5, 5] += 1
    u = inverse_factor(gram, damping)
    assert torch.equal(u, u.triu())
    assert (u.diagonal() > 0).all()
    assert torch.allclose(u.T @ u, torch.linalg.inv(damped), rtol=1e-10, atol=1e-12)
    assert torch.equal(gram, x.T @ x)  # the argument is left alone
