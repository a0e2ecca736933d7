"""The network that SliceGPT builds: its modules, and how its weights are cut from the dense model's.

The stream x at junction j is replaced by u = x A_j, where A_j holds the first k_j columns of an orthogonal matrix. Readers
become W A, writers Bᵀ W, and between two junctions with bases A and B a *shortcut* AᵀB carries the residual. Blocks keep
their stock forward: a writer adds whatever turns the block's own `residual + output` into `residual · shortcut + output`.

A sandwich norm between writer and stream (Gemma 3: x + g * y / rms(y), y = z W) divides by rms(y) of the vector before gain and
rotation, and after them rms(y) can no longer be computed exactly. Such models are refused unless one of our three extensions
is chosen, see `OUTPUT_NORMS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.primitives.anatomy import Anatomy, Family, Half, norm_epsilon, norm_gain, norm_offset
from lib.primitives.checks import choose_one
from lib.primitives.linalg import at_least_float32, complete, remove_mean, symmetric_shortcut
from lib.primitives.surgery import embedding, linear, parameter, record_edit, shape_shell, shell, untie_head

# low-rank: shortcuts I - CCᵀ, C stored. dense: AᵀB stored, as published. tied: low-rank, and the embedding table stays whole
# and shared with the head. global: the same basis everywhere, no shortcuts.
LAYOUTS = ("low-rank", "dense", "tied", "global")

# What to do about sandwich norms. exact: the writer and its norm stay whole, and diag(g) B follows them; this deletes nothing of
# the writer, so it saves few parameters and serves as the reference for the other two. metric: the writer becomes
# y' = z W diag(g) B, and `MetricNorm` estimates rms(y) as that of y' Bᵀ diag(1/g). fitted: the same network, but y is estimated
# from y' by least squares on the calibration data, which also works where gains are zero.
OUTPUT_NORMS = ("refuse", "exact", "metric", "fitted")
SMALLEST_GAIN = 1e-4  # relative to the largest; `metric` divides by the gain, and in float32 a smaller one leaves too few digits


@dataclass(frozen=True)
class NormFit:
    """The estimate slope · q + intercept of rms(y)²: y is the output of a writer, q the energy that the cut leaves of it.

    undo: [d, d]; q is the energy of (g * y) B Bᵀ undo, and None stands for diag(1/g). error: root mean square, over the
    calibration tokens, of the relative error of the estimated rms(y)² + epsilon.
    """

    slope: float
    intercept: float = 0.0
    error: float = 0.0
    undo: torch.Tensor | None = None


@dataclass(frozen=True)
class Junction:
    """One point of the residual stream before a norm: the orthogonal axes [d, d] that it is turned to, and what was measured.

    values: energy [d] along each axis. stream_shift, norm_shift: mean [d] of what the cut deletes from the stream and from
    the norm's output; given if these means are to be added back as biases (our extra, not in the paper). fit: the estimate
    for the sandwich norm of the writer before this junction, if `output_norms` asks for one.
    """

    axes: torch.Tensor
    values: torch.Tensor | None = None
    stream_shift: torch.Tensor | None = None
    norm_shift: torch.Tensor | None = None
    fit: NormFit | None = None

    def to(self, device: torch.device) -> Junction:
        """The same junction with axes and means on `device`."""
        axes, *shifts = (None if x is None else x.to(device) for x in (self.axes, self.stream_shift, self.norm_shift))
        return Junction(axes, self.values, *shifts, self.fit)


@dataclass(frozen=True)
class Step:
    """The way from one junction to the next, over half a block, or over both halves of a parallel one. Made by `connect`.

    a: [d, j] and b: [d, k], the bases of the stream at `start` and at `end`. shortcut: the matrix that carries the residual
    from a to b, in the given form (see `connect`); None if the residual is only padded with zeros, or goes on as it is.
    """

    start: Junction
    end: Junction
    a: torch.Tensor
    b: torch.Tensor
    shortcut: torch.Tensor | None
    form: str  # dense or low-rank

    @property
    def rank(self) -> int | None:
        """Columns of a low-rank shortcut, 0 without any; None for a dense one."""
        if self.form == "dense":
            return None
        return 0 if self.shortcut is None else self.shortcut.shape[1]

    @property
    def fit(self) -> NormFit | None:
        """The estimate for the sandwich norm on the way; None if the basis b is complete, where there is nothing to estimate."""
        return self.end.fit if self.b.shape[1] < len(self.b) else None


# --- modules ------------------------------------------------------------------------------------------------------------


class JunctionNorm(nn.Module):
    """RMS norm of a sliced stream, dividing by the *original* d: deleted coordinates count as zeros.

    Input [..., stream width], whose columns beyond the junction's own width are zero; result [..., width]. Gain and offset are
    folded into the readers, except before a tied head, which must stay as it is. `remembers`: keep the input, because the
    writer of the same half needs it for its shortcut and takes it there. `extra` is set on the final norm when the head is not
    sliced: the coordinates of the last writer that the stream has no room for, joined to it before the norm.
    """

    def __init__(self, d: int, epsilon: float, width: int | None = None):
        super().__init__()
        self.d, self.epsilon, self.width, self.remembers = d, epsilon, d if width is None else width, False
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.residual: torch.Tensor | None = None
        self.extra: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.extra is not None:
            x = torch.cat([x, self.extra.view(*x.shape[:-1], -1)], dim=-1)
            self.extra = None
        elif self.remembers:
            self.residual = x
        wide = at_least_float32(x)
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.d + self.epsilon)
        out = (wide * scale)[..., : self.width].to(x.dtype)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias

    def take(self) -> torch.Tensor:
        residual, self.residual = self.residual, None
        return residual

    def extra_repr(self) -> str:
        return f"d={self.d}, epsilon={self.epsilon}, width={self.width}"


class ShortcutWriter(nn.Module):
    """A writer that also applies the shortcut, so that the block's own `residual + output` is right (stock forward).

    With u the residual, low-rank adds -(uC)Cᵀ, so the sum is u(I - CCᵀ) + output; dense adds uS - u. The result is padded
    with zeros to the width of the stream, which is that of the widest junction. In the last step before an unsliced head
    the coordinates beyond that width go to the final norm instead.

    writer: a linear layer, or the sandwich norm behind one. norm: that of the same half, if this writer has a shortcut to
    apply; None otherwise, as in one half of a parallel block.
    """

    def __init__(self, writer: nn.Module, stream_width: int, norm: JunctionNorm | None, shortcut: torch.Tensor | None, form: str):
        super().__init__()
        self.linear, self.stream_width, self.form = writer, stream_width, form
        self.shortcut = None if shortcut is None else parameter(shortcut, like=next(writer.parameters()))
        self._norm = [norm]  # in lists: these modules belong to the block and to the model
        self._final: list[JunctionNorm] = []
        self._adds = False
        if norm is not None:
            norm.remembers = True

    def feed(self, final: JunctionNorm, adds: bool) -> None:
        """Send the columns beyond the stream's width to the final norm; `adds`: to those that another writer has sent."""
        self._final, self._adds = [final], adds

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds of the shortcut alone; the child `linear` counts its own."""
        return 0 if self.shortcut is None else self.shortcut.numel() * (1 if self.form == "dense" else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        u = None if self._norm[0] is None else self._norm[0].take()
        if self.shortcut is not None:
            before = u[..., : self.shortcut.shape[0]]
            if self.form == "dense":
                out = out + before @ self.shortcut
            else:
                out = out - _padded((before @ self.shortcut) @ self.shortcut.T, out.shape[-1])
        out = _padded(out, self.stream_width)
        if self._final:
            out, beyond = out.split([self.stream_width, out.shape[-1] - self.stream_width], dim=-1)
            self._final[0].extra = self._final[0].extra + beyond if self._adds else beyond
        return out - u if u is not None and self.form == "dense" else out


class MetricNorm(nn.Module):
    """A sandwich norm behind a folded writer: y' / √(‖y' Rᵀ‖² + floor² + epsilon), where the root estimates rms(y).

    y' = (g * y) B [..., k] is what the writer wrote after gain g [d] and basis B [d, k]. R comes from a QR factorisation of
    Pᵀ, where y' P estimates y. With P = Bᵀ diag(1/g), ‖y' Rᵀ‖² = y' Bᵀ diag(g)⁻² B y'ᵀ, which at k = d is ‖y‖². For k < d the
    energy of what was deleted is missing; slope and intercept of `fit` make up for it. epsilon is that of the dense norm,
    unscaled, because the estimate is one of rms(y)² itself, before gain and rotation.
    """

    def __init__(self, b: torch.Tensor, gain: torch.Tensor, epsilon: float, fit: NormFit, like: torch.Tensor):
        super().__init__()
        self.epsilon = epsilon
        estimate = b / gain[:, None] if fit.undo is None else fit.undo.T @ b
        self.root = parameter(fit.slope**0.5 * torch.linalg.qr(estimate).R, like=like)
        self.floor = parameter(torch.tensor([fit.intercept**0.5], dtype=torch.float64), like=like)
        self.register_parameter("bias", None)

    @property
    def macs_per_token(self) -> int:
        return self.root.numel()

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(y)
        energy = F.linear(wide, self.root.to(wide)).square().sum(-1, keepdim=True) + self.floor.to(wide).square()
        out = (wide * torch.rsqrt(energy + self.epsilon)).to(y.dtype)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"width={len(self.root)}, epsilon={self.epsilon}"


class ProjectedEmbedding(nn.Embedding):
    """A whole embedding table [V, d], still shared with the head, whose rows are projected [d, k] when they are looked up.

    The projection takes over what the table's own forward multiplies rows by.
    """

    def __init__(self, table: nn.Embedding, projection: torch.Tensor):
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        self.weight = table.weight
        scale = getattr(table, "embed_scale", None)  # Gemma's √d, a tensor, rounded to the dtype of the table
        self.projection = parameter(projection if scale is None else projection * scale.to(table.weight.dtype), table.weight)

    @property
    def macs_per_token(self) -> int:
        return self.projection.numel()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) @ self.projection


class _PadOutput:
    """Forward hook: zeros behind the columns of an embedding, up to the width of the stream."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return _padded(output, self.width)


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


