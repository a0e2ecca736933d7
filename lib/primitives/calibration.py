"""Carry a calibration set through a model block by block, with one residual buffer in memory.

`ResidualStream` holds the hidden states of every calibration token at one depth, advances them half a block at a time
through the model's own blocks, and measures them. Nothing that it stores grows with depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, Family, whole_block
from lib.primitives.linalg import add_gram, remove_mean

# Of a calibration set at once: enough to keep matrix products busy, and few beside the weights of a block. A batch of 4,096
# tokens is no faster, and what an FFN of three times the width of the stream computes for it is as large as a small model.
BATCH_TOKENS = 1024


@contextlib.contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of modules in memory within the `with`.

    A module whose weights are on disk has an attribute `stored` (`lib.models.disk`): they are loaded, unless they are in
    memory already, and dropped at the end. Other modules are left alone.
    """
    with contextlib.ExitStack() as held:
        for module in modules:
            if (stored := getattr(module, "stored", None)) is not None:
                held.enter_context(stored.held(module))
        yield


class _Enough(Exception):
    """Ends a forward pass once everything wanted has been seen."""


class _Recorder(nn.Module):
    """Takes the place of a block and notes what it is called with; the last recorder ends the forward pass.

    Defined outside `enter`: a class made there would be a cycle that holds the stream until Python collects garbage.
    """

    def __init__(self, block: nn.Module, first: list[torch.Tensor], seen: list[dict], blocks: int):
        super().__init__()
        self._stands_for = [block]  # in a list: not a child
        self.first, self.seen, self.blocks = first, seen, blocks

    def __getattr__(self, name: str):
        # Some versions of transformers read a block's kind of attention before they call it.
        return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden_states, **kwargs):
        if not self.seen:
            self.first.append(hidden_states)
        self.seen.append(kwargs)
        if len(self.seen) == self.blocks:
            raise _Enough
        return hidden_states


