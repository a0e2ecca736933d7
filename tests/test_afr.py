"""Structured AFR, its unstructured original and LLM-Pruner: identities, brute force, exact counts, and what must be refused."""

import dataclasses

import pytest
import torch
import transformers

from lib.baselines import llm_pruner, snip
from lib.papers import afr, mixtures
from lib.primitives.anatomy import half_names
from lib.primitives.cost import count
from lib.primitives.gradients import summed
from lib.primitives.structured import ffn_widths, kv_groups, remove_groups, remove_neurons, uniform
from lib.primitives.surgery import shape_shell
from lib.suite import claim as judging
from lib.suite import claims
from lib.suite.architectures import meta_model
from tests.conftest import relative, tiny, token_ids

IDS = token_ids(4, 16)
SNIP = afr.Settings(accumulation="sum_grad", scores=("snip",))


def matrices(model, block=0):
    return [model.get_submodule(name).weight.detach() for name in half_names(model)[block]]


# --- identities of the scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["refer", "snip"])
def test_up_and_down_agree_and_gate_has_its_closed_form(score, exact_norms):
    """Specification, section 2.5: Σ W_d g = Σ W_u g = Σ_t a ∂F/∂a, and the gate's sum from activations alone."""
    model, block, seen = tiny("llama"), 1, {}
    mlp = model.model.layers[block].mlp
    names = half_names(model)[block]
    # Features of the projections would add direct terms; what a block returns depends on its MLP through the output alone.
    found = summed(model, IDS[:1], names, scores=(score,), features="block")[score]

    def keep(name):
        def hook(_, inputs, output):
            output.retain_grad()
            seen[name] = output

        return hook

    hooks = [mlp.gate_proj.register_forward_hook(keep("g"))]
    hooks.append(mlp.down_proj.register_forward_pre_hook(lambda _, inputs: keep("a")(_, None, inputs[0])))
    blocks = []
    hooks += [layer.register_forward_hook(lambda _, i, out: blocks.append(out)) for layer in model.model.layers]
    output = model(IDS[:1], labels=IDS[:1])
    scalar = sum(out.norm() for out in blocks) if score == "refer" else output.loss
    scalar.backward()
    for hook in hooks:
        hook.remove()
    taylor = seen["a"] * seen["a"].grad
    g = seen["g"]
    gate = (taylor * (1 + g * (1 - torch.sigmoid(g)))).sum((0, 1))
    tolerance = 1e-5 if score == "snip" else 1e-9  # transformers computes its loss in float32
    assert relative(found[names[2]].sum(0), taylor.sum((0, 1))) < tolerance
    assert relative(found[names[2]].sum(0), found[names[1]].sum(1)) < 1e-9
    assert relative(found[names[0]].sum(1), gate) < tolerance


def test_absolute_only_is_the_taylor_estimate():
    """|mean of sum3| of SNIP is |2 T_j + gate term| / d."""
    model = tiny("llama")
    maps = summed(model, IDS, [n for part in half_names(model) for n in part])["snip"]
    found = afr.neuron_scores(model, IDS, ["absolute only"], SNIP)["absolute only"]["snip"]
    for block, (gate, up, down) in enumerate(half_names(model)):
        expected = (2 * maps[down].sum(0) + maps[gate].sum(1)).abs() / maps[up].shape[1]
        assert relative(found[block], expected) < 1e-9


def test_signed_score_predicts_what_deleting_a_little_of_a_neuron_does(exact_norms):
    """dL/dε of scaling a neuron's output by 1 - ε is -T_j: the premise of the method, by finite differences."""
    model = tiny("llama")
    down = half_names(model)[1][2]
    taylor = summed(model, IDS, [down])["snip"][down].sum(0)
    weight, step = model.get_submodule(down).weight.data, 1e-5

    def loss():
        logits = model(IDS).logits.detach()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item() * len(IDS)

    for j in (0, 7, 30):
        column = weight[:, j].clone()
        values = []
        for sign in (1, -1):
            weight[:, j] = column * (1 + sign * step)
            values.append(loss())
        weight[:, j] = column
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(taylor[j].item(), rel=1e-5, abs=1e-9)


