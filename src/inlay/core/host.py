"""The engine: a frozen decoder wearing adapters, each row of a batch its own.

What happens to a batch: `Forward.begin` (top of the forward) turns the plan into a route and makes room for virtual
tokens; each `Site` sends its rows through their edits; `Forward.end` cuts the room off again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import replay
from inlay.core.config import text_config, tied
from inlay.core.edit import Edit, Weights
from inlay.core.errors import InlayError, unknown
from inlay.core.expert_site import ExpertSite
from inlay.core.experts import start_weights
from inlay.core.fold import Stacks
from inlay.core.forward import Forward
from inlay.core.layout import Layout, lay_out
from inlay.core.place import Anatomy, Place, Spot, locate
from inlay.core.ready import Folds, Ready
from inlay.core.route import STRATEGIES, Route, Worn, read_plan, spread
from inlay.core.shelf import Shelf, only_finite, same_shapes
from inlay.core.site import Site, Wear, WornHere

STACK_BYTES = 1 << 30
"""Memory that stacks of adapters may take; a plan that needs more is sent in segments."""


class Host:
    """Hangs adapters on a frozen decoder, without copying or rewriting any of it.

    The plan is state of the host: one thread at a time.

    Args:
        model: a causal language model; its parameters are frozen while the host is attached.
        anatomy: where its roles are (`inlay.models.anatomy(model)`).
        strategy: how rows are sent (see `inlay.core.route`).
        fast: compute adapters whose method allows it (`Edit.coarse`) in the base's dtype: less memory and time on bf16
            bases, a few more roundings. Adapters are stored in float32 either way.
    """

    def __init__(self, model: Any, anatomy: Anatomy, strategy: str = "auto", fast: bool = False):
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
        if isinstance(getattr(model, "_inlay_host", None), Host):
            raise InlayError("this model already has a host; use inlay.host_of(model), or detach it first")
        self.model = model
        self.anatomy, self.strategy, self.fast = anatomy, strategy, fast
        self.hidden: int = anatomy.hidden or text_config(model.config).hidden_size
        self.tied = tied(model)
        self.edits: dict[str, Edit] = {}
        self.templates: dict[str, Mapping[str, Any]] = {}  # adapter -> its prompt template, where its file records one
        self.sites: dict[str, Site] = {}
        self.common: dict[str, Wear] = {}
        self.shelf = Shelf(self)
        self.stacks = Stacks(STACK_BYTES)
        self.folds = Folds()
        self._steady = 0
        self.order: dict[str, Any] = {}
        """Adapter -> its turn on a row that wears several: hung ones as they came, then shelved ones by name, since
        shelves fill and empty as requests come."""
        self._came = 0
        self.now = Route()
        self.plan: tuple[Worn, ...] = ((),)
        self.side: dict[str, Tensor] = {}
        self._bare = True
        self.forward = Forward(self)
        self._ready: Ready | None = None
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._checkpointed = replay.checkpointed(model)
        heads = [model, *([inner] if (inner := getattr(model, "base_model", model)) is not model else [])]
        self._hooks = [m.register_forward_pre_hook(self.forward.begin, with_kwargs=True) for m in heads]
        self._hooks += [m.register_forward_hook(self.forward.end, with_kwargs=True, always_call=True) for m in heads]
        object.__setattr__(model, "_inlay_host", self)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The base's floating-point type."""
        return getattr(self.model, "dtype", torch.float32)

    # ---- hanging adapters --------------------------------------------------------------------------------------------
    def add(
        self,
        name: str,
        edit: Edit,
        at: str | Iterable[str] | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Host:
        """Hang a fresh adapter. It is worn only once `use` names it.

        Args:
            name: letters, digits, `_` and `-`.
            edit: the method and its settings.
            at: a placement (see `inlay.core.place`); the method's own by default.
            seed: makes the start reproducible whatever was drawn before.
            dtype: of the trained tensors.
        """
        self._free(name)
        spots = self._spots(edit, at)
        fresh = [k for k in spots if k not in self.sites]
        try:
            places = self._places(spots)
            common, made = self._start(edit, places, seed, dtype)
        except BaseException:
            for key in fresh:
                if key in self.sites:
                    self._empty(key)
            raise
        self._enter(name, edit)
        if common:
            self.common[name] = Wear(common)
            self.model.add_module(f"inlay_{name}", self.common[name])
        for place in places:
            if made[place.key]:
                self.sites[place.key].hang(name, place.wiring, made[place.key])
            elif common:
                self.sites[place.key].hang(name, place.wiring, {})
            elif not self.sites[place.key].wear and not self.shelf:
                self._empty(place.key)
        if not any(name in s.places for s in self.sites.values()):
            self._leave(name)
            some = ", ".join(list(spots)[:4])
            raise InlayError(
                f"{edit.kind} has nothing to train at {some}{' ...' if len(spots) > 4 else ''}; see its settings"
            )
        return self

    def _free(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InlayError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'")
        if name in self.edits:
            some = ", ".join(sorted(self.edits)[:8])
            raise InlayError(f"this model already wears {name!r}; remove() it first, or choose another name ({some})")

    def _enter(self, name: str, edit: Edit) -> None:
        self._came += 1
        self.edits[name] = edit
        self.order[name] = (1, name) if name in self.shelf else (0, self._came)
        self._ready = None

    def _leave(self, name: str) -> None:
        del self.edits[name], self.order[name]
        self.templates.pop(name, None)
        self._ready = None

    def _spots(self, edit: Edit, at: str | Iterable[str] | None) -> dict[str, tuple[Spot, str]]:
        spots = locate(self.model, self.anatomy, edit.at if at is None else at)
        for spot, wiring in spots.values():
            if wiring and wiring not in edit.wirings:
                knows = f"it knows {', '.join(edit.wirings)}" if edit.wirings else "it has only one"
                raise InlayError(f"{edit.kind} cannot be wired {wiring!r} at {spot.key!r}; {knows}")
        if edit.everywhere:
            for role in {spot.role for spot, _ in spots.values()}:
                if sum(spot.role == role for spot, _ in spots.values()) < self.anatomy.layers:
                    raise InlayError(
                        f"{edit.kind} must hang in every layer, and this placement leaves some {role!r} out"
                    )
        return spots

    def _places(self, spots: Mapping[str, tuple[Spot, str]]) -> list[Place]:
        fresh = {key: spot for key, (spot, _) in spots.items() if key not in self.sites}
        layers = dict(self.model.named_modules(remove_duplicate=False)) if fresh else {}
        for key, spot in fresh.items():
            self.sites[key] = (ExpertSite if spot.parameter else Site)(self, spot, layers[spot.path])
        return [self.sites[key].wired(wiring) for key, (_, wiring) in spots.items()]

    def _start(self, edit: Edit, places, seed, dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        # Drawn on the CPU, so that a seed means the same on every device; on meta only shapes are wanted.
        device = self.device
        home = torch.device("meta" if device.type == "meta" else "cpu")
        usual = torch.get_default_device() == home  # naming it all the same would slow every call
        with (
            torch.random.fork_rng(devices=[], enabled=seed is not None),
            contextlib.nullcontext() if usual else home,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            with torch.no_grad():
                common = edit.shared(places)
                made = {p.key: start_weights(edit, p) for p in places}

        def settle(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else None)

        return {k: settle(v) for k, v in common.items()}, {
            p: {k: settle(v) for k, v in w.items()} for p, w in made.items()
        }

    def _empty(self, key: str) -> None:
        site = self.sites.pop(key)
        site.wear["none"] = Wear({})
        site.places["none"] = site.place
        site.drop("none")

    def shelve(self, name: str, edit: Edit, at: str | Iterable[str] | None, tensors: Mapping[str, Tensor]) -> Host:
        """Keep an adapter that will be worn and neither trained nor read: folded into one vector, nothing of it in the
        model. It costs the same however many there are, and a plan names it like any other. On rows that wear several,
        shelved adapters come after hung ones, in the order of their names.

        Args:
            at: a placement; the method's own by default.
            tensors: by the names that `tensors` of a hung one gives; one missing, left over or of another shape is an
                error.
        """
        return self._shelve(name, edit, at, tensors, check=True)

    def keep(self, name: str, edit: Edit, at: Iterable[str], tensors: Mapping[str, Tensor]) -> Host:
        """As `shelve`, for tensors that are right by construction: of an edit that has no start of its own."""
        return self._shelve(name, edit, at, tensors, check=False)

    def _shelve(self, name: str, edit: Edit, at, tensors: Mapping[str, Tensor], check: bool) -> Host:
        self._free(name)
        self.shelf.place(name, edit, at if at is None or isinstance(at, str) else tuple(at), tensors, check)
        self._enter(name, edit)
        return self

    def remove(self, name: str) -> Host:
        """Take an adapter off; rows that wore it go bare."""
        self._known(name)
        self.shelf.pop(name, None)
        for key in [k for k, s in self.sites.items() if name in s.places]:
            if self.sites[key].drop(name, stay=bool(self.shelf)):
                del self.sites[key]
        if name in self.common:
            del self.common[name]
            delattr(self.model, f"inlay_{name}")
        self._leave(name)
        self._choose(tuple(tuple(n for n in names if n != name) for names in self.plan), self.side)
        return self

    def detach(self) -> nn.Module:
        """Take everything off and leave the model as it was found."""
        for name in list(self.edits):
            self.remove(name)
        for key in list(self.sites):  # of adapters that were only shelved
            self._empty(key)
        for hook in self._hooks:
            hook.remove()
        replay.unwrap(self._checkpointed)
        for p in self._trainable:
            p.requires_grad_(True)
        object.__delattr__(self.model, "_inlay_host")
        return self.model

    # ---- who wears what ----------------------------------------------------------------------------------------------
    def use(self, *plan: str | tuple[str, ...] | None, side: Mapping[str, Tensor] | None = None) -> Host:
        """Choose what each row wears from now on.

        `use("math")` for every row, `use("math", None, "chat")` one per row (None: the bare model),
        `use("prefix+lora")` or `use(("prefix", "lora"))` several on one row, applied in the order in which they were
        hung.

        Args:
            side: further inputs per row (B, ...), for methods that read them.
        """
        self._choose(read_plan(plan or (None,), self.edits), dict(side or {}))
        return self

    def _choose(self, plan: tuple[Worn, ...], side: dict[str, Tensor]) -> None:
        # Routed here and not in the forward, so that a compiled graph meets tensors and never a plan.
        self.plan, self.side, self.now, self._bare = plan, side, Route(), not any(plan)
        if not self._steady:
            self.folds.forget()
        self._ready = None if self._bare else Ready(self, len(plan))

    @contextlib.contextmanager
    def using(self, *plan: str | tuple[str, ...] | None, side: Mapping[str, Tensor] | None = None) -> Iterator[Host]:
        """`use` for the length of a with-block."""
        before = self.plan, self.side
        try:
            yield self.use(*plan, side=side)
        finally:
            self._choose(tuple(tuple(n for n in names if n in self.edits) for names in before[0]), before[1])

    @contextlib.contextmanager
    def steady(self) -> Iterator[Host]:
        """In this block nobody changes adapters' tensors through `Tensor.data`: what `use` prepares is kept."""
        self._steady += 1
        try:
            yield self
        finally:
            self._steady -= 1

    @contextlib.contextmanager
    def packed(self, layout: Layout) -> Iterator[Host]:
        """Forwards in this block are packed batches of that layout; the plan names one entry per sequence.

        The caller gives ids, position ids and attention that keeps sequences apart (`inlay.engine`).
        """
        self.forward.layout = layout
        try:
            yield self
        finally:
            self.forward.layout = None

    @contextlib.contextmanager
    def prompts(self, tokens_B: Sequence[int] | Tensor) -> Iterator[Host]:
        """In this block, so many tokens of each row are its prompt, for edits that ask where it ends.

        Without it a prompt ends before the first label, or where the first forward of a KV cache ends. So tell it when
        generating without a cache, or when scoring answers without labels. Packed forwards know it from their layout.
        """
        before, self.forward.prompt_B = self.forward.prompt_B, torch.as_tensor(tokens_B, device=self.device)
        try:
            yield self
        finally:
            self.forward.prompt_B = before

    @contextlib.contextmanager
    def decoder_only(self) -> Iterator[Host]:
        """In this block a forward begins where the model calls its decoder (`base_model`), not at the model's own top:
        whatever stands there may first take the batch apart."""
        self.forward.decoder_only = True
        try:
            yield self
        finally:
            self.forward.decoder_only = False

    def lay_out(
        self,
        lengths: Sequence[int],
        parents: Sequence[int | None] | None = None,
        width: int | None = None,
        prompts: Sequence[int | None] | None = None,
    ) -> Layout:
        """Where sequences under the present plan stand in a packed batch (see `inlay.core.layout.lay_out`)."""
        return lay_out(lengths, spread(self.plan, len(lengths)), self.edits, parents, width, prompts).to(self.device)

    def _known(self, name: str) -> None:
        if name not in self.edits:
            raise unknown("adapter", name, self.edits, "Hang it first with add() or load().")

    def _hung(self, name: str) -> None:
        self._known(name)
        if name in self.shelf:
            raise InlayError(f"{name!r} is shelved: folded for serving. Load it onto the model to read or train it")

    # ---- an adapter as plain data ------------------------------------------------------------------------------------
    def tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors, `3.q/A` for place 3.q and `shared/...` for what its places share."""
        self._hung(name)
        shared = self.common[name].tensors() if name in self.common else {}
        own = {
            f"{key}/{k}": v
            for key, s in self.sites.items()
            if name in s.places
            for k, v in s.wear[name].tensors().items()
        }  # type: ignore
        return {f"shared/{k}": v for k, v in shared.items()} | own

    def by_place(self, name: str) -> dict[str, Weights]:
        """Place key -> the tensors its edit sees there."""
        self._hung(name)
        return {key: s.tensors(name) for key, s in self.sites.items() if name in s.places}

    def placement(self, name: str) -> list[str]:
        """Where an adapter hangs, in the placement language: `3.down:parallel`, or `3.q` where there is one wiring."""
        self._hung(name)
        return [f"{key}:{s.places[name].wiring}".rstrip(":") for key, s in self.sites.items() if name in s.places]

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """What is trained of these adapters (of all, if none is named)."""
        every = names or [n for n in self.edits if n not in self.shelf]
        found = {id(t): t for n in every for t in self.tensors(n).values() if isinstance(t, nn.Parameter)}
        return list(found.values())

    def count(self, name: str) -> int:
        """Trainable numbers of an adapter."""
        return sum(p.numel() for p in self.parameters(name))

    @torch.no_grad()
    def fill(self, name: str, values: Mapping[str, Tensor]) -> Host:
        """Set an adapter's tensors; one missing, left over or of another shape is an error and changes nothing."""
        mine = self.tensors(name)
        same_shapes(name, {k: t.shape for k, t in mine.items()}, {k: t.shape for k, t in values.items()})
        only_finite(name, values)
        for k, p in mine.items():
            p.copy_(values[k])
        return self

    # ---- one forward -------------------------------------------------------------------------------------------------
    def precision(self, y: Tensor, worn: Iterable[WornHere]) -> torch.dtype:
        """The type in which these edits of y are computed; their result is rounded once, to y's type."""
        if y.dtype.itemsize > 2 or (self.fast and all(edit.coarse is not None for _, edit, _, _ in worn)):
            return y.dtype
        return torch.float32 if y.is_floating_point() else y.dtype
