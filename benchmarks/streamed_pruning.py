"""Memory that it takes to prune a model of 1.1 billion parameters: COMP from disk against LLM-Pruner in memory.

    python -m benchmarks.streamed_pruning

A random bfloat16 Llama in the shape of TinyLlama 1.1B is written to a temporary folder block by block. Each method then removes
20 % in a process of its own. *peak* is the largest resident memory of the process (Linux, VmHWM) above that of Python with
torch imported. What LLM-Pruner needs only while it loads the whole model is not counted. Values are random, because they do
not change the memory. LLM-Pruner's gradients are freed one matrix at a time, which is already less than in the original,
where all gradients are in memory at once, as large as another copy of the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = dict(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
SAMPLES, LENGTH, RATIO = 8, 128, 0.2
METHODS = ("comp", "llm-pruner")
GOALS = {"of the model": 0.35, "below LLM-Pruner": 0.80}


def write_model(folder: Path) -> int:
    """Write the random model, one file for every block and one for the rest; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lib.models.checkpoint import stored_tensors
    from lib.models.disk import write_tensors
    from lib.models.folder import INDEX
    from lib.primitives.anatomy import Anatomy

    config = LlamaConfig(**SHAPE)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    prefix, generator = f"{Anatomy(model).family.blocks}.", torch.Generator().manual_seed(0)

    def random(like: torch.Tensor) -> torch.Tensor:
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=torch.bfloat16)
        return (torch.randn(like.shape, generator=generator) * 0.02).to(torch.bfloat16)

    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in stored_tensors(model).items():
        place = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else "rest"
        files.setdefault(f"model-{place}.safetensors", {})[name] = value
    for file, shapes in files.items():
        write_tensors(folder / file, shapes, (random(like) for like in shapes.values()))
    places = {name: file for file, shapes in files.items() for name in shapes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures = ["LlamaForCausalLM"]
    config.to_json_file(folder / "config.json")
    return sum(like.numel() * like.element_size() for shapes in files.values() for like in shapes.values())


def peak() -> int:
    """The most memory this process ever had resident, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads VmHWM from /proc/self/status: run it on Linux")


def forget_peak() -> None:
    """From now on `peak` is the most since now."""
    Path("/proc/self/clear_refs").write_text("5")


def work(method: str, folder: str) -> None:
    """What the process of one method does; its last line is a row of numbers."""
    import torch

    torch.set_num_threads(2)
    baseline = peak()
    ids = torch.randint(SHAPE["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    start = time.time()
    if method == "comp":
        from lib.models.disk import compress_on_disk, model_on_disk
        from lib.papers import comp
        from lib.primitives.cost import count
        from lib.primitives.layer_importance import layer_scores

        imported = peak()
        dense = count(model_on_disk(folder))
        settings = comp.Settings(precision="float32")

        def walk_of(model, ids, note):
            plan = comp.decide(model, ids, layer_scores(model, ids), RATIO, settings)
            return comp.CompWalk(model, ids, plan, settings, batch=4)

        small = compress_on_disk(folder, Path(folder) / "pruned", ids, walk_of)
    else:
        from transformers import AutoModelForCausalLM

        from lib.baselines.llm_pruner import sweep
        from lib.primitives.cost import count

        imported = peak()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        dense = count(model)
        forget_peak()
        small = next(sweep(model, ids, [RATIO], inplace=True))[1]
    row = {"baseline": baseline, "imported": imported, "peak": peak(), "seconds": time.time() - start}
    print(json.dumps(row | {"removed": count(small).against(dense)["removed_decoder"]}))


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder))
        print(
            f"random Llama, {size / 2:,.0f} parameters, {size / 1e9:.2f} GB; {SAMPLES} x {LENGTH} calibration tokens", flush=True
        )
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.streamed_pruning", method, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = rows[method] = json.loads(output.splitlines()[-1])
            above = row["above"] = row["peak"] - row["baseline"]
            print(
                f"  {method:12s} {above / 1e6:7.0f} MB above {row['baseline'] / 1e6:.0f} MB of Python and torch "
                f"({(row['imported'] - row['baseline']) / 1e6:.0f} MB of it other imports) = {above / size:.0%} of the model; "
                f"{row['seconds']:.0f} s, {row['removed']:.1%} of the decoder removed",
                flush=True,
            )
    shares = {
        "of the model": rows["comp"]["above"] / size,
        "below LLM-Pruner": 1 - rows["comp"]["above"] / rows["llm-pruner"]["above"],
    }
    print(f"  COMP from disk: {shares['of the model']:.0%} of the model (goal: at most {GOALS['of the model']:.0%}), "
          f"{shares['below LLM-Pruner']:.0%} below LLM-Pruner (goal: at least {GOALS['below LLM-Pruner']:.0%})")  # fmt: skip


if __name__ == "__main__":
    work(*sys.argv[1:]) if len(sys.argv) > 1 else main()
