"""COMP: the budget, one block, and whole models against masks on the dense model and the streams of plain transformers."""

import copy
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from lib.models.checkpoint import export, load_checkpoint, save
from lib.papers import comp
from lib.papers.comp import Demand, Pruned, Round, Settings, Shape
from lib.papers.mask_tuning import Sums, System
from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import ResidualStream, inputs_of
from lib.primitives.cost import count
from lib.primitives.layer_importance import layer_scores
from lib.primitives.layerwise import go
from lib.primitives.structured import ffn_widths, neuron_params
from tests.conftest import CONFIGS, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
WIDE = dict(intermediate_size=96, num_hidden_layers=5)
FAMILIES = sorted(set(CONFIGS) - {"gemma3_text"})


# --- the budget -----------------------------------------------------------------------------------------------------------

# LLaMA-2-7B: ratio; blocks and share of the other blocks' neurons that go at rho = 0.5, at 0, and at 1 in whole blocks
LLAMA_2_7B = Shape([202_383_360] * 32, [11_008] * 32, [3 * 4096] * 32)
TABLE = [(0.1, 1, 0.106, 0.150, 3), (0.2, 3, 0.175, 0.299, 6), (0.3, 4, 0.299, 0.449, 10), (0.4, 6, 0.391, 0.598, 13)]
TABLE += [(0.5, 8, 0.499, 0.748, 16)]


@pytest.mark.parametrize(("ratio", "blocks", "half", "neurons", "whole"), TABLE)
def test_budget_of_a_7b_model(ratio, blocks, half, neurons, whole):
    for rho, drop, share in ((0.5, blocks, half), (0.0, 0, neurons), (1.0, whole, 0.0)):
        assert comp.blocks_to_drop(ratio, 32, rho) == drop
        cut = comp.neurons_to_cut(LLAMA_2_7B, range(1, 1 + drop), ratio, Settings(rho=rho))
        assert cut / (11_008 * (32 - drop)) == pytest.approx(share, abs=6e-4)
        if rho < 1:
            removed = drop * LLAMA_2_7B.params[0] + cut * 3 * 4096
            assert abs(removed - ratio * sum(LLAMA_2_7B.params)) <= 3 * 4096 / 2


def test_blocks_are_counted_in_exact_arithmetic():
    assert comp.blocks_to_drop(0.3, 10, 0.9999999) == 3
    assert comp.blocks_to_drop(0.29, 100, 1.0) == 29
    assert comp.blocks_to_drop(0.2, 10, 0.5) == 1


@given(st.lists(st.floats(1e-6, 2), min_size=1, max_size=12), st.floats(0, 0.8), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_block_ratios_have_the_mean_asked_for_whatever_the_limit_cuts_off(scores, mean, alpha):
    ratios = comp.layer_ratios(scores, mean, alpha, 0.8)
    assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= r <= 0.8 for r in ratios)
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    for a, b in itertools.pairwise(order):
        assert ratios[a] >= ratios[b] - 1e-12  # what matters more loses no more


def test_block_ratios_follow_the_formula_and_are_uniform_at_zero():
    scores = torch.tensor([0.5, 0.01, 0.1, 0.02]).double()
    z = (scores.log() - scores.log().mean()) / scores.log().std(correction=0)
    expected = 0.2 * (-0.2 * z).exp() / (-0.2 * z).exp().mean()
    assert comp.layer_ratios(scores.tolist(), 0.2) == pytest.approx(expected.tolist(), rel=1e-9)
    assert comp.layer_ratios(scores.tolist(), 0.2, alpha=0.0) == pytest.approx([0.2] * 4)
    assert comp.layer_ratios([0.1, 0.1], 0.3) == pytest.approx([0.3, 0.3])
    with pytest.raises(ValueError, match="80% is the most"):
        comp.layer_ratios([0.1], 0.81)


