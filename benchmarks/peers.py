"""Installed packages that prune language models beside ours: same model, same text, same share of FFN neurons.

    python -m benchmarks.peers [model] [--corpus NAME] [--split NAME] [--samples N] [--length M] [--windows W] [--share S]

Every package runs as its documentation says, on a copy of the model; `pip install -e '.[peers]'` installs two of them. A row says
the size, perplexity over dense with its interval over the windows, perplexity over that of our method of the same kind, seconds,
peak memory over the model's bytes, whether the saved folder loads again in plain transformers with the same logits, and whether
it becomes a GGUF file. A package that is not installed or does not run is a row that says why.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from lib.evaluation.paired import common_ratio
from lib.evaluation.perplexity import perplexity
from lib.evaluation.process import peak_memory
from lib.evaluation.text import load_corpus, sample_blocks, spread, tokens_of, windows
from lib.methods import make
from lib.models.checkpoint import export, save
from lib.models.gguf_export import to_gguf
from lib.models.load import load
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count


@dataclass(frozen=True)
class Peer:
    """A package's way to prune, (copy of the model, ids, share) -> model, and our method of the same kind."""

    package: str
    what: str
    run: Callable[[nn.Module, torch.Tensor, float], nn.Module]
    ours: str
    settings: dict = field(default_factory=dict)  # of our method


def optipfair_width(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    """The same share of the neurons of every block, by weights and by the activations of our calibration text."""
    from optipfair import prune_model

    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=2)
    return prune_model(model, pruning_type="MLP_GLU", pruning_percentage=100 * share, dataloader=batches, show_progress=False)


