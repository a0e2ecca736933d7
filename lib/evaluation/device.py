"""How GGUF files run in llama.cpp on this machine: perplexity, memory, time to the first token, tokens a second.

Every file has a process of its own, so that its memory can be told, and the files take turns, so that other load on the machine
slows all of them alike. llama.cpp itself takes the times.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

from lib.evaluation import llama_server
from lib.evaluation.perplexity import Perplexity, of_losses, rows_at_once
from lib.evaluation.text import load_corpus, spread
from lib.evaluation.text import windows as cut_into_windows

KV_BYTES = 2  # of a number in the cache: float16, llama.cpp's default


def run_files(
    paths: Sequence[str | Path], threads: int = 1, prompt: int = 512, generated: int = 128, repeats: int = 3
) -> list[dict]:
    """A row for each file, in their order; medians of `repeats` after a warm-up.

    `bytes` of the file; `loaded` and `used`: resident bytes of its process after loading and after prompt and text;
    `kv_bytes_per_token`; `first_token_ms`: reading `prompt` tokens; `decode_tokens_per_s`: writing `generated` more, one
    sequence. Raises ModuleNotFoundError without xllamacpp, FileNotFoundError for a missing file, ValueError for one that
    llama.cpp does not load or whose context is too short.
    """
    facts = [_facts(Path(path), prompt + generated) for path in paths]
    with ExitStack() as stack:
        workers = [stack.enter_context(_process()) for _ in facts]
        for fact, worker in zip(facts, workers, strict=True):
            fact["loaded"] = _started(worker, fact["path"], threads, prompt + generated)
        turns = [[worker.submit(llama_server.turn, prompt, generated).result() for worker in workers] for _ in range(1 + repeats)]
    rows = []
    for fact, own in zip(facts, zip(*turns[1:], strict=True), strict=True):
        medians = {name: statistics.median(turn[name] for turn in own) for name in own[0]}
        rows.append({"file": fact.pop("path").name} | fact | medians | {"threads": threads})
    return rows


def file_perplexity(path: str | Path, windows: torch.Tensor, threads: int = 1) -> Perplexity:
    """Perplexity of the file on windows [number, length] of its own token ids, by the protocol of `lib.evaluation.perplexity`.

    llama.cpp computes the last hidden states, with its own products and its own cache. It gives no logits of a prompt, so the
    file's head is applied to them here, in float32. Raises as `run_files` does.
    """
    path, length = Path(path), windows.shape[1]
    _facts(path, length)
    head = _head(path)
    with _process() as worker:
        _started(worker, path, threads, length, True)
        losses = []
        for ids in windows:
            hidden = torch.tensor(worker.submit(llama_server.hidden, ids.tolist()).result())
            losses.append(_summed_loss(hidden[:-1], ids[1:], *head))
    return of_losses(torch.stack(losses), length)


def file_windows(path: str | Path, corpus: str, length: int, number: int | None = None) -> torch.Tensor:
    """Windows [number, length] of ids of a corpus, evenly spread over its test split, as llama.cpp tokenises it for a file.

    number: None for all. Raises as `run_files` does.
    """
    _facts(Path(path), length)
    with _process() as worker:
        _started(worker, Path(path), 1, length)
        ids = worker.submit(llama_server.tokens, load_corpus(corpus, "test").text).result()
    whole = cut_into_windows(torch.tensor(ids), length)
    return whole[spread(len(whole), number)]


def _summed_loss(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of the targets [tokens] summed, in float64, from hidden states [tokens, d]; a few logits at a time."""
    rows = rows_at_once(len(weight))
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return sum(F.cross_entropy(F.linear(x, weight, bias), own, reduction="sum").double() for x, own in pieces)


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def check_installed() -> None:
    """Raise ModuleNotFoundError without xllamacpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ModuleNotFoundError("llama.cpp is run through the package xllamacpp: pip install 'pared-down[device]'")


def _head(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [vocabulary, d] and bias of the head in a file, in float32; a tied head is the table of the tokens."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weight = tensors.get("output.weight", tensors["token_embd.weight"])
    bias = tensors.get("output.bias")
    return _float32(weight), None if bias is None else _float32(bias)


def _float32(tensor) -> torch.Tensor:
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def _started(worker: ProcessPoolExecutor, path: Path, *settings) -> int:
    """Load a file in a process of its own; the bytes that it then holds. Raises ValueError for what llama.cpp cannot load."""
    try:
        return worker.submit(llama_server.load, str(path), *settings).result()
    except (BrokenProcessPool, RuntimeError, ValueError) as error:
        raise ValueError(f"llama.cpp does not load {path} ({error}): was it written by `invoke export-gguf`?") from error


def _facts(path: Path, tokens: int) -> dict:
    """What the file itself tells. Raises as `run_files` does, ValueError where so many tokens do not fit."""
    import gguf

    check_installed()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give .gguf files, such as `invoke export-gguf` writes")
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        architecture = keys["general.architecture"]
        keys = {name.removeprefix(f"{architecture}."): value for name, value in keys.items()}
        groups, blocks = keys["attention.head_count_kv"], keys["block_count"]
        heads = sum(groups) if isinstance(groups, list) else groups * blocks
        size, context = keys["attention.key_length"] + keys["attention.value_length"], keys["context_length"]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file of a model that this suite writes ({error})") from error
    if tokens > context:
        raise ValueError(f"{path.name} has {context} positions, and prompt and text need {tokens}: ask for fewer")
    return {"path": path, "bytes": path.stat().st_size, "kv_bytes_per_token": KV_BYTES * heads * size}