# --- cutting the weights ------------------------------------------------------------------------------------------------
#
# What is prepared, gains, means and bases, is float64. The product with a basis is float32, or float64 for float64 weights: it
# takes half the time, and its rounding is of the size of that of the float32 weights which it gives.


def working_dtype(weight: torch.Tensor) -> torch.dtype:
    """float64 for float64 weights, else float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _empty_linear(outputs: int, inputs: int, biased: bool, dtype: torch.dtype) -> nn.Linear:
    """A layer without values. Arithmetic on meta tensors gives the same shapes, but would take most of the time of counting."""
    return nn.Linear(inputs, outputs, biased, device="meta", dtype=dtype)


def slice_reader(
    layer: nn.Linear, norm: nn.Module, a: torch.Tensor, family: Family, shift: torch.Tensor | None = None
) -> nn.Linear:
    """W diag(gain) A, with the norm's offset folded into the bias: b + W offset. Result: [out, k].

    shift: mean [d] of what the cut takes from the norm's output, given back as a constant: b + W diag(gain) shift.
    """
    if layer.weight.is_meta:
        biased = any(part is not None for part in (layer.bias, norm_offset(norm), shift))
        return _empty_linear(layer.weight.shape[0], a.shape[1], biased, layer.weight.dtype)
    weight, work = layer.weight.detach().double(), working_dtype(layer.weight)
    bias = None if layer.bias is None else layer.bias.detach().double()
    gained = weight * norm_gain(norm, family)
    for constant, matrix in ((norm_offset(norm), weight), (shift, gained)):
        if constant is not None:
            bias = matrix @ constant + (0 if bias is None else bias)
    return linear(gained.to(work) @ a.to(work), bias, like=layer.weight)


def slice_writer(layer: nn.Linear, b: torch.Tensor, family: Family, shift: torch.Tensor | None = None) -> nn.Linear:
    """Bᵀ M W and Bᵀ (M bias + shift), where M subtracts the mean if the family's norms do. Result: [k, in]."""
    if layer.weight.is_meta:
        biased = layer.bias is not None or shift is not None
        return _empty_linear(b.shape[1], layer.weight.shape[1], biased, layer.weight.dtype)

    def centre(x):
        return remove_mean(x.double(), dim=0) if family.subtracts_mean else x

    work = working_dtype(layer.weight)
    weight = b.T.to(work) @ centre(layer.weight.detach()).to(work)
    bias = None if layer.bias is None else b.T @ centre(layer.bias.detach()).double()
    if shift is not None:
        bias = b.T @ shift + (0 if bias is None else bias)
    return linear(weight, bias, like=layer.weight)


