"""Batched mixtures against scikit-learn, which fits one neuron at a time: whether the answers agree, and the time of both.

    python -m benchmarks.mixtures

Agreement is measured on real scores, weight times gradient of the workshop Llama, from the same starting points: the
log-likelihood for every number of components, and the number that BIC chooses. Speed is measured on rows of 4,096 heavy-tailed
values, as wide as a Llama-3-8B neuron, on the threads that torch uses; scikit-learn fits only a few dozen of the rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from lib.evaluation.text import load_corpus, sample_blocks
from lib.models.load import load
from lib.papers.mixtures import (
    COMPONENTS,
    FLOOR,
    ITERATIONS,
    TOLERANCE,
    cells,
    clipped,
    expectation_maximisation,
    fit,
    robust,
    starts,
)
from lib.primitives.anatomy import Anatomy
from lib.primitives.losses import mean_loss

NEURONS_8B, WIDTH_8B = 32 * 14336, 4096


def real_scores(rows: int, samples: int = 8, length: int = 128) -> torch.Tensor:
    """W x gradient of the language-model loss, gate + up + down added element by element: [rows, d], neurons drawn by seed 0."""
    model, tokenizer = load("wiki-a-llama")
    generator = torch.Generator().manual_seed(0)
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, samples, length, generator)
    mean_loss(model, ids).backward()
    scores = []
    for block in Anatomy(model).blocks:
        gate, up, down = (
            p.weight.detach() * p.weight.grad for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
        )
        scores.append(gate + up + down.T)
    scores = torch.cat(scores)
    return scores[torch.randperm(len(scores), generator=generator)[:rows]]


def heavy_tailed(rows: int, values: int, seed: int = 0) -> torch.Tensor:
    """Student-t scores with 3 degrees of freedom in rows of log-normal scale."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(3, rows, values, generator=generator).square().mean(0)
    return 0.05 * torch.randn(rows, 1, generator=generator).exp() * torch.randn(rows, values, generator=generator) / chi.sqrt()


def sklearn_fits(z: torch.Tensor, same_start: bool = True, floor: float = FLOOR) -> list[tuple[float, float]]:
    """(mean log-likelihood, BIC) of one sorted row [m] for 1 to 5 components, by scikit-learn."""
    found = []
    for k in COMPONENTS:
        given = {}
        if same_start:
            weights, means, variances = (t[0].double() for t in starts(cells(z[None], binned=False), k, floor=floor))
            given = dict(weights_init=weights, means_init=means[:, None], precisions_init=1 / variances[:, None, None])
            given = {name: value.numpy() for name, value in given.items()}
        mixture = GaussianMixture(k, reg_covar=floor, tol=TOLERANCE, max_iter=ITERATIONS, random_state=0, **given)
        values = z.double()[:, None].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(values)
        found.append((mixture.score(values), mixture.bic(values)))
    return found


def agreement(x: torch.Tensor, floor: float = FLOOR) -> dict[str, torch.Tensor]:
    """By row of x: mean log-likelihoods of both, [f, 5]; chosen numbers of components of scikit-learn, ours, ours binned."""
    z = robust(x.sort(dim=1).values)
    theirs = torch.tensor([sklearn_fits(row, floor=floor) for row in z])
    data = cells(z, binned=False)
    ours = torch.stack([expectation_maximisation(data, *starts(data, k, floor=floor), floor)[3] for k in COMPONENTS], dim=1)
    return {
        "likelihood, scikit-learn": theirs[:, :, 0],
        "likelihood, ours": ours,
        "chosen, scikit-learn": theirs[:, :, 1].argmin(dim=1) + 1,
        "chosen, ours": fit(x, binned=False, floor=floor).chosen,
        "chosen, ours, binned": fit(x, floor=floor).chosen,
    }


def report_agreement(name: str, x: torch.Tensor, floor: float = FLOOR) -> None:
    found = agreement(x, floor)
    gap = found["likelihood, ours"] - found["likelihood, scikit-learn"]
    print(f"{name}, {len(x)} x {x.shape[1]}:")
    print(f"  log-likelihood per value, ours - scikit-learn: from {gap.min():.5f} to {gap.max():.5f}, median {gap.median():.5f}")
    print(
        f"  within 1e-3: {(gap.abs() < 1e-3).float().mean():.2%}; not below by more than 1e-3: {(gap > -1e-3).float().mean():.2%}"
    )
    for kind in ("chosen, ours", "chosen, ours, binned"):
        same = (found[kind] == found["chosen, scikit-learn"]).float().mean()
        print(f"  {kind}: {same:.1%} equal to scikit-learn, counts of 1 to 5 {found[kind].bincount(minlength=6)[1:].tolist()}")


def seconds_a_row(run: Callable[[], object], rows: int, repeats: int = 3) -> float:
    """The shortest of a few runs, per row."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) / rows


def report_speed(values: int, literal_rows: int = 24, rows: int = 512) -> None:
    x = heavy_tailed(rows, values)
    z = robust(x[:literal_rows].sort(dim=1).values)
    times = {
        "scikit-learn, k-means starts": seconds_a_row(lambda: [sklearn_fits(row, False) for row in z], literal_rows, 1),
        "scikit-learn, our starts": seconds_a_row(lambda: [sklearn_fits(row) for row in z], literal_rows, 1),
        "ours, every value": seconds_a_row(lambda: clipped(x[: rows // 4], binned=False), rows // 4),
        "ours, cells": seconds_a_row(lambda: clipped(x), rows),
    }
    print(f"rows of {values} values, {torch.get_num_threads()} threads (ours with sorting and clipping):")
    literal = list(times)[:2]
    for name, spent in times.items():
        line = f"  {name:30s} {1e3 * spent:8.3f} ms a row"
        if name not in literal:
            line += "; as fast as " + " and ".join(f"{times[other] / spent:.0f}" for other in literal) + " scikit-learn runs"
        print(line + (f"; Llama-3-8B: {NEURONS_8B * spent / 60:.1f} min" if values == WIDTH_8B else ""))


def main() -> None:
    report_agreement("real scores", real_scores(1000))
    # The floor is a least variance for us and a summand for scikit-learn. Where it is next to nothing, nothing differs.
    report_agreement("real scores, no floor", real_scores(200), floor=1e-9)
    report_agreement("heavy-tailed scores", heavy_tailed(48, WIDTH_8B))
    report_speed(256)
    report_speed(WIDTH_8B)


if __name__ == "__main__":
    main()
