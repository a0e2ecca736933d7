"""Carry a calibration set through a model block by block, with one residual buffer in memory.

`ResidualStream` holds the hidden states of every calibration token at one depth, advances them half a block at a time
through the model's own blocks, and measures them. Nothing that it stores grows with depth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from lib.primitives.anatomy import Anatomy, whole_block
from lib.primitives.linalg import add_gram, remove_mean


@contextlib.contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Modules with their weights in memory within the `with`.

    Those of a model in memory are. A module whose weights are on disk says so by an attribute `stored` (`lib.models.streaming`):
    they are loaded, unless someone holds them already, and dropped at the end.
    """
    with contextlib.ExitStack() as held:
        for module in modules:
            if (stored := getattr(module, "stored", None)) is not None:
                held.enter_context(stored.held(module))
        yield


class _Enough(Exception):
    """Ends a forward pass that has shown what was asked of it."""


class _Recorder(nn.Module):
    """Stands for a block and notes what it is called with; the last of them ends the forward pass.

    A class of the module: one made within `enter` would be a cycle that holds the stream until Python collects garbage.
    """

    def __init__(self, block: nn.Module, first: list[torch.Tensor], seen: list[dict], blocks: int):
        super().__init__()
        self._stands_for = [block]  # in a list: not a child
        self.first, self.seen, self.blocks = first, seen, blocks

    def __getattr__(self, name: str):
        # Some versions of transformers ask a block for its kind of attention before they call it.
        return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden_states, **kwargs):
        if not self.seen:
            self.first.append(hidden_states)
        self.seen.append(kwargs)
        if len(self.seen) == self.blocks:
            raise _Enough
        return hidden_states


