"""Attention heads with fewer channels for queries and keys, and fewer for values, inside blocks that are not changed.

A stock block cuts queries, keys and values into heads of one size and rotates all their channels. So a narrow reader computes
only the channels that are left and puts zeros in the places of the others, and a narrow writer reads only the channels that are
left. A pair of zeros stays zero under any rotation and adds nothing to a product of query and key, and every group keeps the
frequencies that it wants. Parameters and the multiply-adds of the four matrices shrink; the attention itself and the cache of
keys and values keep the size of the dense heads.

`lib.models.checkpoint` has no line for the edit `narrow-heads`, and refuses to save such a model; with `replay` in its table
of edits it would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, head_size
from lib.primitives.structured import separate_readers
from lib.primitives.surgery import linear, record_edit


class NarrowReader(nn.Module):
    """A query, key or value matrix whose outputs go to `places` of `out_features` channels, with zeros in the others."""

    def __init__(self, narrow: nn.Linear, places: torch.Tensor, out_features: int):
        super().__init__()
        self.narrow, self.out_features = narrow, out_features
        self.register_buffer("places", places)  # int64 [kept]

    @property
    def in_features(self) -> int:
        return self.narrow.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.narrow(x)
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.places, y)


class NarrowWriter(nn.Module):
    """The output matrix of attention, which reads the channels in `places` alone."""

    def __init__(self, narrow: nn.Linear, places: torch.Tensor, in_features: int):
        super().__init__()
        self.narrow, self.in_features = narrow, in_features
        self.register_buffer("places", places)  # int64 [kept]

    @property
    def out_features(self) -> int:
        return self.narrow.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.narrow.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(x.index_select(-1, self.places))


def head_units(config) -> torch.Tensor:
    """The channels of a query or key head that stay or go together, int64 [units, channels of a unit].

    Rotary embeddings turn channel j together with j + r / 2, r being the number of channels that are rotated. Where only some
    are, the others are paired with their neighbours, so that all units are of one size; without rotation they stand alone.
    """
    size, rope = head_size(config), getattr(config, "rope_parameters", None)
    if rope is None:
        return torch.arange(size)[:, None]
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    turned = torch.arange(rotated // 2)
    passing = torch.arange(rotated, size).view(-1, 2)
    return torch.cat([torch.stack([turned, turned + rotated // 2], dim=1), passing])


def check_heads(anatomy: Anatomy, queries: bool) -> None:
    """Raise ValueError for attention whose heads cannot be narrowed. queries: query and key heads, too, not only values."""
    for i, block in enumerate(anatomy.blocks):
        for name in (*separate_readers(anatomy), anatomy.family.attention.writer):
            layer = block.get_submodule(name)
            if type(layer) is not nn.Linear:
                kind = type(layer).__name__
                raise ValueError(f"block {i} {name} is a {kind}, not an ordinary linear layer: cut the dense model")
        if queries and hasattr(block.get_submodule(anatomy.family.attention_module), "q_norm"):
            kind = anatomy.model.config.model_type
            raise ValueError(
                f"{kind} normalises queries and keys over all channels of a head, so none can go: narrow only the values"
            )


def narrow_queries(anatomy: Anatomy, block: nn.Module, kept: torch.Tensor) -> None:
    """Keep some units of the query and key heads of one block, in place. kept: indices of units, int64 [groups, units]."""
    size, units = head_size(anatomy.model.config), head_units(anatomy.model.config)
    for name in separate_readers(anatomy)[:2]:
        layer = block.get_submodule(name)
        heads = layer.out_features // size
        own = units[kept.cpu()].flatten(1).repeat_interleave(heads // len(kept), dim=0)  # channels of every head
        places = (own + size * torch.arange(heads)[:, None]).flatten().to(layer.weight.device)
        bias = None if layer.bias is None else layer.bias[places]
        narrow = linear(layer.weight[places], bias, like=layer.weight)
        block.set_submodule(name, NarrowReader(narrow, places, layer.out_features))


def narrow_values(anatomy: Anatomy, block: nn.Module, into: torch.Tensor, back: torch.Tensor) -> None:
    """Replace the values v [size] of every group of one block by `into` v, and their writer W by W `back`, in place.

    into: [groups, k, size]; back: [groups, size, k], for all query heads of a group.
    """
    size, (groups, k, _) = head_size(anatomy.model.config), into.shape
    value, output = separate_readers(anatomy)[2], anatomy.family.attention.writer
    reader, writer = block.get_submodule(value), block.get_submodule(output)
    heads = writer.in_features // size

    def first(count: int) -> torch.Tensor:
        return (size * torch.arange(count)[:, None] + torch.arange(k)).flatten().to(writer.weight.device)

    weight = (into @ reader.weight.detach().to(into).view(groups, size, -1)).flatten(0, 1)
    bias = None if reader.bias is None else (into @ reader.bias.detach().to(into).view(groups, size, 1)).flatten()
    block.set_submodule(value, NarrowReader(linear(weight, bias, like=reader.weight), first(groups), reader.out_features))
    columns = writer.weight.detach().to(back).view(-1, heads, size).transpose(0, 1)  # [heads, d, size]
    weight = (columns @ back.repeat_interleave(heads // groups, dim=0)).transpose(0, 1).flatten(1)
    block.set_submodule(output, NarrowWriter(linear(weight, writer.bias, like=writer.weight), first(heads), writer.in_features))


def empty_narrow(anatomy: Anatomy, block: nn.Module, units: int | None, values: int | None) -> None:
    """The shapes that narrowing leaves of one block of meta tensors: units of query and key heads, channels of value heads."""
    size = head_size(anatomy.model.config)
    groups = block.get_submodule(separate_readers(anatomy)[1]).out_features // size
    if units is not None:
        narrow_queries(anatomy, block, torch.arange(units).expand(groups, -1))
    if values is not None:
        into = torch.empty(groups, values, size, dtype=torch.float64, device="meta")
        narrow_values(anatomy, block, into, into.mT)


def record(model: nn.Module, units: Sequence[int | None], values: Sequence[int | None]) -> nn.Module:
    """Note what every block has left of its query and key heads, and of its value heads (None: all); returns the model."""
    if any(kept is not None for kept in (*units, *values)):
        record_edit(model, edit="narrow-heads", units=list(units), values=list(values))
    return model


def replay(model: nn.Module, units: list[int | None], values: list[int | None]) -> nn.Module:
    """Repeat the edit of `record` on a model without values, in place. Raises ValueError for sizes that do not fit the model."""
    anatomy, size = Anatomy(model), head_size(model.config)
    for name, found, most in (("units", units, len(head_units(model.config))), ("values", values, size)):
        fits = len(found) == len(anatomy.blocks) and all(k is None or (type(k) is int and 0 < k <= most) for k in found)
        if not fits:
            raise ValueError(f"{name} {found} do not fit {len(anatomy.blocks)} blocks with heads of {most}")
    check_heads(anatomy, any(k is not None for k in units))
    for block, own, value in zip(anatomy.blocks, units, values, strict=True):
        empty_narrow(anatomy, block, own, value)
    return record(model, units, values)
