"""Tasks that a model answers in its own words, by lm-eval: LAMBADA, its question on the embedded text, and generated answers.

To choose among given answers, a model only has to find the right one less unlikely than the others. Here the token that it finds
most likely of all has to be right, one after the other: this breaks first when a model is compressed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lib.evaluation.benchmark_tasks import LOCAL_TASKS, data_folder, hub_task, task_manager
from lib.evaluation.console import quiet
from lib.evaluation.continuation import TASK
from lib.evaluation.text import read_text, wiki_a_articles, wiki_a_split
from lib.evaluation.zero_shot import BATCH, tasks_named

LAST_WORD = "wiki_a_last_word"
CONTEXT_WORDS = 60  # at most, before the last word
FILES = {  # tasks of lm-eval whose documents may lie in the data directory: file, split and columns
    "lambada_openai": ("lambada/test.jsonl", "test", ("text",)),
    "gsm8k": ("gsm8k/test.jsonl", "test", ("question", "answer")),
}
SPOKEN = (LAST_WORD, *FILES)
GENERATED = 256  # tokens of an answer at most, unless a task says otherwise; lm-eval's own default
METRICS = ("exact_match", "acc", "perplexity")  # of lm-eval, those that a row reports


def last_word_documents() -> list[dict]:
    """Questions as LAMBADA asks them, `{"text": ...}`, whose last word is to be said, from the held-out articles of wiki-a.

    Of every paragraph, the longest part that ends with a sentence, and whose last word occurs earlier among the words before it.
    """
    documents = []
    for position, (_, rows) in enumerate(wiki_a_articles()):
        for row in rows if wiki_a_split(position) == "test" else ():
            words = row.split()
            for end in range(len(words) - 1, 10, -1):
                last, before = words[end].rstrip("."), words[max(0, end - CONTEXT_WORDS) : end]
                if words[end].endswith(".") and len(last) > 3 and last.isalpha() and last in before:
                    documents.append({"text": " ".join([*before, last])})
                    break
    return documents


def tasks_by_kind(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks of a list separated by commas: those that choose among answers, and those that are answered in words.

    Raises ValueError for an unknown name and a list without names, FileNotFoundError for a missing file of a data directory.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    speaking = tuple(name for name in names if _is_spoken(name))
    for name in speaking:
        if name in FILES and data_folder() is not None:
            _file_of(name, data_folder())
    others = ",".join(name for name in names if name not in speaking)
    return tasks_named(others) if others or not speaking else (), speaking


def _is_spoken(name: str) -> bool:
    if name in SPOKEN:
        return True
    if name in (TASK, *LOCAL_TASKS):
        return False
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = task_manager(True)  # reads lm-eval's index, which takes half a minute
    path = manager.task_index[name].yaml_path if name in manager.task_index else None
    return bool(path) and load_yaml(path, resolve_func=False).get("output_type") in ("generate_until", "loglikelihood")


def spoken(model: nn.Module, tokenizer, tasks: Sequence[str], limit: int | None = None) -> list[dict]:
    """Zero-shot scores by lm-eval: rows with `task, metric, value, stderr, documents, limit, harness, correct`.

    `wiki_a_last_word` is embedded; `lambada_openai` and `gsm8k` come from the folder named by PARED_DATA_DIR, or else from the
    hub, as do lm-eval's other tasks. metric: `acc` (the most likely continuation is the answer), `perplexity` of an answer,
    or `exact_match` with the name of lm-eval's filter; `correct` says of each question whether it was answered correctly.
    Raises FileNotFoundError or ValueError, before any model runs, for documents that are not there or not usable.
    """
    # lm-eval draws bars for every task, and has no switch for that.
    with quiet("lm_eval", "lm-eval", "transformers", "datasets"), contextlib.redirect_stderr(io.StringIO()):
        import lm_eval

        from lib.evaluation.shared_context import SharedContextLM

        built = {name: _task(name) for name in tasks}
        manager = task_manager(False)
        loaded = manager.load(list(built.values()))
        positions = getattr(model.config, "max_position_embeddings", None)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
            if task.OUTPUT_TYPE == "generate_until" and positions:  # room for the question too
                longest = {"max_gen_toks": min(GENERATED, positions // 2)}
                task.set_config(key="generation_kwargs", value=longest | task.config.generation_kwargs)
        settings = dict(batch_size=BATCH, max_length=positions, softmax_dtype="float32")
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, **settings)
        found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return [row | {"limit": limit, "harness": f"lm-eval {lm_eval.__version__}"} for name in tasks for row in _rows(name, found)]


def _rows(name: str, found: dict) -> list[dict]:
    """A row for each metric of a task among what lm-eval found."""
    rows, samples = [], found["samples"][name]
    for key, value in found["results"][name].items():
        metric, _, rule = key.partition(",")
        if metric not in METRICS:
            continue
        own = [s[metric] for s in samples if s["filter"] == rule] if metric != "perplexity" else []
        stderr = (value * (1 - value) / max(len(own) - 1, 1)) ** 0.5 if own else None
        row = {"task": name, "metric": metric if rule == "none" else f"{metric}, {rule}", "value": value, "stderr": stderr}
        rows.append(row | {"documents": found["n-samples"][name]["effective"], "correct": [bool(right) for right in own]})
    if not rows:
        raise ValueError(f"lm-eval's task {name!r} reports none of {', '.join(METRICS)}: choose another task")
    return rows


def _task(name: str):
    """lm-eval's task `name`, with its documents."""
    if name == LAST_WORD:
        return _with_documents("lambada_openai", {"test": last_word_documents()}, task=LAST_WORD)
    folder = data_folder()
    if name in FILES and folder is not None:
        return _with_documents(name, {FILES[name][1]: documents_of(name, folder)})
    return hub_task(name, task_manager(True))


def documents_of(name: str, folder: Path) -> list[dict]:
    """The documents of a task in a data directory. Raises FileNotFoundError, or ValueError with file and record."""
    path, columns = _file_of(name, folder), FILES[name][2]
    documents = []
    for number, line in enumerate((line for line in read_text(path).split("\n") if line.strip()), 1):
        try:
            documents.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, record {number} is not a JSON document ({error})") from error
        if missing := [column for column in columns if not str(documents[-1].get(column) or "").strip()]:
            raise ValueError(f"{path}, record {number} has no {', '.join(missing)}: {name} needs {', '.join(columns)}")
    if not documents:
        raise ValueError(f"{path} is empty: {name} needs one JSON document a line")
    return documents


def _file_of(name: str, folder: Path) -> Path:
    file = FILES[name][0]
    path = next((p for p in (folder / f"{file}.gz", folder / file) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"data directory {folder} has no {file}, plain or as .gz: add it, or leave out --data-dir")
    return path


@functools.cache
def _definitions() -> dict[str, Path]:
    """lm-eval's own definitions of the tasks in FILES."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    return {"lambada_openai": folder / "lambada" / "lambada_openai.yaml", "gsm8k": folder / "gsm8k" / "gsm8k.yaml"}


def _with_documents(name: str, documents: dict[str, list[dict]], **changed):
    """lm-eval's definition of a task, reading `documents` {split: records} in place of the hub."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(_definitions()[name], resolve_func=True) | changed
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in documents:
            config[key] = None
    config.pop("tag", None)
    table = {split: datasets.Dataset.from_list(found) for split, found in documents.items()}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: table})
