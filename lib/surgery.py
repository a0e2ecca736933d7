"""Edits that change shapes: new linear layers and tables cut from old ones, and shells to build a smaller model in."""

from __future__ import annotations

import copy

import torch
from torch import nn


def shell(model: nn.Module) -> nn.Module:
    """A copy of a model's structure that shares every tensor with the original.

    Methods replace what they change by new modules, so the dense model stays intact and nothing is stored twice. Do
    not write into the tensors of a shell: untouched ones are the original's.
    """
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def shape_shell(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device: shapes, ties and dtypes without a single value."""

    def empty(tensor):
        bare = torch.empty_like(tensor, device="meta")
        return nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare

    return copy.deepcopy(model, {id(t): empty(t) for t in [*model.parameters(), *model.buffers()]})


def linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    """A linear layer [out, in] that holds `weight` and `bias`, cast once to the dtype and device of `like`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = parameter(weight, like)
    if bias is not None:
        layer.bias = parameter(bias, like)
    return layer


def embedding(table: nn.Embedding, weight: torch.Tensor) -> nn.Embedding:
    """The embedding module `table` (its class, padding index and position offset) with another weight [rows, k]."""
    new = copy.deepcopy(table, {id(table.weight): table.weight})
    new.weight = parameter(weight, table.weight)
    new.embedding_dim = weight.shape[1]
    return new


def parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """`value` as a parameter in the dtype and on the device of `like`, in memory of its own."""
    value = value.detach().to(device=like.device, dtype=like.dtype)
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format))


def record_edit(model: nn.Module, **edit) -> None:
    """Note on the model what was done to it, in JSON values, so that `lib.checkpoint` can repeat it on shapes.

    transformers' own `save_pretrained` would write a folder that reloads with random weights: it refuses from now on.
    """
    model.edits = [*getattr(model, "edits", []), edit]
    model.save_pretrained = _refuse_to_save


def _refuse_to_save(*args, **kwargs):
    raise NotImplementedError(
        "a compressed model is not a stock architecture, and save_pretrained would write a folder that reloads with random "
        "weights: use lib.checkpoint.save, and load the folder with lib.models.load"
    )


def untie_head(model: nn.Module) -> None:
    """Declare that head and embedding are different matrices from now on, so that no library ties them again."""
    model.config.tie_word_embeddings = False
