"""What the frozen lower blocks say of each example, kept from one epoch to the next.

Below the lowest adapted block nothing changes while an adapter is trained: its input is computed once per example and
read back in later epochs, in which the blocks below are passed over. Exact, as nothing below draws random numbers.

A cache on disk is three files: the numbers, a checksum of each example's, and whose they are. It is used again by a
process that asks for the same thing, and made anew for any other. Each process of a run has its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.config import text_config
from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.core.host import Host
from inlay.core.layout import Layout
from inlay.engine.example import Example
from inlay.engine.linear import forwards
from inlay.engine.memory import available

FILE = "activations.bin"
DRAWN = ("dropout", "layerdrop", "jitter")
"""In the names of what modules draw random numbers for."""


def file(folder: Path, rank: int = 0, size: int = 1) -> Path:
    """Where a process of `size` keeps its numbers."""
    return folder / (FILE if size == 1 else f"activations-{rank}-of-{size}.bin")


def files(folder: Path) -> list[Path]:
    """All that caches have left in a folder."""
    return sorted(p for kind in ("activations.bin*", "activations-*-of-*.bin*") for p in folder.glob(kind))


def needed(host: Host, examples: Sequence[Example]) -> int:
    """Bytes that these take."""
    return sum(len(e.input_ids) for e in examples) * host.hidden * host.dtype.itemsize


def lowest(host: Host, name: str) -> int:
    """Number of blocks below every place of an adapter (all of them, if it hangs above the last one only)."""
    spots = [s.spot for s in host.sites.values() if name in s.places]
    if any(s.role == "embed" or s.tower or s.layer is None and s.linear for s in spots) or host.edits[name].room:
        return 0
    return min((s.layer for s in spots if s.layer is not None), default=host.anatomy.layers)


class Cache:
    """Inputs of the lowest adapted block, by example.

    Args:
        name: the adapter that is trained.
        examples: all that may be asked for, by identity.
        where: `ram`, or the file (it is reused by a resumed run, whose bits it keeps).
        about: what the numbers depend on besides this adapter's height: base and examples.
        beside: bytes that other processes will take from the same memory or disk.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        examples: Sequence[Example],
        where: Path | Literal["ram"],
        about: str = "",
        beside: int = 0,
    ):
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
        self.bytes = needed(host, examples)
        _claim(self.bytes, beside, where)
        self.file = isinstance(where, Path)
        self.known: set[int] = set()
        """Examples whose numbers this process has written, or read and found whole."""
        if isinstance(where, Path):
            mine = [about, where.name, self.below, row, host.hidden, str(host.dtype)]
            self.data, self.sums = _opened(where, json.dumps(mine), row * host.hidden, len(examples) + 1, host.dtype)
        else:
            self.data = torch.empty(row * host.hidden, dtype=host.dtype)
            self.sums = torch.zeros(len(examples) + 1, dtype=torch.int64)
        self.data = self.data.view(row, host.hidden)

    def has(self, rows: Sequence[Example]) -> bool:
        """Whether all of these are there."""
        return all(id(r) in self.at and self._whole(*self.at[id(r)]) for r in rows)

    def _whole(self, i: int, begin: int, end: int) -> bool:
        """Whether an example's numbers are there: what was on its way to disk when a machine went down may not be."""
        if i not in self.known and self.sums[i] and int(self.sums[i]) == _sum(self.data[begin:end]):
            self.known.add(i)
        return i in self.known

    @contextlib.contextmanager
    def serving(self, rows: Sequence[Example], layout: Layout, places: Sequence[Tensor]) -> Iterator[None]:
        """Around one packed forward of these rows: pass over the lower blocks if all rows are there, else keep them.

        Args:
            places: where the tokens of each row stand in the flattened batch; rows may have some in common.
        """
        if not all(id(r) in self.at for r in rows):
            yield
        elif self.has(rows):
            with self._skipping(self._laid_out(rows, layout, places)):
                yield
        else:
            handle = self.blocks[-1].register_forward_hook(lambda m, args, out: self._keep(rows, places, out))
            try:
                yield
            finally:
                handle.remove()

    @torch.no_grad()
    def _keep(self, rows: Sequence[Example], places: Sequence[Tensor], out: Any) -> None:
        several = isinstance(out, tuple)
        self.sums[-1] = 1 + several
        flat = (out[0] if several else out).detach().reshape(-1, self.host.hidden)
        for r, at in zip(rows, places, strict=True):
            i, begin, end = self.at[id(r)]
            self.data[begin:end] = flat[at].to("cpu")
            self.sums[i] = _sum(self.data[begin:end]) if self.file else 1
            self.known.add(i)

    def _laid_out(self, rows: Sequence[Example], layout: Layout, places: Sequence[Tensor]) -> Tensor:
        flat = torch.zeros(layout.shape[0] * layout.shape[1], self.host.hidden, dtype=self.host.dtype)
        for r, at in zip(rows, places, strict=True):
            _, begin, end = self.at[id(r)]
            flat[at] = self.data[begin:end]
        return flat.view(*layout.shape, -1).to(self.host.device)

    def _skipping(self, hidden: Tensor) -> contextlib.AbstractContextManager[None]:
        said = (hidden,) if self.sums[-1] == 2 else hidden

        def passed_over(*args: Any, **kwargs: Any) -> Any:
            return said

        return forwards(dict.fromkeys(self.blocks, passed_over))