@torch.no_grad()
def enter(anatomy: Anatomy, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[dict]]:
    """What the model hands to its blocks: the first residual stream [batch, tokens, d] and each block's keyword arguments.

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
            anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return first[0], seen


def tables(anatomy: Anatomy) -> list[nn.Module]:
    """The embeddings that make the first residual stream."""
    return [anatomy.get(name) for name in anatomy.family.embeddings]


class ResidualStream:
    """Hidden states of a calibration set at one junction, advanced in place.

    ids: [samples, tokens]; mask: the same shape, 1 for real tokens (None: all are real). Rows of padding are carried
    along but never measured. `hidden` is the one buffer, [samples, tokens, d], in the model's dtype; with `file`, a path, it is
    mapped from a new file there. Blocks whose weights are on disk are `resident` while they run.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        batch: int = 8,
        file: str | Path | None = None,
    ):
        self.anatomy = Anatomy(model)
        check_calibration(self.anatomy, ids, mask)
        device = next(model.parameters()).device
        self.device = torch.device("cpu") if device.type == "meta" else device  # weights on disk are loaded to the CPU
        self.ids, self.mask, self.batch = ids, mask, batch
        self._unpadded_kwargs: dict[int, list[dict]] = {}
        shape = (*ids.shape, self.anatomy.width)
        if file is None:
            self.hidden = torch.empty(shape, dtype=model.dtype, device=self.device)
        else:
            self.hidden = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=model.dtype).view(shape)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Return to the first junction, the output of the embeddings."""
        with resident(*tables(self.anatomy)):
            for rows in self._slices():
                self.hidden[rows], kwargs = enter(self.anatomy, *self._batch(rows))
                if self.mask is None:
                    self._unpadded_kwargs.setdefault(rows.stop - rows.start, kwargs)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, len(self.ids), self.batch):
            yield slice(start, min(start + self.batch, len(self.ids)))

    def _batch(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids = self.ids[rows].to(self.device)
        return ids, None if self.mask is None else self.mask[rows].to(self.device)

    def _block_kwargs(self, rows: slice, block: int) -> dict:
        """Masks and positions of one batch: asked of the model again for padded batches, remembered for full ones."""
        ids, mask = self._batch(rows)
        if mask is not None:
            return enter(self.anatomy, ids, mask)[1][block]
        return self._unpadded_kwargs[len(ids)][block]

    @torch.no_grad()
    def advance(self, run: Callable, block: int, before: Callable | None = None, after: torch.Tensor | None = None) -> None:
        """Replace the stream by the one after a step (`run`, from `Anatomy.steps`) of a block.

        `before` maps each batch [b, tokens, d] as it leaves the buffer; `after` [d] is added as it comes back.
        """
        module, family = self.anatomy.blocks[block], self.anatomy.family
        with resident(module):
            for rows in self._slices():
                x = self.hidden[rows]
                out = run(module, family, x if before is None else before(x), self._block_kwargs(rows, block))
                self.hidden[rows] = out if after is None else out + after.to(out)

    def advance_block(self, block: int) -> None:
        """Replace the stream by the one after a whole block."""
        self.advance(whole_block, block)

    @torch.no_grad()
    def observe(
        self,
        block: int,
        see: dict[str, Callable[[torch.Tensor], None]],
        advance: bool = False,
        run: Callable = whole_block,
        results: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] | None = None,
    ) -> None:
        """Run a block on the stream to look inside. The stream stays where it is, or moves behind the block with `advance`.

        run: the whole block, or the half in front of which the stream stands (`Anatomy.steps`).

        see: for names of modules inside the block, what to do with the inputs [n, features] that each of them gets for the
        real tokens, batch by batch. Modules that share an input (q, k, v) need only one of them to be named. results: the same
        for inputs and outputs [n, features] together. Without `advance` the pass ends at the last of all these.
        """
        module = self.anatomy.blocks[block]
        kept: list[torch.Tensor | None] = [None]  # which rows of the present batch are real
        results = results or {}
        places = [*((name, "in") for name in see), *((name, "out") for name in results)]
        unseen: set[tuple[str, str]] = set()  # where the present batch has not come to

        def hook(place: tuple[str, str], use: Callable) -> Callable:
            def give(_, inputs, *output):
                rows = [x.flatten(0, -2) for x in (inputs[0], *output)]
                use(*(x if kept[0] is None else x[kept[0]] for x in rows))
                unseen.discard(place)
                if not unseen and not advance:
                    raise _Enough

            return give

        inside = module.get_submodule
        handles = [inside(name).register_forward_pre_hook(hook((name, "in"), use)) for name, use in see.items()]
        handles += [inside(name).register_forward_hook(hook((name, "out"), use)) for name, use in results.items()]
        try:
            with resident(module):
                for rows in self._slices():
                    kept[0] = None if self.mask is None else self.mask[rows].bool().flatten().to(self.device)
                    unseen.update(places)
                    with contextlib.suppress(_Enough):
                        output = run(module, self.anatomy.family, self.hidden[rows], self._block_kwargs(rows, block))
                        if advance:
                            self.hidden[rows] = output
        finally:
            for handle in handles:
                handle.remove()

    def batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of every batch, in the order in which `observe` hands them on, and which of their tokens are real [b, tokens]."""
        for rows in self._slices():
            real = torch.ones_like(self.ids[rows]) if self.mask is None else self.mask[rows]
            yield rows, real.bool().to(self.device)

    def tokens(self) -> Iterator[torch.Tensor]:
        """The stream's real tokens [n, d], batch by batch.

        For a family whose norm subtracts the mean, the mean is taken out: that is the stream the rotated network has.
        """
        for rows in self._slices():
            x = self.hidden[rows]
            x = x.flatten(0, 1) if self.mask is None else x[self.mask[rows].bool().to(self.device)]
            yield remove_mean(x) if self.anatomy.family.subtracts_mean else x

    @torch.no_grad()
    def gram(self, signal: Callable | None = None) -> torch.Tensor:
        """Second moment Σ xᵀx [d, d] in float64 of `tokens`, each mapped by `signal` first."""
        d = self.hidden.shape[-1]
        total = torch.zeros(d, d, dtype=torch.float64, device=self.device)
        for x in self.tokens():
            add_gram(total, x if signal is None else signal(x))
        return total


def check_length(anatomy: Anatomy, length: int) -> None:
    """Raise ValueError for calibration sequences of more tokens than the model has positions."""
    if length > anatomy.positions:
        raise ValueError(
            f"calibration sequences have {length} tokens, but the model has {anatomy.positions} positions: use shorter sequences"
        )


def check_calibration(anatomy: Anatomy, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raise ValueError, before any long work, for token ids or weights that cannot be calibrated on."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"calibration ids must be [samples, tokens] and not empty, not {tuple(ids.shape)}")
    if mask is not None and (mask.shape != ids.shape or not mask.any()):
        raise ValueError(f"the mask must have the shape of the ids, {tuple(ids.shape)}, and mark at least one real token")
    check_length(anatomy, ids.shape[1])
    if anatomy.model.training:
        raise ValueError("the model is in training mode, where dropout disturbs the statistics: call model.eval() first")
    vocabulary = anatomy.model.config.vocab_size
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        found = f"token ids from {int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{found} are outside the model's vocabulary of {vocabulary}: wrong tokenizer?")
    for name, parameter in anatomy.model.named_parameters():
        if parameter.is_meta or not parameter.numel():  # what is on disk is looked at when it is loaded
            continue
        # The extremes carry NaN and infinity on, and no mask as large as the weight is made: twenty times as fast.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(parameter.detach())):
            raise ValueError(f"weight {name} holds NaN or infinity: load or train the model again")
