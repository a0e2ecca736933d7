"""What every method costs, in forward passes of the dense model over the method's own calibration tokens.

    python -m benchmarks.cost_in_passes [models and methods] [--samples N] [--length M] [--csv PATH]

F is the time of one such pass without the head, measured in the same process before and after the method (the mean). Each
method runs in a process of its own and removes 20 %. Models are names that `lib.models.load.load` takes, or `wide`, a random
Llama of width 1,024; without names all of `MODELS` and all methods are measured. With one thread (OMP_NUM_THREADS=1) the clock
is the processor time of the process, which other work on the machine hardly disturbs; else it is the clock on the wall.

    time      seconds / F
    linalg    the part of it inside factorisations and triangular solves (`FACTORISATIONS`); Gram products are not in it
    passes    multiply-adds of all linear layers that really ran, over those of one pass; free of noise. A layer's backward
              pass counts one more for the gradient of its inputs and one for that of its weights, where they are computed;
              the head counts where it runs
    other     time - linalg - passes: Gram products and other statistics, scoring, cutting. Below 0 where passes are faster than F
    memory    the dense model's bytes with the most that the process needed beyond them, over the dense model's bytes

*bound* is what `time - linalg` should not exceed, and for memory the model, two blocks and one residual buffer.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lib.evaluation.process import peak_memory
from lib.evaluation.speed import forward_seconds
from lib.evaluation.text import load_corpus, sample_blocks
from lib.methods import METHODS, sweep
from lib.models.load import load
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count

MODELS = {"wiki-a-llama": (128, 256), "smollm2-135m": (8, 512), "wide": (16, 512)}  # name -> samples and length
WIDE = dict(
    vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=2048,
)  # fmt: skip
RATIO, LEVELS = 0.2, (0.1, 0.2, 0.25, 0.3)
PATIENCE = 1800  # seconds for one method on one model
NOISE = 0.2  # F before and after may differ by this share
FACTORISATIONS = {
    torch.linalg: (
        "eigh", "eigvalsh", "svd", "svdvals", "cholesky", "cholesky_ex", "qr", "solve", "solve_triangular", "inv", "lstsq",
    ),
    torch: ("cholesky_solve", "cholesky_inverse", "geqrf", "ormqr", "svd_lowrank"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method with settings, the ratios that it is asked for at once, and its bound in F beside linear algebra."""

    method: str
    bound: float | None = None
    settings: dict = field(default_factory=dict)
    ratios: tuple[float, ...] = (RATIO,)


BOUNDS = dict.fromkeys(("wanda-sp", "wanda-sp-heads", "cfsp", "flap", "magnitude-neurons", "random-neurons", "shortgpt"), 1.3)
BOUNDS |= {"slicegpt": 2.5, "svd-llm": 1.6, "modegpt": 1.6, "comp": 3, "llm-pruner": 4, "fpt": 7}
CASES = {name: Case(name, BOUNDS.get(name)) for name in METHODS} | {
    "slicegpt, 4 levels": Case("slicegpt", 2.5 + 3 * 1.2, ratios=LEVELS),
    "svd-llm, W+U": Case("svd-llm", 3, {"variant": "W+U"}),
    "afr, one aggregation": Case("afr", 4, {"aggregation": "absolute only"}),
}


# --- one method, in a process of its own -----------------------------------------------------------------------------------


def subject(name: str, samples: int, length: int) -> tuple[nn.Module, torch.Tensor]:
    """A model with its weights in memory, and calibration tokens [samples, length]."""
    generator = torch.Generator().manual_seed(0)
    if name == "wide":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**WIDE)).eval().requires_grad_(False)
        return model, torch.randint(WIDE["vocab_size"], (samples, length), generator=generator)
    model, tokenizer = load(name)
    for p in model.parameters():  # not mapped from a file, which would count as memory of the method that reads it
        p.data = p.data.clone()
    return model, sample_blocks(load_corpus("wiki-a"), tokenizer, samples, length, generator)


def chosen_clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass
class Spent:
    """Seconds inside factorisations, and multiply-adds of linear layers."""

    factorising: float = 0.0
    macs: int = 0


