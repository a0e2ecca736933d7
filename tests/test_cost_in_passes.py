"""What `benchmarks.cost_in_passes` counts, and that methods do no work for nobody."""

import gc
import itertools
import weakref

import pytest
import torch

from benchmarks import cost_in_passes
from benchmarks.cost_in_passes import CASES, remark, watched
from lib.evaluation.speed import forward_seconds
from lib.methods import METHODS, make, sweep
from lib.primitives.calibration import BATCH_TOKENS, ResidualStream, batch_of
from tests.conftest import tiny, token_ids

LAYERS = 4


def model_of(layers: int = LAYERS, **settings):
    return tiny("llama", torch.float32, num_hidden_layers=layers, **settings).requires_grad_(False)


def matrices_of(model) -> int:
    """Multiply-adds of the blocks' matrices for one token."""
    blocks = model.model.layers
    return sum(p.numel() for p in blocks.parameters() if p.ndim == 2)


def test_batches_hold_few_tokens_and_at_least_one_sequence():
    assert [batch_of(length) for length in (1, 128, 256, BATCH_TOKENS, 10 * BATCH_TOKENS)] == [8, 8, 4, 1, 1]
    assert ResidualStream(tiny("llama"), token_ids(9)).batch == 8


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_pass_reads_every_token_once_and_never_the_head(family):
    model, read = tiny(family), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: read.append(inputs[0]))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    ticks = itertools.count()
    assert forward_seconds(model, token_ids(19), lambda: next(ticks)) == 1  # the clock is read before and after
    warm, *parts = read
    assert warm.shape == (8, 1)
    assert torch.equal(torch.cat(parts), token_ids(19))


def test_passes_are_counted_by_multiply_adds():
    model, ids = model_of(), token_ids(3)
    with watched(lambda: 0.0) as spent:
        model.model(input_ids=ids)
    assert spent.macs == matrices_of(model) * ids.numel()
    model.requires_grad_(True)
    with watched(lambda: 0.0) as spent:
        model.model(input_ids=ids).last_hidden_state.sum().backward()
    assert spent.macs == 3 * matrices_of(model) * ids.numel()


def test_factorisations_are_timed_once_and_left_as_they_were():
    before, ticks = torch.linalg.eigh, itertools.count()
    with watched(lambda: next(ticks)) as spent:
        torch.linalg.eigh(torch.eye(3))
        torch.cholesky_inverse(torch.eye(3))
    assert spent.factorising == 2  # one tick each
    assert torch.linalg.eigh is before


@pytest.mark.parametrize("method", ["wanda-sp", "cfsp", "flap", "shortgpt", "svd-llm", "asvd"])
def test_methods_of_one_pass_run_no_layer_twice(method):
    model, ids = model_of(), token_ids()
    whole = matrices_of(model) * ids.numel()
    with watched(lambda: 0.0) as spent:
        list(sweep(method, model, ids, [0.25, 0.5]))
    assert 0.9 * whole < spent.macs <= whole  # the last block may end before its last layer


@pytest.mark.parametrize("case", ["slicegpt", "slicegpt, 4 levels", "svd-llm, W+U", "llm-pruner", "fpt"])
def test_methods_of_several_passes_keep_to_their_bounds(case):
    """In multiply-adds, on the way to the bounds in time. The head of a tiny model would count for more than its share."""
    model, ids, case = model_of(6, intermediate_size=96, vocab_size=16), token_ids(8, 32) % 16, CASES[case]
    with watched(lambda: 0.0) as spent:
        list(sweep(case.method, model, ids, case.ratios, **case.settings))
    assert 0.5 < spent.macs / (matrices_of(model) * ids.numel()) <= case.bound


@pytest.mark.parametrize(("reference", "passes"), [("same input", 1), ("residual", 2)])
def test_comp_runs_attention_once_for_the_student(reference, passes):
    """One pass scores, another may be the teacher's; the student runs attention once and its FFN twice, the second time cut."""
    model, ids = model_of(), token_ids()
    block = model.model.layers[0]
    attention = sum(p.numel() for p in block.self_attn.parameters())
    ffn = sum(p.numel() for p in block.mlp.parameters())
    with watched(lambda: 0.0) as spent:
        make("comp", model, ids, 0.2, rho=0.0, rounds=1, reference=reference)
    most = passes * LAYERS * (attention + ffn) + LAYERS * (attention + ffn) + (LAYERS - 1) * ffn
    assert spent.macs < most * ids.numel()
    assert spent.macs > (most - LAYERS * ffn) * ids.numel()


@pytest.mark.parametrize(
    "method", ["svd-llm", "svd", "fwsvd", "asvd", "cfsp", "flap", "lorap", "modegpt", "wanda-sp", "magnitude-neurons"]
)
def test_in_place_no_dense_weight_of_an_ffn_survives(method):
    model, ids = model_of(), token_ids()
    dense = [weakref.ref(block.mlp.down_proj.weight) for block in model.model.layers]
    small = make(method, model, ids, 0.3, inplace=True)
    del model
    gc.collect()
    assert not any(weight() is not None for weight in dense)
    assert torch.isfinite(small(ids).logits).all()


def test_every_method_has_a_case_and_the_remark_says_what_the_rest_is():
    assert set(METHODS) <= set(CASES)
    row = {
        "bound": 1.3,
        "time": 2.5,
        "linalg": 0.5,
        "passes": 1.5,
        "other": 0.5,
        "memory": 1.5,
        "memory_bound": 1.6,
        "drift": 0.0,
    }
    assert remark(row) == "beyond its bound: passes are 1.50 F, statistics, scoring and cutting 0.50 F"
    assert remark(row | {"linalg": 1.2}) == ""
    assert "measure again" in remark(row | {"linalg": 1.2, "drift": 0.3})
    assert remark(row | {"bound": None, "memory": 1.8}).startswith("0.20 of the model's bytes")


def test_a_measured_row(monkeypatch):
    monkeypatch.setattr(cost_in_passes, "WIDE", cost_in_passes.WIDE | dict(hidden_size=64, intermediate_size=128, vocab_size=64))
    row = cost_in_passes.measure(CASES["svd-llm"], "wide", 4, 16)
    assert row["passes"] == pytest.approx(1, abs=0.2)
    assert row["time"] == pytest.approx(row["linalg"] + row["passes"] + row["other"])
    assert 0 < row["linalg"] < row["time"]
