"""Checks of the notebooks' exercises: `check(name, function)` says in one line whether a learner's function is right.

Every check calls the function on tensors small enough to work out by hand and compares with a value found in another way:
brute force, another decomposition, plain loops. The results of typical mistakes are computed too, so that a wrong answer
gets a fitting hint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch

from lib.primitives.checks import choose_one


class Wrong(Exception):
    """The message for the learner."""


def check(name: str, function: Callable) -> None:
    """Print one line: that `function` solves the exercise `name`, or what is wrong. ValueError for an unknown name."""
    choose_one("exercise", name, CHECKS)
    try:
        CHECKS[name](function)
    except Wrong as wrong:
        print(f"{name}: {wrong}")
    else:
        print(f"{name}: right")


def answer(function: Callable, *args: object, parts: str = "") -> object:
    """The result of `function` for copies of `args`, which it may overwrite. parts: names of its results, if several."""
    try:
        found = function(*copy.deepcopy(args))
    except Exception as error:
        raise Wrong(f"it stopped with {type(error).__name__}: {' '.join(str(error).split())}") from error
    if found is None:
        raise Wrong("not written yet: it returned None")
    if parts and not (isinstance(found, tuple | list) and len(found) == len(parts.split(", "))):
        raise Wrong(f"it should return {parts}")
    return found


def match(what: str, found: object, right: torch.Tensor, mistakes: dict[str, torch.Tensor]) -> None:
    """Raise `Wrong` unless `found` equals `right`: with the hint whose value it is, or with both values."""
    try:
        found = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} should be numbers, not a {type(found).__name__}") from None
    found = shaped(what, found, *right.shape)
    for hint, value in {"": right, **mistakes}.items():
        if value.shape == found.shape and torch.allclose(found, value.double(), rtol=1e-5, atol=1e-7):
            if hint:
                raise Wrong(f"{what}: {hint}")
            return
    shown = [(10**4 * value.double()).round().div(10**4).tolist() for value in (right, found)]
    raise Wrong(f"{what} should be {shown[0]}, not {shown[1]}")


def shaped(what: str, found: object, *shape: int) -> torch.Tensor:
    """`found` in float64; raises `Wrong` unless it is a tensor of that shape."""
    if not isinstance(found, torch.Tensor):
        raise Wrong(f"{what} should be a tensor, not a {type(found).__name__}")
    if found.shape != shape:
        raise Wrong(f"{what} has the shape {list(found.shape)}, it should be {list(shape)}")
    return found.detach().double()


def matrix(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def projection(axes: torch.Tensor) -> torch.Tensor:
    """AAᵀ [d, d] of axes A [d, k]: the same for every basis and sign of what they span."""
    return axes @ axes.T


# --- SliceGPT ------------------------------------------------------------------------------------------------------------


def fold_the_norm(function: Callable) -> None:
    """Section 3.2: W' [n, d] and b' [n] with W'x + b' = W(gain · x + shift) + b. Expected: the layer on unit vectors."""
    gain, shift, bias = matrix([2, 1, 0.5], [1, 0, -1], [1, 2, 3])
    weight = matrix([1, 2, 0], [0, 1, 3], [1, 0, 1])
    zero, *images = [weight @ (gain * x + shift) + bias for x in (torch.zeros(3), *torch.eye(3))]
    right = torch.stack([image - zero for image in images], dim=1)
    folded, offset = answer(function, gain, shift, weight, bias, parts="weight, bias")
    rows = "this scaled the rows of W; the gain belongs to its inputs, the columns"
    match("weight", folded, right, {rows: weight * gain[:, None], "multiply by the gain, do not divide": weight / gain})
    mistakes = {
        "the shift of the norm is missing; it passes through W and joins the bias": bias,
        "the reader's own bias b is missing": weight @ shift,
        "the shift passes through W as it was, not through the folded one": right @ shift + bias,
        "transposed: the shift is an input of W, so W @ shift": weight.T @ shift + bias,
    }
    match("bias", offset, zero, mistakes)


def centre_the_writer(function: Callable) -> None:
    """W' [d, n], whose outputs have the mean 0 over the stream. Expected: from the outputs of W on unit vectors, one by one."""
    writer = matrix([1, 2], [0, 3], [5, 4])
    outputs = [[(writer @ unit)[i].item() for i in range(3)] for unit in torch.eye(2, dtype=torch.float64)]
    right = torch.tensor([[column[i] - sum(column) / 3 for column in outputs] for i in range(3)], dtype=torch.float64)
    mistakes = {
        "this is W itself": writer,
        "the mean is over the stream, so over the rows of W: one for each column": writer - writer.mean(1, keepdim=True),
        "one mean for each column, not one for the whole matrix": writer - writer.mean(),
        "subtract the mean, not the sum": writer - writer.sum(0),
    }
    match("writer", answer(function, writer), right, mistakes)


