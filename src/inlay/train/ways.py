"""Two ways to compute a batch: packed, the engine's, and plain, padded rows through the whole model.

Both give the same summed loss, to rounding. Packing is tried against the plain way on a few examples before a run;
where it cannot serve a model, the run says so and goes the plain way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.host import Host
from inlay.core.rounding import rounding
from inlay.engine import head, last, shared
from inlay.engine.cache import Cache
from inlay.engine.engaged import engaged
from inlay.engine.example import IGNORED, Example, unlearned
from inlay.engine.head import Read
from inlay.engine.pack import Pack, budget, pack, packs
from inlay.engine.steady import Steady
from inlay.train.batches import Batch, collate, digest
from inlay.train.settings import TrainSettings

ALIKE = 64
"""Examples that are looked at to see whether they begin alike."""


class Way(Protocol):
    """How examples become losses."""

    host: Host

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples of a step in groups, each one forward."""

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """Cross entropy of a group, summed over its learned tokens, in fp32."""

    def tokens(self, rows: Sequence[Example], read: Read | None, through: bool) -> tuple[Tensor, Tensor | None]:
        """(cross entropy, what is read) of each learned token (N,), in the order of rows and tokens, in fp32.

        Args:
            through: whether gradients reach what is read, too.
        """

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Around every forward and backward."""

    def remember(
        self, name: str, examples: Sequence[Example], where: Path | Literal["ram"], base: str = "", beside: int = 0
    ) -> str:
        """Keep what lies below the adapter from epoch to epoch; returns what to say of it.

        Args:
            where: `ram`, or a file.
            base: tells this base from others, so that no other one's file is read.
            beside: bytes that other processes of this machine will take for theirs.
        """


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a padded batch, summed over its learned tokens, in fp32."""
    return F.cross_entropy(*_learned(model, batch), reduction="sum")


def _learned(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits (N, V) in fp32, targets (N,)) of the learned tokens."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    target = batch.labels[:, 1:]
    keep = target != IGNORED
    return out.logits[:, :-1][keep].float(), target[keep]


class Plain:
    """Rows padded on the right to the longest of `micro`, logits for every column."""

    def __init__(self, host: Host, pad: int, micro: int):
        self.host, self.pad, self.micro = host, pad, micro

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Like lengths together: padding is then least."""
        rows = sorted(examples, key=lambda e: -len(e.input_ids))
        return [rows[i : i + self.micro] for i in range(0, len(rows), self.micro)]

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """One padded forward."""
        with self._prompts(rows):
            return loss_sum(self.host.model, collate(rows, self.pad, self.host.device))

    def tokens(self, rows: Sequence[Example], read: Read | None, through: bool) -> tuple[Tensor, Tensor | None]:
        """One padded forward."""
        with self._prompts(rows):
            logits, target = _learned(self.host.model, collate(rows, self.pad, self.host.device))
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, None if read is None else read(logits if through else logits.detach(), target)

    def _prompts(self, rows: Sequence[Example]) -> contextlib.AbstractContextManager[Host]:
        return self.host.prompts([unlearned(r.labels) for r in rows])

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to prepare."""
        return contextlib.nullcontext()

    def remember(
        self, name: str, examples: Sequence[Example], where: Path | Literal["ram"], base: str = "", beside: int = 0
    ) -> str:
        """Padded batches are never cached."""
        return "activations are not cached: batches are padded, not packed"


