"""Structured rivals: scores against plain arithmetic on the model's own activations, removal against masking, budgets."""

import math

import pytest
import torch

from lib.baselines import cfsp, flap, lorap, magnitude, random_neurons, wanda
from lib.models import checkpoint
from lib.primitives.anatomy import Anatomy
from lib.primitives.moments import turning_angles
from lib.primitives.structured import ffn_widths, group_params, kept_count, kv_groups, neuron_params
from lib.primitives.surgery import LowRankLinear
from tests.conftest import LAYERS, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
FAMILIES = ("llama", "opt")
EXACT = 1e-10


def logits(model, seed=9):
    with torch.no_grad():
        return model(token_ids(seed=seed)).logits


def inputs_of(model, half, name, ids=None):
    """What a layer of every block gets in the model's own forward pass: [tokens, n] each, float64."""
    seen, handles = [], []
    for block in Anatomy(model).blocks:
        layer = block.get_submodule(name(getattr(Anatomy(model).family, half)))
        handles.append(layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().flatten(0, -2).double())))
    with torch.no_grad():
        model(token_ids() if ids is None else ids)
    for handle in handles:
        handle.remove()
    return seen


def activations(model, half="mlp"):
    return inputs_of(model, half, lambda names: names.writer)


def writers(model, half="mlp"):
    anatomy = Anatomy(model)
    return [block.get_submodule(getattr(anatomy.family, half).writer).weight.detach() for block in anatomy.blocks]


def readers(model):
    anatomy = Anatomy(model)
    return [[block.get_submodule(n).weight.detach() for n in anatomy.family.mlp.readers] for block in anatomy.blocks]


def only(made):
    """The model of a sweep with one ratio."""
    [(_, small)] = made
    return small


def masked(model, neurons, constants=None, half="mlp"):
    """Logits of the model with some inputs of the writers set to 0, or to constants, and everything else in place."""
    anatomy, handles = Anatomy(model), []
    for i, block in enumerate(anatomy.blocks):
        gone = torch.ones(writers(model, half)[i].shape[1], dtype=torch.bool)
        gone[neurons[i]] = False
        value = torch.zeros(len(gone), dtype=torch.float64) if constants is None else constants[i]
        layer = block.get_submodule(getattr(anatomy.family, half).writer)
        handles.append(layer.register_forward_pre_hook(lambda _, x, gone=gone, value=value: (torch.where(gone, value, x[0]),)))
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


