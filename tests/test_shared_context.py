"""Scores of the shared forward pass are those of lm-eval's own model, whatever mixture of requests arrives."""

import math

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lib.evaluation.perplexity import before_head
from lib.evaluation.shared_context import SharedContextLM, shared_batches
from lib.models.load import load
from lib.papers.slicegpt import slice_model
from lib.primitives.structured import remove_blocks
from tests.conftest import CONFIGS, VOCABULARY, tiny, token_ids

LONGEST = 40


def request(context: list[int], continuation: list[int]):
    return ("", ""), context, continuation


def requests() -> list:
    """Questions of four choices after 11, 12 (two of them) and 30 ids, out of order, and what is left to lm-eval."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()

    found = []
    for context in (ids(12), ids(11), ids(30), ids(12)):
        found += [request(context, ids(length)) for length in (3, 7, 1, 5)]
    found += [request(ids(12), ids(4))]  # one continuation
    alone = ids(1)
    found += [request(alone, ids(length)) for length in (3, 6)]
    only_one_id = ids(9)
    found += [request(only_one_id, ids(1)) for _ in range(4)]
    too_long = ids(38)
    found += [request(too_long, ids(length)) for length in (2, 3, 8)]  # fits, just fits, is shortened
    order = torch.randperm(len(found), generator=draw).tolist()
    return [found[place] for place in order]


def agree(model, tokenizer, batch: int) -> None:
    """Scores of both classes are the same, and ours has read with a cache."""
    settings = dict(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=LONGEST, softmax_dtype="float64")
    theirs = HFLM(**settings)._loglikelihood_tokens(requests(), disable_tqdm=True)
    cached, forward = [], model.forward
    model.forward = lambda *a, **k: cached.append(k.get("past_key_values") is not None) or forward(*a, **k)
    ours = SharedContextLM(**settings)._loglikelihood_tokens(requests(), disable_tqdm=True)
    model.forward = forward
    assert any(cached)
    half = next(model.parameters()).dtype == torch.bfloat16  # otherwise some models compute norms in float32
    assert [o[0] for o in ours] == pytest.approx([t[0] for t in theirs], abs=0.5 if half else 1e-4)
    assert half or [o[1] for o in ours] == [t[1] for t in theirs]


@pytest.fixture(scope="module")
def tokenizer():
    return load("wiki-a-llama")[1]


@pytest.mark.parametrize("batch", [4, 9, 32])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_lm_eval(family, batch, tokenizer):
    """Sliding windows of Gemma (8 positions) included: the contexts of 12 and 30 do not fit into them."""
    agree(tiny(family), tokenizer, batch)


def test_a_model_that_changes_its_logits_after_the_head(tokenizer):
    """Soft-capping bends them, and bends these enough to be seen."""
    model = tiny("gemma3_text")
    model.get_output_embeddings().weight.data.mul_(50)
    model.config.final_logit_softcapping = 2.0
    assert before_head(model, input_ids=token_ids())[1] is None
    agree(model, tokenizer, 32)


def test_the_head_reads_only_what_predicts_a_continuation(tokenizer):
    """20 positions of 4 questions of 16 tokens, the last ones of both passes, and those of the first again, to compare."""
    model, read = tiny("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: read.append(out[..., 0].numel()))
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=LONGEST)
    lm._scores([request([question] * 12, [1, 2, 3, 4, 5]) for question in (5, 6, 7, 8)])
    assert read == [4, 4, 4, 20]


def test_a_broken_model_is_scored_as_broken(tokenizer):
    """Its logits are no numbers from word 7 on; another choice of the same question does not suffer."""
    model = tiny("llama")
    model.get_input_embeddings().weight.data[7] = torch.nan
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=LONGEST)
    found = lm._loglikelihood_tokens([request([5, 6], [8, 7, 9]), request([5, 6], [8, 9])], disable_tqdm=True)
    assert [math.isnan(score) for score, _ in found] == [True, False]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compressed_models_share_their_contexts(family, tokenizer):
    model = tiny(family)
    sliced = slice_model(model, token_ids(), 0.25, layout="low-rank")  # shares no table with the model, which is cast below
    for smaller in (sliced, remove_blocks(model, [1]), model.to(torch.bfloat16)):
        agree(smaller, tokenizer, 32)


def test_a_greedy_continuation_is_recognised(tokenizer):
    model, context = tiny("llama"), [5, 6, 7]
    greedy = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, min_new_tokens=4)[0, 3:].tolist()
    other = [*greedy[:-1], greedy[-1] % (VOCABULARY - 1) + 1]
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=LONGEST)
    found = lm._loglikelihood_tokens([request(context, greedy), request(context, other)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_a_context_is_read_once(tokenizer, monkeypatch):
    model, read = tiny("llama"), []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: read.append(k["input_ids"].numel()) or f(*a, **k))
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=LONGEST)
    context = list(range(1, 31))
    lm._loglikelihood_tokens([request(context, [i, i + 1]) for i in range(1, 5)], disable_tqdm=True)
    assert read == [29, 4 * 2]


def test_what_gains_nothing_is_left_to_lm_eval():
    everything = requests()
    batches = shared_batches(everything, LONGEST, 9)
    assert all(1 < len(batch) <= 9 for batch in batches)
    for context in {tuple(everything[place][1]) for batch in batches for place in batch}:  # no question is cut apart
        assert sum(any(tuple(everything[place][1]) == context for place in batch) for batch in batches) == 1
    lengths = [len(everything[place][1]) for batch in batches for place in batch]
    assert lengths == sorted(lengths)  # a batch shares no more than its shortest context
    places = sorted(place for batch in batches for place in batch)
    assert len(places) == len(set(places)) == 4 * 4 + 2
    left = [everything[place] for place in range(len(everything)) if place not in places]
    assert sorted((len(context), len(continuation)) for _, context, continuation in left) == [
        (1, 3), (1, 6), *[(9, 1)] * 4, (12, 4), (38, 8),
    ]  # fmt: skip
    assert shared_batches(everything, LONGEST, 1) == []
