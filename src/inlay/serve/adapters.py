"""Names that requests may ask for, and the adapters behind them, which come, go and change while others are served.

A name has at most one version at a time. A request holds the version it began with (`Lease`); a version that was
replaced or unloaded leaves the model when nobody holds it any more.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.evaluate.batches import quiet, room
from inlay.interop import formats
from inlay.library.compose import compose
from inlay.serve.errors import Refused
from inlay.serve.names import HUB, NAME, adapter_in, parts, render

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Version:
    """An adapter that hangs on the host."""

    name: str
    hung: str
    """Its name on the host."""
    source: str
    since: float = field(default_factory=time.time)
    users: int = 0
    retired: bool = False


@dataclass
class Lease:
    """What one row wears, kept in the model until it is released."""

    worn: Worn = ()
    room: int = 0
    """Positions that its virtual tokens take."""
    versions: tuple[Version, ...] = ()
    owner: Adapters | None = None

    def again(self) -> Lease:
        """Another hold on the same versions."""
        if self.owner is not None:
            self.owner._held(self.versions)
        return replace(self)

    def release(self) -> None:
        """Let go; once is enough."""
        owner, self.owner = self.owner, None
        if owner is not None:
            owner._released(self.versions)


class Adapters:
    """The adapters of a server.

    `names`, `has` and a `lease` of what is loaded may be asked on any thread; whatever changes the host (`bring`,
    `load`, `unload`, `sweep`) belongs to the one that owns the model.

    Args:
        sources: folders of adapter folders, single adapter folders, Hub ids (`hub:org/name`, `hub:org/name@revision`).
        base: names of the bare base, which no adapter may have.
        most: adapters kept in memory; beyond, the one that was not asked for the longest leaves it and is read again
            when somebody asks. Adapters in use stay.
    """

    def __init__(
        self, host: Host, sources: Iterable[str | Path] = (), base: Iterable[str] = ("base",), most: int = 256
    ):
        self.host, self.base, self.most = host, tuple(base), most
        self.roots: list[Path] = []
        self._known: dict[str, str] = {}
        self._loaded: OrderedDict[str, Version] = OrderedDict()
        self._broken: dict[str, str] = {}
        self._gone: set[str] = set()
        self._retired: list[Version] = []
        self._lock = threading.RLock()
        self._made = 0
        for source in sources:
            self._find(str(source))

    # ---- any thread --------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """Adapters that may be asked for, loaded or not."""
        with self._lock:
            return sorted(self._known)

    def describe(self) -> list[dict[str, object]]:
        """What an administrator wants to know of each."""
        with self._lock:
            found: list[dict[str, object]] = []
            for name in sorted(self._known):
                v = self._loaded.get(name)
                state = "loaded" if v else "broken" if name in self._broken else "on disk"
                found.append({"name": name, "source": self._known[name], "state": state})
                if v:
                    found[-1] |= {"method": self.host.edits[v.hung].kind, "since": int(v.since), "requests": v.users}
                if name in self._broken:
                    found[-1]["error"] = self._broken[name]
            return found

    @property
    def loaded(self) -> int:
        """Adapters in memory, replaced ones that are still in use included."""
        return len(self._loaded) + len(self._retired)

    def lease(self, model: str) -> Lease | None:
        """What `model` stands for: the base, an adapter, `a+b`, or a composition (`inlay.library.compose`); None if a
        part of it must be brought first.

        Raises:
            Refused: 404 for unknown names, 503 for adapters that cannot be read.
        """
        if model in self.base:
            return Lease()
        with self._lock:
            names = parts(model)
            for name in names:
                self._check_known(name)
            if not all(name in self._loaded for name in names):
                return None
            if "(" in model:
                if (made := self._composed(model)) not in self._loaded:
                    return None
                names = [made]
            versions = tuple(self._loaded[name] for name in names)
            self._held(versions)
            for name in names:
                self._loaded.move_to_end(name)
            worn = tuple(v.hung for v in versions)
            return Lease(worn, room(self.host, worn), versions, self)

    def _check_known(self, name: str) -> None:
        if not self._finds(name):
            raise Refused(
                f"the model {name!r} does not exist; /v1/models lists those that do", 404, "model_not_found", "model"
            )
        if name in self._broken and name not in self._loaded:
            raise Refused(
                f"the adapter {name!r} cannot be served: {self._broken[name]}", 503, "adapter_broken", "model"
            )

    def _composed(self, model: str) -> str:
        """A composition of the versions that its parts have now; it stands among those that are loaded by this text."""
        return render(model, {name: self._loaded[name].hung for name in parts(model)})

    def _finds(self, name: str) -> bool:
        """Whether a name is known, or a folder of that name has been put beside the others."""
        if name not in self._known and name not in self._gone and name not in self.base and NAME.fullmatch(name):
            found = next((own for root in self.roots if (own := adapter_in(root / name))), None)
            if found is not None:
                self._known[name] = str(found)
        return name in self._known

    def _held(self, versions: Iterable[Version]) -> None:
        with self._lock:
            for v in versions:
                v.users += 1

    def _released(self, versions: Iterable[Version]) -> None:
        with self._lock:
            for v in versions:
                v.users -= 1

    # ---- the model's thread ------------------------------------------------------------------------------------------
    def bring(self, model: str) -> Lease:
        """As `lease`, after loading what is missing."""
        held: list[Version] = []
        try:
            while (lease := self.lease(model)) is None:
                for name in parts(model):
                    if version := self._loaded.get(name) or self._try_hang(name):
                        held.append(version)
                        self._held([version])  # or the next part might push it out
                if "(" in model and all(name in self._loaded for name in parts(model)):
                    self._compose(model)
            return lease
        finally:
            self._released(held)

    def mix(self, weights: Mapping[str, float]) -> Lease:
        """A weighted sum of adapters as an adapter, which leaves the model when nobody holds it.

        Raises:
            Refused: as `bring` for the parts; 400 for what has no sum, with the reason.
        """
        lease = self.bring(f"sum({', '.join(f'{weight:g}*{name}' for name, weight in weights.items())})")
        with self._lock:
            for version in lease.versions:
                self._retire(self._loaded.pop(version.name, None))
        return lease

    def load(self, name: str, source: str | None = None, replacing: bool = False) -> Version:
        """Make an adapter available under a name, from a folder below one of the sources or the Hub.

        Args:
            source: a folder, or `hub:org/name`; the name's own source, or a folder of that name, by default.
            replacing: another adapter may have the name; it serves until this one is ready, and those who hold it on.

        Raises:
            Refused: bad names and sources (400), names in use (409), adapters that cannot be read or do not fit (422);
                nothing has changed then.
        """
        self._check(name)
        if name in self._known and not replacing:
            raise Refused(f"there is an adapter {name!r} already; PUT replaces it", 409, "model_exists", "name")
        where = self._where(name, source)
        version = self._hang(name, where)
        with self._lock:
            self._known[name] = where
            self._gone.discard(name)
        return version

    def unload(self, name: str) -> None:
        """Forget a name; requests that hold the adapter go on."""
        with self._lock:
            if name not in self._known:
                raise Refused(f"there is no adapter {name!r}", 404, "model_not_found", "name")
            del self._known[name]
            self._gone.add(name)
            self._broken.pop(name, None)
            self._retire(self._loaded.pop(name, None))
        self.sweep()

    def sweep(self) -> None:
        """Take replaced versions that nobody holds off the model."""
        if not self._retired:
            return
        with self._lock:
            free = [v for v in self._retired if not v.users]
            self._retired = [v for v in self._retired if v.users]
        for v in free:
            self.host.remove(v.hung)

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _try_hang(self, name: str) -> Version | None:
        """None if it cannot be read, which is remembered until it is loaded anew."""
        try:
            return self._hang(name, self._known[name])
        except Refused as e:
            log.warning("adapter %s: %s", name, e)
            with self._lock:
                self._broken[name] = str(e)
            return None

    def _hang(self, name: str, source: str) -> Version:
        self._made += 1
        version = Version(name, f"{name}--{self._made}", source)
        self._make(version, lambda: self._shelve(version.hung, self._folder(source)))
        with self._lock:
            self._broken.pop(name, None)
            self._retire(self._loaded.pop(name, None))
            self._loaded[name] = version
            self._make_room()
        self.sweep()
        return version

    def _make(self, version: Version, make: Callable[[], object]) -> None:
        """Let a version be made on the host and try it; if that fails, nothing has changed."""
        try:
            make()
            self._arrange()
            self._try(version.hung)
        except Exception as e:  # a damaged file may fail anywhere
            if version.hung in self.host.edits:
                self.host.remove(version.hung)
            said = str(e) if isinstance(e, InlayError) else f"{type(e).__name__}: {e}"
            raise e if isinstance(e, Refused) else Refused(said, 422, "adapter_broken", "source") from e

    def _compose(self, model: str) -> None:
        text, self._made = self._composed(model), self._made + 1
        version = Version(text, f"mix--{self._made}", model)
        try:
            self._make(version, lambda: compose(self.host, version.hung, text))
        except Refused as e:  # parts that do not go together
            raise Refused(f"{model!r} cannot be composed: {e}", 400, "invalid_model", "model") from e
        with self._lock:
            self._loaded[text] = version
            self._make_room()

    def _shelve(self, hung: str, folder: Path) -> None:
        """Read an adapter as any folder is read, and keep it folded: it is never trained here."""
        host = self.host
        formats.read(host, folder, hung)
        edit, at = host.edits[hung], host.placement(hung)
        tensors = {k: t.detach() for k, t in host.tensors(hung).items()}
        host.remove(hung)
        if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
            raise Refused("the adapter's tensors are not finite", 422, "adapter_broken", "source")
        host.shelve(hung, edit, at, tensors)

    def _arrange(self) -> None:
        """The host applies adapters in the order in which they were hung, which here is chance: order them by name, so
        that `a+b` says the same whoever was loaded first."""
        edits = self.host.edits
        for hung in sorted(edits, key=lambda n: (n.rpartition("--")[0], int(n.rpartition("--")[2]))):
            edits[hung] = edits.pop(hung)
        self.host._order = self.host._ready = None

    def _try(self, hung: str) -> None:
        """A forward of a few tokens: what fails here would fail in a batch with others."""
        ids = torch.arange(4, device=self.host.device)[None]
        with quiet(self.host), self.host.steady(), self.host.using(hung):
            logits = self.host.model(input_ids=ids, use_cache=False).logits
        if not logits.isfinite().all():
            raise Refused("the adapter makes logits that are not finite", 422, "adapter_broken", "source")

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            version.retired = True
            self._retired.append(version)

    def _make_room(self) -> None:
        idle = [name for name, v in self._loaded.items() if not v.users]
        for name in idle[:-1][: max(0, len(self._loaded) - self.most)]:  # the last one was loaded now
            self._retire(self._loaded.pop(name))

    def _check(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise Refused(
                f"{name!r} cannot name an adapter: use at most 128 letters, digits, '_' and '-'",
                400,
                "bad_name",
                "name",
            )
        if name in self.base:
            raise Refused(f"{name!r} names the bare base; choose another name", 409, "model_exists", "name")

    def _where(self, name: str, source: str | None) -> str:
        """A source that may be read: of the Hub, or inside one of the folders the server was started with."""
        if source is None and name in self._known:
            return self._known[name]
        if source is not None and source.startswith(HUB):
            return source
        for root in self.roots:
            inside = root.resolve()
            folder = (inside / (source or name)).resolve()
            if folder.is_relative_to(inside) and folder.is_dir():
                return str(adapter_in(folder) or folder)
        raise Refused(
            f"there is no folder {source or name!r} in the folders of adapters this server was started with",
            400, "bad_source", "source",
        )  # fmt: skip

    def _find(self, source: str) -> None:
        if source.startswith(HUB):
            self._offer(re.sub(r"[^A-Za-z0-9_-]", "-", source[len(HUB) :].partition("@")[0].rpartition("/")[2]), source)
            return
        root = Path(source)
        if not root.is_dir():
            raise InlayError(f"there is no folder {source!r}; adapters of the Hub are written {HUB}org/name")
        if own := adapter_in(root):
            self._offer(root.resolve().name, str(own))
            return
        self.roots.append(root)
        for name in sorted(os.listdir(root)):
            if own := adapter_in(f"{root}/{name}"):
                self._offer(name, str(own))

    def _offer(self, name: str, source: str) -> None:
        try:
            self._check(name)
        except Refused as e:
            log.warning("%s is not served: %s", source, e)
            return
        if name in self._known:
            raise InlayError(f"two adapters are called {name!r}: {self._known[name]} and {source}; rename a folder")
        self._known[name] = source

    def _folder(self, source: str) -> Path:
        if not source.startswith(HUB):
            return Path(source)
        from huggingface_hub import snapshot_download

        repo, _, revision = source[len(HUB) :].partition("@")
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
