"""Perplexity of a model with a large vocabulary: the suite's evaluation against a plain loop.

    python -m benchmarks.evaluation_rate [model] [windows] [corpus]

plain: float32, one window at a time, all logits of a window, cross-entropy. ours: `lib.evaluation.perplexity` in float32, and
in bfloat16, which is fast on a processor with units for it. The default is two windows of 2,048 tokens of the embedded text;
`lib.evaluation.text.load_corpus` names the others. Repeats alternate, so that a busy machine slows all of them equally.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, tokens_of, windows
from lib.models.load import fast_bfloat16, load
from lib.primitives.surgery import cast

LENGTH, REPEATS = 2048, 3


@torch.no_grad()
def plain(model: nn.Module, tokens: torch.Tensor, limit: int) -> float:
    losses = [
        F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:]) for ids in windows(tokens, LENGTH)[:limit]
    ]
    return math.exp(statistics.fmean(loss.item() for loss in losses))


def main(name: str = "gemma-3-270m", limit: int = 2, corpus: str = "wiki-a") -> None:
    model, tokenizer = load(name)
    small = cast(copy.deepcopy(model), torch.bfloat16)
    tokens = tokens_of(load_corpus(corpus, "test"), tokenizer)
    ways: dict[str, Callable[[], float]] = {
        "plain, float32": lambda: plain(model, tokens, limit),
        "ours, float32": lambda: perplexity(model, tokens, LENGTH, limit, batch=1).perplexity,
        "ours, bfloat16": lambda: perplexity(small, tokens, LENGTH, limit, batch=1).perplexity,
    }
    seconds, found = {way: [] for way in ways}, {}
    for _ in range(REPEATS):
        for way, run in ways.items():
            start = time.perf_counter()
            found[way] = run()
            seconds[way].append(time.perf_counter() - start)
    print(f"{name}, {limit} windows of {LENGTH}, {torch.get_num_threads()} threads, fast bfloat16: {fast_bfloat16()}")
    whole = statistics.median(seconds["plain, float32"])
    for way in ways:
        rate, times = limit * LENGTH / statistics.median(seconds[way]), whole / statistics.median(seconds[way])
        print(f"  {way:16s} {rate:6.0f} tokens a second, {times:.1f} times the plain loop, perplexity {found[way]:.3f}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*(int(text) if text.isdigit() else text for text in arguments))