@given(st.lists(st.floats(0, 0.8), min_size=1, max_size=8), st.integers(5, 60), st.sampled_from([1, 4]))
@settings(max_examples=50, deadline=None)
def test_quotas_add_up_in_whole_steps(ratios, width, multiple):
    choice = Settings(multiple=multiple)
    limit = comp.most(width, choice)
    assert limit <= min(0.8 * width, width - 1)
    assert limit % multiple == 0
    total = min(round(sum(ratios) * width), limit * len(ratios))
    quotas = comp.quotas_from(ratios, [width] * len(ratios), total, choice)
    assert abs(sum(quotas) - total) <= multiple / 2
    assert all(0 <= q <= limit and q % multiple == 0 for q in quotas)


def test_a_block_keeps_its_last_neuron():
    assert comp.most(3, Settings(largest_cut=0.99)) == 2
    assert comp.most(1, Settings()) == 0


@pytest.mark.parametrize("bad", [
    dict(metric="C9"), dict(reference="none"), dict(allocation="even"), dict(selection="twice"), dict(layer_score="norm"),
    dict(rho=1.1), dict(largest_cut=1.0), dict(epsilon=0.0), dict(variance_bound=0.0),
    dict(multiple=0), dict(checks=0), dict(rounds=0),
])  # fmt: skip
def test_bad_settings_are_refused(bad):
    [name] = bad
    with pytest.raises(ValueError, match=f"unknown {name} .*choose one of|{name} is .*: give a .*number"):
        Settings(**bad)


def test_impossible_ratios_are_refused_before_any_work():
    model, broken = tiny("llama"), torch.full((2, 8), 10**6)  # ids that calibration would refuse
    with pytest.raises(ValueError, match=r"at most \d+ may go at largest_cut"):
        comp.prune(model, broken, 0.7, Settings(rho=0.0))
    with pytest.raises(ValueError, match="cannot remove 2 of 1 blocks"):
        comp.prune(model, broken, 0.7, Settings(rho=1.0))
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
            comp.prune(model, broken, ratio)
    with pytest.raises(ValueError, match="vocabulary"):
        comp.prune(model, broken, 0.2)


def test_a_normalised_ffn_output_is_refused_unless_the_reference_is_its_own():
    for reference in ("residual", "teacher"):
        with pytest.raises(ValueError, match="reference='same input'"):
            comp.prune(tiny("gemma3_text"), token_ids(), 0.2, Settings(reference=reference))


# --- one block ------------------------------------------------------------------------------------------------------------


def system(x: torch.Tensor, w: torch.Tensor, beyond: torch.Tensor | None = None) -> System:
    sums = Sums(w)
    sums.add(x, beyond)
    return sums.system()


def random_layer(n: int = 40, d: int = 24, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator).double() for shape in ((tokens, n), (n, d)))


def copies() -> tuple[torch.Tensor, torch.Tensor]:
    """40 neurons that come in fours: one that stays has to do the work of its copies."""
    x, w = random_layer(10)
    return x.repeat(1, 4), w.repeat(4, 1)


def output(x: torch.Tensor, w: torch.Tensor, result: Pruned) -> torch.Tensor:
    scale = 1 if result.scale is None else result.scale
    return (x[:, result.keep] * scale) @ w[result.keep]


def prune_system(s: System, quota: int, bound: float = 0.1, **options) -> Pruned:
    choice = Settings(**options)
    return comp.prune_system(s, quota, choice, choice.epsilon, bound)


def test_reported_errors_are_those_of_the_output():
    x, w = random_layer()
    beyond = 0.2 * torch.randn(400, 24, generator=torch.Generator().manual_seed(5)).double()
    result = prune_system(system(x, w, beyond), 10)
    wanted = x @ w + beyond
    for error, found in ((result.error, result), (result.untuned, replace(result, scale=None))):
        exact = (output(x, w, found) - wanted).square().sum() / wanted.square().sum()
        assert error == pytest.approx(float(exact), rel=1e-10)
    assert result.removed == 10
    assert result.error < result.untuned
    assert result.variance == pytest.approx(float(result.scale.var(correction=0)))
    assert result.largest == float(result.scale.abs().max())


