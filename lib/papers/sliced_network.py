"""The network that SliceGPT builds: its modules, and how its weights are cut from the dense model's.

The stream x at junction j is replaced by u = x A_j, where A_j holds the first k_j columns of an orthogonal matrix. Readers
become W A, writers Bᵀ W, and between two junctions with bases A and B a *shortcut* AᵀB carries the residual. Blocks keep
their stock forward: a writer adds whatever turns the block's own `residual + output` into `residual · shortcut + output`.

Where a sandwich norm stands between writer and stream (Gemma 3: x + g * y / rms(y), y = z W), rms(y) is that of the vector
before gain and rotation, which the rotated one no longer shows. Such models are refused unless one of three extensions of
ours is asked for, see `OUTPUT_NORMS`.
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

# What to do about sandwich norms. exact: the writer stays whole for its norm, diag(g) B follows; a reference, saves little.
# metric: the writer is folded, y' = z W diag(g) B, and rms(y) is estimated from y' by `MetricNorm`: that of y' Bᵀ diag(1/g).
# fitted: the same network, but y is estimated from y' by least squares on the calibration data. Also where gains are zero.
OUTPUT_NORMS = ("refuse", "exact", "metric", "fitted")
SMALLEST_GAIN = 1e-4  # of the largest; `metric` divides by the gain, and float32 has no more digits to lose


@dataclass(frozen=True)
class NormFit:
    """How rms(y)² of what a writer wrote follows from q, the energy that the cut leaves of it: slope · q + intercept.

    error: root mean square, over the calibration tokens, of the relative error of rms(y)² + epsilon. undo: [d, d], so that q
    is the energy of (g * y) B Bᵀ undo; None for diag(1/g).
    """

    slope: float
    intercept: float = 0.0
    error: float = 0.0
    undo: torch.Tensor | None = None


@dataclass(frozen=True)
class Junction:
    """One point of the residual stream before a norm: the orthogonal axes [d, d] that it is turned to, and what they cost.

    values: energy [d] along each axis. stream_shift, norm_shift: mean [d] of what the cut deletes from the stream and from
    the norm's output; given where bias compensation is wanted (our extra, not in the paper). fit: of the sandwich norm that
    leads here, where it is estimated from a cut stream.
    """

    axes: torch.Tensor
    values: torch.Tensor | None = None
    stream_shift: torch.Tensor | None = None
    norm_shift: torch.Tensor | None = None
    fit: NormFit | None = None


# --- modules ------------------------------------------------------------------------------------------------------------


class JunctionNorm(nn.Module):
    """RMS norm of a sliced stream, dividing by the *original* d: deleted coordinates count as zeros.

    Input [..., stream], whose columns beyond the junction's own width are zero; result [..., width]. Gain and offset are
    folded into the readers, except before a tied head, which must stay as it is. If the writer of the same half needs it
    for a shortcut (`remembers`), the input is kept until that writer takes it. `extra` is set on the final norm when the
    head is not sliced: coordinates of the last writer beyond the stream, joined to it before the norm.
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
    the coordinates beyond the stream go to the final norm instead.

    writer: a linear layer, or the sandwich norm behind one. norm: of the same half, where this writer carries the residual;
    None in the other half of a parallel block.
    """

    def __init__(self, writer: nn.Module, stream: int, norm: JunctionNorm | None, shortcut: torch.Tensor | None, form: str):
        super().__init__()
        self.linear, self.stream, self.form = writer, stream, form
        self.shortcut = None if shortcut is None else parameter(shortcut, like=next(writer.parameters()))
        self._norm = [norm]  # in lists: these modules belong to the block and to the model
        self._final: list[JunctionNorm] = []
        self._adds = False
        if norm is not None:
            norm.remembers = True

    def feed(self, final: JunctionNorm, adds: bool) -> None:
        """Send what exceeds the stream to the final norm, on top of what another writer sent (`adds`) or anew."""
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
        out = _padded(out, self.stream)
        if self._final:
            out, beyond = out.split([self.stream, out.shape[-1] - self.stream], dim=-1)
            self._final[0].extra = self._final[0].extra + beyond if self._adds else beyond
        return out - u if u is not None and self.form == "dense" else out


class MetricNorm(nn.Module):
    """A sandwich norm behind a folded writer: y' / √(‖y' Rᵀ‖² + floor² + epsilon), where the root estimates rms(y).

    y' = (g * y) B [..., k] is what the writer wrote after gain g [d] and basis B [d, k]. R comes from a QR factorisation of
    Pᵀ, where y' P estimates y. With P = Bᵀ diag(1/g), ‖y' Rᵀ‖² = y' Bᵀ diag(g)⁻² B y'ᵀ, which at k = d is ‖y‖². Below it
    lacks what was deleted: `fit` corrects it, slope and intercept. epsilon is the norm's own: it is added to rms(y)², which no
    gain or basis has touched.
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


