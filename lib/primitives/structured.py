"""Structured removal: fewer FFN neurons, fewer attention groups, fewer blocks. What stays is an ordinary, smaller network.

A *neuron* is a row of every reader of an MLP (gate and up, or fc1) and the column of its writer. A *group* is a key head, its
value head and the query heads that share them, with their columns of the writer; without grouped-query attention it is one
head. Methods score such units and choose; this file cuts. Where the result is a stock architecture (equal widths, no new
biases) it carries no record of edits, and plain transformers can load the saved folder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, Half, head_size
from lib.primitives.checks import kept_share
from lib.primitives.surgery import linear, refusal, set_edits, shape_shell, shell

# For every block the sorted indices of the units that stay, int64; None: all of them stay.
Keep = Sequence[torch.Tensor | None]
# For every block a tensor or None; an empty sequence stands for None everywhere.
PerBlock = Sequence[torch.Tensor | None]


# --- counting units ------------------------------------------------------------------------------------------------------


def ffn_widths(model: nn.Module) -> list[int]:
    """Neurons of every block."""
    anatomy = Anatomy(model)
    return [block.get_submodule(anatomy.family.mlp.writer).in_features for block in anatomy.blocks]


def kv_groups(model: nn.Module) -> list[int]:
    """Key-value groups of every block. Raises ValueError for attention whose queries, keys and values are one matrix."""
    anatomy = Anatomy(model)
    _, key, _ = separate_readers(anatomy)
    size = head_size(model.config)
    return [block.get_submodule(key).out_features // size for block in anatomy.blocks]


def separate_readers(anatomy: Anatomy) -> tuple[str, str, str]:
    """Names of the query, key and value matrices in a block."""
    readers = anatomy.family.attention.readers
    if len(readers) != 3:
        kind = anatomy.model.config.model_type
        raise ValueError(f"{kind} keeps queries, keys and values in one matrix, whose heads cannot be cut: prune neurons only")
    return readers


def neuron_params(model: nn.Module) -> int:
    """Parameters of one neuron: its row of every reader with the bias, its column of the writer."""
    return unit_params(Anatomy(model).blocks[0], Anatomy(model).family.mlp)


def group_params(model: nn.Module) -> int:
    """Parameters of one key-value group: its rows of q, k and v with their biases, its columns of the writer."""
    anatomy = Anatomy(model)
    return _params(anatomy.blocks[0], anatomy.family.attention) // kv_groups(model)[0]


def unit_params(block: nn.Module, mlp: Half) -> int:
    """Parameters of one neuron of a block."""
    return _params(block, mlp) // block.get_submodule(mlp.writer).in_features


def _params(block: nn.Module, half: Half) -> int:
    """Parameters of a half that belong to its units: all but the norm and the writer's bias."""
    readers = (p.numel() for name in half.readers for p in block.get_submodule(name).parameters())
    return sum(readers) + block.get_submodule(half.writer).weight.numel()


# --- choosing units ------------------------------------------------------------------------------------------------------


def kept_count(n: int, ratio: float) -> int:
    """⌊n (1 - ratio)⌋ in exact arithmetic: 0.2 of 10 is 2. Raises ValueError where none of n would be left."""
    kept = int(n * kept_share(ratio))
    if kept < 1:
        raise ValueError(f"removing {ratio:.0%} of {n} units leaves none: use a lower ratio")
    return kept


def keep_highest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Sorted indices [kept] of the highest of the scores [n]; of equal ones the lower index stays.

    Raises ValueError for scores that are NaN or infinite, and for an impossible number.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: score in float32 or bfloat16, and check the weights")
    if not 0 < kept <= len(scores):
        raise ValueError(f"cannot keep {kept} of {len(scores)} units: keep at least 1 and at most all")
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


def uniform(scores: Sequence[torch.Tensor], ratio: float, protect: Sequence[int] = ()) -> list[torch.Tensor | None]:
    """Remove the same share of units from every block, the lowest scores first; blocks in `protect` stay whole."""
    return [
        None if block in protect else keep_highest(score, kept_count(len(score), ratio)) for block, score in enumerate(scores)
    ]


def globally(scores: Sequence[torch.Tensor], ratio: float, least: int = 1) -> list[torch.Tensor]:
    """Remove a share of the units of all blocks together by one threshold; the best `least` of every block stay."""
    sizes = [len(score) for score in scores]
    kept = kept_count(sum(sizes), ratio)
    if kept < least * len(sizes) or least > min(sizes):
        raise ValueError(f"{kept} units cannot leave {least} in each of {len(sizes)} blocks: use a lower ratio, or fewer")
    safe = torch.cat(
        [torch.isin(torch.arange(n), keep_highest(score.cpu(), least)) for n, score in zip(sizes, scores, strict=True)]
    )
    pooled = torch.cat([score.cpu() for score in scores])
    pooled = torch.where(safe, pooled.max() + 1, pooled)
    stays = torch.zeros(len(pooled), dtype=torch.bool)
    stays[keep_highest(pooled, kept)] = True
    return [part.nonzero()[:, 0] for part in stays.split(sizes)]


