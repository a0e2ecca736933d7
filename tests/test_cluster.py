"""Runs on a real Dask scheduler with real worker processes give what one machine gives, a killed worker included."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import pytest
from invoke import Exit

import tasks
from lib.suite import cluster
from lib.suite.results import Ledger
from lib.suite.runs import Run, RunError, reproduce

package = pytest.importorskip("dask.distributed")
SLURM = Path(tasks.PROFILES) / "clusters" / "slurm.yaml"
PARAMETERS = 'models = ["a", "b"]\nsteps = 4\npause = 0.0\nforeign = False\nlog = []\nfolder = ""\nprofile = "p"'
CODE = """
import os, time
from pathlib import Path
from lib.primitives import checks
from lib.suite import results
if foreign:
    results.code_version = lambda modules=None: "another"
run = results.Results("toy", folder, profile)
def work(model, i):
    time.sleep(pause)
    if model == "die":
        os._exit(1)
    model + "a name"
    for path in log:
        with (Path(path[0]) / "log").open("a") as file:
            print(model, i, os.getppid(), file=file, flush=True)
    return {"value": i**2, "of": model}
rows = [run.cell(lambda m=m, i=i: work(m, i), by=[checks], model=m, i=i) for m in models for i in range(steps)]
run.table("t", rows)
manifest = run.finish({"models": models})
"""


@pytest.fixture
def toy(tmp_path):
    """(results, parameters) -> the run of a toy notebook of two models with `steps` cells each."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells.append(nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}))
    notebook.cells.append(nbformat.v4.new_code_cell(CODE))
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = tmp_path / "notebooks" / "toy.ipynb"
    path.parent.mkdir()
    nbformat.write(notebook, path)
    return lambda results, **parameters: Run(path, {"models": ["a", "b"]} | parameters, tmp_path / results, "p")


@pytest.fixture(scope="module")
def client():
    with cluster.connect("local:2") as found:
        yield found


def kept(run: Run) -> list[tuple[str, int]]:
    """(model, i) of every cell in the ledger of a run."""
    found = [record["settings"] for record in Ledger(run.ledger_file).records.values()]
    return [(settings["model"], settings["i"]) for settings in found if "model" in settings]


def log_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_cluster_gives_what_one_machine_gives(toy, tmp_path, client, capfd):
    alone, shared = toy("alone"), toy("shared", log=[[str(tmp_path)]])
    reproduce(alone)
    cluster.reproduce_on(client, [shared])
    files = [sorted(p.relative_to(r.target).as_posix() for p in r.target.rglob("*") if p.is_file()) for r in (alone, shared)]
    assert files[0] == files[1]
    assert "tables/t.csv" in files[0]
    assert (alone.target / "tables/t.csv").read_bytes() == (shared.target / "tables/t.csv").read_bytes()
    # Each cell was computed once, the two models by two kernels; the run that made the table computed nothing.
    computed = log_of(tmp_path / "log")
    assert sorted(tuple(line[:2]) for line in computed) == [(m, str(i)) for m in "ab" for i in range(4)]
    manifest = json.loads((shared.target / "manifest.json").read_text())
    assert (manifest["cells_computed"], manifest["cells_from_ledger"]) == (0, 8)
    capfd.readouterr()
    cluster.reproduce_on(client, [shared])
    assert "nothing to do" in capfd.readouterr().out
    # A run here does not take the cluster's results for its own, and measures nothing again.
    for done in (False, True):
        reproduce(shared)
        assert ("nothing to do" in capfd.readouterr().out) is done
        assert json.loads((shared.target / "manifest.json").read_text())["cells_from_ledger"] == 8


def test_a_lost_worker_is_replaced_and_its_cells_are_kept(toy, tmp_path):
    log = tmp_path / "log"
    run = toy("killed", steps=6, pause=1.0, log=[[str(tmp_path)]])
    with cluster.connect("local:2") as client:
        pids = set(client.run(os.getpid).values())
        done = threading.Thread(target=cluster.reproduce_on, args=(client, [run]))
        done.start()
        while done.is_alive() and ("b", 2) not in kept(run):
            time.sleep(0.1)
        assert done.is_alive()
        victim = next(int(parent) for model, _, parent in log_of(log) if model == "b")
        assert victim in pids  # the parent of the kernel is the worker itself
        os.kill(victim, signal.SIGKILL)
        done.join(120)
        assert not done.is_alive()
    rows = [f"{i**2},{model}\n" for model in "ab" for i in range(6)]
    assert (run.target / "tables/t.csv").read_text() == "".join(["value,of\n", *rows])
    computed = [tuple(line[:2]) for line in log_of(log)]
    again = [cell for cell in set(computed) if computed.count(cell) > 1]
    assert len(set(computed)) == 12
    # Only the cell that was in work when the worker died is computed twice (two, if the orphaned kernel ended one more).
    assert len(again) <= 2
    assert all(model == "b" and int(i) >= 3 for model, i in again)