# --- cutting the weights (float64, cast once) ---------------------------------------------------------------------------


def _empty_linear(outputs: int, inputs: int, biased: bool, dtype: torch.dtype) -> nn.Linear:
    """A layer of shapes alone: arithmetic on meta tensors would give the same, and takes most of the time of counting."""
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
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    gained = weight * norm_gain(norm, family)
    for constant, matrix in ((norm_offset(norm), weight), (shift, gained)):
        if constant is not None:
            bias = matrix @ constant + (0 if bias is None else bias)
    return linear(gained @ a, bias, like=layer.weight)


def slice_writer(layer: nn.Linear, b: torch.Tensor, family: Family, shift: torch.Tensor | None = None) -> nn.Linear:
    """Bᵀ M W and Bᵀ (M bias + shift), where M subtracts the mean if the family's norms do. Result: [k, in]."""
    if layer.weight.is_meta:
        biased = layer.bias is not None or shift is not None
        return _empty_linear(b.shape[1], layer.weight.shape[1], biased, layer.weight.dtype)

    def centre(x):
        return remove_mean(x, dim=0) if family.subtracts_mean else x

    weight = b.T @ centre(layer.weight.detach().double())
    bias = None if layer.bias is None else b.T @ centre(layer.bias.detach().double())
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
    """What takes the place of a writer y = z W and of the sandwich norm behind it: (writer, norm), whose result is [..., k].

    exact: the writer as it is, and y / rms(y) times diag(g) B. metric, fitted: z W diag(g) B and a `MetricNorm`; without a
    `fit` that of an uncut stream, where the exact form has the same size, which fitted prefers. shift [d]: added to the stream
    behind the norm.
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
    """E M A: centred only where the norms subtract the mean (the published code centres always, which is wrong)."""
    weight = table.weight.detach().double()
    return embedding(table, (remove_mean(weight) if family.subtracts_mean else weight) @ a)


def connect(
    a: torch.Tensor, axes: torch.Tensor, k: int, layout: str, rank: int | None = None, drop_below: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Basis B [d, k] after a step, and the shortcut that leads to it from basis a: (B, shortcut or None, its form).

    Form `dense`, as published: S = AᵀB. Form `low-rank`: C with AᵀB = I - CCᵀ (and zero columns, where the next junction is
    wider). Where the next one is narrower there is no such C, and S is stored. Towards a full basis (k = d) the low-rank
    form starts that basis with A itself, so the shortcut is zero padding and needs no parameters.

    Columns of C whose principal angle has 1 - cos below `drop_below` are left out, an approximation; `rank` keeps exactly
    that many.
    """
    d, before = axes.shape[0], a.shape[1]
    if layout == "global" and k == before:
        return a, None, "low-rank"
    if layout == "dense" or k < before:
        b = axes[:, :k]
        return b, a.T @ b, "dense"
    if k == d > before:
        return complete(a), None, "low-rank"
    b, c = symmetric_shortcut(a, axes, k)
    if rank is None:
        rank = c.shape[1] if drop_below == 0 else int((c.square().sum(0) >= drop_below).sum())
    return b, c[:, :rank] if rank else None, "low-rank"


# --- building -----------------------------------------------------------------------------------------------------------


