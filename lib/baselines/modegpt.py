"""MoDeGPT (Lin et al., ICLR 2025, arXiv 2408.09632): each block is cut into modules of two matrices, compressed together.

Neurons of the MLP are selected by ridge leverage scores and the writer is fitted anew (Nyström); queries and keys keep the same
channels of every head (CR decomposition); values and outputs get the best common low rank of every head (SVD). All three
have a closed form in second moments of activations, and none adds a matrix. Blocks that change the stream less lose more.

Queries and keys are judged by their outputs, whose second moments are those of the formulas with the input's covariance, and
biases are counted with them. With grouped-query attention the query heads of a group share one choice of channels and one basis.

`attention` says which modules are cut. "all" is the paper's method. Such heads are narrower than any stock class can hold, so
what it leaves loads in this suite alone (`lib.primitives.narrow_heads`). The default, "none", removes the whole share from the
neurons, and the result goes wherever a model with fewer neurons can.

What the paper leaves open, without released code, is read here as follows. λ of the leverage scores is a share of the mean
second moment of a neuron, so that neither the number of tokens nor the unit of activations matters (`ridge`). ε of the allocation
is a setting (`temperature`), and no block loses more than LIMIT where the mean permits. All modules of a block lose the same
share; what whole channels leave over is taken from its neurons. Moments are those of the dense model.

Ours: the paper fits the writer to some 260,000 tokens by plain least squares (`damping` 0). With a few thousand, not many more
than there are neurons, that fit follows the sample, and can be worse than no fit at all. So the writer is pulled to the dense one
with a strength in proportion to neurons over tokens, which vanishes where the paper works. Pull and ε were chosen on wiki-a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from lib.primitives import narrow_heads
from lib.primitives.anatomy import Anatomy, head_size
from lib.primitives.calibration import ResidualStream, check_calibration
from lib.primitives.checks import FROM_ZERO, check_inplace, check_settings, check_share, exact
from lib.primitives.cost import count
from lib.primitives.layer_importance import layer_scores
from lib.primitives.linalg import add_gram, add_squares, check_finite, principal_axes, root_of
from lib.primitives.structured import cut_neurons, describe, keep_highest, separate_readers, unit_params
from lib.primitives.surgery import linear, shape_shell, shell

NOTHING, VALUES, ALL = "none", "value-output", "all"
LIMIT = 0.8  # the largest share that a block loses, unless the mean is larger
CLEAR = 1e-5  # a direction of the values with less of the largest singular value than this is left out: it would be noise


@dataclass(frozen=True)
class Settings:
    attention: str = NOTHING  # which heads get narrower: none; or: value-output, all (as in the paper)
    temperature: float = 0.03  # ε of the allocation: a low one spares the blocks that change the stream; inf: equal shares
    ridge: float = 1.0  # λ of the leverage scores, as a share of the mean second moment of a neuron
    damping: float = 4.0  # pull of the fitted writer to the dense one, times neurons per token; 0: plain least squares

    def __post_init__(self):
        check_settings(self, attention=(NOTHING, VALUES, ALL), temperature="(0, inf]", ridge="(0, inf)", damping=FROM_ZERO)


# --- the three modules -----------------------------------------------------------------------------------------------


def leverage_scores(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge leverage scores [K (K + λI)⁻¹]_ii, [n], of neurons with second moment K [n, n]; λ = ridge · mean(diag K)."""
    check_finite(gram)
    scale = gram.diagonal().mean()
    lam = ridge * (scale if scale > 0 else torch.ones_like(scale))
    shifted = gram.clone()
    shifted.diagonal().add_(lam)
    return 1 - lam * torch.cholesky_inverse(torch.linalg.cholesky(shifted)).diagonal()


