"""Which method for this model, and this budget? `invoke choose`, importable.

Every method whose result keeps to the budget and runs where it should is tried on little text; the better half is tried again
on twice as much, and so on, until the intervals name one, or the text or the time is used up (successive halving: Jamieson and
Talwalkar, AISTATS 2016). Models are judged by the held-out part of the text, paired over its windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.budgets import Budget, fitting_ratio, made_within
from lib.compress import compress, usual_length
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import Calibration, load_corpus, sample_blocks, spread, tokens_of, windows
from lib.methods import GRADIENTS, METHODS, NOTHING, TEXT, check_changes, make
from lib.models.gguf_export import FileSize
from lib.models.load import known_config, load, locate
from lib.models.output import check_output
from lib.primitives.checks import choose_one
from lib.primitives.cost import count
from lib.suite.standing import BEHIND, FIRST, standings

TRANSFORMERS, LLAMA_CPP, SUITE = "transformers", "llama.cpp", "this suite"
ROUNDS = ((4, 8), (8, 16), (16, 32), (32, 64))  # sequences to calibrate on, windows to judge by
LENGTH = 512  # tokens of both, where the model's positions permit
FIRST_ROUND = 0.5  # of the time: what has not been tried by then is left out
CHEAP_FIRST = (NOTHING, TEXT, GRADIENTS)


@dataclass
class Candidate:
    """A method at the lowest ratio that keeps to the budget, and what its last round found."""

    method: str
    ratio: float
    cell: dict | None = None  # as `Subject.measure` makes it: the perplexity alone
    params: int = 0
    budget: float = 0.0  # what the result has of it
    seconds: float = 0.0


class Judge:
    """The text of a choice: calibration sequences, held-out windows, and the dense model on these."""

    def __init__(self, network: nn.Module, tokenizer, corpus: str, length: int, seed: int):
        self.network, self.tokenizer, self.length, self.seed = network, tokenizer, length, seed
        self.train = load_corpus(corpus, "train")
        self.held_out = windows(tokens_of(load_corpus(corpus, "validation"), tokenizer), length)
        if len(self.held_out) < 2:
            raise ValueError(f"the validation split of {corpus} has less than two windows of {length} tokens: give more text")
        self.corpus = corpus

    def calibration(self, samples: int) -> torch.Tensor:
        """The first `samples` sequences of one draw [samples, length], so that a later round adds to those of an earlier one."""
        generator = torch.Generator().manual_seed(self.seed)
        return sample_blocks(self.train, self.tokenizer, samples, self.length, generator)

    def cell(self, model: nn.Module, count_of: int) -> dict:
        """The perplexity of a model on so many windows, evenly spread over the held-out text."""
        chosen = self.held_out[spread(len(self.held_out), count_of)]
        return {"perplexity": perplexity(model, chosen.flatten(), self.length).record()}


def choose(
    model: str,
    budget: Budget,
    out: str | Path,
    where: str = SUITE,
    minutes: float = 20.0,
    corpus: str = "wiki-a",
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Find the method for a model and a budget, and compress the model with it into the new folder `out`.

    budget: what the result may have. where it must run: `transformers`, `llama.cpp` (as a GGUF file) or `this suite`. minutes:
    for the trials; the last compression is beside them. Returns `ranking`, a row for each method of the last round, with its
    perplexity over dense in an interval and its standing; `dropped`, those of earlier rounds; `untried`, {method: why}; and
    `winner`.

    Raises ValueError, before any trial, for a budget that no method meets, and as `lib.compress.compress` does.
    """
    choose_one("place to run", where, (TRANSFORMERS, LLAMA_CPP, SUITE))
    check_output(Path(out).expanduser(), 0)
    network, tokenizer = load(model)
    own = known_config(model).dtype or network.dtype  # of the result, whatever the trials compute in
    measure, check = budget.size_of(network, locate(model), Path(out).name, own), check_runs(where, locate(model))
    found, untried = candidates(network, budget, measure, check)
    if not found:
        raise ValueError(f"no method keeps to {budget.said(budget.most)} and runs in {where}:\n{listed(untried)}")
    judge = Judge(network, tokenizer, corpus, min(LENGTH, usual_length(model)), seed)
    ranking, dropped = Trials(judge, budget, measure, check, Clock(60 * minutes), report, untried).halve(found)
    best = ranking[0]
    text = Calibration(corpus, best["samples"], judge.length, seed)
    report(f"compressing with {best['method']} into {out}")
    saved = compress(model, out, best["method"], best["ratio"], text, within=budget)["budget"]
    if saved > budget.most:  # it computes in the model's own precision, in which data can decide otherwise
        report(f"{out} is {saved / budget.most - 1:.2%} over {budget.said(budget.most)}: ask for a little less")
    return {"ranking": ranking, "dropped": dropped, "untried": untried, "winner": best["method"]}


def listed(untried: dict[str, str]) -> str:
    """A line for each method that was not tried."""
    return "\n".join(f"  {method}: {reason}" for method, reason in untried.items())


def check_runs(where: str, folder: str) -> Callable[[nn.Module], None]:
    """What raises ValueError for a model that cannot run in a place. folder: of its tokenizer."""
    exported = FileSize(folder, "model", "float16") if where == LLAMA_CPP else None

    def check(model: nn.Module) -> None:
        if exported:
            exported(model)  # raises for what no file can hold
        if where == TRANSFORMERS and hasattr(model, "edits"):
            raise ValueError("plain transformers cannot load what it leaves")

    return check


