"""Two factors in place of a matrix: ranks for a ratio, factors for a whole sweep, replacement by name, merging.

SVD-LLM and its rivals share this file. They truncate the same matrices to the same ranks by the same decomposition, and
differ only in the root S of the inputs' assumed second moment (`lib.primitives.linalg.decompose`): the identity (plain SVD), a
diagonal (FWSVD, ASVD), or a root of the true Gram matrix (SVD-LLM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, Family, shared_inputs
from lib.primitives.checks import check_inplace, kept_share
from lib.primitives.linalg import decompose, truncate
from lib.primitives.surgery import LowRankLinear, linear, low_rank, record_edit, set_edits, shape_shell, shell

Ranks = dict[str, int]  # rank of each matrix that is factored; a matrix that is not named stays dense
Roots = Iterable[tuple[Sequence[str], torch.Tensor | None]]  # names of the matrices that share an input, and its root


# --- the matrices of a model -------------------------------------------------------------------------------------------


def block_name(family: Family, block: int, name: str) -> str:
    return f"{family.blocks}.{block}.{name}"


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix that R counts, by its name in the model: the linear layers inside the blocks, in order.

    Embeddings, head and norms are left alone (SVD-LLM, section 4). Raises ValueError for a model that is compressed already.
    """
    anatomy = Anatomy(model)
    found = {}
    for block in range(len(anatomy.blocks)):
        for group in shared_inputs(anatomy.family):
            for name in (block_name(anatomy.family, block, n) for n in group):
                layer = anatomy.get(name)
                if type(layer) is not nn.Linear:
                    kind = type(layer).__name__
                    raise ValueError(f"{name} is a {kind}, not a plain linear layer: start from the dense model")
                found[name] = layer
    return found


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(m outputs, n inputs) of every matrix that R counts."""
    return {name: tuple(layer.weight.shape) for name, layer in matrices(model).items()}


# --- ranks -------------------------------------------------------------------------------------------------------------


def rank_for(m: int, n: int, ratio: float) -> int:
    """Largest rank whose two factors hold at most (1 - R) m n parameters: ⌊m n (1 - R) / (m + n)⌋ (SVD-LLM, section 4.2).

    Computed exactly, because binary arithmetic makes 511 of (1 - 0.8) · 5120 / 2. R > 0: at R = 0 a layer stays dense,
    because even the largest rank that saves anything loses half of the spectrum of a square matrix. Raises ValueError where
    no rank is left.
    """
    kept = kept_share(ratio)
    if kept == 1:
        raise ValueError("ratio 0 leaves the matrix dense: it has no rank to choose")
    k = int(m * n * kept / (m + n))
    if k < 1:
        raise ValueError(f"removing {ratio:.0%} of a {m} x {n} matrix leaves no rank: use a lower ratio")
    return k


def uniform_ranks(model: nn.Module, ratio: float) -> Ranks:
    """The same ratio for every matrix; none is factored at ratio 0."""
    if kept_share(ratio) == 1:
        return {}
    return {name: rank_for(m, n, ratio) for name, (m, n) in shapes(model).items()}


def allocate(spectra: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float) -> Ranks:
    """Ranks of unequal size from one loss budget: least summed relative loss for (1 - R) of all parameters.

    Keep singular directions in the order of σ_i² / Σ_{j>1} σ_j² per parameter, m + n of them each, until the budget is spent;
    a matrix that would pass its break-even rank stays dense. Every matrix keeps rank 1, so the first direction is left out of
    the sum: inputs are not centred, and their mean, which always stays, can hold most of the energy. Losses are comparable
    between matrices of one type, hardly between types: see `allocate_by_type`.

    This is *our* reading of the idea of SVD-LLM V2 (arXiv 2503.12340): give more rank to matrices that would lose more. Its
    printed rule, shares of 1 / log(loss), changes with the unit of the activations.
    """
    if kept_share(ratio) == 1:
        return {}
    names = list(shapes)
    gains, costs, owners, first = [], [], [], []
    # 1. Gain and cost of every rank of every matrix; ranks beyond break-even cost nothing more and are left out.
    for i, name in enumerate(names):
        m, n = shapes[name]
        energy = spectra[name].double().square()
        gain = energy / energy[1:].sum().clamp(min=torch.finfo(torch.float64).tiny) / (m + n)
        spent = (torch.arange(len(gain) + 1) * (m + n)).clamp(max=m * n)  # parameters at each rank; dense is never dearer
        cost = spent.diff()
        useful = cost > 0
        gains.append(gain[useful].cpu())
        costs.append(cost[useful])
        owners.append(torch.full((int(useful.sum()),), i))
        first.append(torch.arange(int(useful.sum())) == 0)
    gain, cost, owner, first = (torch.cat(parts) for parts in (gains, costs, owners, first))
    # 2. Buy ranks in the order of their gain, every matrix's first rank before all others, until the budget is spent.
    order = torch.argsort(gain + first * (gain.max() + 1), descending=True, stable=True)
    budget = int(kept_share(ratio) * sum(m * n for m, n in shapes.values()))
    taken = order[cost[order].cumsum(0) <= budget]
    ranks = torch.bincount(owner[taken], minlength=len(names)).tolist()
    if min(ranks) < 1:
        raise ValueError(f"removing {ratio:.0%} leaves no rank for some matrices: use a lower ratio")
    # 3. A matrix whose factors would not be smaller than itself stays dense.
    return {name: k for name, k in zip(names, ranks, strict=True) if k * sum(shapes[name]) < shapes[name][0] * shapes[name][1]}


def allocate_by_type(model: nn.Module, spectra: Mapping[str, torch.Tensor], ratio: float) -> Ranks:
    """`allocate` with a budget of its own, (1 - R), for the matrices of each type: all q_proj, all k_proj, ... of the model.

    SVD-LLM V2 groups by type too. Types differ in what an error does: errors of keys and queries pass through a softmax, errors
    of values reach the residual stream. One budget for all types would take rank from the former for the latter.
    """
    family, sizes = Anatomy(model).family, shapes(model)
    ranks: Ranks = {}
    for kind in (name for group in shared_inputs(family) for name in group):
        names = [name for name in sizes if name.endswith(f".{kind}")]
        ranks |= allocate(spectra, {name: sizes[name] for name in names}, ratio)
    return ranks


# --- factors -----------------------------------------------------------------------------------------------------------


def largest(plans: Sequence[Ranks]) -> Ranks:
    """The largest rank of each matrix over all plans of a sweep; smaller ones are slices of it."""
    names = dict.fromkeys(name for plan in plans for name in plan)
    return {name: max(plan.get(name, 0) for plan in plans) for name in names}


def projected(layer: nn.Linear, basis: torch.Tensor) -> LowRankLinear:
    """A linear layer as two factors whose outputs stay in the span of orthonormal columns [m, k]."""
    return low_rank(layer, *truncate(layer.weight.detach(), basis))


def factored(layer: nn.Linear, root: torch.Tensor | None, k: int) -> LowRankLinear:
    """A linear layer truncated to rank k for inputs with second moment SSᵀ."""
    return projected(layer, decompose(layer.weight.detach(), root, k)[0])


def factor(
    dense: Mapping[str, nn.Linear], roots: Roots, ranks: Ranks, progress: Callable[[str], None] | None = None
) -> dict[str, LowRankLinear]:
    """Two-factor layers of the given ranks by name, for matrices by name. Roots are taken one by one, as they are needed."""
    found = {}
    for names, root in roots:
        for name in names:
            if name in ranks:
                found[name] = factored(dense[name], root, ranks[name])
        if progress:
            progress(f"factored {len(found)} of {len(ranks)} matrices")
    return found


def narrowed(layer: LowRankLinear, k: int) -> LowRankLinear:
    """The layer of a smaller rank: the first k latents."""
    if k == layer.rank:
        return layer
    return low_rank(layer.u, layer.u.weight[:, :k], layer.v.weight[:k])


def put(model: nn.Module, layers: Mapping[str, LowRankLinear]) -> nn.Module:
    """Replace matrices of a model by two-factor layers, in place, and record the edit on the model."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    if layers:
        record_edit(model, edit="low-rank", ranks={name: layer.rank for name, layer in layers.items()})
    return model