def test_independent_neurons_are_paid_in_full_and_copies_stop_at_the_bound():
    assert prune_system(system(*random_layer()), 12).removed == 12
    s = system(*copies())
    free, bounded = prune_system(s, 28, math.inf), prune_system(s, 28, 0.05)
    assert free.removed == 28
    assert free.variance > 0.05
    assert 0 < bounded.removed < 28
    assert bounded.variance <= 0.05


@given(st.integers(0, 30), st.sampled_from([0.003, 0.03, 0.1]), st.floats(0, 3), st.sampled_from(["C1", "C0"]))
@settings(max_examples=30, deadline=None)
def test_the_first_round_never_exceeds_the_bound(seed, bound, drift, metric):
    x, w = random_layer(20, 6, 30, seed)
    x[:, 10:15] = x[:, :5]
    beyond = drift * torch.randn(30, 6, generator=torch.Generator().manual_seed(seed)).double()
    result = prune_system(system(x, w, beyond), 12, bound, metric=metric)
    assert result.variance <= bound
    assert result.largest <= 10
    assert result.error <= result.untuned * (1 + 1e-12)
    assert result.removed == 20 - len(result.keep) <= 12


def test_drift_alone_does_not_stop_removals():
    """Repairing what earlier blocks did lifts the variance before anything is cut; the ridge answers that, not the quota."""
    x, w = random_layer()
    x[:, ::2] *= 0.03
    beyond = 3 * torch.randn(400, 24, generator=torch.Generator().manual_seed(5)).double()
    s = system(x, w, beyond)
    before = prune_system(s, 0, math.inf)
    assert before.variance > 0.1
    result = prune_system(s, 15)
    assert result.removed == 15
    assert result.variance <= 0.1
    assert result.error < result.untuned


@pytest.mark.parametrize("bound", [0.1, math.inf])
def test_multipliers_beyond_ten_are_never_used(bound):
    """Neuron 0 has the least weight and does 20 times what neuron 1 does, along the same lines: to remove it asks for m = 21."""
    x, w = random_layer()
    x[:, 1] = 3 * x[:, 1]
    w[0], x[:, 0] = 0.01 * w[1], 2000 * x[:, 1]
    s = system(x, w)
    if bound < math.inf:
        result = prune_system(s, 1, bound, metric="weight norm", epsilon=1e-7)
        assert (result.removed, result.scale) == (0, None)
        return
    with pytest.warns(UserWarning, match="exceed 10"):
        result = prune_system(s, 1, bound, metric="weight norm", epsilon=1e-7)
    assert result.removed == 1
    assert result.scale is None
    assert result.error == result.untuned


def test_a_dead_layer_loses_neurons_in_order_and_says_so():
    x, w = random_layer()
    with pytest.warns(UserWarning, match="puts out nothing"):
        result = prune_system(system(0 * x, w), 7)
    assert result.keep.tolist() == list(range(7, 40))
    assert result.scale is None
    assert result.removed == 7


def test_untuned_removal_follows_the_metric_and_leaves_no_multiplier():
    x, w = random_layer()
    s = system(x, w)
    result = prune_system(s, 10, metric="C0", tune=False)
    assert result.scale is None
    lost = x.norm(dim=0) * w.norm(dim=1)
    assert set(range(40)) - set(result.keep.tolist()) == set(lost.argsort()[:10].tolist())
    one = prune_system(s, 10, tune=False)
    assert one.scale is None
    assert torch.equal(one.keep, prune_system(s, 10, math.inf).keep)


def test_checks_come_in_whole_steps():
    for quota in (8, 16, 28):
        assert prune_system(system(*copies()), quota, 0.05, multiple=4).removed % 4 == 0


# --- rounds ---------------------------------------------------------------------------------------------------------------


