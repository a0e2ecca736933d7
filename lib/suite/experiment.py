"""What every notebook measures of every model it makes: size, perplexity and zero-shot accuracy, as one ledger cell."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.evaluation.benchmark_tasks import files_record
from lib.evaluation.divergence import Reference, compared
from lib.evaluation.generated import greedy_text
from lib.evaluation.paired import Interval, common_ratio
from lib.evaluation.perplexity import Perplexity, perplexity
from lib.evaluation.spoken import spoken
from lib.evaluation.text import Calibration, Corpus, calibration_text, sample_blocks, spread, tokens_of, windows
from lib.evaluation.zero_shot import zero_shot as accuracies
from lib.models.checkpoint import digest, fingerprint
from lib.models.load import DTYPES, fast_bfloat16, load
from lib.papers.sliced_network import check_sliceable
from lib.primitives.cost import Count, count
from lib.primitives.surgery import cast
from lib.suite.results import Results, made_by

SIZE_COLUMNS = ("params", "removed_decoder", "removed_model")


@dataclass(frozen=True)
class Protocol:
    """How a notebook run evaluates: held-out text, window length and count, zero-shot tasks and their limit, precision.

    windows: how many, evenly spread over the text; None for all. fewer: how many of these suffice for curves and ablations, again
    evenly spread; None for as many. dtype: that of the evaluated copy; empty for the model's own; `auto` for bfloat16 where
    the device computes it fast. A model that is evaluated on all windows also reads as many of the text `second`, and continues
    the `prompt`. spoken: tasks of `lib.evaluation.spoken` for whichever model faces the others.
    """

    text: Corpus
    length: int
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    dtype: str = ""
    fewer: int | None = None
    second: Corpus | None = None
    prompt: str = ""
    spoken: tuple[str, ...] = ()

    def record(self, tasks: bool = True) -> dict:
        """What identifies an evaluation, of a model that faces the tasks or of one that does not."""
        second = {"second": self.second.record()} if self.second else {}
        found = {"dtype": self.dtype, "length": self.length, "windows": self.windows, "fewer": self.fewer} | second
        found |= {"prompt": self.prompt} if self.prompt else {}
        if tasks:
            found |= {"tasks": list(self.tasks), "limit": self.limit, "task_files": files_record(self.tasks)}
            found |= {"spoken": list(self.spoken)} if self.spoken else {}
        return self.text.record() | found


class Subject:
    """A dense model under study with its tokenizer, size and evaluation text; its measurements go to the ledger of `run`."""

    def __init__(self, name: str, protocol: Protocol, run: Results, device: str = "cpu", dtype: str = "float32"):
        self.name, self.protocol, self.run = name, protocol, run
        self.model, self.tokenizer = load(name, device, dtype)
        self.evaluated_in = evaluation_dtype(protocol.dtype, device) or self.model.dtype
        self.size: Count = count(self.model)
        self.tokens = tokens_of(protocol.text, self.tokenizer)
        self.windows = self._windows(self.tokens)
        self.second_windows = protocol.second and self._windows(tokens_of(protocol.second, self.tokenizer))
        self.fingerprint = fingerprint(self.model)

    def _windows(self, tokens: torch.Tensor) -> torch.Tensor:
        whole = windows(tokens, self.protocol.length)
        return whole[spread(len(whole), self.protocol.windows)]

    def record(self, tasks: bool = True) -> dict:
        """What identifies this subject and its evaluation in the ledger; tasks: whether models made from it face them."""
        return {
            "model": self.name,
            "weights": self.fingerprint,
            "tokens": digest([("evaluation", self.tokens)]),
            "dtype": str(self.model.dtype),
            "device": str(self.model.device),
            "evaluation": self.protocol.record(tasks) | {"evaluated_in": str(self.evaluated_in)},
        }

    def calibration(self, draw: Calibration, samples: int | None = None, seed: int | None = None) -> torch.Tensor:
        """The calibration set [samples, length] of `draw`, or one of another size or seed."""
        generator = torch.Generator().manual_seed(draw.seed if seed is None else seed)
        text = calibration_text(draw.corpus, draw.split)
        return sample_blocks(text, self.tokenizer, samples or draw.samples, draw.length, generator, draw.rule)

    def perplexity(self, model: nn.Module, full: bool = True) -> dict:
        """Perplexity of a model made from this subject, on all windows or on `Protocol.fewer` of them.

        On fewer windows it is that of the dense model on all of them times the ratio of both on these, so that all values of a
        table can be compared: windows differ more in how hard they are than models do.
        """
        chosen = self.windows if full else self.fewer_windows()
        return self._on_all(perplexity(self.in_evaluation_dtype(model), chosen.flatten(), self.protocol.length))

    def on_second(self, model: nn.Module) -> dict:
        """Perplexity on as many windows of the protocol's second text."""
        return perplexity(self.in_evaluation_dtype(model), self.second_windows.flatten(), self.protocol.length).record()

    def fewer_windows(self) -> torch.Tensor:
        """The windows [fewer, length] on which curves and ablations are evaluated."""
        return self.windows[spread(len(self.windows), self.protocol.fewer)]

    def _on_all(self, found: Perplexity) -> dict:
        """The record of a perplexity, brought from fewer windows to all of them."""
        record, count = found.record(), len(self.windows)
        if found.windows < count:
            dense = [self.dense()["perplexity"]["losses"][i] for i in spread(count, found.windows)]
            gain = (sum(found.losses) - sum(dense)) / found.tokens
            record["perplexity"] = self.baseline() * math.exp(gain)
        return record

    @functools.cached_property
    def reference(self) -> Reference:
        """The dense model on all windows, in the precision of the evaluation."""
        return Reference(self.in_evaluation_dtype(self.model), self.windows.flatten(), self.protocol.length)

    def apart(self, model: nn.Module) -> dict:
        """Perplexity and divergence from the dense model, `kl` and `same_top`, from one pass over all windows."""
        found, divergence = compared(self.in_evaluation_dtype(model), self.reference)
        return {"perplexity": found.record(), "kl": divergence.kl, "same_top": divergence.same_top}

    def in_evaluation_dtype(self, model: nn.Module) -> nn.Module:
        """The model itself, or a copy in the precision that the protocol evaluates in."""
        return model if model.dtype == self.evaluated_in else cast(copy.deepcopy(model), self.evaluated_in)

    def measure(self, model: nn.Module, zero_shot: bool = True, full: bool | None = None, apart: bool = False) -> dict:
        """Size, perplexity and, unless told otherwise, zero-shot rows of a model made from this subject.

        full: on all windows of the protocol, and not only on `Protocol.fewer`; None: if it also faces the tasks. apart: on all
        windows, with its divergence from the dense model, see `apart`.
        """
        found, tasks = count(model), self.protocol.tasks if zero_shot else ()
        scored = self.in_evaluation_dtype(model)
        measured = {
            "size": found.against(self.size) | {"bytes": found.bytes, "macs_per_token": found.macs_per_token},
            "zeros": zero_share(model),
            "zero_shot": accuracies(scored, self.tokenizer, tasks, self.protocol.limit) if tasks else [],
        } | (self.apart(scored) if apart else {"perplexity": self.perplexity(scored, zero_shot if full is None else full)})
        if tasks and self.protocol.spoken:
            measured["spoken"] = spoken(scored, self.tokenizer, self.protocol.spoken, self.protocol.limit)
        if measured["perplexity"]["windows"] == len(self.windows):
            measured |= {"second": self.on_second(scored)} if self.protocol.second else {}
            measured |= {"says": greedy_text(scored, self.tokenizer, self.protocol.prompt)} if self.protocol.prompt else {}
        return measured

    def dense(self) -> dict:
        """The baseline of every row: `measure` of the dense model, once per run."""
        return self.run.cell(lambda: self.measure(self.model), by=[perplexity], **self.record(), method="dense")

    def baseline(self) -> float:
        """Perplexity of the dense model, which others are divided by."""
        return self.dense()["perplexity"]["perplexity"]

    def ratio(self, ours: dict, other: dict | None = None) -> Interval:
        """Perplexity of one cell over that of another, or of the dense model, paired over their common windows."""
        return common_ratio(ours["perplexity"], (other or self.dense())["perplexity"])

    def times_dense(self, cell: dict) -> dict:
        """`ratio` to the dense model, as columns of a table; one window alone has no interval."""
        if len(self.windows) < 2:
            return {"times_dense": cell["perplexity"]["perplexity"] / self.baseline(), "low": None, "high": None}
        found = self.ratio(cell)
        return {"times_dense": found.estimate, "low": found.low, "high": found.high}

    def second_columns(self, cell: dict) -> dict:
        """Columns of a table on the protocol's second text, empty where the cell was not evaluated there; none without one."""
        if not self.protocol.second:
            return {}
        name, found, dense = self.protocol.second.name, cell.get("second"), self.dense()["second"]
        ratio = found and common_ratio(found, dense)
        columns = {"perplexity": found and found["perplexity"], "times_dense": ratio and ratio.estimate}
        columns |= {"low": ratio and ratio.low, "high": ratio and ratio.high}
        return {f"{name}_{column}": value for column, value in columns.items()}

    def at_levels(
        self, levels: Sequence[float], make: Callable, zero_shot: bool | Sequence[float] = True, quiet: bool = False,
        by: Sequence = (), full: bool | Sequence[float] | None = None, each: Mapping[float, dict] | None = None, **settings,
    ) -> dict[float, dict]:  # fmt: skip
        """One ledger cell per level of a sweep: {level: measured}.

        `make(missing)` yields (level, model) for the levels that the ledger lacks, so one calibration serves them all and a
        killed sweep goes on where it stopped. `settings` identify the sweep, and each[level] what else one level depends on.
        by: as in `Results.cell`; quiet: no line for each level; zero_shot, full: as in `measure`, or the levels at which
        they hold.
        """
        asked = {level: _at(level, zero_shot) for level in levels}
        whole = {level: asked[level] if full is None else _at(level, full) for level in levels}
        keys, settings = {}, made_by(settings, make)
        for level in levels:
            keys[level] = self.record(asked[level]) | settings | (each or {}).get(level, {}) | {"by": by}
            keys[level] |= {"level": level, "zero_shot": asked[level], "full": whole[level]}
        missing = [level for level in levels if self.run.missing(**keys[level])]
        found = {}
        for level, model in make(missing) if missing else ():
            measure = functools.partial(self.measure, model, asked[level], whole[level])
            found[level] = self.run.cell(measure, **keys[level])
            if not quiet:
                print(f"{self.name} at {level:.0%}: perplexity {found[level]['perplexity']['perplexity']:.2f}", flush=True)
        return {level: found[level] if level in found else self.run.remembered(**keys[level]) for level in levels}


