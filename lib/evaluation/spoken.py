"""Tasks that a model answers in its own words, by lm-eval: LAMBADA, its question on the embedded text, and generated answers.

To choose among given answers, a model only has to find the right one less unlikely than the others. Here the token that it finds
most likely of all has to be right, one after the other: this breaks first when a model is compressed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from lib.evaluation.benchmark_tasks import LOCAL_TASKS, check_known, data_folder, hub_task, task_manager
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
USUAL = {"exact_match": "mean", "acc": "mean", "perplexity": "perplexity"}  # metrics that rows report: how lm-eval sums them up
CHOSEN = ("acc_mutual_info", "acc")  # metrics that `zero_shot` reports of a task or a group whose answers are given


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

    Raises ValueError for an unknown name, a list without names and a task whose metrics no row can report, and
    FileNotFoundError for a missing file of a data directory: all of it before any model runs.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    speaking = tuple(name for name in names if _is_spoken(name))
    for name in speaking:
        reported(name)
        if name in FILES and data_folder() is not None:
            _file_of(name, data_folder())
    for name in names:
        if name not in (TASK, *LOCAL_TASKS, *speaking):
            _check_chosen(name)
    others = ",".join(name for name in names if name not in speaking)
    return tasks_named(others) if others or not speaking else (), speaking


def _is_spoken(name: str) -> bool:
    return name in SPOKEN or (name not in (TASK, *LOCAL_TASKS) and _output(name) in ("generate_until", "loglikelihood"))


def _output(name: str) -> str:
    """What lm-eval asks of a model in a task, such as `generate_until`; empty for what is not a single task of a YAML file."""
    config = _definition(name)
    if "class" in config or not isinstance(config.get("task"), str):
        return ""
    return config.get("output_type", "generate_until")  # as lm-eval does


def _definition(name: str) -> dict:
    """lm-eval's own definition of a task or a group, functions by their names. Raises ValueError for an unknown name."""
    if name in SPOKEN:
        from lm_eval.tasks._yaml_loader import load_yaml

        return load_yaml(_definitions()["lambada_openai" if name == LAST_WORD else name], resolve_func=False)
    manager = task_manager(True)  # reads lm-eval's index, which takes half a minute
    check_known(name, manager)
    return manager.task_index[name].cfg or {}


def _metrics(config: Mapping) -> dict[str, str]:
    """{metric: how it is summed up over the questions} of a definition, in its order."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    if "class" in config:
        return {}  # only its program knows
    usual = DEFAULT_METRIC_REGISTRY.get(config.get("output_type", "generate_until"), [])
    listed = config.get("metric_list") or [{"metric": name} for name in usual]
    return {entry["metric"]: entry.get("aggregation", USUAL.get(entry["metric"], "")) for entry in listed}


def reported(name: str) -> tuple[str, ...]:
    """The metrics of a task answered in words that its rows report: those of `USUAL`, or else its first mean over questions.

    Raises ValueError, with the metrics that the task has, where there is none, and for a task that runs what the model writes.
    """
    config = _definition(name)
    if config.get("unsafe_code"):
        raise ValueError(f"lm-eval's task {name!r} runs code that the model writes, and the suite does not: choose another task")
    if _output(name) not in ("generate_until", "loglikelihood"):
        raise ValueError(f"lm-eval's {name!r} is no single task that is answered in words: name such tasks one by one")
    metrics = _metrics(config)
    found = [metric for metric, how in metrics.items() if USUAL.get(metric) == how]
    # A function of a task has a path in place of a name, and lm-eval files what it finds under yet another name.
    means = [metric for metric, how in metrics.items() if how == "mean" and "/" not in metric]
    if not found and not means:
        raise ValueError(f"lm-eval's task {name!r} reports {_listed(metrics)}, and no mean over questions: choose another task")
    return tuple(found or means[:1])


def _listed(metrics: Iterable[str]) -> str:
    return ", ".join(metric.rsplit(".", 1)[-1] for metric in metrics) or "no metric of its own"


def _check_chosen(name: str) -> None:
    """Raise ValueError for a task or a group of lm-eval that would end without the accuracy that `zero_shot` reports."""
    config = _definition(name)
    if not config:
        return  # a tag of several tasks, which `hub_task` refuses with their names
    if "group" in config:
        sums = config.get("aggregate_metric_list") or []
        metrics = [entry.get("metric", "") for entry in (sums if isinstance(sums, list) else [sums])]
        advice = "name its tasks one by one"
    else:
        metrics, advice = list(_metrics(config)), "choose another task"
    if not set(CHOSEN) & set(metrics) or _output(name) not in ("multiple_choice", ""):
        raise ValueError(f"lm-eval's {name!r} reports {_listed(metrics)}, and no accuracy of choices among answers: {advice}")


def spoken(model: nn.Module, tokenizer, tasks: Sequence[str], limit: int | None = None) -> list[dict]:
    """Zero-shot scores by lm-eval: rows with `task, metric, value, stderr, shots, usual_shots, documents, correct, ...`.

    `wiki_a_last_word` is embedded; `lambada_openai` and `gsm8k` come from the folder named by PARED_DATA_DIR, or else from the
    hub, as do lm-eval's other tasks. metric: `acc` (the most likely continuation is the answer), `perplexity` of an answer,
    `exact_match`, or what `reported` finds, with the name of lm-eval's filter. shots: solved examples before each question,
    which is none, and `usual_shots` those of lm-eval's own definition. `correct` says of each question whether it was answered
    correctly, where the metric is 0 or 1 for each. Raises FileNotFoundError or ValueError, before any model runs, for documents
    that are not there or not usable, and for a task whose metrics no row can report.
    """
    metrics = {name: reported(name) for name in tasks}
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
    last = {"limit": limit, "harness": f"lm-eval {lm_eval.__version__}"}
    return [row | last for name in tasks for row in _rows(name, metrics[name], found)]


def _rows(name: str, metrics: Sequence[str], found: dict) -> list[dict]:
    """A row for each of these metrics of a task among what lm-eval found."""
    rows, samples = [], found["samples"][name]
    common = {"shots": found["n-shot"][name], "usual_shots": _definition(name).get("num_fewshot") or 0}
    common |= {"documents": found["n-samples"][name]["effective"]}
    for key, value in found["results"][name].items():
        metric, _, rule = key.partition(",")
        if metric not in metrics:
            continue
        own = [float(s[metric]) for s in samples if s["filter"] == rule] if metric != "perplexity" else []
        stderr = statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else None
        row = {"task": name, "metric": metric if rule == "none" else f"{metric}, {rule}", "value": value, "stderr": stderr}
        rows.append(row | common | {"correct": [right == 1 for right in own] if set(own) <= {0, 1} else []})
    if not rows:
        raise ValueError(f"lm-eval's task {name!r} said nothing of {', '.join(metrics)}: choose another task")
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
