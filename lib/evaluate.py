"""What a compressed model is worth: token perplexity, zero-shot accuracy and speed, each with its definition."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from lib.benchmark_tasks import LOCAL_TASKS, data_folder, hub_task, local_task, task_manager
from lib.continuation import TASK, continuation_task
from lib.text import windows


@dataclass(frozen=True)
class Perplexity:
    """A token perplexity together with everything that defines it."""

    perplexity: float
    tokens: int  # scored: length - 1 in each window
    windows: int
    length: int
    definition: str = "exp of the mean next-token loss in nats, non-overlapping windows, first token of each unscored"

    def record(self) -> dict:
        return asdict(self)


@torch.no_grad()
def perplexity(model: nn.Module, stream: torch.Tensor, length: int, limit: int | None = None, batch: int = 8) -> Perplexity:
    """Perplexity by the protocol of the papers (GPTQ, SparseGPT, SliceGPT): one token stream, windows of `length`.

    stream: ids [n_tokens] of the joined text; the tail shorter than a window is dropped; `limit` keeps the first windows.
    Log-softmax is float32 whatever the model's dtype. Raises ValueError if the window exceeds the model's positions.
    """
    positions = model.config.max_position_embeddings
    if length > positions:
        raise ValueError(f"windows of {length} tokens exceed the model's {positions} positions: use shorter windows")
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(f"{limit or 'all'} windows of {length} tokens score nothing: use at least 1 window of 2 tokens")
    blocks = windows(stream, length)[:limit]
    device = next(model.parameters()).device
    total = sum(_next_token_loss(model, ids.to(device)) for ids in blocks.split(batch))
    scored = blocks.shape[0] * (length - 1)
    return Perplexity(float(torch.tensor(total / scored, dtype=torch.float64).exp()), scored, blocks.shape[0], length)


LOGITS_AT_ONCE = 2**26  # numbers in one piece of logits: 256 positions of Gemma's vocabulary of 262,144; long products are fast
FLOATS_AT_ONCE = 2**23  # of these, in float32 at a time: 32 MB, so that the softmax stays in the processor's cache


def head_inputs(model: nn.Module, **inputs) -> tuple[ModelOutput, torch.Tensor | None]:
    """The model's output for `inputs`, with logits of the last position alone, and what its head would read, [batch, tokens, d].

    None, and all logits, for a model without a head, `model.get_output_embeddings()`; None for one that calls it several times.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return model(**inputs), None
    seen: list[torch.Tensor] = []

    def last_position(_, given):
        seen.append(given[0])
        return (given[0][:, -1:],)

    handle = head.register_forward_pre_hook(last_position)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return output, seen[0] if len(seen) == 1 else None


def before_head(model: nn.Module, **inputs) -> tuple[ModelOutput, torch.Tensor | None]:
    """`head_inputs`, with None also for a model that changes its logits after the head, which shows at the last position."""
    output, hidden = head_inputs(model, **inputs)
    if hidden is None:
        return output, None
    # A model spread over devices returns its logits on the first of them, and has them on the last.
    alone = model.get_output_embeddings()(hidden[:, -1:]).to(output.logits.device)
    same = torch.allclose(output.logits, alone, rtol=0, atol=0, equal_nan=True)  # a broken model is no other model
    return output, hidden if same else None


