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
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from accelerate import init_empty_weights
from torch import nn

from lib.papers.sliced_network import (
    LAYOUTS,
    OUTPUT_NORMS,
    Junction,
    JunctionNorm,
    NormFit,
    check_sliceable,
    check_widths,
    rotate_and_slice,
    sandwich_norms,
    shapes_only,
    usual_layout,
)
from lib.primitives.anatomy import Anatomy, Family, head_size, norm_epsilon, norm_gain
from lib.primitives.calibration import ResidualStream, inputs_of
from lib.primitives.checks import COUNTS, FROM_ZERO, check_inplace, check_settings, check_share, choose_one, exact
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
from lib.primitives.surgery import parameter, refusal

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
CHOICES = {
    "output_norms": OUTPUT_NORMS,
    "signal": ("raw", "normalised"),
    "orientation": ("pca", "random"),
    "statistics": ("sliced", "dense"),
    "precision": tuple(PRECISIONS),
    "passes": ("exact", "bfloat16"),
}
SCHEDULES = ("constant", "variance")
ESTIMATES = ("metric", "fitted")  # of OUTPUT_NORMS, those that estimate a norm from what a cut leaves of its input


@dataclass(frozen=True)
class Settings:
    """Every choice of a SliceGPT run. The defaults compute the paper's network and store it with fewer parameters.

    - layout: `low-rank`, `dense` or `tied`, see `lib.papers.sliced_network`; empty for `tied` if the model's head shares its
      embedding table and is not sliced, else `low-rank`.
    - schedule: `constant`, one width for all junctions; `variance`, as many parameters as `constant` would leave, distributed
      by the spectra of the dense model; or a tuple of widths, one per junction, the last one the head's.
    - compensate: add the mean of what is deleted back as biases (our extra, not in the paper).
    - output_norms: what to do about sandwich norms (Gemma 3), which the paper does not cover: `refuse`, or one of our extensions
      `exact`, `metric` and `fitted`.
    - signal: `raw` for the axes of the residual stream, `normalised` for those of the norm's output, see `decompose`.
    - orientation: `pca`, or `random`, which rotates the kept axes among themselves and so leaves the function unchanged.
    - statistics: `sliced` measures each junction on the network sliced so far, `dense` all junctions on the dense model. One
      calibration then serves all cuts, but all axes are held in memory (8 d² bytes a junction).
    - passes: `exact` runs the calibration in the model's own dtype; `bfloat16` multiplies matrices in bfloat16, an approximation
      that saves time where the processor has units for it, see `_quick`.
    - drop_below: leave out shortcut columns whose principal angle has 1 - cos below this, an approximation.

    Raises ValueError for values that do not exist or exclude each other.
    """

    round_interval: int = 8  # widths are multiples of this
    layout: str = ""
    schedule: str | tuple[int, ...] = "constant"
    slice_head: bool = False  # False: the head keeps the full width
    compensate: bool = False
    output_norms: str = "refuse"
    signal: str = "raw"
    orientation: str = "pca"
    statistics: str = "sliced"
    drop_below: float = 0.0
    seed: int = 0  # of the random orientation
    precision: str = "float64"  # of the eigendecompositions
    passes: str = "exact"
    ONLY_WITH: ClassVar = {
        "seed": ("orientation", ("random",)), "ratio": ("schedule", SCHEDULES), "round_interval": ("schedule", SCHEDULES),
    }  # fmt: skip

    def __post_init__(self):
        check_settings(self, **CHOICES, round_interval=COUNTS, schedule=COUNTS, drop_below="[0, inf]", seed=FROM_ZERO)
        if self.layout:
            choose_one("layout", self.layout, LAYOUTS)
        if not (self.schedule and isinstance(self.schedule, tuple)):
            choose_one("schedule", self.schedule, SCHEDULES)
        if self.layout == "global":
            raise ValueError("layout 'global' has one basis for all junctions: use method slicegpt-global, or slice_globally")
        if self.statistics == "dense" and self.compensate:
            raise ValueError("compensation is measured on the sliced stream: use statistics=sliced")
        if self.statistics == "dense" and self.output_norms in ESTIMATES:
            raise ValueError("the scale of output norms is estimated on the sliced stream: use statistics=sliced")

    def layout_for(self, model: nn.Module, widths: Sequence[int]) -> str:
        """The layout for a model and its widths, of which the last one says whether the head is sliced."""
        sliced_head = self.slice_head or list(widths[-1:]) != [model.config.hidden_size]
        return self.layout or usual_layout(model, sliced_head)


