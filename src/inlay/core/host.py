"""The engine: a frozen decoder wearing adapters, each row of a batch its own.

What happens to a batch: `_begin` (top of the forward) turns the plan into a route and makes room for virtual tokens;
each `Site` sends its rows through their edits; `_end` cuts the room off again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import replay, room
from inlay.core.edit import Edit, Weights
from inlay.core.errors import InlayError, unknown
from inlay.core.layout import Layout, lay_out
from inlay.core.place import Anatomy, locate
from inlay.core.route import STRATEGIES, Route, Worn, read_plan, route, route_packed, spread
from inlay.core.site import Site, Wear


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

    def __init__(self, model: Any, anatomy: Anatomy, strategy: str = "gather", fast: bool = False):
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
        if isinstance(getattr(model, "_inlay_host", None), Host):
            raise InlayError("this model already has a host; use inlay.host_of(model), or detach it first")
        self.model = model
        self.anatomy, self.strategy, self.fast = anatomy, strategy, fast
        config = (
            self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else self.model.config
        )
        self.hidden: int = config.hidden_size
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.edits: dict[str, Edit] = {}
        self.sites: dict[str, Site] = {}
        self.common: dict[str, Wear] = {}
        self.now = Route()
        self.plan: tuple[Worn, ...] = ((),)
        self.side: dict[str, Tensor] = {}
        self._bare = True
        self._depth = 0
        self._wide = 0
        self._layout: Layout | None = None
        self._decoder_only = False
        self._ready: tuple[Route, room.Room | None] | None = None
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._checkpointed = replay.checkpointed(model)
        heads = [model, *([inner] if (inner := getattr(model, "base_model", model)) is not model else [])]
        self._hooks = [m.register_forward_pre_hook(self._begin, with_kwargs=True) for m in heads]
        self._hooks += [m.register_forward_hook(self._end, with_kwargs=True, always_call=True) for m in heads]
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
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InlayError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'")
        if name in self.edits:
            raise InlayError(
                f"this model already wears {name!r}; remove() it first, or choose another name ({sorted(self.edits)})"
            )
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
        fresh = [k for k in spots if k not in self.sites]
        try:
            places = []
            for key, (spot, wiring) in spots.items():
                if key not in self.sites:
                    self.sites[key] = Site(self, spot, self.model.get_submodule(spot.path))
                places.append(replace(self.sites[key].place, wiring=wiring))
            common, made = self._start(edit, places, seed, dtype)
        except BaseException:
            for key in fresh:
                if key in self.sites:
                    self._empty(key)
            raise
        self.edits[name] = edit
        if common:
            self.common[name] = Wear(common)
            self.model.add_module(f"inlay_{name}", self.common[name])
        for place in places:
            if made[place.key]:
                self.sites[place.key].hang(name, place.wiring, made[place.key])
            elif common:
                self.sites[place.key].hang(name, place.wiring, {})
            elif not self.sites[place.key].wear:
                self._empty(place.key)
        if not any(name in s.places for s in self.sites.values()):
            self.edits.pop(name)
            some = ", ".join(list(spots)[:4])
            raise InlayError(
                f"{edit.kind} has nothing to train at {some}{' ...' if len(spots) > 4 else ''}; see its settings"
            )
        self._ready = None
        return self

    def _start(self, edit: Edit, places, seed, dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        # Drawn on the CPU, so that a seed means the same on every device; on meta only shapes are wanted.
        device = self.device
        with (
            torch.random.fork_rng(devices=[], enabled=seed is not None),
            torch.device("meta" if device.type == "meta" else "cpu"),
        ):
            if seed is not None:
                torch.manual_seed(seed)
            with torch.no_grad():
                common = edit.shared(places)
                made = {p.key: edit.weights(p) for p in places}

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

    def remove(self, name: str) -> Host:
        """Take an adapter off; rows that wore it go bare."""
        self._known(name)
        for key in [k for k, s in self.sites.items() if name in s.places]:
            if self.sites[key].drop(name):
                del self.sites[key]
        if name in self.common:
            del self.common[name]
            delattr(self.model, f"inlay_{name}")
        del self.edits[name]
        self._choose(tuple(tuple(n for n in names if n != name) for names in self.plan), self.side)
        return self

    def detach(self) -> nn.Module:
        """Take everything off and leave the model as it was found."""
        for name in list(self.edits):
            self.remove(name)
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
        self._ready = None if self._bare else self._routed(len(plan))

    @contextlib.contextmanager
    def using(self, *plan: str | tuple[str, ...] | None, side: Mapping[str, Tensor] | None = None) -> Iterator[Host]:
        """`use` for the length of a with-block."""
        before = self.plan, self.side
        try:
            yield self.use(*plan, side=side)
        finally:
            self._choose(tuple(tuple(n for n in names if n in self.edits) for names in before[0]), before[1])

    @contextlib.contextmanager
    def packed(self, layout: Layout) -> Iterator[Host]:
        """Forwards in this block are packed batches of that layout; the plan names one entry per sequence.

        The caller gives ids, position ids and attention that keeps sequences apart (`inlay.engine`).
        """
        self._layout = layout
        try:
            yield self
        finally:
            self._layout = None

    @contextlib.contextmanager
    def decoder_only(self) -> Iterator[Host]:
        """In this block a forward begins where the model calls its decoder (`base_model`), not at the model's own top:
        whatever stands there may first take the batch apart."""
        self._decoder_only = True
        try:
            yield self
        finally:
            self._decoder_only = False

    def lay_out(
        self, lengths: Sequence[int], parents: Sequence[int | None] | None = None, width: int | None = None
    ) -> Layout:
        """Where sequences under the present plan stand in a packed batch (see `inlay.core.layout.lay_out`)."""
        return lay_out(lengths, spread(self.plan, len(lengths)), self.edits, parents, width).to(self.device)

    def _known(self, name: str) -> None:
        if name not in self.edits:
            raise unknown("adapter", name, self.edits, "Hang it first with add() or load().")

    # ---- an adapter as plain data ------------------------------------------------------------------------------------
    def tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors, `3.q/A` for place 3.q and `shared/...` for what its places share."""
        self._known(name)
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
        self._known(name)
        return {key: s.tensors(name) for key, s in self.sites.items() if name in s.places}

    def placement(self, name: str) -> list[str]:
        """Where an adapter hangs, in the placement language: `3.down:parallel`, or `3.q` where there is one wiring."""
        self._known(name)
        return [f"{key}:{s.places[name].wiring}".rstrip(":") for key, s in self.sites.items() if name in s.places]

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """What is trained of these adapters (of all, if none is named)."""
        found = {id(t): t for n in names or self.edits for t in self.tensors(n).values() if isinstance(t, nn.Parameter)}
        return list(found.values())

    def count(self, name: str) -> int:
        """Trainable numbers of an adapter."""
        return sum(p.numel() for p in self.parameters(name))

    @torch.no_grad()
    def fill(self, name: str, values: Mapping[str, Tensor]) -> Host:
        """Set an adapter's tensors; one missing, left over or of another shape is an error and changes nothing."""
        mine = self.tensors(name)
        problems = [f"missing {k}" for k in mine.keys() - values.keys()] + [
            f"unexpected {k}" for k in values.keys() - mine.keys()
        ]
        problems += [
            f"{k} is {tuple(values[k].shape)}, wanted {tuple(mine[k].shape)}"
            for k in mine.keys() & values.keys()
            if values[k].shape != mine[k].shape
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise InlayError(f"these tensors are not those of {name!r}: {'; '.join(sorted(problems)[:4])}{more}")
        for k, p in mine.items():
            p.copy_(values[k])
        return self

    # ---- one forward -------------------------------------------------------------------------------------------------
    def precision(self, y: Tensor, names: Iterable[str]) -> torch.dtype:
        """The type in which these adapters' edits of y are computed; their result is rounded once, to y's type."""
        coarse = self.fast and all(self.edits[n].coarse is not None for n in names)
        return y.dtype if coarse or not y.is_floating_point() else torch.promote_types(torch.float32, y.dtype)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict):
        if self._decoder_only and model is self.model:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        past = kwargs.get("past_key_values")
        if self._layout is not None:
            if past is not None:
                raise InlayError("a packed forward has no KV cache: leave past_key_values and use_cache out")
            self.now = self._routed_packed(self._layout, model.training)
            return None
        if self._bare:
            self.now = Route()
            _same_room(past, 0)
            return None
        ids = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        if self._checkpointed and torch.is_grad_enabled():
            replay.wrap(self, self._checkpointed)
        batch = ids.shape[0]
        if self._ready is None or self._ready[0].batch != batch:  # beam search repeats the rows of the plan
            self._ready = self._routed(batch)
        base, space = self._ready
        side = {k: v.repeat_interleave(batch // len(v), 0) for k, v in self.side.items()}
        self.now = replace(base, training=model.training, side=side)
        _same_room(past, space.wide if space else 0)
        if space is None:
            return None
        seen = int(past.get_seq_length()) if past is not None else 0
        if (place_B := getattr(past, "place_B", None)) is not None:
            # A cache of slots: each row is at a place of its own, and its virtual tokens were given among the ids.
            first = {n: seen - place_B + offset for n, offset in space.offset.items()}
            self.now = replace(self.now, seen=seen, first=first)
            return None
        if seen and not hasattr(past, "_inlay_wide"):
            raise InlayError("this KV cache was made without virtual tokens; start from an empty cache after use()")
        kwargs, first_B = room.widen(model, args, kwargs, space, seen)
        first = {n: first_B + offset for n, offset in space.offset.items()}
        self.now = replace(self.now, seen=seen, first=first)
        self._wide = 0 if seen else space.wide
        if past is not None and not seen:
            past._inlay_wide = space.wide
        return (), kwargs

    def _routed_packed(self, layout: Layout, training: bool) -> Route:
        if self._checkpointed and torch.is_grad_enabled():
            replay.wrap(self, self._checkpointed)
        with torch.inference_mode(False):
            made = route_packed(self.plan, list(self.edits), layout)
            owner = layout.owner_RW.flatten().clamp(min=0)
            side = {k: v[owner // (len(layout.length_N) // len(v))] for k, v in self.side.items()}
        return replace(made, training=training, side=side)

    def _routed(self, batch: int) -> tuple[Route, room.Room | None]:
        with torch.inference_mode(False):  # a plan made while evaluating may be trained under later
            made = route(self.plan, list(self.edits), batch, self.device)
            return made, room.plan_room(spread(self.plan, batch), self.edits, self.device)

    def _end(self, model: nn.Module, args: tuple, kwargs: dict, out):
        if self._decoder_only and model is self.model:
            return None
        self._depth -= 1
        if self._depth or not self._wide or out is None:
            return None
        wide, self._wide = self._wide, 0
        if (cache := getattr(out, "past_key_values", None)) is not None:
            cache._inlay_wide = wide
        ids = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        return room.strip(out, ids.shape[1] - wide, wide)


def _same_room(past: Any, wide: int) -> None:
    """A KV cache carries the reserved columns it was made with; another plan would miscount them."""
    if past is not None and getattr(past, "_inlay_wide", wide) != wide:
        raise InlayError("this KV cache was made under another plan; start from an empty cache after use()")
