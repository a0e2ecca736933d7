"""SVD-LLM (Wang et al., arXiv 2403.07378): replace each matrix by the best product of two for its real inputs.

For inputs X with Gram matrix G = X Xᵀ = S Sᵀ the rank-k matrix nearest to W in ‖(W - W')X‖ comes from the singular value
decomposition of W S, and its loss is exactly the root of the sum of squares of the dropped singular values. The paper
writes W' = U_k Σ_k V_kᵀ S⁻¹. We use the same matrix in the form U_k U_kᵀ W, which needs no inverse and holds for any G.

Two questions that the paper answers in one way are settings here. `order`: inputs are those of the dense model
("original", the paper) or of the part already compressed ("compressed"). `variant`: "W" truncates; "W+U" then refits the
left factors to drifted inputs (the paper's first version); "U" truncates by plain SVD and refits. The current paper's
update, adapters on the factors (`recover_factors`), starts from any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, shared_inputs
from lib.primitives.calibration import ResidualStream, check_calibration
from lib.primitives.checks import check_inplace, check_settings, check_share
from lib.primitives.finetune import LoRA, Recovered, recover
from lib.primitives.layerwise import Walk, go
from lib.primitives.linalg import add_gram, decompose_outputs, eigenvalue_roots, refit, root_of, singular_values
from lib.primitives.low_rank import (
    Ranks,
    allocate_by_type,
    block_name,
    empty_factors,
    factor,
    largest,
    matrices,
    narrowed,
    nested,
    projected,
    put,
    uniform_ranks,
)
from lib.primitives.surgery import LowRankLinear, low_rank, record_edit, shell

VARIANTS = ("W", "W+U", "U")
ORDERS = ("original", "compressed")
ALLOCATIONS = ("uniform", "loss")
# The released script, for 7 billion parameters and 50,000 instructions; a round there is three passes, about 2,300 steps.
LORA = LoRA(
    rank=8, alpha=16, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=100, batch=64, evaluate_every=100
)  # fmt: skip


class Grams(NamedTuple):
    """Gram matrices of a block in float64; each is taken out when it is used, so that its memory can be freed."""

    inputs: dict[tuple[str, ...], torch.Tensor]  # names of the matrices that share an input -> XXᵀ [n, n]
    outputs: dict[str, torch.Tensor]  # name of a matrix that is judged by its outputs -> WXXᵀWᵀ [m, m]


# --- statistics --------------------------------------------------------------------------------------------------------


def block_grams(stream: ResidualStream, block: int, advance: bool = False, outputs: bool = False) -> Grams:
    """The Gram matrix of every distinct input in a block, from the stream where it stands.

    q, k and v share one, and so do gate and up. outputs: for matrices judged `by_outputs` take that of Wx, [m, m], instead: it
    is enough for truncation, and in a down_proj a fraction of the work and memory. Raises ValueError, naming the module,
    for activations that are not finite.
    """
    family, module = stream.anatomy.family, stream.anatomy.blocks[block]
    found, inputs, results = Grams({}, {}), {}, {}

    def zeros(n: int) -> torch.Tensor:
        return torch.zeros(n, n, dtype=torch.float64, device=stream.device)

    for group in shared_inputs(family):
        layers, names = [module.get_submodule(name) for name in group], [block_name(family, block, name) for name in group]
        if outputs and by_outputs(layers):
            gram = found.outputs[names[0]] = zeros(layers[0].out_features)
            results[group[0]] = partial(add_output_gram, gram, layers[0])
        else:
            gram = found.inputs[tuple(names)] = zeros(layers[0].in_features)
            inputs[group[0]] = partial(add_gram, gram)
    stream.observe(block, inputs, advance, results=results)
    for name, gram in [*((names[0], gram) for names, gram in found.inputs.items()), *found.outputs.items()]:
        if not torch.isfinite(gram.sum()):
            raise ValueError(f"the activations of {name} hold NaN or infinity: load the model in float32 or bfloat16")
    return found


def by_outputs(layers: Sequence[nn.Linear]) -> bool:
    """Whether the outputs are enough for truncation: the input is read by one matrix alone, which does not widen it.

    Truncation by the second moments of the outputs was published as Swift-SVD (arXiv 2604.01609) in April 2026.
    """
    return len(layers) == 1 and layers[0].out_features <= layers[0].in_features


def add_output_gram(total: torch.Tensor, layer: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add Wx(Wx)ᵀ of all tokens to `total` [m, m], without the bias. x: inputs [tokens, n], y: outputs [tokens, m].

    The products are float64. Large models have a few tokens with one channel a thousand times and more above the others
    (massive activations). In XXᵀ that stays in its row and column; W spreads it over all of y.
    """
    if y.dtype in (torch.float16, torch.bfloat16):  # rounding to 16 bits would hide the small singular values
        y = nn.functional.linear(x.float(), layer.weight.float())
    elif layer.bias is not None:
        y = y - layer.bias
    add_gram(total, y, products=torch.float64)


