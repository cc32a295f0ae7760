"""Where a bank's adapters are: names for folders and Hub ids. No folder is looked into before its name is asked for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from inlay.core.errors import InlayError
from inlay.library.errors import BankError
from inlay.library.names import HUB, NAME, adapter_in

log = logging.getLogger(__name__)


class Sources:
    """Names and where they are read.

    Args:
        sources: folders of adapter folders, single adapter folders, Hub ids (`hub:org/name`, `hub:org/name@revision`).
        base: names of the bare base, which no adapter may have.
    """

    def __init__(self, sources: Iterable[str | Path], base: Iterable[str]):
        self.base = tuple(base)
        self.roots: list[Path] = []
        self.known: dict[str, str] = {}
        """Names that were given one by one, loaded, or asked for."""
        self._hidden: set[str] = set()
        self._empty: set[str] = set()
        self._told: set[str] = set()
        for source in sources:
            self._add(str(source))
        for name, source in self.known.items():
            if below := self._below(name):
                raise BankError(_clash(name, [source, *below]), "exists", "source")

    def names(self) -> list[str]:
        """Names that may be asked for. Reads each folder of folders once and looks into none of theirs: one that turns
        out to hold no adapter is left out from then on."""
        found = {name for root in self.roots for name in self._listed(root)}
        return sorted((found - self._hidden - self._empty) | self.known.keys())

    def find(self, name: str) -> str | None:
        """The source of a name; None if there is none.

        Raises:
            BankError: `broken` if two folders have the name.
        """
        if name in self.known:
            return self.known[name]
        if name in self._hidden or name in self.base or not NAME.fullmatch(name):
            return None
        below = self._below(name)
        if len(below) > 1:
            raise BankError(_clash(name, below), "broken")
        if below:
            self.keep(name, below[0])
        elif any(os.path.isdir(f"{root}/{name}") for root in self.roots):
            self._empty.add(name)
        return self.known.get(name)

    def keep(self, name: str, source: str) -> None:
        """Give a name a source."""
        self.known[name] = source
        self._hidden.discard(name)
        self._empty.discard(name)

    def forget(self, name: str) -> None:
        """Take a name away; a folder that has it is hidden."""
        self.known.pop(name, None)
        self._hidden.add(name)

    def check(self, name: str) -> None:
        """Refuse what cannot name an adapter."""
        if not NAME.fullmatch(name):
            raise BankError(
                f"{name!r} cannot name an adapter: use at most 128 letters, digits, '_' and '-'", "bad-name", "name"
            )
        if name in self.base:
            raise BankError(f"{name!r} names the bare base; choose another name", "exists", "name")

    def allowed(self, name: str, source: str | None) -> str:
        """A source that may be read: the name's own, of the Hub, or inside one of the folders of folders."""
        if source is None and (own := self.find(name)) is not None:
            return own
        if source is not None and source.startswith(HUB):
            return source
        for root in self.roots:
            inside = root.resolve()
            folder = (inside / (source or name)).resolve()
            if folder.is_relative_to(inside) and folder.is_dir():
                return str(adapter_in(folder) or folder)
        raise BankError(
            f"there is no folder {source or name!r} in the folders of adapters that were given at the start; "
            f"put it there, or name a folder below them, or {HUB}org/name",
            "bad-source",
            "source",
        )

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _add(self, source: str) -> None:
        if source.startswith(HUB):
            name = re.sub(r"[^A-Za-z0-9_-]", "-", source[len(HUB) :].partition("@")[0].rpartition("/")[2])
            self._give(name, source)
            return
        root = Path(source)
        if not root.is_dir():
            raise InlayError(f"there is no folder {source!r}; adapters of the Hub are written {HUB}org/name")
        if own := adapter_in(root):
            self._give(root.resolve().name, str(own))
        else:
            self.roots.append(root)

    def _give(self, name: str, source: str) -> None:
        self.check(name)
        if name in self.known:
            raise BankError(_clash(name, [self.known[name], source]), "exists", "source")
        self.known[name] = source

    def _below(self, name: str) -> list[str]:
        return [str(own) for root in self.roots if (own := adapter_in(f"{root}/{name}"))]

    def _listed(self, root: Path) -> Iterator[str]:
        try:
            with os.scandir(root) as entries:
                found = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        except OSError as e:
            self._tell(str(root), f"the adapters in {root} cannot be listed: {e}")
            return
        for name in found:
            try:
                self.check(name)
            except BankError as e:
                self._tell(f"{root}/{name}", f"{root}/{name} is left out: {e}")
            else:
                yield name

    def _tell(self, what: str, said: str) -> None:
        """A warning that is given once."""
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", said)


def fetch(source: str) -> Path:
    """The folder of a source, from the Hub's cache or the Hub if it is there: configs and safetensors only."""
    if not source.startswith(HUB):
        return Path(source)
    from huggingface_hub import snapshot_download

    repo, _, revision = source[len(HUB) :].partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # of the network, of the Hub, or of a name that it cannot have
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InlayError(
            f"{repo!r} is neither in the Hub's cache nor could it be fetched: {said.rstrip('.')}; check the id, the "
            "revision, and whether this machine may reach the Hub"
        ) from e


def _clash(name: str, sources: Iterable[str]) -> str:
    return f"two adapters are called {name!r}: {' and '.join(sources)}; rename a folder"