# --- widths -------------------------------------------------------------------------------------------------------------


def kept_width(d: int, level: float, round_interval: int = Settings.round_interval) -> int:
    """Width k left of d at a slicing level in [0, 1): ⌊(1 - level) d⌋, rounded down to a multiple of `round_interval`.

    Computed on the fraction that the float stands for: (1 - 0.8) 5120 is 1024, which binary arithmetic rounds to 1023 (and
    the published code then to 1016). Level 0 keeps d. Raises ValueError if nothing would be left.
    """
    check_share(level, "slicing level", "0.25 deletes a quarter of the directions")
    if level == 0:
        return d
    _check_interval(round_interval)
    k = int((1 - exact(level)) * d)
    k -= k % round_interval
    if k < 1:
        raise ValueError(f"slicing {d} by {level} in steps of {round_interval} leaves nothing: use a lower level or step")
    return k


def _check_interval(round_interval: int) -> None:
    """Raise ValueError for a step of widths that is not at least 1."""
    if round_interval < 1:
        raise ValueError(f"widths are rounded to multiples of {round_interval}, which is not a positive number: use 1 for none")


def constant_widths(
    model: nn.Module,
    level: float,
    round_interval: int = Settings.round_interval,
    slice_head: bool = Settings.slice_head,
) -> list[int]:
    """The paper's schedule: the same width at every junction; the last one is the head's, d unless it is sliced too."""
    d = model.config.hidden_size
    k = kept_width(d, level, round_interval)
    return [k] * (Anatomy(model).junctions - 1) + [k if slice_head else d]


def variance_widths(
    energies: torch.Tensor,
    discarded: float,
    round_interval: int = Settings.round_interval,
    slice_head: bool = Settings.slice_head,
) -> list[int]:
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


def widths_for_size(model: nn.Module, energies: torch.Tensor, params: int, settings: Settings = Settings()) -> list[int]:
    """A variance schedule that comes close to `params` parameters from below, counted on the real modules.

    energies: as in `variance_widths`. Bisects the discarded energy. (Size is not quite monotone in it: a shortcut to a
    narrower junction is stored dense.) Raises ValueError if even the smallest model is larger.
    """
    low, high = 0.0, 1 - 1e-9  # the model is too large at the first, small enough at the second

    def widths(discarded: float) -> list[int]:
        return variance_widths(energies, discarded, settings.round_interval, settings.slice_head)

    if size_of(model, widths(high), settings) > params:
        raise ValueError(f"no variance schedule of this model has at most {params:,} parameters: ask for more")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size_of(model, widths(middle), settings) > params else (low, middle)
    return widths(high)


def size_of(model: nn.Module, widths: Sequence[int], settings: Settings) -> int:
    """Parameters of the model when it is sliced to these widths."""
    return count(shapes_only(model, widths, settings.layout_for(model, widths), settings.output_norms)).params


# --- calibration --------------------------------------------------------------------------------------------------------