def slice_sandwich(
    writer: nn.Linear,
    norm: nn.Module,
    b: torch.Tensor,
    family: Family,
    output_norms: str,
    fit: NormFit | None = None,
    shift: torch.Tensor | None = None,
) -> tuple[nn.Linear, nn.Module]:
    """The replacements (writer, norm) of a writer y = z W and of the sandwich norm behind it; the norm's result is [..., k].

    output_norms `exact`: the writer as it is, and y / rms(y) times diag(g) B. `metric` and `fitted`: z W diag(g) B and a
    `MetricNorm`, which without a `fit` is that of a complete basis. At a complete basis `fitted` takes the exact form, which
    needs no more parameters there. shift [d]: added to the stream behind the norm.
    """
    gained = norm_gain(norm, family)[:, None] * b
    added = None if shift is None else b.T @ shift
    if output_norms == "exact" or (output_norms == "fitted" and b.shape[1] == len(b)):
        last = linear(gained.T, added, like=writer.weight)
        return writer, nn.Sequential(JunctionNorm(len(b), norm_epsilon(norm)), last)
    fit = fit or NormFit(1 / len(b))
    estimate = MetricNorm(b, norm_gain(norm, family), norm_epsilon(norm), fit, like=writer.weight)
    estimate.bias = None if added is None else parameter(added, like=writer.weight)
    return slice_writer(writer, gained, family), estimate