# --- from weights to neurons ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("accumulation", afr.ACCUMULATIONS)
@pytest.mark.parametrize("vector", afr.VECTORS)
def test_aggregations_from_first_principles(family, accumulation, vector):
    model = tiny(family)
    names = half_names(model)
    settings = afr.Settings(vector=vector, accumulation=accumulation)
    plain = ["simple mean", "absolute only", "GMM only", "absolute + GMM", "absolute + winsor", "absolute + trim"]
    found = afr.neuron_scores(model, IDS, plain, settings)
    draws = {"sum_grad": [IDS], "per_sample": IDS.split(1), "one_sample": [IDS[:1]]}[accumulation]
    expected = {name: 0.0 for name in plain}

    def vectors_of(ids):
        maps = summed(model, ids, names[1], scores=("refer",))["refer"]
        parts = [maps[name] for name in names[1][:-1]] + [maps[names[1][-1]].T]
        return {"sum3": [sum(parts)], "pooled": [torch.cat(parts, 1)], "per_matrix": parts, "down_only": parts[-1:]}[vector]

    # The mixtures of the sums say how many scores are outlying: with several sequences, too.
    tails = [mixtures.low_density_tails(x, mixtures.fit(x)) for x in vectors_of(torch.cat(list(draws)))]
    for ids in draws:
        for x, (left, right) in zip(vectors_of(ids), tails, strict=True):
            m = x.shape[1]
            clipped = x.clone()
            for row, (low, high) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
                order = x[row].argsort()
                clipped[row, order[:low]] = x[row, order[max(low - 1, 0)]]
                clipped[row, order[m - high :]] = x[row, order[m - max(high, 1)]]
            ordered, one, two = x.sort(1).values, int(0.01 * m), int(0.02 * m)
            inner = x.clamp(ordered[:, one, None], ordered[:, m - one - 1, None])
            values = [
                x.abs().mean(1), x.mean(1).abs(), clipped.abs().mean(1), clipped.mean(1).abs(), inner.mean(1).abs(),
                ordered[:, two : m - two].mean(1).abs(),
            ]  # fmt: skip
            for name, value in zip(plain, values, strict=True):
                expected[name] = expected[name] + value
    for name in plain:
        assert relative(found[name]["refer"][1], expected[name]) < 1e-6


def test_signs_matter_only_when_the_mean_comes_first():
    x = torch.tensor([[[1.0, -1, 1, -1] * 8, [0.5, 0.5, 0.5, 0.5] * 8]])
    found = afr.aggregate(x, ["simple mean", "absolute only"])
    assert found["simple mean"].tolist() == [1.0, 0.5]
    assert found["absolute only"].tolist() == [0.0, 0.5]


def test_standards():
    values = [torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 100])]
    flat = torch.cat(values)
    z = torch.cat(afr.STANDARDS["model"](values))
    assert relative(z, (flat - flat.mean()) / flat.std(correction=0)) < 1e-6
    assert all(abs(part.mean()) < 1e-6 for part in afr.STANDARDS["block"](values))
    assert torch.cat(afr.STANDARDS["rank"](values)).tolist() == pytest.approx([i / 6 for i in range(6)])
    assert torch.cat(afr.STANDARDS["robust"](values))[2].item() == pytest.approx(-0.5 / 2.5)
    for rule in afr.STANDARDS.values():
        assert torch.isfinite(torch.cat(rule([torch.zeros(3), torch.zeros(2)]))).all()


def test_combination_and_power():
    parts = {"refer": [torch.tensor([1.0, 2, 3, 4])], "snip": [torch.tensor([4.0, 1, 2, 3])]}
    second = afr.combine(parts, snip_power=2)[0]
    expected = afr.standardise(parts["refer"])[0] + afr.standardise([parts["snip"][0] ** 2])[0]
    assert relative(second, expected) < 1e-6


