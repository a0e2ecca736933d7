"""Distillation: the loss is the one of its formula, it brings a compressed model nearer to its dense one, and a run goes on."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from lib.baselines import cfsp
from lib.papers import slicegpt, svd_llm
from lib.primitives import distillation
from lib.primitives.distillation import Distillation
from lib.primitives.finetune import LoRA, linear_layers, mean_loss, rate, recover
from tests.conftest import relative, tiny, token_ids

QUICK = dict(rank=4, warmup=1, steps=12, batch=3, lr=1e-2, evaluate_every=4, dropout=0.0)
SMALL = {
    "neurons gone": lambda dense: cfsp.prune(dense, token_ids(), 0.3),
    "sliced": lambda dense: slicegpt.slice_model(dense, token_ids(), 0.25, round_interval=1),
    "low rank": lambda dense: next(svd_llm.sweep(dense, token_ids(), [0.4]))[1],
}


def small(dense, kind="neurons gone"):
    made = SMALL[kind](dense)
    return made[0] if isinstance(made, tuple) else made


def divergence(dense, model, ids):
    """KL(dense ‖ model) a token, summed word by word in float64."""
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().softmax(-1) for m in (dense, model))
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_the_formula(share, temperature, monkeypatch):
    monkeypatch.setattr(distillation, "PIECE", 7)  # no whole number of pieces
    dense, ids = tiny("llama"), token_ids()
    model = small(dense)
    with torch.no_grad():
        p, q = ((m(ids).logits[:, :-1] / temperature).softmax(-1) for m in (dense, model))
        hard = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = share * temperature**2 * (p * (p / q).log()).sum(-1).mean() + (1 - share) * hard
    found = Distillation(share, temperature).loss_from(dense)(model, ids)
    assert relative(found, wanted) < 1e-10


def test_a_model_that_says_the_same_has_nothing_to_learn():
    dense = tiny("opt")
    same = copy.deepcopy(dense).requires_grad_(True)
    loss = Distillation().loss_from(dense)(same, token_ids())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(p.grad.abs().max()) for p in same.parameters() if p.grad is not None) < 1e-12


@pytest.mark.parametrize("rank", [4, None], ids=["adapters", "all weights"])
@pytest.mark.parametrize("kind", SMALL)
def test_it_brings_a_compressed_model_nearer_to_its_dense_one(kind, rank):
    dense, ids, other = tiny("llama"), token_ids(120), token_ids(12, seed=5)
    before = small(dense, kind)
    settings = LoRA(**QUICK | {"rank": rank, "lr": 3e-3 if rank else 1e-3, "steps": 40, "batch": 12})
    after = recover(before, ids, settings, loss=Distillation().loss_from(dense)).model
    assert divergence(dense, after, ids) < 0.95 * divergence(dense, before, ids)
    assert divergence(dense, after, other) < divergence(dense, before, other)
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="same vocabulary"):
        recover(tiny("llama"), token_ids(), LoRA(**QUICK), loss=Distillation().loss_from(tiny("llama", vocab_size=96)))


@pytest.mark.parametrize("bad", [{"share": 1.5}, {"share": -0.1}, {"temperature": 0.0}])
def test_impossible_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Distillation(**bad)


def test_all_weights_are_trained_by_adamw():
    """Two steps against torch's own optimizer on the model itself."""
    model, ids = tiny("llama"), token_ids()
    settings = LoRA(rank=None, lr=1e-3, warmup=1, steps=2, batch=len(ids), weight_decay=0.1)
    ours = recover(model, ids, settings).model
    theirs = copy.deepcopy(model).requires_grad_(False)
    trained = [theirs.get_submodule(name).weight.requires_grad_(True) for name in linear_layers(theirs)]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=settings.betas, weight_decay=0.1)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate(step, 1, 2)
        optimizer.zero_grad()
        mean_loss(theirs, ids).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    moved = {f"{name}.weight" for name in linear_layers(model)}
    for name, value in theirs.state_dict().items():
        assert relative(ours.state_dict()[name], value) < 1e-10
        assert torch.equal(value, model.state_dict()[name]) == (name not in moved)


def test_all_weights_need_their_precision():
    with pytest.raises(ValueError, match="float32"):
        recover(tiny("llama", torch.bfloat16), token_ids(), LoRA(**QUICK | {"rank": None}))


# --- a run that was stopped ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("rank", [4, None], ids=["adapters", "all weights"])
@pytest.mark.parametrize("dies_at", [4, 8])
def test_a_stopped_run_goes_on_with_the_same_result(tmp_path, rank, dies_at):
    """Dropout and the order of the batches included."""
    model, ids, held_out, state = tiny("llama"), token_ids(12), token_ids(3, seed=5), tmp_path / "state.pt"
    settings = LoRA(**QUICK | {"rank": rank, "dropout": 0.1})
    whole = recover(model, ids, settings, validation=held_out)

    def dies(line):
        if f"step {dies_at + 4} of" in line:
            raise Killed

    with pytest.raises(Killed):
        recover(model, ids, settings, validation=held_out, state=state, progress=dies)
    assert state.exists()
    lines = []
    resumed = recover(model, ids, settings, validation=held_out, state=state, progress=lines.append)
    assert not any(f"step {dies_at - 4} of" in line for line in lines)
    assert resumed.history == whole.history
    assert resumed.step == whole.step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert list(tmp_path.iterdir()) == [state]  # which is removed by whoever has saved the model


def test_a_state_of_another_run_is_refused(tmp_path):
    model, state = tiny("llama"), tmp_path / "state.pt"

    def dies(line):
        if "step 8 of" in line:
            raise Killed

    with pytest.raises(Killed):
        recover(model, token_ids(12), LoRA(**QUICK), state=state, progress=dies)
    kept = state.read_bytes()
    for ids, changed in ((token_ids(12, seed=9), {}), (token_ids(12), {"lr": 2e-2}), (token_ids(12), {"rank": 3})):
        with pytest.raises(ValueError, match="is of a run with other text, settings or layers"):
            recover(model, ids, LoRA(**QUICK | changed), state=state)
    assert state.read_bytes() == kept
