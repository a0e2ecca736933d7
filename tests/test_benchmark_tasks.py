"""Benchmarks from a data directory ask a model exactly what lm-eval's own tasks ask, and bad files are refused by name."""

import gzip
import json
from pathlib import Path

import pytest

from lib.evaluation import text
from lib.evaluation.benchmark_tasks import (
    LOCAL_TASKS,
    files_record,
    hub_task,
    local_documents,
    local_files,
    local_task,
    task_manager,
)
from lib.evaluation.zero_shot import zero_shot
from lib.models.load import load
from lib.suite.experiment import Protocol

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of benchmark files beside the repository")

ARC = {
    "id": "1", "question": "What is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}  # fmt: skip
DOCUMENTS = {
    "arc_easy": ("arc/ARC-Easy/test.jsonl.gz", ARC),
    "arc_challenge": ("arc/ARC-Challenge/test.jsonl.gz", ARC),
    "openbookqa": (
        "openbookqa/test.jsonl.gz",
        {"id": "1", "question_stem": "Fire is", "choices": ARC["choices"], "answerKey": "B"},
    ),
    "hellaswag": (
        "hellaswag/validation.jsonl.gz",
        {
            "ind": 1, "activity_label": "Tea", "ctx_a": "[header] How to make tea [title] Boil.", "ctx_b": "she",
            "endings": ["pours [step] it.", "b", "c", "d"], "label": "2",
        },
    ),
    "winogrande": (
        "winogrande/winogrande_xl_validation.jsonl.gz",
        {"sentence": "Ann saw Bea because _ was tall.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ),
    "piqa": ("piqa/validation.jsonl.gz", {"goal": "Open a jar.", "sol1": "Twist it.", "sol2": "Eat it.", "label": 0}),
    "mathqa": (
        "mathqa/test.jsonl.gz",
        {
            "Problem": "1 + 1 ?", "Rationale": "", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) none", "correct": "b",
            "annotated_formula": "", "linear_formula": "", "category": "",
        },
    ),
}  # fmt: skip
# What lm-eval's definitions make of these documents, written down by hand: (context, continuation) of every choice, answer.
ASKED = {
    "arc_easy": ([("Question: What is hot?\nAnswer:", f" {c}") for c in ("ice", "fire", "snow")], 1),
    "arc_challenge": ([("Question: What is hot?\nAnswer:", f" {c}") for c in ("ice", "fire", "snow")], 1),
    "openbookqa": ([("Fire is", f" {c}") for c in ("ice", "fire", "snow")], 1),
    "hellaswag": ([("Tea: How to make tea. Boil. She", f" {c}") for c in ("pours it.", "b", "c", "d")], 2),
    "winogrande": ([(f"Ann saw Bea because {c}", " was tall.") for c in ("Ann", "Bea")], 1),
    "piqa": ([("Question: Open a jar.\nAnswer:", f" {c}") for c in ("Twist it.", "Eat it.")], 0),
    "mathqa": ([("Question: 1 + 1 ?\nAnswer:", f" {c}") for c in ("1", "2", "3", "4", "none")], 1),
}


def manager():
    return task_manager(False)


def write(folder, name, documents):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    return path


def requests(task):
    task.build_all_requests(limit=3, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_requests_written_down_by_hand(name, tmp_path):
    file, document = DOCUMENTS[name]
    write(tmp_path, file, [document])
    task = local_task(name, tmp_path, manager())
    asked, answer = ASKED[name]
    assert requests(task) == asked
    shown = next(iter(task.eval_docs))
    target = answer if name != "winogrande" else " was tall."
    found = task.doc_to_target(shown)
    assert (int(found) if name != "winogrande" else f" {found}") == target


@needs_data
@pytest.mark.parametrize("name", [*DOCUMENTS, "mmlu"])
def test_requests_equal_those_of_lm_evals_loader(name, tmp_path):
    """lm-eval itself reads the same files through its own YAML mechanism: include, dataset_path json, data_files."""
    from lm_eval.tasks import TaskManager

    leaf = "mmlu_anatomy" if name == "mmlu" else name
    files = {split: str(path) for split, path in local_files(name, SHARED).items()}
    if name == "mmlu":
        for split, path in files.items():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                kept = [d for d in map(json.loads, file) if d["subject"] == "anatomy"]
            files[split] = str(write(tmp_path, f"{split}.jsonl.gz", kept))
    absent = [s for s in ("training_split", "validation_split", "test_split") if _split(leaf, s) not in files]
    lines = [
        f"include: {manager().task_index[leaf].yaml_path}",
        f"task: {leaf}_plain",
        "dataset_path: json",
        "dataset_name: null",
    ]
    lines += [f"{split}: null" for split in absent] + [f"dataset_kwargs: {json.dumps({'data_files': files})}"]
    (tmp_path / "plain.yaml").write_text("\n".join(lines) + "\n")
    plain = TaskManager(include_path=str(tmp_path), include_defaults=False).load([f"{leaf}_plain"])["tasks"][f"{leaf}_plain"]
    ours = local_task(name, SHARED, manager())
    ours = ours if name != "mmlu" else ours.get(leaf)
    assert len(ours.eval_docs) == len(plain.eval_docs) > 100
    for shots in (0, 2) if name == "mmlu" else (0,):
        for task in (ours, plain):
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(1234)
        assert requests(ours) == requests(plain)
    for key in ("metric_list", "output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "num_fewshot", "fewshot_config"):
        assert _plain(ours.dump_config().get(key)) == _plain(plain.dump_config().get(key)), key


def _split(leaf, key):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(manager().task_index[leaf].yaml_path, resolve_func=False).get(key)


def _plain(value):
    return value if isinstance(value, str | int | list | dict | None) else str(value)


@needs_data
def test_every_task_holds_the_documents_of_its_file():
    counts = {name: next(len(d) for d in local_documents(name, SHARED).values()) for name in LOCAL_TASKS}
    assert counts == {
        "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "hellaswag": 1000, "winogrande": 1267, "piqa": 1838,
        "mathqa": 2985, "mmlu": 14042,
    }  # fmt: skip


@needs_data
def test_mmlu_is_weighted_by_the_size_of_its_subjects(data_dir):
    data_dir(SHARED)
    group = local_task("mmlu", SHARED, manager())
    assert len(group.get_all_tasks()) == 57
    assert sum(len(task.eval_docs) for task in group.get_all_tasks()) == 14042
    assert [(m.metric, m.weight_by_size) for m in group.aggregate_metric_list] == [("acc", True)]
    assert len(list(group.get("mmlu_virology").fewshot_docs())) == 5
    model, tokenizer = load("wiki-a-llama")
    row = zero_shot(model, tokenizer, ("mmlu",), limit=1)[0]
    assert (row["documents"], row["limit"]) == (57, 1)
    assert row["acc"] * 57 == pytest.approx(round(row["acc"] * 57))


def test_accuracy_limit_and_standard_error(tmp_path, data_dir):
    data_dir(tmp_path)
    file, document = DOCUMENTS["piqa"]
    write(tmp_path, file, [document] * 6)
    model, tokenizer = load("wiki-a-llama")
    (row,) = zero_shot(model, tokenizer, ("piqa",), limit=4)
    assert (row["task"], row["documents"], row["limit"], row["metric"]) == ("piqa", 4, 4, "acc")
    assert row["acc"] in (0.0, 1.0)  # four times the same question
    assert row["stderr"] == 0


def test_official_hellaswag_file_is_taken_where_the_sample_is_not(tmp_path):
    file, document = DOCUMENTS["hellaswag"]
    whole = write(tmp_path, file, [document])
    assert local_files("hellaswag", tmp_path) == {"validation": whole}
    sample = write(tmp_path, "hellaswag/validation_raw_random1000.jsonl.gz", [document])
    assert local_files("hellaswag", tmp_path) == {"validation": sample}


BAD = [
    ("arc_easy", {"question": "?", "choices": ARC["choices"]}, "record 2 has no column answerKey"),
    ("arc_easy", ARC | {"answerKey": "E"}, "record 2 has an answer that is none of its choices: {'answerKey': 'E'}"),
    ("hellaswag", DOCUMENTS["hellaswag"][1] | {"label": ""}, "answer that is none"),
    ("hellaswag", DOCUMENTS["hellaswag"][1] | {"label": "4"}, "answer that is none"),
    ("winogrande", DOCUMENTS["winogrande"][1] | {"answer": "3"}, "answer that is none"),
    ("winogrande", DOCUMENTS["winogrande"][1] | {"sentence": "no gap"}, "answer that is none"),
    ("piqa", DOCUMENTS["piqa"][1] | {"label": -1}, "answer that is none"),
    ("mathqa", DOCUMENTS["mathqa"][1] | {"correct": "f"}, "answer that is none"),
]


@pytest.mark.parametrize(("name", "document", "message"), BAD)
def test_bad_documents_are_refused_with_file_and_record(name, document, message, tmp_path):
    file, good = DOCUMENTS[name]
    write(tmp_path, file, [good, document])
    with pytest.raises(ValueError, match=message) as caught:
        local_documents(name, tmp_path)
    assert file in str(caught.value)


def test_bad_files_are_refused_before_any_model_runs(tmp_path, data_dir):
    data_dir(tmp_path)
    file, good = DOCUMENTS["piqa"]
    with pytest.raises(FileNotFoundError, match=r"no piqa/validation.jsonl.gz, the validation split of piqa.*PARED_DATA_DIR"):
        zero_shot(None, None, ("piqa",))
    data_dir(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        zero_shot(None, None, ("piqa",))
    data_dir(tmp_path)
    path = write(tmp_path, file, [])
    with pytest.raises(ValueError, match="is empty"):
        zero_shot(None, None, ("piqa",))
    write(tmp_path, file, [good] * 500)
    path.write_bytes(path.read_bytes()[:60])  # cut short
    with pytest.raises(ValueError, match="it is damaged"):
        zero_shot(None, None, ("piqa",))
    path.write_bytes(gzip.compress(b'{"goal": \n'))
    with pytest.raises(ValueError, match="record 1 is not a JSON document"):
        zero_shot(None, None, ("piqa",))


def test_the_environment_names_the_folder_too(tmp_path, monkeypatch):
    file, good = DOCUMENTS["piqa"]
    write(tmp_path, file, [good])
    monkeypatch.setenv(text.DATA_DIR_VARIABLE, str(tmp_path))
    model, tokenizer = load("wiki-a-llama")
    assert zero_shot(model, tokenizer, ("piqa",))[0]["documents"] == 1
    record = Protocol(text.load_corpus("wiki-a", "test"), 64, tasks=("piqa", "wiki_a_continuation")).record()
    assert list(record["task_files"]) == ["piqa"]
    assert record["task_files"]["piqa"].startswith("piqa/validation.jsonl.gz ")
    before = files_record(["piqa"])
    write(tmp_path, file, [good, good])
    assert files_record(["piqa"]) != before


def test_without_folder_and_network_the_error_names_the_file(monkeypatch):
    monkeypatch.delenv(text.DATA_DIR_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"put arc/ARC-Easy/test.jsonl.gz into a folder and name that folder"):
        hub_task("arc_easy", manager())
    with pytest.raises(ValueError, match="unknown task 'arc_esy'"):
        hub_task("arc_esy", manager())