def slice_a_junction(function: Callable) -> None:
    """Sections 3.3, 3.4: writer [k, n], reader [m, k] and the lost share of energy. Expected: from the SVD of X, not of XᵀX."""
    x, k = matrix([3, 1, 0], [2, -1, 1], [4, 0, -1], [1, 2, 1]), 2
    writer, reader = matrix([1, 0], [2, 1], [0, 3]), matrix([1, 1, 0], [0, 2, 1])
    _, sigma, axes = torch.linalg.svd(x)
    new_writer, new_reader, lost = answer(function, x, writer, reader, k, parts="writer, reader, lost")
    new_writer, new_reader = shaped("writer", new_writer, k, 2), shaped("reader", new_reader, 2, k)
    centred = torch.linalg.svd(x - x.mean(0))[2]
    vectors = torch.linalg.eigh(x.T @ x)[1].flip(1)
    mistakes = {
        "these are the axes of least energy; eigh sorts upwards": projection(axes[-k:].T),
        "nothing is subtracted first: XᵀX, not the covariance": projection(centred[:k].T),
        "eigenvectors are the columns of what eigh returns, not its rows": projection(vectors[:k].T),
        "coordinates were deleted without turning to the principal axes": torch.diag(matrix([1, 1, 0])[0]),
    }
    mistakes = {hint: reader @ wrong @ writer for hint, wrong in mistakes.items()}
    match("reader @ writer", new_reader @ new_writer, reader @ projection(axes[:k].T) @ writer, mistakes)
    energy = sigma.square()
    right = energy[k:].sum() / energy.sum()
    mistakes = {
        "this is the share that is kept": 1 - right,
        "energy is squared: no root": right.sqrt(),
        "this is the energy itself; divide by all of it": energy[k:].sum(),
        "singular values are not energies: square them": sigma[k:].sum() / sigma.sum(),
    }
    match("lost", lost, right, mistakes)


# --- SVD-LLM -------------------------------------------------------------------------------------------------------------

WEIGHT = matrix([2, 1, 0, 1], [0, 1, 3, 0], [1, 0, 1, 2])
INPUTS = matrix([4, 1, 0, 2, 3], [0, 1, 1, 0, 1], [0.1, 0, 0.2, 0, 0.1], [3, 0, 1, 2, 2])  # a token in each column


def truncate(function: Callable) -> None:
    """Theorem 3.2: factors [m, k], [k, n] of the best rank-k matrix for inputs of G = XXᵀ. Expected: from the SVD of WX."""
    gram, k = INPUTS @ INPUTS.T, 2
    left, right = answer(function, WEIGHT, gram, k, parts="U, V")
    left, right = shaped("U", left, 3, k), shaped("V", right, k, 4)
    axes = {name: torch.linalg.svd(m)[0] for name, m in (("WX", WEIGHT @ INPUTS), ("W", WEIGHT), ("WG", WEIGHT @ gram))}
    mistakes = {
        "this is plain SVD: the inputs do not enter": axes["W"][:, :k],
        "these are the directions of least output energy; eigh sorts upwards": axes["WX"][:, -k:],
        "G is used twice: W G Wᵀ, or the SVD of W times a root of G": axes["WG"][:, :k],
    }
    mistakes = {hint: projection(wrong) @ WEIGHT for hint, wrong in mistakes.items()}
    match("U @ V", left @ right, projection(axes["WX"][:, :k]) @ WEIGHT, mistakes)


