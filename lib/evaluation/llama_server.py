"""llama.cpp inside a process of its own: what that process runs.

It imports neither torch nor transformers, so a process starts in a moment and its memory is that of llama.cpp.
"""

from __future__ import annotations

import json
import urllib.request

from lib.evaluation.process import resident_memory

_server = None  # of this process


def load(path: str, threads: int, context: int, hidden_states: bool = False) -> int:
    """Start llama.cpp with a file in this process, for text or for hidden states; the bytes that the process then holds."""
    global _server
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if hidden_states:
        params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.n_batch = params.n_ubatch = context  # a prompt is read in one piece
    _server = xllamacpp.Server(params)
    return resident_memory()


def hidden(ids: list[int]) -> list[list[float]]:
    """The last hidden states of a prompt, behind the final norm: [tokens][d]."""
    return _answered("/embeddings", {"content": ids, "embd_normalize": -1})[0]["embedding"]  # -1: as they are


def tokens(text: str) -> list[int]:
    """The ids of a text, without those that mark its beginning or end."""
    return _answered("/tokenize", {"content": text, "add_special": False})["tokens"]


def turn(prompt: int, generated: int) -> dict:
    """One prompt, read afresh, and the text after it. Which tokens they are does not matter."""
    ids = [1 + i % 200 for i in range(prompt)]
    asked = {"prompt": ids, "n_predict": generated, "cache_prompt": False, "ignore_eos": True, "temperature": 0.0}
    timings = _server.handle_completions(asked)["timings"]
    return {
        "first_token_ms": timings["prompt_ms"],
        "decode_tokens_per_s": timings["predicted_per_second"],
        "used": resident_memory(),
    }


def _answered(route: str, question: dict) -> dict | list:
    """What the server of this process answers."""
    body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(_server.listening_address + route, body, kind)) as answer:
        return json.load(answer)
