"""The exercises of the notebooks: folded solutions are right, stored cells are empty, typical mistakes get their hint."""

import itertools
import re

import nbformat
import pytest
import torch

from lib.papers import afr
from lib.papers.mask_tuning import System, removals, tuned
from lib.primitives.linalg import remove_mean
from lib.suite.exercises import CHECKS, check
from tasks import NOTEBOOKS, papers

CHECK_CALL = re.compile(r'^check\("(.+)", (\w+)\)$')
TOYS = [paper for paper in papers() if paper != "compare"]


def all_cells(paper):
    return nbformat.read(NOTEBOOKS / f"{paper}.ipynb", as_version=4).cells


def exercise_cells(paper):
    """The cells from the heading of the exercises to the end of a notebook."""
    cells = all_cells(paper)
    start = [i for i, cell in enumerate(cells) if re.match(r"## \d+ · Exercises\n", cell.source)]
    assert len(start) == 1
    return cells[start[0] :]


def toy_cells(paper):
    """The cells of section 1, from its heading to the next one."""
    cells = all_cells(paper)
    headings = [i for i, cell in enumerate(cells) if cell.source.startswith("## ")]
    assert cells[headings[0]].source.startswith("## 1 · The method on a toy")
    return cells[headings[0] : headings[1]]


def implement_exercises(cells_of=all_cells, of=papers()):
    """(exercise, name of the function, its cell, the folded solution) of all notebooks."""
    found = []
    for paper in of:
        for cell, following in itertools.pairwise(cells_of(paper)):
            if cell.cell_type == "code" and CHECK_CALL.match((cell.source.splitlines() or [""])[-1]):
                solution = re.fullmatch(
                    r"<details><summary>Solution</summary>\n\n```python\n(.+)\n```\n\n</details>", following.source, re.DOTALL
                )
                found.append((*CHECK_CALL.match(cell.source.splitlines()[-1]).groups(), cell, solution.group(1)))
    return found


EXERCISES = [pytest.param(*exercise, id=exercise[0]) for exercise in implement_exercises()]


def said(capsys, exercise, function):
    capsys.readouterr()
    check(exercise, function)
    return capsys.readouterr().out


def solved(source, name):
    space = {"torch": torch}
    exec(source, space)
    return space[name]