def predict_the_loss(function: Callable) -> None:
    """Corollary of Theorem 3.2: ‖(W - W')X‖ / ‖WX‖ at rank k. Expected: by truncating and measuring."""
    gram, k = INPUTS @ INPUTS.T, 1
    axes, sigma, _ = torch.linalg.svd(WEIGHT @ INPUTS)
    cut = projection(axes[:, :k]) @ WEIGHT
    right, plain = ((WEIGHT - cut) @ INPUTS).norm() / (WEIGHT @ INPUTS).norm(), torch.linalg.svdvals(WEIGHT).square()
    mistakes = {
        "this is its square: the loss is a norm, so take the root": right.square(),
        "this is the absolute loss; divide by the norm of all outputs": right * sigma.norm(),
        "this is what the kept directions hold": (1 - right.square()).sqrt(),
        "squares add up, not the singular values themselves": sigma[k:].sum() / sigma.sum(),
        "this is the loss of W alone: the inputs do not enter": (plain[k:].sum() / plain.sum()).sqrt(),
    }
    match("loss", answer(function, WEIGHT, gram, k), right, mistakes)


def choose_the_rank(function: Callable) -> None:
    """The smallest rank of a loss at most `allowed`, from the loss at ranks 0 to n - 1. Expected: written down by hand."""
    tail, cases = matrix([13, 5, 3])[0], {4.0: 2, 5.0: 1, 13.5: 0, 2.0: 3}
    found = [answer(function, tail, allowed) for allowed in cases]
    right = torch.tensor(list(cases.values()), dtype=torch.float64)
    mistakes = {
        "a loss of exactly `allowed` will do": torch.tensor([2, 2, 0, 3]),
        "this counts the ranks that are good enough; the smallest of them is the number of those that are not": 3 - right,
        "this is the largest rank that loses too much, one less than the rank": right - 1,
        "one too many: `tail[k]` is the loss at rank k, and k begins at 0": right + 1,
    }
    match(f"for the losses {tail.tolist()} and allowed = {list(cases)}, the rank", found, right, mistakes)


# --- Structured AFR ------------------------------------------------------------------------------------------------------


def score_the_neurons(function: Callable) -> None:
    """Equation (4) without clipping: |mean over i of S_ij| [n], S the sum of three matrices' scores. Expected: by loops."""
    gate, up = matrix([1, -2, 3], [2, 2, 1], [0, -1, -4]), matrix([2, 0, -1], [-1, 3, 1], [-2, 1, -1])
    down = matrix([1, 0, 2], [-3, 1, 0], [1, 1, -2])
    found = answer(function, gate, up, down)
    signed = [sum((gate[j, i] + up[j, i] + down[i, j]).item() for i in range(3)) / 3 for j in range(3)]
    s = gate + up + down.T
    mistakes = {
        "the absolute value was taken before the mean; this is the simple mean": s.abs().mean(1),
        "the absolute value of the mean is missing": s.mean(1),
        "a neuron is a column of down, so transpose it": (gate + up + down).mean(1).abs(),
        "this is the sum, not the mean": s.sum(1).abs(),
        "the scores of down are missing": (gate + up).mean(1).abs(),
        "this averages over the neurons; average over the stream's dimensions": s.mean(0).abs(),
        "add up the matrices first, then take one absolute value": sum(part.mean(1).abs() for part in (gate, up, down.T)),
    }
    match("scores", found, matrix(signed)[0].abs(), mistakes)


def standardise_the_scores(function: Callable) -> None:
    """(v - mean) / std over all neurons [n]. Expected: by loops."""
    scores = matrix([3, 7, 1, 5, 14])[0]
    mean = sum(scores.tolist()) / 5
    size = math.sqrt(sum((value - mean) ** 2 for value in scores.tolist()) / 5)
    right = torch.tensor([(value - mean) / size for value in scores.tolist()], dtype=torch.float64)
    mistakes = {
        "the mean is still there: subtract it": scores / size,
        "divide by the standard deviation as well": scores - mean,
        "torch divides by n - 1 unless it is told not to: correction=0": right * math.sqrt(4 / 5),
        "divide by the standard deviation, not by its square": (scores - mean) / size**2,
        "divide by the standard deviation, not by the largest": (scores - mean) / (scores - mean).abs().max(),
    }
    match("scores", answer(function, scores), right, mistakes)


