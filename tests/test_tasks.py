"""The tasks fail early with the valid choices, resume, and say when there is nothing to do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from invoke import Collection, Context, Exit, Program

import tasks
from lib.evaluation.zero_shot import tasks_named
from lib.methods import METHODS
from lib.suite.profiles import read_profile
from lib.suite.results import RAW
from lib.suite.runs import Run, cell_name, local_state, relink, reproduce, slowest, tidy

TOY = [
    ("parameters", 'steps = 3\nfolder = ""\nprofile = "workshop"'),
    (
        None,
        "import time\nfrom lib.suite.results import Results\nrun = Results('toy', folder, profile)\n"
        "def work(i):\n    time.sleep(0.3)\n    print('worked', i, flush=True)\n    return i\n"
        "rows = [{'i': run.cell(lambda i=i: work(i), i=i)} for i in range(steps)]\n"
        "run.table('t', rows)\nmanifest = run.finish({'steps': steps})",
    ),
]


def write_project(folder):
    """A suite with one toy notebook."""
    (folder / "notebooks" / "params").mkdir(parents=True)
    (folder / "notebooks" / "params" / "workshop.yaml").write_text("toy:\n  steps: 4\n")
    notebook = nbformat.v4.new_notebook()
    for tag, source in TOY:
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag]} if tag else {}))
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, folder / "notebooks" / "toy.ipynb")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A suite with one toy notebook, in a folder of its own."""
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(tasks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(tasks, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tasks, "PROFILES", tmp_path / "notebooks" / "params")
    return write_project(tmp_path)


@pytest.fixture(scope="module")
def results_once(tmp_path_factory):
    """The results of the toy notebook, with its ledger."""
    folder = write_project(tmp_path_factory.mktemp("once"))
    reproduce(Run(folder / "notebooks" / "toy.ipynb", {"steps": 4}, folder / "results", "workshop"))
    return folder / "results"


@pytest.fixture
def done(project, results_once):
    """The suite after `invoke reproduce`."""
    shutil.copytree(results_once, project / "results")
    return project


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(paper="nope"), "unknown paper 'nope': choose one of .*slicegpt"),
        (dict(profile="nope"), "unknown profile 'nope': choose one of .*workshop"),
        (dict(paper="slicegpt", set=["levls=[0.1]"]), "unknown parameter of slicegpt 'levls': choose one of .*levels"),
        (dict(set=["levels"]), "NAME=VALUE"),
        (dict(data_dir="/no/such/folder"), "not a folder"),
    ],
)
def test_mistakes_fail_at_once_with_the_valid_names(arguments, message):
    start = time.time()
    with pytest.raises(Exit, match=message):
        tasks.reproduce.body(None, **arguments)
    assert time.time() - start < 20


def test_every_profile_names_real_papers_and_parameters():
    for profile in tasks.profiles():
        named = read_profile(tasks.PROFILES / f"{profile}.yaml").papers
        assert named
        assert set(named) <= set(tasks.papers())
        for paper in named:
            tasks.parameters_of(paper, profile, [])


def test_reproduce_then_nothing_to_do_then_force(project, capfd):
    tasks.reproduce.body(None)
    target = project / "results" / "workshop" / "toy"
    assert (target / "tables" / "t.csv").read_text() == "i\n0\n1\n2\n3\n"
    assert json.loads((target / "manifest.json").read_text())["cells_computed"] == 4
    executed = (target / "toy.ipynb").read_text()
    assert str(project) not in executed
    assert not target.with_name("toy.partial").exists()
    before = (target / "manifest.json").stat().st_mtime_ns
    heading, *lines = re.search(r"seconds  slowest.*(?:\n +\d.*)+", capfd.readouterr().out)[0].splitlines()
    assert "of 4 cells" in heading
    assert {line.split(maxsplit=1)[1] for line in lines} == {f"toy: i {i}" for i in range(4)}
    assert all(0.3 <= float(line.split()[0]) < 5 for line in lines)
    tasks.reproduce.body(None)
    said = capfd.readouterr().out
    assert "up to date" in said
    assert "slowest" not in said
    assert (target / "manifest.json").stat().st_mtime_ns == before
    tasks.reproduce.body(None, force=True)
    assert json.loads((target / "manifest.json").read_text())["cells_computed"] == 4