@pytest.mark.parametrize("stage", ["weight_signed", "weight_abs"])
def test_standardising_weights_before_neurons(stage):
    model = tiny("llama")
    vectors = afr.summed_vectors(model, IDS, afr.Settings())
    total = []
    for values in vectors.values():
        flat = torch.stack([v.abs() if stage == "weight_abs" else v for v in values])
        total.append((flat - flat.mean()) / flat.std(correction=0))
    expected = (total[0] + total[1]).mean(-1).abs()
    found = afr.scores(model, IDS, ["absolute only"], afr.Settings(stage=stage, accumulation="sum_grad"))["absolute only"]
    order = afr.standardise([e[0] for e in expected])
    assert max(relative(a, b) for a, b in zip(found, order, strict=True)) < 1e-6


def test_presets_differ_and_name_existing_settings():
    model = tiny("llama")
    chosen = {}
    for preset, settings in afr.PRESETS.items():
        found = afr.scores(model, IDS, [settings.aggregation], settings)[settings.aggregation]
        assert [len(score) for score in found] == ffn_widths(model)
        chosen[preset] = torch.cat(uniform(found, 0.5))
    assert not torch.equal(chosen["paper"], chosen["code_2025_10"])
    assert not torch.equal(chosen["code_2025_10"], chosen["code_2026_02"])


def test_one_run_serves_all_aggregations_and_vectors_can_be_reused():
    model = tiny("llama")
    together = afr.scores(model, IDS, afr.PAPER)
    for name in afr.PAPER:
        alone = afr.scores(model, IDS, [name])[name]
        assert all(torch.equal(a, b) for a, b in zip(together[name], alone, strict=True))
    vectors = afr.summed_vectors(model, IDS, afr.Settings())
    again = afr.neuron_scores(model, IDS, afr.PAPER, vectors=vectors)
    direct = afr.neuron_scores(model, IDS, afr.PAPER)
    assert all(torch.equal(again[n]["snip"][0], direct[n]["snip"][0]) for n in afr.PAPER)


# --- the pruned model -----------------------------------------------------------------------------------------------------


def test_many_settings_share_their_backward_passes(monkeypatch):
    """What each gives alone, from one run for each way to stream and to add up."""
    model, ids = tiny("llama"), token_ids()
    changes = {
        "base": {"aggregation": "absolute only", "accumulation": "sum_grad"},
        "simple": {"aggregation": "simple mean", "accumulation": "sum_grad"},
        "one score": {"aggregation": "absolute only", "accumulation": "sum_grad", "scores": ("snip",)},
        "ranks": {"aggregation": "absolute only", "accumulation": "sum_grad", "z": "rank", "snip_power": 2},
        "weights": {"aggregation": "absolute only", "accumulation": "sum_grad", "stage": "weight_signed"},
        "weights of one score": {
            "aggregation": "simple mean", "accumulation": "sum_grad", "stage": "weight_abs", "scores": ("refer",),
        },
        "per sample": {"aggregation": "absolute only"},
        "one score per sample": {"aggregation": "simple mean", "scores": ("refer",)},
        "tokens": {"aggregation": "absolute only", "view": "token"},
    }  # fmt: skip
    alone = {name: afr.scores(model, ids, [c["aggregation"]], afr.Settings(**c))[c["aggregation"]] for name, c in changes.items()}
    runs, real = [], afr.each_vector
    monkeypatch.setattr(afr, "each_vector", lambda *a, **k: runs.append(a) or real(*a, **k))
    found = afr.scores_under(model, ids, {name: afr.settings_of(**c) for name, c in changes.items()})
    assert list(found) == list(changes)
    for name, blocks in found.items():
        for ours, expected in zip(blocks, alone[name], strict=True):
            torch.testing.assert_close(ours, expected)
    assert len(runs) == 3  # sums, single sequences, another view


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi"])
def test_removal_equals_masking(family, exact_norms):
    model = tiny(family)
    small = afr.prune(model, IDS, 0.25)
    name = afr.Settings().aggregation
    keep = uniform(afr.scores(model, IDS, [name])[name], 0.25)
    gone = [torch.ones(n, dtype=torch.bool).index_fill(0, k, False) for n, k in zip(ffn_widths(model), keep, strict=True)]
    expected_small = small(IDS).logits.detach()
    with torch.no_grad():
        for block, mask in enumerate(gone):
            model.get_submodule(half_names(model)[block][-1]).weight[:, mask] = 0
    assert relative(expected_small, model(IDS).logits.detach()) < 1e-10
    assert ffn_widths(small) == [36] * 3