def rotate_and_slice(
    model: nn.Module,
    junctions: Iterator[Junction],
    widths: Sequence[int],
    layout: str = "low-rank",
    drop_below: float = 0.0,
    ranks: Sequence[int | None] | None = None,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
    output_norms: str = "refuse",
) -> nn.Module:
    """Build the sliced network from one junction at a time, taken from `junctions` as it is needed.

    widths: columns kept at each junction, the last of which is the width of the head. Any orthogonal axes leave the
    function unchanged at widths d (the paper's Theorem 1); principal axes lose least below. The result is a model of the
    same class with narrower modules; the dense one stays intact, or is consumed block by block with `inplace` so that both
    are never in memory. ranks: columns of each low-rank shortcut, None for dense ones, to repeat a recorded edit.
    output_norms: one of `OUTPUT_NORMS`, of no effect without sandwich norms.
    """
    check_sliceable(model, output_norms)
    dense = Anatomy(model)
    check_widths(dense, widths, layout)
    family, d, stream = dense.family, dense.width, max(widths[:-1])
    head, final_norm = dense.head, dense.get(family.final_norm)
    device = head.weight.device
    sliced = Anatomy(model if inplace else shell(model))

    here = next(junctions)
    compensated = here.stream_shift is not None
    a = here.axes[:, : widths[0]].to(device)
    tables = _embeddings(dense, a, stream, layout)
    last_norm = JunctionNorm(d, norm_epsilon(final_norm), widths[-1])
    step, found, errors = 0, [], []
    for i, block in enumerate(sliced.blocks):
        new: dict[str, nn.Module] = {}
        for _, halves in dense.steps:
            step += 1
            k, last = widths[step], step + 1 == len(widths)
            # A head of full width deletes nothing, so its junction needs no principal axes: nothing is measured for it.
            if last and (layout == "tied" or k == d > a.shape[1]):
                there = Junction(torch.eye(d, dtype=a.dtype, device=device) if layout == "tied" else complete(a))
            else:
                there = next(junctions)
            form = "dense" if last and layout == "tied" else layout
            rank = None if ranks is None else ranks[step - 1]
            b, shortcut, form = connect(a, there.axes.to(device), k, form, rank, drop_below)
            final = last_norm if last and k > stream else None
            fit = there.fit if k < d else None  # nothing is deleted, nothing to be estimated
            new |= _sliced_step(block, halves, family, here, a, b, shortcut, form, stream, final, output_norms, fit)
            errors.append(fit.error if fit else 0.0)
            found.append(None if form == "dense" else 0 if shortcut is None else shortcut.shape[1])
            here, a = there, b
        for name, module in new.items():  # only now: finding the axes ran the dense block
            block.set_submodule(name, module)
        if progress:
            progress(f"sliced layer {i + 1} of {len(sliced.blocks)} to width {a.shape[1]}")
    if layout == "tied":
        if (gain := getattr(final_norm, "weight", None)) is not None:
            last_norm.weight = parameter(norm_gain(final_norm, family), like=gain)
        if (offset := norm_offset(final_norm)) is not None:
            last_norm.bias = parameter(offset, like=final_norm.bias)
    else:
        sliced.put(family.head, slice_reader(head, final_norm, a, family, _on(here.norm_shift, device)))
        untie_head(sliced.model)
    sliced.put(family.final_norm, last_norm)
    for name, table in tables.items():
        sliced.put(name, table)
    edit = dict(edit="slicegpt", widths=list(widths), layout=layout, ranks=found, compensated=compensated)
    if sandwich_norms(family):
        edit |= dict(output_norms=output_norms, norm_errors=errors)
    record_edit(sliced.model, **edit)
    return sliced.model


def _sliced_step(
    block: nn.Module,
    halves: tuple[Half, ...],
    family: Family,
    here: Junction,
    a: torch.Tensor,
    b: torch.Tensor,
    shortcut: torch.Tensor | None,
    form: str,
    stream: int,
    final: JunctionNorm | None,
    output_norms: str,
    fit: NormFit | None,
) -> dict[str, nn.Module]:
    """The modules, by name, that replace norms, readers and writers between two junctions with bases a and b.

    `final` is given in the last step before a head that is wider than the stream. Of the two halves of a parallel block
    the last one carries the residual and its shortcut.
    """
    stream_shift, norm_shift = (_on(shift, a.device) for shift in (here.stream_shift, here.norm_shift))
    new: dict[str, nn.Module] = {}
    for half in halves:
        carries = half is halves[-1]
        norm = block.get_submodule(half.norm)
        junction = new.setdefault(half.norm, JunctionNorm(a.shape[0], norm_epsilon(norm), a.shape[1]))
        for name in half.readers:
            new[name] = slice_reader(block.get_submodule(name), norm, a, family, norm_shift)
        shift = stream_shift if carries else None
        writer, last = block.get_submodule(half.writer), half.output_norm or half.writer
        if half.output_norm is None:
            writer = slice_writer(writer, b, family, shift)
        else:
            norm = block.get_submodule(half.output_norm)
            new[half.writer], writer = slice_sandwich(writer, norm, b, family, output_norms, fit, shift)
        residual = junction if carries and shortcut is not None else None
        if residual is not None or b.shape[1] != stream:
            writer = ShortcutWriter(writer, stream, residual, shortcut if carries else None, form)
        if final is not None:
            writer.feed(final, adds=half is not halves[0])
        new[last] = writer
    return new


