"""Scores of the shared forward pass are those of lm-eval's own model, whatever mixture of requests arrives."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lib.models import load
from lib.shared_context import SharedContextLM, shared_batches
from lib.slicegpt import slice_model
from tests.conftest import CONFIGS, VOCABULARY, tiny

LONGEST = 40


def request(context: list[int], continuation: list[int]):
    return ("", ""), context, continuation


def requests() -> list:
    """Questions of four choices with contexts of 1, 12 (two of them) and 30 ids, out of order, and what is left to lm-eval."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()

    found = []
    for context in (ids(12), ids(1), ids(30), ids(12)):
        found += [request(context, ids(length)) for length in (3, 7, 1, 5)]
    found += [request(ids(12), ids(4))]  # one continuation
    only_one_id = ids(9)
    found += [request(only_one_id, ids(1)) for _ in range(4)]
    too_long = ids(38)
    found += [request(too_long, ids(length)) for length in (2, 3, 8)]  # fits, just fits, is shortened
    order = torch.randperm(len(found), generator=draw).tolist()
    return [found[place] for place in order]


def both(model, tokenizer, batch: int) -> tuple[list, list]:
    settings = dict(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=LONGEST, softmax_dtype="float64")
    return tuple(cls(**settings)._loglikelihood_tokens(requests(), disable_tqdm=True) for cls in (SharedContextLM, HFLM))


def agree(ours: list, theirs: list) -> None:
    assert [o[0] for o in ours] == pytest.approx([t[0] for t in theirs], abs=1e-4)  # some models compute norms in float32
    assert [o[1] for o in ours] == [t[1] for t in theirs]


@pytest.fixture(scope="module")
def tokenizer():
    return load("wiki-a-llama")[1]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_lm_eval(family, batch, tokenizer):
    """Sliding windows of Gemma (8 positions) included: the contexts of 12 and 30 do not fit into them."""
    agree(*both(tiny(family), tokenizer, batch))


def test_a_sliced_model_shares_its_contexts(tokenizer):
    ids = torch.randint(1, VOCABULARY, (8, 20), generator=torch.Generator().manual_seed(0))
    agree(*both(slice_model(tiny("opt"), ids, 0.25), tokenizer, 32))


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
    batches = shared_batches(everything, LONGEST, 3)
    assert all(len(batch) <= 3 for batch in batches)
    lengths = [len(everything[place][1]) for batch in batches for place in batch]
    assert lengths == sorted(lengths)  # a batch shares no more than its shortest context
    places = sorted(place for batch in batches for place in batch)
    assert len(places) == len(set(places)) == 4 * 4 + 2
    left = [everything[place] for place in range(len(everything)) if place not in places]
    assert sorted((len(context), len(continuation)) for _, context, continuation in left) == [
        *[(9, 1)] * 4, (12, 4), (38, 8),
    ]  # fmt: skip
