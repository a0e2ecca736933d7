"""Perplexity by hand, lm-eval against a plain scorer, and measurements that measure."""

import logging
import math
import os
import sys
import time

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from lib.evaluation import perplexity as scoring
from lib.evaluation.console import quiet
from lib.evaluation.continuation import TASK, continuation_documents
from lib.evaluation.perplexity import perplexity
from lib.evaluation.process import peak_memory
from lib.evaluation.speed import self_times, speed, speeds
from lib.evaluation.zero_shot import zero_shot
from lib.models.load import load
from lib.papers.slicegpt import slice_model
from lib.primitives.cost import count, prefill_macs
from tests.conftest import tiny, token_ids


class Counting(nn.Module):
    """Knows that each id is followed by the next one with probability 3/4, anything else sharing 1/4 over 3 ids."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"max_position_embeddings": 8})

    def forward(self, input_ids, use_cache=False):
        probabilities = torch.full((*input_ids.shape, 4), 0.25 / 3)
        probabilities.scatter_(-1, ((input_ids + 1) % 4)[..., None], 0.75)
        return type("Out", (), {"logits": probabilities.log()})


def test_perplexity_by_hand():
    tokens = torch.tensor([0, 1, 2, 3, 0, 2, 2, 3, 1])  # windows 0123 and 0223; the last id is dropped
    found = perplexity(Counting(), tokens, length=4)
    nll = -(4 * math.log(0.75) + 2 * math.log(0.25 / 3))
    assert found.perplexity == pytest.approx(math.exp(nll / 6), rel=1e-6)
    assert (found.tokens, found.windows, found.length) == (6, 2, 4)


def test_perplexity_equals_the_models_own_loss():
    model, ids = tiny("llama", torch.float32), token_ids(6, 16)
    found = perplexity(model, ids.flatten(), length=16, batch=4)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)
    assert perplexity(model, ids.flatten(), length=16, limit=2).windows == 2


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "phi"])
@pytest.mark.parametrize("at_once", [1, 80 * 7, 2**25])
def test_perplexity_never_needs_all_logits_at_once(family, at_once, monkeypatch):
    model, ids = tiny(family, torch.float32), token_ids(6, 16)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    widest = []
    monkeypatch.setattr(scoring, "FLOATS_AT_ONCE", at_once)
    monkeypatch.setattr(scoring.F, "cross_entropy", _remember(scoring.F.cross_entropy, widest))
    found = perplexity(model, ids.flatten(), length=16, batch=4)
    assert found.perplexity == pytest.approx(losses.exp().item(), rel=1e-6)
    assert max(widest) == {1: 1, 80 * 7: 7, 2**25: 60}[at_once]
    assert not model.get_output_embeddings()._forward_pre_hooks


def _remember(run, sizes):
    def remembered(logits, *args, **kwargs):
        sizes.append(len(logits))
        return run(logits, *args, **kwargs)

    return remembered


def test_logits_that_change_after_the_head_are_scored_as_returned():
    model, ids = tiny("gemma3_text", torch.float32, final_logit_softcapping=0.5), token_ids(4, 16)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.abs().max() <= 0.5
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert perplexity(model, ids.flatten(), 16).perplexity == pytest.approx(expected.item(), rel=1e-6)


def test_half_precision_models_are_scored_in_float32():
    model, ids = tiny("llama", torch.float32), token_ids(4, 16).flatten()
    with torch.no_grad():
        model.lm_head.weight *= 30
    model = model.bfloat16()
    logits = model(ids.view(4, 16)).logits[:, :-1].flatten(0, 1).float()
    expected = nn.functional.cross_entropy(logits, ids.view(4, 16)[:, 1:].flatten()).exp()
    assert perplexity(model, ids, 16).perplexity == pytest.approx(expected.item(), rel=1e-5)


def test_windows_beyond_the_positions_are_refused():
    with pytest.raises(ValueError, match="64 positions"):
        perplexity(tiny("llama"), torch.zeros(200, dtype=torch.long), 65)
    for settings in ({"length": 1}, {"length": 8, "limit": 0}):
        with pytest.raises(ValueError, match="at least 1 window of 2"):
            perplexity(tiny("llama"), torch.zeros(200, dtype=torch.long), **settings)


def test_models_without_a_longest_sequence_take_any_window():
    model = Counting()
    with pytest.raises(ValueError, match="8 positions"):
        perplexity(model, torch.arange(40) % 4, length=20)
    model.config = type("Config", (), {})  # as in BLOOM, MPT and Mamba
    assert perplexity(model, torch.arange(40) % 4, length=20).perplexity == pytest.approx(4 / 3)


def test_continuation_questions_are_fair():
    documents = continuation_documents()
    assert len(documents) > 200
    for document in documents:
        assert len(document["choices"]) == len(set(document["choices"])) == 4
        assert {len(c.split()) for c in document["choices"]} == {12}
    counts = [sum(d["answer"] == i for d in documents) for i in range(4)]
    assert min(counts) > len(documents) / 4 * 0.7  # no position gives the answer away
    assert documents == continuation_documents()


def test_lm_eval_agrees_with_a_plain_scorer(capfd):
    model, tokenizer = load("wiki-a-llama")
    row = zero_shot(model, tokenizer, limit=40)[0]
    assert "it/s" not in capfd.readouterr().err  # no progress bars
    hits = 0
    for document in continuation_documents()[:40]:
        scores = []
        for choice in document["choices"]:
            context = tokenizer(document["context"]).input_ids
            ids = torch.tensor([tokenizer(f"{document['context']} {choice}").input_ids])
            assert ids[0, : len(context)].tolist() == context
            with torch.no_grad():
                after = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(context) - 1 :]
                alone = torch.tensor([[tokenizer.bos_token_id, *tokenizer(f" {choice}").input_ids]])
                before = model(alone).logits[0, :-1].log_softmax(-1).gather(1, alone[0, 1:, None])
            scores.append((after.sum() - before.sum()).item())
        hits += max(range(4), key=scores.__getitem__) == document["answer"]
    assert row["acc"] == pytest.approx(hits / 40)
    assert (row["task"], row["metric"], row["documents"], row["limit"]) == (TASK, "acc_mutual_info", 40, 40)
    assert row["stderr"] == pytest.approx((row["acc"] * (1 - row["acc"]) / 39) ** 0.5)


def test_a_sliced_model_runs_in_lm_eval():
    model, tokenizer = load("wiki-a-opt")  # tied: a harness that ties again would corrupt the sliced model
    ids = torch.arange(2, 2002).view(20, 100) % 2048
    sliced = slice_model(model, ids, 0.25)
    before = sliced(ids[:1]).logits
    assert 0 <= zero_shot(sliced, tokenizer, limit=4)[0]["acc"] <= 1
    assert torch.equal(sliced(ids[:1]).logits, before)


def test_embedded_models_are_well_above_chance():
    for name in ("wiki-a-llama", "wiki-a-opt"):
        model, tokenizer = load(name)
        row = zero_shot(model, tokenizer)[0]
        assert row["acc"] - 0.25 > 10 * row["stderr"], row


def test_speed_reports_tokens_and_refuses_long_prompts():
    model = tiny("llama", torch.float32)
    found = speed(model, prompt=16, generated=4, batch=2, repeats=2)
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert found["threads"] == torch.get_num_threads()
    with pytest.raises(ValueError, match="64 positions"):
        speed(model, prompt=60, generated=5)


def test_models_take_turns_when_their_speeds_are_compared():
    models, order = {"first": tiny("llama", torch.float32), "second": tiny("llama", torch.float32)}, []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    found = speeds(models, prompt=16, generated=4, repeats=2)
    turn = ["first"] * (1 + 1 + 4) + ["second"] * (1 + 1 + 4)  # prefill, once more to fill the cache, four tokens
    assert order == 3 * turn  # the first turn warms up
    assert list(found) == ["first", "second"]
    assert found["first"].keys() == found["second"].keys()
    with pytest.raises(ValueError, match="64 positions"):
        speeds(models, prompt=60, generated=5)
    assert order == 3 * turn


def test_a_model_can_be_timed_with_a_cache_of_another_kind():
    model, made = tiny("llama", torch.float32), []

    def empty_cache():
        made.append(DynamicCache())
        return made[-1]

    found = speeds({"usual": model, "other": model}, prompt=16, generated=4, repeats=2, caches={"other": empty_cache})
    assert found["usual"].keys() == found["other"].keys()
    assert [cache.get_seq_length() for cache in made] == 3 * [16 + 4]  # a new one in each turn


def test_peak_memory_sees_a_temporary_tensor():
    size = 200 * 2**20
    for _ in range(3):  # what an earlier run gave back to the allocator must not hide the next one
        peak = peak_memory(lambda: torch.ones(size // 4).sum())
        assert peak is None or 0.9 * size < peak < 1.5 * size


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is counted on Linux")
def test_peak_memory_of_small_blocks_repeats():
    run = lambda: [torch.ones(25_000) for _ in range(400)]  # 40 MB in pieces that the allocator likes to keep  # noqa: E731
    assert all(30e6 < peak_memory(run) < 60e6 for _ in range(3))


def test_count_is_exact():
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    found = count(model)
    per_block = 32 * 48 * 2 + 2 * 32 * 24 + 3 * 32 * 48 + 2 * 32
    assert found.decoder == 3 * per_block
    assert found.params == 80 * 32 + 3 * per_block + 32
    assert found.bytes == 4 * found.params
    assert found.macs_per_token == 3 * (per_block - 64) + 80 * 32
    assert count(tiny("llama", tie_word_embeddings=False)).params == found.params + 80 * 32


def test_macs_of_shortcuts():
    model, k, c = tiny("llama"), 24, 8
    dense = count(slice_model(model, token_ids(), 0.25, layout="dense", slice_head=True))
    low_rank = count(slice_model(model, token_ids(), 0.25, slice_head=True))
    assert dense.macs_per_token - low_rank.macs_per_token == 6 * (k * k - 2 * k * c)
    assert dense.params - low_rank.params == 6 * (k * k - k * c)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prefill_macs_by_hand(family):
    model = tiny(family)
    width, inner, heads, keys, head_size = 32, 48, 4, 2 if family == "llama" else 4, 12 if family == "llama" else 8
    matrices = width * head_size * (2 * heads + 2 * keys) + (3 if family == "llama" else 2) * width * inner
    pairs = heads * head_size * 20 * 21  # scores and values, half of 20 x 21 pairs each
    assert prefill_macs(model, 20) == 3 * (20 * matrices + pairs) + 80 * width


class Sleeper(nn.Module):
    def forward(self, x):
        time.sleep(0.05)
        return x


def test_self_times_go_to_the_module_that_takes_them():
    model = tiny("llama", torch.float32)
    model.model.layers[1].mlp.act_fn = Sleeper()
    found = self_times(model, token_ids(2), repeats=2)
    assert 0.05 <= found["Sleeper"] < 0.5
    assert found["Sleeper"] > found["LlamaMLP"] + found["LlamaDecoderLayer"]  # not counted again in what surrounds it
    assert {"Linear", "LlamaRMSNorm", "LlamaAttention", "LlamaForCausalLM"} <= set(found)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_quiet_loggers_still_report_errors(caplog, capfd):
    logger = logging.getLogger("quiet.part")
    with quiet("quiet.part"):
        logger.warning("a plan")
        logger.error("a failure")
        print("a library speaks", file=sys.stderr)
    assert [record.message for record in caplog.records] == ["a failure"]
    assert "a library speaks" in capfd.readouterr().err
