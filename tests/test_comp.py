"""COMP: the budget, one block, and whole models against masks on the dense model and the streams of plain transformers."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib import comp
from lib.anatomy import Anatomy
from lib.checkpoint import export, load_checkpoint, save
from lib.comp import Demand, Pruned, Settings, Shape, Sweep
from lib.cost import count
from lib.mask_tuning import Sums, System
from lib.structured import ffn_widths, neuron_params
from tests.conftest import CONFIGS, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
WIDE = dict(intermediate_size=96, num_hidden_layers=5)
FAMILIES = sorted(set(CONFIGS) - {"gemma3_text"})


# --- the budget -----------------------------------------------------------------------------------------------------------

# LLaMA-2-7B: ratio; blocks and share of the other blocks' neurons that go at rho = 0.5, at 0, and at 1 in whole blocks
LLAMA_2_7B = Shape([202_383_360] * 32, [11_008] * 32, [3 * 4096] * 32)
TABLE = [(0.1, 1, 0.106, 0.150, 3), (0.2, 3, 0.175, 0.299, 6), (0.3, 4, 0.299, 0.449, 10), (0.4, 6, 0.391, 0.598, 13)]
TABLE += [(0.5, 8, 0.499, 0.748, 16)]


@pytest.mark.parametrize(("ratio", "blocks", "half", "neurons", "whole"), TABLE)
def test_budget_of_a_7b_model(ratio, blocks, half, neurons, whole):
    for rho, drop, share in ((0.5, blocks, half), (0.0, 0, neurons), (1.0, whole, 0.0)):
        assert comp.blocks_to_drop(ratio, 32, rho) == drop
        cut = comp.neurons_to_cut(LLAMA_2_7B, range(1, 1 + drop), ratio, Settings(rho=rho))
        assert cut / (11_008 * (32 - drop)) == pytest.approx(share, abs=6e-4)
        if rho < 1:
            removed = drop * LLAMA_2_7B.params[0] + cut * 3 * 4096
            assert abs(removed - ratio * sum(LLAMA_2_7B.params)) <= 3 * 4096 / 2


def test_blocks_are_counted_in_exact_arithmetic():
    assert comp.blocks_to_drop(0.3, 10, 0.9999999) == 3 and comp.blocks_to_drop(0.29, 100, 1.0) == 29
    assert comp.blocks_to_drop(0.2, 10, 0.5) == 1


@given(st.lists(st.floats(1e-6, 2), min_size=1, max_size=12), st.floats(0, 0.8), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_block_ratios_have_the_mean_asked_for_whatever_the_limit_cuts_off(scores, mean, alpha):
    ratios = comp.layer_ratios(scores, mean, alpha, 0.8)
    assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= r <= 0.8 for r in ratios)
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    for a, b in zip(order, order[1:], strict=False):
        assert ratios[a] >= ratios[b] - 1e-12  # what matters more loses no more


def test_block_ratios_follow_the_formula_and_are_uniform_at_zero():
    scores = torch.tensor([0.5, 0.01, 0.1, 0.02]).double()
    z = (scores.log() - scores.log().mean()) / scores.log().std(correction=0)
    expected = 0.2 * (-0.2 * z).exp() / (-0.2 * z).exp().mean()
    assert comp.layer_ratios(scores.tolist(), 0.2) == pytest.approx(expected.tolist(), rel=1e-9)
    assert comp.layer_ratios(scores.tolist(), 0.2, alpha=0.0) == pytest.approx([0.2] * 4)
    assert comp.layer_ratios([0.1, 0.1], 0.3) == pytest.approx([0.3, 0.3])
    with pytest.raises(ValueError, match="80% is the most"):
        comp.layer_ratios([0.1], 0.81)


@given(st.lists(st.floats(0, 0.8), min_size=1, max_size=8), st.integers(5, 60), st.sampled_from([1, 4]))
@settings(max_examples=50, deadline=None)
def test_quotas_add_up_in_whole_steps(ratios, width, multiple):
    choice = Settings(multiple=multiple)
    limit = comp.most(width, choice)
    assert limit <= min(0.8 * width, width - 1) and limit % multiple == 0
    total = min(round(sum(ratios) * width), limit * len(ratios))
    quotas = comp.quotas_from(ratios, [width] * len(ratios), total, choice)
    assert abs(sum(quotas) - total) <= multiple / 2
    assert all(0 <= q <= limit and q % multiple == 0 for q in quotas)


def test_a_block_keeps_its_last_neuron():
    assert comp.most(3, Settings(largest_cut=0.99)) == 2
    assert comp.most(1, Settings()) == 0


@pytest.mark.parametrize("bad", [
    dict(metric="C9"), dict(reference="none"), dict(allocation="even"), dict(selection="twice"), dict(layer_score="norm"), dict(rho=1.1),
    dict(largest_cut=1.0), dict(epsilon=0.0), dict(variance_bound=0.0), dict(multiple=0), dict(checks=0), dict(sweeps=0),
])  # fmt: skip
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"choose one of|must be|count from|is a share"):
        Settings(**bad)


def test_impossible_ratios_are_refused_before_any_work():
    model, broken = tiny("llama"), torch.full((2, 8), 10**6)  # ids that calibration would refuse
    with pytest.raises(ValueError, match=r"at most \d+ may go at largest_cut"):
        comp.prune(model, broken, 0.7, Settings(rho=0.0))
    with pytest.raises(ValueError, match="cannot remove 2 of 1 blocks"):
        comp.prune(model, broken, 0.7, Settings(rho=1.0))
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
            comp.prune(model, broken, ratio)
    with pytest.raises(ValueError, match="vocabulary"):
        comp.prune(model, broken, 0.2)


def test_a_normalised_ffn_output_is_refused_unless_the_reference_is_its_own():
    with pytest.raises(ValueError, match="reference='same input'"):
        comp.prune(tiny("gemma3_text"), token_ids(), 0.2)
