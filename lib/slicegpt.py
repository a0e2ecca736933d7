"""SliceGPT (Ashkboos et al., arXiv 2401.15024): rotate the residual stream to its principal axes, delete the last ones.

The stream x at each junction is replaced by u = x A, where the k columns of A span the directions of largest energy.
Readers become W A, writers Aᵀ W, and between two junctions with bases A and B a *shortcut* AᵀB carries the residual.

How the calibration works here: keeping k directions of the stream is the same as projecting it, x̂ = x A Aᵀ, and the
norm sees ‖x̂‖ = ‖u‖. So we run the model's own, unchanged dense blocks on a projected stream. That is exactly the
sliced network in the original coordinates; each half block runs once, and the dense weights are read, never modified.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from accelerate import init_empty_weights
from torch import nn

from lib.anatomy import Anatomy, Family, Half, attention_half, mlp_half, norm_epsilon, norm_gain, norm_offset
from lib.calibration import ResidualStream
from lib.linalg import complete, principal_axes, random_rotation, remove_mean, symmetric_shortcut
from lib.surgery import embedding, linear, parameter, record_edit, shape_shell, shell, untie_head

LAYOUTS = ("low-rank", "dense")
SIGNALS = ("raw", "normalised")
ORIENTATIONS = ("pca", "random")


def kept_width(d: int, level: float, round_interval: int = 8) -> int:
    """Width k left of d at a slicing level in [0, 1): ⌊(1 - level) d⌋, rounded down to a multiple of `round_interval`.

    Computed on the fraction that the float stands for: (1 - 0.8) 5120 is 1024, which binary arithmetic rounds to 1023 (and
    the published code then to 1016). Level 0 keeps d. Raises ValueError where nothing would be left.
    """
    if not 0 <= level < 1:
        raise ValueError(f"slicing level must be in [0, 1), not {level}: 0.25 deletes a quarter of the directions")
    if level == 0:
        return d
    if round_interval < 1:
        raise ValueError(f"widths are rounded to multiples of {round_interval}, which is not a positive number: use 1 for none")
    k = int((1 - Fraction(level).limit_denominator(10**6)) * d)
    k -= k % round_interval
    if k < 1:
        raise ValueError(f"slicing {d} by {level} in steps of {round_interval} leaves nothing: use a lower level or step")
    return k


# --- modules of the sliced network ------------------------------------------------------------------------------------


class JunctionNorm(nn.Module):
    """Gain-free RMS norm of a sliced stream [..., k], dividing by the *original* d: deleted coordinates count as zeros.

    If the writer of the same half needs it for a shortcut (`remembers`), its input is kept until that writer takes it.
    `extra` is set on the final norm when the head is not sliced: the last d - k coordinates of the last writer, joined to
    the stream before the norm.
    """

    def __init__(self, d: int, epsilon: float):
        super().__init__()
        self.d, self.epsilon, self.remembers = d, epsilon, False
        self.residual: torch.Tensor | None = None
        self.extra: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.extra is not None:
            x = torch.cat([x, self.extra.view(*x.shape[:-1], -1)], dim=-1)
            self.extra = None
        elif self.remembers:
            self.residual = x
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.d + self.epsilon)
        return (wide * scale).to(x.dtype)

    def take(self) -> torch.Tensor:
        residual, self.residual = self.residual, None
        return residual

    def extra_repr(self) -> str:
        return f"d={self.d}, epsilon={self.epsilon}"


class ShortcutWriter(nn.Linear):
    """A writer that also applies the shortcut, so that the block's own `residual + output` is right (stock forward).

    Low-rank layout: output - (uC)Cᵀ, so the sum is u(I - CCᵀ) + output. Dense layout: output + uS - u. In the last half
    before an unsliced head the output has d columns: the first k are returned, the rest goes to the final norm.
    """

    def __init__(
        self,
        source: nn.Linear,
        norm: JunctionNorm,
        shortcut: nn.Parameter | None,
        layout: str,
        final_norm: JunctionNorm | None = None,
    ):
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.shortcut, self.layout = shortcut, layout
        self._norms = [norm] if final_norm is None else [norm, final_norm]  # a list: they belong to the block and the model
        norm.remembers = True

    @property
    def macs_per_token(self) -> int:
        shortcut = 0 if self.shortcut is None else self.shortcut.numel()
        return self.weight.numel() + shortcut * (1 if self.layout == "dense" else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, u = super().forward(x), self._norms[0].take()
        if self.shortcut is not None and self.layout == "dense":
            k = u.shape[-1]
            out = out + u @ self.shortcut
            out = torch.cat([out[..., :k] - u, out[..., k:]], dim=-1)
        elif self.shortcut is not None:
            out = out - (u @ self.shortcut) @ self.shortcut.T
        if len(self._norms) > 1:
            out, self._norms[1].extra = out.split([u.shape[-1], out.shape[-1] - u.shape[-1]], dim=-1)
        return out


# --- cutting the weights (float64, cast once) --------------------------------------------------------------------------


def slice_reader(layer: nn.Linear, norm: nn.Module, a: torch.Tensor, family: Family) -> nn.Linear:
    """W diag(gain) A, with the norm's offset folded into the bias: b + W offset. Result: [out, k]."""
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if (offset := norm_offset(norm)) is not None:
        bias = weight @ offset + (0 if bias is None else bias)
    return linear((weight * norm_gain(norm, family)) @ a, bias, like=layer.weight)


