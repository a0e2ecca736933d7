"""Pure tensor maths: Gram matrices, principal axes, the algebra between neighbouring subspaces, low-rank truncation.

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


def symmetric_shortcut(a: torch.Tensor, axes: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the basis B of a kept subspace so that the shortcut AᵀB becomes I - CCᵀ. Returns (B [d, k], C [k, r]).

    a: orthonormal columns [d, k] of the previous kept subspace; axes: orthogonal [d, d], whose first k columns span
    the next one. Inside that span any basis gives the same network, because the norm commutes with rotations. Writing
    AᵀB = P O in polar form and absorbing O into B leaves the symmetric P = cos of the principal angles, and
    I - P = CCᵀ has rank r <= min(k, d - k). With T = AᵀB_perp = U sin Wᵀ, C = U sin / sqrt(1 + cos): no cancellation
    when the angles are small.
    """
    kept, dropped = axes[:, :k], axes[:, k:]
    left, _, right = torch.linalg.svd(a.T @ kept)
    u, sine, _ = torch.linalg.svd(a.T @ dropped, full_matrices=False)
    cosine = (1 - sine.square()).clamp(min=0).sqrt()
    return kept @ (left @ right).T, u * (sine / (1 + cosine).sqrt())


def complete(a: torch.Tensor) -> torch.Tensor:
    """Extend orthonormal columns a [d, k] to an orthogonal matrix [d, d] that starts with them."""
    if a.shape[0] == a.shape[1]:
        return a
    q, _ = torch.linalg.qr(a, mode="complete")
    return torch.cat([a, q[:, a.shape[1] :]], dim=1)


def remove_mean(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Multiply by M = I - 11ᵀ/d along `dim`, the mean subtraction of a LayerNorm."""
    return x - x.mean(dim, keepdim=True)


# --- low rank --------------------------------------------------------------------------------------------------------
#
# With a root S of the inputs' Gram matrix, G = SSᵀ, the error of any M is ‖MX‖ = ‖MS‖. So the best rank-k approximation of
# W for inputs X keeps the first k left singular vectors of WS, W' = U_k U_kᵀ W: no root is ever inverted.

RIDGES = (0.0, *(10.0**e for e in range(-10, 1)))  # tried in turn, relative to the mean of the diagonal


def root_of(gram: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A root S [n, n] of a Gram matrix, SSᵀ = G + ridge · mean(diag G) · I, and the smallest relative ridge that gives one.

    The ridge is 0 unless G is singular to working precision (dead or dependent channels, fewer tokens than channels). It
    then ranks the directions without data by plain SVD. Lower Cholesky factor, float64. Raises ValueError for a Gram
    matrix that is not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or infinity: the model's weights or activations are broken")
    mean = gram.diagonal().mean()
    scale = mean if mean > 0 else torch.ones_like(mean)  # inputs that are always zero: any ridge makes this plain SVD
    for ridge in RIDGES:
        shifted = gram
        if ridge:
            shifted = gram.clone()
            shifted.diagonal().add_(ridge * scale)
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return root, ridge
    raise ValueError("the matrix has large negative eigenvalues, so it is not a Gram matrix: check how it was summed")


def decompose(w: torch.Tensor, root: torch.Tensor | None = None, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k left singular vectors [m, k] and all singular values [min(m, n)] of WS, largest first, in float64.

    w: [m, n]; root: S [n, n], or [n] where it is diagonal, or None for the identity. Dropping singular value i costs exactly
    σ_i in ‖(W - W')X‖ (SVD-LLM, Theorem 3.2 and its corollary). One eigenproblem of the smaller side; the vectors for a
    smaller k are the first columns of those for a larger one.
    """
    b = scale_inputs(w.double(), root)
    if b.shape[0] <= b.shape[1]:
        values, vectors = principal_axes(b @ b.T)
        return vectors[:, :k], values.sqrt()
    values, right = principal_axes(b.T @ b)
    # QR, not division by σ: columns of tiny singular values must be orthonormal too.
    return torch.linalg.qr(b @ right[:, :k])[0], values.sqrt()


def scale_inputs(w: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """WS for a root as `decompose` takes it."""
    if root is None:
        return w
    return w * root if root.ndim == 1 else w @ root


def singular_values(w: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """The singular values that `decompose` finds, without the vectors: a third of the time."""
    b = scale_inputs(w.double(), root)
    gram = b @ b.T if b.shape[0] <= b.shape[1] else b.T @ b
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def truncate(w: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors u [m, k] and v [k, n] of UUᵀW for orthonormal columns U [m, k], in float64.

    Column i of u and row i of v have the same norm, whatever the data's scale, so half precision and adapters treat both
    alike. Factors of a smaller k are slices: u[:, :k], v[:k].
    """
    v = basis.T @ w.double()
    size = v.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return basis * size, v / size[:, None]


def refit(w: torch.Tensor, u: torch.Tensor, v: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The left factor u' [m, k] that minimises ‖(W - u'v)S‖, for a right factor v [k, n] made for other inputs.

    root: S [n, n] of the new inputs. Closed form of SVD-LLM's layer-wise update, u' = W G vᵀ (v G vᵀ)⁻¹, solved for the change
    u' - u, which vanishes where the inputs have not drifted. The latents vS are brought to unit energy first, so that the
    spread of the singular values (10³ and more) does not enter the condition of the k x k system. float64.
    """
    w, u, v = w.double(), u.double(), v.double()
    latents = v @ root
    energy = latents.norm(dim=1, keepdim=True)
    energy = torch.where(energy > 0, energy, torch.ones_like(energy))
    latents = latents / energy
    triangle, _ = root_of(latents @ latents.T)
    wanted = latents @ ((w - u @ v) @ root).T
    return u + (torch.cholesky_solve(wanted, triangle) / energy).T
