"""Structured AFR (Kobayashi et al., 2025): delete the FFN neurons whose weights' effects on the loss cancel.

Every weight θ has two scores, gradient times weight: of the task's loss (SNIP) and of the summed mean singular values of the
features (ReFer). The scores S_ij of the weights i of a neuron j are averaged *with their signs*, after values in the tails
of a Gaussian mixture have been clipped, and the absolute value is taken of the mean: equation (4). SNIP and ReFer are then
standardised over all neurons of the model and added, and every block loses the same share of its neurons.

    vectors of scores -> one number per neuron -> standardise, add -> choose -> cut
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lib.papers import mixtures
from lib.primitives.anatomy import half_names
from lib.primitives.checks import COUNTS, FROM_ZERO, check_blocks, check_inplace, check_settings, choose_one
from lib.primitives.gradients import FEATURES, LOSSES, SCORES, VIEWS, Passes, each_gradient
from lib.primitives.linalg import at_least_float32
from lib.primitives.structured import ffn_widths, globally, kv_groups, remove_groups, remove_neurons, uniform

# Scores of the units of every block: [units] each.
Blocks = list[torch.Tensor]
# Numbers of outlying scores at the low and at the high end of every vector.
Runs = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Everything that the paper leaves open, with the readings of this suite as defaults; `PRESETS` has others."""

    aggregation: str = "absolute + GMM"  # see AGGREGATIONS
    vector: str = "sum3"  # how the matrices' scores become those of a neuron; see VECTORS
    accumulation: str = "per_sample"  # see ACCUMULATIONS
    scores: tuple[str, ...] = ("refer", "snip")
    loss: str = "lm_shift"  # or "last_unshifted", the released code's
    features: str = "projections"  # whose outputs ReFer decomposes; or "all", "mlp", "block"
    view: str = "flat"  # how an output becomes a matrix; or "token", "batch", "l1"
    z: str = "model"  # over what, or how, the two scores are standardised; see STANDARDS
    stage: str = "neuron"  # or "weight_signed", "weight_abs": standardise and add the scores of weights, then aggregate
    snip_power: int = 1
    batch: int = 1  # sequences per backward pass; these together are the sample of `per_sample`
    checkpointing: bool = False
    allocation: str = "uniform"  # or "global", one threshold over all blocks: the paper's future work, not its method
    protect: tuple[int, ...] = ()  # blocks that stay whole; ours
    attention: float = 0.0  # share of the key-value groups that goes as well; ours

    def __post_init__(self):
        check_settings(
            self, aggregation=AGGREGATIONS, vector=VECTORS, accumulation=ACCUMULATIONS, scores=SCORES, loss=LOSSES,
            features=FEATURES, view=VIEWS, z=STANDARDS, stage=STAGES, snip_power=(1, 2), batch=COUNTS, allocation=ALLOCATIONS,
            protect=FROM_ZERO, attention="[0, 1)",
        )  # fmt: skip
        self.passes()  # raises where no score is asked for
        if self.stage != "neuron" and (self.accumulation == "per_sample" or self.snip_power != 1 or self.z != "model"):
            raise ValueError(
                f"stage {self.stage} standardises summed weight scores: use accumulation=sum_grad, z=model and snip_power=1"
            )
        if self.protect and self.allocation != "uniform":
            raise ValueError("one threshold over all blocks cannot spare protected ones: use allocation=uniform")

    def passes(self) -> Passes:
        """The settings of the backward passes."""
        return Passes(self.scores, self.loss, self.features, self.view, self.batch, self.checkpointing)


# --- from weights to neurons: x [units, m] -> [units] ---------------------------------------------------------------------
#
# `clip()` returns the vectors with their outliers clipped, computed once and shared by the two that need it.

AGGREGATIONS: dict[str, Callable] = {
    "simple mean": lambda x, clip: x.abs().mean(1),  # equation (2)
    "absolute only": lambda x, clip: x.mean(1).abs(),
    "GMM only": lambda x, clip: clip().abs().mean(1),
    "absolute + GMM": lambda x, clip: clip().mean(1).abs(),  # equation (4), the proposal
    # Controls: is the mixture needed?
    "absolute + winsor": lambda x, clip: mixtures.winsorised(x).mean(1).abs(),  # 1 % at each end
    "absolute + trim": lambda x, clip: mixtures.trimmed_mean(x).abs(),  # 2 % at each end are left out
}
PAPER = ("simple mean", "absolute only", "GMM only", "absolute + GMM")  # Table 2
CLIPPED = ("GMM only", "absolute + GMM")  # those that need mixtures


