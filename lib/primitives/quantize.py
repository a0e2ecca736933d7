"""Weights on few levels: round-to-nearest, and GPTQ (Frantar et al., arXiv 2210.17323), which compensates each rounding.

Levels are asymmetric and uniform: a group of consecutive weights of a row shares a scale and a zero point, and its values
are scale (q - zero) with q in 0 .. 2^bits - 1. Weights here are *fake-quantised*: they lie on those levels, but are stored in
the model's own dtype, so that plain transformers runs them. `quantized_bytes` says what packed storage would need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lib.primitives.cost import count
from lib.primitives.layerwise import GRAM, block_layers, rebuild, replace_layers
from lib.primitives.linalg import fix_columns, inverse_factor
from lib.primitives.surgery import LowRankLinear, parameter, shell

SCALE_BITS = 16  # scales are float16, as packed formats store them
HALF_MIN, HALF_MAX = 2.0**-24, 65504.0


def levels(weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [out, 1] of one group per row, from smallest to largest weight. weights: [out, group].

    Zero is always a level, so that pruned weights stay pruned. Scales are rounded to float16, as packed formats store them;
    the result is float64.
    """
    low = weights.double().amin(1, keepdim=True).clamp(max=0)
    high = weights.double().amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(HALF_MIN, HALF_MAX).half().double()
    return scale, (-low / scale).round().clamp(max=2**bits - 1)  # the clamp: tiny scales are rounded coarsely


def nearest_level(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights [out, n], each moved to the nearest level of its row; float64."""
    q = (weights.double() / scale + zero).round().clamp(0, 2**bits - 1)
    return scale * (q - zero)


def check_levels(bits: int, group: int | None) -> None:
    """Raise ValueError for a number of bits or a group size that does not exist."""
    if not 2 <= bits <= 8:
        raise ValueError(f"weights of {bits} bits: use 2 to 8")
    if group is not None and group < 1:
        raise ValueError(f"groups of {group} weights: use a positive number such as 64, or None for a whole row")


def quantize_rtn(weight: torch.Tensor, bits: int = 4, group: int | None = None) -> torch.Tensor:
    """Round every weight of a matrix [out, in] to the nearest level of its group.

    group: consecutive weights of a row that share scale and zero point, None for the whole row; the last group of a row
    may be shorter. Result: the dtype of `weight`. Raises ValueError for bits or groups that do not exist.
    """
    check_levels(bits, group)
    parts = weight.split(group or weight.shape[1], dim=1)
    return torch.cat([nearest_level(part, *levels(part, bits), bits) for part in parts], dim=1).to(weight.dtype)


def gptq_matrix(
    weight: torch.Tensor, gram: torch.Tensor, bits: int = 4, group: int | None = None, damping: float = 0.01, block: int = 128
) -> torch.Tensor:
    """Quantise a matrix [out, in] column by column, compensating each rounding in the later columns (GPTQ, Algorithm 1).

    gram: XXᵀ [in, in] of the inputs, up to a factor; group as in `quantize_rtn`. Levels of a group are chosen when its first
    column is reached, from weights that already compensate all columns before it (the released code leaves out those of the
    current block). Inputs that are always zero lose their weights, as published. With a diagonal Gram matrix this is
    round-to-nearest. Raises ValueError for bits or groups that do not exist.
    """
    check_levels(bits, group)

    def decide(columns: torch.Tensor, start: int):
        scale, zero = levels(columns, bits)
        return lambda column, i: nearest_level(column, scale, zero, bits)

    alive = weight.masked_fill(gram.diagonal() == 0, 0)
    return fix_columns(alive, inverse_factor(gram, damping), decide, group or weight.shape[1], block).to(weight.dtype)


# --- models ----------------------------------------------------------------------------------------------------------------


def factors(layer: nn.Module) -> list[nn.Linear]:
    """The matrices of a layer in the order they are applied: itself, or the two linear children of a low-rank one.

    Raises ValueError for anything else, and for a bias between factors, for which the Gram matrix of the latents has no place.
    """
    if type(layer) is nn.Linear:
        return [layer]
    chain = [layer.v, layer.u] if type(layer) is LowRankLinear else []
    if not chain or any(type(factor) is not nn.Linear for factor in chain) or layer.v.bias is not None:
        raise ValueError(f"{type(layer).__name__} is neither a linear layer nor two of them with one bias, at the end")
    return chain


def _check(model: nn.Module, bits: int, group: int | None) -> None:
    check_levels(bits, group)
    for name, layer in block_layers(model):
        try:
            factors(layer)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}") from error


def round_to_nearest(model: nn.Module, bits: int = 4, group: int | None = None, *, inplace: bool = False) -> nn.Module:
    """Round the weights of every linear layer in the blocks to the nearest level, without any data.

    Arguments, result and errors are those of `gptq`.
    """
    _check(model, bits, group)

    def remake(layer: nn.Module) -> nn.Module:
        new = shell(layer)
        for factor in factors(new):
            factor.weight = parameter(quantize_rtn(factor.weight, bits, group), like=factor.weight)
        return new

    return replace_layers(model, remake, inplace)


def gptq(
    model: nn.Module,
    ids: torch.Tensor,
    bits: int = 4,
    group: int | None = None,
    *,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Quantise every linear layer in the blocks with GPTQ, block after block; biases, norms, embeddings and head stay.

    ids: calibration tokens [samples, length]. Weights end on at most 2^bits levels per group, stored
    in the model's dtype: this saves no memory by itself (see `quantized_bytes`). A low-rank layer is quantised factor by
    factor, the second one for the latents of the quantised first one, whose Gram matrix is V H Vᵀ. The given model stays
    intact, unless `inplace`. Raises ValueError, before any work, for bits, groups, ids or layers that cannot be used.
    """
    _check(model, bits, group)

    def remake(layer: nn.Module, gram: torch.Tensor) -> nn.Module:
        new = shell(layer)
        for i, factor in enumerate(factors(new)):
            if i:
                v = factors(new)[i - 1].weight.double()
                gram = v @ gram @ v.T
            factor.weight = parameter(gptq_matrix(factor.weight, gram, bits, group), like=factor.weight)
        return new

    return rebuild(model, ids, GRAM, remake, inplace=inplace, progress=progress)


def quantized_bytes(model: nn.Module, bits: int = 4, group: int | None = None) -> int:
    """Bytes that a model would need with the weights of its blocks packed, computed from shapes; meta tensors suffice.

    Counted per weight `bits`, and per group a float16 scale and a zero point of `bits`; all other parameters (embeddings,
    head, norms, biases) as they are stored. No packed file is written here, and a real format may pad.
    """
    _check(model, bits, group)
    total = count(model).bytes
    for _, layer in block_layers(model):
        for weight in (factor.weight for factor in factors(layer)):
            rows, columns = weight.shape
            groups = rows * -(-columns // (group or columns))
            total += -(-(bits * weight.numel() + (SCALE_BITS + bits) * groups) // 8) - weight.nbytes
    return total