def sweep_of(
    model: nn.Module,
    roots: Roots,
    ratios: Sequence[float],
    plans: Sequence[Ranks],
    progress: Callable[[str], None] | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) for every plan of ranks, from one decomposition of each matrix.

    inplace: for one ratio, each dense matrix is freed when its factors are there.
    """
    check_inplace(inplace, ratios)
    if inplace:
        return ((ratio, _in_place(model, roots, ranks, progress)) for ratio, ranks in zip(ratios, plans, strict=True))
    return nested(model, lambda ranks: factor(matrices(model), roots, ranks, progress), ratios, plans)


def _in_place(model: nn.Module, roots: Roots, ranks: Ranks, progress: Callable[[str], None] | None) -> nn.Module:
    """The given model, with matrices replaced by two factors one after the other."""
    for names, root in roots:
        for name in names:
            if name in ranks:
                model.set_submodule(name, factored(model.get_submodule(name), root, ranks[name]))
        if progress:
            progress(f"factored {names[-1]}")
    if ranks:
        record_edit(model, edit="low-rank", ranks=ranks)
    return model


def nested(
    model: nn.Module, fit: Callable[[Ranks], Mapping[str, LowRankLinear]], ratios: Sequence[float], plans: Sequence[Ranks]
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) for every plan of ranks, whose layers are narrowed from those that `fit` makes of the largest ranks."""
    ranks = largest(plans)
    layers = fit(ranks) if ranks else {}
    for ratio, plan in zip(ratios, plans, strict=True):
        yield ratio, put(shell(model), {name: narrowed(layers[name], k) for name, k in plan.items()})


