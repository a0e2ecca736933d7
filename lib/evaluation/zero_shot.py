"""Zero-shot accuracy of a model by lm-eval."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import nn

from lib.evaluation.benchmark_tasks import (
    LOCAL_TASKS,
    check_known,
    data_folder,
    hub_task,
    local_files,
    local_task,
    task_manager,
)
from lib.evaluation.console import quiet
from lib.evaluation.continuation import TASK, continuation_task

BATCH = 32  # choices in one forward pass


@contextlib.contextmanager
def _no_bars():
    """lm-eval draws a bar while it writes the requests of a task, and has no switch for that."""
    from lm_eval.api import task

    bar, task.tqdm = task.tqdm, lambda documents, **_: documents
    try:
        yield
    finally:
        task.tqdm = bar


def tasks_named(text: str) -> tuple[str, ...]:
    """The tasks of a list separated by commas, every one known to lm-eval, with its file where a data directory is set.

    Raises ValueError for an unknown name and a list without names, FileNotFoundError for a missing file.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    folder = data_folder()
    if not names:
        raise ValueError(f"{text!r} names no task: give names separated by commas, such as {TASK}, {', '.join(LOCAL_TASKS)}")
    for name in names:
        if name in LOCAL_TASKS and folder is not None:
            local_files(name, folder)
        elif name not in (TASK, *LOCAL_TASKS):
            check_known(name, task_manager(True))  # reads lm-eval's index, which takes half a minute
    return names


def zero_shot(model: nn.Module, tokenizer, tasks: tuple[str, ...] = (TASK,), limit: int | None = None) -> list[dict]:
    """Zero-shot accuracy by lm-eval: one row per task with `task, metric, acc, acc_norm, stderr, documents, limit, ...`.

    `wiki_a_continuation` is embedded and needs no network; other names are lm-eval's own tasks, from the folder named by
    PARED_DATA_DIR if lib/evaluation/benchmark_tasks.py lists them, and from the hub otherwise. `metric` is the one of lm-eval's
    metrics that `acc` and its `stderr` report; `limit` is the given limit per task (for MMLU: per subject), `documents` the
    number scored. `correct` and `margins` say of each question whether it was answered correctly by that metric, and how
    far the right choice was ahead of the best other one in nats. Raises what `local_task` and `hub_task` raise, before any
    model runs.
    """
    with quiet("lm_eval", "lm-eval", "transformers", "datasets"), _no_bars():
        import lm_eval

        from lib.evaluation.shared_context import SharedContextLM

        # 1. The tasks, and the model as lm-eval needs it.
        folder, manager = data_folder(), task_manager(not set(tasks) <= {TASK, *LOCAL_TASKS})
        built = {name: _build_task(name, manager, folder) for name in tasks}
        positions = getattr(model.config, "max_position_embeddings", None)
        settings = dict(batch_size=BATCH, max_length=positions, softmax_dtype="float32")
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, **settings)
        loaded = manager.load(list(built.values()))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        # 2. Not `simple_evaluate`: it lists all packages with pip in every call, which takes longer than 25 documents.
        found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    # 3. One row per task.
    rows = []
    for name in tasks:
        scores = found["results"][name]
        metric = next((m for m in ("acc_mutual_info", "acc") if f"{m},none" in scores), None)
        if metric is None:
            raise ValueError(f"lm-eval's task {name!r} reports no accuracy: choose a multiple-choice task")
        task = built[name]  # a group like mmlu counts the documents of its parts
        parts = [part.task_name for part in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [name]
        accuracy, documents = scores[f"{metric},none"], sum(found["n-samples"][part]["effective"] for part in parts)
        asked = [(loaded["tasks"][part], question) for part in parts for question in found["samples"][part]]
        rows.append(
            {
                "task": name,
                "metric": metric,
                "acc": accuracy,
                "acc_norm": scores.get("acc_norm,none"),
                "stderr": (accuracy * (1 - accuracy) / max(documents - 1, 1)) ** 0.5,
                "documents": documents,
                "limit": limit,
                "harness": f"lm-eval {lm_eval.__version__}",
                "correct": [bool(question[metric]) for _, question in asked],
                "margins": [_margin(task, question, metric) for task, question in asked],
            }
        )
    return rows


def _build_task(name: str, manager, folder: Path | None):
    if name == TASK:
        return continuation_task()
    if folder is not None and name in LOCAL_TASKS:
        return local_task(name, folder, manager)
    return hub_task(name, manager)


def _margin(task, question: dict, metric: str) -> float:
    """How far the right choice of a question is ahead of the best other one, in the scores that a metric compares."""
    scores = [answer[0] for answer in question["filtered_resps"]]  # log-likelihoods of the choices
    if metric == "acc_mutual_info":  # then those of the choices alone
        half = len(scores) // 2
        scores = [given - alone for given, alone in zip(scores[:half], scores[half:], strict=True)]
    # In WinoGrande the choices are contexts, and the text of the question says which of them is right.
    right = task.doc_to_text(question["doc"]) if task.multiple_input else question["target"]
    right = task.doc_to_choice(question["doc"]).index(right) if isinstance(right, str) else right
    return scores[right] - max(score for i, score in enumerate(scores) if i != right)
