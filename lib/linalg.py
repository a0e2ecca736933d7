"""Pure tensor maths: Gram matrices, principal axes, and the algebra between neighbouring subspaces.

Nothing here knows about models. Functions take and return tensors on the device they were given.
"""

from __future__ import annotations

import torch

GRAM_CHUNK = 4096  # rows; float32 sums stay short, float64 carries the total


def add_gram(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add XᵀX to `total` in place, streaming. total: float64 [d, d]; x: [n, d] of any float dtype.

    Chunks of at most 4,096 rows are multiplied in float32 (float64 input stays float64) and summed in float64: the
    speed of float32 with an error that does not grow with the number of rows.
    """
    x = x if x.dtype == torch.float64 else x.float()
    for chunk in x.split(GRAM_CHUNK):
        total += chunk.T @ chunk
    return total


def principal_axes(gram: torch.Tensor, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d], largest first and never negative, and eigenvectors [d, d] in columns, of a Gram matrix.

    This is uncentred PCA (SliceGPT, section 3.4). `dtype` exists to show what a float32 decomposition costs (paper
    Table 4); the result is float64 either way. Raises ValueError for a Gram matrix that is not finite.
    """
    if gram.device.type != "meta" and not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or infinity: the model's weights or activations are broken")
    values, vectors = torch.linalg.eigh(((gram + gram.T) / 2).to(dtype))
    return values.flip(0).clamp(min=0).double(), vectors.flip(1).double()


def random_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix [n, n] in float64: QR of a Gaussian matrix with the signs of R fixed."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def coordinate_axes(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies [d], largest first, and the permutation matrix [d, d] that sorts the coordinates by them: PCA without rotation."""
    values, order = gram.diagonal().sort(descending=True, stable=True)
    return values, torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[:, order]


def symmetric_shortcut(a: torch.Tensor, axes: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the basis B of a kept subspace so that the shortcut AᵀB becomes [I - CCᵀ, 0]. Returns (B [d, k], C [j, r]).

    a: orthonormal columns [d, j] of the previous kept subspace, j <= k; axes: orthogonal [d, d], whose first k columns span
    the next one. Inside that span any basis gives the same network, because the norm commutes with rotations. Writing
    AᵀB = P O in polar form and absorbing O into B leaves the symmetric P = cos of the principal angles, and
    I - P = CCᵀ has rank r <= min(j, d - k). With T = AᵀB_perp = U sin Wᵀ, C = U sin / sqrt(1 + cos): no cancellation
    when the angles are small. The squared length of a column of C is 1 - cos of its angle; columns come longest first.
    """
    j, kept, dropped = a.shape[1], axes[:, :k], axes[:, k:]
    left, _, right = torch.linalg.svd(a.T @ kept)  # [j, j], [k, k]: the last k - j rows of `right` are new directions
    u, sine, _ = torch.linalg.svd(a.T @ dropped, full_matrices=False)
    cosine = (1 - sine.square()).clamp(min=0).sqrt()
    b = kept @ torch.cat([right[:j].T @ left.T, right[j:].T], dim=1)
    return b, u * (sine / (1 + cosine).sqrt())


def complete(a: torch.Tensor) -> torch.Tensor:
    """Extend orthonormal columns a [d, k] to an orthogonal matrix [d, d] that starts with them."""
    if a.shape[0] == a.shape[1]:
        return a
    q, _ = torch.linalg.qr(a, mode="complete")
    return torch.cat([a, q[:, a.shape[1] :]], dim=1)


def remove_mean(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Multiply by M = I - 11ᵀ/d along `dim`, the mean subtraction of a LayerNorm."""
    return x - x.mean(dim, keepdim=True)