# --- scores against plain arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sp_by_hand(family):
    model = tiny(family)
    found = wanda.neuron_scores(model, token_ids())
    for score, w, a in zip(found, writers(model), activations(model), strict=True):
        expected = [w[:, j].abs().mean() * a[:, j].square().mean().sqrt() for j in range(w.shape[1])]
        torch.testing.assert_close(score, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_by_hand(family, order):
    model = tiny(family)
    for score, w, read in zip(magnitude.neuron_scores(model, order), writers(model), readers(model), strict=True):
        for j in (0, 5, 47):
            rows = [w[:, j], *(r[j] for r in read)]
            expected = sum(row.abs().pow(order).sum() ** (1 / order) for row in rows)
            assert score[j].item() == pytest.approx(expected.item(), rel=1e-12)


def test_random_neurons_repeat_with_their_seed():
    model = tiny("llama")
    one, same, other = (random_neurons.scores(model, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert ffn_widths(only(random_neurons.sweep(model, None, [0.25]))) == [36] * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_cfsp_by_hand(family):
    model = tiny(family)
    code, eq8 = (cfsp.scores(model, token_ids(), fine).neurons for fine in ("code", "eq8"))
    for i, (w, read, a) in enumerate(zip(writers(model), readers(model), activations(model), strict=True)):
        size = a.square().mean(0).sqrt()
        torch.testing.assert_close(code[i], size)
        for j in (0, 20):
            parts = [abs(w[o, j]) * size[j] / (w[o].abs() * size).sum() for o in range(w.shape[0])]
            parts = sum(parts) / len(parts) + len(read) / w.shape[0]
            assert eq8[i][j].item() == pytest.approx((parts * size[j]).item(), rel=1e-9)


@pytest.mark.parametrize("axis", [0, 1])
def test_released_cfsp_score_is_the_activation_norm(axis):
    """Fractions averaged over the axis they were normalised over are 1/d, whatever the weights."""
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(axis), dtype=torch.float64).abs()
    size = torch.arange(1.0, 6.0, dtype=torch.float64)
    torch.testing.assert_close((w * size / (w * size).sum(0)).mean(0), torch.full((5,), 1 / 7, dtype=torch.float64))
    assert torch.equal(cfsp.code_scores(size.square()), size)


def test_cfsp_angles_are_those_of_the_residual_stream():
    model = tiny("llama")
    with torch.no_grad():
        states = model(token_ids(), output_hidden_states=True).hidden_states
    found = cfsp.scores(model, token_ids()).angles
    for i in range(LAYERS - 1):  # the last entry of the hidden states has been normalised
        total = 0.0
        for before, after in zip(states[i].flatten(0, 1), states[i + 1].flatten(0, 1), strict=True):
            total += math.acos((before @ after / (before.norm() * after.norm())).item()) / math.pi
        assert found[i].item() == pytest.approx(total / token_ids().numel(), rel=1e-6)
    opposite = turning_angles(states[0], -states[0])
    assert opposite.shape == token_ids().shape
    assert (opposite - 1).abs().max() < 1e-6


def test_cfsp_shares():
    angles = torch.tensor([0.12, 0.08, 0.1, 0.06])
    shares = cfsp.kept_shares(angles, 0.3)
    assert shares.mean().item() == pytest.approx(0.7)
    assert torch.equal(shares.argsort(), angles.argsort())
    gate = [1 / (1 + math.exp(-(a - 0.09) * 13.1072)) for a in angles.tolist()]
    torch.testing.assert_close(
        shares, torch.tensor([0.7 * g * 4 / sum(gate) for g in gate], dtype=torch.float64), rtol=1e-6, atol=0
    )
    wide = cfsp.kept_shares(torch.tensor([0.35, 0.08, 0.08, 0.25]), 0.2)
    assert 0.95 < wide.max() < 1
    assert wide.mean().item() == pytest.approx(0.8)
    torch.testing.assert_close(cfsp.kept_shares(torch.full((3,), 0.1), 0.5), torch.full((3,), 0.5).double())
    assert cfsp.kept_shares(torch.tensor([0.3, 0.1]), 0.0).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_scores_by_hand(family):
    model = tiny(family)
    found = flap.scores(model, token_ids())
    groups = kv_groups(model)[0]
    for i in range(LAYERS):
        loss = activations(model)[i].var(dim=0, correction=0) * writers(model)[i].norm(dim=0) ** 2
        torch.testing.assert_close(found.neurons[i], (loss - loss.mean()) / loss.std(correction=0), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.means[i], activations(model)[i].mean(0))
        loss = activations(model, "attention")[i].var(dim=0, correction=0) * writers(model, "attention")[i].norm(dim=0) ** 2
        loss = loss**2
        loss = (loss - loss.mean()) / loss.std(correction=0)
        expected = torch.stack([part.mean() for part in loss.chunk(groups)])
        torch.testing.assert_close(found.groups[i], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_lorap_scores_by_hand(family):
    model = tiny(family)
    for w, read, a, x in zip(
        writers(model), readers(model), activations(model), inputs_of(model, "mlp", lambda n: n.readers[0]), strict=True
    ):
        found = lorap.neuron_scores(read, w, x.square().mean(0), a.square().mean(0))
        size, out = x.square().mean(0).sqrt(), a.square().mean(0).sqrt()
        for j in (0, 31):
            expected = sum((r[j] * size).norm() for r in read) + w[:, j].norm() * out[j]
            assert found[j].item() == pytest.approx(expected.item(), rel=1e-10)


# --- removal is masking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_neurons_are_masked_neurons(family):
    model = tiny(family)
    before = logits(model)
    found = cfsp.scores(model, token_ids())
    kept = cfsp.keep(found, 0.4)
    assert relative(logits(cfsp.prune(model, token_ids(), 0.4)), masked(model, kept)) < EXACT
    plain = [score.argsort(descending=True)[:36].sort().values for score in wanda.neuron_scores(model, token_ids())]
    assert relative(logits(only(wanda.sweep_neurons(model, token_ids(), [0.25]))), masked(model, plain)) < EXACT
    both = wanda.unit_scores(model, token_ids())
    assert all(torch.equal(a, b) for a, b in zip(both[0], wanda.neuron_scores(model, token_ids()), strict=True))
    plain = [score.argsort(descending=True)[:36].sort().values for score in magnitude.neuron_scores(model)]
    assert relative(logits(only(magnitude.sweep_neurons(model, None, [0.25]))), masked(model, plain)) < EXACT
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 1), (0.4, 2)])  # 0.4 of two groups is none
def test_wanda_sp_with_heads_removes_the_groups_of_least_weight_times_input(ratio, left):
    model = tiny("llama")  # 4 query heads of 12, 2 groups
    kept = []
    for w, x in zip(writers(model, "attention"), inputs_of(model, "attention", lambda n: n.writer), strict=True):
        of_channel = [(w[:, c].abs().mean() * x[:, c].square().mean().sqrt()).item() for c in range(48)]
        groups = torch.tensor([sum(of_channel[:24]), sum(of_channel[24:])])
        kept.append(groups.argsort(descending=True)[:left].sort().values)
    found = wanda.unit_scores(model, token_ids())
    small = only(wanda.sweep_units(model, token_ids(), [ratio]))
    assert all(torch.equal(a, b) for a, b in zip(wanda.kept_groups(found[1], ratio), kept, strict=True))
    assert kv_groups(small) == [left] * LAYERS
    without = only(wanda.sweep_neurons(model, token_ids(), [ratio]))
    assert ffn_widths(small) == ffn_widths(without)
    channels = [(keep[:, None] * 24 + torch.arange(24)).flatten() for keep in kept]
    assert relative(logits(small), masked(without, channels, half="attention")) < EXACT
    shape = wanda.shape(model, ratio)
    assert (ffn_widths(shape), kv_groups(shape)) == (ffn_widths(small), kv_groups(small))


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_puts_the_mean_where_neurons_were(family):
    model = tiny(family)
    found = flap.scores(model, token_ids(), attention=False)
    kept = flap.allocate(found.neurons, [neuron_params(model)] * LAYERS, 0.3)
    assert relative(logits(flap.cut(model, found, 0.3)), masked(model, kept, found.means)) < EXACT
    assert relative(logits(flap.cut(model, found, 0.3, compensate=False)), masked(model, kept)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_puts_the_mean_where_groups_were(family):
    model = tiny(family)
    found = flap.scores(model, token_ids())
    always = [torch.full_like(score, 1e6) + torch.arange(len(score)) for score in found.neurons]
    found = flap.Scores(always, found.means, found.groups, found.group_means)
    costs = [neuron_params(model)] * LAYERS + [group_params(model)] * LAYERS
    ratio = 1.0 * group_params(model) / sum(c * n for c, n in zip(costs, ffn_widths(model) + kv_groups(model), strict=True))
    ratio = math.floor(ratio * 1e6) / 1e6
    kept = flap.allocate([*found.neurons, *found.groups], costs, ratio)[LAYERS:]
    assert sum(map(len, kept)) == sum(kv_groups(model)) - 1
    size = len(found.group_means[0]) // kv_groups(model)[0]
    wide = [torch.cat([torch.arange(size) + g * size for g in keep.tolist()]) for keep in kept]
    assert relative(logits(flap.cut(model, found, ratio)), masked(model, wide, found.group_means, "attention")) < EXACT


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_flap_meets_its_budget_within_one_unit(family, ratio, attention):
    model = tiny(family)
    small = flap.prune(model, token_ids(), ratio, attention=attention, compensate=False)
    neuron, group = neuron_params(model), group_params(model)
    total = neuron * sum(ffn_widths(model)) + attention * group * sum(kv_groups(model))
    left = neuron * sum(ffn_widths(small)) + attention * group * sum(kv_groups(small))
    assert 0 <= (1 - ratio) * total - left < max(neuron, attention * group) + 1
    size = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert size[0] - size[1] == total - left
    assert min(ffn_widths(small)) >= 1
    assert min(kv_groups(small)) >= 1


def test_flap_allocation_keeps_a_unit_everywhere():
    kept = flap.allocate([torch.tensor([9.0, 8, 7, 6]), torch.tensor([1.0, 2, 0, -1])], [1, 1], 0.5)
    assert [k.tolist() for k in kept] == [[0, 1, 2], [1]]
    with pytest.raises(ValueError, match="one unit in every block"):
        flap.allocate([torch.zeros(2), torch.zeros(2)], [1, 1], 0.9)
    with pytest.raises(ValueError, match="NaN"):
        flap.allocate([torch.tensor([torch.nan, 1])], [1], 0.1)


# --- LoRAP ---------------------------------------------------------------------------------------------------------------


def test_lorap_spares_the_lowest_per_cent():
    scores = torch.arange(200.0)
    assert lorap.keep(scores, 0.2).tolist() == [0, 1, *range(42, 200)]
    assert lorap.keep(scores, 0.2, spared=0.0).tolist() == list(range(40, 200))
    assert lorap.keep(scores, 0.0).tolist() == list(range(200))
    assert lorap.keep(scores, 0.995).tolist() == [0]


def test_lorap_ranks_of_the_authors():
    square = [(4096, 4096)] * 4
    assert lorap.attention_ranks(square, 0.2) == [1228, 1228, None, None]
    assert lorap.attention_ranks(square, 0.5) == [512, 512, 1536, 1536]
    grouped = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    for ratio in (0.2, 0.35, 0.5):
        ranks = lorap.attention_ranks(grouped, ratio)
        left = sum(m * n if k is None else k * (m + n) for (m, n), k in zip(grouped, ranks, strict=True))
        total = sum(m * n for m, n in grouped)
        assert (1 - ratio) * total - 4 * 8192 < left <= (1 - ratio) * total


@pytest.mark.parametrize("family", FAMILIES)
def test_lorap_first_block_against_plain_svd(family):
    model = tiny(family)
    small = lorap.prune(model, token_ids(), 0.5)
    anatomy = Anatomy(model)
    x = inputs_of(model, "attention", lambda n: n.readers[0])[0].square().mean(0).sqrt()
    name = anatomy.family.attention.readers[0]
    w, layer = anatomy.blocks[0].get_submodule(name).weight.detach(), Anatomy(small).blocks[0].get_submodule(name)
    u, s, v = torch.linalg.svd(w * x)
    k = layer.rank
    expected = (u[:, :k] * s[:k]) @ v[:k] / x
    torch.testing.assert_close((layer.u.weight @ layer.v.weight).detach(), expected, rtol=1e-8, atol=1e-9)
    assert ffn_widths(small) == [kept_count(48, 0.5)] * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_lorap_on_mlps_only_is_sequential_masking(family):
    """Later blocks are scored on what the pruned ones hand them."""
    model = tiny(family)
    small, kept = lorap.prune(model, token_ids(), 0.3, mlp_only=True), []
    assert not any(isinstance(m, LowRankLinear) for m in small.modules())
    for i in range(LAYERS):
        everything = [torch.arange(48)] * LAYERS
        chosen = [*kept, *everything[len(kept) :]]
        handles = []
        for block, keep in zip(Anatomy(model).blocks, chosen, strict=True):
            gate = torch.zeros(48, dtype=torch.float64).index_fill(0, keep, 1)
            layer = block.get_submodule(Anatomy(model).family.mlp.writer)
            handles.append(layer.register_forward_pre_hook(lambda _, x, gate=gate: (x[0] * gate,)))
        a, x = activations(model)[i], inputs_of(model, "mlp", lambda n: n.readers[0])[i]
        for handle in handles:
            handle.remove()
        score = lorap.neuron_scores(readers(model)[i], writers(model)[i], x.square().mean(0), a.square().mean(0))
        kept.append(lorap.keep(score, 0.3))
    assert relative(logits(small), masked(model, kept)) < EXACT


# --- for all of them -----------------------------------------------------------------------------------------------------

PRUNERS = {
    "cfsp": lambda m, r: cfsp.prune(m, token_ids(), r),
    "cfsp uniform": lambda m, r: cfsp.prune(m, token_ids(), r, fine="eq8", coarse=False),
    "flap": lambda m, r: flap.prune(m, token_ids(), r),
    "lorap": lambda m, r: lorap.prune(m, token_ids(), r),
    "wanda-sp": lambda m, r: only(wanda.sweep_neurons(m, token_ids(), [r])),
    "wanda-sp-heads": lambda m, r: only(wanda.sweep_units(m, token_ids(), [r])),
    "magnitude": lambda m, r: only(magnitude.sweep_neurons(m, None, [r])),
    "random": lambda m, r: only(random_neurons.sweep(m, None, [r])),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PRUNERS)
def test_ratio_zero_changes_nothing_and_bad_ratios_are_refused(method, family):
    model = tiny(family)
    assert relative(logits(PRUNERS[method](model, 0.0)), logits(model)) < EXACT
    for ratio in (1.0, -0.1):
        with pytest.raises(ValueError, match="ratio must be"):
            PRUNERS[method](model, ratio)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PRUNERS)
def test_saved_models_reload_with_equal_logits(method, family, tmp_path):
    small = PRUNERS[method](tiny(family, torch.float32), 0.5)
    if getattr(small, "edits", None):
        checkpoint.save(small, None, tmp_path / "small")
        again = checkpoint.load_checkpoint(tmp_path / "small")
        torch.testing.assert_close(logits(again), logits(small))
    else:
        assert len(set(ffn_widths(small))) == 1


def test_cfsp_widths_rounded_to_a_multiple():
    model = tiny("llama")
    assert all(width % 8 == 0 and 8 <= width <= 48 for width in ffn_widths(cfsp.prune(model, token_ids(), 0.4, multiple=8)))
    with pytest.raises(ValueError, match="unknown fine 'wanda': choose one of code, eq8"):
        cfsp.prune(model, token_ids(), 0.4, fine="wanda")
