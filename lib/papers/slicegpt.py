"""SliceGPT (Ashkboos et al., arXiv 2401.15024): rotate the residual stream to its principal axes, delete the last ones.

The stream x at each junction is replaced by u = x A, where the k columns of A span the directions of largest energy. What is
built from the axes is in `lib.papers.sliced_network`; here they are found.

How the calibration works: keeping k directions of the stream is the same as projecting it, x̂ = x A Aᵀ, and the
norm sees ‖x̂‖ = ‖u‖. So we run the model's own, unchanged dense blocks on a projected stream. That is exactly the
sliced network in the original coordinates; each half block runs once, and the dense weights are read, never modified.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import nn

from lib.papers.sliced_network import (
    LAYOUTS,
    Junction,
    JunctionNorm,
    NormFit,
    check_sliceable,
    check_widths,
    rotate_and_slice,
    sandwich_norms,
    shapes_only,
)
from lib.primitives.anatomy import Anatomy, head_size, norm_epsilon, norm_gain
from lib.primitives.calibration import ResidualStream
from lib.primitives.checks import check_share, choose_one, exact
from lib.primitives.cost import count
from lib.primitives.linalg import (
    add_gram,
    at_least_float32,
    coordinate_axes,
    principal_axes,
    random_rotation,
    remove_mean,
    root_of,
)
from lib.primitives.surgery import parameter

SIGNALS = ("raw", "normalised")
ORIENTATIONS = ("pca", "random")
STATISTICS = ("sliced", "dense")
ESTIMATES = ("metric", "fitted")  # of OUTPUT_NORMS, those that estimate a norm from what a cut leaves of its input


def kept_width(d: int, level: float, round_interval: int = 8) -> int:
    """Width k left of d at a slicing level in [0, 1): ⌊(1 - level) d⌋, rounded down to a multiple of `round_interval`.

    Computed on the fraction that the float stands for: (1 - 0.8) 5120 is 1024, which binary arithmetic rounds to 1023 (and
    the published code then to 1016). Level 0 keeps d. Raises ValueError where nothing would be left.
    """
    check_share(level, "slicing level", "0.25 deletes a quarter of the directions")
    if level == 0:
        return d
    if round_interval < 1:
        raise ValueError(f"widths are rounded to multiples of {round_interval}, which is not a positive number: use 1 for none")
    k = int((1 - exact(level)) * d)
    k -= k % round_interval
    if k < 1:
        raise ValueError(f"slicing {d} by {level} in steps of {round_interval} leaves nothing: use a lower level or step")
    return k


def constant_widths(model: nn.Module, level: float, round_interval: int = 8, slice_head: bool = False) -> list[int]:
    """The paper's schedule: the same width at every junction; the last one is the head's, d unless it is sliced too."""
    d = model.config.hidden_size
    k = kept_width(d, level, round_interval)
    return [k] * (Anatomy(model).junctions - 1) + [k if slice_head else d]


def variance_widths(energies: torch.Tensor, discarded: float, round_interval: int = 8, slice_head: bool = False) -> list[int]:
    """The paper's varying schedule (section 4, Table 6): at each junction, the fewest axes that discard at most this energy.

    energies [junctions, d], largest first, from `spectra`: those of the dense model, so that the widths are known before
    anything is sliced (the paper reads each spectrum as it slices). discarded: share of the energy, in [0, 1). Widths are
    rounded up to multiples of `round_interval`, at most d.
    """
    check_share(discarded, "the discarded share of energy", "0.01 discards a hundredth")
    d = energies.shape[1]
    kept = energies.double().cumsum(1) / energies.double().sum(1, keepdim=True)
    widths = [1 + int((share < 1 - discarded - 1e-12).sum()) for share in kept]
    widths = [min(d, -(-k // round_interval) * round_interval) for k in widths]
    return widths if slice_head else [*widths[:-1], d]


def widths_for_size(
    model: nn.Module,
    energies: torch.Tensor,
    params: int,
    round_interval: int = 8,
    layout: str = "low-rank",
    slice_head: bool = False,
    output_norms: str = "refuse",
) -> list[int]:
    """A variance schedule that comes close to `params` parameters from below, counted on the real modules.

    Bisects the discarded energy. (Size is not quite monotone in it: a shortcut to a narrower junction is stored dense.)
    Raises ValueError if even the smallest model is larger.
    """
    low, high = 0.0, 1 - 1e-9  # too large a model, small enough a model

    def size(discarded: float) -> int:
        widths = variance_widths(energies, discarded, round_interval, slice_head)
        return count(shapes_only(model, widths, layout, output_norms)).params

    if size(high) > params:
        raise ValueError(f"no variance schedule of this model has at most {params:,} parameters: ask for more")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > params else (low, middle)
    return variance_widths(energies, high, round_interval, slice_head)


# --- calibration --------------------------------------------------------------------------------------------------------


def rms_normalise(x: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    """Each row of x [..., d] divided by its root mean square; at least float32."""
    x = at_least_float32(x)
    return x * (x.square().mean(-1, keepdim=True) + epsilon).clamp(min=1e-30).rsqrt()


def decompose(
    stream: ResidualStream, signal: str = "raw", precision: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d] and principal axes [d, d] of the stream where it stands.

    signal `raw` decomposes the residual stream itself, as the released code does; `normalised` decomposes the output of
    the norm, as the paper's text says (each token then has the same weight).
    """
    return principal_axes(stream.gram(rms_normalise if signal == "normalised" else None), precision)