@torch.no_grad()
def enter(anatomy: Anatomy, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """What the model passes to its blocks: the first residual stream [batch, tokens, d] and each block's keyword arguments.

    The model's own forward runs with every block replaced by a recorder, so positions, rotary angles and masks are
    the library's, whatever the version; the last recorder stops the run before norm and head.
    """
    first: list[torch.Tensor] = []
    seen: list[dict] = []
    blocks, originals = anatomy.blocks, list(anatomy.blocks)
    try:
        for i, block in enumerate(originals):
            blocks[i] = _Recorder(block, first, seen, len(originals))
        with resident(*tables(anatomy)), contextlib.suppress(_Enough):
            anatomy.model(input_ids=ids, use_cache=False)
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return first[0], seen


def tables(anatomy: Anatomy) -> list[nn.Module]:
    """The embeddings that make the first residual stream."""
    return [anatomy.get(name) for name in anatomy.family.embeddings]


class Batch(NamedTuple):
    """Some sequences of a calibration set in front of a block."""

    rows: slice  # which sequences
    hidden: torch.Tensor  # [b, tokens, d], a view of the stream's buffer
    kwargs: dict  # the block's other arguments: positions, rotary angles, masks


def batch_of(length: int) -> int:
    """Sequences of `length` tokens that are read at once: at most 8, and `BATCH_TOKENS` tokens; at least one sequence."""
    return max(1, min(8, BATCH_TOKENS // length))


class ResidualStream:
    """Hidden states of a calibration set at one junction, advanced in place.

    ids: [samples, tokens], every position a real token. `hidden` is the one buffer, [samples, tokens, d], in the model's dtype.
    Blocks whose weights are on disk are `resident` while they run.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, batch: int | None = None):
        self.anatomy = Anatomy(model)
        check_calibration(self.anatomy, ids)
        device = next(model.parameters()).device
        self.device = torch.device("cpu") if device.type == "meta" else device  # weights on disk are loaded to the CPU
        self.ids, self.batch = ids, batch or batch_of(ids.shape[1])
        self._kwargs: dict[int, list[dict]] = {}  # sequences in a batch -> keyword arguments of every block
        self.hidden = torch.empty(*ids.shape, self.anatomy.width, dtype=model.dtype, device=self.device)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Return to the first junction, the output of the embeddings."""
        with resident(*tables(self.anatomy)):
            for rows in self.rows():
                self.hidden[rows], kwargs = enter(self.anatomy, self.ids[rows].to(self.device))
                self._kwargs.setdefault(rows.stop - rows.start, kwargs)

    def rows(self) -> Iterator[slice]:
        """Which sequences each batch holds; every loop over batches keeps this order."""
        for start in range(0, len(self.ids), self.batch):
            yield slice(start, min(start + self.batch, len(self.ids)))

    def inputs(self, block: int) -> Iterator[Batch]:
        """What a block is called with where the stream stands in front of it, batch by batch."""
        for rows in self.rows():
            yield Batch(rows, self.hidden[rows], self._kwargs[rows.stop - rows.start][block])

    @torch.no_grad()
    def advance(self, run: Callable, block: int, before: Callable | None = None, after: torch.Tensor | None = None) -> None:
        """Move the stream behind a step (`run`, from `Anatomy.steps`) of a block.

        `before` maps each batch [b, tokens, d] as it leaves the buffer; `after` [d] is added as it comes back.
        """
        module, family = self.anatomy.blocks[block], self.anatomy.family
        with resident(module):
            for rows, x, kwargs in self.inputs(block):
                out = run(module, family, x if before is None else before(x), kwargs)
                self.hidden[rows] = out if after is None else out + after.to(out)

    def advance_block(self, block: int) -> None:
        """Move the stream behind a whole block."""
        self.advance(whole_block, block)

    @torch.no_grad()
    def observe(
        self,
        block: int,
        see: dict[str, Callable[[torch.Tensor], None]],
        advance: bool = False,
        results: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] | None = None,
        moved: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """Run a block on the stream to look inside. The stream stays where it is, or moves behind the block with `advance`.

        see: {name of a module inside the block: function of its inputs [n, features]}, called for every batch. Of modules that
        share an input (q, k, v), one is enough. results: the same with functions of inputs and outputs [n, features].
        Without `advance` the pass ends as soon as all of these modules have run. moved: a function of each batch before and
        behind the block, [b, tokens, d], as the stream moves on.
        """
        module, results = self.anatomy.blocks[block], results or {}
        places = [*((name, "in") for name in see), *((name, "out") for name in results)]
        unseen: set[tuple[str, str]] = set()  # places that the present batch has not reached

        def hook(place: tuple[str, str], use: Callable) -> Callable:
            def give(_, inputs, *output):
                use(*(x.flatten(0, -2) for x in (inputs[0], *output)))
                unseen.discard(place)
                if not unseen and not advance:
                    raise _Enough

            return give

        # Hooks first, then the batches; without `advance` the last hook ends the pass of each.
        inside = module.get_submodule
        handles = [inside(name).register_forward_pre_hook(hook((name, "in"), use)) for name, use in see.items()]
        handles += [inside(name).register_forward_hook(hook((name, "out"), use)) for name, use in results.items()]
        try:
            with resident(module):
                for rows, x, kwargs in self.inputs(block):
                    unseen.update(places)
                    with contextlib.suppress(_Enough):
                        output = module(x, **kwargs)
                        if moved:
                            moved(x, output)
                        if advance:
                            self.hidden[rows] = output
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self) -> Iterator[torch.Tensor]:
        """The stream's tokens [n, d], batch by batch.

        For a family whose norm subtracts the mean, the mean is taken out, as in the stream of the rotated network.
        """
        for rows in self.rows():
            x = self.hidden[rows].flatten(0, 1)
            yield remove_mean(x) if self.anatomy.family.subtracts_mean else x

    @torch.no_grad()
    def gram(self, signal: Callable | None = None) -> torch.Tensor:
        """Second moment Σ xᵀx [d, d] in float64 of `tokens`, each mapped by `signal` first."""
        d = self.hidden.shape[-1]
        total = torch.zeros(d, d, dtype=torch.float64, device=self.device)
        for x in self.tokens():
            add_gram(total, x if signal is None else signal(x))
        return total


@contextlib.contextmanager
def inputs_of(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """The first argument of every call of a module within the `with`; an empty list if there is no module."""
    seen: list[torch.Tensor] = []
    hook = contextlib.nullcontext()
    if module is not None:
        hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with hook:  # torch's handles remove themselves
        yield seen


@torch.no_grad()
def run_seeing(
    run: Callable, block: nn.Module, family: Family, batch: Batch, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [b, t, d] of a step of a block, with the input [b, t, n] and the output [b, t, m] of its module `name`."""
    seen = []
    with block.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output))):
        output = run(block, family, batch.hidden, batch.kwargs)
    x, y = (part.reshape(*batch.hidden.shape[:2], -1) for part in seen)  # OPT flattens batch and tokens before its FFN
    return output, x, y


@torch.no_grad()
def inputs_on_the_way(run: Callable, block: nn.Module, family: Family, batch: Batch, name: str) -> torch.Tensor:
    """Input [b, t, n] of the module `name` of a step of a block. The step ends there: the module itself does not run."""
    seen = []

    def end(_, inputs):
        seen.append(inputs[0])
        raise _Enough

    with block.get_submodule(name).register_forward_pre_hook(end), contextlib.suppress(_Enough):
        run(block, family, batch.hidden, batch.kwargs)
    return seen[0].reshape(*batch.hidden.shape[:2], -1)  # OPT flattens batch and tokens before its FFN


def check_length(anatomy: Anatomy, length: int) -> None:
    """Raise ValueError for calibration sequences of more tokens than the model has positions."""
    if length > anatomy.positions:
        raise ValueError(
            f"calibration sequences have {length} tokens, but the model has {anatomy.positions} positions: use shorter sequences"
        )


def check_calibration(anatomy: Anatomy, ids: torch.Tensor) -> None:
    """Raise ValueError, before any long work, for token ids or weights that cannot be calibrated on."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"calibration ids must be [samples, tokens] and not empty, not {tuple(ids.shape)}")
    check_length(anatomy, ids.shape[1])
    if anatomy.model.training:
        raise ValueError("the model is in training mode, where dropout disturbs the statistics: call model.eval() first")
    vocabulary = anatomy.model.config.vocab_size
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        found = f"token ids from {int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{found} are outside the model's vocabulary of {vocabulary}: wrong tokenizer?")
    for name, parameter in anatomy.model.named_parameters():
        if parameter.is_meta or not parameter.numel():  # weights on disk are checked when they are loaded
            continue
        # NaN and infinity show in the extremes; no mask as large as the weight is made, which is twenty times as fast.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(parameter.detach())):
            raise ValueError(f"weight {name} holds NaN or infinity: load or train the model again")
