"""How fast a model reads and writes: tokens a second of several models in turns, and where a forward pass spends its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import Cache

from lib.primitives.calibration import batch_of


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(model: nn.Module, prompt: int = 128, generated: int = 32, batch: int = 1, repeats: int = 5) -> dict:
    """Prefill and decode throughput in tokens a second (all sequences of the batch counted), and the threads used.

    Prefill scores a prompt [batch, prompt]; decode appends `generated` tokens one at a time with the KV cache, its
    prefill not counted. Tokens are arbitrary: dense models take the same time for any. Medians of `repeats` after a warm-up.
    """
    return speeds({"": model}, prompt, generated, batch, repeats)[""]


def speeds(
    models: Mapping[str, nn.Module],
    prompt: int = 128,
    generated: int = 32,
    batch: int = 1,
    repeats: int = 5,
    caches: Mapping[str, Callable[[], Cache]] | None = None,
) -> dict[str, dict]:
    """`speed` of several models by name. They take turns, so that other load on the machine slows all of them alike.

    caches: {name of a model: function that makes its empty KV cache}, where that is not the usual one.
    """
    caches = caches or {}
    for model in models.values():
        if prompt + generated > model.config.max_position_embeddings:
            raise ValueError(f"{prompt} + {generated} tokens exceed the model's {model.config.max_position_embeddings} positions")
    turns = [
        {name: _seconds(model, prompt, generated, batch, caches.get(name)) for name, model in models.items()}
        for _ in range(1 + repeats)
    ][1:]
    found = {}
    for name in models:
        prefill, decode = (statistics.median(spent) for spent in zip(*(turn[name] for turn in turns), strict=True))
        found[name] = {
            "batch": batch,
            "prefill_tokens_per_s": batch * prompt / prefill,
            "decode_tokens_per_s": batch * generated / decode,
            "threads": torch.get_num_threads(),
        }
    return found


@torch.no_grad()
def _seconds(
    model: nn.Module, prompt: int, generated: int, batch: int, empty_cache: Callable[[], Cache] | None
) -> tuple[float, float]:
    """Wall-clock seconds of one prefill and of the decoding after it."""
    device = next(model.parameters()).device
    ids = torch.arange(batch * prompt, device=device).view(batch, prompt) % model.config.vocab_size

    def clock() -> float:
        _synchronise(device)
        return time.perf_counter()

    start = clock()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    prefill = clock() - start
    cache = empty_cache() if empty_cache else None
    cache = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    start = clock()
    for _ in range(generated):
        cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    return prefill, clock() - start


@torch.no_grad()
def forward_seconds(model: nn.Module, ids: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward pass over the tokens ids [samples, length] without the head: F, the unit of a method's cost.

    In the batches of `lib.primitives.calibration`, so that a method is compared with the pass that it makes itself. clock:
    another one than that on the wall, such as `time.process_time`, which other work on the machine does not disturb.
    """
    device = next(model.parameters()).device
    parts = ids.to(device).split(batch_of(ids.shape[1]))
    model.base_model(input_ids=parts[0][:, :1], use_cache=False)  # what the libraries set up once
    _synchronise(device)
    start = clock()
    for part in parts:
        model.base_model(input_ids=part, use_cache=False)
    _synchronise(device)
    return clock() - start


@torch.no_grad()
def self_times(model: nn.Module, ids: torch.Tensor, repeats: int = 3) -> dict[str, float]:
    """Where a forward pass spends its time: {class of module: seconds}, each without the modules inside it; smallest of runs.

    ids: [batch, tokens]. Two clock readings a module make the whole a little slower than without them.
    """
    device, runs = next(model.parameters()).device, []
    inner: list[float] = []  # seconds spent in the children of each module that is running now
    starts: list[float] = []

    def enter(module, inputs):
        _synchronise(device)
        inner.append(0.0)
        starts.append(time.perf_counter())

    def leave(module, inputs, output):
        _synchronise(device)
        whole = time.perf_counter() - starts.pop()
        name = type(module).__name__
        runs[-1][name] = runs[-1].get(name, 0.0) + whole - inner.pop()
        if inner:
            inner[-1] += whole

    handles = [hook for m in model.modules() for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        for _ in range(repeats + 1):
            runs.append({})
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return min(runs[1:], key=lambda run: sum(run.values()))  # the first run warms up