def junctions(
    stream: ResidualStream,
    first: tuple[torch.Tensor, torch.Tensor],
    widths: Sequence[int],
    signal: str = "raw",
    precision: torch.dtype = torch.float64,
    compensate: bool = False,
    output_norms: str = "refuse",
) -> Iterator[Junction]:
    """Every junction in order, each measured on the stream already sliced to `widths` before it.

    `first` is the decomposition of junction 0, where the stream must stand. One evaluation of each half block: measure,
    project, go on (the published code runs every block twice). At widths d this is the dense model. `compensate` also
    measures the mean of what is deleted and gives it back, as the finished network will. With output_norms `metric` or
    `fitted` the stream goes on behind each sandwich norm as that network estimates it (the axes are those of the exact norm:
    they come first).
    """
    anatomy, found, fit = stream.anatomy, first, None
    estimates = output_norms in ESTIMATES and bool(sandwich_norms(anatomy.family))
    steps = [(run, halves, block) for block in range(len(anatomy.blocks)) for run, halves in anatomy.steps]
    for (k, next_k), (run, halves, block) in zip(itertools.pairwise(widths), steps, strict=True):
        values, axes = found
        project = _projection(axes, k, anatomy)
        norms = [anatomy.blocks[block].get_submodule(half.norm) for half in halves]
        shifts = _deleted_means(stream, project, norm_epsilon(norms[0])) if compensate else (None, None)
        yield Junction(axes, values, *shifts, fit)
        output_norm = anatomy.blocks[block].get_submodule(halves[0].output_norm) if estimates and next_k < anatomy.width else None
        with _shifted(norms, shifts[1], anatomy), _inputs_of(output_norm) as written:
            stream.advance(run, block, before=project, after=shifts[0])
        found = decompose(stream, signal, precision)
        if output_norm is not None:
            fit = _estimate_norm(stream, output_norm, written, found[1][:, :next_k], output_norms == "fitted")
    values, axes = found
    shifts = (None, None)
    if compensate:
        final_norm = anatomy.get(anatomy.family.final_norm)
        shifts = _deleted_means(stream, _projection(axes, widths[-1], anatomy), norm_epsilon(final_norm))
    yield Junction(axes, values, *shifts, fit)


