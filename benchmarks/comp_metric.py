"""What COMP's sequential metric costs at the width of a real FFN, against inverting the same matrix once.

    python -m benchmarks.comp_metric [neurons ...]

The default is 11,008 neurons, a block of LLaMA-2-7B, which takes about seven minutes and 4 GB on one core. The time covers all
that is done with a block once its sums are known: scores, the removal of 20 % of the neurons one by one with all multipliers
tuned again after each, the checks of their variance, the choice and its error. It is compared with one Cholesky factorisation
and the inverse from it, in float64. Each is timed once, after a small warm-up.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch

from lib.papers.comp import Pruned, Settings, prune_system
from lib.papers.mask_tuning import System, ridge_scale

RATIO, RANK, OUTPUTS = 0.2, 512, 64


def system(n: int, seed: int = 0) -> System:
    """A made-up block: correlated neurons of log-normal strength, and a wanted output that drifts by some per cent."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, RANK, generator=generator, dtype=torch.float64) / math.sqrt(RANK)
    strength = (0.5 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
    h = (factors @ factors.T) * strength[:, None] * strength
    h.diagonal().add_(0.5 * strength.square())
    drift = 0.02 * h.diagonal() * torch.randn(n, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, OUTPUTS, generator=generator, dtype=torch.float64)
    return System(h, drift, float(drift.sum().abs()) + 1.0, weight, h.diagonal().clone())


def timed(work: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def inverse(s: System) -> torch.Tensor:
    ridged = s.h.clone()
    ridged.diagonal().add_(Settings().epsilon * ridge_scale(s.h))
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged))


def prune(s: System) -> Pruned:
    settings = Settings()
    return prune_system(s, int(RATIO * len(s.h)), settings, settings.epsilon, settings.variance_bound)


def single(s: System) -> System:
    return System(s.h.float(), s.drift.float(), s.gap, s.weight.float(), s.energy.float())


def main() -> None:
    widths = [int(n) for n in sys.argv[1:]] or [11_008]
    inverse(system(256))
    prune(system(256))
    print(f"{torch.get_num_threads()} thread(s); {RATIO:.0%} of the neurons removed one by one")
    for n in widths:
        s = system(n)
        once, _ = timed(lambda s=s: inverse(s))
        double, result = timed(lambda s=s: prune(s))
        s = single(s)
        half, other = timed(lambda s=s: prune(s))
        alike = len(set(result.keep.tolist()) & set(other.keep.tolist())) / len(result.keep)
        print(f"n = {n:,}: Cholesky and inverse {once:.2f} s; {result.removed:,} removals; {alike:.2%} kept alike")
        print(f"    float64 {double:.2f} s, {double / once:.2f}x; float32 {half:.2f} s, {half / once:.2f}x")


if __name__ == "__main__":
    main()