def slice_embedding(table: nn.Embedding, a: torch.Tensor, family: Family) -> nn.Embedding:
    """E M A: centred only if the norms subtract the mean (the published code always centres, which changes RMSNorm models)."""
    weight, work = table.weight.detach(), working_dtype(table.weight)
    weight = remove_mean(weight.double()) if family.subtracts_mean else weight
    return embedding(table, weight.to(work) @ a.to(work))


def connect(
    start: Junction, a: torch.Tensor, end: Junction, k: int, layout: str, rank: int | None = None, drop_below: float = 0.0
) -> Step:
    """The step from `start`, where the stream has the basis a [d, j], to a basis of k columns at `end`.

    Form `dense`, as published: the shortcut is S = AᵀB. Form `low-rank`: it is C, with AᵀB = I - CCᵀ (and zero columns, if the
    next junction is wider). For a narrower one there is no such C, and S is stored. Towards a complete basis (k = d) the
    low-rank form starts that basis with A itself, so that the shortcut is zero padding and needs no parameters.

    Columns of C whose principal angle has 1 - cos below `drop_below` are left out, an approximation; `rank` keeps exactly
    that many columns.
    """
    axes, before = end.axes, a.shape[1]
    if layout == "global" and k == before:
        return Step(start, end, a, a, None, "low-rank")
    if layout == "dense" or k < before:
        b = axes[:, :k]
        return Step(start, end, a, b, a.T @ b, "dense")
    if k == len(axes) > before:
        return Step(start, end, a, complete(a), None, "low-rank")
    b, c = symmetric_shortcut(a, axes, k, start.axes[:, before:])
    if rank is None:
        rank = c.shape[1] if drop_below == 0 else int((c.square().sum(0) >= drop_below).sum())
    return Step(start, end, a, b, c[:, :rank] if rank else None, "low-rank")


# --- building -----------------------------------------------------------------------------------------------------------


