"""Differences between models, with their intervals: against formulas by hand, simulated pairs, and a model against itself."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.evaluation.divergence import Reference, compared
from lib.evaluation.paired import accuracy_difference, common_ratio, flips, holm, perplexity_ratio
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, sample_blocks, tokens_of, windows
from lib.evaluation.zero_shot import zero_shot
from lib.methods import make
from lib.models.load import load
from tests.conftest import CONFIGS, tiny, token_ids

TOKENS = 255  # in each window


def simulated(chance, windows=40, ratio=1.0, noise=0.02):
    """Summed losses of two models on the same windows: hard and easy windows for both, and a little noise of each."""
    shared = chance.normal(3.6, 0.35, windows)
    losses = [(shared + shift + chance.normal(0, noise, windows)) * TOKENS for shift in (math.log(ratio), 0.0)]
    return losses[0].tolist(), losses[1].tolist()


# --- perplexity -------------------------------------------------------------------------------------------------------


def test_the_interval_is_students_by_hand():
    ours, other = simulated(np.random.default_rng(0), ratio=1.05)
    found = perplexity_ratio(ours, other, TOKENS)
    d = [(a - b) / TOKENS for a, b in zip(ours, other, strict=True)]
    mean = sum(d) / 40
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / 39 / 40)
    half = 2.0226909 * error  # Student's t at 97.5 % with 39 degrees of freedom, from a printed table
    assert found.estimate == pytest.approx(math.exp(mean), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-7)
    assert found.verdict(1.0) == "above"
    assert perplexity_ratio(other, ours, TOKENS).verdict(1.0) == "below"


@pytest.mark.parametrize("windows", [5, 12, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(windows):
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        found = perplexity_ratio(*simulated(chance, windows, ratio=1.02), TOKENS)
        held += found.low < 1.02 < found.high
    assert 0.935 < held / 2000 < 0.965  # three standard errors


@pytest.mark.parametrize("windows", [12, 40])
def test_null_pairs_are_significant_at_the_nominal_rate(windows):
    chance = np.random.default_rng(2)
    significant = sum(perplexity_ratio(*simulated(chance, windows), TOKENS).verdict(1.0) != "level" for _ in range(100))
    assert 1 <= significant <= 11  # five are expected; 1 to 11 in 99 of 100 repetitions


def test_what_two_intervals_cannot_tell_apart_a_paired_one_can():
    """Each perplexity is known to about 6 %, their ratio to 1 %: the reason for pairs."""
    ours, other = simulated(np.random.default_rng(3), ratio=1.03)
    alone = [np.std(losses, ddof=1) / TOKENS / math.sqrt(40) for losses in (ours, other)]
    assert min(alone) > 0.04
    found = perplexity_ratio(ours, other, TOKENS)
    assert found.high - found.low < 0.025
    assert found.verdict(1.0) == "above"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_model_is_level_with_itself(tmp_path, family):
    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    text = token_ids(30, 16).flatten()
    one, two = (perplexity(m, text, 16).losses for m in (model, again))
    found = perplexity_ratio(one, two, 15)
    assert (found.estimate, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 1.0)
    assert found.verdict(1.0) == "level"


def test_the_losses_of_the_windows_are_those_of_the_logits():
    """Window by window, in another batch size, against cross-entropy of all logits at once; their sum is the perplexity."""
    model, text = tiny("llama", torch.float32), token_ids(13, 16).flatten()
    found = perplexity(model, text, 16, batch=5)
    with torch.no_grad():
        alone = [
            F.cross_entropy(model(w[None]).logits[0, :-1].double(), w[1:], reduction="sum").item() for w in windows(text, 16)
        ]
    assert found.losses == pytest.approx(alone, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(alone) / (13 * 15)), rel=1e-6)


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="3 and 2 measurements are not pairs"):
        perplexity_ratio([1.0, 2.0, 3.0], [1.0, 2.0], TOKENS)
    with pytest.raises(ValueError, match="1 and 1 measurements"):
        accuracy_difference([True], [False])


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    """Of twelve questions that one model alone answers, ten are ours: 2 (1 + 12 + 66) / 4096."""
    ours = [True] * 50 + [True] * 10 + [False] * 2 + [False] * 38
    other = [True] * 50 + [False] * 10 + [True] * 2 + [False] * 38
    assert flips(ours, other) == (10, 2)
    found = accuracy_difference(ours, other)
    assert found.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert found.estimate == pytest.approx(0.08)
    error = math.sqrt((12 - 100 * 0.08**2) / 99 / 100)  # of the mean of twelve ones of either sign among a hundred
    assert (found.low, found.high) == pytest.approx((0.08 - 1.959964 * error, 0.08 + 1.959964 * error), rel=1e-6)
    assert accuracy_difference(ours, ours).p == 1.0


def test_null_pairs_of_answers_are_rarely_significant():
    """The exact test keeps below its nominal rate, as it must for few flips."""
    chance = np.random.default_rng(4)
    hard = chance.uniform(0.2, 0.9, 248)
    pairs = [[chance.uniform(size=248) < hard for _ in range(2)] for _ in range(100)]
    assert sum(accuracy_difference(*pair).p < 0.05 for pair in pairs) <= 11


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_every_question_has_its_answer_and_margin():
    dense, tokenizer = load("wiki-a-llama")
    row = zero_shot(dense, tokenizer, limit=30)[0]
    assert len(row["correct"]) == len(row["margins"]) == 30
    assert sum(row["correct"]) / 30 == row["acc"]
    assert [margin > 0 for margin in row["margins"]] == row["correct"]
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 4, 64, torch.Generator().manual_seed(0))
    other = zero_shot(make("random-neurons", dense, ids, 0.5), tokenizer, limit=30)[0]
    won, lost = flips(row["correct"], other["correct"])
    assert (won - lost) / 30 == pytest.approx(row["acc"] - other["acc"])


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_the_whole_logits():
    dense, tokenizer = load("wiki-a-llama")
    text = tokens_of(load_corpus("wiki-a", "test"), tokenizer)[: 64 * 5]
    small = make("magnitude-neurons", dense, text.view(5, 64), 0.3)
    alone, found = compared(small, Reference(dense, text, 64, batch=2))
    with torch.no_grad():
        p, q = (F.softmax(m(text.view(5, 64)).logits[:, :-1].double(), -1) for m in (dense, small))
    assert found.tokens == 5 * 63
    assert found.kl == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-4)
    assert found.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=2 / 315)
    assert found.kl > 0.05
    assert alone.perplexity == pytest.approx(perplexity(small, text, 64).perplexity, rel=1e-6)
    assert alone.losses == pytest.approx(perplexity(small, text, 64).losses, rel=1e-6)
    same = compared(dense, Reference(dense, text, 64))[1]
    assert (same.kl, same.same_top) == (pytest.approx(0.0, abs=1e-9), 1.0)


def test_records_are_compared_on_the_windows_that_both_have():
    """Three windows of seven, evenly spread, are those at 0, 2 and 4."""
    few = {"length": 11, "losses": (10.0, 12.0, 15.0)}
    all_seven = {"length": 11, "losses": (9.0, 50.0, 11.5, 50.0, 13.0, 50.0, 50.0)}
    found = common_ratio(few, all_seven)
    assert found.estimate == pytest.approx(math.exp((1.0 + 0.5 + 2.0) / 3 / 10), rel=1e-12)
    assert common_ratio(all_seven, few).estimate == pytest.approx(1 / found.estimate, rel=1e-12)
    with pytest.raises(ValueError, match="not pairs"):
        common_ratio(few, {"length": 11, "losses": (1.0,)})


def test_logits_that_change_after_the_head_are_compared_too():
    """They do not follow from the inputs of the head, which a `Reference` otherwise keeps."""
    capped, text = tiny("gemma3_text", torch.float32, final_logit_softcapping=0.05), token_ids(2, 20).flatten()
    plain = copy.deepcopy(capped)
    plain.config.final_logit_softcapping = None
    found = compared(plain, Reference(capped, text, 20))[1]
    with torch.no_grad():
        p, q = (F.softmax(m(text.view(2, 20)).logits[:, :-1].double(), -1) for m in (capped, plain))
    assert found.kl == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-4)
    assert found.kl > 0
