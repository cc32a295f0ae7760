"""A bank of adapters: thousands of names on disk, those that are used in memory, under a budget of bytes.

    bank = Bank(inlay.attach(model), ["runs", "hub:org/style"])
    with bank.using("math", None, "style+math"):
        model.generate(**batch)

A name has at most one version at a time. Who wears an adapter holds the version he began with (`Lease`); a version that
was replaced, unloaded or pushed out leaves the host when nobody holds it any more.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.evaluate.batches import quiet, room
from inlay.interop import formats
from inlay.library.compose import compose
from inlay.library.errors import BankError
from inlay.library.names import parts, render
from inlay.library.sources import Sources, fetch
from inlay.library.versions import Lease, Memory, Version

log = logging.getLogger(__name__)

BYTES = 4 << 30
"""Memory that a bank's adapters may take by default."""


class Bank:
    """Adapters that are read when they are first asked for and leave memory when others need the room.

    `names`, `has`, `describe` and a `lease` of what is in memory may be asked on any thread; whatever changes the host
    (`bring`, `mix`, `load`, `unload`, `sweep`, `using`) belongs to the one that owns the model.

    Args:
        sources: folders of adapter folders, single adapter folders in any format that `inlay convert` reads, Hub ids
            (`hub:org/name`, `hub:org/name@revision`). A folder's name is the adapter's.
        base: names of the bare base, which no adapter may have.
        room: bytes that adapters may take; beyond, those that were not asked for the longest leave and are read again
            when somebody asks. Adapters in use stay.
        trial: let each adapter make a forward of a few tokens when it is read: what fails there would fail in a batch
            with others.

    Raises:
        InlayError: folders that do not exist, two adapters of one name.
    """

    def __init__(
        self,
        host: Host,
        sources: Iterable[str | Path] = (),
        base: Iterable[str] = ("base",),
        room: int = BYTES,
        trial: bool = False,
    ):
        if room < 0:
            raise InlayError(f"room {room} must be 0 bytes or more")
        self.host, self.base, self.room, self.trial = host, tuple(base), room, trial
        self.sources = Sources([sources] if isinstance(sources, str | Path) else sources, self.base)
        self._loaded: OrderedDict[str, Version] = OrderedDict()
        self._broken: dict[str, str] = {}
        self._faults: dict[frozenset[str], str] = {}
        """Names on the host -> what is said of rows that wear them all."""
        self._retired: list[Version] = []
        self._memory = Memory()
        self._lock = threading.RLock()
        self._made = 0

    # ---- any thread --------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """Adapters that may be asked for, in memory or not."""
        with self._lock:
            return self.sources.names()

    def has(self, name: str) -> bool:
        """Whether there is an adapter of that name."""
        with self._lock:
            return self.sources.find(name) is not None

    def describe(self) -> list[dict[str, object]]:
        """Of each adapter: name, source, state (`loaded`, `broken`, `on disk`); method, bytes, since, requests; error.
        A folder that nobody has asked for has no source yet."""
        with self._lock:
            found: list[dict[str, object]] = []
            for name in self.names():
                v = self._loaded.get(name)
                state = "loaded" if v else "broken" if name in self._broken else "on disk"
                found.append({"name": name, "source": self.sources.known.get(name), "state": state})
                if v:
                    found[-1] |= {"method": self.host.edits[v.shelved].kind, "bytes": v.bytes, "since": int(v.since)}
                    found[-1]["requests"] = v.users
                if name in self._broken:
                    found[-1]["error"] = self._broken[name]
            return found

    @property
    def loaded(self) -> int:
        """Adapters in memory, compositions and replaced ones that are still in use included."""
        return len(self._loaded) + len(self._retired)

    @property
    def bytes(self) -> int:
        """Memory that they take; what several share (VeRA's random matrices) is counted once."""
        return self._memory.bytes

    @property
    def broken(self) -> int:
        """Adapters that could not be read, or failed when they were worn, and were not loaded anew since."""
        return len(self._broken)

    def lease(self, model: str) -> Lease | None:
        """What `model` stands for: the base, an adapter, `a+b`, or a composition (`inlay.library.compose`); None if a
        part of it must be brought first.

        Raises:
            BankError: `unknown`, `broken`, `invalid`.
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
            worn = tuple(v.shelved for v in versions)
            if (error := self.fault(worn)) is not None:
                raise error
            self._hold(versions)
            for name in names:
                self._loaded.move_to_end(name)
            return Lease(worn, room(self.host, worn), versions, self)

    def fault(self, worn: Worn) -> BankError | None:
        """What is known against rows that wear this, in names on the host; None: nothing."""
        with self._lock:
            said = next((said for names, said in self._faults.items() if names.issubset(worn)), None)
            return None if said is None else BankError(said, "broken")

    def _check_known(self, name: str) -> None:
        if self.sources.find(name) is None:
            raise BankError(f"the model {name!r} does not exist: no adapter or folder has that name", "unknown")
        if name in self._broken and name not in self._loaded:
            raise BankError(f"the adapter {name!r} cannot be served: {self._broken[name]}", "broken")

    def _composed(self, model: str) -> str:
        """A composition of the versions that its parts have now; it stands among those in memory by this text."""
        return render(model, {name: self._loaded[name].shelved for name in parts(model)})

    def _hold(self, versions: Iterable[Version]) -> None:
        with self._lock:
            for v in versions:
                v.users += 1

    def _let_go(self, versions: Iterable[Version]) -> None:
        with self._lock:
            for v in versions:
                v.users -= 1

    # ---- the model's thread ------------------------------------------------------------------------------------------
    def blame(self, lease: Lease, worn: Worn, error: Exception) -> None:
        """Remember that forwards fail for what wears this, which is refused from now on: an adapter until it is loaded
        anew, what fails only together until one of it leaves memory.

        Args:
            worn: the part of `lease.worn` that is at fault.
        """
        at_fault = [v for v in lease.versions if v.shelved in worn]
        names = " and ".join(repr(v.source if "(" in v.name else v.name) for v in at_fault)
        together = "it" if len(at_fault) == 1 else "all of them on a row"
        why = f"a forward with {together} failed ({type(error).__name__}: {error})"
        log.error("%s: %s", names, why)
        with self._lock:
            self._faults = {known: said for known, said in self._faults.items() if known <= self.host.edits.keys()}
            self._faults[frozenset(worn)] = f"the adapter{'s' * (len(at_fault) > 1)} {names} cannot be served: {why}"
            if len(at_fault) == 1 and self._loaded.get(name := at_fault[0].name) is at_fault[0] and "(" not in name:
                self._broken[name] = why
                self._retire(name)

    @contextlib.contextmanager
    def using(self, *plan: str | None, side: Mapping[str, Tensor] | None = None) -> Iterator[Host]:
        """`Host.using` with names of the bank: read what is missing, wear it in this block, let go.

        Args:
            plan: one entry for every row, or one a row: a name, `a+b`, a composition, or None for the bare base.
            side: further inputs per row, as in `Host.use`.

        Raises:
            BankError: as `bring`.
        """
        with contextlib.ExitStack() as held:
            held.callback(self.sweep)
            worn: dict[str | None, Worn | None] = {None: None}
            for model in plan:
                if model not in worn:
                    lease = self.bring(model or "")
                    held.callback(lease.release)
                    worn[model] = lease.worn or None
            with self.host.using(*(worn[model] for model in plan), side=side):
                yield self.host

    def bring(self, model: str) -> Lease:
        """As `lease`, after reading what is missing."""
        held: list[Version] = []
        try:
            while (lease := self.lease(model)) is None:
                for name in parts(model):
                    if version := self._loaded.get(name):
                        self._hold([version])  # or the next part might push it out
                    else:
                        version = self._try_read(name)
                    held += [version] if version else []
                if "(" in model and all(name in self._loaded for name in parts(model)):
                    held.append(self._compose(model))
            return lease
        finally:
            self._let_go(held)

    def mix(self, weights: Mapping[str, float]) -> Lease:
        """A weighted sum of adapters as an adapter, which leaves memory when nobody holds it.

        Raises:
            BankError: as `bring` for the parts; `invalid` for what has no sum, with the reason.
        """
        lease = self.bring(f"sum({', '.join(f'{weight:g}*{name}' for name, weight in weights.items())})")
        with self._lock:
            for version in lease.versions:
                self._retire(version.name)
        return lease

    def load(self, name: str, source: str | None = None, replacing: bool = False) -> Version:
        """Make an adapter available under a name, from a folder below one of the sources or the Hub.

        Args:
            source: a folder, or `hub:org/name`; the name's own source, or a folder of that name, by default.
            replacing: another adapter may have the name; it serves until this one is ready, and those who hold it on.

        Raises:
            BankError: `bad-name`, `bad-source`, `exists`, or `unfit` for adapters that cannot be read or do not fit;
                nothing has changed then.
        """
        with self._lock:
            self.sources.check(name)
            known = name in self.sources.known or (source is not None and self.sources.find(name) is not None)
            if known and not replacing:
                raise BankError(
                    f"there is an adapter {name!r} already; replace it, or choose another name", "exists", "name"
                )
            where = self.sources.allowed(name, source)
        version = self._read(name, where)
        with self._lock:
            self.sources.keep(name, where)
        self._let_go([version])
        return version

    def unload(self, name: str) -> None:
        """Forget a name; requests that hold the adapter go on."""
        with self._lock:
            if self.sources.find(name) is None:
                raise BankError(f"there is no adapter {name!r}", "unknown", "name")
            self.sources.forget(name)
            self._broken.pop(name, None)
            self._retire(name)
        self.sweep()

    def sweep(self) -> None:
        """Take off the host what nobody holds and either nobody can ask for any more or there is no room for."""
        if not self._retired and self.bytes <= self.room:
            return
        with self._lock:
            self._make_room()
            free = [v for v in self._retired if not v.users]
            self._retired = [v for v in self._retired if v.users]
            for v in free:
                self._memory.drop(v)
        for v in free:
            self.host.remove(v.shelved)

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _try_read(self, name: str) -> Version | None:
        """None if it cannot be read, which is remembered until it is loaded anew."""
        try:
            return self._read(name, self.sources.known[name])
        except BankError as e:
            log.warning("adapter %s: %s", name, e)
            with self._lock:
                self._broken[name] = str(e)
            return None

    def _read(self, name: str, source: str) -> Version:
        """Read an adapter, which is held once by the caller."""
        version = self._make(name, name, source, lambda shelved: formats.shelve(self.host, fetch(source), shelved))
        with self._lock:
            self._broken.pop(name, None)
        return version

    def _compose(self, model: str) -> Version:
        text = self._composed(model)
        try:
            return self._make(text, "mix", model, lambda shelved: compose(self.host, shelved, text))
        except BankError as e:  # parts that do not go together
            said = str(e)
            for name in parts(model):
                said = said.replace(self._loaded[name].shelved, name)
            raise BankError(f"{model!r} cannot be composed: {said}", "invalid") from e

    def _make(self, name: str, stem: str, source: str, make: Callable[[str], object]) -> Version:
        """Let a version be made on the host and take its name's place; if that fails, nothing has changed."""
        self._made += 1
        # The host lets adapters of one row take turns by name, so a number that says who came first is of one length.
        version = Version(name, f"{stem}--{self._made:09d}", source, users=1)
        try:
            make(version.shelved)
            self._check(version.shelved)
        except Exception as e:  # a damaged file may fail anywhere
            if version.shelved in self.host.edits:
                self.host.remove(version.shelved)
            said = str(e) if isinstance(e, InlayError) else f"{type(e).__name__}: {e}"
            raise e if isinstance(e, BankError) else BankError(said, "unfit", "source") from e
        folded = self.host.shelf[version.shelved]
        version.bytes, version.constants = folded.bytes, tuple(folded.cut.constants.values())
        with self._lock:
            self._retire(name)
            self._loaded[name] = version
            self._memory.add(version)
        self.sweep()
        return version

    def _check(self, shelved: str) -> None:
        extremes = self.host.shelf[shelved].flat.aminmax()  # NaN if any is; ten times as fast as asking each
        if not torch.stack(extremes).isfinite().all():
            raise BankError("the adapter's tensors are not finite", "unfit", "source")
        if not self.trial:
            return
        ids = torch.arange(4, device=self.host.device)[None]
        with quiet(self.host), self.host.steady(), self.host.using(shelved):
            logits = self.host.model(input_ids=ids, use_cache=False).logits
        if not logits.isfinite().all():
            raise BankError("the adapter makes logits that are not finite", "unfit", "source")

    def _retire(self, name: str) -> None:
        if (version := self._loaded.pop(name, None)) is not None:
            self._retired.append(version)

    def _make_room(self) -> None:
        """Retire idle adapters, the least recently asked for first, until the rest has room."""
        if self.bytes <= self.room:
            return
        kept = Memory([*self._loaded.values(), *(v for v in self._retired if v.users)])
        for name, v in list(self._loaded.items()):
            if kept.bytes > self.room and not v.users:
                self._retire(name)
                kept.drop(v)