def test_a_killed_driver_starts_again_from_its_ledger(toy, tmp_path, client):
    run = toy("again", models=["a"], log=[[str(tmp_path)]])
    ledger = Ledger(run.ledger_file)
    cluster.spread(client, run, tmp_path / "elsewhere", ledger)  # the cells are in the ledger, the results were never swapped in
    assert len(log_of(tmp_path / "log")) == 4
    assert len(Ledger(run.ledger_file).records) == 4  # each once, though reported and returned
    cluster.spread(client, run, tmp_path / "elsewhere", Ledger(run.ledger_file))
    assert len(log_of(tmp_path / "log")) == 4


def test_a_failing_cell_ends_the_run_with_its_reason(toy, client):
    run = toy("failing", models=["a"], steps="many")
    with pytest.raises(RunError, match=r"1 of 1 runs failed: toy \(p\) failed in cell 3: TypeError"):
        cluster.reproduce_on(client, [run])
    assert not run.target.exists()


def test_a_failing_model_does_not_lose_what_the_others_find(toy, tmp_path, client):
    run = toy("mixed", models=["a", 0], pause=0.5)  # 0 has no name: its notebook fails at its first cell
    with pytest.raises(RunError, match="1 of 1 runs failed: .*failed in cell 3: TypeError"):
        cluster.reproduce_on(client, [run])
    assert sorted(kept(run)) == [("a", i) for i in range(4)]
    assert not run.target.exists()


def test_a_dead_kernel_is_an_error_that_speaks_of_memory(toy, client):
    run = toy("dead", models=["die"])
    with pytest.raises(RunError, match="its kernel died, most often because memory ran out"):
        cluster.reproduce_on(client, [run])
    with pytest.raises(RunError, match="its kernel died"):
        reproduce(toy("dead-here", models=["die"]))


def test_a_lost_scheduler_ends_the_run(toy, tmp_path):
    run = toy("orphan", steps=60, pause=1.0, log=[[str(tmp_path)]])
    with cluster.connect("local:1") as client:
        failures = []

        def work():
            try:
                cluster.reproduce_on(client, [run])
            except RunError as error:
                failures.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive() and not log_of(tmp_path / "log"):
            time.sleep(0.1)
        client.cluster.close()
        thread.join(90)
        assert not thread.is_alive()
    assert "the cluster gave it up with" in failures[0]


def test_numbers_of_another_library_are_not_filed_as_this_ones(toy, client):
    run = toy("foreign", models=["a"], foreign=True)
    with pytest.raises(RunError, match="changed on the worker"):
        cluster.reproduce_on(client, [run])
    assert not kept(run)


def test_workers_of_several_threads_are_refused(toy):
    with (
        package.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as found,
        package.Client(found) as many,
        pytest.raises(RunError, match="has 2 threads: start it with `dask worker --nthreads 1`"),
    ):
        cluster.reproduce_on(many, [toy("threads")])


def test_workers_with_another_library_are_refused(toy, client, monkeypatch):
    monkeypatch.setattr(cluster, "code_version", lambda: "other")
    with pytest.raises(RunError, match="has other versions: code .*, not other"):
        cluster.reproduce_on(client, [toy("other")])


def test_a_missing_data_directory_is_named(toy, client, monkeypatch):
    monkeypatch.setenv("PARED_DATA_DIR", "/no/such/folder")
    with pytest.raises(RunError, match="has no folder /no/such/folder"):
        cluster.reproduce_on(client, [toy("data")])


def test_only_models_are_shared_out():
    assert cluster.shards({"models": ["a", "b"], "n": 1}) == [{"models": ["a"], "n": 1}, {"models": ["b"], "n": 1}]
    assert cluster.shards({"models": ["a"]}) == cluster.shards({"n": 1}) == []


def test_the_slurm_script_says_what_the_file_says():
    found, jobs = cluster.queue_cluster(SLURM)
    with found:
        script = found.job_script()
    assert jobs == 4
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=8", "#SBATCH -t 12:00:00", "#SBATCH --gres=gpu:1"):
        assert line in script.splitlines()
    prologue, command = script.split("export OMP_NUM_THREADS=8\n")
    assert "source .venv/bin/activate" in prologue
    assert "--nthreads 1 " in command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: condor\njobs: 1\noptions: {}", "engine .one of slurm, pbs, lsf, sge"),
        ("engine: slurm\njobs: 1", "must have engine"),
        ("engine: slurm\njobs: 1\noptions: {memory: 1GB, no_such_option: 1}", "slurm rejects these options: .*no_such_option"),
        ("engine: slurm\njobs: 1\noptions: {cores: 1}", "slurm rejects these options: .*memory"),
    ],
)
def test_mistakes_in_a_cluster_file_are_explained(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        cluster.queue_cluster(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("local:none", "number of worker processes"),
        ("tcp://127.0.0.1:9", "no scheduler answers"),
        ("nowhere", "no scheduler answers"),
        ("no.yaml", "no cluster file no.yaml"),
    ],
)
def test_a_cluster_that_is_not_there_ends_at_once(where, message, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    with pytest.raises(Exit, match=message):
        tasks.reproduce.body(None, paper="slicegpt", cluster=where)