def _at(level: float, wanted: bool | Sequence[float]) -> bool:
    """Whether something holds at a level: everywhere or nowhere, or at the levels that are wanted."""
    return wanted if isinstance(wanted, bool) else level in wanted


def evaluation_dtype(name: str, device: str) -> torch.dtype | None:
    """What `Protocol.dtype` asks for on a device, or None for the model's own. Raises ValueError for an unknown name."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else None
    if name and name not in DTYPES:
        raise ValueError(f"unknown evaluation dtype {name!r}: choose one of {', '.join(DTYPES)}, auto, or nothing")
    return DTYPES.get(name)


def sliceable(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects that SliceGPT can be a rival on; prints the reason for each of the others."""
    found = []
    for subject in subjects:
        try:
            check_sliceable(subject.model)
            found.append(subject)
        except ValueError as reason:
            print(f"{subject.name}: no SliceGPT here, because {reason}")
    return found


def zero_share(model: nn.Module) -> float:
    """Share of a model's parameters that are exactly zero: what unstructured pruning made, stored dense or not."""
    zeros, total = zip(*((int((p == 0).sum()), p.numel()) for p in model.parameters()), strict=True)
    return sum(zeros) / sum(total)


def perplexity_rows(subject: Subject, method: str, found: dict[float, dict]) -> list[dict]:
    """Rows of `perplexity.csv`: the columns that every notebook shares, then the protocol."""
    rows = []
    for ratio, cell in found.items():
        size, value = cell["size"], cell["perplexity"]
        row = {"model": subject.name, "method": method, "ratio": ratio, "perplexity": value["perplexity"]}
        row |= subject.times_dense(cell)
        row |= subject.second_columns(cell)
        row |= {name: size[name] for name in SIZE_COLUMNS} | {"zeros": cell["zeros"]}
        rows.append(row | {"text": subject.protocol.text.name} | {name: value[name] for name in ("windows", "length", "tokens")})
    return rows


def zero_shot_rows(subject: Subject, method: str, found: dict[float, dict]) -> list[dict]:
    """Rows of `zero_shot.csv`: one per ratio and task."""
    return [
        {"model": subject.name, "method": method, "ratio": ratio}
        | {name: value for name, value in score.items() if name not in ("correct", "margins")}
        | {name: cell["size"][name] for name in SIZE_COLUMNS}
        for ratio, cell in found.items()
        for score in cell["zero_shot"]
    ]


def said_rows(subject: Subject, found: dict[str, dict[float, dict]]) -> list[dict]:
    """Rows of `says.csv`: how models continue the prompt of the protocol, from {method: {ratio: cell}}, where a cell holds it."""
    return [
        {"model": subject.name, "method": method, "ratio": ratio}
        | {"times_dense": subject.times_dense(cell)["times_dense"], "says": " ".join(cell["says"].split())}
        for method, cells in found.items()
        for ratio, cell in cells.items()
        if "says" in cell
    ]


def said(row: dict) -> str:
    """A row of `says.csv` in one line."""
    return f"{row['model']}, {row['method']} {row['ratio']:.0%}, {row['times_dense']:.2f} times dense: ... {row['says']}"
