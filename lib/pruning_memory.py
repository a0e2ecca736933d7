"""What pruning itself needs: peak memory and time of one method on a random Llama, in a process of its own.

A process that has already worked holds memory from which the next method is served unseen, so every method gets a fresh one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from lib.compress import METHODS
from lib.evaluate import peak_memory

ALL_GRADIENTS = "all gradients"  # LLM-Pruner's memory as its released code has it: one backward pass, every gradient kept


def measure(method: str, ratio: float, shape: dict, samples: int, length: int, seed: int = 0, threads: int = 1) -> dict:
    """Prune a random float32 Llama in a fresh process: {"weights", "peak", "seconds"}, bytes and wall-clock seconds.

    method: a key of `lib.compress.METHODS`, or `ALL_GRADIENTS`; shape: fields of a LlamaConfig; samples x length random tokens
    calibrate. peak: resident bytes beyond the dense model's own `weights`; None where the system has no such counter.
    Raises ValueError for an unknown method, and RuntimeError with the last line of what the process said if it fails.
    """
    if method not in (*METHODS, ALL_GRADIENTS):
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}, or {ALL_GRADIENTS}")
    request = dict(method=method, ratio=ratio, shape=shape, samples=samples, length=length, seed=seed, threads=threads)
    command = [sys.executable, "-W", "ignore", "-m", "lib.pruning_memory", json.dumps(request)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} failed in its own process: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def keep_all_gradients(model: nn.Module, ids: torch.Tensor) -> None:
    """One backward pass of the next-token loss over the whole batch ids [samples, length], nothing freed."""
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def prune_here(method: str, ratio: float, shape: dict, samples: int, length: int, seed: int, threads: int) -> dict:
    """What `measure` asks of the process that it starts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (samples, length))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def run() -> None:
        if method == ALL_GRADIENTS:
            keep_all_gradients(model, ids)
        else:
            METHODS[method](model, ids, ratio, lambda text: None)

    start = time.perf_counter()
    peak = peak_memory(run)
    return {"weights": weights, "peak": peak, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(prune_here(**json.loads(sys.argv[1]))))
