"""What the frozen lower blocks say of each example, kept from one epoch to the next.

Below the lowest adapted block nothing changes while an adapter is trained: its input is computed once per example and
read back in later epochs, in which the blocks below are passed over. Exact, as nothing below draws random numbers.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.layout import Layout
from inlay.engine.example import Example
from inlay.engine.linear import forwards
from inlay.engine.memory import available

FILE = "activations.bin"


def lowest(host: Host, name: str) -> int:
    """Number of blocks below every place of an adapter (all of them, if it hangs above the last one only)."""
    spots = [s.spot for s in host.sites.values() if name in s.places]
    if any(s.role == "embed" or host.edits[name].room for s in spots):
        return 0
    return min((s.layer for s in spots if s.layer is not None), default=host.anatomy.layers)


class Cache:
    """Inputs of the lowest adapted block, by example.

    Args:
        name: the adapter that is trained.
        examples: all that may be asked for, by identity.
        where: `ram`, or the folder that holds the file (it is reused by a resumed run, whose bits it keeps).
    """

    def __init__(self, host: Host, name: str, examples: Sequence[Example], where: Path | Literal["ram"]):
        self.host, self.below = host, lowest(host, name)
        if why := refused(host, self.below):
            raise InlayError(f"activations cannot be cached: {why}")
        blocks = {s.layer: s.path for s in host.anatomy.spots if s.role == "block"}
        self.blocks: list[Any] = [host.model.get_submodule(blocks[i]) for i in range(self.below)]
        self.at: dict[int, tuple[int, int, int]] = {}
        row = 0
        for i, e in enumerate(examples):
            self.at[id(e)] = i, row, row + len(e.input_ids)
            row += len(e.input_ids)
        self.bytes = row * host.hidden * host.dtype.itemsize
        self._claim(where)
        size = row * host.hidden
        if isinstance(where, Path):
            where.mkdir(parents=True, exist_ok=True)
            data, done = str(where / FILE), str(where / f"{FILE}.done")
            self.data = torch.from_file(data, shared=True, size=size, dtype=host.dtype)
            self.done = torch.from_file(done, shared=True, size=len(self.at), dtype=torch.uint8)
        else:
            self.data = torch.empty(size, dtype=host.dtype)
            self.done = torch.zeros(len(self.at), dtype=torch.uint8)
        self.data = self.data.view(row, host.hidden)
        self._tuple = False

    def _claim(self, where: Path | Literal["ram"]) -> None:
        if isinstance(where, Path):
            folder = next(p for p in (where, *where.parents) if p.exists())
            free, what = shutil.disk_usage(folder).free, f"free at {where}"
        else:
            told = available()
            free, what = (self.bytes if told is None else told), "of memory available"
        if self.bytes > free:
            raise InlayError(f"cached activations need {self.bytes:,} bytes, {free:,} are {what}; leave the cache off")

    def has(self, rows: Sequence[Example]) -> bool:
        """Whether all of these are there."""
        return all(id(r) in self.at and bool(self.done[self.at[id(r)][0]]) for r in rows)

    @contextlib.contextmanager
    def serving(self, rows: Sequence[Example], layout: Layout) -> Iterator[None]:
        """Around one packed forward of these rows: pass over the lower blocks if all rows are there, else keep them."""
        if not all(id(r) in self.at for r in rows):
            yield
        elif self.has(rows):
            with self._skipping(self._laid_out(rows, layout)):
                yield
        else:
            handle = self.blocks[-1].register_forward_hook(lambda m, args, out: self._keep(rows, layout, out))
            try:
                yield
            finally:
                handle.remove()

    @torch.no_grad()
    def _keep(self, rows: Sequence[Example], layout: Layout, out: Any) -> None:
        self._tuple = isinstance(out, tuple)
        flat = (out[0] if self._tuple else out).detach().reshape(-1, self.host.hidden)
        for n, r in enumerate(rows):
            i, begin, end = self.at[id(r)]
            at = layout.index(n)
            self.data[begin:end] = flat[at : at + end - begin].to("cpu")
            self.done[i] = 1

    def _laid_out(self, rows: Sequence[Example], layout: Layout) -> Tensor:
        flat = torch.zeros(layout.shape[0] * layout.shape[1], self.host.hidden, dtype=self.host.dtype)
        for n, r in enumerate(rows):
            _, begin, end = self.at[id(r)]
            at = layout.index(n)
            flat[at : at + end - begin] = self.data[begin:end]
        return flat.view(*layout.shape, -1).to(self.host.device)

    def _skipping(self, hidden: Tensor) -> contextlib.AbstractContextManager[None]:
        said = (hidden,) if self._tuple else hidden

        def passed_over(*args: Any, **kwargs: Any) -> Any:
            return said

        return forwards(dict.fromkeys(self.blocks, passed_over))


def refused(host: Host, below: int) -> str:
    """Why nothing can be cached; empty if something can."""
    if not below:
        return "the adapter reaches down to the first block (or has virtual tokens); hang it higher, e.g. 'q,v@last4'"
    if share := _dropped(host.model):
        return f"the base drops activations while it trains ({share}); leave the cache off, or set that to 0"
    return ""


def _dropped(model: nn.Module) -> str:
    """What share of activations forwards drop, by a module or by a function (OPT, BLOOM, Falcon); empty for none."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    held = [(n, m.p) for n, m in model.named_modules() if isinstance(m, nn.Dropout)]
    held += [(k, v) for m in model.modules() for k, v in vars(m).items() if "dropout" in k]
    held += [(k, getattr(config, k, 0)) for k in ("hidden_dropout", "attention_dropout")]
    return next((f"{k} {v:g}" for k, v in held if isinstance(v, float) and v > 0), "")