def _deleted_means(stream: ResidualStream, project: Callable, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [d] over the real tokens of what a projection takes from the stream and from the norm's output (before gain)."""
    from_stream = from_norm = 0.0
    tokens = 0
    for x in stream.tokens():
        kept = project(x)
        from_stream += (x.double() - kept.double()).sum(0)
        from_norm += (rms_normalise(x, epsilon).double() - rms_normalise(kept, epsilon).double()).sum(0)
        tokens += len(x)
    return from_stream / tokens, from_norm / tokens


@contextlib.contextmanager
def _shifted(norms: list[nn.Module], shift: torch.Tensor | None, anatomy: Anatomy) -> Iterator[None]:
    """Add gain · shift to what these norms return: a mean given back to the readers behind them."""
    handles = []
    for norm in {id(norm): norm for norm in norms}.values() if shift is not None else ():
        given = norm_gain(norm, anatomy.family) * shift
        handles.append(norm.register_forward_hook(lambda _, inputs, out, given=given: out + given.to(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _inputs_of(norm: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """What a norm is given within the `with`, batch by batch; nothing without one."""
    seen: list[torch.Tensor] = []
    hook = contextlib.nullcontext()
    if norm is not None:
        hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with hook:  # torch's handles remove themselves
        yield seen


def fit_norm(energy: torch.Tensor, left: torch.Tensor, epsilon: float) -> NormFit:
    """Least squares for rms(y)² from the energy that a cut leaves of y: slope · left + intercept, neither of them negative.

    energy: rms(y)² [tokens]; left: Σ of the squares of what is left [tokens]. The error minimised is that of rms(y)² + epsilon
    relative to itself: tokens then weigh the same, however large (a few are a thousand times larger), as they do behind the
    norm. Not negative, or the estimate could be: with one of the two at zero the fit is that of the other alone.
    """
    true, left = energy.double() + epsilon, left.double()
    columns = torch.stack([left / true, 1 / true], dim=1)
    wanted = energy.double() / true  # = 1 but for epsilon, which the norm adds itself

    def solved(used: list[int]) -> NormFit:
        weights = torch.zeros(2, dtype=columns.dtype, device=columns.device)
        size = columns[:, used].norm(dim=0).clamp(min=1e-30)  # brought to length 1: the two differ by the scale of y
        x = columns[:, used] / size
        weights[used] = torch.linalg.pinv(x.T @ x, hermitian=True) @ (x.T @ wanted) / size
        error = (columns @ weights - wanted).square().mean().sqrt()
        return NormFit(*weights.tolist(), float(error))

    both = solved([0, 1])
    if both.slope >= 0 and both.intercept >= 0:
        return both
    return min(solved([0]), solved([1]), key=lambda fit: fit.error)


def undo_by_regression(gram: torch.Tensor, gain: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The matrix [d, d] that takes what a cut leaves of g * y, (g * y) B Bᵀ, to the best linear estimate of y.

    gram: Σ yᵀy [d, d]; gain: g [d]; kept: B [d, k]. Least squares, so no gain is divided by: where one is zero its channel is
    told from the others. With k = d and no gain at zero it is diag(1/g).
    """
    seen = gain[:, None] * kept
    across = seen.T @ gram
    root, _ = root_of(across @ seen)
    return kept @ torch.cholesky_solve(across, root)


@torch.no_grad()
def _estimate_norm(
    stream: ResidualStream, norm: nn.Module, written: list[torch.Tensor], kept: torch.Tensor, regress: bool
) -> NormFit:
    """Fit a sandwich norm to what a cut leaves of its inputs, and correct the stream behind it to what that estimate gives.

    written: y [b, tokens, d], batch by batch; kept: B [d, k]. Of y the cut leaves (g * y) B Bᵀ, whose energy is taken after
    division by g, y' Bᵀ diag(g)⁻² B y'ᵀ, or with `regress` after the best linear map.
    """
    gain, epsilon = norm_gain(norm, stream.anatomy.family), norm_epsilon(norm)
    batches = list(zip(stream.batches(), written, strict=True))
    undo = None
    if regress:
        gram = torch.zeros(len(gain), len(gain), dtype=torch.float64, device=gain.device)
        for (_, real), y in batches:  # each token weighs the same, as in the fit of its energy
            add_gram(gram, rms_normalise(y[real].double(), epsilon))
        undo = undo_by_regression(gram, gain, kept)
    to_estimate = gain[:, None] * kept @ (kept.T / gain if undo is None else kept.T @ undo)  # of y from y

    def energies(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.double()
        return y.square().mean(-1), (y @ to_estimate).square().sum(-1)

    measured = [energies(y[real]) for (_, real), y in batches]
    fit = fit_norm(*(torch.cat(values) for values in zip(*measured, strict=True)), epsilon)
    for (rows, _), y in batches:
        energy, left = energies(y)
        ratio = ((energy + epsilon) / (fit.slope * left + fit.intercept + epsilon)).sqrt()
        stream.hidden[rows] += ((ratio - 1)[..., None] * norm(y)).to(stream.hidden.dtype)
    return replace(fit, undo=undo)


def spectra(model: nn.Module, ids: torch.Tensor, signal: str = "raw", batch: int = 8) -> torch.Tensor:
    """Eigenvalues [junctions, d] of the dense model, largest first: how much energy slicing could keep."""
    stream = ResidualStream(model, ids, batch=batch)
    full = [stream.anatomy.width] * stream.anatomy.junctions
    return torch.stack([found.values for found in junctions(stream, decompose(stream, signal), full, signal)])


def principal_angles(model: nn.Module, ids: torch.Tensor, level: float, round_interval: int = 8, batch: int = 8) -> torch.Tensor:
    """Angles [steps, k] in degrees, ascending, between the subspaces kept at neighbouring junctions of the sliced network.

    Their cosines are the singular values of the shortcuts AᵀB. Angles of zero are directions that both junctions keep.
    """
    check_sliceable(model)
    stream = ResidualStream(model, ids, batch=batch)
    widths = constant_widths(model, level, round_interval, slice_head=True)
    kept = [found.axes[:, : widths[0]] for found in junctions(stream, decompose(stream), widths)]
    # From the sines of the dropped part: the arc cosine of a number near 1 has no digits left.
    angles = []
    for a, b in itertools.pairwise(kept):
        sine = torch.linalg.svdvals(a - b @ (b.T @ a)).clamp(max=1)
        angles.append(torch.rad2deg(torch.asin(sine)).flip(0))
    return torch.stack(angles)


def _projection(axes: torch.Tensor, k: int, anatomy: Anatomy) -> Callable:
    """x -> x A Aᵀ (centred first for LayerNorm families), in the coordinates of the dense model.

    The product is at least float32: a half-precision A is no longer orthogonal.
    """

    def project(x: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(x)
        wide = remove_mean(wide) if anatomy.family.subtracts_mean else wide
        if k < anatomy.width:
            a = axes[:, :k].to(wide)
            wide = (wide @ a) @ a.T
        return wide.to(x.dtype)

    return project


def randomly_oriented(found: Iterator[Junction], widths: Sequence[int], generator: torch.Generator) -> Iterator[Junction]:
    """Rotate the kept axes of each junction among themselves at random: the same function in other coordinates."""
    for junction, k in zip(found, widths, strict=False):
        q = junction.axes
        turned = torch.cat([q[:, :k] @ random_rotation(k, generator).to(q), q[:, k:]], dim=1)
        yield replace(junction, axes=turned)


# --- slicing ------------------------------------------------------------------------------------------------------------


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    cuts: Sequence[float | Sequence[int]],
    *,
    round_interval: int = 8,
    layout: str = "low-rank",
    signal: str = "raw",
    orientation: str = "pca",
    statistics: str = "sliced",
    slice_head: bool = False,
    compensate: bool = False,
    drop_below: float = 0.0,
    precision: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    batch: int = 8,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
    output_norms: str = "refuse",
) -> Iterator[tuple[float | Sequence[int], nn.Module]]:
    """Slice a model at several levels; yields (cut, sliced model), each the same function as a run of its own.

    ids: calibration tokens [samples, length]. A cut is a slicing level, or a schedule: one width
    per junction, the last one the head's (`variance_widths`, or `widths` from the record of a saved model). The dense model
    is read only; first junction and residual buffer are shared by all cuts.

    statistics `dense` measures every junction on the dense model instead of the network sliced so far: one calibration for
    all cuts, a preview that holds all axes in memory (8 d² bytes a junction). compensate: give the mean of what is deleted
    back as biases (our extra; off, as in the paper). drop_below: leave out shortcut columns whose principal angle has
    1 - cos below this. output_norms: for models with sandwich norms (Gemma 3), which the paper does not cover, one of the
    extensions of ours in `lib.papers.sliced_network`, `exact`, `metric` or `fitted`; the record of the result holds the error
    of every estimated norm.

    Raises ValueError for bad cuts, ids, weights or architectures before any work starts.
    """
    for name, value, known in (
        ("layout", layout, LAYOUTS), ("signal", signal, SIGNALS), ("orientation", orientation, ORIENTATIONS),
        ("statistics", statistics, STATISTICS),
    ):  # fmt: skip
        choose_one(name, value, known)
    if layout == "global":
        raise ValueError("one basis for all junctions is measured in another way: use global_axes and slice_globally")
    if orientation == "random" and generator is None:
        raise ValueError("orientation 'random' needs a torch.Generator, so that the run can be repeated")
    if compensate and statistics == "dense":
        raise ValueError("compensation is measured on the sliced stream: use statistics 'sliced'")
    if output_norms in ESTIMATES and statistics == "dense":
        raise ValueError("the scale of output norms is estimated on the sliced stream: use statistics 'sliced'")
    if inplace and len(cuts) != 1:
        raise ValueError("slicing in place consumes the dense model: give exactly one level")
    check_sliceable(model, output_norms)
    schedules = []
    for cut in cuts:
        level = isinstance(cut, int | float)
        schedules.append(constant_widths(model, cut, round_interval, slice_head) if level else list(cut))
        check_widths(Anatomy(model), schedules[-1], layout)
    stream = ResidualStream(model, ids, batch)

    def run() -> Iterator[tuple[float | Sequence[int], nn.Module]]:
        first = decompose(stream, signal, precision)
        if statistics == "dense":
            dense = list(junctions(stream, first, [stream.anatomy.width] * stream.anatomy.junctions, signal, precision))
        for i, (cut, widths) in enumerate(zip(cuts, schedules, strict=True)):
            if statistics == "dense":
                found = iter(dense)
            else:
                if i:
                    stream.restart()
                found = junctions(stream, first, widths, signal, precision, compensate, output_norms)
            if orientation == "random":
                found = randomly_oriented(found, widths, generator)
            settings = dict(inplace=inplace, progress=progress, output_norms=output_norms)
            yield cut, rotate_and_slice(model, found, widths, layout, drop_below, **settings)

    return run()


def slice_model(model: nn.Module, ids: torch.Tensor, cut: float | Sequence[int], **settings) -> nn.Module:
    """Slice a model at one level, or to one schedule of widths; `settings` are those of `sweep`."""
    return next(sweep(model, ids, [cut], **settings))[1]


# --- without shortcuts ------------------------------------------------------------------------------------------


def global_axes(model: nn.Module, ids: torch.Tensor, rotate: bool = True, batch: int = 8) -> torch.Tensor:
    """Principal axes [d, d] of all junctions of the dense model together; any width can be cut from them.

    The covariances are summed after division by their traces (our choice: late junctions carry far more energy and would
    decide alone). One pass over the dense model, without the paper's re-measuring behind each cut. Without `rotate`: the
    coordinates as they are, sorted by energy; cutting those is the paper's baseline of deleting columns of small norm.
    """
    check_sliceable(model)
    stream = ResidualStream(model, ids, batch=batch)
    total = stream.gram()
    total /= total.trace()
    for block in range(len(stream.anatomy.blocks)):
        for run, _ in stream.anatomy.steps:
            stream.advance(run, block)
            gram = stream.gram()
            total += gram / gram.trace()
    return (principal_axes if rotate else coordinate_axes)(total)[1]


def slice_globally(model: nn.Module, axes: torch.Tensor, k: int, slice_head: bool = True) -> nn.Module:
    """Slice every junction with the same axes [d, d]: no shortcuts, in any family; our own checkpoint format."""
    check_sliceable(model)
    widths = [k] * (Anatomy(model).junctions - 1) + [k if slice_head else len(axes)]
    return rotate_and_slice(model, itertools.repeat(Junction(axes)), widths, "global")


def slice_without_shortcuts(model: nn.Module, ids: torch.Tensor, level: float, **settings) -> nn.Module:
    """Slice with a basis of its own at every junction, each turned to the one before, and leave every shortcut out.

    Our variant. A basis B is chosen so that the shortcut AᵀB is I - CCᵀ; this network takes the identity instead, which
    is close where neighbouring subspaces are. Like one basis for all it has no shortcuts, but loses less. The head is sliced
    too. `settings` are those of `sweep`.
    """
    return slice_model(model, ids, level, slice_head=True, drop_below=float("inf"), **settings)


def stock_model(sliced: nn.Module) -> nn.Module:
    """A sliced network without shortcuts as a stock model of width k, which needs nothing of this suite.

    sliced: from `slice_globally` or `slice_without_shortcuts`, head included; its weights are shared, not copied. What has to
    change is the norm, which must divide by d and not by k: since ‖u‖²/k + ε d/k = (d/k)(‖u‖²/d + ε), a stock RMSNorm with
    gain √(d/k) and epsilon ε d/k does just that. Raises ValueError for networks that no stock class can hold.
    """
    d, k = sliced.config.hidden_size, _stock_width(sliced)
    config = copy.deepcopy(sliced.config)
    config.head_dim = head_size(config)
    config.hidden_size, config.rms_norm_eps = k, config.rms_norm_eps * d / k
    with init_empty_weights(include_buffers=False):
        narrow = type(sliced)(config)
    for name, module in sliced.named_modules():
        if isinstance(module, JunctionNorm):
            gain = torch.full((k,), (d / k) ** 0.5, dtype=torch.float64)
            narrow.get_submodule(name).weight = parameter(gain, like=sliced.get_input_embeddings().weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            narrow.set_submodule(name, module)
    return narrow.to(sliced.device).eval()


def _stock_width(sliced: nn.Module) -> int:
    """The one width of a sliced network that a stock class can hold; ValueError with the reason where none can."""
    family, kind = Anatomy(sliced).family, sliced.config.model_type
    advice = "save it with lib.models.checkpoint instead"
    edit = next((e for e in getattr(sliced, "edits", []) if e["edit"] == "slicegpt"), None)
    if edit is None:
        raise ValueError("this model is not sliced: give the result of slice_globally or slice_without_shortcuts")
    if family.subtracts_mean or family.gain_offset or family.parallel:
        raise ValueError(f"a narrower {kind} is not a stock model: its class ties head size and norm to the width; {advice}")
    if len(set(edit["widths"])) > 1 or any(edit["ranks"]) or None in edit["ranks"] or edit["compensated"]:
        raise ValueError(
            f"shortcuts, unequal widths (a head of full width is one) or new biases are not stock; {advice}, or slice with "
            "slice_without_shortcuts or slice_globally"
        )
    for name, module in Anatomy(sliced).blocks[0].named_modules():
        if hasattr(module, "variance_epsilon"):  # those of the junctions are ours by now
            raise ValueError(f"{kind} normalises {name} with the epsilon of its other norms, which must change; {advice}")
    return edit["widths"][0]