def optipfair_weights(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    from optipfair import prune_model

    return prune_model(model, pruning_type="MLP_GLU", pruning_percentage=100 * share, show_progress=False)


def optipfair_depth(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    """Its default: the last blocks go."""
    from optipfair import prune_model

    return prune_model(model, pruning_type="DEPTH", num_layers_to_remove=blocks_for(model, share), show_progress=False)


def torch_pruning_width(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    """FFN neurons by the magnitude of their group of weights, after its example for language models; attention is left alone."""
    import torch_pruning

    blocks = Anatomy(model).blocks
    kept = [m for block in blocks for m in block.self_attn.modules() if isinstance(m, nn.Linear)] + [model.lm_head]
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # its graph is traced by autograd
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=ids[:1, :64],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=0.0,
        pruning_ratio_dict={block.mlp: share for block in blocks},
        root_module_types=[nn.Linear],
        ignored_layers=kept,
        output_transform=lambda out: out.logits,
    )
    pruner.step()
    model.config.intermediate_size = blocks[0].mlp.gate_proj.out_features
    return model.requires_grad_(False)


def llmcompressor_24(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    """SparseGPT 2:4, its one structured method for language models: half of the weights become zeros, and no parameter goes."""
    import datasets
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    rows = datasets.Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids])
    recipe = SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"])
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    return model


def modelopt_width(model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    import modelopt.torch.prune as prune

    target = {"export_config": {"ffn_hidden_size": round((1 - share) * model.config.intermediate_size)}}
    batches = DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    loop = functools.partial(lambda network: [network(**batch) for batch in batches])
    return prune.prune(model, mode="mcore_minitron", constraints=target, dummy_input=None, config={"forward_loop": loop})[0]


PEERS = (
    Peer("optipfair", "neurons, by weights and activations", optipfair_width, "cfsp"),
    Peer("optipfair", "neurons, by weights", optipfair_weights, "magnitude-neurons"),
    Peer("optipfair", "the last blocks", optipfair_depth, "shortgpt"),
    Peer("torch-pruning", "neurons, by weights", torch_pruning_width, "magnitude-neurons"),
    Peer("llmcompressor", "SparseGPT 2:4", llmcompressor_24, "sparsegpt", {"pattern": "2:4"}),
    Peer("nvidia-modelopt", "neurons, by activations", modelopt_width, "cfsp"),
)


def blocks_for(model: nn.Module, share: float) -> int:
    """Whole blocks that hold about as much as the share of all FFN neurons."""
    blocks = Anatomy(model).blocks
    inner = sum(p.numel() for block in blocks for p in block.mlp.parameters())
    return max(1, round(share * inner / sum(p.numel() for block in blocks for p in block.parameters()) * len(blocks)))


def our_model(peer: Peer, model: nn.Module, ids: torch.Tensor, share: float) -> nn.Module:
    """Our method of the same kind, at the same share."""
    ratios = {"shortgpt": blocks_for(model, share) / len(Anatomy(model).blocks), "sparsegpt": 0.5}
    return make(peer.ours, model, ids, ratios.get(peer.ours, share), **peer.settings)


class Bench:
    """One model and its text; `row` measures one way to prune it."""

    def __init__(self, name: str, corpus: str, split: str, samples: int, length: int, number: int):
        self.name, (self.model, self.tokenizer) = name, load(name)
        generator = torch.Generator().manual_seed(0)
        self.ids = sample_blocks(load_corpus(corpus, split), self.tokenizer, samples, length, generator)
        whole = windows(tokens_of(load_corpus(corpus, "test"), self.tokenizer), length)
        self.windows = whole[spread(len(whole), number)]
        self.dense = self.judged(self.model)

    def judged(self, model: nn.Module) -> dict:
        return perplexity(model, self.windows.flatten(), self.windows.shape[1]).record()

    def made(self, run: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, float, float | None]:
        """A model, the seconds that it took, and the peak of memory over the bytes of the dense model."""
        original, found = copy.deepcopy(self.model), []
        start = time.perf_counter()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            peak = peak_memory(lambda: found.append(run(original)))
        return found[0].eval(), time.perf_counter() - start, peak and peak / count(self.model).bytes

    def row(self, label: str, what: str, run: Callable[[nn.Module], nn.Module]) -> dict:
        small, seconds, peak = self.made(run)
        judged, size = self.judged(small), count(small)
        ratio = common_ratio(judged, self.dense)
        found = {"package": label, "what": what, "params": size.params, "times_dense": ratio.estimate, "low": ratio.low}
        found |= {"high": ratio.high, "seconds": seconds, "peak": peak, "perplexity": judged}
        return found | self.saved(small)

    def saved(self, small: nn.Module) -> dict:
        """Whether the model, saved, loads in plain transformers with the same logits, and becomes a GGUF file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "saved"
            try:
                (save if getattr(small, "edits", None) else export)(small, self.tokenizer, path)
                loads = "only in this suite" if getattr(small, "edits", None) else self.loaded(path, small)
                exports = "yes" if to_gguf(path, Path(folder) / "m.gguf") else "no"
            except Exception as reason:  # whatever a package leaves, the row says what happened
                return {"loads": f"no: {first_line(reason)}", "exports": "no"}
        return {"loads": loads, "exports": exports}

    @torch.no_grad()
    def loaded(self, path: Path, small: nn.Module) -> str:
        from transformers import AutoModelForCausalLM

        found, wanted = (model(self.ids[:1]).logits for model in (AutoModelForCausalLM.from_pretrained(path), small))
        return "yes" if torch.allclose(found, wanted, atol=1e-3) else "with other logits"


def first_line(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:90]


def rows_of(bench: Bench, share: float) -> list[dict]:
    """Every peer, and behind each our method of its kind with the ratio of both over the same windows."""
    rows, ours = [], {}
    for peer in PEERS:
        try:
            version = importlib.metadata.version(peer.package)
            run = functools.partial(peer.run, ids=bench.ids, share=share)
            found = bench.row(f"{peer.package} {version}", peer.what, run)
        except Exception as reason:  # a package that does not run here is a row that says why
            rows.append({"package": peer.package, "what": peer.what, "loads": f"does not run: {first_line(reason)}"})
            continue
        if peer.ours not in ours:
            method = functools.partial(our_model, peer, ids=bench.ids, share=share)
            ours[peer.ours] = bench.row("ours", peer.ours, method)
        against = common_ratio(found["perplexity"], ours[peer.ours]["perplexity"])
        rows.append(found | {"over_ours": against.estimate, "over_low": against.low, "over_high": against.high})
    return rows + list(ours.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("model", nargs="?", default="wiki-a-llama")
    parser.add_argument("--corpus", default="wiki-a")
    parser.add_argument("--split", default="validation")  # for calibration: embedded models know their train split by heart
    for name, default in (("samples", 16), ("length", 256), ("windows", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--csv", default="")
    chosen = parser.parse_args()
    bench = Bench(chosen.model, chosen.corpus, chosen.split, chosen.samples, chosen.length, chosen.windows)
    table = pd.DataFrame(rows_of(bench, chosen.share)).drop(columns="perplexity", errors="ignore")
    print(table.round(3).astype(object).fillna("").to_string(index=False))
    if chosen.csv:
        table.to_csv(chosen.csv, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