def paid(removed: int, variance: float = 0.0, n: int = 40) -> Pruned:
    return Pruned(torch.arange(removed, n), None, removed, variance)


def test_a_shortfall_is_spread_over_the_blocks_to_come():
    last = Round([Demand(8, 0.01, 0.1)] * 4, [32] * 4)
    assert last.ask(0).quota == 8
    last.paid(paid(2))
    assert last.short == 6
    assert last.ask(1).quota == 10
    last.paid(paid(10))
    assert last.ask(2).quota == 10
    last.paid(paid(10))
    last.paid(paid(last.ask(3).quota))
    assert last.short == 0
    assert sum(r.removed for r in last.results) == 32
    assert comp.next_round(last, 1, Settings()) is None


def test_the_next_round_asks_the_calmer_blocks_under_a_larger_ridge_and_the_last_one_has_no_bound():
    last = Round([Demand(8, 0.01, 0.1)] * 4, [32] * 4)
    for variance in (0.09, 0.01, 0.02, 0.08):
        last.paid(paid(6, variance))
    after = comp.next_round(last, 1, Settings())
    assert [d.quota for d in after.demands] == [6, 10, 10, 6]
    assert [d.epsilon for d in after.demands] == pytest.approx([0.01, 0.1, 0.1, 0.01])
    assert [d.bound for d in after.demands] == pytest.approx([0.1, 0.2, 0.2, 0.1])
    assert {d.bound for d in comp.next_round(last, 3, Settings()).demands} == {math.inf}
    full = replace(last, room=[32, 6, 6, 32])
    assert [d.quota for d in comp.next_round(full, 1, Settings()).demands] == [10, 6, 6, 10]


# --- whole models ---------------------------------------------------------------------------------------------------------


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": token_ids()} | inputs), use_cache=False).logits


