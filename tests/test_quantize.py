"""Round-to-nearest and GPTQ: equal to slow literal versions, few levels, less error than plain rounding, honest sizes."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lib.models.checkpoint import export, load_checkpoint, save
from lib.papers.slicegpt import slice_model
from lib.papers.svd_llm import compress_model
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count
from lib.primitives.quantize import gptq, gptq_matrix, quantize_rtn, quantized_bytes, round_to_nearest
from lib.primitives.surgery import LowRankLinear
from lib.suite.architectures import meta_model
from tests.conftest import CONFIGS, relative, tiny, token_ids
from tests.test_baselines import block_linears, damped, inputs_in_the_model, literal_rebuild, output_error, problem

pytestmark = pytest.mark.usefixtures("exact_norms")


def slow_levels(weights, bits):
    """All levels of one group of numbers, from its own extremes and zero; the scale as float16 stores it."""
    low, high = min(0.0, *weights), max(0.0, *weights)
    scale = float(np.float16((high - low) / (2**bits - 1)))
    zero = round(-low / scale)
    return [scale * (q - zero) for q in range(2**bits)]


def nearest(value, levels):
    return min(levels, key=lambda level: abs(level - value))


def slow_gptq(weight, gram, bits, group, damping=0.01):
    """Row by row and column by column, each step with its own inverse of what is left of H."""
    h, out = damped(gram, damping), weight.clone()
    out[:, gram.diagonal() == 0] = 0
    columns = weight.shape[1]
    for row in out:
        for i in range(columns):
            if i % group == 0:
                levels = slow_levels(row[i : i + group].tolist(), bits)
            inverse = torch.linalg.inv(h[i:, i:])
            q = nearest(row[i].item(), levels)
            row[i:] -= (row[i] - q) / inverse[0, 0] * inverse[0]
            row[i] = q
    return out


# --- matrices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 1, 5, 8, 24, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_takes_the_nearest_level_of_the_group(bits, group):
    weight, _ = problem()
    expected = weight.clone()
    for row in expected:
        for part in row.split(group or 24):
            levels = slow_levels(part.tolist(), bits)
            part.copy_(torch.tensor([nearest(w, levels) for w in part.tolist()], dtype=torch.float64))
    assert relative(quantize_rtn(weight, bits, group), expected) < 1e-12


@pytest.mark.parametrize("group", [None, 3, 8, 10, 100])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_slow_optimal_brain_surgeon(bits, group):
    weight, x = problem()
    ours = gptq_matrix(weight, x.T @ x, bits, group)
    assert relative(ours, slow_gptq(weight, x.T @ x, bits, group or 24)) < 1e-8


@pytest.mark.parametrize("group", [None, 8, 50, 192])
def test_block_size_only_changes_the_speed(group):
    weight, x = problem(columns=264)
    results = [gptq_matrix(weight, x.T @ x, 4, group, block=block) for block in (1, 10, 64, 128, 1000)]
    for other in results[1:]:
        assert relative(other, results[0]) < 1e-10


@pytest.mark.parametrize("group", [None, 8])
def test_uncorrelated_inputs_leave_nothing_to_repair(group):
    weight, x = problem()
    gram = torch.diag(x.square().sum(0))
    assert torch.equal(gptq_matrix(weight, gram, 4, group), quantize_rtn(weight, 4, group))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 8, 10])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_levels_in_every_group(bits, group, dtype):
    weight, x = problem(columns=240)
    weight = weight.to(dtype)
    for new in (quantize_rtn(weight, bits, group), gptq_matrix(weight, x.T @ x, bits, group)):
        assert new.dtype == dtype
        for row in new:
            for part in row.split(group or 240):
                assert len(part.unique()) <= 2**bits
    rows_use_them = [len(row.unique()) for row in quantize_rtn(weight, bits)]
    assert max(rows_use_them) > 2**bits - 2


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_on_correlated_inputs(bits, group):
    ratios = []
    for seed in range(5):
        weight, x = problem(rows=32, seed=seed)
        errors = [
            output_error(weight, new, x) for new in (gptq_matrix(weight, x.T @ x, bits, group), quantize_rtn(weight, bits, group))
        ]
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 1
    assert sum(ratios) / 5 < 0.8


def test_smaller_groups_are_finer_and_more_bits_too():
    weight, x = problem(rows=32, columns=64)
    for new in (quantize_rtn, lambda w, b, g: gptq_matrix(w, x.T @ x, b, g)):
        by_group = [output_error(weight, new(weight, 4, group), x) for group in (8, 32, None)]
        by_bits = [output_error(weight, new(weight, bits, 16), x) for bits in (8, 4, 3, 2)]
        assert by_group == sorted(by_group)
        assert by_bits == sorted(by_bits)


def test_zero_is_a_level():
    """Pruned weights stay pruned, also in rows of one sign and in rows without any weight."""
    weight = torch.tensor([[0.0, 1.0, 2.5, 4.0], [0.0, -1.0, -2.5, -4.0], [0.0, 0.0, 0.0, 0.0], [3e-9, -1e-9, 0.0, 0.0]])
    new = quantize_rtn(weight, 4)
    assert not new[:, 0].any()
    assert not new[2].any()
    assert relative(new[:2], weight[:2]) < 0.05
    assert torch.isfinite(new).all()
    assert (new[3] - weight[3]).abs().max() < 1e-7


def test_dead_inputs_and_few_tokens():
    weight, x = problem(tokens=5, dead=(2, 9))
    new = gptq_matrix(weight, x.T @ x, 4, 8)
    assert not new[:, [2, 9]].any()
    assert relative(new, slow_gptq(weight, x.T @ x, 4, 8)) < 1e-8
    assert output_error(weight, new, x) < output_error(weight, quantize_rtn(weight, 4, 8), x)
    with pytest.raises(ValueError, match="more calibration tokens"):
        gptq_matrix(weight, x.T @ x, damping=0.0)


@pytest.mark.parametrize(
    ("bits", "group", "message"), [(1, None, "2 to 8"), (16, None, "2 to 8"), (4, 0, "positive"), (4, -8, "positive")]
)
def test_levels_that_cannot_be(bits, group, message):
    weight, x = problem()
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))  # work would end in another error
    for attempt in (
        lambda: quantize_rtn(weight, bits, group),
        lambda: gptq_matrix(weight, x.T @ x, bits, group),
        lambda: round_to_nearest(model, bits, group),
        lambda: gptq(model, token_ids(), bits, group),
        lambda: quantized_bytes(model, bits, group),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


# --- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_gptq_model_equals_hooks_on_the_whole_model(family, group):
    model = tiny(family)
    ours = block_linears(gptq(model, token_ids(), 4, group))
    literal = literal_rebuild(model, token_ids(), lambda w, x: slow_gptq(w, x.T @ x, 4, group or w.shape[1]))
    for name, layer in block_linears(literal).items():
        assert relative(ours[name].weight, layer.weight) < 1e-7


@pytest.mark.parametrize("method", [gptq, lambda model, ids, **settings: round_to_nearest(model, **settings)])
@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_matrices_of_the_blocks_change(family, method):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    new = method(model, token_ids(), bits=3)
    matrices = {id(layer.weight) for layer in block_linears(new).values()}
    for name, value in new.state_dict(keep_vars=True).items():
        if id(value) in matrices:
            assert max(len(row.unique()) for row in value) <= 8
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    consumed = method(model, token_ids(), bits=3, inplace=True)
    assert consumed is model
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), consumed.parameters(), strict=True))


def test_quantised_model_is_a_stock_model(tmp_path):
    import transformers

    new = gptq(tiny("qwen2", torch.float32), token_ids(), 4, 8)
    again = transformers.AutoModelForCausalLM.from_pretrained(export(new, None, tmp_path / "new")).eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, new(token_ids()).logits)


def factored(model, rank=8):
    """The model with every layer of its blocks cut into two factors of exact SVD, as low-rank methods leave it."""
    model = copy.deepcopy(model)
    for block in Anatomy(model).blocks:
        for name, layer in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            v, w = (
                nn.Linear(layer.in_features, rank, bias=False),
                nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
            )
            v.weight, w.weight = nn.Parameter(s[:rank, None].sqrt() * vh[:rank]), nn.Parameter(u[:, :rank] * s[:rank].sqrt())
            if layer.bias is not None:
                w.bias = layer.bias
            block.set_submodule(name, LowRankLinear(v, w))
    return model


@pytest.mark.parametrize("group", [None, 5])  # 5 does not divide the rank
def test_second_factor_is_quantised_for_the_latents_of_the_quantised_first(group):
    model = factored(tiny("qwen2"))
    ours = gptq(model, token_ids(), 4, group)
    block = model.model.layers[0]
    v, w = block.mlp.down_proj.v, block.mlp.down_proj.u
    x = inputs_in_the_model(model, {"down": block.mlp.down_proj}, token_ids())["down"]
    new_v = slow_gptq(v.weight.detach(), x.T @ x, 4, group or v.in_features)
    latents = x @ new_v.T
    new_w = slow_gptq(w.weight.detach(), latents.T @ latents, 4, group or w.in_features)
    found = ours.model.layers[0].mlp.down_proj
    assert relative(found.v.weight, new_v) < 1e-8
    assert relative(found.u.weight, new_w) < 1e-8
    assert torch.equal(ours.model.layers[0].self_attn.q_proj.u.bias, block.self_attn.q_proj.u.bias)
    rounded = round_to_nearest(model, 4, group).model.layers[1].self_attn.k_proj
    assert torch.equal(rounded.u.weight, quantize_rtn(model.model.layers[1].self_attn.k_proj.u.weight, 4, group))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_truncated_model_is_quantised_saved_and_counted(family, tmp_path):
    """What SVD-LLM leaves: every factor on few levels, the second for the latents of the quantised first, same edits."""
    model = compress_model(tiny(family), token_ids(), 0.4)
    new = gptq(model, token_ids(), 4, 5)  # 5 divides no rank here
    quantised = block_linears(new)
    for name, layer in block_linears(model).items():
        weight = quantised[name].weight
        assert not torch.equal(weight, layer.weight)
        assert all(len(part.unique()) <= 16 for row in weight for part in row.split(5))
    name = Anatomy(model).family.blocks + ".0." + Anatomy(model).family.mlp.writer
    layer, found = model.get_submodule(name), new.get_submodule(name)
    x = inputs_in_the_model(model, {"writer": layer}, token_ids())["writer"]
    v = slow_gptq(layer.v.weight.detach(), x.T @ x, 4, 5)
    latents = x @ v.T
    assert relative(found.v.weight, v) < 1e-8
    assert relative(found.u.weight, slow_gptq(layer.u.weight.detach(), latents.T @ latents, 4, 5)) < 1e-8
    again = load_checkpoint(save(new, None, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, new(token_ids()).logits)
    assert new.edits == model.edits
    assert quantized_bytes(model, 4) < count(model).bytes


def test_a_rank_above_the_rank_of_the_data_is_quantised():
    """The Gram of the latents is singular: damping must carry it, for few tokens and wide factors."""
    model = compress_model(tiny("llama"), token_ids(1, 6), 0.2)
    new = gptq(model, token_ids(1, 6), 4)
    with torch.no_grad():
        assert torch.isfinite(new(token_ids()).logits).all()
        rounded, exact = (m(token_ids(1, 6)).logits for m in (round_to_nearest(model, 4), model))
        assert (new(token_ids(1, 6)).logits - exact).norm() < (rounded - exact).norm()


def test_other_edited_models_are_refused():
    sliced = slice_model(tiny("llama"), token_ids(), 0.25)
    for attempt in (lambda: gptq(sliced, token_ids()), lambda: round_to_nearest(sliced), lambda: quantized_bytes(sliced)):
        with pytest.raises(ValueError, match="block 0 self_attn.o_proj cannot be quantised"):
            attempt()


# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, None), (4, 128), (2, 100)])
def test_packed_size_of_a_7b_model(bits, group):
    model = meta_model("Llama-2-7B").half()
    d, f, vocabulary, layers = 4096, 11008, 32000, 32
    per_row = {n: bits * n + (16 + bits) * math.ceil(n / (group or n)) for n in (d, f)}
    packed_bits = layers * ((4 * d + 2 * f) * per_row[d] + d * per_row[f])
    other = 2 * (2 * vocabulary * d + (2 * layers + 1) * d)
    assert quantized_bytes(model, bits, group) == other + packed_bits // 8


def test_published_size():
    """SVD-LLM V2 prints 2.8 GB for LLaMA-7B with 3-bit GPTQ."""
    assert round(quantized_bytes(meta_model("Llama-2-7B").half(), 3) / 2**30, 1) == 2.8


def test_size_counts_factors_and_keeps_the_rest():
    model = factored(tiny("llama"), rank=8)
    rest = count(model).bytes - sum(layer.weight.nbytes for layer in block_linears(model).values())
    expected = rest
    for layer in block_linears(model).values():
        expected += math.ceil((layer.weight.numel() * 4 + layer.out_features * math.ceil(layer.in_features / 6) * 20) / 8)
    assert quantized_bytes(model, 4, 6) == expected
