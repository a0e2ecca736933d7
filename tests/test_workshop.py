"""The training of the embedded models: a short run writes a folder that loads, and the pieces do what they say."""

import functools
import json

import pytest
import torch

from lib.evaluation.text import load_corpus, tokens_of, windows
from lib.models.load import load
from lib.suite import workshop
from lib.suite.workshop import WORKSHOP_MODELS, Recipe, add_dropout, optimizers, rate, train_workshop_model, untrained

ONCE = {"train_tokenizer": functools.cache(workshop.train_tokenizer), "tokens_of": functools.cache(tokens_of)}  # of one text


@pytest.mark.parametrize("name", WORKSHOP_MODELS)
def test_two_steps_write_a_complete_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr(workshop.shutil, "which", lambda _: None)  # no compiler: the plain path
    for part, shared in ONCE.items():
        monkeypatch.setattr(workshop, part, shared)
    monkeypatch.setattr(workshop, "windows", lambda ids, length: windows(ids, length)[:8])  # for losses alone
    said = []
    manifest = train_workshop_model(name, Recipe(steps=2, evaluate_every=2, batch=2, warmup=1), tmp_path / "m", said.append)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert manifest == json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["text"]["sha256"] == load_corpus("wiki-a").sha256
    assert manifest["curve"][1]["validation_loss"] < manifest["curve"][0]["validation_loss"] < 7.9  # ln 2048 = 7.62
    model, tokenizer = load(str(tmp_path / "m"))
    assert len(tokenizer) == 2048
    assert f"{manifest['parameters']:,} parameters" in (tmp_path / "m" / "README.md").read_text()
    assert not any(module._forward_hooks for module in model.modules())
    assert len(said) == 2


def test_rate_warms_up_holds_and_reaches_zero():
    recipe = Recipe(steps=100, warmup=10, decay_from=0.5)
    assert rate(0, recipe) == pytest.approx(0.1)
    assert rate(30, recipe) == 1.0
    assert rate(75, recipe) == pytest.approx(0.5)
    assert rate(100, recipe) == 0.0


def test_every_parameter_has_one_optimizer():
    for name in WORKSHOP_MODELS:
        model = untrained(name, 0)
        held = [p for opt in optimizers(model, Recipe()) for group in opt.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert len(held) == len({id(p) for p in held})


def test_dropout_acts_only_while_training_and_can_be_taken_away():
    model, ids = untrained("wiki-a-llama", 0).eval(), torch.arange(40).view(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
        hooks = add_dropout(model, 0.5)
        assert torch.equal(model(ids).logits, plain)
        assert not torch.equal(model.train()(ids).logits, plain)
        for hook in hooks:
            hook.remove()
        assert torch.equal(model(ids).logits, plain)


def test_unknown_model():
    with pytest.raises(ValueError, match="wiki-a-llama or wiki-a-opt"):
        untrained("wiki-a-gpt", 0)