def slice_writer(layer: nn.Linear, b: torch.Tensor, family: Family) -> nn.Linear:
    """Bᵀ M W and Bᵀ M bias, where M subtracts the mean if the family's norms do. Result: [k, in]."""

    def centre(x):
        return remove_mean(x, dim=0) if family.subtracts_mean else x

    weight = b.T @ centre(layer.weight.detach().double())
    bias = None if layer.bias is None else b.T @ centre(layer.bias.detach().double())
    return linear(weight, bias, like=layer.weight)


def slice_embedding(table: nn.Embedding, a: torch.Tensor, family: Family) -> nn.Embedding:
    """E M A: centred only where the norms subtract the mean (the published code centres always, which is wrong)."""
    weight = table.weight.detach().double()
    return embedding(table, (remove_mean(weight) if family.subtracts_mean else weight) @ a)


def _sliced_half(
    block: nn.Module,
    half: Half,
    family: Family,
    a: torch.Tensor,
    b: torch.Tensor,
    shortcut: torch.Tensor | None,
    layout: str,
    final_norm: JunctionNorm | None,
) -> dict[str, nn.Module]:
    """The modules, by name, that replace norm, readers and writer of one half; a, b: kept bases before and after it.

    `final_norm` is given for the last half before an unsliced head and takes the coordinates beyond k.
    """
    norm = block.get_submodule(half.norm)
    junction = JunctionNorm(a.shape[0], norm_epsilon(norm))
    writer = slice_writer(block.get_submodule(half.writer), b, family)
    if shortcut is not None or final_norm is not None:
        stored = None if shortcut is None else parameter(shortcut, like=writer.weight)
        writer = ShortcutWriter(writer, junction, stored, layout, final_norm)
    readers = {name: slice_reader(block.get_submodule(name), norm, a, family) for name in half.readers}
    return {half.norm: junction, half.writer: writer} | readers