class Packed:
    """Sequences side by side, up to `budget` tokens a forward; logits where a token is learned.

    Args:
        share: compute what examples begin with once for all of a pack, wherever that is the same.
    """

    def __init__(self, host: Host, pad: int, budget: int, share: bool = True):
        self.host, self.pad, self.budget, self.share = host, pad, budget, share
        self.cache: Cache | None = None
        self.steady = Steady()
        self.narrow = True
        """Whether the last block is computed only where it is read."""

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """As few packs as fit. A step begins here: tensors may have moved since the last."""
        self.steady.clear()
        alike = shared.beginning(*_listed(examples)) if self.share else 0
        return packs(examples, self.budget, 0 if alike and shared.refused(self.host) else alike)

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """One packed forward."""
        with self._packed(rows) as made:
            return head.loss_sum(self.host, made)

    def tokens(self, rows: Sequence[Example], read: Read | None, through: bool) -> tuple[Tensor, Tensor | None]:
        """One packed forward."""
        with self._packed(rows) as made:
            return head.losses(self.host, made, read, through)

    @contextlib.contextmanager
    def _packed(self, rows: Sequence[Example]) -> Iterator[Pack]:
        one = shared.laid(self.host, *_listed(rows)) if self.share else shared.whole(*_listed(rows))
        made = pack(self.host, one.ids, one.labels, one.parents, self.pad)
        if self.cache is None:
            yield made
            return
        with self.cache.serving(rows, made.layout, one.places(made.layout, len(rows))):
            yield made

    def remember(
        self, name: str, examples: Sequence[Example], where: Path | Literal["ram"], base: str = "", beside: int = 0
    ) -> str:
        """Raises InlayError where nothing can be cached."""
        self.cache = Cache(self.host, name, examples, where, f"{base} {digest(examples)}", beside)
        told = f"the {self.cache.below} lower blocks of {self.host.anatomy.layers} run once per example"
        return f"{told}; caching that takes {self.cache.bytes:,} bytes"

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Attention within sequences, and the engine's own nodes."""
        narrow = self.narrow and (self.cache is None or self.cache.below < self.host.anatomy.layers)
        return engaged(self.host, self.steady, narrow)


def _listed(examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, labels)."""
    return [e.input_ids for e in examples], [e.labels for e in examples]


def choose(host: Host, name: str, settings: TrainSettings, pad: int, examples: Sequence[Example]) -> tuple[Way, str]:
    """The way to train `name`, and what the user should know about the choice (mostly nothing)."""
    run = settings.run
    plain = Plain(host, pad, settings.optim.micro_batch)
    if run.engine == "plain":
        return plain, ""
    packed = Packed(host, pad, run.pack_tokens or budget(host), run.share_beginnings)
    short = sorted(examples, key=lambda e: len(e.input_ids))
    twice = next((e for e in short if shared.beginning(*_listed([e, e]))), None)
    few = short[:3] + ([] if twice is None else [twice, twice])
    failed: list[str] = []
    for share, narrow in dict.fromkeys(((packed.share, True), (False, True), (packed.share, False), (False, False))):
        packed.share, packed.narrow = share, narrow
        if not (why := _refused(host, name, plain, packed, few)):
            return packed, _left_out(host, name, packed, run.share_beginnings, examples, failed)
        failed.append(why)
    return plain, f"batches are padded, not packed: {failed[-1]}"


def _left_out(
    host: Host, name: str, packed: Packed, share: bool, examples: Sequence[Example], failed: Sequence[str]
) -> str:
    """Which parts of the engine a run does without, and why; empty if it has all that it asked for.

    Args:
        share: whether shared beginnings were asked for.
        failed: why the trials before the one that served did not.
    """
    parts = []
    if share and (not packed.share or _begin_alike(examples)):
        with host.using(name):
            why = shared.refused(host, training=True) if packed.share else failed[0]
        if why:
            parts.append(f"what examples begin with is computed for each of them: {why}")
    if why := (last.refused(host) if packed.narrow else failed[0]):
        parts.append(f"the last block is computed for all tokens, not only for learned ones: {why}")
    return "; ".join(parts)


def _begin_alike(examples: Sequence[Example]) -> bool:
    """Whether some of the first examples begin with what is worth sharing."""
    rows = sorted(examples[:ALIKE], key=lambda e: list(e.input_ids))
    return any(shared.beginning(*_listed(pair)) for pair in zip(rows, rows[1:], strict=False))


@torch.no_grad()
def _refused(host: Host, name: str, plain: Plain, packed: Packed, examples: Sequence[Example]) -> str:
    """Why packing does not serve this model; empty if it does."""
    training = host.model.training
    host.model.eval()
    try:
        if why := head.refused(host):
            return why
        with host.using(name):
            want = float(plain.loss(examples))
            with packed.active():
                got = float(packed.loss(examples))
    except Exception as e:  # a decoder that nobody has seen may fail anywhere
        return f"{type(e).__name__}: {e}"
    finally:
        host.model.train(training)
    near = rounding(host.dtype) * abs(want)
    return "" if abs(got - want) <= near else f"this model's loss would change from {want:.6g} to {got:.6g}"