def test_side_by_side_on_one_thread_each_and_a_failure_stops_only_itself(project, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a kernel would take if it were not told otherwise
    source = (project / "notebooks" / "toy.ipynb").read_text()
    for name, old, new in (
        ("second", "return i", "import torch; return torch.get_num_threads()"),
        ("third", "return i", "return 1 / 0"),
    ):
        assert old in source
        (project / "notebooks" / f"{name}.ipynb").write_text(source.replace(old, new).replace("'toy'", f"'{name}'"))
    profile = project / "notebooks" / "params" / "workshop.yaml"
    profile.write_text("".join(f"{name}:\n  steps: 4\n" for name in ("third", "toy", "second")))
    with pytest.raises(Exit, match="(?s)1 of 3 runs failed: third.*ZeroDivisionError"):
        tasks.reproduce.body(None, jobs=2)
    table = "results/workshop/{0}/tables/t.csv"
    assert (project / table.format("toy")).read_text() == "i\n0\n1\n2\n3\n"
    assert (project / table.format("second")).read_text() == "i\n1\n1\n1\n1\n"
    assert not (project / "results/workshop/third").exists()
    out = capfd.readouterr().out
    assert "toy: worked 3" in out
    assert "second: worked 3" in out


def test_the_slowest_cells_come_first_and_are_called_by_what_they_measure():
    runs = [Run(tasks.NOTEBOOKS / f"{paper}.ipynb", {}, tasks.RESULTS, "workshop") for paper in ("afr", "slicegpt", "no_results")]
    raw = pd.concat([pd.read_parquet(run.target / RAW).assign(paper=run.paper) for run in runs[:2]])
    heading, *lines = slowest(runs, 0.0, 5).splitlines()
    assert f"of {len(raw)} cells" in heading
    assert [float(line.split()[0]) for line in lines] == [round(s, 1) for s in raw.seconds.nlargest(5)]
    assert [line.split()[1] for line in lines] == [f"{paper}:" for paper in raw.nlargest(5, "seconds").paper]
    assert slowest(runs, time.time()) == ""
    assert cell_name({"weights": "0f", "method": "SVD", "model": "m", "level": 0.25, "draw": {}}) == "m, SVD, 25%"


@pytest.mark.parametrize("fast", [True, False])
def test_tests_list_the_slowest(fast):
    said = []
    tasks.test.body(SimpleNamespace(run=lambda command, **_: said.append(command)), fast=fast)
    assert "--durations 10 " in said[0]
    assert ("--nbval" in said[0]) == (not fast)


@pytest.mark.parametrize("arguments", [dict(jobs=-1), dict(jobs=True), dict(jobs=2, cluster="local")])
def test_jobs_that_make_no_sense(arguments):
    with pytest.raises(Exit, match="--jobs takes a number of notebooks"):
        tasks.reproduce.body(None, **arguments)


@pytest.mark.parametrize(
    ("old", "new", "computed"),
    [("steps = 3", "steps = 3  # changed", 0), ("return i", "return i + 0", 4)],
    ids=["a comment", "what computes"],
)
def test_a_change_of_the_notebook_is_not_up_to_date(done, old, new, computed, capfd):
    """It runs again, and measures again only what other code would measure."""
    tasks.reproduce.body(None)
    assert "up to date" in capfd.readouterr().out
    path = done / "notebooks" / "toy.ipynb"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    tasks.reproduce.body(None)
    assert "up to date" not in capfd.readouterr().out
    manifest = json.loads((done / "results/workshop/toy/manifest.json").read_text())
    assert manifest["cells_computed"] == computed


def test_warnings_lose_the_place_of_the_project(tmp_path):
    cell = nbformat.v4.new_code_cell("1")
    text = "/home/me/a/lib/papers/comp.py:3: UserWarning: x\n/tmp/ipykernel_12/34.py:1: y\n/v/site-packages/torch/n.py:2: a/b z\n"
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=text)]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    tidy(tmp_path / "n.ipynb")
    (found,) = nbformat.read(tmp_path / "n.ipynb", as_version=4).cells[0].outputs
    assert found.text == "lib/papers/comp.py:3: UserWarning: x\nipykernel_12/34.py:1: y\nsite-packages/torch/n.py:2: a/b z\n"


