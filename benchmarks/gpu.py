"""What the methods cost on a GPU, and whether they do there what they do on a CPU: at most eight minutes, no network.

    python -m benchmarks.gpu [--device cpu] [--minutes 8] [--csv PATH] [method ...]

First every method compresses a tiny Llama on the device in float32 and on the CPU in float64, and the logits of both results are
compared: `pytest -m gpu` asserts the same. Then a random Llama is made on the device, in bfloat16 and of LLaMA-2-7B's shape (on a
CPU: of 20 million parameters, in float32), and every method compresses it: seconds, the same over one forward pass on the
calibration tokens (F), peak memory beyond the weights, and how fast the result reads and writes beside the dense model. The
method works in place where it can, and the model is made again for the next one. Methods for which no time is left are named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.evaluation.process import peak_memory
from lib.evaluation.speed import forward_seconds, speed
from lib.methods import make
from lib.suite.architectures import ARCHITECTURES

TINY = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
ON_CPU = dict(
    model_type="llama", vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=6,
    num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
RATIO = 0.25
# Cheapest first, so that a short budget still measures most of them.
ORDER = (
    "random-neurons", "magnitude-neurons", "shortgpt", "cfsp", "wanda-sp", "wanda-sp-heads", "flap", "wanda", "comp", "modegpt",
    "llm-pruner", "afr", "fpt", "slicegpt-global", "slicegpt", "svd-llm", "lorap", "svd", "fwsvd", "slicegpt-stock",
    "sparsegpt", "asvd",
)  # fmt: skip


def difference_to_cpu(method: str, device: str) -> float:
    """Relative difference of a compressed tiny Llama's logits on `device`, in float32, from those on the CPU in float64."""
    logits = []
    for place, dtype in (("cpu", torch.float64), (device, torch.float32)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn(len(parameter)))
        ids = torch.randint(TINY["vocab_size"], (6, 32), generator=torch.Generator().manual_seed(1))
        small = make(method, model.to(place, dtype), ids.to(place), RATIO)
        with torch.no_grad():
            logits.append(small(input_ids=ids.to(place)).logits.double().cpu())
    return ((logits[1] - logits[0]).norm() / logits[0].norm()).item()


def random_model(shape: dict, device: str, dtype: torch.dtype) -> nn.Module:
    """A random model made on the device itself, without a copy in main memory."""
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def measured(method: str, shape: dict, ids: torch.Tensor, device: str, dtype: torch.dtype, generated: int) -> dict:
    """One method on a fresh model: seconds, F, peak memory beyond the weights, and the speed of the result."""
    found = {"model": random_model(shape, device, dtype)}
    weights = sum(p.numel() * p.element_size() for p in found["model"].parameters())
    before = forward_seconds(found["model"], ids)

    def run() -> None:
        start = time.perf_counter()
        found["model"] = make(method, found.pop("model"), ids, RATIO, inplace=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - start

    peak = peak_memory(run, device)
    row = {"method": method, "seconds": found["seconds"], "passes": found["seconds"] / before}
    row |= {"forward_s": before, "peak_over_weights": None if peak is None else 1 + peak / weights}
    return row | speeds_of(found["model"], generated)


def speeds_of(model: nn.Module, generated: int) -> dict:
    """Tokens a second of reading and writing at batch 1 and 16."""
    found = {}
    for batch in (1, 16):
        row = speed(model, prompt=128, generated=generated, batch=batch, repeats=1)
        found |= {f"prefill_{batch}": row["prefill_tokens_per_s"], f"decode_{batch}": row["decode_tokens_per_s"]}
    return found


def rows(methods: list[str], device: str, until: float) -> Iterator[dict]:
    """The dense model's speeds, then one row for each method, as long as there is time; a method that fails is a row as well."""
    cuda = device.startswith("cuda")
    shape, dtype = (ARCHITECTURES["Llama-2-7B"], torch.bfloat16) if cuda else (ON_CPU, torch.float32)
    samples, length, generated = (16, 2048, 32) if cuda else (4, 256, 8)
    ids = torch.randint(shape["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0)).to(device)
    yield {"method": "dense"} | speeds_of(random_model(shape, device, dtype), generated)
    for method in methods:
        if time.monotonic() > until:
            yield {"method": method, "note": "no time left"}
            continue
        try:
            yield measured(method, shape, ids, device, dtype, generated)
        except (RuntimeError, ValueError) as error:
            yield {"method": method, "note": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        if cuda:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(ORDER))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    until = time.monotonic() + 60 * asked.minutes
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}", flush=True)
    for method in asked.methods:
        print(f"  {method:18s} float32 here against float64 on a CPU: {difference_to_cpu(method, asked.device):.1e}", flush=True)
    found = []
    for row in rows(asked.methods, asked.device, until):
        found.append({"device": name} | row)
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
        if asked.csv:
            pd.DataFrame(found).to_csv(asked.csv, index=False)


if __name__ == "__main__":
    main()