def rotate_and_slice(
    model: nn.Module,
    junctions: Iterator[Junction],
    widths: Sequence[int],
    layout: str,
    drop_below: float = 0.0,
    ranks: Sequence[int | None] | None = None,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
    output_norms: str = "refuse",
) -> nn.Module:
    """Build the sliced network from the junctions of a model, each of which is taken from `junctions` when it is needed.

    widths: columns kept at each junction, the last of which is the width of the head. Any orthogonal axes leave the
    function unchanged at widths d (the paper's Theorem 1); principal axes lose least below. The result is a model of the
    same class with narrower modules. The dense model stays intact, or with `inplace` is consumed block by block, so that both
    are never in memory. ranks: columns of each low-rank shortcut, None for dense ones, to repeat a recorded edit.
    output_norms: one of `OUTPUT_NORMS`, of no effect without sandwich norms.
    """
    check_sliceable(model, output_norms)
    dense = Anatomy(model)
    check_widths(dense, widths, layout)
    sliced = Anatomy(model if inplace else shell(model))
    family, stream_width = dense.family, max(widths[:-1])

    # The embeddings write the first stream, in the basis of the first junction.
    start = next(junctions).to(dense.head.weight.device)
    a = start.axes[:, : widths[0]]
    for name, table in _embeddings(dense, a, stream_width, layout).items():
        sliced.put(name, table)

    # Each block reads the stream in one basis and writes it in the next. Its modules are replaced after its last step, because
    # finding the junctions runs the dense block.
    final_norm = JunctionNorm(dense.width, norm_epsilon(dense.get(family.final_norm)), widths[-1])
    steps, ranks_found, norm_errors = _steps(start, a, junctions, widths, layout, drop_below, ranks), [], []
    for i, block in enumerate(sliced.blocks):
        new: dict[str, nn.Module] = {}
        for _, halves in dense.steps:
            step = next(steps)
            new |= _sliced_step(block, halves, step, family, stream_width, final_norm, output_norms)
            ranks_found.append(step.rank)
            norm_errors.append(step.fit.error if step.fit else 0.0)
        for name, module in new.items():
            block.set_submodule(name, module)
        if progress:
            progress(f"sliced layer {i + 1} of {len(sliced.blocks)} to width {step.b.shape[1]}")

    # The final norm and the head read the last basis.
    _put_head(sliced, step, final_norm, layout)

    # The record says what a saved model needs to be built again.
    compensated = start.stream_shift is not None
    edit = dict(edit="slicegpt", widths=list(widths), layout=layout, ranks=ranks_found, compensated=compensated)
    if sandwich_norms(family):
        edit |= dict(output_norms=output_norms, norm_errors=norm_errors)
    record_edit(sliced.model, **edit)
    return sliced.model


def _embeddings(dense: Anatomy, a: torch.Tensor, stream_width: int, layout: str) -> dict[str, nn.Module]:
    """The tables that write the first stream, cut to the columns of `a`; in the `tied` layout the token table stays whole."""
    family = dense.family
    tables: dict[str, nn.Module] = {}
    for i, name in enumerate(family.embeddings):
        if layout == "tied" and i == 0:
            projection = remove_mean(a, dim=0) if family.subtracts_mean else a  # E M A: the mean is taken from the rows of A
            tables[name] = ProjectedEmbedding(dense.get(name), projection)
        else:
            tables[name] = slice_embedding(dense.get(name), a, family)
    if a.shape[1] < stream_width:
        for table in tables.values():
            table.register_forward_hook(_PadOutput(stream_width))
    return tables


def _steps(
    start: Junction,
    a: torch.Tensor,
    junctions: Iterator[Junction],
    widths: Sequence[int],
    layout: str,
    drop_below: float,
    ranks: Sequence[int | None] | None,
) -> Iterator[Step]:
    """All steps of a network, the first from `start` with basis a; a step takes the junction at its end when it is asked for."""
    d, last = len(a), len(widths) - 1
    for i, k in enumerate(widths[1:], 1):
        form = layout
        # A head of full width deletes nothing, so its junction needs no principal axes and is not measured.
        if i == last and layout == "tied":
            end, form = Junction(torch.eye(d, dtype=a.dtype, device=a.device)), "dense"
        elif i == last and k == d > a.shape[1]:
            end = Junction(complete(a))
        else:
            end = next(junctions).to(a.device)
        step = connect(start, a, end, k, form, None if ranks is None else ranks[i - 1], drop_below)
        yield step
        start, a = end, step.b


