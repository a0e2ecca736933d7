"""Cutting neurons, groups and blocks against masking them, in every family; choosing; saving and loading."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lib.models.checkpoint import export, load_checkpoint, save
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count
from lib.primitives.structured import (
    ffn_widths,
    globally,
    group_params,
    keep_highest,
    kept_count,
    kv_groups,
    neuron_params,
    remove_blocks,
    remove_groups,
    remove_neurons,
    uniform,
)
from lib.suite.architectures import meta_model
from tests.conftest import CONFIGS, relative, tiny, token_ids

FAMILIES = sorted(CONFIGS)
GROUPED = [family for family in FAMILIES if family != "gpt_neox"]
pytestmark = pytest.mark.usefixtures("exact_norms")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


def masked(model: nn.Module, half: str, factors: list[torch.Tensor], shifts=None) -> torch.Tensor:
    """Logits of the dense model with the writer's inputs multiplied by factors [n], and its output shifted."""
    anatomy = Anatomy(copy.deepcopy(model))
    writer = getattr(anatomy.family, half).writer
    for i, (block, factor) in enumerate(zip(anatomy.blocks, factors, strict=True)):
        layer = block.get_submodule(writer)
        layer.register_forward_pre_hook(lambda _, inputs, f=factor: (inputs[0] * f,))
        if shifts:
            layer.register_forward_hook(lambda _, inputs, out, s=shifts[i]: out + s)
    return logits(anatomy.model)


def some(sizes: list[int], kept: list[int]) -> list[torch.Tensor]:
    return [
        torch.randperm(n, generator=torch.Generator().manual_seed(n + k))[:k].sort().values
        for n, k in zip(sizes, kept, strict=True)
    ]


def mask(n: int, keep: torch.Tensor, values=1.0) -> torch.Tensor:
    m = torch.zeros(n, dtype=torch.float64)
    m[keep] = values
    return m