def _embeddings(dense: Anatomy, a: torch.Tensor, stream: int, layout: str) -> dict[str, nn.Module]:
    """The tables that write the first stream: cut to the columns of `a`, or, with a tied head, the token table whole."""
    family = dense.family
    tables = {name: slice_embedding(dense.get(name), a, family) for name in family.embeddings}
    if layout == "tied":
        token_table = family.embeddings[0]
        projection = remove_mean(a, dim=0) if family.subtracts_mean else a  # E M A: the mean is taken from the rows of A
        tables[token_table] = ProjectedEmbedding(dense.get(token_table), projection)
    if a.shape[1] < stream:
        for table in tables.values():
            table.register_forward_hook(_PadOutput(stream))
    return tables


def _on(shift: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if shift is None else shift.to(device)


# --- shapes -------------------------------------------------------------------------------------------------------------


def sandwich_norms(family: Family) -> list[str]:
    """Names within a block of the norms between a writer and the stream."""
    return [half.output_norm for half in (family.attention, family.mlp) if half.output_norm]


def check_sliceable(model: nn.Module, output_norms: str = "refuse") -> None:
    """Raise ValueError, with the reason, for architectures whose residual stream cannot be rotated freely."""
    anatomy = Anatomy(model)
    choose_one("output_norms", output_norms, OUTPUT_NORMS)
    if any(isinstance(module, JunctionNorm) for module in model.modules()):
        raise ValueError("this model is already sliced: slice the dense model at a higher level instead")
    norms = sandwich_norms(anatomy.family)
    if norms and output_norms == "refuse":
        raise ValueError(
            f"SliceGPT cannot rotate {model.config.model_type}: it normalises what attention and MLP write before "
            "adding it (sandwich norms), and that norm's scale is not invariant under a rotation that follows its gain. "
            "Use a method that leaves the residual stream alone, or an extension of ours, with slice_model or method slicegpt: "
            "output_norms=exact (keeps writers whole, a reference that saves little), or output_norms=metric or fitted (folds "
            "the gain and estimates the scale, an approximation once something is deleted)"
        )
    for i, block in enumerate(anatomy.blocks if output_norms == "metric" else ()):
        for name in norms:
            _check_gain(f"{anatomy.family.blocks}.{i}.{name}", norm_gain(block.get_submodule(name), anatomy.family).abs())


def _check_gain(name: str, gain: torch.Tensor) -> None:
    if not gain.is_meta and (small := gain < SMALLEST_GAIN * gain.max()).any():
        raise ValueError(
            f"{int(small.sum())} entries of the gain of {name} are (almost) zero, at most {SMALLEST_GAIN:g} of its largest: "
            "output_norms=metric divides by the gain, so it cannot know the size of those channels. Use output_norms=exact, or "
            "output_norms=fitted, which does not divide"
        )


def usual_layout(model: nn.Module, slice_head: bool = False) -> str:
    """`tied` where the head shares the embedding table and stays whole, else `low-rank`."""
    return "tied" if model.config.tie_word_embeddings and not slice_head else "low-rank"


def check_widths(dense: Anatomy, widths: Sequence[int], layout: str) -> None:
    """Raise ValueError for widths or a layout that this model cannot be given."""
    d, wanted = dense.width, dense.junctions
    choose_one("layout", layout, LAYOUTS)
    whole = all(isinstance(k, int) and not isinstance(k, bool) and 0 < k <= d for k in widths)
    if len(widths) != wanted or not whole:
        raise ValueError(f"this model has {wanted} junctions of width {d}: give as many widths from 1 to {d}, not {list(widths)}")
    if layout == "tied" and (not dense.model.config.tie_word_embeddings or widths[-1] != d):
        raise ValueError("layout 'tied' is for a model whose head shares the embedding table, at full width: use low-rank")
    if layout == "global" and (len(set(widths[:-1])) > 1 or widths[-1] not in (widths[0], d)):
        raise ValueError("layout 'global' has one basis: give every junction the same width (the head may keep its own)")


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
    if norm_errors is not None:  # measured once, on the calibration set
        sliced.edits[-1]["norm_errors"] = norm_errors
    return sliced


def shapes_only(model: nn.Module, widths: Sequence[int], layout: str = "low-rank", output_norms: str = "refuse") -> nn.Module:
    """The sliced network as shapes on the meta device, from a model of any size and on any device: for counting."""
    junctions = itertools.repeat(_empty_junction(model.config.hidden_size, False))
    return rotate_and_slice(shape_shell(model), junctions, widths, layout, inplace=True, output_norms=output_norms)


def _empty_junction(d: int, compensated: bool) -> Junction:
    axes, shift = torch.empty(d, d, dtype=torch.float64, device="meta"), torch.empty(d, dtype=torch.float64, device="meta")
    return Junction(axes, None, *((shift, shift) if compensated else (None, None)))
