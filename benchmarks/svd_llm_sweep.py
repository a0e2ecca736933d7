"""Time, memory and quality of four ratios of SVD-LLM in one sweep, against the published procedure run ratio by ratio.

    python -m benchmarks.svd_llm_sweep

The literal procedure is benchmarks/literal_svd_llm.py. Both remove 20, 40, 60 and 80 % of every matrix, (a) of a random Llama of
width 1,024 with four layers and (b) of the workshop Llama. Repeats alternate, so that a busy machine slows both equally. (c)
truncates an ill-conditioned matrix as large as those of a 7B model and compares the loss with the smallest possible one.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.literal_svd_llm import literal_svd_llm, profile, truncated
from lib.evaluation.perplexity import perplexity
from lib.evaluation.process import peak_memory
from lib.evaluation.text import load_corpus, sample_blocks, tokens_of
from lib.models.load import load
from lib.papers.svd_llm import by_outputs, sweep
from lib.primitives.anatomy import Anatomy, shared_inputs
from lib.primitives.linalg import decompose, random_rotation, root_of, truncate
from lib.primitives.low_rank import rank_for, shapes
from lib.suite.architectures import meta_model

RATIOS, MIB, GIB = (0.2, 0.4, 0.6, 0.8), 2**20, 2**30


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    wide_model()
    workshop_model()
    whole_7b()
    large_matrix()


def runs(model: nn.Module, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    def ours() -> None:
        for _ in sweep(model, ids, RATIOS):
            pass

    def literal() -> None:
        for ratio in RATIOS:
            literal_svd_llm(model, ids, ratio)

    def kept() -> None:
        roots = profile(model, ids)
        for ratio in RATIOS:
            truncated(model, roots, ratio)

    return {"literal": literal, "literal, profiled once": kept, "ours": ours}


def working_bytes(model: nn.Module, ratio: float) -> int:
    """Memory that truncation at a ratio needs beside model, residual buffer and result: the peak of a block, in float64.

    First the Gram matrices of the whole block, while those of outputs [m, m] are used up; then those of inputs [n, n], one
    after another, for a root each (`truncated_block`). An eigenproblem of size s takes 3 s² beside its matrix: the vectors, and
    LAPACK's own 2 s². What is left out: matrices whose rank the data does not determine, activations of a batch. Counted on
    shapes, so a meta model will do. Raises ValueError at ratio 0, where nothing is truncated.
    """
    anatomy = Anatomy(model)
    groups = [[anatomy.blocks[0].get_submodule(name) for name in group] for group in shared_inputs(anatomy.family)]
    judged = [tuple(group[0].weight.shape) for group in groups if by_outputs(group)]
    rooted = [[tuple(layer.weight.shape) for layer in group] for group in groups if not by_outputs(group)]
    rest = sum(group[0][1] ** 2 for group in rooted)
    held, peaks = rest + sum(m * m for m, _ in judged), []

    def factors(m: int, n: int) -> int:
        k = rank_for(m, n, ratio)
        return m * n + k * (m + n)  # W in float64, the basis, and what projecting on it gives

    for m, n in judged:
        peaks += [held + 3 * m * m, held - m * m + factors(m, n)]
        held -= m * m
    for group in rooted:
        for m, n in group:  # the root has taken the place of its Gram matrix
            small = min(m, n)
            vectors = small**2 + m * rank_for(m, n, ratio) if m > n else 0
            peaks += [held + 2 * m * n, held + m * n + max(4 * small**2, vectors), held + factors(m, n)]
        peaks.append(held + group[0][1] ** 2)
        held -= group[0][1] ** 2
    return 8 * max(peaks)


def compare(model: nn.Module, ids: torch.Tensor, repeats: int) -> None:
    """Print median seconds and largest peak memory of every way to make the four models."""
    ways = runs(model, ids)
    times, peaks = ({name: [] for name in ways} for _ in range(2))
    for _ in range(repeats):
        for name, run in ways.items():
            gc.collect()
            start = time.perf_counter()
            peaks[name].append(peak_memory(run) or 0)
            times[name].append(time.perf_counter() - start)
    whole = statistics.median(times["literal"])
    for name in ways:
        seconds, peak = statistics.median(times[name]), max(peaks[name]) / MIB
        print(f"  {name:24s} {seconds:7.2f} s   {whole / seconds:5.1f} times as fast   peak {peak:6.0f} MiB beyond the model")


def wide_model() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    ids, unseen = torch.randint(2048, (40, 256), generator=torch.Generator().manual_seed(0)).split([32, 8])
    print("(a) random Llama, width 1,024, 4 layers, 8,192 tokens; one run each:")
    compare(model, ids, repeats=1)
    with torch.no_grad():
        wanted = model(unseen).logits
        for ratio, small in sweep(model, ids, RATIOS):
            errors = [(m(unseen).logits - wanted).norm() / wanted.norm() for m in (small, literal_svd_llm(model, ids, ratio))]
            print(f"  {ratio:.0%}: relative change of unseen tokens' logits, ours {errors[0]:.4f}, literal {errors[1]:.4f}")


def workshop_model() -> None:
    model, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 128, 256, torch.Generator().manual_seed(0))
    print("(b) wiki-a-llama, 128 x 256 tokens; median of 3:")
    compare(model, ids, repeats=3)
    tokens = tokens_of(load_corpus("wiki-a", "test"), tokenizer)
    for ratio, small in sweep(model, ids, RATIOS):
        ours, theirs = (perplexity(m, tokens, 256, 64).perplexity for m in (small, literal_svd_llm(model, ids, ratio)))
        print(f"  {ratio:.0%}: perplexity ours {ours:.3f}, literal {theirs:.3f}")


def whole_7b() -> None:
    model = meta_model("Llama-2-7B")
    every = sum(8 * n * n for _, n in shapes(model).values())
    ours = working_bytes(model, 0.2)
    print(f"LLaMA-7B at 20 %: working memory of ours {ours / GIB:.2f} GiB, published statistics {every / GIB:.1f} GiB")


def large_matrix(n: int = 4096) -> None:
    """Loss against the least possible one, the dropped singular values of WS for the root S that the inputs were made of."""
    generator = torch.Generator().manual_seed(0)
    axes = random_rotation(n, generator)
    root = axes * torch.logspace(0, -6, n, dtype=torch.float64)  # energies over twelve decades
    w = torch.randn(n, n, dtype=torch.float64, generator=generator)
    sigma = torch.linalg.svdvals(w @ root)
    start = time.perf_counter()
    u, v = truncate(w, decompose(w, root_of(root @ root.T)[0], rank_for(n, n, min(RATIOS)))[0])
    print(f"(c) {n} x {n} matrix, inputs of condition 1e6, {time.perf_counter() - start:.0f} s:")
    for ratio in RATIOS:
        k = rank_for(n, n, ratio)
        loss, least = ((w - u[:, :k] @ v[:k]) @ root).norm(), sigma[k:].norm()
        print(f"  {ratio:.0%}: loss {loss:.6e}, {(loss / least - 1):+.1e} relative to the least possible")


if __name__ == "__main__":
    main()
