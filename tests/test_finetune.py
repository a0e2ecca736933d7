"""Recovery fine-tuning: the adapters are those that were asked for, training is what it says, and only weights change."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from lib.evaluation.perplexity import perplexity
from lib.models.checkpoint import load_checkpoint, save
from lib.papers.slicegpt import slice_model
from lib.primitives.anatomy import Anatomy
from lib.primitives.finetune import LoRA, linear_layers, mean_loss, merge, rate, recover, with_adapters
from lib.primitives.surgery import shell
from tests.conftest import LAYERS, relative, tiny, token_ids

QUICK = dict(rank=4, warmup=1, steps=4, batch=3, lr=3e-3, evaluate_every=2)
LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
OPT = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")


def sliced(family="llama", dtype=torch.float32, layout="low-rank", slice_head=True):
    return slice_model(tiny(family, dtype), token_ids(), 0.25, round_interval=1, layout=layout, slice_head=slice_head)


MODELS = {
    "dense llama": lambda: tiny("llama", torch.float32),
    "sliced opt, tied table": lambda: slice_model(
        tiny("opt", torch.float32, tie_word_embeddings=True), token_ids(), 0.25, layout="tied"
    ),
    "dense opt, tied": lambda: tiny("opt", torch.float32, tie_word_embeddings=True),
    **{
        f"{family}, {layout}, {'sliced' if head else 'whole'} head": lambda f=family, la=layout, h=head: sliced(
            f, layout=la, slice_head=h
        )
        for family in ("llama", "opt")
        for layout in ("low-rank", "dense")
        for head in (True, False)
    },
}


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(seed=9) if ids is None else ids).logits


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of the tensors that differ from `before`; their names must be the same."""
    after = model.state_dict()
    assert list(before) == list(after)
    return {name for name in after if not torch.equal(before[name], after[name])}


def weights(names):
    return {f"{name}.weight" for name in names}