def test_result_is_a_stock_model_that_plain_transformers_loads(tmp_path):
    model = tiny("llama", torch.float32)
    small = afr.prune(model, IDS, 0.5)
    assert not getattr(small, "edits", [])
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 24
    assert torch.equal(again(IDS).logits, small(IDS).logits)


def test_dense_model_is_untouched_and_ratio_zero_keeps_everything():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = afr.prune(model, IDS, 0.0)
    assert torch.equal(same(IDS).logits, model(IDS).logits)
    afr.prune(model, IDS, 0.5, attention=0.5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_extras_global_protected_attention():
    model = tiny("llama")
    free = afr.prune(model, IDS, 0.5, allocation="global")
    assert sum(ffn_widths(free)) == sum(ffn_widths(model)) // 2
    assert len(set(ffn_widths(free))) > 1
    assert ffn_widths(afr.prune(model, IDS, 0.5, protect=(0,))) == [48, 24, 24]
    assert kv_groups(afr.prune(model, IDS, 0.5, attention=0.5)) == [1] * 3


def test_group_scores_pool_all_matrices_of_a_group():
    model = tiny("llama")  # 4 query heads, 2 groups, head size 12
    names = half_names(model, "attention")[0]
    maps = summed(model, IDS, names)["snip"]
    q, k, v, o = (maps[name] for name in names)
    group = torch.cat([q[24:].flatten(), k[12:].flatten(), v[12:].flatten(), o[:, 24:].flatten()])
    found = afr.neuron_scores(model, IDS, ["absolute only"], SNIP, half="attention")["absolute only"]["snip"][0]
    assert found[1].item() == pytest.approx(group.mean().abs().item(), rel=1e-9)


@pytest.mark.parametrize(("ratio", "params"), [(0.0, 8_030_261_248), (0.2, 6_902_517_760), (0.5, 5_211_688_960)])
def test_llama_3_8b_has_the_papers_sizes(ratio, params):
    model = meta_model("Llama-3-8B")
    keep = uniform([torch.arange(float(n)) for n in ffn_widths(model)], ratio)
    assert count(remove_neurons(shape_shell(model), keep, inplace=True)).params == params


# --- edge cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "median"}, "unknown aggregation"),
        ({"vector": "sum2"}, "unknown vector"),
        ({"z": "column"}, "unknown z"),
        ({"snip_power": 3}, "unknown snip_power"),
        ({"allocation": "best"}, "unknown allocation"),
        ({"allocation": "global", "protect": (0,)}, "uniform"),
        ({"stage": "weight_signed"}, "sum_grad"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        afr.Settings(**settings)
    with pytest.raises(ValueError, match="unknown preset"):
        afr.settings_of("code")


def test_bad_ratios_and_texts():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        afr.prune(model, IDS, 1.0)
    with pytest.raises(ValueError, match="leaves none"):
        afr.prune(model, IDS, 0.99)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        afr.prune(model, IDS[:, :1], 0.5)
    with pytest.raises(ValueError, match="unknown aggregation"):
        afr.neuron_scores(model, IDS, ["mode"])


def test_a_dead_neuron_is_removed_first_unless_projections_are_features():
    """What a projection puts out is a feature whether anything reads it or not: it pays ‖g_j‖² / ‖G‖ for a dead neuron."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[5] = 0
            block.mlp.down_proj.weight[:, 5] = 0
    for name, score in afr.scores(model, IDS, afr.PAPER, afr.Settings(features="mlp")).items():
        assert all(int(part.argmin()) == 5 for part in score), name
    settings = afr.Settings(scores=("refer",))
    outputs = []
    hook = model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda _, i, out: outputs.append(out.detach()[0]))
    for one in IDS.split(1):
        model(one)
    hook.remove()
    found = afr.neuron_scores(model, IDS, ["absolute only"], settings)["absolute only"]["refer"][1][5]
    assert found.item() == pytest.approx(sum(g[:, 5].square().sum() / g.norm() for g in outputs).item() / 32, rel=1e-6)


# --- unstructured ---------------------------------------------------------------------------------------------------------


def test_unstructured_scores_and_threshold():
    model = tiny("llama")
    names = [n for part in half_names(model) for n in part]
    maps = [{k: v.abs() for k, v in summed(model, one, names, scores=("refer", "snip"))["refer"].items()} for one in IDS.split(1)]
    refer = torch.cat([sum(m[name] for m in maps).flatten() for name in names])
    found = torch.cat([s.flatten() for s in snip.weight_scores(model, IDS, ("refer",))])
    assert relative(found, (refer - refer.mean()) / refer.std(correction=0)) < 1e-9
    both = torch.cat([s.flatten() for s in snip.weight_scores(model, IDS)])
    only = torch.cat([s.flatten() for s in snip.weight_scores(model, IDS, ("snip",))])
    assert relative(both, found + only) < 1e-9
    small = snip.prune(model, IDS, 0.3)
    kept = torch.cat([small.get_submodule(name).weight.flatten() != 0 for name in names])
    assert int((~kept).sum()) == int(0.3 * len(kept))
    assert both[kept].min() >= both[~kept].max()
    assert torch.equal(small.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(ValueError, match="sparsity"):
        snip.prune(model, IDS, 1.0)


# --- LLM-Pruner -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", llm_pruner.IMPORTANCES)
def test_llm_pruner_from_first_principles(importance):
    model = tiny("llama")
    mlp, attention = half_names(model)[1], half_names(model, "attention")[1]
    single = [summed(model, one, mlp + attention)["snip"] for one in IDS.split(1)]

    def effect(name):
        first = sum(s[name] for s in single) / len(IDS)
        second = sum(s[name].square() for s in single) / len(IDS)
        return {"first": first, "second": second, "mix": first - 0.5 * second, "vector": first}[importance]

    def unit(rows):
        return rows.sum(1).abs() if importance == "vector" else rows.abs().sum(1)

    gate, up, down = (effect(name) for name in mlp)
    expected = unit(gate) + unit(up) + unit(down.T)
    assert relative(llm_pruner.unit_scores(model, IDS, importance)[1], expected) < 1e-9
    q, k, v, o = (effect(name) for name in attention)
    heads = (unit(q) + unit(o.T)).view(4, 12).sum(1)
    own = (unit(k) + unit(v)).view(2, 12).sum(1)
    for fold, sets in (("neighbours", [[0, 1], [2, 3]]), ("strided", [[0, 2], [1, 3]])):
        found = llm_pruner.unit_scores(model, IDS, importance, "attention", fold)[1]
        assert relative(found, own + torch.stack([heads[s].sum() for s in sets])) < 1e-9


def test_vector_and_absolute_only_differ_by_where_the_absolute_value_is():
    model = tiny("llama")
    maps = summed(model, IDS, half_names(model)[0])["snip"]
    gate, up, down = (maps[name] for name in half_names(model)[0])
    vector = llm_pruner.unit_scores(model, IDS, "vector")[0] * len(IDS)
    assert relative(vector, gate.sum(1).abs() + 2 * down.sum(0).abs()) < 1e-9
    assert relative(up.sum(1), down.sum(0)) < 1e-9


def test_llm_pruner_reads_the_whole_batch_sequence_by_sequence(monkeypatch, exact_norms):
    """The same score as from one backward pass of all of it, with one sequence in memory at a time."""
    model, ids = tiny("llama"), token_ids(6, 12)
    names = half_names(model)[1]
    for name in names:
        model.get_submodule(name).weight.requires_grad_()
    logits = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    effects = [layer.weight.detach() * layer.weight.grad for layer in map(model.get_submodule, names)]
    model.zero_grad()
    seen, real = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: seen.append(len(k["input_ids"])) or real(self, *a, **k))
    for importance, reduce in (("first", lambda e, d: e.abs().sum(d)), ("vector", lambda e, d: e.sum(d).abs())):
        gate, up, down = (reduce(effect, 0 if i == 2 else 1) for i, effect in enumerate(effects))
        assert relative(llm_pruner.unit_scores(model, ids, importance)[1], gate + up + down) < 1e-9
    assert set(seen) == {1}


def test_llm_pruner_keeps_six_blocks_of_32_whole():
    assert llm_pruner.protected(32) == [0, 1, 2, 3, 30, 31]
    assert llm_pruner.protected(18) == [0, 1, 17]
    assert llm_pruner.protected(8) == [0, 7]
    assert llm_pruner.protected(3) == [0]
    assert llm_pruner.protected(2) == []
    for blocks in range(1, 200):
        spared = llm_pruner.protected(blocks)
        assert abs(len(spared) - 6 / 32 * blocks) <= 0.5
        assert len(set(spared)) == len(spared) < blocks
        assert abs(sum(block >= blocks / 2 for block in spared) - len(spared) / 3) <= 0.5


def test_llm_pruner_block_range_and_counts():
    model = tiny("llama")
    small = llm_pruner.prune(model, IDS, 0.5, samples=2, length=8)
    assert ffn_widths(small) == [48, 24, 24]
    assert kv_groups(small) == [2, 1, 1]
    assert kv_groups(llm_pruner.prune(model, IDS, 0.4)) == [2, 2, 2]  # 0.4 of 2 groups is none
    assert kv_groups(llm_pruner.prune(model, IDS, 0.5, attention=False)) == [2, 2, 2]
    assert ffn_widths(llm_pruner.prune(model, IDS, 0.5, attention=False, protect=())) == [24] * 3
    for wrong, message in (
        ({"importance": "third"}, "unknown importance"), ({"fold": "zigzag"}, "unknown fold"),
        ({"samples": 0}, "samples is 0: give a whole number of at least 1 or null"),
        ({"length": 1}, "length is 1: give a whole number of at least 2 or null"),
        ({"protect": (3,)}, "cannot protect block 3: the model has blocks 0 to 2"), ({"protect": (-1,)}, "protect is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llm_pruner.prune(model, IDS, 0.5, **wrong)
    with pytest.raises(ValueError, match="ratio"):
        llm_pruner.prune(model, IDS, 1.5)


def test_llm_pruner_on_llama_3_8b_leaves_the_sizes_of_the_reference():
    """Blocks 4-29, where 0.2 is 2,868 neurons but only one of eight groups: 6.978 B and 5.195 B of 8.030 B stay."""
    model = meta_model("Llama-3-8B")
    for ratio, params in ((0.2, 6_977_654_784), (0.5, 5_194_911_744)):
        keep = llm_pruner.choose([torch.zeros(n) for n in ffn_widths(model)], ratio, llm_pruner.protected(32))
        heads = llm_pruner.choose([torch.zeros(n) for n in kv_groups(model)], ratio, llm_pruner.protected(32), whole=True)
        small = remove_groups(remove_neurons(shape_shell(model), keep, inplace=True), heads, inplace=True)
        assert count(small).params == params


def test_counted_claims_of_the_paper():
    """Sizes are the printed ones; of two sizes in memory one is: 13.81 GB for 13.08."""
    verdicts = {}
    for claim in claims.CLAIMS["afr"]:
        if claim.measure is not None and claim.where == "Table 4":
            found = claim.measure(judging.Evidence([{"settings": {"model": "tiny"}}]), "tiny")
            verdicts[claim.printed] = judging.judge(found, claim.range)
    contradicted = {"13.08 GB"}
    assert verdicts.keys() == {"6.90 billion", "5.21 billion", "13.08 GB", "10.42 GB"}
    assert {printed for printed, verdict in verdicts.items() if verdict == judging.CONTRADICTED} == contradicted
    assert {v for printed, v in verdicts.items() if printed not in contradicted} == {judging.REPRODUCED}


def test_claims_quote_the_paper():
    printed = [claim.printed for claim in claims.CLAIMS["afr"]]
    assert "mean accuracy of five tasks, recomputed: absolute + GMM 61.38, LoRAP 60.27" in printed
    assert "mean accuracy of five tasks, recomputed: absolute + GMM 42.84, LoRAP 38.75" in printed


def test_settings_are_plain_values():
    """They go into ledgers and records as JSON."""
    for settings in afr.PRESETS.values():
        assert all(isinstance(v, str | int | float | bool | tuple) for v in dataclasses.asdict(settings).values())
