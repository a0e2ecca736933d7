"""The latent KV cache: the logits and tokens of the ordinary cache, in the number of bytes that the formula gives."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

from lib.papers.latent_cache import LatentCache, full_bytes, latent_bytes, latent_cache
from lib.papers.svd_llm import compress_model
from lib.primitives.low_rank import merge_to_dense, replay, uniform_ranks
from lib.primitives.surgery import LowRankLinear, shell
from lib.suite.architectures import meta_model
from tests.conftest import LAYERS, relative, tiny, token_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "phi", "gemma3_text")
CHUNKS = {
    "token by token": [1] * 14,
    "prompt, then token by token": [9, 1, 1, 1, 1, 1],
    "chunked prefill": [5, 4, 4, 1],
    "one pass": [14],
}
pytestmark = pytest.mark.usefixtures("exact_norms")


def fresh(family, **settings):
    return compress_model(tiny(family, **settings), token_ids(), 0.4)


small = functools.cache(fresh)  # for tests that do not change the model


def ordinary_cache(model):
    return DynamicCache(config=model.config)


@torch.no_grad()
def run(model, ids, chunks, cache, **kwargs):
    """Logits [batch, tokens, vocabulary] of a text that is read in chunks; tensors in kwargs are cut like the text."""
    start, found = 0, []
    for size in chunks:
        cut = {name: value[:, start : start + size] for name, value in kwargs.items() if name == "position_ids"}
        if "attention_mask" in kwargs:
            cut["attention_mask"] = kwargs["attention_mask"][:, : start + size]
        found.append(model(ids[:, start : start + size], past_key_values=cache, **cut).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)


def tensors(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def left_padded(length=14, padding=(0, 3, 6)):
    """(ids, mask, position ids) of rows with unequal numbers of padding tokens in front."""
    ids = token_ids(len(padding), length, seed=5)
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)


# --- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_ordinary_cache_and_of_no_cache(family, chunks):
    model, ids = small(family), token_ids(3, 14, seed=5)
    ours = run(model, ids, CHUNKS[chunks], latent_cache(model))
    assert relative(ours, run(model, ids, CHUNKS[chunks], ordinary_cache(model))) < 1e-10
    with torch.no_grad():
        assert relative(ours, model(ids, use_cache=False).logits) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_left_padding(family):
    """Rows at different positions; against the ordinary cache, and against each row alone without its padding."""
    model, (ids, mask, positions) = small(family), left_padded()
    inputs = dict(attention_mask=mask, position_ids=positions)
    for chunks in ([14], [8, 3, 1, 1, 1]):
        ours = run(model, ids, chunks, latent_cache(model), **inputs)
        ordinary = run(model, ids, chunks, ordinary_cache(model), **inputs)
        assert relative(ours[mask.bool()], ordinary[mask.bool()]) < 1e-10
        for row, first in enumerate((0, 3, 6)):
            alone = run(model, ids[row : row + 1, first:], [14 - first], None)
            assert relative(ours[row : row + 1, first:], alone) < 1e-10


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_positions_are_stored_and_not_guessed(family):
    """Gaps and repeats in the position ids, which counting tokens would miss."""
    model, ids = small(family), token_ids(2, 8, seed=5)
    positions = torch.tensor([[0, 1, 5, 6, 7, 20, 21, 40], [3, 3, 4, 9, 10, 11, 12, 50]])
    ours = run(model, ids, [4, 2, 1, 1], latent_cache(model), position_ids=positions)
    assert relative(ours, run(model, ids, [4, 2, 1, 1], ordinary_cache(model), position_ids=positions)) < 1e-10
    assert relative(ours, run(model, ids, [4, 2, 1, 1], latent_cache(model))) > 1e-3  # they matter


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_gives_the_same_tokens_and_can_be_continued(family):
    model, (ids, mask, _) = small(family), left_padded()
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    ours, ordinary = latent_cache(model), ordinary_cache(model)
    first = model.generate(ids, attention_mask=mask, past_key_values=ours, **settings)
    assert torch.equal(first, model.generate(ids, attention_mask=mask, past_key_values=ordinary, **settings))
    assert torch.equal(first, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    turn = torch.cat([first, token_ids(3, 4, seed=6)], dim=1)  # a second turn of the conversation
    mask = torch.cat([mask, torch.ones(3, 12, dtype=torch.long)], dim=1)
    second = model.generate(turn, attention_mask=mask, past_key_values=ours, **settings)
    assert torch.equal(second, model.generate(turn, attention_mask=mask, past_key_values=ordinary, **settings))
    assert len(second[0]) == 14 + 8 + 4 + 8
    assert isinstance(ours, LatentCache)
    assert ours.get_seq_length() == ordinary.get_seq_length() == len(second[0]) - 1


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_beam_search_reorders_the_cache(family):
    model, (ids, mask, _) = small(family), left_padded()
    settings = dict(attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False)
    ours = model.generate(ids, past_key_values=latent_cache(model), **settings)
    assert torch.equal(ours, model.generate(ids, past_key_values=ordinary_cache(model), **settings))


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_cache_can_be_cropped_copied_and_repeated(family):
    model, ids, rest = small(family), token_ids(2, 10, seed=5), token_ids(4, 3, seed=6)
    caches = latent_cache(model), ordinary_cache(model)
    for cache in caches:
        run(model, ids, [10], cache)
        cache.crop(-4)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 2, 2]))
    fork = copy.deepcopy(caches[0])
    assert fork.nbytes == caches[0].nbytes == latent_bytes(model, 4, 6)
    expected = run(model, rest, [2, 1], caches[1])
    assert relative(run(model, rest, [2, 1], caches[0]), expected) < 1e-10
    assert relative(run(model, rest, [1, 2], fork), expected) < 1e-10
    caches[0].reset()
    assert (caches[0].nbytes, caches[0].get_seq_length()) == (0, 0)
    assert relative(run(model, ids, [7, 3], caches[0]), run(model, ids, [10], None)) < 1e-10


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_slide_over_latents(family):
    """A window of 8 and 30 tokens: sliding layers hold 7 latents, full ones all of them."""
    model, ids, chunks = small(family, sliding_window=8), token_ids(2, 30, seed=5), [12, 1, 1, 5, 1, 9, 1]
    ours, ordinary = latent_cache(model), ordinary_cache(model)
    expected = run(model, ids, chunks, ordinary)
    assert relative(run(model, ids, chunks, ours), expected) < 1e-10
    assert relative(run(model, ids, [30], None), expected) < 1e-10
    assert {layer.keys.shape[-2] for layer in ours.layers[:LAYERS]} == ({7} if family == "mistral" else {7, 30})
    assert ours.nbytes == latent_bytes(model, 2, 30)
    assert sum(tensor.nbytes for tensor in tensors(ordinary)) == full_bytes(model, 2, 30)


def with_rope(**rope):
    return fresh("llama", rope_parameters=dict(rope_theta=10000.0) | rope)


LONG = dict(rope_type="longrope", factor=1.0, attention_factor=1.0, original_max_position_embeddings=8)
FIXED = {"short_factor": [1.0, 1.0, 2.0, 3.0, 8.0, 8.0], "long_factor": [1.0, 1.0, 2.0, 3.0, 8.0, 8.0]}


@pytest.mark.parametrize("rope", [dict(rope_type="linear", factor=2.0), dict(rope_type="yarn", factor=2.0), LONG | FIXED])
def test_scaled_rotations(rope):
    model, ids = with_rope(**rope), token_ids(2, 14, seed=5)
    expected = run(model, ids, [14], None)
    assert relative(run(model, ids, [5, 1, 8], latent_cache(model)), expected) < 1e-10
    assert relative(run(small("llama"), ids, [14], None), expected) > 1e-3  # the rotation is another one


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision_differs_by_rounding_only(dtype, tolerance):
    model, ids = copy.deepcopy(small("llama")).to(dtype), token_ids(2, 14, seed=5)
    cache = latent_cache(model)
    ours = run(model, ids, [5, 1, 7, 1], cache)
    assert ours.dtype == dtype
    assert relative(ours.double(), run(model, ids, [5, 1, 7, 1], ordinary_cache(model)).double()) < tolerance
    assert cache.nbytes == latent_bytes(model, 2, 14)


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_formula(family):
    """2 k numbers for each layer, row and token, counted in storage, and 4 bytes for each position where keys are rotated."""
    model, ids = small(family), token_ids(3, 7, seed=5)
    cache, ordinary = latent_cache(model), ordinary_cache(model)
    assert cache.nbytes == 0
    run(model, ids, [4, 1, 2], cache)
    run(model, ids, [4, 1, 2], ordinary)
    k = {module.rank for name, module in model.named_modules() if name.endswith(("k_proj", "v_proj"))}
    assert len(k) == 1
    latents = 2 * k.pop() * LAYERS * 7 * 3 * 8
    positions = 0 if family == "opt" else 4 * 7 * 3
    assert cache.nbytes == latent_bytes(model, 3, 7) == latents + positions
    assert sum(tensor.nbytes for tensor in tensors(ordinary)) == full_bytes(model, 3, 7) == full_bytes(tiny(family), 3, 7)
    assert latent_bytes(model, 3, 7) < full_bytes(model, 3, 7)
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or []):  # slices keep what they are cut from
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors(cache)) == cache.nbytes


@pytest.mark.parametrize(("ratio", "saved"), [(0.2, 2.4), (0.4, 2.8), (0.6, 3.2), (0.8, 3.6)])
def test_savings_of_figure_4(ratio, saved):
    """LLaMA-7B in half precision, batch 32, 128 tokens of prompt and 128 generated: the GiB that the figure prints."""
    model = meta_model("Llama-2-7B").half()
    replay(model, uniform_ranks(model, ratio))
    assert full_bytes(model, 32, 256) == 4 * 2**30
    assert (full_bytes(model, 32, 256) - latent_bytes(model, 32, 256)) / 2**30 == pytest.approx(saved, abs=2e-3)


def test_grouped_queries_save_less():
    """Keys of 1,024 numbers from 4,096 inputs: 0.64 of the cache stays at R = 0.2, not the 0.40 of a square matrix."""
    model = meta_model("Llama-3-8B").half()
    replay(model, uniform_ranks(model, 0.2))
    numbers = latent_bytes(model, 1, 1) - 4
    assert numbers / full_bytes(model, 1, 1) == 655 / 1024


def test_dense_projections_among_factored_ones():
    """Unequal ranks may leave a matrix dense: its outputs are stored, keys before their rotation."""
    model, ids = shell(small("qwen3")), token_ids(3, 9, seed=5)
    merged = merge_to_dense(model)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        model.set_submodule(name, merged.get_submodule(name))
    cache = latent_cache(model)
    assert relative(run(model, ids, [4, 1, 4], cache), run(merged, ids, [9], None)) < 1e-10
    projection = model.get_submodule("model.layers.2.self_attn.k_proj")
    numbers = 4 * projection.rank + 2 * projection.out_features
    assert cache.nbytes == latent_bytes(model, 3, 9) == numbers * 9 * 3 * 8 + 4 * 9 * 3


# --- manners -----------------------------------------------------------------------------------------------------------


def test_a_run_with_another_cache_leaves_nothing_behind():
    model, ids = shell(small("llama")), token_ids(2, 6, seed=5)
    first, second = latent_cache(model), latent_cache(model)
    assert all(len(block.self_attn._forward_pre_hooks) == 1 for block in model.model.layers)
    other = token_ids(2, 6, seed=7)
    found = [run(model, ids[:, :4], [4], first), run(model, other[:, :4], [4], second)]
    run(model, ids, [6], ordinary_cache(model))
    found += [run(model, ids[:, 4:], [2], first), run(model, other[:, 4:], [2], second)]
    assert relative(torch.cat(found[::2], 1), run(model, ids, [6], None)) < 1e-10
    assert relative(torch.cat(found[1::2], 1), run(model, other, [6], None)) < 1e-10
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert not any(factor._forward_hooks for layer in layers for factor in (layer.v, layer.u))
    assert first.arrival is None


def test_models_that_have_no_latents():
    with pytest.raises(ValueError, match="compress it first"):
        latent_cache(tiny("llama"))
    with pytest.raises(ValueError, match="compress it first"):
        latent_bytes(tiny("opt"), 1, 1)
    with pytest.raises(ValueError, match="one matrix"):
        latent_cache(small("gpt_neox"))
    with pytest.raises(ValueError, match="one matrix"):
        full_bytes(tiny("gpt_neox"), 1, 1)


def test_rotations_that_change_with_the_text_are_refused():
    with pytest.raises(ValueError, match="ordinary cache"):
        latent_cache(with_rope(rope_type="dynamic", factor=2.0))
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with pytest.raises(ValueError, match="ordinary cache"):
        latent_cache(with_rope(**LONG | {"short_factor": factors, "long_factor": factors[::-1]}))


def test_a_cache_of_another_model_is_refused():
    dense, ids = tiny("llama"), token_ids(1, 4)
    with pytest.raises(ValueError, match="the very model"):
        run(dense, ids, [4], latent_cache(small("llama")))
