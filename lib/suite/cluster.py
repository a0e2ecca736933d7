"""Runs on several machines, through a Dask scheduler: notebooks, one model each, and the cells that they finish.

A worker executes a notebook for one of its models in a folder of its own, and reports every finished cell through the
scheduler. Only the process that started the run writes the ledger. If a worker is lost, Dask gives its notebook to another
one, which starts with the reported cells in its ledger. When a notebook's models are all done, one more run of it, on all
models, makes tables and figures from the ledger. Sections that do not belong to one model are computed in each of these runs,
and the first result is kept.

Workers have one thread of Dask, because notebooks use the cores themselves. They and the scheduler need this very code and these
package versions (a shared environment, or the same commit installed) and, for local models and data, the same paths.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from lib.evaluation.process import package_versions
from lib.suite.code import code_version
from lib.suite.results import Ledger, content_key
from lib.suite.runs import Run, RunError, attempt, execute, raise_failures

PATIENCE = 10  # seconds for a scheduler to answer
ENGINES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}


def distributed():
    """The package dask.distributed, or an error with the command that installs it."""
    try:
        import dask.distributed as package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--cluster needs the extra `cluster`: pip install -e '.[cluster]'") from error
    return package


@contextlib.contextmanager
def connect(where: str) -> Iterator:
    """A client of the scheduler at `where`; it and a cluster started here are closed afterwards.

    where: the address of a running scheduler (`tcp://host:8786`); `local` or `local:N` for N worker processes of this machine
    (default: one per core), one thread each; or a .yaml file for a queueing system (`queue_cluster`).
    Raises ValueError if nothing answers at the address within ten seconds.
    """
    package = distributed()
    with contextlib.ExitStack() as stack:
        if where == "local" or where.startswith("local:"):
            count = where.partition(":")[2] or str(os.cpu_count())
            if not count.isdigit() or not int(count):
                raise ValueError(f"--cluster local:N takes a number of worker processes, not {where!r}")
            options = dict(n_workers=int(count), threads_per_worker=1, dashboard_address=":0", memory_limit=None)
            options["silence_logs"] = logging.CRITICAL  # an error is shown once, by the task
            where = stack.enter_context(package.LocalCluster(**options))
        elif where.endswith((".yaml", ".yml")):
            cluster, jobs = queue_cluster(where)
            where = stack.enter_context(cluster)
            cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # a job that reached its time limit is submitted again
        try:
            client = stack.enter_context(package.Client(where, timeout=PATIENCE, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ValueError(f"no scheduler answers at {where!r}: start one with `dask scheduler`, or use local") from error
        print(f"{len(client.scheduler_info()['workers'])} workers at {client.scheduler.address}; more may join", flush=True)
        yield client


def queue_cluster(path: str | Path):
    """The dask-jobqueue cluster that a .yaml file describes, and the number of its jobs.

    The file has `engine` (slurm, pbs, lsf or sge), `jobs`, and `options`: arguments of that class of dask-jobqueue. One job is
    one worker and runs one notebook at a time. Raises ValueError for another engine or options that the class does not accept.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no cluster file {path}: see notebooks/params/clusters/slurm.yaml for one")
    found = yaml.safe_load(Path(path).read_text())
    if not isinstance(found, dict) or set(found) != {"engine", "jobs", "options"} or found["engine"] not in ENGINES:
        raise ValueError(f"{path} must have engine (one of {', '.join(ENGINES)}), jobs and options, and nothing else")
    distributed()
    import dask_jobqueue

    try:
        # One thread: a notebook uses all the cores of its job itself.
        options = {"cores": 1, "processes": 1} | found["options"]
        return getattr(dask_jobqueue, ENGINES[found["engine"]])(**options), int(found["jobs"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {found['engine']} rejects these options: {error}") from error


def reproduce_on(client, runs: Sequence[Run], force: bool = False) -> None:
    """`lib.suite.runs.reproduce` for all runs at once, on the workers of `client`.

    A run that fails prints its error and does not stop the others; RunError when all have ended, if any failed.
    """
    engine = functools.partial(spread, client)
    with ThreadPoolExecutor(len(runs)) as pool:
        raise_failures(pool.map(functools.partial(attempt, force=force, engine=engine), runs))


def shards(parameters: dict) -> list[dict]:
    """Parameters of the runs that can go on side by side: one per model. Empty if there is only one model."""
    models = parameters.get("models", [])
    return [parameters | {"models": [model]} for model in models] if len(models) > 1 else []


def spread(client, run: Run, partial: Path, ledger: Ledger) -> None:
    """The engine of a cluster: one notebook run per model side by side, then one on all of them, from the cells they found."""
    topic, writing, over = f"cells-{uuid.uuid4().hex}", threading.Lock(), threading.Event()

    def keep(record: dict) -> None:
        with writing:
            if not over.is_set() and record["key"] not in ledger.records:
                ledger.append(record["settings"], record["result"], record["seconds"], record["modules"])

    def submit(parameters: dict):
        job = {"name": run.notebook.name, "notebook": run.notebook.read_text(), "parameters": parameters, "profile": run.profile}
        job |= {"place": str(run.notebook.parent), "data_dir": os.environ.get("PARED_DATA_DIR", "")}
        job |= {"topic": topic, "versions": versions()}
        return client.submit(work, job, list(ledger.records.values()), pure=False, key=f"{run.paper}-{uuid.uuid4().hex}")

    # 1. Runs of single models, then the run on all of them; finished cells go to the ledger as they arrive.
    client.subscribe_topic(topic, lambda event: keep(json.loads(event[1])))
    try:
        for stage in (shards(run.parameters), [run.parameters]):
            outcomes = [outcome(future, run) for future in [submit(parameters) for parameters in stage]]
            for found in outcomes:  # before a failure ends the run, keep the results of the others
                for record in [] if isinstance(found, RunError) else found[1]:
                    keep(record)
            for found in outcomes:
                if isinstance(found, RunError):
                    raise found
            print(f"{run}: {len(ledger.records)} records in the ledger", flush=True)
    finally:
        with writing:
            over.set()  # Dask keeps the handler, and a late event must not write into a ledger that is no longer locked
        if client.status == "running":
            client.unsubscribe_topic(topic)
    # 2. The files of the last run are the results.
    for name, data in outcomes[0][0].items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data)


def outcome(future, run: Run) -> tuple[dict[str, bytes], list[dict]] | RunError:
    """The result of `work` once it has ended, or the error: a failed cell, workers lost one after another, no scheduler."""
    try:
        return future.result()
    except RunError as error:
        return error
    except Exception as error:  # Dask's own kinds, and those of the network below it
        return RunError(f"{run}: the cluster gave it up with {type(error).__name__}: {error}. Finished cells are in the ledger")


def versions() -> dict:
    return {"code": code_version()} | package_versions()


def work(job: dict, records: list[dict]) -> tuple[dict[str, bytes], list[dict]]:
    """On a worker: execute a notebook with `records` in its ledger; returns its files and the added records.

    New records are also sent to `job["topic"]` as they appear, and those that a lost worker sent there are read first (the
    scheduler keeps the last 1,000).
    """
    # 1. The worker must have one thread, the same versions and the data.
    package = distributed()
    worker = package.get_worker()
    if worker.state.nthreads != 1:
        raise RunError(
            f"the worker {worker.address} has {worker.state.nthreads} threads: start it with `dask worker --nthreads 1`"
        )
    if differing := [f"{name} {value}, not {job['versions'].get(name)}" for name, value in versions().items()
                     if value != job["versions"].get(name)]:  # fmt: skip
        raise RunError(f"the worker {worker.address} has other versions: {'; '.join(differing)}. Install the same commit there")
    if job["data_dir"] and not Path(job["data_dir"]).is_dir():
        raise RunError(f"the worker {worker.address} has no folder {job['data_dir']}: put the data directory on a shared disk")
    os.environ["PARED_DATA_DIR"] = job["data_dir"]
    # 2. A ledger of everything that is finished; then execute, and report new records.
    sent = [json.loads(event[1]) for event in package.get_client().get_events(job["topic"])]
    with tempfile.TemporaryDirectory() as place:
        # Named so that the notebook finds its ledger where `lib.suite.results.Results` looks for it.
        notebook = Path(place) / job["name"]
        folder, ledger_file = notebook.with_suffix(".partial"), notebook.with_suffix(".ledger.jsonl")
        folder.mkdir()
        notebook.write_text(job["notebook"])
        ledger_file.write_text("".join(json.dumps(record) + "\n" for record in [*records, *sent]))
        added: list[dict] = []
        foreign: list[str] = []

        def report(line: str) -> None:
            record = json.loads(line)
            if record["key"] != content_key(record["settings"], record["modules"]):
                foreign.append(record["key"])  # the kernel has another version of lib/ than this process
                return
            added.append(record)
            worker.log_event(job["topic"], line)

        place = Path(job["place"])
        with followed(ledger_file, report):
            execute(notebook, job["parameters"], job["profile"], folder, place if place.is_dir() else None)
        if foreign:
            raise RunError(f"lib/ changed on the worker {worker.address} while it ran: restart the worker, then the run")
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files, sent + added


@contextlib.contextmanager
def followed(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Within the `with`, call `report` with every whole line that is added to a file, within half a second."""
    over = threading.Event()

    def follow() -> None:
        rest = ""
        while True:
            last = over.wait(0.5)
            for line in file:
                rest += line
                if rest.endswith("\n"):
                    report(rest.rstrip("\n"))
                    rest = ""
            if last:
                return

    with path.open() as file:
        file.seek(0, os.SEEK_END)
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