def randomise(adapted):
    """B is zero at first, and a zero hides every mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return adapted


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"), [("llama", LLAMA), ("qwen3", LLAMA), ("gemma3_text", LLAMA), ("opt", OPT)], ids=lambda x: str(x)[:8]
)
def test_all_linear_layers_of_the_blocks_and_nothing_else(family, names):
    model = tiny(family)
    blocks = Anatomy(model).family.blocks
    assert linear_layers(model) == [f"{blocks}.{i}.{name}" for i in range(LAYERS) for name in names]


def test_targets_are_parts_of_names():
    model = tiny("llama")
    chosen = linear_layers(model, ("q_proj", "mlp"))
    parts = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert chosen == [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in parts]
    assert linear_layers(model, ["layers.1.self_attn.o_proj"]) == ["model.layers.1.self_attn.o_proj"]


def test_a_layer_that_computes_more_than_a_product_cannot_be_merged_and_is_left_out():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.__class__ = Doubling
    every = linear_layers(tiny("llama"))
    assert linear_layers(model) == [name for name in every if name != "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("targets", [["proj"], ["q_proj", "attn_shortcut_Q"], ["lm_head"], ["mlp.q_proj"], "q_proj"])
def test_targets_that_choose_nothing_are_refused_with_what_there_is(targets):
    with pytest.raises(ValueError, match=r"no linear layer is called .*self_attn\.q_proj, .*mlp\.down_proj"):
        recover(tiny("llama"), token_ids(), LoRA(**QUICK), targets=targets)


def test_no_targets_at_all():
    with pytest.raises(ValueError, match="nothing to train"):
        recover(tiny("llama"), token_ids(), LoRA(**QUICK), targets=[])


@pytest.mark.parametrize("kind", MODELS)
def test_every_target_has_an_adapter_and_receives_gradient(kind):
    model = MODELS[kind]()
    names = linear_layers(model)
    adapted = with_adapters(model, names, LoRA(rank=3))
    assert [name for name, m in adapted.named_modules() if hasattr(m, "lora_A")] == names
    randomise(adapted)
    mean_loss(adapted, token_ids()).backward()
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert (p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad
    assert {len(p) for n, p in adapted.named_parameters() if "lora_A" in n} == {3}


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact_norms")
def test_training_is_adamw_on_the_low_rank_change():
    """Three steps against AdamW, clipping and schedule written out, on a dense model with weights W + (α/r) B A."""
    model, ids = tiny("llama"), token_ids()
    settings = LoRA(rank=4, alpha=40, dropout=0.0, lr=0.01, warmup=1, steps=3, batch=len(ids), weight_decay=0.1, seed=5)
    ours = recover(model, ids, settings).model.state_dict()

    torch.manual_seed(settings.seed)
    names = linear_layers(model)
    adapted = with_adapters(model, names, settings)
    p = [adapted.get_submodule(name).lora_A["default"].weight.detach().clone().requires_grad_() for name in names]
    p += [adapted.get_submodule(name).lora_B["default"].weight.detach().clone().requires_grad_() for name in names]
    frozen = {name: value.detach() for name, value in model.state_dict().items()}

    def updated():
        a, b = p[: len(names)], p[len(names) :]
        return {f"{n}.weight": frozen[f"{n}.weight"] + 40 / 4 * b[i] @ a[i] for i, n in enumerate(names)}

    m, v = [0.0] * len(p), [0.0] * len(p)
    for t, lr in enumerate((0.005, 0.01, 0.005), start=1):  # one step of warm-up, then a line to zero
        out = torch.func.functional_call(model, frozen | updated(), (ids,)).logits
        chosen = out[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        grads = torch.autograd.grad(-chosen.mean(), p)
        norm = sum(g.square().sum() for g in grads).sqrt()
        assert norm > 1  # clipping is at work
        for i, g in enumerate(grad / norm for grad in grads):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            step = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            p[i] = (p[i] * (1 - lr * 0.1) - lr * step).detach().requires_grad_()
    for name, value in updated().items():
        assert relative(ours[name], value) < 1e-5  # the norm that clips has 1e-6 added to it in torch
        assert relative(ours[name] - frozen[name], value - frozen[name]) < 1e-4


def test_the_schedule_is_that_of_the_steps_that_run(monkeypatch):
    assert [rate(step, 3, 10) for step in range(10)] == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    )
    assert [rate(step, 0, 2) for step in range(2)] == [1, 0.5]
    rates, step = [], torch.optim.AdamW.step

    def spied(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    recover(tiny("llama", torch.float32), token_ids(7), LoRA(batch=2, warmup=1, lr=0.1))  # one pass: four steps, one short
    assert rates == pytest.approx([0.05, 0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_every_sequence_once_a_pass(monkeypatch):
    seen = []
    monkeypatch.setattr("lib.primitives.finetune.mean_loss", lambda model, ids: seen.append(ids) or mean_loss(model, ids))
    ids = token_ids(7)
    recover(tiny("llama", torch.float32), ids, LoRA(batch=2, warmup=1, steps=8))
    passes = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert [sorted(p.tolist()) for p in passes] == [sorted(ids.tolist())] * 2
    assert not torch.equal(*passes)  # in another order


def test_dropout_works_while_training_and_only_then(monkeypatch):
    modes = []

    def spied(model, ids):
        modes.append((torch.is_grad_enabled(), {m.training for m in model.modules() if isinstance(m, nn.Dropout)}))
        return mean_loss(model, ids)

    monkeypatch.setattr("lib.primitives.finetune.mean_loss", spied)
    recover(tiny("llama", torch.float32), token_ids(), LoRA(**QUICK), validation=token_ids(3))
    assert [learns for learns, _ in modes] == [False, True, True, False, True, True, False]
    assert all(active == {learns} for learns, active in modes)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_on_the_training_tokens_falls(kind):
    model, ids = MODELS[kind](), token_ids()
    before = perplexity(model, ids.flatten(), 20).perplexity
    recovered = recover(model, ids, LoRA(lr=0.01, warmup=2, steps=12, batch=6, evaluate_every=4))
    losses = [row["train_loss"] for row in recovered.history]
    assert [row["step"] for row in recovered.history] == [4, 8, 12]
    assert losses == sorted(losses, reverse=True)
    assert perplexity(recovered.model, ids.flatten(), 20).perplexity < 0.8 * before


@pytest.mark.parametrize("kind", [k for k in MODELS if "head" in k] + ["dense llama"])
def test_checkpointing_does_not_change_a_gradient(kind):
    """Blocks are run again in the backward pass, where norm and writer of a sliced block exchange the residual again."""
    model, grads = MODELS[kind]().double(), []
    for gradient_checkpointing in (False, True):
        settings = LoRA(rank=4, dropout=0.2, gradient_checkpointing=gradient_checkpointing)
        torch.manual_seed(0)
        adapted = randomise(with_adapters(model, linear_layers(model), settings)).train()
        for ids in (token_ids(seed=4), token_ids(4, 11)):  # the second after a backward pass that left things behind
            mean_loss(adapted, ids).backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(relative(one, two) < 1e-12 for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["dense llama", "llama, low-rank, whole head"])
def test_checkpointing_keeps_less(kind):
    model, ids, kept = MODELS[kind](), token_ids(), []
    for gradient_checkpointing in (False, True):
        adapted = with_adapters(model, linear_layers(model), LoRA(gradient_checkpointing=gradient_checkpointing)).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            mean_loss(adapted, ids)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", MODELS)
def test_merged_is_unmerged(kind):
    """Logits with adapters, with W + (α/r) B A put by hand into a copy, and after `merge`: the same function."""
    model = MODELS[kind]().double()
    names = linear_layers(model)
    adapted = randomise(with_adapters(model, names, LoRA(rank=5, alpha=10)).eval())
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            layer = adapted.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            by_hand.get_submodule(name).weight += 2 * torch.einsum("or,ri->oi", b, a)
    expected = logits(adapted)
    assert relative(expected, logits(model)) > 0.01
    assert relative(logits(by_hand), expected) < 1e-10
    merged = shell(model)
    merge(adapted, names, merged)
    assert relative(logits(merged), expected) < 1e-10


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_targets_change_and_the_given_model_does_not(kind):
    model = MODELS[kind]()
    model.lm_head.requires_grad_(False)
    first = linear_layers(model)[0]
    model.get_submodule(first).requires_grad_(False)
    before, parameters = bits(model), dict(model.named_parameters())
    flags, modes = {name: p.requires_grad for name, p in parameters.items()}, [m.training for m in model.modules()]
    recovered = recover(model, token_ids(), LoRA(**QUICK), validation=token_ids(3, seed=2)).model

    assert changed(before, model) == set()
    assert all(p is parameters[name] and p.grad is None for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes

    assert changed(before, recovered) == weights(linear_layers(model))
    assert not [name for name in changed(before, recovered) if name.endswith("shortcut")]
    assert {name: p.requires_grad for name, p in recovered.named_parameters()} == flags
    assert [(n, type(m)) for n, m in recovered.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert not [m for m in recovered.modules() if m.training or type(m).__module__.startswith("peft")]
    assert set(vars(recovered)) == set(vars(model))
    assert recovered.config.to_dict() == model.config.to_dict()
    copy.deepcopy(recovered)  # a stored activation could not be copied
    merged = {name: p.data_ptr() for name, p in recovered.named_parameters() if name in weights(linear_layers(model))}
    assert set(merged.values()).isdisjoint(p.data_ptr() for p in model.parameters())
    with torch.no_grad():  # even writing into the merged weights afterwards
        for name in merged:
            recovered.get_parameter(name).zero_()
    assert changed(before, model) == set()


@pytest.mark.parametrize("kind", ["dense llama", "opt, low-rank, sliced head"])
def test_in_place_changes_the_model_but_not_those_that_share_its_tensors(kind):
    model = MODELS[kind]()
    sharing, before = shell(model), bits(model)
    apart = recover(model, token_ids(), LoRA(**QUICK)).model
    result = recover(model, token_ids(), LoRA(**QUICK), inplace=True).model
    assert result is model
    assert changed(bits(apart), model) == set()
    assert changed(before, model) == weights(linear_layers(model))
    assert changed(before, sharing) == set()


def test_a_failed_run_in_place_changes_nothing():
    model = MODELS["dense llama"]()
    before = bits(model)
    with pytest.raises(ValueError, match=r"is (nan|inf) at step \d+: lower the learning rate \(1e\+30\)"):
        recover(model, token_ids(), LoRA(**QUICK | dict(lr=1e30)), inplace=True)
    assert changed(before, model) == set()
    assert all(p.requires_grad for p in model.parameters())
    assert not [m for m in model.modules() if m.training or type(m).__module__.startswith("peft")]


def test_left_factors_then_right_factors():
    """The sequential update of SVD-LLM: each round leaves the other factor bit for bit, and the rank of the product."""

    class Factors(nn.Module):
        def __init__(self, layer, k):
            super().__init__()
            left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            self.u, self.v = nn.Linear(k, layer.out_features, bias=False), nn.Linear(layer.in_features, k, bias=False)
            self.u.weight, self.v.weight = nn.Parameter(left[:, :k] * values[:k]), nn.Parameter(right[:k].clone())

        def forward(self, x):
            return self.u(self.v(x))

    model = tiny("llama", torch.float32)
    dense = linear_layers(model)
    for name in dense:
        model.set_submodule(name, Factors(model.get_submodule(name), 6))
    for factor in ("u", "v"):
        before = bits(model)
        recover(model, token_ids(), LoRA(**QUICK), targets=[factor], inplace=True)
        assert changed(before, model) == {f"{name}.{factor}.weight" for name in dense}
    both = recover(model, token_ids(), LoRA(**QUICK), targets=["q_proj"]).model
    assert changed(bits(model), both) == {f"{n}.{f}.weight" for n in dense if "q_proj" in n for f in "uv"}


# --- validation ------------------------------------------------------------------------------------------------------


def test_the_best_step_is_kept():
    model, held_out = tiny("llama", torch.float32), token_ids(4, seed=2)
    said = []
    settings = LoRA(rank=8, lr=0.05, warmup=3, steps=12, batch=6, evaluate_every=3, dropout=0.0)
    recovered = recover(model, held_out, settings, validation=held_out, progress=said.append)  # at first it helps, surely
    rows = {row["step"]: row for row in recovered.history}
    assert list(rows) == [0, 3, 6, 9, 12]
    assert rows[0]["train_loss"] is None
    assert rows[0]["validation_loss"] == pytest.approx(math.log(perplexity(model, held_out.flatten(), 20).perplexity), rel=1e-5)
    best = min(rows.values(), key=lambda row: row["validation_loss"])
    assert recovered.step == best["step"] > 0
    reached = math.log(perplexity(recovered.model, held_out.flatten(), 20).perplexity)
    assert reached == pytest.approx(best["validation_loss"], rel=1e-5)
    assert len(said) == 5
    assert f"step 12 of 12: training loss {rows[12]['train_loss']:.3f}, validation" in said[-1]


def test_an_early_best_is_restored():
    """Random tokens cannot be learnt, only memorised: the loss on others rises, and the run stops and goes back."""
    model = tiny("llama", torch.float32)
    settings = LoRA(rank=8, lr=0.02, warmup=1, steps=200, batch=6, evaluate_every=1, patience=3)
    recovered = recover(model, token_ids(), settings, validation=token_ids(4, seed=2))
    losses = [row["validation_loss"] for row in recovered.history]
    best = losses.index(min(losses))
    assert 0 < best == recovered.step < 100
    assert len(losses) == best + 1 + 3
    reached = math.log(perplexity(recovered.model, token_ids(4, seed=2).flatten(), 20).perplexity)
    assert reached == pytest.approx(min(losses), rel=1e-5)


def test_a_recovery_that_only_harms_is_undone():
    model = tiny("llama", torch.float32)
    recovered = recover(
        model, token_ids(), LoRA(**QUICK | dict(lr=1.0, steps=50, patience=2, warmup=0)), validation=token_ids(4, seed=2)
    )
    assert recovered.step == 0
    assert [row["step"] for row in recovered.history] == [0, 2, 4]
    assert changed(bits(model), recovered.model) == set()


# --- dtypes, seeds, folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_at_least_float32(dtype):
    model = sliced("llama", torch.float64).to(dtype)
    adapted = with_adapters(model, linear_layers(model), LoRA(rank=4))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {wanted}
    assert mean_loss(adapted, token_ids()).dtype == wanted
    recovered = recover(model, token_ids(), LoRA(lr=0.01, warmup=2, steps=12, batch=6, evaluate_every=4))
    assert recovered.model.dtype == dtype
    assert recovered.history[-1]["train_loss"] < 0.95 * recovered.history[0]["train_loss"]
    ids = token_ids()
    assert perplexity(recovered.model, ids.flatten(), 20).perplexity < perplexity(model, ids.flatten(), 20).perplexity


def test_the_seed_decides_and_the_callers_random_state_is_left_alone():
    model, settings = tiny("opt", torch.float32), QUICK | dict(dropout=0.3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = recover(model, token_ids(), LoRA(**settings)).model
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = recover(model, token_ids(), LoRA(**settings)).model
    other = recover(model, token_ids(), LoRA(**settings, seed=1)).model
    assert changed(bits(one), two) == set()
    assert changed(bits(one), other) == weights(linear_layers(model))


@pytest.mark.parametrize("kind", [k for k in MODELS if "head" in k])
def test_saved_and_loaded_are_the_same_bits(tmp_path, kind):
    recovered = recover(MODELS[kind](), token_ids(), LoRA(**QUICK)).model
    again = load_checkpoint(save(recovered, None, tmp_path / "m", recovery=LoRA(**QUICK).record()))
    assert changed(bits(recovered), again) == set()
    assert torch.equal(logits(again), logits(recovered))
    assert again.edits == recovered.edits
    with pytest.raises(NotImplementedError, match="checkpoint.save"):
        recovered.save_pretrained(tmp_path / "n")
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    texts = [again.generate(token_ids(2), use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*texts)


def test_a_recovered_dense_model_is_still_a_stock_model(tmp_path):
    import transformers

    recovered = recover(tiny("llama", torch.float32), token_ids(), LoRA(**QUICK)).model
    recovered.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(recovered))


def test_settings_are_json():
    record = LoRA().record()
    assert json.loads(json.dumps(record)) == record
    assert LoRA(**record | {"betas": tuple(record["betas"])}) == LoRA()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "rank is 0"),
        (dict(steps=0), "steps is 0"),
        (dict(batch=0), "batch is 0"),
        (dict(evaluate_every=0), "evaluate_every is 0"),
        (dict(patience=0), "patience is 0"),
        (dict(lr=0.0), "lr is 0.0"),
        (dict(lr=math.nan), "lr is nan"),
        (dict(alpha=-1), "alpha is -1"),
        (dict(dropout=1.0), r"dropout is 1.0: give a number in \[0, 1\)"),
        (dict(warmup=-1), "warmup is -1: give a whole number of at least 0"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1: give a number of at least 0"),
        (dict(weight_decay=math.nan), "weight_decay is nan"),
        (dict(weight_decay=math.inf), "weight_decay is inf"),
        (dict(dropout=math.nan), "dropout is nan"),
        (dict(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\): give a list, each part a number in \[0, 1\)"),
        (dict(betas=(0.9, math.nan)), "betas is"),
        (dict(rank=2.5), "rank is 2.5: give a whole number"),
        (dict(gradient_checkpointing="no"), "gradient_checkpointing is 'no'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.zeros(0, 20, dtype=torch.long)), "not empty"),
        (dict(ids=token_ids(4, 65)), "65 tokens, but the model has 64"),
        (dict(ids=token_ids(4, 1)), "no next token"),
        (dict(ids=token_ids() + 1000), "outside the model's vocabulary"),
        (dict(validation=token_ids(4, 65)), "65 tokens, but the model has 64"),
        (dict(validation=token_ids(4, 1)), "no next token"),
        (dict(settings=LoRA()), "400 warm-up steps do not end within a run of 2"),
    ],
)
def test_refused_before_any_work(monkeypatch, change, message):
    monkeypatch.setattr("lib.primitives.finetune.with_adapters", lambda *_: pytest.fail("work began"))
    arguments = dict(ids=token_ids(), settings=LoRA(**QUICK)) | change
    with pytest.raises(ValueError, match=message):
        recover(tiny("llama"), **arguments)


def test_a_model_in_training_mode_or_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        recover(tiny("opt").train(), token_ids(), LoRA(**QUICK))
    model = tiny("llama")
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="lib/primitives/anatomy.py"):
        recover(model, token_ids(), LoRA(**QUICK))
