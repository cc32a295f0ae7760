"""What a bank keeps: versions of adapters, holds on them, and the memory that they take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from inlay.core.route import Worn

if TYPE_CHECKING:
    from inlay.library.bank import Bank


@dataclass(eq=False)
class Version:
    """An adapter on the host's shelf."""

    name: str
    shelved: str
    """Its name on the host."""
    source: str
    since: float = field(default_factory=time.time)
    users: int = 0
    bytes: int = 0
    """Of memory, `constants` left out."""
    constants: tuple[Tensor, ...] = ()
    """Tensors that are in memory once for all adapters that have them (VeRA's random matrices)."""


@dataclass
class Lease:
    """What one row wears, kept in memory until it is released."""

    worn: Worn = ()
    """For `Host.use`: names on the host."""
    room: int = 0
    """Positions that its virtual tokens take."""
    versions: tuple[Version, ...] = ()
    owner: Bank | None = None

    def again(self) -> Lease:
        """Another hold on the same versions."""
        if self.owner is not None:
            self.owner._hold(self.versions)
        return replace(self)

    def release(self) -> None:
        """Let go; once is enough."""
        owner, self.owner = self.owner, None
        if owner is not None:
            owner._let_go(self.versions)


class Memory:
    """Bytes of a set of versions; what several of them share is counted once, as long as one of them is there."""

    def __init__(self, versions: Iterable[Version] = ()):
        self.bytes = 0
        self._users: Counter[int] = Counter()
        for version in versions:
            self.add(version)

    def add(self, version: Version) -> None:
        """One more."""
        self.bytes += version.bytes + sum(t.nbytes for t in version.constants if not self._users[id(t)])
        self._users.update(map(id, version.constants))

    def drop(self, version: Version) -> None:
        """One less."""
        self._users.subtract(map(id, version.constants))
        self.bytes -= version.bytes + sum(t.nbytes for t in version.constants if not self._users[id(t)])
        self._users += Counter()  # forgets those at zero: an id may come back as another tensor's
