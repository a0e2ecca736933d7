"""Edits that change shapes: new linear layers and tables cut from old ones, and copies of a model that share its tensors."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn


def shell(model: nn.Module) -> nn.Module:
    """A copy of a model's structure that shares every tensor with the original.

    Methods replace what they change by new modules, so the dense model stays intact and nothing is stored twice. Do
    not write into the tensors of a shell: untouched ones are the original's.
    """
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, in place, as transformers would load it.

    Buffers that are computed rather than saved keep their precision: rotary frequencies in bfloat16 would shift the positions.
    """
    saved = set(model.state_dict())
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in computed.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer)
    return model


def shape_shell(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device: shapes, ties and dtypes without a single value."""

    def empty(tensor):
        bare = torch.empty_like(tensor, device="meta")
        return nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare

    return copy.deepcopy(model, {id(t): empty(t) for t in [*model.parameters(), *model.buffers()]})


def refusal(config) -> str | None:
    """Why the class of a configuration would not read it back, or None; some demand that their heads divide the width."""
    try:
        type(config).from_dict(json.loads(config.to_json_string()))
    except Exception as error:  # the library checks numbers in several ways, with errors of several types
        return " ".join(str(error).split())
    return None


def linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    """A linear layer [out, in] that holds `weight` and `bias`, cast once to the dtype and device of `like`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = parameter(weight, like)
    if bias is not None:
        layer.bias = parameter(bias, like)
    return layer


class LowRankLinear(nn.Module):
    """A linear layer in two factors, y = u(v(x)): `v` maps n inputs to k latents, `u` maps them to m outputs with the bias.

    Both are ordinary linear layers, so adapters can be put on either.
    """

    def __init__(self, v: nn.Linear, u: nn.Linear):
        super().__init__()
        self.v, self.u = v, u

    @property
    def rank(self) -> int:
        return self.v.out_features

    @property
    def in_features(self) -> int:
        return self.v.in_features

    @property
    def out_features(self) -> int:
        return self.u.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.u(self.v(x))


def low_rank(layer: nn.Linear, u: torch.Tensor, v: torch.Tensor) -> LowRankLinear:
    """The two-factor layer with weight u v, u [m, k] and v [k, n], and the bias, dtype and device of `layer`."""
    return LowRankLinear(v=linear(v, None, like=layer.weight), u=linear(u, layer.bias, like=layer.weight))


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
    """Note on the model what was done to it, in JSON values, so that `lib.models.checkpoint` can repeat it on shapes.

    transformers' own `save_pretrained` would write a folder that reloads with random weights, so from now on it raises.
    """
    set_edits(model, [*getattr(model, "edits", []), edit])


def set_edits(model: nn.Module, edits: list[dict]) -> nn.Module:
    """Make `edits` the whole record of a model and return it; without edits it is a stock model again."""
    if edits:
        model.edits, model.save_pretrained = edits, _refuse_to_save
    else:
        for name in ("edits", "save_pretrained"):
            vars(model).pop(name, None)
    return model


def _refuse_to_save(*args, **kwargs):
    raise NotImplementedError(
        "a compressed model is not a stock architecture, and save_pretrained would write a folder that reloads with random "
        "weights: use lib.models.checkpoint.save, and load the folder with lib.models.load"
    )


def untie_head(model: nn.Module) -> None:
    """Declare that head and embedding are different matrices from now on, so that no library ties them again."""
    model.config.tie_word_embeddings = False
