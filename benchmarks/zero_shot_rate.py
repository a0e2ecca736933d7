"""Zero-shot questions through lm-eval: every context read once, against lm-eval's own model, which reads it for each choice.

    python -m benchmarks.zero_shot_rate [model] [documents] [task ...]

The model is a name that `load` takes, or `random`, a Llama of 64 million random parameters. Tasks other than the embedded one
need PARED_DATA_DIR. Repeats alternate, so that a busy machine slows both equally.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from lib.evaluation import shared_context
from lib.evaluation.continuation import TASK
from lib.evaluation.zero_shot import zero_shot
from lib.models.load import load

REPEATS = 3


def main(name: str = "wiki-a-llama", documents: int = 100, *tasks: str) -> None:
    model, tokenizer = load("wiki-a-llama" if name == "random" else name)
    if name == "random":
        shape = dict(hidden_size=640, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=10)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, max_position_embeddings=512, **shape)).eval()
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}, {size:,} parameters, {documents} documents, {torch.get_num_threads()} threads")
    classes = {"lm-eval": HFLM, "ours": shared_context.SharedContextLM}
    for task in tasks or (TASK,):
        seconds, found = {way: [] for way in classes}, {}
        for _ in range(REPEATS):
            for way, cls in classes.items():
                shared_context.SharedContextLM = cls
                start = time.perf_counter()
                found[way] = zero_shot(model, tokenizer, (task,), documents)[0]["acc"]
                seconds[way].append(time.perf_counter() - start)
        theirs, ours = (statistics.median(seconds[way]) for way in classes)
        times = f"lm-eval {theirs:6.2f} s, ours {ours:6.2f} s, {theirs / ours:.2f} times as fast"
        print(f"  {task:20s} {times}; accuracy {found['lm-eval']:.3f} and {found['ours']:.3f}", flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*(int(text) if text.isdigit() else text for text in arguments))
