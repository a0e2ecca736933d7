"""The papers' zero-shot benchmarks from a folder of files, through lm-eval's own task definitions.

Prompts, choices and metrics are those of lm-eval's YAML files; only the source of the documents is replaced. One setting
names the folder, the same as for corpora: the environment variable PARED_DATA_DIR, or the flag --data-dir. Without it the
hub's own data sets are used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.evaluation.text import DATA_DIR_VARIABLE, read_text


@dataclass(frozen=True)
class LocalTask:
    """Where a task's documents are in a data directory, and how to check one.

    files: {lm-eval's split: file names, the first that exists is taken}; the first split is scored, the others may be missing.
    columns: read by lm-eval's definition. choices(document) -> number of choices; answer(document) -> index of the right one.
    """

    files: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    choices: Callable[[dict], int]
    answer: Callable[[dict], int]


def _labelled(document: dict) -> int:
    return document["choices"]["label"].index(document["answerKey"].lstrip())


def _as_listed(folder: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{folder}/{split}.jsonl.gz", f"{folder}/{split}.jsonl") for split in splits}


def _arc(name: str) -> LocalTask:
    files = _as_listed(f"arc/{name}", "test", "validation", "train")
    return LocalTask(files, ("question", "choices", "answerKey"), lambda d: len(d["choices"]["text"]), _labelled)


LOCAL_TASKS = {
    "arc_easy": _arc("ARC-Easy"),
    "arc_challenge": _arc("ARC-Challenge"),
    "openbookqa": LocalTask(
        _as_listed("openbookqa", "test", "validation", "train"), ("question_stem", "choices", "answerKey"),
        lambda d: len(d["choices"]["text"]), _labelled,
    ),
    "hellaswag": LocalTask(
        # An even sample of 1,000 rows with the original text goes first: the whole set is only available slightly cleaned.
        {"validation": ("hellaswag/validation_raw_random1000.jsonl.gz", *_as_listed("hellaswag", "validation")["validation"])},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), lambda d: len(d["endings"]), lambda d: int(d["label"]),
    ),
    "winogrande": LocalTask(
        {"validation": ("winogrande/winogrande_xl_validation.jsonl.gz",)}, ("sentence", "option1", "option2", "answer"),
        lambda d: 2 if "_" in d["sentence"] else 0, lambda d: {"1": 0, "2": 1}[d["answer"]],
    ),
    "piqa": LocalTask(
        _as_listed("piqa", "validation", "train"), ("goal", "sol1", "sol2", "label"), lambda d: 2, lambda d: d["label"]
    ),
    "mathqa": LocalTask(
        _as_listed("mathqa", "test", "validation", "train"), ("Problem", "options", "correct"), lambda d: 5,
        lambda d: "abcde".index(d["correct"]),
    ),
    "mmlu": LocalTask(
        _as_listed("mmlu", "test", "dev"), ("question", "subject", "choices", "answer"), lambda d: len(d["choices"]),
        lambda d: d["answer"],
    ),
}  # fmt: skip
MMLU_SUBJECTS = 57
_DEFINITIONS = ("arc", "openbookqa", "hellaswag", "winogrande", "piqa", "mathqa", "mmlu/default")  # folders of lm-eval


@functools.cache
def task_manager(every_task: bool):
    """lm-eval's index of tasks: those of LOCAL_TASKS, or all. Reading its thousands of files takes half a minute: once."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    own = [str(folder / name) for name in _DEFINITIONS]
    return lm_eval.tasks.TaskManager(include_defaults=every_task, include_path=None if every_task else own)


def data_folder() -> Path | None:
    """The data directory that is set, or None. Raises FileNotFoundError if it is not there."""
    named = os.environ.get(DATA_DIR_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data directory {folder} does not exist: set {DATA_DIR_VARIABLE} or --data-dir to a folder")
    return folder


def local_files(task: str, folder: Path) -> dict[str, Path]:
    """{split: file} of a task in a data directory. Raises FileNotFoundError, naming the file, without the scored split."""
    found = {}
    for split, names in LOCAL_TASKS[task].files.items():
        existing = [folder / name for name in names if (folder / name).is_file()]
        if existing:
            found[split] = existing[0]
        elif not found:
            raise FileNotFoundError(
                f"data directory {folder} has no {names[0]}, the {split} split of {task}: add that file, or leave out "
                f"--data-dir and {DATA_DIR_VARIABLE} to use the hub"
            )
    return found


@functools.lru_cache(maxsize=8)
def _checked_documents(task: str, path: Path, modified: int) -> tuple[dict, ...]:
    spec, documents = LOCAL_TASKS[task], []
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: {task} needs one JSON document a line")
    for number, line in enumerate(lines, 1):
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, record {number} is not a JSON document ({error})") from error
        missing = [column for column in spec.columns if column not in document]
        if missing:
            raise ValueError(
                f"{path}, record {number} has no column {', '.join(missing)}: {task} needs {', '.join(spec.columns)}"
            )
        try:
            right = 0 <= spec.answer(document) < spec.choices(document)
        except (ValueError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            keys = {c: document[c] for c in spec.columns if c in ("answerKey", "label", "answer", "correct")}
            raise ValueError(f"{path}, record {number} has an answer that is none of its choices: {keys}")
        documents.append(document)
    return tuple(documents)


def local_documents(task: str, folder: Path) -> dict[str, tuple[dict, ...]]:
    """{split: documents} of a task, every one checked for its columns and its answer.

    Raises FileNotFoundError for a missing file; ValueError for an empty or damaged file, a missing column, or an answer that
    is none of the choices, with file and record.
    """
    files = local_files(task, folder)
    return {split: _checked_documents(task, path, path.stat().st_mtime_ns) for split, path in files.items()}


def local_task(name: str, folder: Path, manager):
    """lm-eval's task `name` with the documents of a data directory: a Task, or for `mmlu` a Group of 57 Tasks.

    manager: lm-eval's TaskManager, which finds the definitions. Splits without a file are taken out of the definition, so
    few-shot examples from a train split need a file for that split.
    """
    documents = local_documents(name, folder)
    if name != "mmlu":
        return _with_documents(name, documents, manager)
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    subjects = sorted({document["subject"] for document in documents["test"]})
    if len(subjects) != MMLU_SUBJECTS:
        raise ValueError(f"{local_files(name, folder)['test']} has {len(subjects)} of the {MMLU_SUBJECTS} subjects of MMLU")
    group = Group(name, aggregate_metric_list=[AggMetricConfig("acc")])  # weighted by size, as the hub's group
    for subject in subjects:
        of_subject = {split: [d for d in found if d["subject"] == subject] for split, found in documents.items()}
        group.add(_with_documents(f"mmlu_{subject}", of_subject, manager))
    return group


def _with_documents(name: str, documents: dict[str, Sequence[dict]], manager):
    """lm-eval's own definition of a single task, reading `documents` {split: records} instead of the hub."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in documents:
            config[key] = None
    if config["fewshot_split"] is None and "fewshot_config" in config:
        del config["fewshot_config"]  # its sampler has nothing to draw from
    table = {split: datasets.Dataset.from_list(list(found)) for split, found in documents.items()}
    config.pop("tag", None)
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: table})


def check_known(name: str, manager) -> None:
    """Raise ValueError for a name that is not in lm-eval's index."""
    if name not in manager.task_index:
        raise ValueError(f"unknown task {name!r}: it is none of {', '.join(LOCAL_TASKS)}, and lm-eval has no task of that name")


def hub_task(name: str, manager):
    """lm-eval's task `name` from the hub: a Task or a Group.

    Raises ValueError for an unknown name, FileNotFoundError if the documents cannot be reached.
    """
    import datasets

    check_known(name, manager)
    try:
        found = manager.load([name])
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        file = next(iter(LOCAL_TASKS[name].files.values()))[0] if name in LOCAL_TASKS else None
        offline = f"put {file} into a folder and name that folder in {DATA_DIR_VARIABLE} or --data-dir, or use" if file else "use"
        raise FileNotFoundError(
            f"the documents of {name} could not be read from the hub ({type(error).__name__}). Without a network, {offline} the "
            "embedded task wiki_a_continuation"
        ) from error
    if name in found.get("groups", {}):
        return found["groups"][name]
    if name not in found["tasks"]:
        raise ValueError(
            f"{name!r} stands for several tasks of lm-eval: name them one by one ({', '.join(sorted(found['tasks']))})"
        )
    return found["tasks"][name]


def files_record(tasks: Sequence[str]) -> dict[str, str]:
    """{task: file and its SHA-256} of the local documents that `tasks` would be scored on; empty without a data directory."""
    folder = data_folder()
    if folder is None:
        return {}
    scored = {task: next(iter(local_files(task, folder).values())) for task in tasks if task in LOCAL_TASKS}
    return {
        task: f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        for task, path in scored.items()
    }
