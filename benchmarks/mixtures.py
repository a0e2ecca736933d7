"""Batched mixtures against scikit-learn, which fits one neuron at a time: whether the answers agree, and the time of both.

    python -m benchmarks.mixtures [MODEL]

Agreement is measured on real scores, weight times gradient of the workshop Llama, from the same starting points: the
log-likelihood for every number of components, and the number that BIC chooses. Speed is measured on rows of 4,096 heavy-tailed
values, as wide as a Llama-3-8B neuron, on the threads that torch uses; scikit-learn fits only a few dozen of the rows.

On a real model, SmolLM2-135M if it can be had, the mixtures of all neurons and both scores are timed. What they decide, which
scores are clipped and which neurons are removed, is compared for some neurons with fits of every value in float64: those that
stop as ours do, and those that have converged.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from lib.evaluation.text import load_corpus, sample_blocks
from lib.models.load import load
from lib.papers import afr, mixtures
from lib.papers.mixtures import (
    COMPONENTS,
    FLOOR,
    ITERATIONS,
    TOLERANCE,
    cells,
    clip_runs,
    clipped,
    expectation_maximisation,
    fit,
    low_density_tails,
    robust,
    runs,
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
            weights, means, variances = (t[0] for t in starts(cells(z[None].double(), binned=False), k, floor=floor))
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


# --- all neurons of a real model ----------------------------------------------------------------------------------------


def model_scores(name: str, rows: int, samples: int = 4, length: int = 256) -> tuple[dict, dict]:
    """Signed scores of all neurons, summed over the sequences, {score: [f, d]}, and those of some neurons for every sequence,
    {score: [samples, rows, d]}, drawn by seed 0."""
    model, tokenizer = load(name)
    generator = torch.Generator().manual_seed(0)
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, samples, length, generator)
    sums, singles = {score: [] for score in afr.Settings().scores}, {score: [] for score in afr.Settings().scores}
    for one in ids:
        for score, blocks in afr.summed_vectors(model, one[None], afr.Settings()).items():
            vectors = torch.cat([block[0] for block in blocks])
            drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:rows]
            singles[score].append(vectors[drawn])
            sums[score] = sums[score].add_(vectors) if len(sums[score]) else vectors
    return sums, {score: torch.stack(values) for score, values in singles.items()}


@contextlib.contextmanager
def converged() -> Iterator[None]:
    """Within the `with`, EM stops at a ten-thousandth of the tolerance."""
    before = mixtures.TOLERANCE, mixtures.ITERATIONS
    mixtures.TOLERANCE, mixtures.ITERATIONS = 1e-4 * TOLERANCE, 30 * ITERATIONS
    try:
        yield
    finally:
        mixtures.TOLERANCE, mixtures.ITERATIONS = before


def decided(singles: dict[str, torch.Tensor], binned: bool = True) -> dict:
    """By score the mixtures and runs of the sums; and the AFR scores [rows] under both accumulations."""
    found, parts = {}, {"sum_grad": {}, "per_sample": {}}
    for score, x in singles.items():
        mixture = fit(x.sum(0), binned=binned)
        tails = low_density_tails(x.sum(0), mixture)
        found[score] = mixture, torch.stack(tails)
        parts["sum_grad"][score] = [clip_runs(x.sum(0), *tails).mean(1).abs()]
        parts["per_sample"][score] = [sum(clip_runs(one, *tails).mean(1).abs() for one in x)]
    return found | {name: afr.combine(scores)[0] for name, scores in parts.items()}


def report_decisions(singles: dict[str, torch.Tensor]) -> None:
    """What the cells decide, against every value in float64."""
    ours, wide = decided(singles), {score: x.double() for score, x in singles.items()}
    references = {"stopped as ours": decided(wide, binned=False)}
    with converged():
        references["converged"] = decided(wide, binned=False)
    for name, reference in references.items():
        print(f"  against every value in float64, {name}:")
        for score in singles:
            (mixture, tails), (other, others) = ours[score], reference[score]
            gap = mixture.log_likelihood.double() - other.log_likelihood
            print(
                f"    {score:5}: same number of components {(mixture.chosen == other.chosen).double().mean():.1%}, "
                f"same scores clipped {(tails == others).all(0).double().mean():.1%}, "
                f"log-likelihood per value {gap.median():+.5f} (median), {gap.abs().max():.5f} at most"
            )
        for accumulation in ("sum_grad", "per_sample"):
            a, b = (found[accumulation].double() for found in (ours, reference))
            ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
            overlap = []
            for ratio in (0.2, 0.5):
                gone = int(ratio * len(a))
                same = torch.isin(a.argsort()[:gone], b.argsort()[:gone]).double().mean()
                overlap.append(f"{same:.1%} of the removed at {ratio:.0%}")
            print(
                f"    AFR, {accumulation:10}: rank correlation {torch.corrcoef(ranks)[0, 1]:.5f}, {', '.join(overlap)} the same"
            )


def report_model(name: str, rows: int = 1024) -> None:
    sums, singles = model_scores(name, rows)
    print(f"{name}, {torch.get_num_threads()} threads:")
    for score, x in sums.items():
        wall, process = time.perf_counter(), time.process_time()
        runs(x)
        wall, process = time.perf_counter() - wall, time.process_time() - process
        print(f"  {score:5}: mixtures of {len(x):,} neurons x {x.shape[1]} scores take {wall:.0f} s ({process:.0f} of processor)")
    for score, x in singles.items():
        report_agreement(f"  {score}", x[:, :48].sum(0))
    report_decisions(singles)


def main(name: str = "smollm2-135m") -> None:
    try:
        report_model(name)
    except (ValueError, OSError) as error:
        print(f"{name} is left out: {error}")
    report_model("wiki-a-llama", 512)
    report_agreement("real scores", real_scores(1000))
    # The floor is a least variance for us and a summand for scikit-learn. Where it is next to nothing, nothing differs.
    report_agreement("real scores, no floor", real_scores(200), floor=1e-9)
    report_agreement("heavy-tailed scores", heavy_tailed(48, WIDTH_8B))
    report_speed(256)
    report_speed(WIDTH_8B)


if __name__ == "__main__":
    main(*sys.argv[1:])
