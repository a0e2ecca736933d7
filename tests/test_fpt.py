"""FPT: an exact search, a rearrangement that sees cancellation, and least squares equal to explicit columns."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.baselines import fpt
from lib.baselines.fpt import Units, masked, rearrange, search, solve
from lib.methods import METHODS
from lib.papers import mask_tuning
from lib.primitives.anatomy import Anatomy, attention_half, mlp_half
from lib.primitives.calibration import ResidualStream
from lib.primitives.cost import count
from lib.primitives.structured import ffn_widths, group_params, kv_groups, neuron_params
from lib.primitives.surgery import shape_shell
from tests.conftest import LAYERS, relative, tiny, token_ids

FAMILIES = ("llama", "qwen2", "qwen3", "opt")


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(seed=9) if ids is None else ids).logits


def loss_of(model, ids, masks):
    """Mean next-token loss of each sequence, in float64."""
    with fpt.all_masked(model, masks), torch.no_grad():
        found = model(ids).logits[:, :-1].double().log_softmax(-1)
    return -found.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_gradients_are_finite_differences(family):
    model, ids = tiny(family), token_ids(3)
    found = fpt.mask_gradients(model, ids, batch=2)
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())  # as they were
    for kind, block, unit in (("groups", 1, 1), ("neurons", 2, 5)):
        values = []
        for step in (1e-5, -1e-5):
            masks = fpt.units_of(model)
            getattr(masks, kind)[block][unit] += step
            values.append(loss_of(model, ids, masks))
        slope = (values[0] - values[1]) / 2e-5
        assert relative(getattr(found, kind)[block][:, unit], slope) < 1e-4


def test_gradients_do_not_depend_on_the_batch():
    model, ids = tiny("llama", torch.float32), token_ids(4)
    one, all_at_once = (fpt.mask_gradients(model, ids, batch=batch) for batch in (1, 4))
    for a, b in zip(one.neurons + one.groups, all_at_once.neurons + all_at_once.groups, strict=True):
        assert relative(a, b) < 1e-4


# --- search ----------------------------------------------------------------------------------------------------------


def parameters(mask, costs):
    return sum(int(m.sum()) for m in mask.groups) * costs[0] + sum(int(m.sum()) for m in mask.neurons) * costs[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_search_is_exact(seed, c):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (2, 2, 17, 18)]
    importance, costs = Units(draw[:2], draw[2:]), (7, 2)
    total = 4 * 7 + 35 * 2
    budget = c * total
    if budget < 2 * 7 + 32 * 2:
        with pytest.raises(ValueError, match="use a lower ratio"):
            search(importance, budget, costs)
        return
    found = search(importance, budget, costs)
    value = sum(float((m * f).sum()) for m, f in zip(found.groups + found.neurons, draw, strict=True))
    assert parameters(found, costs) <= budget
    # Brute force: every choice of groups with one left in each block, and of the 35 neurons any that leaves 16 in each.
    best = -1.0
    ones = [[p for p in itertools.product([0, 1], repeat=len(f)) if sum(p)] for f in draw[:2]]
    most = [[p for p in itertools.product([0, 1], repeat=n - 16)] for n in (17, 18)]
    for groups in itertools.product(*ones):
        spent = 7 * sum(map(sum, groups))
        gain = sum(float((torch.tensor(p) * f).sum()) for p, f in zip(groups, draw, strict=False))
        for extra in itertools.product(*most):
            kept = [16 + sum(p) for p in extra]
            if spent + 2 * sum(kept) <= budget:
                best = max(
                    best, gain + sum(float(f.sort(descending=True).values[:k].sum()) for f, k in zip(draw[2:], kept, strict=True))
                )
    assert value == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.4])
def test_the_budget_is_met_to_within_one_neuron(family, ratio):
    model = tiny(family, torch.float32)
    small = fpt.prune(model, token_ids(), ratio)
    removed, dense = count(model).decoder - count(small).decoder, count(model).decoder
    assert ratio * dense <= removed + 1e-6
    assert removed - ratio * dense < neuron_params(model)
    assert min(ffn_widths(small)) >= 16
    assert min(kv_groups(small)) >= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2, 0.4])
def test_the_size_is_known_before_the_gradients(family, ratio):
    model = tiny(family, torch.float32)
    shape = METHODS["fpt"].shape(model, ratio, fpt.Settings())
    assert shape.device.type == "meta"
    assert abs(count(shape).decoder - count(fpt.prune(model, token_ids(), ratio)).decoder) < neuron_params(model)
    assert count(fpt.shape(shape_shell(model), ratio)).decoder == count(shape).decoder


def test_a_shape_is_refused_as_the_method_is():
    model = tiny("llama", torch.float32)
    for ratio in (0.9, 0.999):
        with pytest.raises(ValueError, match="ratio"):
            fpt.shape(model, ratio)
    with pytest.raises(ValueError, match="tuning=False"):
        fpt.shape(tiny("phi", torch.float32), 0.2)
    assert fpt.shape(tiny("phi", torch.float32), 0.2, fpt.Settings(tuning=False))


def test_ratio_zero_is_the_dense_model_and_impossible_ratios_are_refused():
    model = tiny("llama", torch.float32)
    assert torch.equal(logits(fpt.prune(model, token_ids(), 0.0)), logits(model))
    for ratio in (0.9, 0.999, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"ratio"):
            fpt.sweep(model, token_ids(), [0.1, ratio])  # before anything is iterated


def test_the_teacher_is_searched_at_the_root_of_the_share(monkeypatch):
    model, budgets = tiny("llama", torch.float32), []
    original = fpt.search
    monkeypatch.setattr(fpt, "search", lambda *a: budgets.append(float(a[1])) or original(*a))
    fpt.prune(model, token_ids(), 0.2)
    units = sum(kv_groups(model)) * group_params(model) + sum(ffn_widths(model)) * neuron_params(model)
    assert budgets[-2] == pytest.approx(units - 0.2 * count(model).decoder)
    assert budgets[-1] / units == pytest.approx((budgets[-2] / units) ** 0.5)


# --- rearrangement ---------------------------------------------------------------------------------------------------


def together(gradients, mask):
    return gradients[:, mask == 0].sum(1).square().sum()


def test_opposite_gradients_go_together():
    # The two smallest add up to 2.5, the second and the third to -0.1.
    gradients = torch.tensor([[1.0, 1.5, -1.6, 9.0]])
    assert rearrange(gradients, 2).tolist() == [1, 0, 0, 1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_rearrangement_keeps_the_count_and_is_never_worse(seed, pruned):
    gradients = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = rearrange(gradients, pruned)
    assert int((mask == 0).sum()) == pruned
    start = torch.ones(12)
    start[gradients.square().sum(0).argsort()[:pruned]] = 0
    assert together(gradients, mask) <= together(gradients, start) + 1e-9


def test_rearrangement_is_the_plain_greedy_sweep():
    gradients = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = gradients.square().sum(0).argsort()
    members = order[:6].tolist()
    for candidate in order[6:].tolist():
        members = [*members, candidate]
        costs = [gradients[:, [j for j in members if j != i]].sum(1).square().sum() for i in members]
        members.remove(members[int(torch.stack(costs).argmin())])
    assert sorted(members) == (rearrange(gradients, 6) == 0).nonzero()[:, 0].tolist()


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_solve_is_lsmr_with_damping_one_on_the_normal_matrix():
    from scipy.sparse.linalg import lsmr

    a = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, g = a.T @ a, a.T @ torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by_lsmr = 1 + lsmr(h.numpy(), (g - h.sum(1)).numpy(), damp=1.0, atol=1e-14, btol=1e-14, maxiter=1000)[0]
    assert (solve(h, g, literal=True) - torch.from_numpy(by_lsmr)).abs().max() < 1e-9
    # the default does not depend on the unit of the data, and is close to plain least squares for a sound system
    assert relative(solve(h * 1e6, g * 1e6), solve(h, g)) < 1e-12
    assert relative(solve(h, g), torch.linalg.solve(h, g)) < 1e-2


def test_solve_by_default_is_lsmr_with_a_hundredth_of_the_mean_eigenvalue():
    from scipy.sparse.linalg import lsmr

    generator = torch.Generator().manual_seed(2)
    a = torch.randn(60, 40, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, 40, dtype=torch.float64)
    h, g = a.T @ a, a.T @ torch.randn(60, dtype=torch.float64, generator=generator)
    scale = h.trace() / 40
    right = (g - h.sum(1)) / scale
    by_lsmr = lsmr((h / scale).numpy(), right.numpy(), damp=0.01, atol=1e-15, btol=1e-15, conlim=1e16, maxiter=10_000)[0]
    assert relative(solve(h, g) - 1, torch.from_numpy(by_lsmr)) < 1e-8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_loss_never_rises(seed, literal, scale):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(9, 12, generator=generator, dtype=torch.float64) * scale  # singular: fewer rows than unknowns
    b = torch.randn(9, generator=generator, dtype=torch.float64)
    m = solve(a.T @ a, a.T @ b, literal)
    before = (a.sum(1) - b).norm()
    assert m is None or (a @ m - b).norm() <= before * (1 + 1e-9)


def test_one_unknown_is_solved_directly_and_a_dead_one_is_not_acceptable():
    assert solve(torch.tensor([[2.0]]), torch.tensor([3.0])).item() == 1.5
    assert not fpt.acceptable(solve(torch.zeros(1, 1), torch.ones(1)))
    assert not fpt.acceptable(solve(torch.full((2, 2), float("nan")), torch.ones(2)))


def half_masks(model, seed, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    masks = fpt.units_of(model).map(lambda m: (torch.rand(len(m), generator=generator) < share).to(m))
    for m in masks.groups:
        m[0] = 1
    return masks


def recorded(model, ids, masks, watch):
    """Plain masked forward passes: inputs (before the masks) and outputs of modules, as the whole model runs them."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: found.update(
                {name: (i[0].detach().reshape(*ids.shape, -1), o.detach().reshape(*ids.shape, -1))}
            )
        )
        for name in watch
    ]
    with fpt.all_masked(model, masks), torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_is_least_squares_on_explicit_columns(family, monkeypatch):
    """Block 2's FFN, checked against columns built from two plain forward passes of the whole model."""
    monkeypatch.setattr(mask_tuning, "LARGEST", 1e6)  # random networks ask for large multipliers
    model, ids = tiny(family), token_ids(4)
    family_record = Anatomy(model).family
    student, teacher = half_masks(model, 1), half_masks(model, 2, 0.9)
    tuned = fpt.tune(model, ids, student, teacher)
    assert torch.equal(tuned.groups[0], student.groups[0])  # attention of the first block is not tuned
    assert not torch.equal(tuned.groups[1], student.groups[1])
    block = f"{family_record.blocks}.2"
    norm, writer = f"{block}.{family_record.mlp.norm}", f"{block}.{family_record.mlp.writer}"

    # the student's stream and activations before block 2's FFN with everything tuned up to there, its own FFN unmasked
    def open_at(masks):
        return Units(masks.groups, [*masks.neurons[:2], torch.ones_like(masks.neurons[2])])

    s = recorded(model, ids, open_at(tuned), [norm, writer])
    t = recorded(model, ids, open_at(teacher), [norm, writer])
    layer = model.get_submodule(writer)
    bias = 0 if layer.bias is None else layer.bias
    b = (t[norm][0] + t[writer][1] - bias - s[norm][0])[:, 1:].flatten(0, 1).detach()
    x, kept = s[writer][0][:, 1:].flatten(0, 1), student.neurons[2] != 0
    columns = torch.stack([torch.outer(x[:, i], layer.weight[:, i].detach()).flatten() for i in kept.nonzero()[:, 0]], 1)
    h, g = columns.T @ columns, columns.T @ b.flatten()
    scale = h.trace() / len(h)
    hs, r = h / scale, (g - h.sum(1)) / scale
    stacked = torch.cat([hs, 0.01 * torch.eye(len(h), dtype=h.dtype)])
    expected = 1 + torch.linalg.lstsq(stacked, torch.cat([r, torch.zeros_like(r)])[:, None], driver="gelsd").solution[:, 0]
    assert relative(tuned.neurons[2][kept], expected) < 1e-7
    assert (tuned.neurons[2][~kept] == 0).all()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_blocks_of_a_group_system_are_explicit_columns(family):
    model = tiny(family)
    writer = Anatomy(model).blocks[0].get_submodule(Anatomy(model).family.attention.writer)
    n = kv_groups(model)[0]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, writer.in_features, generator=generator, dtype=torch.float64)
    b = torch.randn(30, writer.out_features, generator=generator, dtype=torch.float64)
    sums = [kind(writer.weight.detach().T, n) for kind in (fpt.WithOnes, mask_tuning.Sums)]
    for one in sums:
        one.add(x[:11], b[:11])
        one.add(x[11:], b[11:])
    w = writer.weight.detach()
    parts = zip(x.split(writer.in_features // n, 1), w.split(writer.in_features // n, 1), strict=True)
    columns = torch.stack([(xi @ wi.T).flatten() for xi, wi in parts] + [torch.ones(b.numel(), dtype=b.dtype)], 1)
    for found, expected in zip(sums[0].normal(), (columns.T @ columns, columns.T @ b.flatten()), strict=True):
        assert relative(found, expected) < 1e-12
    for found, expected in zip(
        sums[1].normal(), (columns[:, :-1].T @ columns[:, :-1], columns[:, :-1].T @ b.flatten()), strict=True
    ):
        assert relative(found, expected) < 1e-12


def test_a_teacher_equal_to_the_student_leaves_the_mask():
    model = tiny("llama")
    ones = fpt.units_of(model)
    tuned = fpt.tune(model, token_ids(), ones, ones)
    for m in tuned.groups + tuned.neurons:
        assert (m - 1).abs().max() < 1e-8


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_do_not_change_the_masks(batch, batches_of):
    model, ids, masks = tiny("opt"), token_ids(5), []
    for k in (batch, 5):
        batches_of(k)
        masks.append(fpt.tune(model, ids, half_masks(model, 1), half_masks(model, 2, 0.9)))
    for a, b in zip(*(m.groups + m.neurons for m in masks), strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_teachers_ffn_runs_once_and_as_exactly_as_twice(family):
    """In bfloat16, where the mask takes a neuron that writes a thousand times what the others do."""
    model, teacher, ids = tiny(family), half_masks(tiny(family), 2, 0.9), token_ids(4)
    anatomy = Anatomy(model)
    block, halves = anatomy.blocks[0], anatomy.family
    teacher.neurons[0][5] = 0
    with torch.no_grad():
        block.get_submodule(halves.mlp.writer).weight[:, 5] *= 1e3
    once, twice = (ResidualStream(model.to(torch.bfloat16), ids) for _ in range(2))
    fpt._advance_teacher(once, 0, attention_half, halves.attention, teacher)
    twice.hidden.copy_(once.hidden)
    whole = mlp_half(block, halves, twice.hidden, next(twice.inputs(0)).kwargs)
    reached = fpt._advance_teacher(once, 0, mlp_half, halves.mlp, teacher)
    with masked(block, anatomy.halves, teacher.groups[0], teacher.neurons[0]):
        twice.advance(mlp_half, 0)
    assert torch.equal(once.hidden, twice.hidden)
    assert relative(reached.double(), whole.double()) < 0.01


def test_an_unacceptable_multiplier_ends_the_tuning():
    model = tiny("llama")
    anatomy, student, kept, gone = Anatomy(model), fpt.units_of(model), 0, 1
    student.neurons[0][5] = 0
    student.neurons[1][gone] = 0
    with torch.no_grad():  # a kept neuron that is the faint twin of a removed one: its best multiplier is 31
        block = anatomy.blocks[1]
        for name in anatomy.family.mlp.readers:
            layer = block.get_submodule(name)
            layer.weight[kept] = layer.weight[gone]
        writer = block.get_submodule(anatomy.family.mlp.writer).weight
        writer[:, gone] *= 30
        writer[:, kept] = writer[:, gone] / 30
    lines = []
    tuned = fpt.tune(model, token_ids(), student, fpt.units_of(model), progress=lines.append)
    assert lines == [
        "tuned block 1 of 3",
        "tuning ends at block 1 mlp.down_proj: no acceptable multipliers; later masks stay binary",
    ]
    assert not torch.equal(tuned.neurons[0], student.neurons[0])  # what was tuned before stays
    assert torch.equal(tuned.neurons[1], student.neurons[1])
    assert (tuned.groups[2] == 1).all()
    assert (tuned.neurons[2] == 1).all()


def test_an_empty_half_is_skipped(monkeypatch):
    monkeypatch.setattr(mask_tuning, "LARGEST", 1e6)
    model, student = tiny("llama"), half_masks(tiny("llama"), 1)
    student.groups[1].zero_()
    student.neurons[1].zero_()
    tuned = fpt.tune(model, token_ids(), student, fpt.units_of(model))
    assert not tuned.groups[1].any()
    assert not tuned.neurons[1].any()
    assert not torch.equal(tuned.neurons[2], student.neurons[2])


# --- the whole method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_and_folded_models_agree(family):
    model = tiny(family)
    masks = half_masks(model, 4)
    masks = masks.map(lambda m: m * torch.linspace(0.5, 2, len(m), dtype=m.dtype))
    folded = fpt.fold(model, masks, masks.map(lambda m: m.nonzero()[:, 0]))
    with fpt.all_masked(model, masks):
        expected = logits(model)
    assert relative(logits(folded), expected) < 1e-9


@pytest.mark.parametrize("literal", [False, True])
def test_tuning_brings_the_outputs_closer(literal):
    model = tiny("llama", torch.float32)
    ids = token_ids(16, 30)
    errors = [
        (logits(fpt.prune(model, ids, 0.3, rearrangement=False, tuning=tuning, literal=literal)) - logits(model)).norm()
        for tuning in (False, True)
    ]
    assert errors[1] < errors[0]


def test_a_sweep_is_runs_of_its_own():
    model, ids = tiny("llama", torch.float32), token_ids()
    for ratio, small in fpt.sweep(model, ids, [0.1, 0.3]):
        assert torch.equal(logits(small), logits(fpt.prune(model, ids, ratio)))


def test_parallel_blocks_are_searched_but_not_tuned():
    model = tiny("phi", torch.float32)
    with pytest.raises(ValueError, match="tuning=False"):
        fpt.prune(model, token_ids(), 0.2)
    assert len(Anatomy(fpt.prune(model, token_ids(), 0.2, tuning=False)).blocks) == LAYERS


def test_masks_of_their_own_for_every_sequence():
    model, ids = tiny("opt"), token_ids(2)
    anatomy = Anatomy(model)
    masks = [half_masks(model, seed) for seed in (1, 2)]
    both = torch.stack([masks[0].neurons[0], masks[1].neurons[0]])
    groups = torch.stack([masks[0].groups[0], masks[1].groups[0]])
    with masked(anatomy.blocks[0], anatomy.halves, groups, both):
        together = logits(model, ids)
    for i in range(2):
        with masked(anatomy.blocks[0], anatomy.halves, masks[i].groups[0], masks[i].neurons[0]):
            assert relative(together[i : i + 1], logits(model, ids[i : i + 1])) < 1e-9
