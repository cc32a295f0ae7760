"""PEFT folders onto the shelf.

Reading hangs an adapter, place by place, to learn what each tensor of the file is for. The next folder with the same
config and the same header is the same adapter with other numbers: its tensors are renamed, and folded where they lie in
the file (`inlay.core.recipe`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.errors import InlayError
from inlay.core.held import Held, Layout, read_bytes
from inlay.core.host import Host
from inlay.interop import peft
from inlay.interop.peft_folder import free_name, read_config

KNOWN = 256
"""Kinds of folders that are remembered."""


@dataclass(frozen=True)
class Renaming:
    """What the folders of a kind hold."""

    edit: Edit
    at: tuple[str, ...]
    layout: Layout
    """Of their files, by the names of `Host.tensors`."""


_RENAMINGS: WeakKeyDictionary[Host, dict[tuple[str, Layout], Renaming | None]] = WeakKeyDictionary()


def shelve(host: Host, folder: Path, name: str | None = None) -> str:
    """As `peft.read`, for an adapter that will only be worn (`Host.shelve`)."""
    file, config = folder / peft.FILES[0], read_config(folder)
    if not file.is_file():
        return by_hanging(host, peft.read(host, folder, name))
    try:
        held = Held.of(read_bytes(file))
    except SafetensorError as e:
        raise InlayError(f"{file} is not a readable safetensors file: {e}; restore it from a copy") from e
    known = _RENAMINGS.setdefault(host, {})
    key = json.dumps(config, sort_keys=True), held.layout
    if (how := known.get(key)) is not None:
        name = free_name(host, folder, name)
        host.shelve(name, how.edit, how.at, Held(held.content, how.layout))
        return name
    name = peft.load(host, folder, config, dict(held), name)
    if key not in known:
        if len(known) >= KNOWN:
            known.clear()
        known[key] = _renaming(host, folder, config, held, name)
    return by_hanging(host, name)


def by_hanging(host: Host, name: str) -> str:
    """Put what hangs on the shelf instead."""
    edit, at, tensors = host.edits[name], host.placement(name), host.tensors(name)
    host.remove(name)
    host.shelve(name, edit, at, {k: t.detach() for k, t in tensors.items()})
    return name


def _renaming(host: Host, folder: Path, config: Mapping[str, Any], held: Held, name: str) -> Renaming | None:
    """How the tensors of a file became those of an adapter that hangs, if they were renamed and nothing else; None for
    settings that scale, pad or leave out. Tried with random numbers, all of which must be found again."""
    layout = held.layout
    if layout.dtype is None or not layout.dtype.is_floating_point:
        return None
    drawn = torch.rand(layout.numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    content = bytearray(len(held.content))
    tried = Held(content, layout)
    tried.flat()[: layout.numbers].copy_(drawn)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the config, told already
            other = peft.load(host, folder, config, dict(tried), free_name(host, Path("trial"), None))
    except InlayError:  # what the numbers say matters
        return None
    try:
        there = {_numbers(t): k for k, t in tried.items()}
        edit, at = host.edits[other], tuple(host.placement(other))
        made = host.tensors(other)
        source = {k: there.get(_numbers(t)) for k, t in made.items()}
        if edit != host.edits[name] or sorted(there.values()) != sorted(k or "" for k in source.values()):
            return None
        entries = {k: layout.entries[source[k] or ""] for k in made}
        renamed = Layout({k: (dtype, made[k].shape, begin) for k, (dtype, _, begin) in entries.items()})
        real, again = host.tensors(name), Held(held.content, renamed)
        same = real.keys() == again.keys() and all(_numbers(real[k]) == _numbers(t) for k, t in again.items())
        return Renaming(edit, at, renamed) if same and len(there) == len(held) else None
    finally:
        host.remove(other)


def _numbers(t: Tensor) -> bytes:
    return t.detach().float().cpu().contiguous().numpy().tobytes()
