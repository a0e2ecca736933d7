"""The greedy continuation of a prompt, against one made token by token without caches."""

import torch

from lib.evaluation.generated import greedy_text
from lib.methods import make
from lib.models.load import load
from tests.conftest import token_ids

PROMPT = "The city lies on the river"


def by_hand(model, tokenizer, tokens):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_it_is_the_most_likely_token_each_time():
    model, tokenizer = load("wiki-a-llama")
    assert greedy_text(model, tokenizer, PROMPT, 12) == by_hand(model, tokenizer, 12) != ""
    assert not greedy_text(model, tokenizer, PROMPT).startswith(PROMPT)


def test_settings_of_the_checkpoint_for_sampling_do_not_matter():
    model, tokenizer = load("wiki-a-llama")
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50)
    assert greedy_text(model, tokenizer, PROMPT, 12) == by_hand(model, tokenizer, 12)


def test_compressed_models_speak():
    model, tokenizer = load("wiki-a-llama")
    for method in ("slicegpt", "svd-llm", "shortgpt", "flap"):
        small = make(method, model, token_ids(4, 32), 0.25)
        assert greedy_text(small, tokenizer, PROMPT, 12) == by_hand(small, tokenizer, 12)