@contextlib.contextmanager
def watched(clock: Callable[[], float]) -> Iterator[Spent]:
    """What is spent within the `with`, whatever models it is spent on."""
    spent, inside = Spent(), []

    def timed(run: Callable) -> Callable:
        def call(*args, **kwargs):
            if inside:  # one factorisation that calls another counts once
                return run(*args, **kwargs)
            inside.append(run)
            start = clock()
            try:
                return run(*args, **kwargs)
            finally:
                spent.factorising += clock() - start
                inside.pop()

        return call

    def forward(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(layer, nn.Linear) and output.device.type != "meta":
            macs = output.numel() * layer.in_features
            spent.macs += macs
            if output.requires_grad:
                back = inputs[0].requires_grad + layer.weight.requires_grad
                output.register_hook(lambda _: add(back * macs))

    def add(macs: int) -> None:
        spent.macs += macs

    originals = [(home, name, getattr(home, name)) for home, names in FACTORISATIONS.items() for name in names]
    handle = nn.modules.module.register_module_forward_hook(forward)
    try:
        for home, name, run in originals:
            setattr(home, name, timed(run))
        yield spent
    finally:
        handle.remove()
        for home, name, run in originals:
            setattr(home, name, run)


def measure(case: Case, name: str, samples: int, length: int) -> dict:
    """The row of one case: times in F, memory in bytes of the dense model."""
    clock = chosen_clock()
    model, ids = subject(name, samples, length)
    anatomy, size = Anatomy(model), count(model).bytes
    block = sum(p.numel() * p.element_size() for p in anatomy.blocks[0].parameters())
    buffer = ids.numel() * anatomy.width * model.dtype.itemsize
    layers = sum(layer.weight.numel() for layer in anatomy.blocks.modules() if isinstance(layer, nn.Linear))
    del anatomy
    passes = [forward_seconds(model, ids, clock)]

    def run() -> None:
        alone = len(case.ratios) == 1
        results = sweep(case.method, model, ids, case.ratios, inplace=alone, **case.settings)
        for _ in results:
            pass

    with watched(clock) as spent:
        start = clock()
        peak = peak_memory(run)
        seconds = clock() - start
    passes.append(forward_seconds(subject(name, samples, length)[0], ids, clock))  # the first model may be used up
    f = sum(passes) / 2
    row = {"F": f, "drift": abs(passes[1] - passes[0]) / f, "time": seconds / f, "linalg": spent.factorising / f}
    row["passes"] = spent.macs / (layers * ids.numel())
    row["other"] = row["time"] - row["linalg"] - row["passes"]
    return row | {"memory": peak and 1 + peak / size, "memory_bound": 1 + (2 * block + buffer) / size}


# --- the table -------------------------------------------------------------------------------------------------------------


def asked(label: str, model: str, samples: int, length: int) -> dict | str:
    """`measure` in a process of its own, or why there is no result."""
    command = [sys.executable, "-m", "benchmarks.cost_in_passes", model, "--alone", label]
    command += ["--samples", str(samples), "--length", str(length)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"not finished after {PATIENCE} s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def remark(row: dict) -> str:
    """What the time beyond the bound is, and whether the measurement can be trusted."""
    parts = []
    if row["bound"] and row["time"] - row["linalg"] > row["bound"]:
        parts.append(f"beyond its bound: passes are {row['passes']:.2f} F, statistics, scoring and cutting {row['other']:.2f} F")
    if row["memory"] and row["memory"] > row["memory_bound"]:
        parts.append(f"{row['memory'] - row['memory_bound']:.2f} of the model's bytes beyond the bound of memory")
    if row["drift"] > NOISE:
        parts.append(f"F changed by {row['drift']:.0%} meanwhile: measure again")
    return "; ".join(parts)


COLUMNS = ("time", "linalg", "passes", "other", "bound", "memory", "memory_bound")


def report(model: str, labels: list[str], samples: int, length: int) -> list[dict]:
    """Print the table of one model as it is measured; returns its rows."""
    clock = "processor time" if torch.get_num_threads() == 1 else "wall clock"
    print(f"\n{model}, {samples} x {length} tokens, {torch.get_num_threads()} threads, {clock}")
    print(f"{'method':22s}" + "".join(f"{name:>13s}" for name in COLUMNS), flush=True)
    rows = []
    for label in labels:
        found = asked(label, model, samples, length)
        if isinstance(found, str):
            row = {"remark": found}
        else:
            row = found | {"bound": CASES[label].bound}
            row["remark"] = remark(row)
        numbers = "".join(f"{row[name]:13.2f}" if row.get(name) is not None else f"{'-':>13s}" for name in COLUMNS)
        print(f"{label:22s}{numbers}  {row['remark']}", flush=True)
        rows.append({"model": model, "samples": samples, "length": length, "method": label} | row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models and methods; all of them if none is named")
    parser.add_argument("--samples", type=int, help="calibration sequences")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--csv", type=Path, help="file for the rows")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # what the process of one method does
    given = parser.parse_args()
    labels = [name for name in given.names if name in CASES] or list(CASES)
    models = [name for name in given.names if name not in CASES] or list(MODELS)
    rows = []
    for model in models:
        samples, length = MODELS.get(model, (8, 512))
        samples, length = given.samples or samples, given.length or length
        if given.alone:
            print(json.dumps(measure(CASES[given.alone], model, samples, length)))
        else:
            rows += report(model, labels, samples, length)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