def rms_normalise(x: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    """Each row of x [..., d] divided by its root mean square; at least float32."""
    x = at_least_float32(x)
    return x * (x.square().mean(-1, keepdim=True) + epsilon).clamp(min=1e-30).rsqrt()


def decompose(stream: ResidualStream, settings: Settings = Settings()) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d] and principal axes [d, d] of the stream where it stands.

    signal `raw` decomposes the residual stream itself, as the released code does; `normalised` decomposes the output of
    the norm, as the paper's text says (each token then has the same weight).
    """
    gram = stream.gram(rms_normalise if settings.signal == "normalised" else None)
    return principal_axes(gram, PRECISIONS[settings.precision])


def junctions(
    stream: ResidualStream,
    first: tuple[torch.Tensor, torch.Tensor],
    widths: Sequence[int],
    settings: Settings = Settings(),
) -> Iterator[Junction]:
    """Every junction in order, each measured on the stream that has been sliced to `widths` up to there.

    `first` is the decomposition of junction 0, where the stream must stand. Each half block is evaluated once (the published
    code runs every block twice). At widths d this is the dense model. With `compensate` the mean of what is deleted is
    measured and given back, as in the finished network. With output_norms `metric` or `fitted` the stream behind each sandwich
    norm is the one that the finished network estimates, while the axes are those of the exact norm.
    """
    anatomy, found, fit = stream.anatomy, first, None
    estimated = settings.output_norms in ESTIMATES and bool(sandwich_norms(anatomy.family))
    steps = [(run, halves, block) for block in range(len(anatomy.blocks)) for run, halves in anatomy.steps]
    for (k, next_k), (run, halves, block) in zip(itertools.pairwise(widths), steps, strict=True):
        # Cut the stream at this junction, and measure what that deletes.
        values, axes = found
        project = _projection(axes, k, anatomy)
        norms = [anatomy.blocks[block].get_submodule(half.norm) for half in halves]
        shifts = _deleted_means(stream, project, norm_epsilon(norms[0])) if settings.compensate else (None, None)
        yield Junction(axes, values, *shifts, fit)

        # Run the dense half block on the cut stream, and find the axes of the next junction.
        estimate = estimated and next_k < anatomy.width
        output_norm = anatomy.blocks[block].get_submodule(halves[0].output_norm) if estimate else None
        run = _quick(run) if settings.passes == "bfloat16" else run
        with _shifted(norms, shifts[1], anatomy), inputs_of(output_norm) as written:
            stream.advance(run, block, before=project, after=shifts[0])
        found = decompose(stream, settings)

        # Replace the exact scale of a sandwich norm by its estimate, which depends on these axes.
        regress, kept = settings.output_norms == "fitted", found[1][:, :next_k]
        fit = _estimate_norm(stream, output_norm, written, kept, regress) if estimate else None

    values, axes = found
    shifts = (None, None)
    if settings.compensate:
        final_norm = anatomy.get(anatomy.family.final_norm)
        shifts = _deleted_means(stream, _projection(axes, widths[-1], anatomy), norm_epsilon(final_norm))
    yield Junction(axes, values, *shifts, fit)


def dense_junctions(stream: ResidualStream, first: tuple[torch.Tensor, torch.Tensor], settings: Settings) -> Iterator[Junction]:
    """Every junction in order, measured on the dense model."""
    full = [stream.anatomy.width] * stream.anatomy.junctions
    return junctions(stream, first, full, replace(settings, compensate=False))


def spectra(model: nn.Module, ids: torch.Tensor, signal: str = Settings.signal) -> torch.Tensor:
    """Eigenvalues [junctions, d] of the dense model, largest first: how much energy slicing could keep."""
    stream, settings = ResidualStream(model, ids), Settings(signal=signal)
    return torch.stack([found.values for found in dense_junctions(stream, decompose(stream, settings), settings)])


def _deleted_means(stream: ResidualStream, project: Callable, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [d] over the tokens of what a projection takes from the stream and from the norm's output (before its gain)."""
    from_stream = from_norm = 0.0
    tokens = 0
    for x in stream.tokens():
        kept = project(x)
        from_stream += (x.double() - kept.double()).sum(0)
        from_norm += (rms_normalise(x, epsilon).double() - rms_normalise(kept, epsilon).double()).sum(0)
        tokens += len(x)
    return from_stream / tokens, from_norm / tokens


