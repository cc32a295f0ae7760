"""One model and 1, 100 and 1,000 LoRAs: loading the last of them, switching, and the forward under one of them.

Ours lie on the shelf (`Host.shelve`), PEFT's hang on the model. PEFT's loads grow with the adapters that are there, a
thousand would take it hours: beyond a hundred, ours are compared with PEFT holding a hundred, and with ourselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.bases import ALL_LINEARS, llama
from benchmarks.harness import FASTER, SHARE, Result, Took, clock, compare, rounds
from inlay.core import store
from inlay.core.host import Host
from inlay.methods import EDITS

LOADS = 9
"""The last loads, of which a row is the median."""
SWITCHES, FORWARDS = 20, 10
"""Of a round, which counts their mean."""


class Side(Protocol):
    """A model with adapters a0, a1, ..."""

    def load(self) -> Took:
        """Time to load one more from its folder."""

    def switch(self, number: int) -> None:
        """Wear another; of a single one: take it off and put it on again."""

    def logits(self) -> Tensor:
        """Of 16 tokens, (1, 16, V)."""


class Ours:
    """Adapters on the shelf."""

    def __init__(self, size: str, folder: Path):
        self.model, self.folder, self.count = llama(size), folder, 0
        self.host: Host | None = None

    def load(self) -> Took:
        import inlay

        began = clock()
        host = self.host = self.host or inlay.attach(self.model)
        store.shelve(host, self.folder, EDITS, f"a{self.count}")
        if not self.count:
            host.use("a0")  # as PEFT's first is worn at once
        self.count += 1
        return began.since()

    def switch(self, number: int) -> None:
        assert self.host is not None
        if self.count == 1:
            self.host.use()
        self.host.use(f"a{number % self.count}")

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(_ids()).logits


class Peft:
    """Adapters on the model."""

    def __init__(self, size: str, folder: Path):
        self.model, self.folder, self.count = llama(size), str(folder), 0

    def load(self) -> Took:
        from peft import PeftModel

        began = clock()
        if self.count:
            self.model.load_adapter(self.folder, f"a{self.count}")
        else:
            self.model = PeftModel.from_pretrained(self.model, self.folder, "a0")
        self.count += 1
        return began.since()

    def switch(self, number: int) -> None:
        if self.count == 1:
            self.model.base_model.disable_adapter_layers()
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.set_adapter(f"a{number % self.count}")

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(_ids()).logits


def _ids() -> Tensor:
    return torch.arange(3, 19)[None]


def donate(size: str, folder: Path) -> tuple[Path, Path]:
    """The same adapter, not a fresh one, in our format and in PEFT's."""
    import peft

    import inlay
    from inlay.interop import formats

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEARS, init_lora_weights=False)
    peft.get_peft_model(llama(size), config).save_pretrained(str(folder / "peft"))
    host = inlay.attach(llama(size))
    inlay.save(host, formats.read(host, folder / "peft", "a"), folder / "ours")
    return folder / "ours", folder / "peft"


class Many:
    """Models with each of `numbers` adapters, the first number 1; at the last number PEFT has none of its own."""

    def __init__(self, size: str, numbers: Sequence[int], turns: int, folder: Path):
        self.size, self.numbers, self.turns = size, numbers, turns
        self.kept, self.theirs = donate(size, folder)
        self.places = 7 * llama(size, device="meta").config.num_hidden_layers
        self.ours = {n: Ours(size, self.kept) for n in numbers}
        self.peers = {n: Peft(size, self.theirs) for n in numbers[:-1]}

    def results(self) -> Iterator[Result]:
        """Every row; loads come first, as they fill the models."""
        yield self._first()
        for n in self.numbers[1:]:
            yield self._last(n)
        told = self.agree()
        for what, run, times in (
            ("forward", lambda side, i: side.logits(), FORWARDS),
            ("switch", lambda side, i: side.switch(i), SWITCHES),
            ("switch, then forward", lambda side, i: (side.switch(i), side.logits()), FORWARDS),
        ):
            yield from self._worn(what, run, times, told)

    def _title(self, n: int, what: str) -> str:
        return f"{n} adapter{'s' if n > 1 else ''}, {self.places} places: {what}"

    def _first(self) -> Result:
        """A fresh model in every round, whose making is not counted."""
        took = rounds(
            {"ours": lambda: Ours(self.size, self.kept).load(), "PEFT": lambda: Peft(self.size, self.theirs).load()},
            self.turns,
        )
        self.ours[1].load(), self.peers[1].load()
        return compare(self._title(1, "load"), FASTER, ms(took["ours"]), ms(took["PEFT"]), "ms", "PEFT", "bare before")

    def _last(self, n: int) -> Result:
        """Each round loads one more: PEFT its last ones, or another model of ours its first."""
        count = min(LOADS, n - 2)
        peer: Side = self.peers.get(n) or Ours(self.size, self.kept)
        for side, there in ((self.ours[n], n - 1 - count), (peer, n - 1 - count if n in self.peers else 1)):
            for _ in range(there):
                side.load()
        took = rounds({"ours": self.ours[n].load, "peer": peer.load}, count)
        title, both = self._title(n, "last load"), (ms(took["ours"]), ms(took["peer"]))
        note = f"the last {count} loads"
        if n in self.peers:
            return compare(title, FASTER, *both, unit="ms", peer_is="PEFT", note=note)
        return compare(title, SHARE, *both, unit="ms", peer_is="its own first load", note=f"{note}; and the first")

    def agree(self) -> str:
        """How far the logits of any two are apart; RuntimeError if that is not little."""
        sides: list[Side] = [*self.peers.values(), *self.ours.values()]
        said = [side.logits() for side in sides]
        if (off := max(float((s - said[0]).abs().max() / said[0].abs().max()) for s in said)) > 1e-4:
            raise RuntimeError(f"logits are {off:.1e} apart")
        return f"logits agree to {off:.0e}"

    def _worn(self, what: str, run: Callable[[Any, int], object], times: int, told: str) -> Iterator[Result]:
        """All models take turns in one run."""
        ours = {f"ours, {n}": mean(partial(run, side), times) for n, side in self.ours.items()}
        peers = {f"PEFT, {n}": mean(partial(run, side), times) for n, side in self.peers.items()}
        took = {name: ms(t) for name, t in rounds({**ours, **peers}, self.turns).items()}
        for n in self.numbers:
            mine, held = took[f"ours, {n}"], min(n, self.numbers[-2])
            peer = "PEFT" if held == n else f"PEFT with {held}"
            note = f"{told}; off and on again" if n == 1 and what != "forward" else told
            yield compare(self._title(n, what), FASTER, mine, took[f"PEFT, {held}"], "ms", peer, note)
        yield compare(self._title(n, what), SHARE, mine, took["ours, 1"], "ms", "the same with 1", told)


def mean(run: Callable[[int], object], times: int) -> Callable[[], Took]:
    """A round that counts the mean of so many calls."""

    def turn() -> Took:
        began = clock()
        for i in range(times):
            run(i)
        took = began.since()
        return Took(took.wall / times, took.cpu / times)

    return turn


def ms(took: Sequence[Took]) -> list[float]:
    """Milliseconds by the clock."""
    return [1e3 * t.wall for t in took]
