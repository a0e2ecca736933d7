"""Answers in a model's own words: lm-eval's counts against a plain reading of the same questions."""

import json
import math
import re
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from invoke import Exit

import tasks
from lib.evaluation import perplexity
from lib.evaluation import spoken as module
from lib.evaluation.spoken import LAST_WORD, documents_of, last_word_documents, reported, spoken, tasks_by_kind
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


def test_a_generated_answer_is_matched_exactly(tmp_path, monkeypatch, capsys):
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
    assert {(row["shots"], row["usual_shots"]) for row in rows.values()} == {(0, 5)}
    tasks.evaluate.body(None, "wiki-a-llama", length=64, windows=2, tasks="gsm8k")
    said = capsys.readouterr().out
    assert "gsm8k: exact_match, flexible-extract 0.500 ± 0.500, 0 shots (lm-eval's own: 5), 2 documents" in said


QUESTIONS = (
    "How many people live in the town?",
    "The river is 120 km long, and the railway follows it. Why?",
    "Who was the king?",
)


def say(question, model, tokenizer, tokens):
    """The most likely continuation of a question of GSM8K, every token from a pass over all before it, without a cache."""
    ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return re.split("Question:|</s>", tokenizer.decode(ids[0, start:], skip_special_tokens=True))[0]


@pytest.mark.parametrize(
    ("method", "settings"), [("slicegpt", {}), ("svd-llm", {}), ("flap", {}), ("modegpt", {"attention": "all"})], ids=str
)
def test_compressed_models_answer_with_the_cache_as_without_it(tmp_path, monkeypatch, method, settings):
    """Questions of unequal length in one batch, so that the cache also holds padding."""
    model, tokenizer = load("wiki-a-llama")
    dense = [say(question, model, tokenizer, 24) for question in QUESTIONS]
    small = make(method, model, token_ids(8, 64), 0.3, **settings)
    (tmp_path / "gsm8k").mkdir()
    documents = [json.dumps({"question": question, "answer": "#### 1"}) for question in QUESTIONS]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(documents))
    monkeypatch.setenv("PARED_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(module, "GENERATED", 24)
    seen = []
    monkeypatch.setattr(module, "_rows", lambda name, metrics, found: seen.extend(found["samples"][name]) or [])
    spoken(small, tokenizer, ["gsm8k"])
    said = {sample["doc"]["question"]: sample["resps"][0][0] for sample in seen}
    answers = [say(question, small, tokenizer, 24) for question in QUESTIONS]
    assert [said[question] for question in QUESTIONS] == answers
    assert all(answers)
    assert answers != dense


@pytest.fixture
def index(monkeypatch):
    """lm-eval's index of these folders of tasks alone, because reading all of them takes half a minute."""
    folder = Path(lm_eval.tasks.__file__).parent
    own = [str(folder / name) for name in ("drop", "ifeval", "humaneval", "mmlu_pro", "wikitext", "noticia", "tinyBenchmarks")]
    found = lm_eval.tasks.TaskManager(include_defaults=False, include_path=own)
    monkeypatch.setattr(module, "task_manager", lambda every_task: found)


REFUSED = {
    "humaneval": "'humaneval' runs code that the model writes",
    "noticia": "'noticia' reports rouge1, average_len, and no mean over questions",
    "tinyGSM8k": "'tinyGSM8k' reports exact_match, and no mean over questions",  # it estimates what all questions would give
    "mmlu_pro": "'mmlu_pro' reports exact_match, and no accuracy of choices among answers: name its tasks one by one",
    "wikitext": "'wikitext' reports word_perplexity, byte_perplexity, bits_per_byte, and no accuracy",
    "no_such_task": "unknown task 'no_such_task'",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_tasks_that_no_row_can_report_are_refused_before_any_work(index, monkeypatch, name, message):
    def work(*_, **__):
        raise AssertionError("no model should run")

    monkeypatch.setattr(perplexity, "perplexity", work)
    monkeypatch.setattr(lm_eval, "evaluate", work)
    with pytest.raises(Exit, match=message):
        tasks.evaluate.body(None, "wiki-a-llama", tasks=name)
    with pytest.raises(ValueError, match=f"lm-eval's (task )?'{name}'|unknown task"):
        spoken(None, None, [name])


def test_tasks_without_the_usual_metrics_report_their_first_mean_over_questions(index):
    assert tasks_by_kind("drop,ifeval,mmlu_pro_law") == ((), ("drop", "ifeval", "mmlu_pro_law"))
    assert [reported(name) for name in ("drop", "ifeval", "mmlu_pro_law", "gsm8k", LAST_WORD)] == [
        ("em",),
        ("prompt_level_strict_acc",),
        ("exact_match",),
        ("exact_match",),
        ("perplexity", "acc"),
    ]


def test_a_metric_of_the_tasks_own_is_reported(index, tmp_path, monkeypatch):
    model, tokenizer = load("wiki-a-llama")
    passage, question = "The town had a population of 1,250 in 1990. In 2000 it was", "larger, with a population of"
    prompt = tokenizer(f"{passage} {question}", return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(prompt, max_new_tokens=128, do_sample=False)[0, prompt.shape[1] :]).split(".")[0]
    assert said.strip()
    none = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    rest = {"passage": passage, "question": question, "validated_answers": {"number": [], "date": [], "spans": []}}
    documents = [rest | {"query_id": span, "answer": none | {"spans": [span]}} for span in (said, "ninety", "fifty", "sixty")]
    definition = Path(lm_eval.tasks.__file__).parent / "drop" / "default.yaml"
    monkeypatch.setitem(module.FILES, "drop", ("drop.jsonl", "validation", ("passage", "question")))
    monkeypatch.setattr(module, "_definitions", lambda: {"drop": definition})
    monkeypatch.setenv("PARED_DATA_DIR", str(tmp_path))
    (tmp_path / "drop.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (row,) = spoken(model, tokenizer, ["drop"])
    assert (row["metric"], row["value"], row["correct"]) == ("em", 0.25, [True, False, False, False])
    assert row["stderr"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)


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
    assert re.search(rf"{LAST_WORD}: acc \d\.\d{{3}} ± \d\.\d{{3}}, 0 shots, 8 documents", said)