def aggregate(x: torch.Tensor, names: Sequence[str], runs: Runs | None = None) -> dict[str, torch.Tensor]:
    """Each named aggregation of the score vectors x [parts, units, m]: [units], summed over the parts.

    runs: how many scores of each vector are outlying at either end, int64 [parts * units] each, where known; else mixtures are
    fitted to x.
    """
    parts, units, m = x.shape
    flat = x.reshape(parts * units, m)
    clip = functools.cache(lambda: mixtures.clip_runs(flat, *(runs or mixtures.runs(flat))))
    return {name: AGGREGATIONS[name](flat, clip).view(parts, units).sum(0) for name in names}


# The maps of a block's matrices, laid out as [units, weights of one matrix], readers first -> [parts, units, m]. The readers
# and the writer of an FFN neuron all connect it to the d dimensions of the stream, so they can be added entry by entry.
VECTORS: dict[str, Callable] = {
    "sum3": lambda maps: sum(maps[1:], maps[0])[None],  # m = d; the authors' code, whose extremes the paper's Figure 2 shows
    "pooled": lambda maps: torch.cat(maps, 1)[None],  # m = 3 d
    "per_matrix": lambda maps: torch.stack(maps),  # aggregate each matrix, then add
    "down_only": lambda maps: maps[-1][None],
}
# per_sample: aggregate each sequence's scores, then add up (the authors' code of 2026); sum_grad: add up the signed scores of all
# sequences, then aggregate once; one_sample: use the first sequence only (their code of 2025). Mixtures are the slow part, and
# per_sample would have them fitted for every sequence; instead they are fitted to the sums, as under sum_grad, and tell how many
# scores of a neuron are outlying at each end; each sequence's scores are clipped at these ranks. It takes the passes twice.
ACCUMULATIONS = ("per_sample", "sum_grad", "one_sample")