def _sliced_step(
    block: nn.Module,
    halves: tuple[Half, ...],
    step: Step,
    family: Family,
    stream_width: int,
    final_norm: JunctionNorm,
    output_norms: str,
) -> dict[str, nn.Module]:
    """The modules, by name, that replace the norms, readers and writers of the halves of one step.

    Of the two halves of a parallel block the last one carries the residual and its shortcut. Columns beyond the stream's
    width, which only a wider head has, go to the final norm.
    """
    new: dict[str, nn.Module] = {}
    for half in halves:
        # Norm and readers take basis a.
        norm = block.get_submodule(half.norm)
        junction = new.setdefault(half.norm, JunctionNorm(len(step.a), norm_epsilon(norm), step.a.shape[1]))
        for name in half.readers:
            new[name] = slice_reader(block.get_submodule(name), norm, step.a, family, step.start.norm_shift)

        # The writer, or the sandwich norm behind it, returns basis b.
        carries = half is halves[-1]
        shift = step.start.stream_shift if carries else None
        writer, last = block.get_submodule(half.writer), half.output_norm or half.writer
        if half.output_norm is None:
            writer = slice_writer(writer, step.b, family, shift)
        else:
            norm = block.get_submodule(half.output_norm)
            new[half.writer], writer = slice_sandwich(writer, norm, step.b, family, output_norms, step.fit, shift)

        # Around it, where they are needed: shortcut, padding to the width of the stream, and the way to a wider final norm.
        residual = junction if carries and step.shortcut is not None else None
        if residual is not None or step.b.shape[1] != stream_width:
            writer = ShortcutWriter(writer, stream_width, residual, step.shortcut if carries else None, step.form)
        if step.b.shape[1] > stream_width:
            writer.feed(final_norm, adds=half is not halves[0])
        new[last] = writer
    return new


def _put_head(sliced: Anatomy, step: Step, final_norm: JunctionNorm, layout: str) -> None:
    """Put the final norm, and a head cut to the last basis; a tied head stays as it is, and the norm keeps gain and offset."""
    family, norm = sliced.family, sliced.get(sliced.family.final_norm)
    if layout == "tied":
        if (gain := getattr(norm, "weight", None)) is not None:
            final_norm.weight = parameter(norm_gain(norm, family), like=gain)
        if (offset := norm_offset(norm)) is not None:
            final_norm.bias = parameter(offset, like=norm.bias)
    else:
        sliced.put(family.head, slice_reader(sliced.head, norm, step.b, family, step.end.norm_shift))
        untie_head(sliced.model)
    sliced.put(family.final_norm, final_norm)


# --- shapes -------------------------------------------------------------------------------------------------------------


def sandwich_norms(family: Family) -> list[str]:
    """Names within a block of the norms between a writer and the stream."""
    return [half.output_norm for half in (family.attention, family.mlp) if half.output_norm]


def check_sliceable(model: nn.Module, output_norms: str = "refuse") -> None:
    """Raise ValueError, with the reason, for architectures whose residual stream cannot be rotated freely."""
    anatomy = Anatomy(model)
    choose_one("output_norms", output_norms, OUTPUT_NORMS)
    if any(isinstance(module, JunctionNorm) for module in model.modules()):
        raise ValueError("this model is already sliced: slice the dense model, at a higher level")
    norms = sandwich_norms(anatomy.family)
    if norms and output_norms == "refuse":
        raise ValueError(
            f"SliceGPT cannot rotate {model.config.model_type}: this model normalises the outputs of attention and MLP before "
            "it adds them to the stream (sandwich norms), and a rotation behind the gain of such a norm changes its scale. "
            "Use a method that does not rotate the stream, or method slicegpt with one of our extensions: output_norms=exact "
            "(keeps the writers whole, so that few parameters are saved), or output_norms=metric or fitted (folds the gain into "
            "the writer and estimates the scale, which is an approximation once something is deleted)"
        )
    for i, block in enumerate(anatomy.blocks if output_norms == "metric" else ()):
        for name in norms:
            _check_gain(f"{anatomy.family.blocks}.{i}.{name}", norm_gain(block.get_submodule(name), anatomy.family).abs())


