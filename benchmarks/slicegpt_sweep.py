"""Time and memory of four slicing levels in one sweep, against the published algorithm run level by level, in one process.

    python -m benchmarks.slicegpt_sweep

Both do the same job: slice the workshop Llama at 10, 20, 25 and 30 %, calibrated on 128 sequences of 256 tokens. The
literal algorithm (benchmarks/literal_slicegpt.py) runs every layer twice; ours runs every half of a layer once. Repeats
alternate, so that a busy machine slows both equally. Beside the time stands the number of forward passes of the dense model's
blocks over the same tokens that fit into it; below, the perplexity of both on the same windows of the test text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.literal_slicegpt import LiteralSliceGPT
from lib.evaluation.process import peak_memory
from lib.evaluation.text import load_corpus, sample_blocks
from lib.models.load import load
from lib.papers.slicegpt import Settings, decompose, junctions, kept_width, sweep
from lib.primitives.calibration import ResidualStream

LEVELS, REPEATS, WINDOWS = (0.1, 0.2, 0.25, 0.3), 5, 64


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def perplexity(logits_of: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> float:
    """Of the tokens ids [windows, length] behind the first of each window."""
    losses = [
        torch.nn.functional.cross_entropy(logits_of(part)[:, :-1].flatten(0, 1), part[:, 1:].flatten()) for part in ids.split(8)
    ]
    return math.exp(torch.stack(losses).mean())


def main() -> None:
    model, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 128, 256, torch.Generator().manual_seed(0))

    def ours(layout: str) -> None:
        for _ in sweep(model, ids, LEVELS, Settings(round_interval=1, layout=layout)):
            pass

    def literal() -> None:
        for level in LEVELS:
            LiteralSliceGPT(model, ids, kept_width(128, level, 1))

    def dense() -> None:
        stream = ResidualStream(model, ids)
        for block in range(len(stream.anatomy.blocks)):
            stream.advance_block(block)

    runs = {
        "one pass of the dense model": dense,
        "literal, two evaluations, level by level": literal,
        "ours, dense shortcuts": lambda: ours("dense"),
        "ours, low-rank shortcuts": lambda: ours("low-rank"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            times[name].append(timed(run))
    median = {name: statistics.median(values) for name, values in times.items()}
    slowest, once = median["literal, two evaluations, level by level"], median["one pass of the dense model"]
    print(f"four levels, 128 x 256 tokens, {torch.get_num_threads()} threads, median of {REPEATS}:")
    for name, value in median.items():
        print(f"  {name:42s} {value:6.2f} s   ratio {value / slowest:.2f}   {value / once:5.2f} passes")
    windows = sample_blocks(load_corpus("wiki-a", "test"), tokenizer, WINDOWS, 256, torch.Generator().manual_seed(0))
    for level, sliced in sweep(model, ids, LEVELS, Settings(round_interval=1)):
        found = perplexity(lambda part, sliced=sliced: sliced(input_ids=part).logits, windows)
        expected = perplexity(LiteralSliceGPT(model, ids, kept_width(128, level, 1)), windows)
        print(f"  perplexity at level {level}: literal {expected:.4f}, ours {found:.4f}")
    memory()


def memory() -> None:
    """Peak memory of calibration beyond the weights, against the residual buffer, on a wider random Llama."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(512, (256, 256), generator=torch.Generator().manual_seed(0))
    buffer = ids.numel() * 512 * 4
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())

    def calibrate() -> None:
        stream = ResidualStream(model, ids, batch=4)
        for _ in junctions(stream, decompose(stream), [384] * (stream.anatomy.junctions - 1) + [512]):
            pass

    calibrate()  # libraries allocate their own workspace once
    ours, literal = peak_memory(calibrate), peak_memory(lambda: LiteralSliceGPT(model, ids, 384, batch=4))
    mib = 2**20
    print(f"peak memory of calibration, 65,536 tokens of width 512 (buffer {buffer / mib:.0f} MiB, block {block / mib:.0f} MiB):")
    print(
        f"  ours    {ours / mib:6.0f} MiB = {ours / buffer:.2f} buffers (allowed: 2 buffers + 1 block = {2 + block / buffer:.2f})"
    )
    print(f"  literal {literal / mib:6.0f} MiB = {literal / buffer:.2f} buffers, a copy of the weights included")


if __name__ == "__main__":
    main()
