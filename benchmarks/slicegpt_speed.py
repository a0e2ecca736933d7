"""How much of slicing's theoretical speed-up is reached, on a model large enough to be limited by arithmetic on two cores.

    python -m benchmarks.slicegpt_speed

A random Llama of 0.3 billion parameters in float32 reads prompts of 128 tokens, batch 8, dense and sliced by 25 %. *Ideal* is the
ratio of multiply-adds (`prefill_macs`, shortcuts included). Repeats alternate between the networks, so that a busy
machine slows all of them equally. Widths are multiples of 8. Values are random, because they do not change the speed.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.papers.sliced_network import Junction, rotate_and_slice
from lib.papers.slicegpt import constant_widths, slice_globally, stock_model
from lib.primitives.cost import count, prefill_macs
from lib.primitives.linalg import random_rotation

BATCH, PROMPT, REPEATS, LEVEL = 8, 128, 7, 0.25


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=18,
            num_attention_heads=16,
            num_key_value_heads=16,
            tie_word_embeddings=False,
        )  # fmt: skip
    ).eval()
    generator = torch.Generator().manual_seed(0)
    axes = [random_rotation(1024, generator) for _ in range(4)]  # a few, used again and again
    widths = constant_widths(model, LEVEL)

    def turned():
        return map(Junction, itertools.cycle(axes))

    networks = {
        "dense": model,
        "low-rank shortcuts": rotate_and_slice(model, turned(), widths, "low-rank"),
        "dense shortcuts": rotate_and_slice(model, turned(), widths, "dense"),
        "no shortcuts (stock)": stock_model(slice_globally(model, axes[0], widths[0])),
    }
    ids = torch.randint(32000, (BATCH, PROMPT), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(input_ids=ids, use_cache=False, logits_to_keep=1)
                if repeat:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    print(f"prefill {BATCH} x {PROMPT} tokens, {count(model).params:,} parameters, {torch.get_num_threads()} threads:")
    whole, macs = statistics.median(times["dense"]), prefill_macs(model, PROMPT)
    for name, network in networks.items():
        found, ideal = whole / statistics.median(times[name]), macs / prefill_macs(network, PROMPT)
        rate = BATCH * PROMPT * found / whole
        print(f"  {name:20s} {rate:7.0f} tokens/s   speed-up {found:.2f} of {ideal:.2f} = {found / ideal:.0%}")


if __name__ == "__main__":
    main()