def test_lines_of_progress_are_not_stored(tmp_path):
    cells = [nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell("2")]
    progress = ["m at 20%: perplexity 1,234.56\n", "  pruned block 1 of 8; 79 s since the start, 0.7 GiB resident\n"]
    result = "m at 20%: perplexity of W is 2.0 % [1.0, 3.0] below SVD\n"
    for cell, texts in zip(cells, ([progress[0], result, progress[1]], progress), strict=True):
        cell.outputs = [nbformat.v4.new_output("stream", text=text) for text in texts]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    tidy(tmp_path / "n.ipynb")
    first, second = nbformat.read(tmp_path / "n.ipynb", as_version=4).cells
    assert [output.text for output in first.outputs] == [result]
    assert second.outputs == []


def test_links_lead_from_the_results_to_the_same_files(tmp_path):
    text = "[a](../lib/papers/afr.py) [b](slicegpt.ipynb#part) [c](https://arxiv.org/abs/1) [d](#here) $f[i](x y)$"
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("table[name](argument)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    relink(tmp_path / "n.ipynb")
    words, code = (cell.source for cell in nbformat.read(tmp_path / "n.ipynb", as_version=4).cells)
    moved = text.replace("../lib", "../../../lib").replace("slicegpt.ipynb", "../../../notebooks/slicegpt.ipynb")
    assert words == moved
    assert code == "table[name](argument)"


def test_changed_local_files_are_seen(tmp_path):
    parameters = {"corpus": f"{tmp_path}/t.txt", "n": 3, "models": ["wiki-a-llama", str(tmp_path / "model")]}
    text, weights = tmp_path / "t.txt", tmp_path / "model" / "weights"
    weights.parent.mkdir()
    text.write_text("one")
    weights.write_text("one")
    near = {"corpus": "t.txt", "models": ["model"], "prompt": "x" * 5000}  # from where the notebook runs
    states = [(local_state(parameters, tasks.NOTEBOOKS), local_state(near, tmp_path))]
    assert (local_state(parameters, tasks.NOTEBOOKS), local_state(near, tmp_path)) == states[0]
    for changed in (text, weights):
        changed.write_text("two!")
        states.append((local_state(parameters, tasks.NOTEBOOKS), local_state(near, tmp_path)))
    assert [len(set(kind)) for kind in zip(*states, strict=True)] == [3, 3]
    assert all(str(tmp_path) not in state for pair in states for state in pair)  # ledgers are committed


def test_clean_leaves_what_is_committed(tmp_path, monkeypatch):
    results = tmp_path / "results" / "smollm2-135m"
    results.mkdir(parents=True)
    for name in ("kept", "gone"):
        (results / f"{name}.ledger.jsonl").write_text("{}\n")
    for words in (["init", "-q"], ["add", "results/smollm2-135m/kept.ledger.jsonl"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(tasks, "RESULTS", tmp_path / "results")
    tasks.clean.body(Context())
    assert [path.name for path in results.iterdir()] == ["kept.ledger.jsonl"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"share": "80M"}, "a part of the model, such as 80%"), ({"params": "30%"}, "is a number of params, such as 80M")],
)
def test_budgets_of_the_wrong_kind(asked, message):
    with pytest.raises(ValueError, match=message):
        tasks.budget_of("", **asked)


def test_a_failing_notebook_keeps_the_earlier_results(done):
    path = done / "notebooks" / "toy.ipynb"
    path.write_text(path.read_text().replace("run.table(", "1 / 0; run.table("))
    with pytest.raises(Exit, match="ZeroDivisionError"):
        tasks.reproduce.body(None)
    assert (done / "results/workshop/toy/tables/t.csv").read_text() == "i\n0\n1\n2\n3\n"


RUNNER = """
import sys
from pathlib import Path
from lib.suite.runs import Run, reproduce_all
root, steps = Path(sys.argv[1]), dict(zip(sys.argv[2::2], map(int, sys.argv[3::2])))
runs = [Run(root / "notebooks" / f"{name}.ipynb", {"steps": n}, root / "results", "workshop") for name, n in steps.items()]
reproduce_all(runs, jobs=2)
"""


def started(project, *steps, **settings):
    """A process that runs notebooks of a project, each with its steps, as `invoke reproduce` does."""
    command = [sys.executable, "-c", RUNNER, str(project), *steps]
    settings |= dict(cwd=Path(tasks.__file__).parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, **settings)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups")