def _next_token_loss(model: nn.Module, ids: torch.Tensor) -> float:
    """Summed cross-entropy of the next tokens in windows ids [batch, tokens], in float32, never with all logits at once.

    The head is applied to the hidden states of a few positions at a time, where the logits are the head's.
    """
    output, hidden = before_head(model, input_ids=ids, use_cache=False)
    if hidden is None:
        whole = output.logits.shape[1] == ids.shape[1]  # a model without a head has been run in full
        return _loss_of_logits(output.logits if whole else model(input_ids=ids, use_cache=False).logits, ids)
    head = model.get_output_embeddings()
    hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    pieces, rows = (max(1, numbers // output.logits.shape[-1]) for numbers in (LOGITS_AT_ONCE, FLOATS_AT_ONCE))
    total = 0.0
    for x, target in zip(hidden.split(pieces), targets.split(pieces), strict=True):
        for logits, y in zip(head(x).split(rows), target.split(rows), strict=True):
            total += F.cross_entropy(logits.float(), y.to(logits.device), reduction="sum").item()
    return total


def _loss_of_logits(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The same from logits [batch, tokens, vocabulary], one window at a time: the float32 copy is the peak."""
    pairs = zip(logits, ids, strict=True)
    return sum(F.cross_entropy(row[:-1].float(), target[1:], reduction="sum").item() for row, target in pairs)


def zero_shot(
    model: nn.Module, tokenizer, tasks: tuple[str, ...] = (TASK,), limit: int | None = None, batch: int = 32,
    data_dir: str | Path | None = None,
) -> list[dict]:  # fmt: skip
    """Zero-shot accuracy by lm-eval: one row per task with `task, metric, acc, acc_norm, stderr, documents, limit, ...`.

    `wiki_a_continuation` is embedded and needs no network; other names are lm-eval's own tasks, on the files of `data_dir`
    (or of the folder named by PARED_DATA_DIR) where lib/benchmark_tasks.py knows them, and from the hub otherwise.
    `metric` says which of lm-eval's metrics `acc` is, `stderr` belongs to it, `limit` was asked for per task (for MMLU: per
    subject), `documents` were scored. Raises what `local_task` and `hub_task` raise, before any model runs.
    """
    with _quiet("lm_eval", "lm-eval", "transformers", "datasets"):
        import lm_eval

        from lib.shared_context import SharedContextLM

        folder, manager = data_folder(data_dir), task_manager(not set(tasks) <= {TASK, *LOCAL_TASKS})
        built = {name: _build_task(name, manager, folder) for name in tasks}
        positions = model.config.max_position_embeddings
        settings = dict(batch_size=batch, max_length=positions, softmax_dtype="float32")
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, **settings)
        loaded = manager.load(list(built.values()))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        # Not `simple_evaluate`: it asks pip for all packages after every call, longer than these models take for 25 documents.
        found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    rows = []
    for name in tasks:
        scores = found["results"][name]
        metric = next((m for m in ("acc_mutual_info", "acc") if f"{m},none" in scores), None)
        if metric is None:
            raise ValueError(f"lm-eval's task {name!r} reports no accuracy: choose a multiple-choice task")
        task = built[name]  # a group like mmlu counts the documents of its parts
        parts = [part.task_name for part in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [name]
        accuracy, documents = scores[f"{metric},none"], sum(found["n-samples"][part]["effective"] for part in parts)
        rows.append(
            {
                "task": name,
                "metric": metric,
                "acc": accuracy,
                "acc_norm": scores.get("acc_norm,none"),
                "stderr": (accuracy * (1 - accuracy) / max(documents - 1, 1)) ** 0.5,
                "documents": documents,
                "limit": limit,
                "harness": f"lm-eval {lm_eval.__version__}",
            }
        )
    return rows


def _build_task(name: str, manager, folder: Path | None):
    if name == TASK:
        return continuation_task()
    if folder is not None and name in LOCAL_TASKS:
        return local_task(name, folder, manager)
    return hub_task(name, manager)


@contextlib.contextmanager
def _quiet(*names: str):
    """lm-eval reports its plan and draws bars for every call; a notebook with forty calls has better uses for the space."""
    import tqdm

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    original = tqdm.tqdm.__init__

    def without_a_bar(self, *args, **kwargs):
        original(self, *args, **kwargs | {"disable": True})

    tqdm.tqdm.__init__ = without_a_bar
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        tqdm.tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- speed --------------------------------------------------------------------------------------------------------------


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
    """`speed` of several models by name. They take turns, so that whatever else the machine does slows all of them alike.

    caches: makes the empty KV cache that the model of a name decodes with, where that is not the usual one.
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
