"""A sweep makes what runs of their own make, from one look at the calibration set where that serves every ratio."""

import copy

import pytest
import torch

from lib.baselines import cfsp, flap, fpt, llm_pruner, wanda
from lib.compress import METHODS, SWEEPS, sweep
from lib.papers import afr, comp, svd_llm
from lib.primitives import low_rank
from tests.conftest import tiny, token_ids

SETTINGS = {
    "svd-llm": {"variant": "W+U"}, "afr": {"aggregation": "absolute only"}, "slicegpt": {"round_interval": 1},
    "comp": {"rho": 0.9},  # of three blocks one goes, and neurons alone could not pay for half of a model
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", [*SWEEPS, "slicegpt", "lorap"])
def test_a_sweep_is_every_ratio_alone(method, family):
    model, ids, settings = tiny(family), token_ids(), SETTINGS.get(method, {})
    before = copy.deepcopy(model.state_dict())
    made = list(sweep(method, model, ids, [0.4, 0.2], **settings))
    assert [ratio for ratio, _ in made] == [0.4, 0.2]
    for ratio, small in made:
        alone = METHODS[method](copy.deepcopy(model), ids, ratio, lambda text: None, **settings).state_dict()
        assert alone.keys() == small.state_dict().keys()
        for name, value in small.state_dict().items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", SWEEPS)
def test_ratios_repeat_in_any_order_and_zero_changes_nothing(method):
    """In float64, where nothing is rounded away: what one result shares with another must not change it."""
    model, ids, settings = tiny("llama"), token_ids(), SETTINGS.get(method, {})
    dense, *others = (small(ids[:2]).logits for _, small in sweep(method, model, ids, [0.0, 0.3, 0.5, 0.3], **settings))
    torch.testing.assert_close(dense, model(ids[:2]).logits)
    assert torch.equal(others[0], others[2])
    assert not torch.allclose(others[0], others[1], rtol=0.01)


ONCE = {
    "svd-llm": (svd_llm, "truncated"), "svd": (low_rank, "factor"), "fwsvd": (low_rank, "factor"), "asvd": (low_rank, "factor"),
    "afr": (afr, "scores"), "fpt": (fpt, "mask_gradients"), "llm-pruner": (llm_pruner, "unit_scores"), "cfsp": (cfsp, "scores"),
    "flap": (flap, "scores"), "wanda-sp": (wanda, "neuron_scores"), "comp": (comp, "layer_scores"),
}  # fmt: skip


@pytest.mark.parametrize("method", SWEEPS)
def test_the_common_work_is_done_once(method, monkeypatch):
    part, name = ONCE[method]
    calls, real = [], getattr(part, name)
    monkeypatch.setattr(part, name, lambda *a, **k: calls.append(name) or real(*a, **k))
    assert len(list(sweep(method, tiny("llama"), token_ids(), [0.1, 0.2, 0.3]))) == 3
    assert len(calls) == (2 if method == "llm-pruner" else 1)  # LLM-Pruner scores neurons and groups


@pytest.mark.parametrize("method", SWEEPS)
def test_bad_ratios_fail_before_the_work(method, monkeypatch):
    def work(*_, **__):
        raise AssertionError("a model ran, or a matrix was decomposed")

    monkeypatch.setattr(torch.nn.Linear, "forward", work)
    monkeypatch.setattr(torch.linalg, "eigh", work)
    with pytest.raises(ValueError, match=r"1\.5"):
        next(sweep(method, tiny("llama"), token_ids(), [0.2, 1.5]))


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="unknown setting 'rank' of afr"):
        sweep("afr", tiny("llama"), token_ids(), [0.2], rank=3)
    with pytest.raises(ValueError, match="unknown allocation 'best'"):
        sweep("afr", tiny("llama"), token_ids(), [0.2], allocation="best")
