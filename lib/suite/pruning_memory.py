"""Peak memory and time of pruning by one method on a random Llama, in a process of its own.

A process that has already worked holds free memory, and a method that uses it would seem to need less; so every method gets a
fresh process. Where possible it is forked from a server that has only imported the libraries, which saves three seconds.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lib.evaluation.process import peak_memory
from lib.methods import METHODS, make, settings_of
from lib.primitives.checks import choose_one
from lib.suite.runs import end_with_parent

ALL_GRADIENTS = "all gradients"  # as LLM-Pruner's released code needs memory: one backward pass, every gradient kept


def measure(
    method: str,
    ratio: float,
    shape: dict,
    samples: int,
    length: int,
    settings: dict | None = None,
    threads: int = 1,
) -> dict:
    """Prune a random float32 Llama in a fresh process: {"weights", "peak", "seconds"}, bytes and wall-clock seconds.

    method: a name of `lib.methods`, or `ALL_GRADIENTS`; shape: fields of a LlamaConfig; samples x length random tokens
    calibrate; settings: fields of the method's settings. peak: resident bytes beyond the dense model's own `weights`; None
    where the system has no such counter. Raises ValueError for an unknown method or setting, and RuntimeError if it fails.
    """
    choose_one("method", method, [*METHODS, ALL_GRADIENTS])
    if method != ALL_GRADIENTS:
        settings_of(method, settings or {})
    elif settings:
        raise ValueError(f"{ALL_GRADIENTS} takes no settings, such as {', '.join(settings)}")
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(prune_here, method, ratio, shape, samples, length, settings or {}, threads).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"{method}: its process died, most often because memory ran out; use a smaller shape") from error
        except Exception as error:
            raise RuntimeError(f"{method} failed in its own process: {type(error).__name__}: {error}") from error


def keep_all_gradients(model: nn.Module, ids: torch.Tensor) -> None:
    """One backward pass of the next-token loss over the whole batch ids [samples, length], nothing freed."""
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def prune_here(method: str, ratio: float, shape: dict, samples: int, length: int, settings: dict, threads: int) -> dict:
    """`measure` without a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (samples, length))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def run() -> None:
        if method == ALL_GRADIENTS:
            keep_all_gradients(model, ids)
        else:
            make(method, model, ids, ratio, inplace=True, **settings)

    # Run the kernels once: their code then counts as resident memory, and it is not the method's.
    keep_all_gradients(LlamaForCausalLM(model.config), ids[:1])
    start = time.perf_counter()
    peak = peak_memory(run)
    return {"weights": weights, "peak": peak, "seconds": time.perf_counter() - start}
