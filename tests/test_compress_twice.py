"""Every method on what every method leaves: a result that saves and loads with the same logits, or a refusal before any work."""

import functools

import pytest
import torch
import transformers

from lib.methods import METHODS, sweep
from lib.models.checkpoint import export, load_checkpoint, save
from lib.primitives.low_rank import merge_to_dense
from tests.conftest import tiny, token_ids

# What can follow the methods that leave no stock model, from a run of all pairs.
ON_FACTORED_ATTENTION = {"afr", "comp", "cfsp", "wanda-sp", "magnitude-neurons", "random-neurons"}
ON_UNEQUAL_BLOCKS = set(METHODS) - {"slicegpt-stock", "slicegpt-global"}
FOLLOWERS = {"slicegpt": set(), "svd-llm": set(), "svd": set(), "fwsvd": set(), "asvd": set(), "lorap": ON_FACTORED_ATTENTION}
FOLLOWERS |= {name: ON_UNEQUAL_BLOCKS for name in ("llm-pruner", "fpt", "comp", "flap", "cfsp", "modegpt")}

IDS = token_ids(4, 16)
SETTINGS = {"afr": {"aggregation": "absolute only"}}  # quick


@functools.cache
def first_result(method):
    ratio = 0.15 if method == "comp" else 0.3  # COMP has to leave something for a second one
    return next(sweep(method, tiny("llama", num_hidden_layers=4), IDS, [ratio], **SETTINGS.get(method, {})))[1]


def reloaded(model, folder):
    if hasattr(model, "edits"):
        return load_checkpoint(save(model, None, folder))
    return transformers.AutoModelForCausalLM.from_pretrained(export(model, None, folder), dtype=torch.float64).eval()


def size(model):
    """Weights that are not zero."""
    return sum(int((p != 0).sum()) for p in model.parameters())


@pytest.fixture
def no_forward(monkeypatch):
    """Let no model run from now on."""

    def stop():
        for layer in (torch.nn.Linear, torch.nn.Embedding):
            monkeypatch.setattr(layer, "forward", lambda *_: pytest.fail("a model ran"))

    return stop


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_a_method_follows_another_or_refuses_before_any_work(tmp_path, no_forward, first, second):
    once, settings = first_result(first), SETTINGS.get(second, {})
    ratio = 0.15 if second in ("comp", "modegpt") else 0.35  # of the blocks, taken from neurons
    if second not in FOLLOWERS.get(first, METHODS):
        no_forward()
        with pytest.raises(ValueError, match=f"{second} cannot work on a compressed model with .*: start from the dense model"):
            sweep(second, once, IDS, [ratio], **settings)
        return
    (_, same), (_, twice) = sweep(second, once, IDS, [0.0, ratio], **settings)
    with torch.no_grad():
        before, after = once(IDS).logits, twice(IDS).logits
        torch.testing.assert_close(same(IDS).logits, before, rtol=1e-5, atol=1e-5)  # nothing of the first result is lost
        assert not torch.allclose(after, before, rtol=1e-3)
        assert torch.equal(reloaded(twice, tmp_path / "m")(IDS).logits, after)
    assert size(twice) < size(once)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("flap", {"attention": False}), ("llm-pruner", {"attention": False}), ("lorap", {"mlp_only": True}), ("comp", {"rho": 0})],
)
def test_neurons_alone_can_go_behind_two_factor_attention(tmp_path, method, settings):
    once = first_result("lorap")
    (_, twice), *_ = sweep(method, once, IDS, [0.2], **settings)
    assert size(twice) < size(once)
    assert torch.equal(reloaded(twice, tmp_path / "m")(IDS).logits, twice(IDS).logits)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("afr", {"attention": 0.5}, "two-factor layers in attention"),
        ("comp", {"rho": 1}, "low-rank refers to blocks by number: remove blocks first"),
    ],
)
def test_settings_that_need_more_are_refused_before_any_work(no_forward, method, settings, message):
    once = first_result("lorap")
    no_forward()
    with pytest.raises(ValueError, match=message):
        list(sweep(method, once, IDS, [0.3], **settings))


def test_factors_can_be_multiplied_for_a_second_method():
    for first in ("svd-llm", "lorap"):
        once = first_result(first)
        with pytest.raises(ValueError, match="or multiply the factors first with `invoke merge-to-dense`"):
            sweep("wanda", once, IDS, [0.3])
        (_, twice), *_ = sweep("wanda", merge_to_dense(once), IDS, [0.3])
        assert not hasattr(twice, "edits")