@pytest.mark.parametrize("paper", papers())
def test_three_or_four_exercises_numbered_on(paper):
    cells = exercise_cells(paper)
    everything = nbformat.read(NOTEBOOKS / f"{paper}.ipynb", as_version=4).cells
    sections = [
        int(n) for cell in everything if cell.cell_type == "markdown" for n in re.findall(r"(?m)^## (\d+) · ", cell.source)
    ]
    assert sections == list(range(1, len(sections) + 1))
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    numbers = [int(n) for n in re.findall(r"(?m)^### Exercise (\d+) · ", text)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3 <= len(numbers) <= 4
    assert sum(cell.cell_type == "code" for cell in cells) >= 2
    assert text.count("<summary>What happens</summary>") + text.count("<summary>Solution</summary>") == len(numbers)
    assert text.count("<details>") == text.count("</details>") == len(numbers)


@pytest.mark.parametrize("paper", TOYS)
def test_behind_each_toy_one_line_to_fill_in_and_one_number_to_change(paper):
    """The solution is the learner's function with one line in place of the dots, and folded, as the prediction is."""
    cells = toy_cells(paper)
    ((_, name, cell, solution),) = implement_exercises(toy_cells, [paper])
    code = cell.source[cell.source.index(f"def {name}(") : cell.source.index("\n\n\ncheck(")]
    given = [line for line in re.sub(r'(?s) {4}""".*?"""\n', "", code).splitlines() if line.strip() != "..."]
    assert [line for line in solution.splitlines() if line not in given] == [solution.splitlines()[-1]]
    assert [line for line in solution.splitlines() if line in given] == given
    number = next(cell.source for cell in cells if cell.source.startswith("### Change a number\n"))
    assert number.index("redict") < number.index("<details><summary>What happens</summary>") < number.index("</details>")


@pytest.mark.parametrize("paper", TOYS)
def test_the_toy_comes_before_the_plumbing_and_its_cells_are_short(paper):
    cells = all_cells(paper)
    before = cells[: next(i for i, cell in enumerate(cells) if cell.source.startswith("## 1 · "))]
    code = [cell.source for cell in before if cell.cell_type == "code"]
    assert len(code) == 2  # the diagram and the parameters
    toy = [cell.source for cell in toy_cells(paper) if cell.cell_type == "code"]
    assert all(len(source.splitlines()) <= 25 for source in toy)
    assert not [source for source in toy if re.search(r"\brun\.|lib\.suite\.(?!exercises)|lib\.evaluation", source)]


def test_every_check_has_its_exercise():
    assert sorted(exercise for exercise, *_ in implement_exercises()) == sorted(CHECKS)


@pytest.mark.parametrize(("exercise", "name", "cell", "solution"), EXERCISES)
def test_the_folded_solution_is_right_and_short(capsys, exercise, name, cell, solution):
    assert said(capsys, exercise, solved(solution, name)) == f"{exercise}: right\n"
    assert len(solution.splitlines()) <= 16
    signature = f"def {name}("
    assert [line for line in solution.splitlines() if line.startswith(signature)] == [
        line for line in cell.source.splitlines() if line.startswith(signature)
    ]


@pytest.mark.parametrize(("exercise", "name", "cell", "solution"), EXERCISES)
def test_the_stored_cell_is_empty_runs_alone_and_says_so(capsys, exercise, name, cell, solution):
    expected = f"{exercise}: not written yet: it returned None\n"
    assert "".join(output.text for output in cell.outputs) == expected  # a kernel may send a line in parts
    capsys.readouterr()
    exec(cell.source, {})
    assert capsys.readouterr().out == expected


def axes_of(gram, k):
    return torch.linalg.eigh(gram)[1].flip(1)[:, :k]


def sliced(x, writer, reader, axes, lost):
    return axes.T @ writer, reader @ axes, lost


def share(x, k):
    energy = torch.linalg.eigvalsh(x.T @ x).flip(0)
    return energy[k:].sum() / energy.sum()


def factors(W, gram, k):
    axes = axes_of(gram, k)
    return axes, axes.T @ W


def spectrum(W, G):
    return torch.linalg.eigvalsh(W @ G @ W.T).flip(0)


def removed(Q, m, i):
    column = Q[:, i] / Q[i, i]
    return i, m - m[i] * column, Q - torch.outer(column, Q[i])


def cheapest(Q, m):
    return int((m.square() / Q.diagonal()).argmin())


def without(value, i):
    value = value.clone()
    value[i] = 0
    if value.ndim == 2:
        value[:, i] = 0
    return value


def halved(gone, wanted, steps=30, turned=False):
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if (gone(middle) < wanted) != turned else (low, middle)
    return (low + high) / 2


def solved_mask(x, W, keep):
    H = (x.T @ x) * (W @ W.T)
    return torch.linalg.solve(H[keep][:, keep], H[keep].sum(1))


def runs_clipped(*args):
    """The folded solution of "clip the tails", to be called with a wrong density."""
    source, name = next((solution, name) for exercise, name, _, solution in implement_exercises() if exercise == "clip the tails")
    return solved(source, name)(*args)


MISTAKES = [  # exercise, a wrong answer, words of the hint it must get
    ("centre the writer", lambda W: W, "this is W itself"),
    ("centre the writer", lambda W: W - W.mean(1, keepdim=True), "over the rows of W"),
    ("centre the writer", lambda W: W - W.mean(), "one mean for each column"),
    ("centre the writer", lambda W: W - W.sum(0), "not the sum"),
    ("centre the writer", lambda W: W.mean(0), r"writer has the shape \[2\], it should be \[3, 2\]"),
    ("choose the rank", lambda tail, allowed: int((tail >= allowed).sum()), "exactly `allowed` will do"),
    ("choose the rank", lambda tail, allowed: int((tail <= allowed).sum()), "counts the ranks that are good enough"),
    ("choose the rank", lambda tail, allowed: int((tail > allowed).sum()) - 1, "largest rank that loses too much"),
    ("choose the rank", lambda tail, allowed: int((tail > allowed).sum()) + 1, "one too many"),
    ("standardise the scores", lambda v: v / v.std(correction=0), "subtract it"),
    ("standardise the scores", lambda v: v - v.mean(), "divide by the standard deviation as well"),
    ("standardise the scores", lambda v: (v - v.mean()) / v.std(), "correction=0"),
    ("standardise the scores", lambda v: (v - v.mean()) / v.var(correction=0), "not by its square"),
    ("standardise the scores", lambda v: (v - v.mean()) / (v - v.mean()).abs().max(), "not by the largest"),
    ("error of a mask", lambda H, m: m @ H @ m, "the output that is left"),
    ("error of a mask", lambda H, m: ((m - 1).square() * H.diagonal()).sum(), "beside the diagonal"),
    ("error of a mask", lambda H, m: ((m - 1) @ H @ (m - 1)).sqrt(), "this is its root"),
    ("error of a mask", lambda H, m: (m - 1) @ H @ (m - 1) / 4, "already the mean"),
    ("error of a mask", lambda H, m: (H @ (m - 1)).sum(), "enters twice"),
    ("fold the norm", lambda g, s, W, b: (g[:, None] * W, b + W @ s), "scaled the rows"),
    ("fold the norm", lambda g, s, W, b: (W / g, b + W @ s), "do not divide"),
    ("fold the norm", lambda g, s, W, b: (W * g, b), "shift of the norm is missing"),
    ("fold the norm", lambda g, s, W, b: (W * g, W @ s), "own bias b is missing"),
    ("fold the norm", lambda g, s, W, b: (W * g, (W * g) @ s + b), "as it was, not through the folded one"),
    ("fold the norm", lambda g, s, W, b: (W * g, W.T @ s + b), "transposed"),
    ("fold the norm", lambda g, s, W, b: W * g, "it should return weight, bias"),
    ("slice a junction", lambda x, w, r, k: sliced(x, w, r, axes_of(-x.T @ x, k), share(x, k)), "least energy"),
    ("slice a junction", lambda x, w, r, k: sliced(x, w, r, axes_of(torch.cov(x.T), k), share(x, k)), "not the covariance"),
    ("slice a junction", lambda x, w, r, k: sliced(x, w, r, axes_of(x.T @ x, 3)[:k].T, share(x, k)), "columns of what eigh"),
    ("slice a junction", lambda x, w, r, k: (w[:k], r[:, :k], share(x, k)), "without turning"),
    ("slice a junction", lambda x, w, r, k: (w, r, share(x, k)), r"writer has the shape \[3, 2\], it should be \[2, 2\]"),
    ("slice a junction", lambda x, w, r, k: sliced(x, w, r, axes_of(x.T @ x, k), 1 - share(x, k)), "share that is kept"),
    ("slice a junction", lambda x, w, r, k: sliced(x, w, r, axes_of(x.T @ x, k), share(x, k).sqrt()), "no root"),
    ("truncate", lambda W, G, k: factors(W, W @ W.T, k), "plain SVD"),
    ("truncate", lambda W, G, k: factors(W, -W @ G @ W.T, k), "least output energy"),
    ("truncate", lambda W, G, k: factors(W, W @ G @ G @ W.T, k), "G is used twice"),
    ("truncate", lambda W, G, k: factors(W, W @ G @ W.T, k)[::-1], "U has the shape"),
    ("truncate", lambda W, G, k: factors(W, W @ W, k), "it stopped with RuntimeError"),
    ("predict the loss", lambda W, G, k: spectrum(W, G)[k:].sum() / spectrum(W, G).sum(), "take the root"),
    ("predict the loss", lambda W, G, k: spectrum(W, G)[k:].sum().sqrt(), "absolute loss"),
    ("predict the loss", lambda W, G, k: (spectrum(W, G)[:k].sum() / spectrum(W, G).sum()).sqrt(), "kept directions"),
    ("predict the loss", lambda W, G, k: spectrum(W, G).sqrt()[k:].sum() / spectrum(W, G).sqrt().sum(), "squares add up"),
    ("score the neurons", lambda a, b, c: (a + b + c.T).abs().mean(1), "simple mean"),
    ("score the neurons", lambda a, b, c: (a + b + c.T).mean(1), "absolute value of the mean is missing"),
    ("score the neurons", lambda a, b, c: (a + b + c).mean(1).abs(), "transpose it"),
    ("score the neurons", lambda a, b, c: (a + b + c.T).sum(1).abs(), "sum, not the mean"),
    ("score the neurons", lambda a, b, c: (a + b).mean(1).abs(), "scores of down are missing"),
    ("score the neurons", lambda a, b, c: (a + b + c.T).mean(0).abs(), "over the neurons"),
    ("clip the tails", lambda x, w, mu, s, share: x, "nothing was clipped"),
    ("clip the tails", lambda x, w, mu, s, share: x.clamp(-1.55, 6.2), "innermost marked score"),
    ("clip the tails", lambda x, w, mu, s, share: x.clamp(max=8.5).sort().values, "stays in its place"),
    ("clip the tails", lambda x, w, mu, s, share: x.clamp(x.sort().values[2], x.sort().values[-3]), "the density decides"),
    ("clip the tails", lambda x, w, mu, s, share: x.clamp(2.5, 8.5), "only unbroken runs"),
    ("clip the tails", lambda x, w, mu, s, share: runs_clipped(x, torch.ones(2), mu, s, share), "a factor is missing"),
    ("clip the tails", lambda x, w, mu, s, share: runs_clipped(x, w * s, mu, s, share), "a factor is missing"),
    ("tune the mask", lambda x, W, keep: torch.ones(len(keep)), "nothing is tuned"),
    ("tune the mask", lambda x, W, keep: torch.linalg.solve((x.T @ x)[keep][:, keep], (x.T @ x)[keep].sum(1)), "weights do not"),
    ("tune the mask", lambda x, W, keep: solved_mask(x, W, keep) - 1, "m - 1"),
    ("remove one neuron", lambda Q, m: removed(Q, m, int((m.square() / Q.diagonal()).argmax())), "costs most"),
    ("remove one neuron", lambda Q, m: removed(Q, m, int((1 / Q.diagonal()).argmin())), "1/Q_ii alone"),
    ("remove one neuron", lambda Q, m: removed(Q, m, int(m.abs().argmin())), "multiplier alone"),
    ("remove one neuron", lambda Q, m: (cheapest(Q, m), without(m, cheapest(Q, m)), Q), "others must make up for it"),
    (
        "remove one neuron",
        lambda Q, m: (*removed(Q, m, cheapest(Q, m))[:2], without(Q, cheapest(Q, m))),
        "striking row and column is not enough",
    ),
    ("find the front", lambda rows: [not any(p < s and q < v for p, q in rows) for s, v in rows], "equal size compete"),
    ("find the front", lambda rows: [not any(p <= s and q <= v for p, q in rows) for s, v in rows], "does not beat itself"),
    ("find the front", lambda rows: [v == min(q for _, q in rows) for _, v in rows], "only the very best"),
    ("find the front", lambda rows: [any(p <= s and q < v for p, q in rows) for s, v in rows], "rows that are beaten"),
    ("find the own ratio", lambda gone, wanted: wanted, "wanted share itself"),
    ("find the own ratio", lambda gone, wanted: (wanted - gone(0)) / (gone(1) - gone(0)), "straight line"),
    ("find the own ratio", lambda gone, wanted: halved(gone, wanted, turned=True), "upper end|lower end"),
    ("find the own ratio", lambda gone, wanted: halved(gone, wanted, steps=8), "close, but not there"),
    (
        "find the own ratio",
        lambda gone, wanted: min(torch.arange(0, 1, 1e-3).tolist(), key=lambda r: abs(gone(r) - wanted)),
        "1000",
    ),
]


@pytest.mark.parametrize(("exercise", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(capsys, exercise, wrong, hint):
    line = said(capsys, exercise, wrong)
    assert re.search(hint, line), line
    assert line.count("\n") == 1


def test_every_exercise_has_a_typical_mistake():
    assert {exercise for exercise, *_ in MISTAKES} == set(CHECKS)


@pytest.mark.parametrize("exercise", CHECKS)
def test_nonsense_is_one_line_and_never_right(capsys, exercise):
    def stops(*args):
        raise KeyError("two\nlines")

    for function in (stops, lambda *a: "words", lambda *a: torch.full((3,), float("nan")), lambda *a: ([1], [2], [3])):
        line = said(capsys, exercise, function)
        assert line.startswith(f"{exercise}: ")
        assert line.count("\n") == 1
        assert line != f"{exercise}: right\n"
    assert "it stopped with KeyError: 'two\\nlines'" in said(capsys, exercise, stops)


def test_unexpected_numbers_are_shown_beside_the_right_ones(capsys):
    line = said(capsys, "find the own ratio", lambda gone, wanted: 0.25)
    assert line == "find the own ratio: ratio should be 0.6141, not 0.25\n"


def test_a_learner_may_overwrite_the_arguments(capsys):
    def in_place(gate, up, down):
        return gate.add_(up).add_(down.T).mean(1).abs_()

    assert said(capsys, "score the neurons", in_place) == "score the neurons: right\n"


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown exercise 'fold': choose one of centre the writer, fold the norm"):
        check("fold", lambda: None)


def test_solutions_behind_the_toys_are_the_functions_of_the_library():
    solutions = {exercise: solved(solution, name) for exercise, name, _, solution in implement_exercises(toy_cells, TOYS)}
    generator = torch.Generator().manual_seed(0)
    sizes = (7,), (4, 3), (30, 5), (5, 4)
    scores, writer, x, W = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in sizes)
    assert torch.allclose(solutions["standardise the scores"](scores), afr.standardise([scores])[0])
    assert torch.allclose(solutions["centre the writer"](writer), remove_mean(writer, dim=0))
    system = System((x.T @ x) * (W @ W.T) / 30, torch.zeros(5, dtype=torch.float64), 0.0, W, x.square().mean(0))
    assert torch.allclose(solutions["error of a mask"](system.h, scores[:5]), torch.tensor(system.loss(scores[:5])).double())
    sigma = torch.tensor([9.0, 4, 2, 1])
    tail = torch.stack([sigma[k:].norm() for k in range(4)])
    for k in range(4):
        assert solutions["choose the rank"](tail, tail[k]) == k


def test_solutions_of_comp_are_the_functions_of_the_library():
    """The two exercises in the words of the notebook are `lib.papers.mask_tuning` without a ridge."""
    solutions = {exercise: solved(solution, name) for exercise, name, _, solution in implement_exercises()}
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((30, 5), (5, 4)))
    h, keep = (x.T @ x) * (W @ W.T) / 30, torch.tensor([0, 1, 4])
    system = System(h, torch.zeros(5, dtype=torch.float64), 0.0, W, x.square().mean(0))
    assert torch.allclose(solutions["tune the mask"](x, W, keep), tuned(system, keep, epsilon=1e-9), atol=1e-6)
    walk = removals(system, epsilon=1e-9)
    next(walk)
    first, m = next(walk)
    i, m_of_solution, _ = solutions["remove one neuron"](torch.linalg.inv(h), torch.ones(5, dtype=torch.float64))
    assert i == first
    assert torch.allclose(m_of_solution, m, atol=1e-6)
