"""How GGUF files run in llama.cpp on this machine: memory, time to the first token, tokens a second.

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

from lib.evaluation.process import resident_memory

KV_BYTES = 2  # of a number in the cache: float16, llama.cpp's default
_server = None  # of this process


def run_files(
    paths: Sequence[str | Path], threads: int = 1, prompt: int = 512, generated: int = 128, repeats: int = 3
) -> list[dict]:
    """A row for each file, in their order; medians of `repeats` after a warm-up.

    `bytes` of the file; `loaded` and `used`: resident bytes of its process after loading and after prompt and text;
    `kv_bytes_per_token`; `first_token_ms`: reading `prompt` tokens; `decode_tokens_per_s`: writing `generated` more, one
    sequence. Raises ModuleNotFoundError without xllamacpp, FileNotFoundError for a missing file, ValueError for one that
    llama.cpp does not load or whose context is too short.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise ModuleNotFoundError("llama.cpp is run through the package xllamacpp: pip install 'pared-down[device]'")
    facts = [_facts(Path(path), prompt + generated) for path in paths]
    with ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))) for _ in facts]
        for fact, worker in zip(facts, workers, strict=True):
            try:
                fact["loaded"] = worker.submit(_load, str(fact["path"]), threads, prompt + generated).result()
            except (BrokenProcessPool, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"llama.cpp does not load {fact['path']} ({error}): was it written by `invoke export-gguf`?"
                ) from error
        turns = [[worker.submit(_turn, prompt, generated).result() for worker in workers] for _ in range(1 + repeats)][1:]
    rows = []
    for fact, own in zip(facts, zip(*turns, strict=True), strict=True):
        medians = {name: statistics.median(turn[name] for turn in own) for name in own[0]}
        rows.append({"file": fact.pop("path").name} | fact | medians | {"threads": threads})
    return rows


def _facts(path: Path, tokens: int) -> dict:
    """What the file itself tells. Raises FileNotFoundError, and ValueError where so many tokens do not fit."""
    import gguf

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


def _load(path: str, threads: int, context: int) -> int:
    """Start llama.cpp with a file in this process; the bytes that the process then holds."""
    global _server
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    _server = xllamacpp.Server(params)
    return resident_memory()


def _turn(prompt: int, generated: int) -> dict:
    """One prompt, read afresh, and the text after it. Which tokens they are does not matter."""
    ids = [1 + i % 200 for i in range(prompt)]
    asked = {"prompt": ids, "n_predict": generated, "cache_prompt": False, "ignore_eos": True, "temperature": 0.0}
    timings = _server.handle_completions(asked)["timings"]
    return {
        "first_token_ms": timings["prompt_ms"],
        "decode_tokens_per_s": timings["predicted_per_second"],
        "used": resident_memory(),
    }
