"""A sweep makes what runs of their own make, from one look at the calibration set where that serves every ratio."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

from lib.baselines import cfsp, flap, fpt, llm_pruner, modegpt, shortgpt, wanda
from lib.methods import METHODS, OF_BLOCKS, make, settings_of, sweep
from lib.papers import afr, comp, svd_llm
from lib.primitives import low_rank
from tests.conftest import tiny, token_ids

SETTINGS = {
    "svd-llm": {"variant": "W+U"}, "afr": {"aggregation": "absolute only"}, "slicegpt": {"round_interval": 1},
    "modegpt": {"attention": "all"},  # neurons alone could not pay for half of a model
    "comp": {"rho": 0.9},  # of three blocks one goes, and neurons alone could not pay for half of a model
}  # fmt: skip

ONCE = {
    "svd-llm": (svd_llm, "truncated"), "svd": (low_rank, "factor"), "fwsvd": (low_rank, "factor"), "asvd": (low_rank, "factor"),
    "afr": (afr, "scores"), "fpt": (fpt, "mask_gradients"), "llm-pruner": (llm_pruner, "channel_scores"),
    "cfsp": (cfsp, "scores"), "flap": (flap, "scores"), "wanda-sp": (wanda, "neuron_scores"),
    "wanda-sp-heads": (wanda, "unit_scores"), "comp": (comp, "layer_scores"), "shortgpt": (shortgpt, "layer_scores"),
    "modegpt": (modegpt, "layer_scores"),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("slicegpt-")])
def test_a_sweep_is_every_ratio_alone(method, family):
    model, ids, settings = tiny(family), token_ids(), SETTINGS.get(method, {})
    before = copy.deepcopy(model.state_dict())
    made = list(sweep(method, model, ids, [0.4, 0.2], **settings))
    assert [ratio for ratio, _ in made] == [0.4, 0.2]
    for ratio, small in made:
        alone = make(method, copy.deepcopy(model), ids, ratio, inplace=True, **settings).state_dict()
        assert alone.keys() == small.state_dict().keys()
        for name, value in small.state_dict().items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ONCE)
def test_ratios_repeat_in_any_order_and_zero_changes_nothing(method):
    """In float64, where nothing is rounded away: what one result shares with another must not change it."""
    model, ids, settings = tiny("llama"), token_ids(), SETTINGS.get(method, {})
    dense, *others = (small(ids[:2]).logits for _, small in sweep(method, model, ids, [0.0, 0.3, 0.5, 0.3], **settings))
    torch.testing.assert_close(dense, model(ids[:2]).logits)
    assert torch.equal(others[0], others[2])
    assert not torch.allclose(others[0], others[1], rtol=0.01)


@pytest.mark.parametrize("method", ONCE)
def test_the_common_work_is_done_once(method, monkeypatch):
    part, name = ONCE[method]
    calls, real = [], getattr(part, name)
    monkeypatch.setattr(part, name, lambda *a, **k: calls.append(name) or real(*a, **k))
    assert len(list(sweep(method, tiny("llama"), token_ids(), [0.1, 0.2, 0.3]))) == 3
    assert len(calls) == 1


@pytest.mark.parametrize("method", METHODS)
def test_bad_ratios_fail_before_the_work(method, monkeypatch):
    def work(*_, **__):
        raise AssertionError("a model ran, or a matrix was decomposed")

    monkeypatch.setattr(torch.nn.Linear, "forward", work)
    monkeypatch.setattr(torch.linalg, "eigh", work)
    with pytest.raises(ValueError, match=r"1\.5"):
        sweep(method, tiny("llama"), token_ids(), [0.2, 1.5])


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("slicegpt", {}), ("slicegpt", {"schedule": [99] * 7}), ("slicegpt-stock", {}), ("slicegpt-global", {}), ("svd-llm", {}),
        ("svd-llm", {"allocation": "loss"}), ("svd-llm", {"order": "compressed"}), ("svd", {}), ("fwsvd", {}), ("asvd", {}),
        ("asvd", {"search": True}), ("afr", {}), ("llm-pruner", {}), ("fpt", {}), ("comp", {}), ("flap", {}), ("lorap", {}),
        ("flap", {"attention": False}), ("wanda-sp", {}), ("wanda-sp-heads", {}), ("magnitude-neurons", {}),
        ("random-neurons", {}), ("modegpt", {}), ("modegpt", {"attention": "all"}),
    ],
)  # fmt: skip
def test_ratios_that_leave_nothing_fail_before_the_work(method, values, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=r"leave|most|whole|[Bb]udget|few|junctions|below|nothing|search"):
        make(method, tiny("llama"), token_ids(), 0.99 if method in ("asvd", "slicegpt") else 0.999, **values)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="unknown method 'slice': choose one of slicegpt, "):
        settings_of("slice", {})
    with pytest.raises(ValueError, match="unknown setting of afr 'rank': choose one of preset, aggregation, "):
        sweep("afr", tiny("llama"), token_ids(), [0.2], rank=3)
    with pytest.raises(ValueError, match="unknown allocation 'best'"):
        sweep("afr", tiny("llama"), token_ids(), [0.2], allocation="best")
    with pytest.raises(ValueError, match="unknown preset of afr 'mine': choose one of paper, "):
        settings_of("afr", {"preset": "mine"})


@pytest.mark.parametrize(
    ("method", "name", "value", "wanted"),
    [
        ("comp", "rho", "half", "a number in [0, 1] or null, as in rho=0.5"),
        ("comp", "rounds", 2.5, "a whole number of at least 1"),
        ("comp", "tune", 2, "yes or no, as in tune=yes"), ("slicegpt", "slice_head", "maybe", "yes or no, as in slice_head=no"),
        ("svd-llm", "variant", ["W"], "a word, as in variant=W"), ("afr", "scores", "snip", "a list, each part a word"),
        ("llm-pruner", "samples", "all", "a whole number of at least 1 or null"),
        ("llm-pruner", "protect", "first", "a list, each part a whole number of at least 0 or null, as in protect=[0, 1]"),
        ("afr", "protect", ["first"], "a list, each part a whole number of at least 0"),
        ("random-neurons", "seed", True, "a whole number of at least 0"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused_with_an_example(method, name, value, wanted):
    with pytest.raises(ValueError, match=f"^{name} is .*: give {re.escape(wanted)}"):
        settings_of(method, {name: value})


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("afr", {"loss": "l3"}), ("afr", {"features": "some"}), ("afr", {"view": "side"}), ("afr", {"scores": []}),
        ("afr", {"batch": 0}), ("afr", {"attention": 2.0}), ("cfsp", {"multiple": 0}), ("magnitude-neurons", {"order": 3}),
        ("sparsegpt", {"pattern": "5:4"}), ("wanda", {"pattern": "half"}), ("slicegpt-stock", {"round_interval": 0}),
    ],
)  # fmt: skip
def test_records_refuse_impossible_values(method, values):
    with pytest.raises(ValueError, match="choose one|no score|at least 1|must be|in .0, 1"):
        settings_of(method, values)


def test_settings_are_read_as_they_are_meant():
    assert settings_of("slicegpt", {"layout": None}).layout == ""
    assert settings_of("comp", {"rho": 1}).rho == 1
    assert settings_of("llm-pruner", {"samples": None}).samples is None
    assert settings_of("slicegpt", {"drop_below": "1e-3"}).drop_below == 0.001  # a word in YAML
    assert settings_of("comp", {"variance_bound": "inf"}).variance_bound == math.inf
    for yes, no in (("yes", "no"), ("True", "FALSE"), ("true", "false"), (1, 0), ("1", "0"), (True, False)):
        assert settings_of("fpt", {"tuning": yes}).tuning is True
        assert settings_of("fpt", {"tuning": no}).tuning is False
    assert settings_of("afr", {"protect": [0, 2]}).protect == (0, 2)
    assert settings_of("afr", {"preset": "code_2026_02", "batch": 3}) == replace(afr.PRESETS["code_2026_02"], batch=3)


def test_records_know_of_every_method_what_the_commands_print():
    for name, method in METHODS.items():
        assert name == method.name
        assert all((method.removes, method.ratio, method.needs, method.paper, method.loads))
        assert method.settings() == method.settings()  # frozen, with a default for every field
        assert method.shape or method.ratio == OF_BLOCKS or name.startswith("slicegpt-") or "zero" in method.removes


def test_working_in_place_takes_one_ratio():
    with pytest.raises(ValueError, match="exactly one ratio"):
        sweep("afr", tiny("llama"), token_ids(), [0.2, 0.3], inplace=True)
    for method in METHODS.values():
        if method.consumes:
            with pytest.raises(ValueError, match="exactly one ratio"):
                next(method.sweep(tiny("llama"), token_ids(), [0.2, 0.3], method.settings(), None, inplace=True))


def test_blocks_to_protect_exist():
    with pytest.raises(ValueError, match="cannot protect block 99"):
        sweep("afr", tiny("llama"), token_ids(), [0.2], protect=[0, 99])
