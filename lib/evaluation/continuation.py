"""An lm-eval multiple-choice task made from the held-out articles of wiki-a: which of four passages continues this one?

Small models are at chance on the papers' benchmarks. On this task a workshop model is clearly above chance and loses
accuracy as it is compressed, and lm-eval scores it like any other task.
"""

from __future__ import annotations

import random
from operator import itemgetter

from lib.evaluation.wiki_a import wiki_a_articles, wiki_a_split

TASK = "wiki_a_continuation"
CHOICES, CONTEXT_WORDS, CONTINUATION_WORDS = 4, 40, 12


def continuation_documents() -> list[dict]:
    """Questions with `context`, `choices` (four passages of 12 words) and `answer` (index of the true one).

    One question per test-split paragraph that is long enough; wrong choices are the same stretch of paragraphs in three
    other test articles, so they differ in topic but not in length, style or position.
    """
    passages: dict[str, list[tuple[str, str]]] = {}
    for position, (title, rows) in enumerate(wiki_a_articles()):
        if wiki_a_split(position) != "test":
            continue
        words = [row.split() for row in rows]
        passages[title] = [
            (" ".join(w[:CONTEXT_WORDS]), " ".join(w[CONTEXT_WORDS : CONTEXT_WORDS + CONTINUATION_WORDS]))
            for w in words
            if len(w) >= CONTEXT_WORDS + CONTINUATION_WORDS
        ]
    passages = {title: found for title, found in passages.items() if found}
    draw = random.Random(0)
    documents = []
    for title, found in passages.items():
        others = [name for name in passages if name != title]
        for context, truth in found:
            wrong = [draw.choice(passages[name])[1] for name in draw.sample(others, CHOICES - 1)]
            answer = draw.randrange(CHOICES)
            documents.append({"context": context, "choices": [*wrong[:answer], truth, *wrong[answer:]], "answer": answer})
    return documents


def continuation_task() -> dict:
    """The task as an lm-eval configuration, zero-shot, scored by mutual information.

    A choice's score is its log-likelihood after the context minus its log-likelihood alone. Four passages of real text
    differ more in their own likelihood than in how well they follow: by plain likelihood these models are near chance.
    """
    import datasets

    return {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(continuation_documents())},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": itemgetter("context"),
        "doc_to_choice": itemgetter("choices"),
        "doc_to_target": itemgetter("answer"),
        "metric_list": [
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }
