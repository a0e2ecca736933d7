"""Pure tensor maths: Gram matrices, neighbouring subspaces, low rank, sparsity masks, column-wise compensation.

Nothing here knows about models. Functions take and return tensors on the device they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lib.primitives.checks import check_share, exact

GRAM_CHUNK = 4096  # rows; float32 sums stay short, float64 carries the total
SPLIT_WIDTH = 256  # columns; below, one product is as fast as three small ones


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def add_gram(total: torch.Tensor, x: torch.Tensor, products: torch.dtype = torch.float32) -> torch.Tensor:
    """Add XᵀX to `total` in place. total: float64 [d, d]; x: [n, d] of any float dtype.

    Chunks of at most 4,096 rows are multiplied in float32 (float64 input stays float64) and summed in float64: the
    speed of float32 with an error that does not grow with the number of rows. products: float64 where a few rows are so
    large that rounding relative to them would hide the others.
    """
    for chunk in x.split(GRAM_CHUNK):
        _add_symmetric(total, chunk.to(torch.promote_types(chunk.dtype, products)))
    return total


def _add_symmetric(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add XᵀX by halves of the columns, the block above the diagonal only once: about 0.6 of the time of the plain product."""
    d = x.shape[1]
    if d < SPLIT_WIDTH:
        total += x.T @ x
        return
    left, right = slice(0, d // 2), slice(d // 2, d)
    for part in (left, right):
        _add_symmetric(total[part, part], x[:, part])
    across = x[:, left].T @ x[:, right]
    total[left, right] += across
    total[right, left] += across.T


def add_squares(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add the column sums of squares of x to `total` in place, the diagonal of `add_gram`. total: float64 [d]; x: [n, d]."""
    for chunk in at_least_float32(x).split(GRAM_CHUNK):
        total += chunk.square().sum(0)
    return total


def principal_axes(gram: torch.Tensor, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d], largest first and never negative, and eigenvectors [d, d] in columns, of a Gram matrix.

    This is uncentred PCA (SliceGPT, section 3.4). dtype: precision of the decomposition, SliceGPT's setting `precision`;
    float32 is less accurate (the paper's Table 4). The result is float64 in either case. Raises ValueError for a Gram
    matrix that is not finite.
    """
    check_finite(gram)
    values, vectors = torch.linalg.eigh(gram.to(dtype))  # reads the lower triangle alone
    return values.flip(0).clamp(min=0).double(), vectors.flip(1).double()


def check_finite(gram: torch.Tensor) -> None:
    """Raise ValueError for a Gram matrix with NaN or infinity, which would show in the sum of its entries."""
    if gram.device.type != "meta" and not torch.isfinite(gram.sum()):
        raise ValueError("the Gram matrix holds NaN or infinity: the model's weights or activations are broken")


def random_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix [n, n] in float64: QR of a Gaussian matrix with the signs of R fixed."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def coordinate_axes(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies [d], largest first, and the permutation matrix [d, d] that sorts the coordinates by them: PCA without rotation."""
    values, order = gram.diagonal().sort(descending=True, stable=True)
    return values, torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[:, order]


def symmetric_shortcut(
    a: torch.Tensor, axes: torch.Tensor, k: int, outside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the basis B of a kept subspace so that the shortcut AᵀB becomes [I - CCᵀ, 0]. Returns (B [d, k], C [j, r]).

    a: orthonormal columns [d, j] of the previous kept subspace, j <= k; axes: orthogonal [d, d], whose first k columns span
    the next one; outside: orthonormal columns [d, d - j] of what `a` leaves out, if they are known. Inside the span of the
    first k axes any basis gives the same network, because the norm commutes with rotations; I - CCᵀ holds the cosines of the
    principal angles, in the form AᵀB = (I - CCᵀ) O the polar one, with O absorbed into B. Rank r <= min(j, d - k).

    It takes one decomposition, of what is deleted before and behind: outsideᵀ axes[:, k:] = X cos Zᵀ. The deleted directions
    are paired, E = outside X and F = axes[:, k:] Z, and the reflection H = I - (E + F)(1 + cos)⁻¹(E + F)ᵀ takes E to -F, so A
    (with the rest of `outside`, where it becomes wider) to a basis B without F. AᵀHA is I - CCᵀ for C = AᵀF / sqrt(1 + cos).
    Nothing cancels when the angles are small, nothing is divided by a small cosine. The squared length of a column of C is
    1 - cos of its angle; columns come longest first.
    """
    j, deleted = a.shape[1], axes[:, k:]
    if a.is_meta:  # a search counts shapes a hundred times, and torch is slow in decomposing meta tensors
        return axes[:, :k], a.new_empty(j, min(deleted.shape[1], j))
    outside = complete(a)[:, j:] if outside is None else outside
    x, cosine, z = torch.linalg.svd(outside.T @ deleted)
    before, gained = (outside @ x).split([deleted.shape[1], k - j], dim=1)
    behind, wider = deleted @ z.T, torch.cat([a, gained], dim=1)
    seen = wider.T @ behind
    b = wider - (before + behind) @ (seen / (1 + cosine)).T
    c = seen[:j] / (1 + cosine).sqrt()
    return b, c.flip(1)[:, : min(c.shape)]


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

ORTHONORMAL = 1e-3  # Bv/σ is orthonormal to ε(σ₁/σ)², so to 2e-10, for singular values down to this share of the largest
COLUMNS = 256  # of a root that are multiplied at once
PRECISION = 1e-13  # of an eigenvalue relative to the largest, in float64
CLEAR = 10  # times the rounding noise: larger eigenvalues come from the data
RIDGES = (0.0, *(10.0**e for e in range(-10, 1)))  # tried in turn, relative to the mean of the diagonal


def root_of(gram: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A root S [n, n] of a Gram matrix, SSᵀ = G + ridge · mean(diag G) · I, and the smallest relative ridge that gives one.

    The ridge is 0 unless G is singular to working precision (dead or dependent channels, fewer tokens than channels). It
    then ranks the directions without data by plain SVD. Lower Cholesky factor, float64. Raises ValueError for a Gram
    matrix that is not finite.
    """
    check_finite(gram)
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
    values, axes = principal_axes(smaller_gram(b))
    sigma, axes = values.sqrt(), axes[:, :k]
    if b.shape[0] <= b.shape[1]:
        return axes, sigma
    left, kept = b @ axes, sigma[: axes.shape[1]]
    if kept[-1] > ORTHONORMAL * kept[0]:
        return left.div_(kept), sigma
    # Division by a tiny σ would leave columns that are not orthonormal.
    return torch.linalg.qr(left)[0], sigma


def decompose_outputs(w: torch.Tensor, gram: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
    """The first k left singular vectors [m, k] of WX from the Gram matrix of the outputs WX, and how many the data determines.

    w: [m, n], m <= n; gram: WXXᵀWᵀ [m, m], float64, whose eigenvectors they are: neither a root nor XXᵀ is needed. Where the data
    leaves directions open (fewer tokens than k, dead channels), plain SVD of W ranks the open ones; a vanishing ridge on XXᵀ has
    the same limit. Rounding turns zero eigenvalues into noise, about as far below zero as above it, so the most negative one
    measures the noise.
    """
    check_finite(gram)
    values, axes = torch.linalg.eigh(gram)  # smallest first
    noise = torch.maximum(-values[0], PRECISION * values[-1])
    clear = int((values > CLEAR * noise).sum())
    determined = axes[:, len(w) - min(k, clear) :].flip(1)
    if clear >= k:
        return determined, k
    unseen = axes[:, : len(w) - clear]
    order = principal_axes(smaller_gram(unseen.T @ w.double()))[1]
    return torch.cat([determined, unseen @ order[:, : k - clear]], dim=1), clear


def smaller_gram(b: torch.Tensor) -> torch.Tensor:
    """BBᵀ or BᵀB, whichever is smaller, for b [m, n] in float64."""
    tall = b if b.shape[0] > b.shape[1] else b.T
    return add_gram(torch.zeros(tall.shape[1], tall.shape[1], dtype=b.dtype, device=b.device), tall)


def scale_inputs(w: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """WS for a root S as in `decompose`."""
    if root is None:
        return w
    return w * root if root.ndim == 1 else _times_triangular(w, root)


def _times_triangular(w: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """WS by blocks of columns. Where S is lower triangular, as a Cholesky factor is, the zeros above are left out."""
    m, n = w.shape
    product = w.new_empty(m, n) if m <= n else w.new_empty(n, m).T  # rows of the longer side: faster in the Gram matrix
    for start in range(0, n, COLUMNS):
        block = slice(start, start + COLUMNS)
        first = 0 if root[:start, block].any() else start
        torch.mm(w[:, first:], root[first:, block], out=product[:, block])
    return product


def singular_values(w: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """The singular values that `decompose` finds, without the vectors: a third of the time."""
    return eigenvalue_roots(smaller_gram(scale_inputs(w.double(), root)))


def eigenvalue_roots(gram: torch.Tensor) -> torch.Tensor:
    """The roots of a Gram matrix's eigenvalues [d], largest first: the singular values of the matrix behind it."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def truncate(w: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors u [m, k] and v [k, n] of UUᵀW for orthonormal columns U [m, k], in the precision of W, at least float32.

    For float32 weights the product is float32: the loss stays within 1e-8 of the least one, also where the inputs have condition
    10⁶ and a channel a thousand times above the others, because this rounding is no larger than that of the stored factors.
    Column i of u and row i of v have the same norm, whatever the data's scale, so both suit half precision and adapters
    equally well. Factors of a smaller k are slices: u[:, :k], v[:k].
    """
    w = at_least_float32(w)
    basis = basis.to(w.dtype)
    v = basis.T @ w
    size = v.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return basis * size, v.div_(size[:, None])


def refit(w: torch.Tensor, u: torch.Tensor, v: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The left factor u' [m, k] that minimises ‖(W - u'v)S‖, for a right factor v [k, n] made for other inputs.

    root: S [n, n] of the new inputs. Closed form of SVD-LLM's layer-wise update, u' = W G vᵀ (v G vᵀ)⁻¹, solved for the change
    u' - u, which vanishes where the inputs have not drifted. The latents vS are brought to unit energy first, so that the
    spread of the singular values (10³ and more) does not enter the condition of the k x k system. Products are ordered so that
    none takes m n² multiplications. float64.
    """
    w, u, v = w.double(), u.double(), v.double()
    latents = scale_inputs(v, root)
    energy = latents.norm(dim=1, keepdim=True)
    energy = torch.where(energy > 0, energy, torch.ones_like(energy))
    latents = latents / energy
    system = latents @ latents.T
    triangle, _ = root_of(system)
    wanted = (latents @ root.T) @ w.T - (system * energy.T) @ u.T  # vS ((W - uv) S)ᵀ, with vS = latents times energy
    return u + (torch.cholesky_solve(wanted, triangle) / energy).T


# --- which weights stay -------------------------------------------------------------------------------------------------

# (n, m): n weights stay of every m consecutive inputs; a fraction: that share of the weights is removed.
Sparsity = tuple[int, int] | float


def check_sparsity(sparsity: Sparsity, width: int) -> None:
    """Raise ValueError for a sparsity that does not exist, or a pattern that does not fit rows of `width` weights."""
    if isinstance(sparsity, (int, float)):
        check_share(sparsity, "sparsity", "0.5 removes half of the weights")
        return
    if not isinstance(sparsity, (tuple, list)) or [type(number) for number in sparsity] != [int, int]:
        raise ValueError(f"sparsity must be a pair like (2, 4) or a fraction like 0.5, not {sparsity!r}")
    n, m = sparsity
    if not 0 < n <= m:
        raise ValueError(f"no pattern {n}:{m}: (n, m) keeps n of m consecutive weights, so 0 < n <= m, as in (2, 4)")
    if width % m:
        raise ValueError(f"pattern {n}:{m} does not fit a layer with {width} inputs: {width} is not divisible by {m}")


def keep_mask(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Which entries of each row have the highest scores. scores: [rows, k]; result: bool, the same shape, True = stays.

    (n, m): exactly n of every m consecutive entries; a fraction: exactly k - ⌊fraction k⌋ of each row. Of equal scores the
    earlier entry stays, so the mask can be repeated anywhere.
    """
    rows, k = scores.shape
    if isinstance(sparsity, (int, float)):
        return _keep_largest(scores, k - int(exact(sparsity) * k))
    n, m = sparsity
    return _keep_largest(scores.reshape(rows, k // m, m), n).view(rows, k)


def _keep_largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :n], True)


# --- changing a matrix column by column (optimal brain surgeon) -----------------------------------------------------------


def inverse_factor(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Upper triangular U [d, d] in float64 with UᵀU = (H + λI)⁻¹ for a Gram matrix H; λ = damping x its mean diagonal.

    Row i of U, divided by U_ii, holds the changes of columns i, i+1, ... that compensate a change of column i once those before
    it are fixed (SparseGPT, section 3.3; GPTQ, step 3). The inverse is never formed: with the order of the channels reversed,
    Cholesky gives H = RRᵀ with R upper triangular, and U = R⁻¹. An input that is always zero (H_jj = 0) gets H_jj = 1, so
    it takes no part. The damping makes any other rank deficit harmless; without it, one raises ValueError, as does NaN.
    """
    check_finite(gram)
    h = gram.double().clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean() + (diagonal == 0)
    reversed_factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed:
        more = "" if damping >= 0.01 else ", or a damping of 0.01 or more"
        raise ValueError(f"the Gram matrix is singular at damping {damping}: use more calibration tokens{more}")
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(reversed_factor.flip(0, 1), identity, upper=True)


def fix_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    decide: Callable[[torch.Tensor, int], Callable[[torch.Tensor, int], torch.Tensor]],
    span: int,
    block: int = 128,
) -> torch.Tensor:
    """Change a matrix column by column, from left to right, and compensate in the later columns by least squares.

    weight: [out, in]; factor: U of `inverse_factor`, [in, in]. Every `span` columns, `decide(columns [out, span], start)`
    sees the weights as they now stand and returns the rule (column [out, 1], its place in the span) -> its final value.
    Changing w_i into q adds -(w_i - q) U_i,later / U_ii to the later columns, the optimal brain surgeon's step. Inside a
    block this is done at once, beyond it in one product per block: `block` changes the speed, not the result.
    Result: float64 [out, in].
    """
    w = weight.double().clone()
    for start, end in _blocks(w.shape[1], span, block):
        errors = torch.empty_like(w[:, start:end])
        for i in range(start, end):
            if i % span == 0:
                rule = decide(w[:, i : i + span], i)
            column = w[:, i : i + 1]
            fixed = rule(column, i % span)
            error = (column - fixed) / factor[i, i]
            w[:, i:end] -= error * factor[i, i:end]
            w[:, i : i + 1] = fixed  # exactly: a pruned weight is 0, not a rounding error
            errors[:, i - start] = error[:, 0]
        w[:, end:] -= errors @ factor[start:end, end:]
    return w


def _blocks(columns: int, span: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut `columns` into blocks (start, end) of at most `block`; a span that begins in the middle of one also ends in it.

    A decision at the start of a span needs all columns of the span up to date; those beyond the current block are not.
    """
    start = 0
    while start < columns:
        end = min(start + block, columns)
        boundary = end - end % span
        if end < columns and boundary > start:
            end = boundary
        yield start, end
        start = end


def pattern_of(text: str) -> tuple[int, int]:
    """(2, 4) for "2:4". Raises ValueError for what is not two whole numbers, or keeps more weights than there are."""
    parts = str(text).split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[1]):
        raise ValueError(f"pattern must be like 2:4, which keeps 2 of 4 consecutive weights, not {text!r}")
    return int(parts[0]), int(parts[1])


def sparsity(ratio: float, pattern: str) -> Sparsity:
    """The sparsity for a ratio: the ratio itself, or the pair of a pattern like "2:4", which must remove the same share.

    Raises ValueError as `pattern_of` does, and for a pattern that removes another share than the ratio says.
    """
    if not pattern:
        return ratio
    n, m = pattern_of(pattern)
    if abs(1 - n / m - ratio) > 1e-6:
        raise ValueError(f"pattern {pattern} removes {1 - n / m:.4g} of the weights, not {ratio}: use ratio {1 - n / m:.4g}")
    return n, m