def generated(model: nn.Module, use_cache: bool) -> torch.Tensor:
    return model.generate(token_ids(2, 8), max_new_tokens=6, do_sample=False, use_cache=use_cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_neurons_are_masked_neurons(family):
    model = tiny(family)
    keep = some([48] * 3, [17, 48, 30])
    scale = [torch.rand(len(k), dtype=torch.float64) - 0.3 for k in keep]
    shift = [torch.rand(32, dtype=torch.float64) for _ in keep]
    before = logits(model)
    small = remove_neurons(model, keep, scale=scale, bias=shift)
    expected = masked(model, "mlp", [mask(48, k, s) for k, s in zip(keep, scale, strict=True)], shift)
    assert relative(logits(small), expected) < 1e-10
    assert torch.equal(logits(model), before)
    removed = sum(48 - len(k) for k in keep) * neuron_params(model)
    anatomy = Anatomy(model)
    biased = anatomy.blocks[0].get_submodule(anatomy.family.mlp.writer).bias is not None
    new_biases = 0 if biased else 3 * 32
    assert count(model).params - count(small).params == removed - new_biases


@pytest.mark.parametrize("family", GROUPED)
def test_removed_groups_are_masked_groups(family):
    model = tiny(family)
    groups = kv_groups(model)[0]
    keep = some([groups] * 3, [1, groups, groups - 1])
    scale = [torch.rand(len(k), dtype=torch.float64) + 0.5 for k in keep]
    small = remove_groups(model, keep, scale=scale)
    channels = Anatomy(model).blocks[0].get_submodule(Anatomy(model).family.attention.writer).in_features // groups
    factors = [mask(groups, k, s).repeat_interleave(channels) for k, s in zip(keep, scale, strict=True)]
    assert relative(logits(small), masked(model, "attention", factors)) < 1e-10
    assert kv_groups(small) == [len(k) for k in keep]
    assert count(model).params - count(small).params == sum(groups - len(k) for k in keep) * group_params(model)
    assert torch.equal(generated(small, True), generated(small, False))


def test_fused_attention_is_refused():
    with pytest.raises(ValueError, match="one matrix"):
        remove_groups(tiny("gpt_neox"), [torch.arange(1)] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_blocks_are_skipped_blocks(family):
    model = tiny(family)
    small = remove_blocks(model, [1])

    class Skip(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    skipping = copy.deepcopy(model)
    blocks = Anatomy(skipping).blocks
    kind = getattr(blocks[1], "attention_type", None)
    blocks[1] = Skip()
    blocks[1].attention_type = kind
    assert torch.equal(logits(small), logits(skipping))
    assert small.config.num_hidden_layers == 2
    assert len(Anatomy(model).blocks) == 3
    assert torch.equal(generated(small, True), generated(small, False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["neurons", "groups", "blocks"])
def test_equal_sizes_are_a_stock_model(family, cut, tmp_path):
    if cut == "groups" and family in ("gpt_neox", "opt"):
        pytest.skip("no stock class for it")
    model = tiny(family, dtype=torch.float32)
    if cut == "blocks":
        small = remove_blocks(model, [0])
    elif cut == "neurons":
        small = remove_neurons(model, some([48] * 3, [20] * 3))
    else:
        small = remove_groups(model, some(kv_groups(model), [1] * 3))
    assert not hasattr(small, "edits")
    export(small, None, tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert torch.equal(logits(again), logits(small))


@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_sizes_survive_a_checkpoint(family, tmp_path):
    model = tiny(family, dtype=torch.float32)
    small = remove_blocks(model, [1])
    small = remove_neurons(small, some([48] * 2, [20, 48]), bias=[torch.ones(32), None])
    if family != "gpt_neox":
        groups = kv_groups(small)
        small = remove_groups(small, some(groups, [1, groups[0]]))
    save(small, None, tmp_path / "small")
    again = load_checkpoint(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    assert again.edits == small.edits
    assert len(small.edits) == 1
    assert torch.equal(generated(again, True), generated(again, False))
    with pytest.raises(NotImplementedError):
        small.save_pretrained(tmp_path / "wrong")


def test_equalised_widths_are_stock_again():
    once = remove_neurons(tiny("llama"), some([48] * 3, [20, 30, 40]))
    twice = remove_neurons(once, some([20, 30, 40], [20, 20, 20]))
    assert hasattr(once, "edits")
    assert not hasattr(twice, "edits")
    assert twice.config.intermediate_size == 20
    assert once.config.intermediate_size == 48
    assert type(twice).save_pretrained == twice.save_pretrained.__func__


def test_in_place_frees_the_dense_weights():
    model = tiny("llama")
    assert remove_neurons(model, some([48] * 3, [9] * 3), inplace=True) is model
    assert ffn_widths(model) == [9] * 3


@pytest.mark.parametrize(
    "keep", [[torch.arange(3)] * 2, [torch.tensor([3, 1]), None, None], [torch.tensor([48]), None, None], [torch.arange(0)] * 3]
)
def test_indices_that_do_not_fit_change_nothing(keep):
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=r"give one for each|keep at least one"):
        remove_neurons(model, keep, inplace=True)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("drop", [[0, 1, 2], [3], [-1]])
def test_blocks_that_do_not_exist_are_refused(drop):
    with pytest.raises(ValueError, match="cannot remove"):
        remove_blocks(tiny("llama"), drop)


def test_choosing():
    assert [kept_count(10, 0.2), kept_count(14336, 0.2), kept_count(5, 0.0)] == [8, 11468, 5]
    assert keep_highest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]
    scores = [torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])]
    assert [k.tolist() for k in uniform(scores, 0.5)] == [[2, 3], [2, 3]]
    assert uniform(scores, 0.5, protect=[0])[0] is None
    assert [k.tolist() for k in globally(scores, 0.5)] == [[1, 2, 3], [3]]
    assert [k.tolist() for k in globally(scores, 0.5, least=2)] == [[2, 3], [2, 3]]
    with pytest.raises(ValueError, match="leaves none"):
        kept_count(2, 0.9)
    with pytest.raises(ValueError, match="NaN"):
        keep_highest(torch.tensor([float("nan"), 1.0]), 1)
    with pytest.raises(ValueError, match="lower ratio"):
        globally(scores, 0.9)


def test_sizes_of_the_papers_llama():
    model = meta_model("Llama-3-8B")
    assert count(model).params == 8_030_261_248
    assert neuron_params(model) == 12_288
    assert group_params(model) == 128 * 4096 * 10
    for ratio, params in ((0.2, 6_902_517_760), (0.5, 5_211_688_960)):
        keep = [torch.arange(kept_count(14336, ratio))] * 32
        assert count(remove_neurons(model, keep)).params == params
