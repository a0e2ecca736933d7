"""The latent KV cache of SVD-LLM: keep the k numbers between the two factors instead of a key or a value of m numbers.

Where `k_proj` and `v_proj` are products u v, a key is u(c) with the latent c = v(x), and so is a value. The cache stores c;
whenever attention reads the past, keys and values are expanded again. Nothing is approximated: the logits are those of the
compressed model with an ordinary cache, up to rounding (SVD-LLM, section 4.2).

Keys are stored before their rotation, so the position of every token is stored too: 4 bytes, once for all layers. The
rotation, the norm of keys and the window of sliding layers are the model's own modules and transformers' own cache layers.

What it saves: a cache of 2 m numbers per token and layer becomes one of 2 k. At ratio R the share k/m is (1 - R) n / (m + n):
half of 1 - R where the matrix is square, and nearly all of it under grouped-query attention, where m is small: 655 of 1,024
numbers stay at R = 0.2 for n = 4,096. A rank that saves parameters is below m n / (m + n) < m, so it saves cache as well;
factors of rank m or more, made elsewhere, would make the cache larger.

What it costs: c k m multiply-adds per factor, layer and forward pass of each row for c tokens in the cache, against k (n + m)
for each new token, so decoding is slower, and more so in long contexts: one CPU thread, six layers of width 512 in float32,
R = 0.4 and batch 4 took 1.9, 3.4 and 6.0 times as long per token at 64, 256 and 1,024 tokens as with the ordinary cache. A
prompt that is read at once costs nothing extra. While a layer runs, its keys and values exist in full, so peak memory falls
only by the savings of the other layers.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.primitives.anatomy import Anatomy, has_fixed_rotation
from lib.primitives.surgery import LowRankLinear

POSITION_BYTES = 4  # int32


def latent_cache(model: nn.Module) -> LatentCache:
    """An empty latent cache for a model with factored keys or values: pass it as `past_key_values` to the model or `generate`.

    A dense projection, as unequal ranks may leave it, is stored as its m outputs. The attention modules get a hook that
    does nothing while another cache is in use. Raises ValueError for models without factored keys or values, with queries,
    keys and values in one matrix (GPT-NeoX), or whose rotation depends on the length of the text (dynamic or long RoPE).
    """
    anatomy = Anatomy(model)
    for attention in _factored_attentions(anatomy):
        if _introduce not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_introduce, with_kwargs=True)
    return LatentCache(model.config, _rotary(anatomy))


def latent_bytes(model: nn.Module, batch: int, tokens: int) -> int:
    """Size of a latent cache by formula: r_k + r_v numbers per layer and token of each row, and one int32 position.

    Sliding layers hold window - 1 tokens at most. Counted on shapes, so a meta model suffices. Raises ValueError as
    `latent_cache` does.
    """
    anatomy = Anatomy(model)
    numbers = [_stored(attention.k_proj) + _stored(attention.v_proj) for attention in _factored_attentions(anatomy)]
    positions = POSITION_BYTES * batch * tokens if _rotary(anatomy) is not None else 0
    return _bytes(model, numbers, batch, tokens) + positions


def full_bytes(model: nn.Module, batch: int, tokens: int) -> int:
    """Size of the ordinary cache of a model, dense or factored, by formula: m_k + m_v numbers per layer and token of each row.

    Raises ValueError for models with queries, keys and values in one matrix.
    """
    attentions = _attentions(Anatomy(model))
    return _bytes(model, [a.k_proj.out_features + a.v_proj.out_features for a in attentions], batch, tokens)


def _bytes(model: nn.Module, numbers: list[int], batch: int, tokens: int) -> int:
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    held = [tokens if window is None else min(tokens, window - 1) for window in windows]
    return model.dtype.itemsize * batch * sum(n * t for n, t in zip(numbers, held, strict=True))


# --- the cache ---------------------------------------------------------------------------------------------------------


class _Arrival(NamedTuple):
    """What the cache receives before an attention module runs; the projections fill in the latents [batch, tokens, k]."""

    attention: nn.Module
    positions: torch.Tensor | None  # [batch or 1, tokens]
    key_latents: list[torch.Tensor]
    value_latents: list[torch.Tensor]


class LatentCache(DynamicCache):
    """transformers' growing cache with latents [batch, 1, tokens, k] in the place of keys and values.

    Growing, windows, cropping and beam search are inherited. Positions are one more layer behind the model's own, so that all of
    these apply to them too. The cache holds no weights, so copying it copies only its tensors.
    """

    def __init__(self, config, rotary: nn.Module | None):
        super().__init__(config=config)
        self.rotary = rotary
        self.arrival: _Arrival | None = None
        if rotary is not None:
            self.layers.append(DynamicLayer())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the cache, positions included."""
        tensors = (tensor for layer in self.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the latents of the new tokens; return keys and values [batch, heads, tokens, head size] of all tokens.

        Those of the new tokens are the arguments, already rotated, and are returned unchanged. Raises ValueError if the cache was
        made for another model.
        """
        arrival, self.arrival = self.arrival, None
        if arrival is None:
            raise ValueError("no latents arrived: make the cache with latent_cache(model) for the very model that uses it")
        # 1. Store the latents, and once for all layers the positions.
        attention, new = arrival.attention, key_states.shape[-2]
        latents = super().update(arrival.key_latents.pop()[:, None], arrival.value_latents.pop()[:, None], layer_idx)
        if self.rotary is not None and layer_idx == 0:
            self._store_positions(arrival.positions.expand(len(key_states), -1))
        # 2. Expand those of the past to keys and values.
        past_keys, past_values = (stored[:, 0, :-new] for stored in latents)
        keys = self._rotated(attention, _keys(attention, past_keys), new)
        values = _heads(attention, attention.v_proj, past_values).transpose(1, 2)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def _store_positions(self, positions: torch.Tensor) -> None:
        positions = positions.to(torch.int32)[:, None, :, None]
        self.layers[-1].update(positions, positions[..., :0])

    def _rotated(self, attention: nn.Module, keys: torch.Tensor, new: int) -> torch.Tensor:
        """Keys [batch, heads, tokens, head size] of the past, rotated to their positions; `new` tokens came after them."""
        if self.rotary is None or keys.shape[-2] == 0:  # long RoPE cannot turn no positions
            return keys
        positions = self.layers[-1].keys[:, 0, -(keys.shape[-2] + new) : -new, 0]
        per_type = (attention.layer_type,) if isinstance(self.rotary.rope_type, dict) else ()  # Gemma 3 has two rotations
        cos, sin = self.rotary(keys, positions, *per_type)
        size = cos.shape[-1]  # Phi rotates only the first channels of a head
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # the family's own
        _, turned = rotate(keys[:, :0, :, :size], keys[..., :size], cos, sin)  # no queries
        return torch.cat([turned, keys[..., size:]], dim=-1)


def _introduce(attention: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hook before attention: give a latent cache the module that runs and its positions, and collect the projections' latents.

    The latents are caught by hooks that work once, so nothing is left over from a run with another cache.
    """
    # Found by its kind: the argument is called past_key_values up to transformers 5.23, and cache from 5.24 on.
    cache = next((value for value in kwargs.values() if isinstance(value, LatentCache)), None)
    if cache is not None:
        cache.arrival = _Arrival(attention, kwargs.get("position_ids"), [], [])
        _catch_output(_inner(attention.k_proj), cache.arrival.key_latents)
        _catch_output(_inner(attention.v_proj), cache.arrival.value_latents)


def _catch_output(layer: nn.Module, inbox: list[torch.Tensor]) -> None:
    def catch(module, inputs, output):
        handle.remove()
        inbox.append(output)

    handle = layer.register_forward_hook(catch)


# --- from latents to keys and values -----------------------------------------------------------------------------------


def _inner(projection: nn.Module) -> nn.Module:
    """The layer whose output is stored: the right factor, or a dense projection itself."""
    return projection.v if isinstance(projection, LowRankLinear) else projection


def _stored(projection: nn.Module) -> int:
    """Numbers per token that are stored for a projection."""
    return _inner(projection).out_features


def _heads(attention: nn.Module, projection: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Outputs [batch, tokens, heads, head size] of a projection from its latents [batch, tokens, k]; u carries the bias."""
    outputs = projection.u(latents) if isinstance(projection, LowRankLinear) else latents
    return outputs.unflatten(-1, (-1, attention.head_dim))


def _keys(attention: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Keys [batch, heads, tokens, head size] before rotation from their latents; Qwen 3 and Gemma 3 normalise each head."""
    keys = _heads(attention, attention.k_proj, latents)
    norm = getattr(attention, "k_norm", None)
    return (keys if norm is None else norm(keys)).transpose(1, 2)


# --- what is supported -------------------------------------------------------------------------------------------------


def _attentions(anatomy: Anatomy) -> list[nn.Module]:
    """The attention modules in order. Raises ValueError where they have no projection for keys alone."""
    name = anatomy.family.attention_module
    if f"{name}.k_proj" not in anatomy.family.attention.readers:
        raise ValueError(
            f"{anatomy.model.config.model_type} models compute queries, keys and values in one matrix, so keys have no latents "
            "of their own: use the ordinary cache"
        )
    return [block.get_submodule(name) for block in anatomy.blocks]


def _factored_attentions(anatomy: Anatomy) -> list[nn.Module]:
    """The attention modules in order. Raises ValueError where no key or value is factored."""
    attentions = _attentions(anatomy)
    if not any(isinstance(projection, LowRankLinear) for a in attentions for projection in (a.k_proj, a.v_proj)):
        raise ValueError(
            "no k_proj or v_proj of this model is factored, so there are no latents to keep: compress it first, for example with "
            "lib.papers.svd_llm.compress_model, or use the ordinary cache"
        )
    return attentions


def _rotary(anatomy: Anatomy) -> nn.Module | None:
    """The module that turns positions into rotations, None where there is none (OPT). Raises ValueError for one with a state."""
    decoder, _, _ = anatomy.family.blocks.rpartition(".")
    rotary = getattr(anatomy.get(decoder), "rotary_emb", None)
    if rotary is not None and not has_fixed_rotation(anatomy.model.config):
        raise ValueError(
            f"rotations of type {rotary.rope_type!r} change with the length of the text: the ordinary cache keeps old keys as "
            "they were rotated, while a latent cache would rotate them anew. Use the ordinary cache"
        )
    return rotary