@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["alone", "side by side, the first process only"])
def test_a_killed_run_continues(project, kill, capfd):
    # Slow enough that the orphaned kernel, which notices within a second that its parent died, cannot finish the work.
    path = project / "notebooks" / "toy.ipynb"
    path.write_text(path.read_text().replace("time.sleep(0.3)", "time.sleep(2)"))
    if kill is os.kill:
        (project / "notebooks" / "other.ipynb").write_text(path.read_text().replace("'toy'", "'other'"))
        (project / "notebooks" / "params" / "workshop.yaml").write_text("toy:\n  steps: 4\nother:\n  steps: 2\n")
    others = ["other", "2"] if kill is os.kill else []
    first = started(project, "toy", "4", *others, start_new_session=True)
    for line in first.stdout:
        if "toy: worked 1" in line:
            break
    kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert not (project / "results/workshop/toy").exists()  # nothing half-written where results belong
    tasks.reproduce.body(None)
    said = capfd.readouterr().out
    assert "toy: worked 0" not in said
    assert "toy: worked 3" in said
    manifest = json.loads((project / "results/workshop/toy/manifest.json").read_text())
    assert manifest["cells_from_ledger"] >= 1
    assert (project / "results/workshop/toy/tables/t.csv").read_text() == "i\n0\n1\n2\n3\n"


def test_a_second_run_on_the_same_results_refuses(project):
    path = project / "notebooks" / "toy.ipynb"
    path.write_text(path.read_text().replace("time.sleep(0.3)", "time.sleep(2)"))
    first = started(project, "toy", "4")
    for line in first.stdout:
        if "worked 0" in line:
            break
    with pytest.raises(Exit, match="another run is at work on .*toy"):
        tasks.reproduce.body(None, force=True)
    rest = first.communicate(timeout=120)[0]
    assert first.returncode == 0
    assert "worked 3" in rest
    assert (project / "results/workshop/toy/tables/t.csv").read_text() == "i\n0\n1\n2\n3\n"
    assert json.loads((project / "results/workshop/toy/manifest.json").read_text())["cells_computed"] == 4


def test_a_full_disk_leaves_earlier_results(project, results_once, small_disk, monkeypatch):
    monkeypatch.setattr(tasks, "RESULTS", small_disk)
    shutil.copytree(results_once, small_disk, dirs_exist_ok=True)
    target = small_disk / "workshop" / "toy"
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    path = project / "notebooks" / "toy.ipynb"
    source = path.read_text()
    path.write_text(source.replace("run.table('t', rows)", "run.table('t', [{'i': 'x' * 100_000}])"))
    with pytest.raises(Exit, match="No space left on device") as stop:
        tasks.reproduce.body(None)
    assert stop.value.code == 1
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    path.write_text(source)
    tasks.reproduce.body(None)  # what the failed run left behind does not stand in the way
    assert {path.name for path in target.rglob("*") if path.is_file()} == {path.name for path in before}


def test_a_ledger_on_a_full_disk_is_an_error_and_continues(project, small_disk, monkeypatch):
    monkeypatch.setattr(tasks, "RESULTS", small_disk)
    path = project / "notebooks" / "toy.ipynb"
    path.write_text(
        path.read_text()
        .replace("    return i\\n", "    return i if i < 2 else 'x' * size\\n")
        .replace("steps = 3", "steps = 3\\nsize = 3")
    )
    with pytest.raises(Exit, match="No space left on device"):
        tasks.reproduce.body(None, set=["size=100_000"])
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)  # someone made room
    with pytest.warns(UserWarning, match="is damaged"):
        tasks.reproduce.body(None, set=["size=2"])
    manifest = json.loads((small_disk / "workshop-custom/toy/manifest.json").read_text())
    assert manifest["cells_from_ledger"] >= 2