# --- cutting -------------------------------------------------------------------------------------------------------------


def remove_neurons(
    model: nn.Module, keep: Keep, *, scale: PerBlock = (), bias: PerBlock = (), inplace: bool = False
) -> nn.Module:
    """A model with the neurons in `keep` only. The given one stays intact, unless `inplace`.

    scale: [kept] for a block multiplies the remaining columns of the writer, a tuned mask folded into the weights; bias: [d] is
    added to the writer's bias. Raises ValueError, before anything is changed, for indices that do not exist and for
    matrices that are not ordinary linear layers.
    """
    return _remove(model, keep, scale, bias, inplace, cut_neurons, ffn_widths(model))


def remove_groups(model: nn.Module, keep: Keep, *, scale: PerBlock = (), bias: PerBlock = (), inplace: bool = False) -> nn.Module:
    """A model with the key-value groups in `keep` only; arguments as for `remove_neurons`, scale one number per group."""
    return _remove(model, keep, scale, bias, inplace, cut_groups, kv_groups(model))


def _remove(model, keep, scale, bias, inplace, cut, sizes) -> nn.Module:
    blocks = len(sizes)
    for name, given in (("keep", keep), ("scale", scale or keep), ("bias", bias or keep)):
        if len(given) != blocks:
            raise ValueError(f"{name} has {len(given)} entries, but the model has {blocks} blocks: give one for each")
    for block, (indices, n) in enumerate(zip(keep, sizes, strict=True)):
        if indices is not None:
            _check_indices(indices, n, block)
    anatomy = Anatomy(model if inplace else shell(model))
    for block, indices, factor, shift in zip(
        anatomy.blocks, keep, scale or [None] * blocks, bias or [None] * blocks, strict=True
    ):
        cut(anatomy, block, indices, factor, shift)
    return describe(anatomy.model)


def _check_indices(indices: torch.Tensor, n: int, block: int) -> None:
    fits = indices.ndim == 1 and len(indices) and indices.dtype == torch.int64
    if not fits or int(indices[0]) < 0 or int(indices[-1]) >= n or not (indices.diff() > 0).all():
        raise ValueError(f"block {block} has units 0 to {n - 1}: keep at least one, as int64 indices in ascending order")