def clip_the_tails(function: Callable) -> None:
    """The clip of section 4 for one neuron: scores x [m] -> [m]. Expected: written down by hand."""
    x = matrix([0.1, -0.2, 5.8, 13, 0.3, 2.5, 8.5, 11, -4, 6.2, 0, -1.55])[0]
    weights, means, stds = matrix([0.8, 0.2], [0, 6], [0.5, 1])
    right = x.clamp(max=8.5)  # the five least dense: 13, 11, -4, 2.5, 8.5; the runs are (-4) and (8.5, 11, 13), 2.5 is inside
    ordered = x.sort().values
    mistakes = {
        "nothing was clipped; a run starts at the end and goes on while scores are marked": x,
        "clip to the innermost marked score, not to the first one that is not marked": x.clamp(-1.55, 6.2),
        "these are the marks of another density: Σ weight/std · exp(-z²/2), and a factor is missing": x.clamp(-1.55, 11),
        "every score stays in its place; this one is sorted": right.sort().values,
        "this clips equally many at both ends; the density decides": x.clamp(ordered[2], ordered[-3]),
        "only unbroken runs from an end are clipped; 2.5 is marked too, but lies in the middle": x.clamp(2.5, 8.5),
    }
    match("scores", answer(function, x, weights, means, stds, 0.42), right, mistakes)


# --- COMP ----------------------------------------------------------------------------------------------------------------


def error_of_a_mask(function: Callable) -> None:
    """Squared error per token of multipliers m. Expected: from the outputs, token by token, without H."""
    x, w = matrix([1, 2, 0], [0, 1, 1], [2, 1, 1], [1, -1, 1]), matrix([1, 2], [2, 1], [0, 1])
    h, m = (x.T @ x) * (w @ w.T) / 4, matrix([1.5, 0, 2])[0]
    errors = [sum((m[i] - 1) * x[token, i] * w[i] for i in range(3)).square().sum() for token in range(4)]
    right, change = sum(errors) / 4, m - 1
    mistakes = {
        "this is the energy of the output that is left; the error is in m - 1": m @ h @ m,
        "the neurons are not independent: what is beside the diagonal of H counts, too": (change.square() * h.diagonal()).sum(),
        "this is its root": right.sqrt(),
        "H is already the mean over the tokens": right / 4,
        "the change enters twice: m - 1 from both sides": (h @ change).sum(),
    }
    match("error", answer(function, h, m), right, mistakes)


def tune_the_mask(function: Callable) -> None:
    """Multipliers [s] of kept neurons, least squares. Expected: regression on the columns vec(x_i w_iᵀ), without H."""
    x, w = matrix([1, 2, 0], [0, 1, 1], [2, 1, 1], [1, -1, 1]), matrix([1, 2], [2, 1], [0, 1])
    keep = torch.tensor([0, 2])
    columns = torch.stack([torch.outer(x[:, i], w[i]).flatten() for i in keep], 1)
    right = torch.linalg.lstsq(columns, (x @ w).flatten()).solution
    g, v = x.T @ x, w @ w.T
    mistakes = {
        "nothing is tuned: all multipliers are 1": torch.ones(2),
        "the weights do not enter: H = XᵀX ∘ WWᵀ": torch.linalg.solve(g[keep][:, keep], g[keep].sum(1)),
        "the activations do not enter: H = XᵀX ∘ WWᵀ": torch.linalg.solve(v[keep][:, keep], v[keep].sum(1)),
        "this is m - 1, the change that makes up for the deleted neuron; add 1": right - 1,
    }
    match("multipliers", answer(function, x, w, keep), right, mistakes)