def _quick(run: Callable) -> Callable:
    """A step of a block with matrix products in bfloat16. Stream, norms, projections, axes and all weights keep their precision.

    Rounding changes the axes only; `benchmarks/README.md` says by how much perplexity differs from that of exact passes.
    """

    def quick(block: nn.Module, family: Family, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return run(block, family, x, kwargs).to(x.dtype)

    return quick


@contextlib.contextmanager
def _shifted(norms: list[nn.Module], shift: torch.Tensor | None, anatomy: Anatomy) -> Iterator[None]:
    """Within the `with`, add gain · shift to the outputs of these norms: a deleted mean, given back to their readers."""
    handles = []
    for norm in {id(norm): norm for norm in norms}.values() if shift is not None else ():
        given = norm_gain(norm, anatomy.family) * shift
        handles.append(norm.register_forward_hook(lambda _, inputs, out, given=given: out + given.to(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_norm(energy: torch.Tensor, left: torch.Tensor, epsilon: float) -> NormFit:
    """Least squares for rms(y)² from the energy that a cut leaves of y: slope · left + intercept, neither of them negative.

    energy: rms(y)² [tokens]; left: the sum of the squares of what is left [tokens]. The error minimised is the relative one of
    rms(y)² + epsilon, so that all tokens weigh the same, as they do behind the norm (a few are a thousand times larger than the
    rest). A negative slope or intercept could make the estimate negative: then the better fit with one of them at zero is taken.
    """
    true, left = energy.double() + epsilon, left.double()
    columns = torch.stack([left / true, 1 / true], dim=1)
    wanted = energy.double() / true  # 1 if epsilon were 0; the norm adds epsilon to the estimate itself

    def solved(used: list[int]) -> NormFit:
        weights = torch.zeros(2, dtype=columns.dtype, device=columns.device)
        size = columns[:, used].norm(dim=0).clamp(min=1e-30)  # scaled to length 1, as the two differ by the scale of y
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

    gram: Σ yᵀy [d, d]; gain: g [d]; kept: B [d, k]. Least squares, so that nothing is divided by a gain: a channel whose gain
    is zero is estimated from the others. With k = d and no gain at zero it is diag(1/g).
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

    written: y [b, tokens, d], batch by batch; kept: B [d, k]. The cut leaves (g * y) B Bᵀ of y. The energy of this is taken
    after division by g, y' Bᵀ diag(g)⁻² B y'ᵀ, or with `regress` after the best linear map.
    """
    gain, epsilon = norm_gain(norm, stream.anatomy.family), norm_epsilon(norm)

    # The map from y to its estimate.
    undo = None
    if regress:
        gram = torch.zeros(len(gain), len(gain), dtype=torch.float64, device=gain.device)
        for y in written:  # each token weighs the same, as in the fit of its energy
            add_gram(gram, rms_normalise(y.flatten(0, 1).double(), epsilon))
        undo = undo_by_regression(gram, gain, kept)
    to_estimate = gain[:, None] * kept @ (kept.T / gain if undo is None else kept.T @ undo)

    def energies(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.double()
        return y.square().mean(-1), (y @ to_estimate).square().sum(-1)

    # The fit of the true energy of a token to that of its estimate.
    measured = [energies(y.flatten(0, 1)) for y in written]
    fit = fit_norm(*(torch.cat(values) for values in zip(*measured, strict=True)), epsilon)

    # The stream as the finished network will have it: what the norm added, times true scale over estimated scale.
    for rows, y in zip(stream.rows(), written, strict=True):
        energy, left = energies(y)
        ratio = ((energy + epsilon) / (fit.slope * left + fit.intercept + epsilon)).sqrt()
        stream.hidden[rows] += ((ratio - 1)[..., None] * norm(y)).to(stream.hidden.dtype)
    return replace(fit, undo=undo)


def _projection(axes: torch.Tensor, k: int, anatomy: Anatomy) -> Callable:
    """x -> x A Aᵀ (centred first for LayerNorm families), in the coordinates of the dense model.

    Computed as x - x D Dᵀ with the d - k deleted axes D, which are usually fewer. The product is at least float32: a
    half-precision D is no longer orthogonal.
    """

    def project(x: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(x)
        wide = remove_mean(wide) if anatomy.family.subtracts_mean else wide
        if k < anatomy.width:
            rows, deleted = wide.flatten(0, -2), axes[:, k:].to(wide)
            wide = torch.addmm(rows, rows @ deleted, deleted.T, alpha=-1).view_as(wide)
        return wide.to(x.dtype)

    return project


def randomly_oriented(found: Iterator[Junction], widths: Sequence[int], generator: torch.Generator) -> Iterator[Junction]:
    """Rotate the kept axes of each junction among themselves at random: the same function in other coordinates."""
    for junction, k in zip(found, widths, strict=False):
        q = junction.axes
        turned = torch.cat([q[:, :k] @ random_rotation(k, generator).to(q), q[:, k:]], dim=1)
        yield replace(junction, axes=turned)


# --- slicing ------------------------------------------------------------------------------------------------------------

Cut = float | Sequence[int]  # a slicing level, or widths, one per junction, the last one the head's


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    cuts: Sequence[Cut],
    settings: Settings = Settings(),
    progress: Callable[[str], None] | None = None,
    inplace: bool = False,
) -> Iterator[tuple[Cut, nn.Module]]:
    """Slice a model at several levels; yields (cut, sliced model), each the same function as a run of its own.

    ids: calibration tokens [samples, length]. A cut is a slicing level, or a list of widths, one per junction, the last one the
    head's (as from `variance_widths`, or `widths` in the record of a saved model); `settings.schedule` then has no effect. The
    dense model is read only, or with `inplace` consumed by a single cut. All cuts share the first junction and the residual
    buffer. With sandwich norms the record of the result holds the error of every estimated norm.

    Raises ValueError for bad cuts, ids, weights or architectures before any work starts.
    """
    check_inplace(inplace, cuts)
    check_sliceable(model, settings.output_norms)
    schedules = [_widths(model, cut, settings) for cut in cuts]
    for widths in schedules:
        check_widths(Anatomy(model), widths, settings.layout_for(model, widths))
    return _sweep(ResidualStream(model, ids), cuts, schedules, settings, progress, inplace)


def _widths(model: nn.Module, cut: Cut, settings: Settings) -> list[int]:
    """The widths of a cut; for a variance schedule those of the constant one that has as many parameters."""
    if not isinstance(cut, int | float):
        return list(cut)
    if isinstance(settings.schedule, tuple):
        return list(settings.schedule)
    return constant_widths(model, cut, settings.round_interval, settings.slice_head)


def _sweep(
    stream: ResidualStream,
    cuts: Sequence[Cut],
    schedules: list[list[int]],
    settings: Settings,
    progress: Callable[[str], None] | None,
    inplace: bool,
) -> Iterator[tuple[Cut, nn.Module]]:
    """The work of `sweep`, whose arguments have been checked; schedules: the widths of each cut."""
    model, first = stream.anatomy.model, decompose(stream, settings)

    # Dense statistics and variance schedules need one run of the dense model for all cuts together.
    dense = list(dense_junctions(stream, first, settings)) if settings.statistics == "dense" else None
    if settings.schedule == "variance":
        energies = torch.stack([found.values for found in dense or dense_junctions(stream, first, settings)])
        stream.restart()
        levels = [isinstance(cut, int | float) for cut in cuts]
        schedules = [
            widths_for_size(model, energies, size_of(model, widths, settings), settings) if level else widths
            for level, widths in zip(levels, schedules, strict=True)
        ]

    # For each cut the junctions are measured on the stream sliced so far, while the network is built.
    for i, (cut, widths) in enumerate(zip(cuts, schedules, strict=True)):
        if i and not dense:
            stream.restart()
        found = iter(dense) if dense else junctions(stream, first, widths, settings)
        if settings.orientation == "random":
            found = randomly_oriented(found, widths, torch.Generator().manual_seed(settings.seed))
        options = dict(inplace=inplace, progress=progress, output_norms=settings.output_norms)
        yield cut, rotate_and_slice(model, found, widths, settings.layout_for(model, widths), settings.drop_below, **options)


def shape(model: nn.Module, ratio: float, settings: Settings = Settings(round_interval=1)) -> nn.Module:
    """What is left at a slicing level, on the meta device; of a variance schedule the constant one of the same size."""
    widths = _widths(model, ratio, settings)
    return shapes_only(model, widths, settings.layout_for(model, widths), settings.output_norms)


def slice_model(
    model: nn.Module,
    ids: torch.Tensor,
    cut: Cut,
    *,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
    **settings,
) -> nn.Module:
    """Slice a model at one level, or to one list of widths; `settings` are the fields of `Settings`."""
    return next(sweep(model, ids, [cut], Settings(**settings), progress, inplace))[1]


# --- without shortcuts --------------------------------------------------------------------------------------------------


def global_axes(model: nn.Module, ids: torch.Tensor, rotate: bool = True) -> torch.Tensor:
    """Principal axes [d, d] of all junctions of the dense model together; any width can be cut from them.

    The covariances are summed after division by their traces (our choice: late junctions carry far more energy and would
    decide alone). One pass over the dense model, without the paper's re-measuring behind each cut. Without `rotate`: the
    coordinates as they are, sorted by energy; cutting those is the paper's baseline of deleting columns of small norm.
    """
    check_sliceable(model)
    stream = ResidualStream(model, ids)
    total = stream.gram()
    total /= total.trace()
    for block in range(len(stream.anatomy.blocks)):
        for run, _ in stream.anatomy.steps:
            stream.advance(run, block)
            gram = stream.gram()
            total += gram / gram.trace()
    return (principal_axes if rotate else coordinate_axes)(total)[1]


def slice_globally(
    model: nn.Module,
    axes: torch.Tensor,
    k: int,
    slice_head: bool = True,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Slice every junction with the same axes [d, d]: no shortcuts, in any family, saved in this library's own format."""
    check_sliceable(model)
    widths = [k] * (Anatomy(model).junctions - 1) + [k if slice_head else len(axes)]
    return rotate_and_slice(model, itertools.repeat(Junction(axes)), widths, "global", inplace=inplace, progress=progress)


WITHOUT_SHORTCUTS = dict(slice_head=True, drop_below=math.inf)


def slice_without_shortcuts(model: nn.Module, ids: torch.Tensor, level: float, **settings) -> nn.Module:
    """Slice with a basis of its own at every junction, each turned to the one before, and leave every shortcut out.

    Our variant. A basis B is chosen so that the shortcut AᵀB is I - CCᵀ; this network takes the identity instead, which
    is close if neighbouring subspaces are. Like one basis for all it has no shortcuts, but loses less. The head is sliced
    too. `settings` are those of `slice_model`.
    """
    return slice_model(model, ids, level, **WITHOUT_SHORTCUTS, **settings)


@dataclass(frozen=True)
class Rounding:
    """The settings of networks without shortcuts: their widths are multiples of `round_interval` that the stock class accepts."""

    round_interval: int = Settings.round_interval

    def __post_init__(self):
        check_settings(self, round_interval=COUNTS)


def stock_sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Rounding | None = None,
    progress: Callable[[str], None] | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(level, stock model) for each slicing level, one basis per junction without shortcuts: see `slice_without_shortcuts`."""
    cuts = [[k] * Anatomy(model).junctions for k in stock_widths(model, ratios, settings)]
    sliced = sweep(model, ids, cuts, Settings(**WITHOUT_SHORTCUTS), progress, inplace)
    return ((ratio, stock_model(small)) for ratio, (_, small) in zip(ratios, sliced, strict=True))


def global_sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Rounding | None = None,
    progress: Callable[[str], None] | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(level, stock model) for each slicing level, one basis for all junctions and levels: see `slice_globally`."""
    check_inplace(inplace, ratios)
    widths = stock_widths(model, ratios, settings)

    def run() -> Iterator[tuple[float, nn.Module]]:
        axes = global_axes(model, ids)
        for ratio, k in zip(ratios, widths, strict=True):
            yield ratio, stock_model(slice_globally(model, axes, k, inplace=inplace, progress=progress))

    return run()


def stock_widths(model: nn.Module, ratios: Sequence[float], settings: Rounding | None = None) -> list[int]:
    """The width of the stock model at each slicing level; warns where it is not that of `kept_width`. Raises as `stock_width`."""
    d, interval = model.config.hidden_size, (settings or Rounding()).round_interval
    found = []
    for ratio in ratios:
        k, wanted = stock_width(model, ratio, interval), kept_width(d, ratio, interval)
        if k != wanted:
            kind = type(model.config).__name__
            warnings.warn(f"a stock {kind} accepts no width of {wanted}: {k} of {d} directions are kept", stacklevel=3)
        found.append(k)
    return found


def stock_width(model: nn.Module, level: float, round_interval: int = Settings.round_interval) -> int:
    """The width of the stock model at a slicing level: that of `kept_width`, or the next smaller one that its class accepts.

    A LlamaConfig accepts only multiples of its number of heads, although heads keep their size. Raises ValueError, before any
    work, for families that have no stock form and where no width is accepted.
    """
    check_sliceable(model)
    wanted = kept_width(model.config.hidden_size, level, round_interval)
    steps = [wanted, *range(wanted - round_interval, 0, -round_interval)]
    k = next((k for k in steps if refusal(_narrowed(model.config, k)) is None), None)
    if k is None:
        kind = type(model.config).__name__
        raise ValueError(
            f"{kind} accepts no multiple of {round_interval} up to {wanted} as the width of a stock model: use a lower ratio or "
            "a smaller round_interval"
        )
    _stock_shape(model, k)  # raises for families without a stock form
    return k


def stock_shape(model: nn.Module, ratio: float, settings: Rounding = Rounding(round_interval=1)) -> nn.Module:
    """The stock model at a slicing level, on the meta device."""
    return _stock_shape(model, stock_width(model, ratio, settings.round_interval))


def _stock_shape(model: nn.Module, k: int) -> nn.Module:
    return stock_model(shapes_only(model, [k] * Anatomy(model).junctions, "global"))


def _narrowed(config, k: int):
    """The configuration of a stock model of width k whose norms divide by the old width, see `stock_model`."""
    narrow, d = copy.deepcopy(config), config.hidden_size
    narrow.head_dim = head_size(config)
    narrow.hidden_size, narrow.rms_norm_eps = k, getattr(config, "rms_norm_eps", 0.0) * d / k
    return narrow


def stock_model(sliced: nn.Module) -> nn.Module:
    """A sliced network without shortcuts as a model of the stock class with width k, which loads without this package.

    sliced: from `slice_globally` or `slice_without_shortcuts`, head included; its weights are shared, not copied. Only the norms
    have to change, because they must divide by d and not by k: since ‖u‖²/k + ε d/k = (d/k)(‖u‖²/d + ε), a stock RMSNorm with
    gain √(d/k) and epsilon ε d/k does just that. Raises ValueError for networks that no stock class can hold.
    """
    d, k = sliced.config.hidden_size, _stock_width(sliced)
    with init_empty_weights(include_buffers=False):
        narrow = type(sliced)(_narrowed(sliced.config, k))
    narrow.generation_config = sliced.generation_config
    for name, module in sliced.named_modules():
        if isinstance(module, JunctionNorm):
            gain = torch.full((k,), (d / k) ** 0.5, dtype=torch.float64)
            narrow.get_submodule(name).weight = parameter(gain, like=sliced.get_input_embeddings().weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            narrow.set_submodule(name, module)
    return narrow.to(sliced.device).eval()


def _stock_width(sliced: nn.Module) -> int:
    """The one width of a sliced network that a stock class can hold; ValueError, with the reason, if none can."""
    family, kind = Anatomy(sliced).family, sliced.config.model_type
    advice = "save it with lib.models.checkpoint instead"
    edit = next((e for e in getattr(sliced, "edits", []) if e["edit"] == "slicegpt"), None)
    if edit is None:
        raise ValueError("this model is not sliced: give the result of slice_globally or slice_without_shortcuts")
    if family.subtracts_mean or family.gain_offset or family.parallel:
        raise ValueError(f"a narrower {kind} is not a stock model: its class ties head size and norm to the width; {advice}")
    if len(set(edit["widths"])) > 1 or any(edit["ranks"]) or None in edit["ranks"] or edit["compensated"]:
        raise ValueError(
            f"a stock model has no shortcuts, no unequal widths (such as a head of full width) and no new biases; {advice}, or "
            "slice with slice_without_shortcuts or slice_globally"
        )
    for name, module in Anatomy(sliced).blocks[0].named_modules():
        if hasattr(module, "variance_epsilon"):  # a norm that is not at a junction, such as that of the queries
            raise ValueError(f"{kind} gives {name} the epsilon of the norms at the junctions, which has to change; {advice}")
    return edit["widths"][0]
