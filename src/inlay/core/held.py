"""The tensors of a safetensors file, where they lie in its bytes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

KNOWN = 256
"""Layouts that are remembered."""


def read_bytes(path: Path) -> bytearray:
    """A file's content, which tensors may share."""
    with open(path, "rb") as f:
        content = bytearray(os.fstat(f.fileno()).st_size)
        del content[f.readinto(content) :]
    return content


@dataclass(frozen=True, eq=False)
class Layout:
    """What a file's header says. Files with the same header have the same layout, the very object."""

    entries: Mapping[str, tuple[torch.dtype, torch.Size, int]]
    """name -> type, shape, where it begins (bytes); in the order of the file."""

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """Of all tensors; None if they differ."""
        found = {dtype for dtype, _, _ in self.entries.values()}
        return found.pop() if len(found) == 1 else None

    @functools.cached_property
    def numbers(self) -> int:
        """In all tensors."""
        return sum(shape.numel() for _, shape, _ in self.entries.values())

    @functools.cached_property
    def begin(self) -> int:
        """Where the first tensor begins (bytes)."""
        return min(at for _, _, at in self.entries.values())


_LAYOUTS: dict[tuple[bytes, int], Layout] = {}
"""(header, length of the file) -> layout: a thousand adapters of one kind differ in what follows the header only."""


class Held(Mapping[str, Tensor]):
    """Tensors by name. Each lies in the file's bytes and is made when it is asked for."""

    def __init__(self, content: bytearray, layout: Layout):
        self.content, self.layout = content, layout

    @staticmethod
    def of(content: bytearray) -> Held:
        """From a whole file.

        Raises:
            SafetensorError: it is no such file.
        """
        header = bytes(content[: 8 + int.from_bytes(content[:8], "little")])
        if (layout := _LAYOUTS.get((header, len(content)))) is None:
            found = safetensors.torch.load(bytes(content))
            at = {
                k: len(header) + about["data_offsets"][0] for k, about in json.loads(header[8:]).items() if k in found
            }
            if len(_LAYOUTS) >= KNOWN:
                _LAYOUTS.clear()
            entries = {k: (found[k].dtype, found[k].shape, at[k]) for k in sorted(found, key=at.__getitem__)}
            layout = _LAYOUTS[header, len(content)] = Layout(entries)
        return Held(content, layout)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, at = self.layout.entries[name]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.content, dtype=dtype, count=shape.numel(), offset=at).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.entries)

    def __len__(self) -> int:
        return len(self.layout.entries)

    def flat(self) -> Tensor:
        """All of them, one after another: of files of one type, that hold something."""
        assert self.layout.dtype is not None
        return torch.frombuffer(self.content, dtype=self.layout.dtype, offset=self.layout.begin)
