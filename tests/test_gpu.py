"""On a GPU every method gives the model that it gives on a CPU: `pytest -m gpu`. The script of the GPU runs here without one."""

import pytest
import torch

from benchmarks import gpu
from lib.methods import METHODS

CLOSE = 1e-3  # float32 with the products of a GPU in full precision, after some decompositions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_compresses_as_a_cpu(method):
    assert gpu.difference_to_cpu(method, "cuda") < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_float32_compresses_as_float64(method):
    assert gpu.difference_to_cpu(method, "cpu") < CLOSE


def test_every_method_has_its_turn():
    assert sorted(gpu.ORDER) == sorted(METHODS)


def test_the_script_measures_and_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(
        gpu, "ON_CPU", gpu.ON_CPU | dict(num_hidden_layers=2, hidden_size=48, vocab_size=96, intermediate_size=64)
    )
    dense, cfsp, wrong = gpu.rows(["cfsp", "unknown"], "cpu", until=float("inf"))
    assert dense["decode_16"] > 0
    assert cfsp["passes"] == pytest.approx(cfsp["seconds"] / cfsp["forward_s"])
    assert cfsp["prefill_1"] > 0
    assert wrong["note"].startswith("ValueError: unknown method")
    assert list(gpu.rows(["cfsp"], "cpu", until=0.0))[1]["note"] == "no time left"