def shape(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """The model after every matrix has lost a share `ratio` of its parameters, on the meta device."""
    return replay(shape_shell(model), uniform_ranks(model, ratio)) if ratio else shape_shell(model)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def replay(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Repeat the edit of `put` on a model without values, in place."""
    dense = matrices(model)
    if not isinstance(ranks, dict) or not ranks:
        raise ValueError(f"ranks must map names of matrices to numbers, not {ranks!r}")
    layers = {}
    for name, k in ranks.items():
        if name not in dense or type(k) is not int or not 0 < k <= min(dense[name].weight.shape):
            raise ValueError(f"no such truncation of this model: {name!r} to rank {k!r}")
        layers[name] = empty_factors(dense[name], k)
    return put(model, layers)


def empty_factors(layer: nn.Linear, k: int) -> LowRankLinear:
    """The two-factor layer of rank k in the place of a layer, as shapes."""
    u, v = (torch.empty(shape, device="meta") for shape in ((layer.out_features, k), (k, layer.in_features)))
    return low_rank(layer, u, v)


def merge_to_dense(model: nn.Module) -> nn.Module:
    """A stock model with the product of the factors in the place of every two-factor layer: any runtime can load it.

    The products are taken in float64 and cast once. Nothing is saved in memory or time: this is for comparison and export.
    Raises ValueError for a model without two-factor layers.
    """
    if not any(isinstance(layer, LowRankLinear) for layer in model.modules()):
        raise ValueError("this model has no two-factor layers to merge: merging is for models of svd-llm, svd, fwsvd or asvd")
    merged = shell(model)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LowRankLinear):
            weight = layer.u.weight.detach().double() @ layer.v.weight.detach().double()
            merged.set_submodule(name, linear(weight, layer.u.bias, like=layer.u.weight))
    return set_edits(merged, [edit for edit in getattr(model, "edits", []) if edit["edit"] != "low-rank"])