def candidates(
    network: nn.Module, budget: Budget, measure: Callable[[nn.Module], float], check: Callable[[nn.Module], None]
) -> tuple[list[Candidate], dict[str, str]]:
    """The methods that can be tried, those that need least first, and why each of the others cannot."""
    found, untried = [], {}
    for method in sorted(METHODS.values(), key=lambda m: CHEAP_FIRST.index(m.needs)):
        settings = method.settings()
        try:
            check_changes(network, method, settings)
            ratio = fitting_ratio(method.name, network, budget, measure, settings)
            check(method.shape(network, ratio, settings))
            found.append(Candidate(method.name, ratio))
        except ValueError as reason:
            untried[method.name] = str(reason)
    return found, untried


class Clock:
    """The time of a choice, in seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


@dataclass
class Trials:
    """What every round needs: the text, what the budget counts, what must run, the time, and where lines go."""

    judge: Judge
    budget: Budget
    measure: Callable[[nn.Module], float]
    check: Callable[[nn.Module], None]
    clock: Clock
    report: Callable[[str], None]
    untried: dict[str, str]

    def halve(self, field: list[Candidate]) -> tuple[list[dict], list[dict]]:
        """Rounds over ever fewer candidates on ever more text: the ranking of the last, and the rows that fell out before."""
        ranking, dropped = [], []
        for number, (samples, judged_by) in enumerate(ROUNDS):
            if number and _expected(field, number) > self.clock.left:
                self.report(f"no time for {len(field)} methods on more text: {self.clock.left / 60:.1f} minutes are left")
                break
            dense = self.judge.cell(self.judge.network, judged_by)
            field = list(self.tried(field, number))
            if not field:
                raise ValueError(f"no method could be tried:\n{listed(self.untried)}")
            ranking = ranked(dense, field, samples, min(judged_by, len(self.judge.held_out)))
            if all(row["standing"] == BEHIND for row in ranking[1:]):
                break
            if number + 1 < len(ROUNDS):
                kept = {row["method"] for row in ranking[: -(-len(ranking) // 2)]}
                dropped = [row for row in ranking if row["method"] not in kept] + dropped
                field = [candidate for candidate in field if candidate.method in kept]
        fallen = {row["method"] for row in dropped}
        return [row for row in ranking if row["method"] not in fallen], dropped

    def tried(self, field: list[Candidate], number: int) -> Iterator[Candidate]:
        """The candidates that a round could try, each with what it found."""
        samples, judged_by = ROUNDS[number]
        ids = self.judge.calibration(samples)
        for candidate in field:
            if number == 0 and self.clock.spent > FIRST_ROUND * self.clock.seconds:
                self.untried[candidate.method] = "no time was left: give more --minutes"
                continue
            start = time.monotonic()
            try:
                small = self.made(candidate, ids)
            except ValueError as reason:  # of its data too, such as too few tokens
                self.untried[candidate.method] = str(reason)
                continue
            candidate.cell = self.judge.cell(small, judged_by)
            candidate.seconds = time.monotonic() - start
            found, left = candidate.cell["perplexity"]["perplexity"], self.clock.left / 60
            text = f"{samples} x {self.judge.length} tokens"
            self.report(f"{candidate.method} on {text}: perplexity {found:.2f}; {left:.1f} minutes left")
            yield candidate

    def made(self, candidate: Candidate, ids: torch.Tensor) -> nn.Module:
        """What a candidate makes within the budget, at a higher ratio where it needs one.

        Raises ValueError where none of a few is high enough, and for what does not run where it should.
        """
        settings, network = METHODS[candidate.method].settings(), self.judge.network

        def make_at(ratio: float) -> nn.Module:
            small = make(candidate.method, network, ids, ratio)
            self.check(small)  # the shape may depend on data: blocks can end unequally wide
            return small

        ratio, small = made_within(candidate.method, network, self.budget, self.measure, settings, candidate.ratio, make_at)
        found, most = self.measure(small), self.budget.most
        if found > most:
            budget = self.budget.said(most)
            raise ValueError(f"its blocks differ, and even at a ratio of {ratio:.2f} it is {found / most - 1:.2%} over {budget}")
        candidate.ratio, candidate.params, candidate.budget = ratio, count(small).params, found
        return small


def _expected(field: list[Candidate], number: int) -> float:
    """Seconds that a round will take, from those of the round before, in proportion to the text."""
    grown = ROUNDS[number][0] / ROUNDS[number - 1][0]
    return sum(candidate.seconds for candidate in field) * grown


def ranked(dense: dict, field: list[Candidate], samples: int, judged_by: int) -> list[dict]:
    """A row for each candidate, the lowest perplexity first."""
    known = {candidate.method: candidate for candidate in field}
    rows = []
    for row in standings(dense, {candidate.method: [candidate.cell] for candidate in field}, enough=1):
        own = known[row["method"]]
        rows.append(row | {"ratio": own.ratio, "params": own.params, "budget": own.budget, "seconds": own.seconds})
        rows[-1] |= {"samples": samples, "windows": judged_by}
    return rows


def outcome(found: dict) -> str:
    """The choice in a sentence."""
    first, *others = found["ranking"]
    level = [row["method"] for row in others if row["standing"] not in (FIRST, BEHIND)]
    relative = f"{first['relative']:.3f} times dense [{first['low']:.3f}, {first['high']:.3f}]"
    beside = f"level with it: {', '.join(level)}" if level else "no other is level with it"
    return f"{first['method']}: perplexity {relative} on {first['windows']} windows; {beside}"
