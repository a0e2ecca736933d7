"""SliceGPT's algorithm as it was published, written down literally, to test and time this library against.

This is SliceGPT's Algorithm 1 as section 3 and the appendix of the paper state it, for Llama blocks: norms are folded
into a copy of the model, every weight is rotated in place, each layer runs once to find the basis before its MLP and
a second time, half sliced, to find the one behind it, and all inputs and outputs of a layer are kept. Written from the
description for this repository; the authors' code is not used.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import enter


class Divisor(nn.Module):
    """RMS norm without gain that divides by the original width."""

    def __init__(self, d: int, epsilon: float):
        super().__init__()
        self.d, self.epsilon = d, epsilon

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide / (wide.square().sum(-1, keepdim=True) / self.d + self.epsilon).sqrt()).to(x.dtype)


def pca(batches: list[torch.Tensor]) -> torch.Tensor:
    """Eigenvectors by decreasing eigenvalue of the float64 covariance, damped by 1 % as published."""
    d = batches[0].shape[-1]
    h = torch.zeros(d, d, dtype=torch.float64)
    for x in batches:
        x = x.double().flatten(0, 1)
        h += x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    return torch.linalg.eigh(h)[1].flip(1)


def layer_forward(layer, x, kwargs, attention_shortcut, mlp_shortcut):
    """One Llama layer with shortcuts on both residual paths; also returns the signal before the MLP norm."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
    middle = x @ attention_shortcut + attended
    return middle @ mlp_shortcut + layer.mlp(layer.post_attention_layernorm(middle)), middle


class LiteralSliceGPT:
    """Slices a copy of a Llama model to width k; call it with ids to get logits."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, k: int, batch: int = 8):
        self.model = model = copy.deepcopy(model)
        base, d = model.model, model.config.hidden_size
        self.dtype = base.embed_tokens.weight.dtype
        fold(model)
        self.anatomy = Anatomy(model)
        batches = list(ids.split(batch))
        with torch.no_grad():
            hidden = [enter(self.anatomy, b)[0] for b in batches]
            kwargs = [enter(self.anatomy, b)[1] for b in batches]
            q = pca(hidden)
            base.embed_tokens.weight.data = (base.embed_tokens.weight.double() @ q[:, :k]).to(self.dtype)
            self.shortcuts = []
            eye = torch.eye(d, dtype=self.dtype)
            for i, layer in enumerate(base.layers):
                a = q[:, :k]
                rotate_readers([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], a)
                inputs = [x @ a.to(self.dtype) for x in hidden]
                back = a.T.to(self.dtype)
                # First evaluation: everything behind attention is still of full width, and its result is thrown away.
                first = [layer_forward(layer, x, kw[i], back, eye) for x, kw in zip(inputs, kwargs, strict=True)]
                middle = pca([m for _, m in first])[:, :k]
                rotate_writer(layer.self_attn.o_proj, middle)
                rotate_readers([layer.mlp.gate_proj, layer.mlp.up_proj], middle)
                across, behind = (a.T @ middle).to(self.dtype), middle.T.to(self.dtype)
                # Second evaluation: sliced up to the MLP.
                hidden = [layer_forward(layer, x, kw[i], across, behind)[0] for x, kw in zip(inputs, kwargs, strict=True)]
                q = pca(hidden)
                width = d if i + 1 == len(base.layers) else k
                rotate_writer(layer.mlp.down_proj, q[:, :width])
                self.shortcuts.append((across, (middle.T @ q[:, :width]).to(self.dtype)))
            rotate_readers([model.lm_head], q)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        x, kwargs = enter(self.anatomy, ids)
        for layer, kw, (across, behind) in zip(self.model.model.layers, kwargs, self.shortcuts, strict=True):
            x, _ = layer_forward(layer, x, kw, across, behind)
        return self.model.lm_head(self.model.model.norm(x))


def fold(model: nn.Module) -> None:
    """Fold every gain into the linear layers behind it, in float64, and put gain-free norms in place."""
    d = model.config.hidden_size
    untied = nn.Linear(d, model.config.vocab_size, bias=False)
    untied.weight.data = model.lm_head.weight.data.clone()
    model.lm_head = untied

    def into(norm, layers):
        for layer in layers:
            layer.weight.data = (layer.weight.double() * norm.weight.double()).to(layer.weight.dtype)
        return Divisor(d, norm.variance_epsilon)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.input_layernorm = into(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        layer.post_attention_layernorm = into(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    model.model.norm = into(model.model.norm, [model.lm_head])


def rotate_readers(layers: list[nn.Linear], q: torch.Tensor) -> None:
    for layer in layers:
        layer.weight.data = (layer.weight.double() @ q).to(layer.weight.dtype)


def rotate_writer(layer: nn.Linear, q: torch.Tensor) -> None:
    layer.weight.data = (q.T @ layer.weight.double()).to(layer.weight.dtype)