def refitted_writer(weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor, pull: float = 0.0) -> torch.Tensor:
    """The writer W' [d, k] that gives W h best from the neurons in `keep` alone: (W K S + μ W S) (Sᵀ K S + μ I)⁻¹.

    weight: W [d, n]; gram: K, second moment [n, n] of the neurons h, in float64. Without a pull this is plain least squares;
    else μ = pull · mean(diag K) and what is least is the squared error plus μ ‖W' - W S‖².
    """
    mu = pull * gram.diagonal().mean()
    inner, weight = gram[keep][:, keep], weight.to(gram)
    inner.diagonal().add_(mu)
    root, _ = root_of(inner)
    return torch.cholesky_solve(gram[keep] @ weight.T + mu * weight.T[keep], root).T


def channel_scores(queries: torch.Tensor, keys: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Scores [groups, units] of the channels of query and key heads: the norm of the queries times that of the keys.

    queries: sums of squares over all tokens [groups, heads of a group, size]; keys: [groups, size]; units: channels [units, c].
    """
    return (queries.sum(1)[:, units].sum(-1) * keys[:, units].sum(-1)).sqrt()


def value_maps(gram: torch.Tensor, writer: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(into [k, size], back [size, k]) for which W back into v is nearest to W v in rank k: the truncated SVD of W S.

    gram: SSᵀ, second moment of the values v of a group [size, size], float64; writer: W, the columns of all query heads of the
    group, one below the other [heads d, size]. One eigenproblem of SᵀWᵀWS = UΣ²Uᵀ; back = S U / Σ, into = Uᵀ Sᵀ WᵀW / Σ.
    """
    root, _ = root_of(gram)
    inner = writer.to(gram).T @ writer.to(gram)
    values, axes = principal_axes(root.T @ inner @ root)
    sigma = values.sqrt()[:k]
    inverse = torch.where(sigma > CLEAR * sigma[0], 1 / sigma, torch.zeros_like(sigma))
    back = root @ axes[:, :k] * inverse
    return back.T @ inner, back


# --- how much of each block --------------------------------------------------------------------------------------------


def shares(scores: Sequence[float], mean: float, temperature: float, sizes: Sequence[int]) -> list[float]:
    """The share that each block loses, in proportion to exp(-score / ε), `mean` on average over parameters.

    scores: block influence [L]; sizes: parameters that can go from each block [L]. Without a limit this minimises
    Σ share · score - ε · entropy. Shares above LIMIT are cut to it, and the other blocks lose the rest in the same proportion.
    """
    size = torch.tensor(sizes, dtype=torch.float64)
    if mean >= LIMIT:
        return [mean] * len(sizes)
    weight = torch.softmax(-torch.tensor(scores, dtype=torch.float64) / temperature, 0)
    full = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = mean * size.sum() - LIMIT * size[full].sum()
        free = torch.where(full, 0, weight)
        share = torch.where(full, LIMIT, free * left / (free * size).sum())
        if not (over := share > LIMIT + 1e-12).any():
            return share.tolist()
        full |= over


class Left(NamedTuple):
    """What a block has left: neurons, units of a query or key head, channels of a value head; None for all heads as they are."""

    neurons: int
    units: int | None
    values: int | None


class Parts(NamedTuple):
    """How many neurons, units and value channels a block has, and the parameters of one of each in all heads together."""

    counts: tuple[int, int, int]
    costs: tuple[int, int, int]


def parts_of(anatomy: Anatomy, block: nn.Module, attention: str) -> Parts:
    """What can go from a block; units and value channels cost nothing where `attention` leaves them alone."""
    mlp, size = anatomy.family.mlp, head_size(anatomy.model.config)
    neurons, neuron = block.get_submodule(mlp.writer).in_features, unit_params(block, mlp)
    if attention == NOTHING:
        return Parts((neurons, 1, 1), (neuron, 0, 0))
    query, key, value, output = (block.get_submodule(n) for n in (*separate_readers(anatomy), anatomy.family.attention.writer))
    rows = [sum(p.numel() for p in layer.parameters()) // size for layer in (query, key, value)]  # one channel of all heads
    units = narrow_heads.head_units(anatomy.model.config)
    unit = units.shape[1] * (rows[0] + rows[1]) if attention == ALL else 0
    return Parts((neurons, len(units), size), (neuron, unit, rows[2] + output.weight.numel() // size))


def plan(model: nn.Module, scores: Sequence[float], ratio: float, settings: Settings) -> list[Left]:
    """What every block keeps, so that the blocks lose the share `ratio` of all their parameters, to within one neuron.

    scores: block influence [L]. Raises ValueError where that is more than can go.
    """
    anatomy = Anatomy(model)
    parts = [parts_of(anatomy, block, settings.attention) for block in anatomy.blocks]
    sizes = [sum(n * cost for n, cost in zip(*part, strict=True)) for part in parts]
    wanted = exact(ratio) * count(model).decoder
    found, gone, due = [], 0, 0.0
    for share, size, (counts, costs) in zip(
        shares(scores, float(wanted / sum(sizes)), settings.temperature, sizes), sizes, parts, strict=True
    ):
        due += share * size
        units, values = (min(int(n * share + 1e-9), n - 1) if cost else 0 for n, cost in zip(counts[1:], costs[1:], strict=True))
        gone += units * costs[1] + values * costs[2]
        neurons = min(max(math.ceil((due - gone) / costs[0] - 1e-6), 0), counts[0] - 1)
        gone += neurons * costs[0]
        found.append(Left(counts[0] - neurons, counts[1] - units if units else None, counts[2] - values if values else None))
    if gone < wanted:
        more = "" if settings.attention == ALL else ", or cut attention too with attention=all"
        raise ValueError(f"removing {ratio:.1%} of the blocks' parameters leaves no neuron in a block: use a lower ratio{more}")
    return found


# --- the method --------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Second moments of a block, summed over tokens in float64."""

    tokens: int
    neurons: torch.Tensor  # [n, n]
    queries: torch.Tensor  # squares, [groups, heads of a group, size]
    keys: torch.Tensor  # squares, [groups, size]
    values: torch.Tensor  # [groups, size, size]


def statistics(stream: ResidualStream, i: int, advance: bool, attention: str) -> Statistics:
    """Measure a block where the stream stands, and move the stream behind it if `advance`."""
    anatomy, block = stream.anatomy, stream.anatomy.blocks[i]
    writer = anatomy.family.mlp.writer

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=stream.device)

    n = block.get_submodule(writer).in_features
    tokens, neurons, empty = stream.ids.numel(), zeros(n, n), zeros(0)
    see = {writer: lambda x: add_gram(neurons, x)}
    if attention == NOTHING:
        stream.observe(i, see, advance)
        return Statistics(tokens, neurons, empty, empty, empty)
    size, (query, key, value) = head_size(anatomy.model.config), separate_readers(anatomy)
    wide, narrow = (block.get_submodule(name).out_features for name in (query, key))
    queries, keys, values = zeros(wide), zeros(narrow), zeros(narrow // size, size, size)

    def add_values(_: torch.Tensor, v: torch.Tensor) -> None:
        for total, own in zip(values, v.split(size, dim=1), strict=True):
            add_gram(total, own)

    results = {query: lambda _, q: add_squares(queries, q), key: lambda _, k: add_squares(keys, k), value: add_values}
    stream.observe(i, see, advance, results=results)
    return Statistics(tokens, neurons, queries.view(narrow // size, -1, size), keys.view(-1, size), values)


def cut_block(anatomy: Anatomy, block: nn.Module, left: Left, found: Statistics, settings: Settings) -> None:
    """Compress the modules of one block, in place."""
    mlp, attention = anatomy.family.mlp, anatomy.family.attention
    writer = block.get_submodule(mlp.writer)
    # I. Neurons, and the writer fitted to those that stay.
    if left.neurons < writer.in_features:
        keep = keep_highest(leverage_scores(found.neurons, settings.ridge), left.neurons)
        pull = settings.damping * left.neurons / found.tokens
        weight = refitted_writer(writer.weight.detach(), found.neurons, keep, pull)
        cut_neurons(anatomy, block, keep)
        block.set_submodule(mlp.writer, linear(weight, writer.bias, like=writer.weight))
    # II. Channels of queries and keys.
    if left.units is not None:
        units = narrow_heads.head_units(anatomy.model.config)
        scores = channel_scores(found.queries, found.keys, units)
        narrow_heads.narrow_queries(anatomy, block, torch.stack([keep_highest(own, left.units) for own in scores]))
    # III. Values and outputs.
    if left.values is not None:
        groups, size = found.values.shape[:2]
        columns = block.get_submodule(attention.writer).weight.detach().T.reshape(groups, -1, size, anatomy.width)
        stacked = columns.transpose(2, 3).flatten(1, 2)  # [groups, heads of a group x d, size]
        into, back = zip(*(value_maps(g, w, left.values) for g, w in zip(found.values, stacked, strict=True)), strict=True)
        narrow_heads.narrow_values(anatomy, block, torch.stack(into), torch.stack(back))


def finished(model: nn.Module, left: Sequence[Left]) -> nn.Module:
    """The model, its present shape written into its config and its record of edits."""
    return narrow_heads.record(describe(model), [own.units for own in left], [own.values for own in left])


def check(model: nn.Module, ids: torch.Tensor, ratios: Sequence[float], settings: Settings) -> None:
    """Raise ValueError, before any work, for what cannot be done. A plan in which all blocks lose alike is the tightest."""
    anatomy = Anatomy(model)
    for ratio in ratios:
        check_share(ratio)
    if settings.attention != NOTHING:
        narrow_heads.check_heads(anatomy, settings.attention == ALL)
    for ratio in ratios:
        plan(model, [0.0] * len(anatomy.blocks), ratio, settings)
    check_calibration(anatomy, ids)


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model whose blocks have lost that share of their parameters) for every ratio.

    ids: [samples, tokens]. One pass scores the blocks, a second one measures them, for all ratios; the results share tensors
    with the model where nothing was cut. One block's moments are in memory at a time. Raises ValueError, before any work,
    for a ratio that leaves nothing, for attention that cannot be cut, and for ids that cannot be used.
    """
    check_inplace(inplace, ratios)
    check(model, ids, ratios, settings)
    return _sweep(model, ids, ratios, settings, progress, inplace)


@torch.no_grad()
def _sweep(model, ids, ratios, settings, progress, inplace):
    scores = layer_scores(model, ids)
    plans = [plan(model, scores, ratio, settings) for ratio in ratios]
    results = [Anatomy(model if inplace else shell(model)) for _ in ratios]
    stream = ResidualStream(model, ids)
    blocks = len(stream.anatomy.blocks)
    for i in range(blocks):
        found = statistics(stream, i, i < blocks - 1, settings.attention)  # nobody needs the last block's output
        for anatomy, left in zip(results, plans, strict=True):
            cut_block(anatomy, anatomy.blocks[i], left[i], found, settings)
        del found  # before the next block is measured
        if progress:
            progress(f"compressed block {i + 1} of {blocks}")
    for ratio, anatomy, left in zip(ratios, results, plans, strict=True):
        yield ratio, finished(anatomy.model, left)


def compress_model(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """Compress a model at one ratio; settings: fields of `Settings`. The given model stays intact."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]


def shape(model: nn.Module, ratio: float, settings: Settings | None = None) -> nn.Module:
    """A model on the meta device of the size that a ratio leaves, all blocks losing alike; to within a neuron with heads."""
    settings = settings or Settings()
    anatomy = Anatomy(shape_shell(model))
    if settings.attention != NOTHING:
        narrow_heads.check_heads(anatomy, settings.attention == ALL)
    left = plan(model, [0.0] * len(anatomy.blocks), ratio, settings)
    for block, own in zip(anatomy.blocks, left, strict=True):
        cut_neurons(anatomy, block, torch.arange(own.neurons))
        narrow_heads.empty_narrow(anatomy, block, own.units, own.values)
    return finished(anatomy.model, left)