def remove_one_neuron(function: Callable) -> None:
    """One step of C1 in sequence: (i, m' [n], Q' [n, n]). Expected: every neuron left out in turn and the rest solved anew."""
    h, m = matrix([1, 1, 1, 0], [1, 6, 1, 0], [1, 1, 4, 1], [0, 0, 1, 2]), matrix([2.5, 1, 1.1, 4])[0]
    q, g, rest = torch.linalg.inv(h), h @ m, []
    for i in range(4):
        stay = torch.arange(4) != i
        rest.append(torch.zeros(4, 4, dtype=torch.float64))
        rest[i][torch.outer(stay, stay)] = torch.linalg.inv(h[stay][:, stay]).flatten()
    best = max(range(4), key=lambda i: g @ rest[i] @ g)  # the output energy that the others can still explain
    gone, multipliers, updated = answer(function, q, m, parts="i, m, Q")
    mistakes = {
        "this one costs most; the cheapest goes": (m.square() / q.diagonal()).argmax(),
        "1/Q_ii alone ranks as if all multipliers were 1; the cost is m_i²/Q_ii": q.diagonal().argmax(),
        "the multiplier alone does not show how well the others can compensate; the cost is m_i²/Q_ii": m.abs().argmin(),
    }
    match("i", gone, torch.tensor(float(best)), mistakes)
    masked = m.clone()
    masked[best] = 0
    match("m", multipliers, rest[best] @ g, {"the others must make up for it: m - m_i Q_:i / Q_ii": masked, "unchanged": m})
    struck = q.clone()
    struck[best], struck[:, best] = 0, 0
    match("Q", updated, rest[best], {"striking row and column is not enough: Q - Q_:i Q_i: / Q_ii": struck, "unchanged": q})


# --- compare -------------------------------------------------------------------------------------------------------------


def find_the_front(function: Callable) -> None:
    """Which of (parameters, perplexity) no other row beats. Expected: written down by hand."""
    rows = [(10, 5.0), (8, 6.0), (8, 5.5), (6, 9.0), (7, 9.5), (4, 12.0), (10, 5.2)]
    mistakes = {
        "rows of equal size compete too: at most as many parameters": [1, 1, 1, 1, 0, 1, 1],
        "a row does not beat itself: strictly lower perplexity": [0] * 7,
        "only the very best is left; a row is beaten only by one that is no larger": [1, 0, 0, 0, 0, 0, 0],
        "these are the rows that are beaten": [0, 1, 0, 0, 1, 0, 1],
    }
    right = torch.tensor([True, False, True, True, False, True, False])
    match("front", answer(function, rows), right, {hint: torch.tensor(value) for hint, value in mistakes.items()})


def find_the_own_ratio(function: Callable) -> None:
    """The ratio in [0, 1] at which the share `wanted` is gone, by bisection. Expected: the root of a known curve."""
    asked = []

    def gone(ratio: float) -> float:
        asked.append(ratio)
        return ratio * ratio + 0.2 * ratio - 0.1  # negative at first: the model grows, as with SliceGPT's shortcuts

    ratio, right = answer(function, gone, 0.4), (math.sqrt(2.04) - 0.2) / 2
    if len(asked) > 100:
        raise Wrong(f"it counted {len(asked)} sizes; each count takes a model, and 30 halvings are enough")
    mistakes = {
        "this is the wanted share itself, not the ratio at which it is gone": 0.4,
        "this is a straight line between the ends; go on in the half that holds the answer": 0.5 / 1.2,
        "this is the lower end: where too little is gone, the ratio must rise": 0.0,
        "this is the upper end: where too much is gone, the ratio must fall": 1.0,
    }
    if isinstance(ratio, float) and 1e-6 < abs(ratio - right) < 0.05:
        raise Wrong("close, but not there: halve the interval 30 times")
    match("ratio", ratio, torch.tensor(right), {hint: torch.tensor(value) for hint, value in mistakes.items()})


CHECKS: dict[str, Callable[[Callable], None]] = {
    "centre the writer": centre_the_writer,
    "fold the norm": fold_the_norm,
    "slice a junction": slice_a_junction,
    "choose the rank": choose_the_rank,
    "truncate": truncate,
    "predict the loss": predict_the_loss,
    "standardise the scores": standardise_the_scores,
    "score the neurons": score_the_neurons,
    "clip the tails": clip_the_tails,
    "error of a mask": error_of_a_mask,
    "tune the mask": tune_the_mask,
    "remove one neuron": remove_one_neuron,
    "find the front": find_the_front,
    "find the own ratio": find_the_own_ratio,
}