def streams(model: nn.Module, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The residual stream [samples, length, d] after every block, and what every FFN adds to it."""
    anatomy, after, own = Anatomy(model), [], []

    def ffn(_, inputs, output):
        own.append(output.reshape(*ids.shape, -1))

    def block(_, inputs, output):
        after.append(output[0] if isinstance(output, tuple) else output)

    handles = [b.get_submodule(anatomy.family.mlp.writer).register_forward_hook(ffn) for b in anatomy.blocks]
    handles += [b.register_forward_hook(block) for b in anatomy.blocks]
    logits(model, input_ids=ids)
    for handle in handles:
        handle.remove()
    return after, own


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_pruned_model_is_the_dense_one_under_the_tuned_mask(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    reference = "same input" if family == "gemma3_text" else "residual"
    small, report = comp.prune(model, token_ids(), 0.2, Settings(rho=0.0, reference=reference))
    masked = Anatomy(copy.deepcopy(model))
    for block, result in zip(masked.blocks, report.results, strict=True):
        m = torch.zeros(48).double()
        m[result.keep] = 1.0 if result.scale is None else result.scale
        block.get_submodule(masked.family.mlp.writer).register_forward_pre_hook(lambda _, inputs, m=m: (inputs[0] * m,))
    assert any(result.scale is not None for result in report.results)
    assert relative(logits(small), logits(masked.model)) < 1e-10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "edits")
    removed = sum(r.removed for r in report.results) * neuron_params(model)
    assert count(model).params - count(small).params == removed
    assert ffn_widths(small) == [len(r.keep) for r in report.results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_fold_as_well(dtype):
    model = tiny("llama", dtype)
    small, report = comp.prune(model, token_ids(), 0.2, Settings(rho=0.0))
    wide = copy.deepcopy(model).double()
    for block, result in zip(Anatomy(wide).blocks, report.results, strict=True):
        m = torch.zeros(48).double()
        m[result.keep] = 1.0 if result.scale is None else result.scale
        block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, m=m: (inputs[0] * m,))
    assert next(small.parameters()).dtype == dtype
    assert relative(logits(small).double(), logits(wide)) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("reference", ["residual", "teacher", "same input"])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_reported_errors_are_those_of_the_two_streams(family, reference, rho):
    """The wanted output of every block, from plain runs of the dense and the pruned model; across removed blocks as well."""
    model, ids = tiny(family, **{"ffn_dim" if family == "opt" else "intermediate_size": 96}, num_hidden_layers=5), token_ids()
    small, report = comp.prune(model, ids, 0.3, Settings(rho=rho, reference=reference, layer_score="relative change"))
    assert len(report.plan.drop) == (1 if rho else 0)
    assert report.rounds == 1
    kept = [i for i in range(5) if i not in report.plan.drop]
    (after, own), (after_s, own_s) = streams(model, ids), streams(small, ids)
    for i, (dense, result) in enumerate(zip(kept, report.results, strict=True)):
        wanted = own[dense]
        if reference == "residual":
            wanted = after[dense] - (after_s[i] - own_s[i])
        if reference == "same input":  # the uncut FFN in its place in the pruned model
            uncut, mlp = copy.deepcopy(small), Anatomy(model).family.mlp
            for name in (*mlp.readers, mlp.writer):
                Anatomy(uncut).blocks[i].set_submodule(name, Anatomy(model).blocks[dense].get_submodule(name))
            wanted = streams(uncut, ids)[1][i]
        lost = (own_s[i] - wanted).square().sum()
        bias = Anatomy(model).blocks[dense].get_submodule(Anatomy(model).family.mlp.writer).bias
        energy = (wanted if bias is None else wanted - bias.detach()).square().sum()  # the multipliers do not reach the bias
        assert result.error == pytest.approx(float(lost / energy), rel=1e-8)


def test_references_agree_where_nothing_has_been_pruned_before():
    model, found = tiny("llama", **WIDE), []
    for reference in ("residual", "teacher", "same input"):
        found.append(comp.prune(model, token_ids(), 0.2, Settings(rho=0.0, reference=reference))[1].results[0])
    for other in found[1:]:
        assert torch.equal(other.keep, found[0].keep)
        assert relative(other.scale, found[0].scale) < 1e-10


# --- budgets of whole models ----------------------------------------------------------------------------------------------


def blocks_params(model: nn.Module) -> int:
    return sum(p.numel() for p in Anatomy(model).blocks.parameters())


def missed(model: nn.Module, small: nn.Module, ratio: float) -> float:
    """By how many neurons a ratio of the blocks' parameters was missed."""
    return abs(blocks_params(model) - blocks_params(small) - ratio * blocks_params(model)) / neuron_params(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ratio", "rho"), [(0.05, 0.0), (0.17, 0.5), (0.3, 0.0), (0.41, 0.9)])
def test_the_ratio_is_met_to_within_one_neuron(family, ratio, rho):
    model = tiny(family, num_hidden_layers=4, **{"ffn_dim" if family == "opt" else "intermediate_size": 96})
    small, report = comp.prune(model, token_ids(), ratio, Settings(rho=rho))
    assert missed(model, small, ratio) <= 1
    assert len(Anatomy(small).blocks) == 4 - len(report.plan.drop) == 4 - comp.blocks_to_drop(ratio, 4, rho)


def test_widths_in_steps_and_equal_widths():
    model = tiny("llama", **WIDE)
    stepped, _ = comp.prune(model, token_ids(), 0.2, Settings(rho=0.0, multiple=16))
    assert all(n % 16 == 0 for n in ffn_widths(stepped))
    assert missed(model, stepped, 0.2) <= 16
    equal, _ = comp.prune(model, token_ids(), 0.2, Settings(equal_widths=True))
    assert len(set(ffn_widths(equal))) == 1
    assert not hasattr(equal, "edits")


def test_nothing_to_remove_leaves_the_model_bit_for_bit():
    model = tiny("llama")
    unchanged, report = comp.prune(model, token_ids(), 0.0)
    assert report.plan.drop == []
    assert {r.removed for r in report.results} == {0}
    assert all(torch.equal(a, b) for a, b in zip(unchanged.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(logits(unchanged), logits(model))
    assert unchanged.config.to_dict() == model.config.to_dict()


def test_whole_blocks_only_and_all_that_may_go():
    model = tiny("opt", num_hidden_layers=4)
    small, report = comp.prune(model, token_ids(), 0.5, Settings(rho=1.0))
    assert report.plan.drop == [1, 2]
    assert ffn_widths(small) == [48, 48]
    _, report = comp.prune(model, token_ids(), 0.75, Settings(rho=1.0, protect_ends=False))
    assert len(report.plan.drop) == 3


@pytest.mark.parametrize("reference", ["residual", "same input"])
def test_whole_blocks_without_tuning_leave_the_rest_as_it_was(reference):
    model = tiny("llama", **WIDE)
    small, report = comp.prune(model, token_ids(), 0.2, Settings(rho=1.0, tune=False, reference=reference))
    kept = [i for i in range(5) if i not in report.plan.drop]
    for dense, block in zip(kept, Anatomy(small).blocks, strict=True):
        assert torch.equal(block.mlp.down_proj.weight, Anatomy(model).blocks[dense].mlp.down_proj.weight)


def test_iterative_selection_scores_anew():
    model = tiny("llama", num_hidden_layers=6)
    _, report = comp.prune(model, token_ids(), 0.5, Settings(rho=1.0, selection="iterative", protect_ends=False))
    left, current = list(range(6)), model
    for _ in range(3):
        scores = comp.layer_scores(current, token_ids())
        worst = scores.index(min(scores))
        left.pop(worst)
        current = comp.remove_blocks(current, [worst])
    assert report.plan.drop == [i for i in range(6) if i not in left]


def test_global_allocation_cuts_where_scores_are_low():
    model = tiny("llama", **WIDE)
    with torch.no_grad():
        Anatomy(model).blocks[2].mlp.down_proj.weight[:, ::2] *= 0.01  # half of this block's neurons hardly matter
    small, report = comp.prune(model, token_ids(), 0.1, Settings(rho=0.0, allocation="global", metric="C0"))
    assert max(range(5), key=lambda i: report.results[i].removed) == 2
    assert missed(model, small, 0.1) <= 1
    uniform = comp.prune(model, token_ids(), 0.1, Settings(rho=0.0, allocation="uniform"))[1].plan.quotas
    assert max(uniform) - min(uniform) <= 1


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_target_is_met_even_where_the_bound_cannot_be(rounds):
    """Blocks made of copies, with a bound that no sweep but the last can respect; each sweep starts from the dense model."""
    model = tiny("llama", **WIDE)
    with torch.no_grad():
        for block in Anatomy(model).blocks:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight.copy_(layer.weight[:12].repeat(8, 1))
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, :12].repeat(1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, report = comp.prune(model, token_ids(), 0.5, Settings(rho=0.0, variance_bound=1e-6, rounds=rounds))
    assert report.rounds == rounds
    assert missed(model, small, 0.5) <= 1
    assert max(r.variance for r in report.results) > 1e-6
    assert ffn_widths(small) == [len(r.keep) for r in report.results]


# --- calibration ----------------------------------------------------------------------------------------------------------


def same(a: comp.Report, b: comp.Report, tolerance: float = 1e-8) -> None:
    """Two reports of the same decisions and multipliers."""
    assert (a.plan.drop, a.plan.quotas) == (b.plan.drop, b.plan.quotas)
    assert a.scores == pytest.approx(b.scores, rel=tolerance)
    for one, other in zip(a.results, b.results, strict=True):
        assert torch.equal(one.keep, other.keep)
        assert relative(one.scale, other.scale) < tolerance


def test_batches_do_not_matter_nor_repeated_sequences(batches_of):
    model = tiny("opt", ffn_dim=96, num_hidden_layers=5)
    whole = comp.prune(model, token_ids(), 0.3)[1]
    for batch in (1, 4):
        batches_of(batch)
        same(comp.prune(model, token_ids(), 0.3)[1], whole)
    same(comp.prune(model, token_ids().repeat(2, 1), 0.3)[1], whole)


def test_every_token_counts_alike():
    stream = ResidualStream(tiny("llama"), token_ids(3, 6), batch=2)
    anatomy, block = stream.anatomy, stream.anatomy.blocks[0]
    found = comp.block_system(block, anatomy.family, map(comp.Pair, stream.inputs(0)), Settings())
    with inputs_of(block.mlp.down_proj) as seen, torch.no_grad():
        block(stream.hidden, **next(iter(ResidualStream(anatomy.model, stream.ids, batch=3).inputs(0))).kwargs)
    x = seen[0].flatten(0, 1)
    w = block.mlp.down_proj.weight.detach()
    assert relative(found.h, (x.T @ x / len(x)) * (w.T @ w)) < 1e-10


def test_a_neuron_that_works_on_first_tokens_alone_stays():
    """Trained models have such neurons: they make the massive activations that all later tokens attend to."""
    model = tiny("llama")
    block, ids = model.model.layers[0], token_ids()
    ids[:, 0], ids[:, 1:] = 0, ids[:, 1:].clamp(min=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0  # one direction of the stream belongs to token 0
        model.model.embed_tokens.weight[0] = 0
        model.model.embed_tokens.weight[0, 0] = 1
        block.self_attn.o_proj.weight.zero_()
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.weight[7] = 0
            part.weight[7, 0] = 10
    report = comp.prune(model, ids, 0.35, Settings(rho=0.0, allocation="uniform"))[1]
    assert 7 in report.results[0].keep
    assert report.results[0].removed > model.config.intermediate_size / 2


@pytest.mark.parametrize("length", [1, 2])
def test_one_short_sequence_is_enough(length):
    model = tiny("llama")
    small, _ = comp.prune(model, token_ids(1, length), 0.2, Settings(rho=0.0))
    assert torch.isfinite(logits(small)).all()
    assert missed(model, small, 0.2) <= 1


# --- the result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma3_text"])
def test_unequal_widths_generate_and_survive_saving(family, tmp_path):
    gemma = family == "gemma3_text"
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]} if gemma else {}
    model = tiny(family, torch.float32, num_hidden_layers=5, **kinds)
    small, report = comp.prune(model, token_ids(), 0.3, Settings(rho=0.9, reference="same input" if gemma else "residual"))
    assert len(report.plan.drop) == 1
    assert len(set(ffn_widths(small))) > 1
    assert small.config.num_hidden_layers == 4
    if gemma:
        left = [kind for i, kind in enumerate(kinds["layer_types"]) if i not in report.plan.drop]
        assert small.config.layer_types == left
    prompt = token_ids(2, 8)
    cached, plain = (small.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    again = load_checkpoint(save(small, None, tmp_path / "saved"))
    assert ffn_widths(again) == ffn_widths(small)
    assert torch.equal(logits(again), logits(small))


def test_equal_widths_export_as_a_stock_model(tmp_path):
    small, _ = comp.prune(tiny("llama", **WIDE), token_ids(), 0.3, Settings(equal_widths=True))
    export(small, None, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float64)
    assert torch.equal(logits(stock), logits(small))


def test_no_gradient_is_ever_formed(monkeypatch):
    model, seen = tiny("llama"), []
    monkeypatch.setattr(comp, "run_seeing", lambda *args, run=comp.run_seeing: seen.append(run(*args)) or seen[-1])
    small, _ = comp.prune(model, token_ids(), 0.2)
    assert len(seen) > 2
    assert not any(t.requires_grad for found in seen for t in found)
    assert all(p.grad is None for p in [*model.parameters(), *small.parameters()])


def test_tied_embeddings_stay_tied():
    model = tiny("llama", tie_word_embeddings=True)
    small, _ = comp.prune(model, token_ids(), 0.2)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_report_has_one_row_per_dense_block():
    _, report = comp.prune(tiny("llama", num_hidden_layers=5), token_ids(), 0.3, Settings(rho=0.9))
    rows = report.rows()
    assert [row["block"] for row in rows] == list(range(5))
    assert [row["block"] for row in rows if row["removed"]] == report.plan.drop
    assert [row["neurons"] for row in rows if not row["removed"]] == [r.removed for r in report.results]
    assert [row["importance"] for row in rows] == report.scores


# --- how many whole blocks go, by trial -----------------------------------------------------------------------------------


def last_normed(model, ids):
    """Last hidden states behind the final norm, [tokens, d], by transformers alone."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).double()


@pytest.mark.parametrize("reference", ["residual", "same input"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_trial_is_the_method_on_half_the_text_judged_by_the_other(family, reference):
    """The distance of each number of blocks, against whole models pruned with that number, and the number that is taken."""
    model, ids, ratio = tiny(family, num_hidden_layers=5), token_ids(6), 0.45
    chosen = Settings(reference=reference)
    plan = comp.decide(model, ids, layer_scores(model, ids), ratio, chosen)
    assert len(plan.trials) > 1
    for whole, distance in plan.trials:
        scores = layer_scores(model, ids)
        tried = comp.plan_for(model, ids[:3], scores, whole, ratio, chosen)
        small = go(comp.CompWalk(model, ids[:3], tried, chosen), "pruned")
        cosines = torch.cosine_similarity(last_normed(small, ids[3:]), last_normed(model, ids[3:]), dim=-1).detach()
        assert distance == pytest.approx(1 - float(cosines.mean()), rel=1e-4)
    distances = [distance for _, distance in plan.trials]
    assert all(a > b for a, b in itertools.pairwise(distances[:-1]))  # only the last trial may be farther away
    assert len(plan.drop) == plan.trials[distances.index(min(distances))][0]


def test_the_trial_decides_as_the_model_asks_for(monkeypatch):
    """The first rise of the distance ends the trials, and the number before it is taken."""
    model, ids = tiny("llama", num_hidden_layers=6, intermediate_size=256), token_ids(4)
    steps = {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.35}
    monkeypatch.setattr(comp.Trial, "distance", lambda trial, dense: steps[6 - len(trial.kept)])
    plan = comp.decide(model, ids, [0.0, 0.3, 0.1, 0.2, 0.4, 0.0], 0.6, Settings())
    assert plan.trials == list(steps.items())
    assert plan.drop == [2, 3]


def test_a_plan_by_trial_meets_the_ratio_and_leaves_the_model_alone():
    model = tiny("llama", num_hidden_layers=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, report = comp.prune(model, token_ids(4), 0.4)
    removed = count(small).against(count(model))["removed_decoder"]
    assert removed == pytest.approx(0.4, abs=0.005)
    assert report.plan.trials
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_numbers_of_blocks_are_those_with_which_neurons_make_up_the_rest():
    model = tiny("llama", num_hidden_layers=10)
    shape = comp.shape_of(model)
    for ratio in (0.1, 0.45, 0.7):
        found = comp.block_counts(model, ratio, Settings())
        for count_gone in range(9):
            owed = ratio * sum(shape.params) - count_gone * shape.params[0]
            fits = owed + 1e-6 >= 0 and owed <= (10 - count_gone) * int(0.8 * shape.widths[0]) * shape.neuron[0]
            assert (count_gone in found) == fits, (ratio, count_gone)
    with pytest.raises(ValueError, match="at most 0 may go|lower the ratio"):
        comp.block_counts(model, 0.95, Settings())


def test_one_sequence_is_both_halves():
    _, report = comp.prune(tiny("llama", num_hidden_layers=5), token_ids(1), 0.4)
    assert report.plan.trials