def _claim(own: int, beside: int, where: Path | Literal["ram"]) -> None:
    if isinstance(where, Path):
        folder = next(p for p in (where.parent, *where.parent.parents) if p.exists())
        free, what = shutil.disk_usage(folder).free + _held(where.parent), f"free at {where.parent}"
    else:
        told = available()
        free, what = (own + beside if told is None else told), "of memory available"
    if own + beside > free:
        shared = f" (and {beside:,} in other processes of this machine)" if beside else ""
        raise InlayError(f"cached activations need {own:,} bytes{shared}, {free:,} are {what}; leave the cache off")


def _held(folder: Path) -> int:
    """Bytes of numbers whose room is taken already, by a stopped run or a neighbour that was faster."""
    total = 0
    for path in (p for p in files(folder) if p.suffix == ".bin"):
        with contextlib.suppress(FileNotFoundError):  # a neighbour has just removed it
            found = path.stat()
            total += min(found.st_size, 512 * getattr(found, "st_blocks", 0))  # the last page is not all numbers
    return total


def _opened(path: Path, mine: str, size: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(numbers, checksums) as files; empty ones unless those that are there are mine. What was left by a run of another
    number of processes is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sums, about = (path.with_name(f"{path.name}.{kind}") for kind in ("sums", "about"))
    for old in files(path.parent):
        if _count(old) != _count(path):
            old.unlink(missing_ok=True)
    if not about.exists() or about.read_text(encoding="utf-8") != mine:
        for old in (about, sums, path):
            old.unlink(missing_ok=True)
    for file, numbers in ((path, max(1, size) * dtype.itemsize), (sums, rows * 8)):  # no file is empty
        _reserve(file, numbers)
    made = torch.from_file(str(path), shared=True, size=max(1, size), dtype=dtype)[:size]
    checks = torch.from_file(str(sums), shared=True, size=rows, dtype=torch.int64)
    write_text(about, mine)
    return made, checks


def _reserve(path: Path, size: int) -> None:
    """Take these bytes of the disk now: a page of a mapped file that finds no room later is a SIGBUS, not an error.
    What the file holds stays."""
    if not hasattr(os, "posix_fallocate"):
        return
    new = not path.exists()
    with open(path, "ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                return
            if new:
                path.unlink(missing_ok=True)
            raise InlayError(
                f"cached activations need {size:,} bytes at {path}: {e.strerror}; leave the cache off"
            ) from e


def _count(path: Path) -> str:
    """The number of processes in a file's name; empty for one."""
    return path.name.partition("-of-")[2].partition(".")[0]


def _sum(numbers: Tensor) -> int:
    """A checksum, never 0."""
    return 1 + zlib.crc32(numbers.view(torch.uint8).numpy().data)


def refused(host: Host, below: int) -> str:
    """Why nothing can be cached; empty if something can."""
    if not below:
        return "the adapter reaches down to the first block (or has virtual tokens); hang it higher, e.g. 'q,v@last4'"
    if share := dropped(host.model):
        return (
            f"the base drops activations or adds noise while it trains ({share}); leave the cache off, or set that to 0"
        )
    return ""


@functools.cache
def _draws(name: str) -> bool:
    return any(word in name for word in DRAWN)


def dropped(model: nn.Module) -> str:
    """What share of activations forwards drop while they train, by a module or by a function (OPT, BLOOM, Falcon), of
    blocks they leave out (OPT's `layerdrop`), or what noise routers add (Mixtral's `jitter_noise`); empty for none."""
    config: Any = text_config(model.config)
    held: list[tuple[str, Any]] = [(n, m.p) for n, m in model.named_modules() if isinstance(m, nn.Dropout)]
    held += [(k, v) for m in model.modules() for k, v in vars(m).items() if _draws(k)]
    held += [(k, x) for k, v in held if isinstance(v, dict) for x in v.values()]  # PEFT's, by adapter
    held += [(k, getattr(config, k, 0)) for k in ("hidden_dropout", "attention_dropout")]
    return next((f"{k} {v:g}" for k, v in held if isinstance(v, float) and v > 0), "")