def _check_gain(name: str, gain: torch.Tensor) -> None:
    if not gain.is_meta and (small := gain < SMALLEST_GAIN * gain.max()).any():
        raise ValueError(
            f"{int(small.sum())} entries of the gain of {name} are zero or below {SMALLEST_GAIN:g} of its largest entry: "
            "output_norms=metric divides by the gain, which is not possible for these channels. Use output_norms=exact or "
            "output_norms=fitted, which do not divide by it"
        )


def usual_layout(model: nn.Module, slice_head: bool = False) -> str:
    """`tied` if the head shares the embedding table and is not sliced, else `low-rank`."""
    return "tied" if model.config.tie_word_embeddings and not slice_head else "low-rank"


def check_widths(dense: Anatomy, widths: Sequence[int], layout: str) -> None:
    """Raise ValueError for widths or a layout that this model cannot have."""
    d, wanted = dense.width, dense.junctions
    choose_one("layout", layout, LAYOUTS)
    whole = all(isinstance(k, int) and not isinstance(k, bool) and 0 < k <= d for k in widths)
    if len(widths) != wanted or not whole:
        raise ValueError(f"this model has {wanted} junctions of width {d}: give as many widths from 1 to {d}, not {list(widths)}")
    if layout == "tied" and (not dense.model.config.tie_word_embeddings or widths[-1] != d):
        raise ValueError("layout 'tied' is for a model whose head shares the embedding table, at full width: use layout=low-rank")
    if layout == "global" and (len(set(widths[:-1])) > 1 or widths[-1] not in (widths[0], d)):
        raise ValueError("layout 'global' has one basis: give every junction the same width (the head may be of full width)")


def replay(
    model: nn.Module,
    widths: list[int],
    layout: str,
    ranks: list[int | None],
    compensated: bool,
    output_norms: str = "refuse",
    norm_errors: list[float] | None = None,
) -> nn.Module:
    """Repeat the edit of `rotate_and_slice` on a model without values (parameters on the meta device), in place."""
    anatomy = Anatomy(model)
    if not isinstance(widths, list) or not isinstance(ranks, list) or not isinstance(compensated, bool):
        raise ValueError("widths and ranks are lists, compensated is true or false")
    if len(ranks) != len(widths) - 1 or not all(rank is None or isinstance(rank, int) for rank in ranks):
        raise ValueError(f"{len(widths)} widths need {len(widths) - 1} ranks, whole numbers or null")
    check_widths(anatomy, widths, layout)
    junctions = itertools.repeat(_empty_junction(anatomy.width, compensated))
    sliced = rotate_and_slice(model, junctions, widths, layout, ranks=ranks, inplace=True, output_norms=output_norms)
    if sliced.edits[-1]["ranks"] != ranks:
        raise ValueError(f"shortcuts of ranks {ranks} do not fit between widths {widths}")
    if norm_errors is not None:  # they were measured on the calibration set, which is not at hand now
        sliced.edits[-1]["norm_errors"] = norm_errors
    return sliced


def shapes_only(model: nn.Module, widths: Sequence[int], layout: str, output_norms: str = "refuse") -> nn.Module:
    """The sliced network as shapes on the meta device, for counting; the model may have any size and be on any device."""
    junctions = itertools.repeat(_empty_junction(model.config.hidden_size, False))
    return rotate_and_slice(shape_shell(model), junctions, widths, layout, inplace=True, output_norms=output_norms)


def _empty_junction(d: int, compensated: bool) -> Junction:
    axes, shift = torch.empty(d, d, dtype=torch.float64, device="meta"), torch.empty(d, dtype=torch.float64, device="meta")
    return Junction(axes, None, *((shift, shift) if compensated else (None, None)))
