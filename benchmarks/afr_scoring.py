"""Peak memory and time of scoring every FFN neuron by AFR, both scores in one run, against the bytes of the model.

    python -m benchmarks.afr_scoring [hidden size] [blocks]

The model is a random Llama with the proportions of Llama-3-8B. With `sum_grad` the signed scores of the whole calibration set
are kept (`sum3`); of the gradients, only one is in memory at a time.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.evaluation.process import peak_memory
from lib.papers import afr
from lib.primitives.cost import count

LENGTH, SAMPLES = 256, 2


def random_llama(hidden: int, blocks: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def main(hidden: int = 1024, blocks: int = 12) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = random_llama(hidden, blocks, dtype)
        ids = torch.randint(8192, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
        size = count(model).bytes
        for checkpointing in (False, True):
            for accumulation in ("sum_grad", "per_sample"):
                settings = afr.Settings("absolute only", accumulation=accumulation, checkpointing=checkpointing)
                start = time.perf_counter()
                extra = peak_memory(lambda: afr.neuron_scores(model, ids, ["absolute only"], settings))  # noqa: B023
                spent = (time.perf_counter() - start) / SAMPLES
                whole = "not measured" if extra is None else f"{(size + extra) / size:.2f} times the model"
                print(
                    f"{str(dtype)[6:]:9} {accumulation:10} checkpointing {checkpointing!s:5}: {size / 1e6:.0f} MB model, "
                    f"peak {whole}, model included; {spent:.1f} s a sequence of {LENGTH} tokens",
                    flush=True,
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