def connect(a: torch.Tensor, axes: torch.Tensor, k: int, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Basis after a half and the shortcut that leads to it from basis a [d, k].

    Low-rank: (B, C) with AᵀB = I - CCᵀ. Dense, as published: (B, S = AᵀB). Towards an unsliced head (k = d) the low-rank
    layout starts the last basis with A itself, so the shortcut is zero padding and needs no parameters.
    """
    d = axes.shape[0]
    if layout == "dense":
        b = axes[:, :k]
        return b, a.T @ b
    if k == d > a.shape[1]:
        return complete(a), None
    b, c = symmetric_shortcut(a, axes, k)
    return b, c if c.shape[1] else None


def rotate_and_slice(
    model: nn.Module,
    axes: Iterator[torch.Tensor],
    k: int,
    layout: str = "low-rank",
    slice_head: bool = False,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Build the sliced network from one orthogonal matrix [d, d] per junction, taken from `axes` as it is needed.

    Any orthogonal matrices leave the function unchanged at k = d (the paper's Theorem 1); principal axes lose least
    below. The result is a model of the same class with narrower modules; the dense one stays intact, or is consumed
    block by block with `inplace` so that both are never in memory.
    """
    dense = Anatomy(model)
    family, d = dense.family, dense.width
    head, final_norm = dense.head, dense.get(family.final_norm)
    sliced = Anatomy(model if inplace else shell(model))
    axes = (q.to(head.weight.device) for q in axes)

    a = next(axes)[:, :k]
    tables = {name: slice_embedding(dense.get(name), a, family) for name in family.embeddings}
    last_norm = JunctionNorm(d, norm_epsilon(final_norm))
    for i, block in enumerate(sliced.blocks):
        new: dict[str, nn.Module] = {}
        for half in dense.halves:
            widens = i + 1 == len(sliced.blocks) and half is family.mlp and not slice_head and k < d
            # An unsliced head needs no principal axes at the last junction: nothing is deleted there.
            q = complete(a) if widens else next(axes)
            b, shortcut = connect(a, q, d if widens else k, layout)
            new |= _sliced_half(block, half, family, a, b, shortcut, layout, last_norm if widens else None)
            a = b
        for name, module in new.items():  # only now: finding the axes ran the dense block
            block.set_submodule(name, module)
        if progress:
            progress(f"sliced layer {i + 1} of {len(sliced.blocks)} to width {k}")
    sliced.put(family.head, slice_reader(head, final_norm, a, family))
    sliced.put(family.final_norm, last_norm)
    for name, table in tables.items():
        sliced.put(name, table)
    untie_head(sliced.model)
    record_edit(sliced.model, edit="slicegpt", width=k, layout=layout, slice_head=slice_head)
    return sliced.model


# --- calibration --------------------------------------------------------------------------------------------------------


def decompose(
    stream: ResidualStream, signal: str = "raw", precision: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d] and principal axes [d, d] of the stream where it stands.

    signal `raw` decomposes the residual stream itself, as the released code does; `normalised` decomposes the output of
    the norm, as the paper's text says (each token then has the same weight).
    """

    def rms_normalise(x):
        x = x if x.dtype == torch.float64 else x.float()
        return x * x.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()

    return principal_axes(stream.gram(rms_normalise if signal == "normalised" else None), precision)


def junctions(
    stream: ResidualStream,
    first: tuple[torch.Tensor, torch.Tensor],
    k: int,
    signal: str = "raw",
    precision: torch.dtype = torch.float64,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`decompose` at every junction in order, each measured on the stream already sliced to k before it.

    `first` is the decomposition of junction 0, where the stream must stand. One evaluation of each half block: measure,
    project, go on (the published code runs every block twice). At k = d this is the dense model.
    """
    found = first
    yield found
    for block in range(len(stream.anatomy.blocks)):
        for half in (attention_half, mlp_half):
            stream.advance(half, block, before=_projection(found[1], k, stream.anatomy))
            found = decompose(stream, signal, precision)
            yield found


def spectra(model: nn.Module, ids: torch.Tensor, signal: str = "raw", batch: int = 8) -> torch.Tensor:
    """Eigenvalues [2 L + 1, d] of every junction of the dense model, largest first: how much energy slicing could keep."""
    stream = ResidualStream(model, ids, batch=batch)
    return torch.stack([values for values, _ in junctions(stream, decompose(stream, signal), stream.anatomy.width, signal)])


def _projection(axes: torch.Tensor, k: int, anatomy: Anatomy) -> Callable:
    """x -> x A Aᵀ (centred first for LayerNorm families), in the coordinates of the dense model.

    The product is at least float32: a half-precision A is no longer orthogonal.
    """

    def project(x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = remove_mean(wide) if anatomy.family.subtracts_mean else wide
        if k < anatomy.width:
            a = axes[:, :k].to(wide)
            wide = (wide @ a) @ a.T
        return wide.to(x.dtype)

    return project


def randomly_oriented(axes: Iterator[torch.Tensor], k: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rotate the k kept axes of each junction among themselves at random: the same function in other coordinates."""
    for q in axes:
        yield torch.cat([q[:, :k] @ random_rotation(k, generator).to(q), q[:, k:]], dim=1)


def replay(model: nn.Module, width: int, layout: str, slice_head: bool) -> nn.Module:
    """Repeat the edit of `rotate_and_slice` on a model without values (parameters on the meta device), in place."""
    check_sliceable(model)
    d = model.config.hidden_size
    if layout not in LAYOUTS or not isinstance(slice_head, bool) or not isinstance(width, int) or not 0 < width <= d:
        raise ValueError(f"no such slicing of a model of width {d}: width {width!r}, layout {layout!r}, head {slice_head!r}")
    axes = itertools.repeat(torch.empty(d, d, dtype=torch.float64, device="meta"))
    return rotate_and_slice(model, axes, width, layout, slice_head, inplace=True)


def shapes_only(
    model: nn.Module, level: float, round_interval: int = 8, layout: str = "low-rank", slice_head: bool = False
) -> nn.Module:
    """The sliced network as shapes on the meta device, from a model of any size and on any device: for counting."""
    check_sliceable(model)
    return replay(shape_shell(model), kept_width(model.config.hidden_size, level, round_interval), layout, slice_head)


def check_sliceable(model: nn.Module) -> None:
    """Raise ValueError, with the reason, for architectures whose residual stream cannot be rotated freely."""
    family = Anatomy(model).family
    if any(isinstance(module, JunctionNorm) for module in model.modules()):
        raise ValueError("this model is already sliced: slice the dense model at a higher level instead")
    if any(half.output_norm for half in (family.attention, family.mlp)):
        raise ValueError(
            f"SliceGPT cannot rotate {model.config.model_type}: it normalises what attention and MLP write before "
            "adding it (sandwich norms), and that norm's scale is not invariant under a rotation that follows its gain. "
            "Use a method that leaves the residual stream alone"
        )


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    levels: Sequence[float],
    *,
    mask: torch.Tensor | None = None,
    round_interval: int = 8,
    layout: str = "low-rank",
    signal: str = "raw",
    orientation: str = "pca",
    slice_head: bool = False,
    precision: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    batch: int = 8,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[float, nn.Module]]:
    """Slice a model at several levels; yields (level, sliced model), each the same function as a run of its own.

    ids: calibration tokens [samples, length]; mask: 1 for real tokens. The dense model is read only; first junction and
    residual buffer are shared by all levels. Raises ValueError for bad levels, ids, weights or architectures before
    any work starts.
    """
    for name, value, known in (
        ("layout", layout, LAYOUTS), ("signal", signal, SIGNALS), ("orientation", orientation, ORIENTATIONS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if orientation == "random" and generator is None:
        raise ValueError("orientation 'random' needs a torch.Generator, so that the run can be repeated")
    if inplace and len(levels) != 1:
        raise ValueError("slicing in place consumes the dense model: give exactly one level")
    check_sliceable(model)
    widths = [kept_width(model.config.hidden_size, level, round_interval) for level in levels]
    return _sweep(
        model, ResidualStream(model, ids, mask, batch), list(zip(levels, widths, strict=True)), layout, signal,
        orientation, slice_head, precision, generator, inplace, progress,
    )  # fmt: skip


def _sweep(model, stream, cuts, layout, signal, orientation, slice_head, precision, generator, inplace, progress):
    first = decompose(stream, signal, precision)
    for i, (level, k) in enumerate(cuts):
        if i:
            stream.restart()
        axes = (axes for _, axes in junctions(stream, first, k, signal, precision))
        if orientation == "random":
            axes = randomly_oriented(axes, k, generator)
        yield level, rotate_and_slice(model, axes, k, layout, slice_head, inplace, progress)


def slice_model(model: nn.Module, ids: torch.Tensor, level: float, **settings) -> nn.Module:
    """Slice a model at one level; `settings` are those of `sweep`."""
    return next(sweep(model, ids, [level], **settings))[1]


# --- one basis for all junctions: an ordinary, narrower model --------------------------------------------------------------


def global_axes(model: nn.Module, ids: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Principal axes [d, d] of all junctions of the dense model together; any width can be cut from them.

    The covariances are summed after division by their traces (our choice: late junctions carry far more energy and would
    decide alone). One pass over the dense model, without the paper's re-measuring behind each cut.
    """
    check_sliceable(model)
    stream = ResidualStream(model, ids, batch=batch)
    total = stream.gram()
    total /= total.trace()
    for block in range(len(stream.anatomy.blocks)):
        for half in (attention_half, mlp_half):
            stream.advance(half, block)
            gram = stream.gram()
            total += gram / gram.trace()
    return principal_axes(total)[1]


def stock_model(model: nn.Module, axes: torch.Tensor, k: int) -> nn.Module:
    """Slice every junction with the same axes [d, d]: a stock model of width k that needs nothing of this suite.

    All shortcuts are the identity, head included. What remains is the norm, which must divide by d and not by k: since
    ‖u‖²/k + ε d/k = (d/k)(‖u‖²/d + ε), a stock RMSNorm with gain √(d/k) and epsilon ε d/k does just that. Raises
    ValueError for families whose stock class cannot hold the result.
    """
    check_sliceable(model)
    dense = Anatomy(model)
    family, d = dense.family, dense.width
    _check_stock(model, dense)
    a = axes[:, :k].to(dense.head.weight.device)
    config = copy.deepcopy(model.config)
    config.head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    config.hidden_size, config.rms_norm_eps, config.tie_word_embeddings = k, config.rms_norm_eps * d / k, False
    with init_empty_weights(include_buffers=False):
        narrow = Anatomy(type(model)(config))

    def norm_like(norm: nn.Module) -> nn.Parameter:
        return parameter(torch.full((k,), (d / k) ** 0.5, dtype=torch.float64), like=norm.weight)

    for block, old in zip(narrow.blocks, dense.blocks, strict=True):
        for half in dense.halves:
            norm = old.get_submodule(half.norm)
            for name in half.readers:
                block.set_submodule(name, slice_reader(old.get_submodule(name), norm, a, family))
            block.set_submodule(half.writer, slice_writer(old.get_submodule(half.writer), a, family))
            block.get_submodule(half.norm).weight = norm_like(norm)
    for name in family.embeddings:
        narrow.put(name, slice_embedding(dense.get(name), a, family))
    final_norm = dense.get(family.final_norm)
    narrow.get(family.final_norm).weight = norm_like(final_norm)
    narrow.put(family.head, slice_reader(dense.head, final_norm, a, family))
    return narrow.model.to(dense.head.weight.device).eval()


def _check_stock(model: nn.Module, dense: Anatomy) -> None:
    """Raise ValueError with the reason where no stock class holds a one-basis slicing of this model."""
    family, kind = dense.family, model.config.model_type
    advice = "use per-junction slicing and lib.checkpoint instead"
    if family.subtracts_mean or family.gain_offset:
        raise ValueError(f"a narrower {kind} is not a stock model: its class ties head size and norm to the width; {advice}")
    norms = {half.norm for half in dense.halves}
    for name, module in dense.blocks[0].named_modules():
        if hasattr(module, "variance_epsilon") and name not in norms:
            raise ValueError(f"{kind} normalises {name} with the epsilon of its other norms, which must change; {advice}")
