"""Answers in a model's own words: lm-eval's counts against a plain reading of the same questions."""

import json
import math
import re

import pytest
import torch

import tasks
from lib.evaluation.spoken import LAST_WORD, documents_of, last_word_documents, spoken, tasks_by_kind
from lib.methods import make
from lib.models.load import load
from tests.conftest import token_ids


def plain_scores(model, tokenizer, texts):
    """Of each text's last word: its log-likelihood after the others, and whether every token of it is the most likely one."""
    found = []
    for text in texts:
        context = text.rsplit(" ", 1)[0]
        whole, start = tokenizer(text).input_ids, len(tokenizer(context).input_ids)
        assert tokenizer(context).input_ids == whole[:start]
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        predicting = range(start - 1, len(whole) - 1)
        likelihood = sum(scores[i, whole[i + 1]].item() for i in predicting)
        found.append((likelihood, all(scores[i].argmax().item() == whole[i + 1] for i in predicting)))
    return found


def test_last_words_are_counted_as_lambada_counts_them():
    model, tokenizer = load("wiki-a-llama")
    small = make("wanda-sp", model, token_ids(8, 64), 0.3)
    texts = [document["text"] for document in last_word_documents()[:60]]
    for network in (model, small):
        perplexity, accuracy = spoken(network, tokenizer, [LAST_WORD], 60)
        scores = plain_scores(network, tokenizer, texts)
        assert accuracy["correct"] == [greedy for _, greedy in scores]
        assert accuracy["value"] == pytest.approx(sum(accuracy["correct"]) / 60)
        assert (perplexity["metric"], accuracy["metric"], accuracy["documents"]) == ("perplexity", "acc", 60)
        assert math.log(perplexity["value"]) == pytest.approx(-sum(score for score, _ in scores) / 60, rel=1e-4)
    assert 3 < sum(spoken(model, tokenizer, [LAST_WORD], 60)[1]["correct"]) < 57


def test_every_last_word_stands_in_its_context():
    documents = last_word_documents()
    assert len(documents) > 100
    for document in documents:
        *before, last = document["text"].split(" ")
        assert last in before
        assert len(before) <= 60


def test_a_generated_answer_is_matched_exactly(tmp_path, monkeypatch):
    model, tokenizer = load("wiki-a-llama")
    question = "The town had a population of 1,250 in 1990 and of 1,300 in"
    prompt = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(prompt, max_new_tokens=128, do_sample=False)[0, prompt.shape[1] :])
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", said.split("Question:")[0])
    assert numbers, said
    right = re.sub(r"[,$]|\.$", "", numbers[-1])
    (tmp_path / "gsm8k").mkdir()
    documents = [{"question": question, "answer": f"So it is.\n#### {answer}"} for answer in (right, "77777")]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    monkeypatch.setenv("PARED_DATA_DIR", str(tmp_path))
    rows = {row["metric"]: row for row in spoken(model, tokenizer, ["gsm8k"])}
    assert rows["exact_match, flexible-extract"]["correct"] == [True, False]
    assert rows["exact_match, flexible-extract"]["value"] == 0.5
    assert rows["exact_match, strict-match"]["correct"] == [False, False]  # the model does not write ####


def test_kinds_and_damaged_files(tmp_path, monkeypatch):
    monkeypatch.delenv("PARED_DATA_DIR", raising=False)
    assert tasks_by_kind(f"{LAST_WORD}, arc_easy, lambada_openai") == (("arc_easy",), (LAST_WORD, "lambada_openai"))
    with pytest.raises(ValueError, match="names no task"):
        tasks_by_kind(" , ")
    with pytest.raises(FileNotFoundError, match="has no lambada/test.jsonl"):
        documents_of("lambada_openai", tmp_path)
    monkeypatch.setenv("PARED_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no lambada/test.jsonl"):
        tasks_by_kind("lambada_openai")
    path = tmp_path / "lambada" / "test.jsonl"
    path.parent.mkdir()
    for content, message in (
        ("\n", "is empty"),
        ('{"text": "a b"}\n{"text": ', "record 2 is not a JSON document"),
        ('{"text": "a b"}\n{"word": "a"}', "record 2 has no text"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            documents_of("lambada_openai", tmp_path)


def test_the_task_prints_both_kinds(capsys, monkeypatch):
    monkeypatch.delenv("PARED_DATA_DIR", raising=False)
    tasks.evaluate.body(None, "wiki-a-llama", length=64, windows=2, tasks=f"wiki_a_continuation,{LAST_WORD}", limit=8)
    said = capsys.readouterr().out
    assert "wiki_a_continuation: accuracy" in said
    assert re.search(rf"{LAST_WORD}: acc \d\.\d{{3}} ± \d\.\d{{3}}, 8 documents", said)