def test_read_only_results_are_an_error_before_any_work(project, small_disk, monkeypatch, capfd):
    monkeypatch.setattr(tasks, "RESULTS", small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(Exit, match="could not be written .*Read-only file system"):
        tasks.reproduce.body(None)
    assert "worked" not in capfd.readouterr().out


def test_task_list_is_readable():
    listed = subprocess.run(
        [sys.executable, "-m", "invoke", "--list"], capture_output=True, text=True, check=True, cwd=Path(tasks.__file__).parent
    ).stdout
    for name in ("reproduce", "test", "notebooks", "train-workshop-models", "lint", "clean"):
        assert name in listed


def test_former_names_of_papers_are_still_taken():
    assert tasks.papers_of("workshop", "structured_afr") == tasks.papers_of("workshop", "afr") == ["afr"]
    assert tasks.papers_of("workshop", "on_device_pruning") == ["comp"]


def test_a_mistake_of_the_user_is_one_line_and_one_of_the_program_a_traceback():
    def fail(error):
        raise error

    with pytest.raises(Exit, match="no such ratio") as mended:
        tasks.checked(lambda: fail(ValueError("no such ratio")))
    assert mended.value.code == 2
    for error in (TypeError("unsupported operand"), KeyError("name"), AttributeError("no attribute")):
        with pytest.raises(type(error)):
            tasks.checked(lambda error=error: fail(error))


@pytest.mark.parametrize("name", ["dtype", "ratio", "device", "model", "streamed"])
def test_settings_named_like_options_are_unknown_settings(tmp_path, name):
    with pytest.raises(Exit, match=f"unknown setting of comp {name!r}: choose one of "):
        tasks.compress.body(None, "wiki-a-llama", str(tmp_path / "out"), method="comp", set=[f"{name}=1"])


@pytest.fixture
def invoked(capfd):
    """Run a command as `invoke` does, errors of the parser included; returns what it prints."""

    def run(*arguments):
        capfd.readouterr()
        Program(namespace=Collection.from_module(tasks)).run(["invoke", *arguments], exit=False)
        said = capfd.readouterr()
        return (said.out + said.err).strip()

    return run


COMPRESS, EVALUATE = ("compress", "--model", "wiki-a-llama", "--out", "out"), ("evaluate", "--model", "wiki-a-llama")
GENERATE = ("generate", "--model", "wiki-a-opt", "--prompt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ((*COMPRESS, "--ratio", wrong), f"not '{wrong}': write 25% or 0.25")
            for wrong in ("abc", "25", "-1", "100%", "nan", "%")
        ),
        ((*COMPRESS, "--samples", "x"), "--samples takes a whole number, not 'x'"),
        ((*COMPRESS, "--seed", "2.5"), "--seed takes a whole number, not '2.5'"),
        ((*COMPRESS, "--samples", "0"), "--samples is 0: give at least 1"),
        ((*COMPRESS, "--length", "-5"), "--length is -5: give at least 2"),
        ((*COMPRESS, "--seed", "-1"), "--seed is -1: give at least 0"),
        ((*COMPRESS, "--method", "fpt", "--set", "tuning=maybe"), "tuning is 'maybe': give yes or no"),
        ((*COMPRESS, "--set", "schedule=[24, 16"), "--set schedule=[24, 16 cannot be read: give a word, a number or a list"),
        ((*COMPRESS, "--set", "layout=global"), "use method slicegpt-global"),
        ((*EVALUATE, "--corpus", "c4"), "for test use wiki-a, wikitext2, ptb"),
        ((*EVALUATE, "--corpus", "nowhere.txt"), "nowhere.txt does not exist"),
        ((*EVALUATE, "--tasks", " , "), "names no task: give names separated by commas, such as wiki_a_continuation"),
        ((*EVALUATE, "--windows", "-1"), "--windows is -1: give at least 0"),
        ((*EVALUATE, "--limit", "-1"), "--limit is -1: give at least 0"),
        ((*EVALUATE, "--length", "1"), "--length is 1: give at least 2"),
        ((*GENERATE, ""), "--prompt is empty"),
        ((*GENERATE, "The", "--tokens", "0"), "--tokens is 0: give at least 1"),
        ((*GENERATE, "The", "--tokens", "-1"), "--tokens is -1: give at least 1"),
        (("plan", "--profile", "workshop", "--tflops", "x"), "--tflops takes a number, not 'x'"),
    ],
)
def test_values_that_cannot_be_are_one_line_before_a_model_is_loaded(invoked, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARED_DATA_DIR", raising=False)
    for place in ("lib.compress.load", "lib.models.load.load"):  # in this order, because the first imports the second
        monkeypatch.setattr(place, lambda *_: pytest.fail("loaded"))
    said = invoked(*arguments)
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_names_of_tasks_are_checked_before_a_model_is_loaded(monkeypatch, tmp_path):
    known = type("Index", (), {"task_index": {"lambada_openai": None}})
    monkeypatch.setattr("lib.evaluation.zero_shot.task_manager", lambda every: known)
    monkeypatch.setattr("lib.models.load.load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(Exit, match="unknown task 'hellswag': it is none of arc_easy"):
        tasks.evaluate.body(None, "wiki-a-llama", tasks="wiki_a_continuation, hellswag")
    monkeypatch.setenv("PARED_DATA_DIR", str(tmp_path))
    with pytest.raises(Exit, match="has no piqa/validation.jsonl.gz"):
        tasks.evaluate.body(None, "wiki-a-llama", tasks="piqa")
    assert tasks_named(" wiki_a_continuation ,lambada_openai, ") == ("wiki_a_continuation", "lambada_openai")


def test_the_help_still_says_which_options_are_numbers(invoked):
    assert "-s INT, --samples=INT" in invoked("--help", "compress")


@pytest.mark.parametrize("text", ["0.25", "25%", "25 %", " 25% "])
def test_a_ratio_may_be_a_percentage(text):
    assert tasks.ratio_of("ratio", float, text) == 0.25


def test_generating_beyond_the_positions_says_what_fits(invoked):
    assert invoked(*GENERATE, "The", "--tokens", "256") == (
        "the model has 256 positions, and the prompt takes 1 of them: at most 255 new tokens fit"
    )
    assert invoked(*GENERATE, "The " * 300, "--tokens", "1").endswith("of them: use a shorter prompt")
    assert invoked(*GENERATE, "The", "--tokens", "2").startswith("The")


def test_what_has_no_effect_is_said(invoked, tmp_path):
    few = ("--model", "wiki-a-llama", "--samples", "2", "--length", "16", "--ratio", "20%")
    said = invoked("compress", *few, "--out", str(tmp_path / "a"), "--method", "cfsp", "--set", "multiple=1000")
    assert "0.0% of the model really removed" in said
    assert "\nnothing was removed: the ratio is too small" in said
    said = invoked("compress", *few, "--out", str(tmp_path / "b"), "--set", "seed=3")
    assert said.splitlines()[0] == "seed has no effect: slicegpt reads it only with orientation=random"
    assert "slicegpt at 20%" in said
    assert "nothing was removed" not in said
    assert "nothing" not in invoked("compress", *few, "--out", str(tmp_path / "c"), "--method", "wanda")  # sets weights to zero


def test_every_method_is_listed_with_its_settings(capsys):
    tasks.methods.body(None)
    said = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"{name}: removes {method.removes} ({method.paper}; needs {method.needs})" in said
    assert "--set takes preset, aggregation, vector" in said  # afr
    assert said.count("runs with --streamed") == 4
    assert "--set takes nothing" in said  # plain SVD


def test_a_run_starts_from_the_measurements_of_earlier_results(done, capfd):
    """Without a ledger, as in a fresh clone: nothing is measured again with --reuse, everything without it or with other code."""
    project = done
    (project / "results" / "workshop" / "toy.ledger.jsonl").unlink()
    first = json.loads((project / "results/workshop/toy/manifest.json").read_text())
    capfd.readouterr()
    tasks.reproduce.body(None, paper="toy", reuse=True)
    assert "worked" not in capfd.readouterr().out
    again = json.loads((project / "results/workshop/toy/manifest.json").read_text())
    assert (again["cells_computed"], again["cells_from_ledger"]) == (0, first["cells_computed"])
    assert again["files"]["tables/t.csv"] == first["files"]["tables/t.csv"]
    (project / "results" / "workshop" / "toy.ledger.jsonl").unlink()
    tasks.reproduce.body(None, paper="toy")
    assert capfd.readouterr().out.count("worked") == 4
    (project / "results" / "workshop" / "toy.ledger.jsonl").unlink()
    notebook = nbformat.read(project / "notebooks/toy.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("return i", "return i + 0")
    nbformat.write(notebook, project / "notebooks/toy.ipynb")
    tasks.reproduce.body(None, paper="toy", reuse=True)
    assert capfd.readouterr().out.count("worked") == 4


def test_measurements_that_cannot_be_read_are_named(done):
    (done / "results" / "workshop" / "toy.ledger.jsonl").unlink()
    (done / "results/workshop/toy/raw.parquet").write_bytes(b"no parquet")
    with pytest.raises(Exit, match="raw.parquet holds no measurements"):
        tasks.reproduce.body(None, paper="toy", reuse=True)
