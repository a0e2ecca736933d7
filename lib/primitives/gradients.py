"""Gradient scores of weights; every gradient is used and freed as soon as the backward pass has computed it.

Two scalars are differentiated: the loss (SNIP) and the summed mean singular values of the features that layers put out
(ReFer). A hook on each requested matrix W passes W and its gradient g on and frees g, so the gradient of one matrix is in
memory at a time, never those of the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import check_calibration
from lib.primitives.checks import choose_one
from lib.primitives.losses import LOSSES, at_least_float32

# SNIP differentiates the loss, ReFer the features.
SCORES = ("refer", "snip")


# --- scalars to differentiate --------------------------------------------------------------------------------------------


# Below this share of the largest one, an eigenvalue of a float64 Gram matrix is rounding error.
RANK_TOLERANCE = 1e-13


class _MeanSingularValue(torch.autograd.Function):
    """With G = YYᵀ = Q diag(w) Qᵀ: mean √w, and its gradient Q diag(w^-½) QᵀY / n. No vectors of Y, no 1 / (σ_i² - σ_j²)."""

    @staticmethod
    def forward(ctx, y: torch.Tensor) -> torch.Tensor:
        wide = y.detach().double()
        ctx.tall = y.shape[0] > y.shape[1]
        gram = wide.T @ wide if ctx.tall else wide @ wide.T
        if not torch.isfinite(gram).all():
            raise ValueError("features hold NaN or infinity: score the model in float32 or bfloat16")
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=max(values[-1].item() * RANK_TOLERANCE, torch.finfo(torch.float64).tiny))
        root = (vectors * values.rsqrt()) @ vectors.T / len(values)
        ctx.save_for_backward(y, root)
        return values.sqrt().mean()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> torch.Tensor:
        y, root = ctx.saved_tensors
        wide = y.double()
        return (upstream * (wide @ root if ctx.tall else root @ wide)).to(y.dtype)


def mean_singular_value(y: torch.Tensor) -> torch.Tensor:
    """Mean of the min(r, c) singular values of a matrix [r, c], as a differentiable float64 scalar.

    Singular values may repeat, and directions without energy get no gradient: values below √1e-13 of the largest are raised
    to it. ReFer, as equation (1) of Structured AFR writes it.
    """
    return _MeanSingularValue.apply(y)


# How the output [b, t, c] of a layer becomes matrices. The released code takes one sequence and puts it into one row, so that
# the "mean singular value" is the norm ‖Y‖; the paper's text suggests tokens x channels.
VIEWS = {
    "flat": lambda y: sum(mean_singular_value(one.reshape(1, -1)) for one in y),
    "token": lambda y: sum(mean_singular_value(one) for one in y),
    "batch": lambda y: mean_singular_value(y.flatten(1)),
    "l1": lambda y: y.abs().sum(dtype=torch.float64),
}


FEATURES = ("projections", "all", "mlp", "block")


def feature_modules(model: nn.Module, features: str) -> list[nn.Module]:
    """The modules whose outputs are ReFer's features.

    `projections`: all matrices of the MLPs (the paper's later code); `all`: every module but the model itself and its
    containers (the earlier code); `mlp`: what each MLP writes; `block`: what each block returns.
    """
    choose_one("features", features, FEATURES)
    anatomy = Anatomy(model)
    mlp = anatomy.family.mlp
    if features == "projections":
        return [block.get_submodule(name) for block in anatomy.blocks for name in (*mlp.readers, mlp.writer)]
    if features == "all":
        return [module for module in model.modules() if module is not model and not isinstance(module, nn.ModuleList)]
    if features == "mlp":
        return [block.get_submodule(mlp.writer) for block in anatomy.blocks]
    return list(anatomy.blocks)


@contextlib.contextmanager
def _collecting(modules: Sequence[nn.Module], view: Callable, shape: torch.Size) -> Iterator[Callable[[], torch.Tensor]]:
    """Within the `with`, modules collect the scalars of their outputs until the yielded function is called, which sums them.

    Later forward passes compute the scalars too, because checkpoints must repeat the same operations, but do not keep them.
    """
    found: list[torch.Tensor] | None = []

    def hook(_, inputs, output):
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, torch.Tensor) or not y.requires_grad:  # does not depend on the weights in question
            return
        value = view(y.reshape(shape[0], -1, y.shape[-1]))  # OPT flattens batch and tokens before its MLP
        if found is not None:
            found.append(value)

    def total() -> torch.Tensor:
        nonlocal found
        taken, found = found, None
        return sum(taken[1:], taken[0])

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


# --- the backward passes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """How the backward passes are made. Raises ValueError for unknown names."""

    scores: tuple[str, ...] = ("snip",)  # refer, snip or both, which then share the forward pass
    loss: str = "lm_shift"
    features: str = "projections"
    view: str = "flat"
    batch: int = 1  # sequences in one pass
    checkpointing: bool = False  # keep only the inputs of the blocks; run each block again on the way back, score by score

    def __post_init__(self):
        if not self.scores:
            raise ValueError(f"no score asked for: choose one or more of {', '.join(SCORES)}")
        for score in self.scores:
            choose_one("score", score, SCORES)
        for name, known in (("loss", LOSSES), ("features", FEATURES), ("view", VIEWS)):
            choose_one(name, getattr(self, name), known)
        if self.batch < 1:
            raise ValueError(f"a batch has at least 1 sequence, not {self.batch}")


def each_gradient(
    model: nn.Module,
    ids: torch.Tensor,
    names: Sequence[str],
    take: Callable[[str, str, torch.Tensor, torch.Tensor], None],
    passes: Passes = Passes(),
    progress: Callable[[str], None] | None = None,
) -> None:
    """Call `take(score, name, W, g)` for every batch of sequences, every score and every named matrix, and free g afterwards.

    ids: [samples, tokens]; names: of linear layers in the model, whose weights W [out, in] get the gradients g [out, in] of
    the batch, in the model's dtype; their biases are left out. `requires_grad` and `grad` of all parameters are
    afterwards as they were before. Raises ValueError, before any work, for ids that cannot be used; and as soon as a
    loss or a gradient overflows.
    """
    check_calibration(Anatomy(model), ids)
    if ids.shape[1] < 2:
        raise ValueError(f"sequences of {ids.shape[1]} token predict nothing: use a longer text, and at least 2 tokens")
    modules = feature_modules(model, passes.features) if "refer" in passes.scores else []
    weights = {name: model.get_submodule(name).weight for name in names}
    current = [""]

    def hook(name: str) -> Callable:
        def use(weight: torch.Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            # NaN and infinity show in the extremes; no mask as large as the gradient is made.
            if not all(torch.isfinite(extreme) for extreme in torch.aminmax(gradient)):
                raise ValueError(f"the gradient of {name} overflows in {weight.dtype}: score in float32 or bfloat16")
            take(current[0], name, weight.detach(), gradient)

        return use

    # 1. Until the end: hooks on the weights, and no gradients for any other parameter.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only(model, list(weights.values())))
        if passes.checkpointing:
            stack.enter_context(_checkpointed(Anatomy(model).blocks))
        for name, weight in weights.items():
            stack.callback(weight.register_post_accumulate_grad_hook(hook(name)).remove)
        # 2. Batches. Scores share a forward pass by retaining its graph. With checkpoints it would keep all recomputed blocks.
        groups = [(score,) for score in passes.scores] if passes.checkpointing else [passes.scores]
        for start in range(0, len(ids), passes.batch):
            part = ids[start : start + passes.batch].to(model.device)
            for scores in groups:
                # Checkpoints run the blocks again, with the same hooks: they stay until all is differentiated.
                with torch.enable_grad(), _scalars(model, part, scores, modules, passes) as scalars:
                    while scalars:
                        current[0], scalar = scalars.popitem()
                        if not torch.isfinite(scalar):
                            raise ValueError(f"the scalar of {current[0]} is {scalar.item()}: score in float32 or bfloat16")
                        scalar.backward(retain_graph=bool(scalars), inputs=list(weights.values()))
            if progress:
                progress(f"gradients of {min(start + passes.batch, len(ids))} of {len(ids)} sequences")


@contextlib.contextmanager
def _scalars(
    model: nn.Module, part: torch.Tensor, scores: Sequence[str], modules: Sequence[nn.Module], passes: Passes
) -> Iterator[dict[str, torch.Tensor]]:
    """{score: the scalar to differentiate} from one forward pass over ids `part` [b, t]."""
    with _collecting(modules if "refer" in scores else (), VIEWS[passes.view], part.shape) as total:
        logits = model(input_ids=part, use_cache=False).logits
        scalars = {"refer": total()} if "refer" in scores else {}
        if "snip" in scores:
            scalars["snip"] = LOSSES[passes.loss](logits, part)
        del logits
        yield scalars


@contextlib.contextmanager
def _only(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the `with`, only the wanted parameters require gradients, and no parameter holds one."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(p) for p in wanted}
    try:
        for p, _, _ in before:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        yield
    finally:
        for p, flag, gradient in before:
            p.requires_grad_(flag)
            p.grad = gradient


@contextlib.contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run the forwards of blocks under checkpointing. transformers' own switch acts in training mode alone, with dropout."""

    def wrap(forward: Callable) -> Callable:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    try:
        for block in blocks:
            block.forward = wrap(block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is used again


# --- sums over sequences -------------------------------------------------------------------------------------------------

PRODUCTS = {
    "signed": lambda w, g: w * g,
    "absolute": lambda w, g: (w * g).abs(),
    "squared": lambda w, g: g.square(),
}


def summed(
    model: nn.Module,
    ids: torch.Tensor,
    names: Sequence[str],
    product: str = "signed",
    progress: Callable[[str], None] | None = None,
    **passes,
) -> dict[str, dict[str, torch.Tensor]]:
    """{score: {name: Σ over batches}} of `signed` W g, `absolute` |W g| or `squared` g², at least float32 [out, in].

    The totals are as large as the named matrices; `each_gradient` lets a caller reduce them. passes: fields of `Passes`.
    """
    choose_one("product", product, PRODUCTS)
    how = Passes(**passes)
    totals: dict[str, dict[str, torch.Tensor]] = {score: {} for score in how.scores}

    def take(score: str, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        value = PRODUCTS[product](at_least_float32(weight), at_least_float32(gradient))
        if name in totals[score]:
            totals[score][name] += value
        else:
            totals[score][name] = value

    each_gradient(model, ids, names, take, how, progress)
    return totals