def cut_neurons(
    anatomy: Anatomy,
    block: nn.Module,
    keep: torch.Tensor | None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Keep some neurons of one block, in place. `describe` the model when all its blocks are done."""
    _cut(block, anatomy.family.mlp, [keep] * len(anatomy.family.mlp.readers), keep, scale, bias)


def cut_groups(
    anatomy: Anatomy,
    block: nn.Module,
    keep: torch.Tensor | None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Keep some key-value groups of one block, in place. `describe` the model when all its blocks are done."""
    query, key, _ = separate_readers(anatomy)
    size = head_size(anatomy.model.config)
    queries = block.get_submodule(query).out_features // block.get_submodule(key).out_features  # query heads per group
    heads = None if keep is None else channels(keep, size)
    wide = None if keep is None else channels(keep, queries * size)
    spread = None if scale is None else scale.repeat_interleave(queries * size)
    _cut(block, anatomy.family.attention, [wide, heads, heads], wide, spread, bias)
    attention = block.get_submodule(anatomy.family.attention_module)
    if hasattr(attention, "num_heads"):  # OPT shapes its heads by number, the others by size
        attention.num_heads = block.get_submodule(query).out_features // size


def channels(units: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of the channels of units that are `size` neighbouring channels each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _cut(block: nn.Module, half: Half, rows: list, columns: torch.Tensor | None, scale, bias) -> None:
    layers = [block.get_submodule(name) for name in (*half.readers, half.writer)]
    for name, layer in zip((*half.readers, half.writer), layers, strict=True):
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, not an ordinary linear layer: prune before other methods")
    for name, layer, keep in zip(half.readers, layers, rows, strict=False):
        if keep is not None:
            old = layer.bias
            block.set_submodule(name, linear(layer.weight[keep], None if old is None else old[keep], like=layer.weight))
    writer = layers[-1]
    if columns is None and scale is None and bias is None:
        return
    weight = writer.weight.detach() if columns is None else writer.weight.detach()[:, columns]
    if scale is not None:
        weight = weight.double() * scale.to(weight.device).double()
    if bias is not None:
        bias = bias.to(weight.device).double() + (0 if writer.bias is None else writer.bias.detach().double())
    block.set_submodule(half.writer, linear(weight, writer.bias if bias is None else bias, like=writer.weight))


def remove_blocks(model: nn.Module, drop: Sequence[int], *, inplace: bool = False) -> nn.Module:
    """A shallower model without the decoder blocks `drop`: a stock architecture, cache indices and config renumbered.

    Raises ValueError for blocks that do not exist or if none would be left, and for a model whose record of edits names
    blocks by number.
    """
    if edits := edits_by_number(model):
        raise ValueError(f"{', '.join(edits)} refers to blocks by number: remove blocks first, compress then")
    total, drop = len(Anatomy(model).blocks), set(drop)
    if not drop <= set(range(total)) or len(drop) == total:
        raise ValueError(f"cannot remove blocks {sorted(drop)} of {total}: name blocks from 0 to {total - 1}, and leave one")
    small = model if inplace else shell(model)
    anatomy, config = Anatomy(small), small.config
    kept = [i for i in range(total) if i not in drop]
    anatomy.put(anatomy.family.blocks, nn.ModuleList(anatomy.blocks[i] for i in kept))
    for i, block in enumerate(anatomy.blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i  # where attention keeps its keys and values in the cache
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    return describe(small)


def edits_by_number(model: nn.Module) -> list[str]:
    """Edits of a model whose records name blocks by number, so that no block can go any more."""
    return sorted({edit["edit"] for edit in getattr(model, "edits", [])} - {"structured"})


# --- sizes, counted on shapes --------------------------------------------------------------------------------------------


def in_order(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Scores by which the first units go, for counting: the count does not depend on which units go."""
    return [torch.arange(float(n)) for n in sizes]


def shape_without_neurons(model: nn.Module, ratio: float, settings: object = None) -> nn.Module:
    """A model on the meta device in which every block has lost a share of its neurons."""
    return remove_neurons(shape_shell(model), uniform(in_order(ffn_widths(model)), ratio), inplace=True)


# --- what a checkpoint needs ---------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> nn.Module:
    """Write the present shape of a model into its config and its record of edits; returns the model.

    Equal widths go into the config, as does an equal number of groups where the stock class can express it. The rest is an
    edit: neurons and groups of every block, and the writers with a bias that the stock class does not have.
    """
    anatomy, edit = Anatomy(model), {}
    widths = ffn_widths(model)
    if len(set(widths)) == 1:
        setattr(model.config, anatomy.family.neurons, widths[0])
    else:
        edit["neurons"] = widths
    if len(anatomy.family.attention.readers) == 3:
        edit |= _describe_groups(anatomy)
    if new := _new_biases(anatomy):
        edit["biases"] = new
    others = [other for other in getattr(model, "edits", []) if other["edit"] != "structured"]
    return set_edits(model, [*others, {"edit": "structured"} | edit] if edit else others)


def _describe_groups(anatomy: Anatomy) -> dict:
    model, groups = anatomy.model, kv_groups(anatomy.model)
    config, before = model.config, getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    if set(groups) == {before}:
        return {}
    by_size = not hasattr(anatomy.blocks[0].get_submodule(anatomy.family.attention_module), "num_heads")
    if len(set(groups)) == 1 and by_size:
        fewer, queries = copy.deepcopy(config), config.num_attention_heads // before
        fewer.head_dim = head_size(config)
        fewer.num_key_value_heads, fewer.num_attention_heads = groups[0], groups[0] * queries
        if refusal(fewer) is None:
            for name in ("head_dim", "num_key_value_heads", "num_attention_heads"):
                setattr(config, name, getattr(fewer, name))  # the blocks hold this configuration, too
            return {}
    return {"groups": groups}


def _writers(anatomy: Anatomy) -> list[str]:
    """Names of all writers, relative to the list of blocks."""
    return [f"{i}.{half.writer}" for i in range(len(anatomy.blocks)) for half in anatomy.halves]


def _new_biases(anatomy: Anatomy) -> list[str]:
    biased = [name for name in _writers(anatomy) if getattr(anatomy.blocks.get_submodule(name), "bias", None) is not None]
    if not biased:
        return []
    with torch.device("meta"):
        stock = Anatomy(type(anatomy.model)(anatomy.model.config)).blocks
    return [name for name in biased if stock.get_submodule(name).bias is None]


def replay(
    model: nn.Module, neurons: list[int] | None = None, groups: list[int] | None = None, biases: Sequence[str] = ()
) -> nn.Module:
    """Repeat an edit of `describe` on a model without values, in place."""
    anatomy = Anatomy(model)
    for name in biases:
        if name not in _writers(anatomy):
            raise ValueError(f"no matrix {name!r} of this model writes to the residual stream")
        layer = anatomy.blocks.get_submodule(name)
        anatomy.blocks.set_submodule(name, linear(layer.weight, layer.weight[:, 0], like=layer.weight))
    for cut, sizes, wanted in ((cut_neurons, ffn_widths, neurons), (cut_groups, kv_groups, groups)):
        if wanted is None:
            continue
        found = sizes(model)
        if len(wanted) != len(found) or not all(type(k) is int and 0 < k <= n for k, n in zip(wanted, found, strict=True)):
            raise ValueError(f"sizes {wanted} do not fit blocks of sizes {found}")
        for block, kept in zip(anatomy.blocks, wanted, strict=True):
            cut(anatomy, block, torch.arange(kept))
    return describe(model)