def roots(
    grams: dict[tuple[str, ...], torch.Tensor], report: Callable[[str], None] | None = None
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """A root of each Gram matrix, which is dropped from `grams`; reports where a ridge was needed."""
    for names in list(grams):
        root, ridge = root_of(grams.pop(names))
        if ridge and report:
            report(f"the inputs of {names[0]} do not span its channels: relative ridge {ridge:.0e}")
        yield names, root


def original_grams(stream_of: Callable[[nn.Module], ResidualStream], model: nn.Module, outputs: bool = False) -> Iterator[Grams]:
    """The `block_grams` of the dense model, block by block."""
    stream = stream_of(model)
    last = len(stream.anatomy.blocks) - 1
    for block in range(last + 1):
        yield block_grams(stream, block, block < last, outputs)


def original_roots(
    stream_of: Callable[[nn.Module], ResidualStream], model: nn.Module, report: Callable[[str], None] | None = None
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Roots of every distinct input of the dense model in order, with one block's matrices in memory."""
    for grams in original_grams(stream_of, model):
        yield from roots(grams.inputs, report)


def spectra(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Singular values [min(m, n)] of W X for every matrix of the dense model: the losses of truncation to any rank."""
    dense, found = matrices(model), {}
    for grams in original_grams(lambda network: ResidualStream(network, ids), model, outputs=True):
        found |= {name: eigenvalue_roots(grams.outputs.pop(name)) for name in list(grams.outputs)}
        for names, root in roots(grams.inputs):
            found |= {name: singular_values(dense[name].weight.detach(), root) for name in names}
    return {name: found[name] for name in dense}


# --- the method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for combinations that do not exist."""

    variant: str = "W"  # truncate; or: W+U (then refit to drifted inputs), U (plain SVD, then refit)
    order: str = "original"  # inputs of the dense model; or: compressed (of the part compressed so far)
    allocation: str = "uniform"  # one ratio for all matrices; or: loss (unequal ranks, see `allocate_by_type`)

    def __post_init__(self):
        check_settings(self, variant=VARIANTS, order=ORDERS, allocation=ALLOCATIONS)
        if self.order == "compressed" and self.variant != "W":
            raise ValueError(
                f"variant {self.variant} refits to drifted inputs, but order 'compressed' has truncated for those very inputs "
                "already: use order=original, or variant=W"
            )


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """Compress a model at several ratios; yields (ratio, model), each the same as from a run of its own.

    ids: calibration tokens [samples, length]. ratios: share R of the matrices' parameters to remove, 0 leaves them dense. The
    dense model is read only, and so are the results, which share tensors with it. Original order: one pass and one
    decomposition of each matrix for all ratios, and another pass for each ratio that is refitted; unequal ranks take a pass and
    a decomposition more. inplace: where one walk over the blocks is enough (variant W, uniform ranks), each dense matrix is freed
    when its factors are there. Raises ValueError before any work starts.
    """
    check_inplace(inplace, ratios)
    for ratio in ratios:
        check_share(ratio)
    check_calibration(Anatomy(model), ids)
    if inplace and (settings.variant, settings.allocation) == ("W", "uniform"):
        walk = LowRankWalk(model, ids, ratios[0], settings.order)
        return ((ratio, go(walk, "factored", progress)) for ratio in ratios)
    dense = matrices(model)
    # 1. Ranks.
    if settings.allocation == "loss":
        flat = {name: torch.ones(min(layer.weight.shape)) for name, layer in dense.items()}
        for ratio in ratios:
            allocate_by_type(model, flat, ratio)  # raises now rather than after the pass
        found = spectra(model, ids)
        plans = [allocate_by_type(model, found, ratio) for ratio in ratios]
    else:
        plans = [uniform_ranks(model, ratio) for ratio in ratios]

    def stream_of(network: nn.Module) -> ResidualStream:
        return ResidualStream(network, ids)

    # 2. Factors: fitted behind the compressed blocks, or to the dense model and then refitted if the variant says so.
    if settings.order == "compressed":
        fit = partial(truncated_block, dense, progress)
        return _through_compressed(model, stream_of, fit, ratios, plans, progress, outputs=True)
    if settings.variant == "U":
        fit = partial(factor, dense, [([name], None) for name in dense], progress=progress)
    else:
        fit = partial(truncated, dense, original_grams(stream_of, model, outputs=True), progress)
    if settings.variant == "W":
        return nested(model, fit, ratios, plans)
    return _refitted(model, stream_of, fit, ratios, plans, progress)


def _refitted(model, stream_of, fit, ratios, plans, progress):
    dense, factors = matrices(model), fit(largest(plans))
    yield from _through_compressed(model, stream_of, partial(refitted_block, dense, factors, progress), ratios, plans, progress)


def _through_compressed(
    model: nn.Module,
    stream_of: Callable[[nn.Module], ResidualStream],
    fit: Callable[[Grams, Ranks], dict[str, LowRankLinear]],
    ratios: Sequence[float],
    plans: Sequence[Ranks],
    progress: Callable[[str], None] | None,
    outputs: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model) for every plan, block after block: measure the dense block's inputs behind compressed ones, fit, replace.

    `fit` makes the two-factor layers of a block from its Gram matrices; `outputs` as in `block_grams`.
    """
    for ratio, ranks in zip(ratios, plans, strict=True):
        small, layers = shell(model), {}
        if ranks:
            stream = stream_of(small)
            for block in range(len(stream.anatomy.blocks)):
                fitted = fit(block_grams(stream, block, outputs=outputs), ranks)
                for name, layer in fitted.items():
                    small.set_submodule(name, layer)
                layers |= fitted
                if block < len(stream.anatomy.blocks) - 1:  # nobody needs the last block's output
                    stream.advance_block(block)
                if progress:
                    progress(f"{ratio:.0%}: compressed layer {block + 1} of {len(stream.anatomy.blocks)}")
        yield ratio, put(small, layers)


def truncated_block(dense: dict[str, nn.Linear], report: Callable | None, grams: Grams, ranks: Ranks) -> dict[str, LowRankLinear]:
    """Layers of a block truncated by its Gram matrices, each of which is dropped when used, those of outputs first."""
    found = {}
    for name in [name for name in grams.outputs if name in ranks]:
        basis, determined = decompose_outputs(dense[name].weight.detach(), grams.outputs.pop(name), ranks[name])
        found[name] = projected(dense[name], basis)
        del basis
        if determined < ranks[name] and report:
            report(f"the inputs of {name} determine {determined} of {ranks[name]} directions: plain SVD ranks the others")
    grams.outputs.clear()
    return found | factor(dense, roots(grams.inputs, report), ranks)


def truncated(
    dense: dict[str, nn.Linear], measured: Iterable[Grams], progress: Callable[[str], None] | None, ranks: Ranks
) -> dict[str, LowRankLinear]:
    """Layers of all blocks truncated for the inputs that were measured, block by block."""
    found = {}
    for grams in measured:
        found |= truncated_block(dense, progress, grams, ranks)
        if progress:
            progress(f"factored {len(found)} of {len(ranks)} matrices")
    return found


def refitted_block(
    dense: dict[str, nn.Linear], factors: dict[str, LowRankLinear], report: Callable | None, grams: Grams, ranks: Ranks
) -> dict[str, LowRankLinear]:
    """Layers of a block with given right factors and the left factors that fit the measured inputs best (variant W+U, U)."""
    found = {}
    for names, root in roots(grams.inputs, report):
        for name in names:
            if name in ranks:
                layer = narrowed(factors[name], ranks[name])
                u = refit(dense[name].weight.detach(), layer.u.weight.detach(), layer.v.weight.detach(), root)
                found[name] = low_rank(dense[name], u, layer.v.weight)
    return found


class LowRankWalk(Walk):
    """Truncation (variant W) at one ratio for all matrices, block by block, in either order."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, ratio: float, order: str):
        self.model, self.order = model, order
        self.dense, self.ranks = matrices(model), uniform_ranks(model, ratio)
        self.streams = [ResidualStream(model, ids)]

    def step(self, i: int) -> None:
        [stream] = self.streams
        grams = block_grams(stream, i, self.order == "original" and i < self.blocks - 1, outputs=True)
        for name, layer in truncated_block(self.dense, self.report, grams, self.ranks).items():
            self.model.set_submodule(name, layer)
        self._forget(i)
        if self.order == "compressed" and i < self.blocks - 1:
            stream.advance_block(i)

    def _forget(self, i: int) -> list[str]:
        """Drop the dense layers of a block, so that their weights can be freed; returns their names."""
        own = [name for name in self.dense if name.startswith(block_name(Anatomy(self.model).family, i, ""))]
        for name in own:
            del self.dense[name]
        return own

    def recall(self, note: dict, done: int) -> None:
        for i in range(done):
            for name in self._forget(i):
                if name in self.ranks:
                    layer = self.model.get_submodule(name)
                    self.model.set_submodule(name, empty_factors(layer, self.ranks[name]))

    def finish(self) -> bool:
        if self.ranks:
            record_edit(self.model, edit="low-rank", ranks=self.ranks)
        return True


def on_disk(model: nn.Module, ids: torch.Tensor, ratio: float, settings: Settings, note: dict) -> LowRankWalk:
    """The walk over a model on disk. Raises ValueError for settings that need the whole model before they cut."""
    if (settings.variant, settings.allocation) != ("W", "uniform"):
        raise ValueError(
            "svd-llm runs from disk with variant W and uniform allocation: the others need the whole model before they cut"
        )
    return LowRankWalk(model, ids, ratio, settings.order)


def compress_model(model: nn.Module, ids: torch.Tensor, ratio: float, progress: Callable | None = None, **settings) -> nn.Module:
    """Compress a model at one ratio; settings: fields of `Settings`."""
    return next(sweep(model, ids, [ratio], Settings(**settings), progress))[1]


def recover_factors(
    model: nn.Module,
    ids: torch.Tensor,
    settings: LoRA,
    order: Sequence[str] = ("u", "v"),
    validation: torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Recovered]:
    """Fine-tune the factors of a compressed model in rounds, each merged before the next; one result per round.

    order: the factors that each round trains. ("u", "v") and ("v", "u") are the paper's sequential update, in which a
    factor is fixed while the other learns; ("uv",) trains both at once. Ranks and shapes stay. ids, settings, validation:
    those of `recover`, once per round. The model given stays as it is; so do matrices that are dense. Raises
    ValueError before any work for rounds that name no factor and for models without factors. Source: SVD-LLM, section 3.2.
    """
    if not order or any(not part or set(part) - {"u", "v"} for part in order):
        raise ValueError(f'{order!r} does not name rounds over factors: use ("u", "v"), ("v", "u"), or ("uv",) for both at once')
    rounds = []
    for part in order:
        rounds.append(recover(rounds[-1].model if rounds else model, ids, settings, tuple(part), validation, progress))
    return rounds