def each_vector(
    model: nn.Module,
    ids: torch.Tensor,
    take: Callable[[str, int, torch.Tensor], None],
    settings: Settings,
    half: str = "mlp",
    progress: Callable[[str], None] | None = None,
) -> None:
    """Call `take(score, block, x [parts, units, m])` with signed score vectors, batch by batch and block by block.

    One block's vectors are in memory at a time. Biases of the readers are left out. half `attention`: units are key-value
    groups, whose matrices differ in shape: their scores are pooled, whatever `vector` says.
    """
    names = half_names(model, half)
    place = {name: (block, i) for block, part in enumerate(names) for i, name in enumerate(part)}
    units = ffn_widths(model) if half == "mlp" else kv_groups(model)
    combine = VECTORS[settings.vector if half == "mlp" else "pooled"]
    waiting: dict[int, dict[int, torch.Tensor]] = {}

    def collect(score: str, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        block, i = place[name]
        product = at_least_float32(weight) * at_least_float32(gradient)
        if i == len(names[block]) - 1:
            product = product.T  # a unit is a set of columns of the writer
        waiting.setdefault(block, {})[i] = product.reshape(units[block], -1)
        if len(waiting[block]) == len(names[block]):
            maps = waiting.pop(block)
            take(score, block, combine([maps[i] for i in sorted(maps)]))

    each_gradient(model, ids, [name for part in names for name in part], collect, settings.passes(), progress)


def summed_vectors(
    model: nn.Module, ids: torch.Tensor, settings: Settings, half: str = "mlp", progress: Callable | None = None
) -> dict[str, Blocks]:
    """Signed scores S summed over the sequences, {score: [parts, units, m] of every block}.

    With `sum3` they hold a third of the FFN weights for each score, in float32.
    """
    totals: dict[str, list] = {score: [None] * len(half_names(model)) for score in settings.scores}

    def take(score: str, block: int, x: torch.Tensor) -> None:
        known = totals[score][block]
        totals[score][block] = x if known is None else known.add_(x)

    used = ids[:1] if settings.accumulation == "one_sample" else ids
    each_vector(model, used, take, settings, half, progress)
    return totals


def neuron_scores(
    model: nn.Module,
    ids: torch.Tensor,
    aggregations: Sequence[str] = PAPER,
    settings: Settings | None = None,
    *,
    half: str = "mlp",
    vectors: dict[str, Blocks] | None = None,
    progress: Callable | None = None,
) -> dict[str, dict[str, Blocks]]:
    """{aggregation: {score: [units] of every block}}, all from one run over the calibration set.

    ids: [samples, tokens]. vectors: those of `summed_vectors` under the same settings, if already computed; under `per_sample`
    they serve the mixtures alone. Raises ValueError for unknown aggregations, and as `lib.primitives.gradients.each_gradient`.
    """
    settings = settings or Settings()
    for name in aggregations:
        choose_one("aggregation", name, AGGREGATIONS)
    scores = settings.scores if settings.stage == "neuron" else ("afr",)
    found = {name: {score: [0.0] * len(half_names(model)) for score in scores} for name in aggregations}
    runs: dict[str, list[Runs]] = {}  # of the sums, for single sequences

    def add(score: str, block: int, x: torch.Tensor) -> None:
        for name, value in aggregate(x, aggregations, runs[score][block] if runs else None).items():
            found[name][score][block] = found[name][score][block] + value

    if settings.accumulation == "per_sample":
        if set(CLIPPED) & set(aggregations):
            vectors = vectors or summed_vectors(model, ids, settings, half, progress)
            runs = {score: [mixtures.runs(x.flatten(0, 1)) for x in blocks] for score, blocks in vectors.items()}
        vectors = None  # they are as large as a part of the weights
        each_vector(model, ids, add, settings, half, progress)
        return found
    vectors = vectors or summed_vectors(model, ids, settings, half, progress)
    vectors = STAGES[settings.stage](vectors)
    for score in list(vectors):
        for block, x in enumerate(vectors[score]):
            add(score, block, x)
    return found


# --- adding the two scores -----------------------------------------------------------------------------------------------


def standardise(values: Blocks) -> Blocks:
    """(v - mean) / std over all blocks together; zeros where all values are equal."""
    flat = torch.cat([v.flatten() for v in values]).double()
    mean, std = flat.mean().item(), flat.std(correction=0).item()
    return [(v - mean) / std if std > 0 else torch.zeros_like(v) for v in values]


def _robust(values: Blocks) -> Blocks:
    flat = torch.cat(values).double()
    low, median, high = (flat.quantile(q).item() for q in (0.25, 0.5, 0.75))
    spread = high - low
    return [(v - median) / spread if spread > 0 else torch.zeros_like(v) for v in values]


def _ranks(values: Blocks) -> Blocks:
    flat = torch.cat(values)
    ranks = flat.argsort(stable=True).argsort().to(flat) / len(flat)
    return list(ranks.split([len(v) for v in values]))


STANDARDS: dict[str, Callable[[Blocks], Blocks]] = {
    "model": standardise,  # Z of equation (1), over all neurons of the model as in the released code
    "block": lambda values: [standardise([v])[0] for v in values],
    "robust": _robust,  # median and quartiles
    "rank": _ranks,
}


def combine(parts: dict[str, Blocks], z: str = "model", snip_power: int = 1) -> Blocks:
    """The AFR score [units] of every block: the scores in `parts`, each standardised, added.

    snip_power: exponent of SNIP before it is standardised; 2 in the authors' later code.
    """
    powered = {name: [v**snip_power for v in values] if name == "snip" else values for name, values in parts.items()}
    standard = [STANDARDS[z](values) for values in powered.values()]
    return [sum(blocks[1:], blocks[0]) for blocks in zip(*standard, strict=True)]


def _added(vectors: dict[str, Blocks], magnitude: bool) -> dict[str, Blocks]:
    """Equation (1) taken by its letter: standardise the scores of the *weights* over the whole model and add them."""
    standard = [standardise([v.abs() for v in values] if magnitude else values) for values in vectors.values()]
    return {"afr": [sum(parts[1:], parts[0]) for parts in zip(*standard, strict=True)]}


STAGES: dict[str, Callable[[dict[str, Blocks]], dict[str, Blocks]]] = {
    "neuron": lambda vectors: vectors,
    "weight_signed": functools.partial(_added, magnitude=False),
    "weight_abs": functools.partial(_added, magnitude=True),
}

# --- the method ----------------------------------------------------------------------------------------------------------

ALLOCATIONS: dict[str, Callable] = {"uniform": uniform, "global": globally}
PRESETS = {
    "paper": Settings(),
    # What the authors released in October 2025: one sequence, every module a feature, no clipping.
    "code_2025_10": Settings("absolute only", accumulation="one_sample", loss="last_unshifted", features="all"),
    # What they released in February 2026: all sequences, 2 % of the scores left out at each end, SNIP squared.
    "code_2026_02": Settings("absolute + trim", accumulation="per_sample", loss="last_unshifted", snip_power=2),
}


def settings_of(preset: str = "paper", **changes) -> Settings:
    """A preset with some settings changed."""
    choose_one("preset", preset, PRESETS)
    return replace(PRESETS[preset], **changes)


def scores(
    model: nn.Module,
    ids: torch.Tensor,
    aggregations: Sequence[str] = PAPER,
    settings: Settings = Settings(),
    *,
    half: str = "mlp",
    progress: Callable | None = None,
) -> dict[str, Blocks]:
    """The AFR score of every neuron under several aggregations, {aggregation: [f] of every block}, from one scoring run.

    They serve every ratio: `lib.primitives.structured.uniform(scores, ratio)` chooses, `remove_neurons` cuts. half `attention`
    scores key-value groups instead, which the paper leaves alone.
    """
    found = neuron_scores(model, ids, aggregations, settings, half=half, progress=progress)
    return {name: combine(parts, settings.z, settings.snip_power) for name, parts in found.items()}


def scores_under(model: nn.Module, ids: torch.Tensor, wanted: Mapping[str, Settings]) -> dict[str, Blocks]:
    """The AFR score of every neuron under several settings, {name: [f] of every block}.

    Equal to `scores` for each alone; settings that differ only in what follows the backward passes share these passes.
    """
    # 1. Settings with the same backward passes go together.
    together: dict[Settings, dict[str, Settings]] = defaultdict(dict)
    for name, s in wanted.items():
        common = replace(s, aggregation=PAPER[0], scores=SCORES, z="model", stage="neuron", snip_power=1)
        common = replace(common, allocation="uniform", protect=(), attention=0.0)
        together[common][name] = s
    found = {}
    # 2. One run of the passes for each such group, with the scores that any of its members needs.
    for common, members in together.items():
        needed = replace(common, scores=tuple(dict.fromkeys(score for s in members.values() for score in s.scores)))
        if common.accumulation == "per_sample":
            every = neuron_scores(model, ids, list({s.aggregation for s in members.values()}), needed)
            parts = {name: {score: every[s.aggregation][score] for score in s.scores} for name, s in members.items()}
        else:
            vectors = summed_vectors(model, ids, needed)
            parts = {}
            for name, s in members.items():
                own = {score: vectors[score] for score in s.scores}
                parts[name] = neuron_scores(model, ids, [s.aggregation], s, vectors=own)[s.aggregation]
        found |= {name: combine(parts[name], s.z, s.snip_power) for name, s in members.items()}
    return {name: found[name] for name in wanted}


def sweep(
    model: nn.Module,
    ids: torch.Tensor,
    ratios: Sequence[float],
    settings: Settings = Settings(),
    progress: Callable | None = None,
    inplace: bool = False,
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, model without that share of its FFN neurons, chosen by Structured AFR), from one scoring run for all ratios.

    ids: calibration tokens [samples, length]; ratio: share of the neurons of every block, ρ of the paper, so the model as a
    whole loses less. The given model stays intact, unless `inplace`, which takes one ratio. The result is a stock architecture
    where all blocks are equally wide. Raises ValueError, before any long work, for ratios that leave a block without neurons.
    """
    check_inplace(inplace, ratios)
    choose = ALLOCATIONS[settings.allocation]
    if settings.protect:
        choose = functools.partial(choose, protect=settings.protect)
    plain = [torch.zeros(n) for n in ffn_widths(model)]
    check_blocks(settings.protect, len(plain))
    for ratio in ratios:
        choose(plain, ratio)  # raises now rather than after the scoring
    if settings.attention:
        choose([torch.zeros(n) for n in kv_groups(model)], settings.attention)

    def run() -> Iterator[tuple[float, nn.Module]]:
        name = settings.aggregation
        found = scores(model, ids, (name,), settings, progress=progress)[name]
        heads = scores(model, ids, (name,), settings, half="attention", progress=progress)[name] if settings.attention else None
        for ratio in ratios:
            small = remove_neurons(model, choose(found, ratio), inplace=inplace)
            yield ratio, remove_groups(small, choose(heads, settings.attention), inplace=True) if heads else small

    return run()


def prune(model: nn.Module, ids: torch.Tensor, ratio: float, **settings) -> nn.Module:
    """A model pruned at one ratio; settings: fields of `Settings`. The given model stays intact."""
    return next(sweep(model, ids, [ratio], Settings(**settings)))[1]
