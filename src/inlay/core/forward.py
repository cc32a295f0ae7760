"""One forward of a host's model: the plan becomes a route at its top, and reserved columns are cut off at its end."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.compat import kv_cache
from inlay.core import cache_check, replay, room
from inlay.core.errors import InlayError
from inlay.core.layout import Layout
from inlay.core.ready import Ready
from inlay.core.route import Route, route_packed

if TYPE_CHECKING:
    from inlay.core.host import Host


class Forward:
    """The hooks around a model's forward, and what was said about the forwards to come."""

    def __init__(self, host: Host):
        self.host = host
        self.layout: Layout | None = None
        """Set while forwards are packed."""
        self.prompt_B: Tensor | None = None
        """Tokens of each row's prompt, where the caller told."""
        self.decoder_only = False
        """Whether a forward begins at the decoder and not at the model's own top."""
        self.checked: set[tuple] = set()
        """Edits and KV caches of which a cached step was compared with an uncached one (`inlay.core.cache_check`)."""
        self.checking = False
        """Whether forwards are such a comparison's."""
        self._depth = 0
        self._wide = 0
        self._checked: tuple | None = None
        """The plan whose places were last looked at."""

    def begin(self, model: nn.Module, args: tuple, kwargs: dict):
        if self.decoder_only and model is self.host.model:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        caches = kv_cache.given(model, args, kwargs)
        if self.layout is not None:
            if caches:
                raise InlayError(f"a packed forward has no KV cache: leave {caches[0].name} and use_cache out")
            self.host.now = self._routed_packed(self.layout, model.training)
            return None
        if self.host._bare:
            self.host.now = Route()
            _same_room(caches, 0)
            return None
        ids = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        if self.host._checkpointed and torch.is_grad_enabled():
            replay.wrap(self.host, self.host._checkpointed)
        batch = ids.shape[0]
        if self.host._ready is None or self.host._ready.batch != batch:  # beam search repeats the rows of the plan
            self.host._ready = Ready(self.host, batch)
        base, space = self.host._ready.route(self.host, model.training), self.host._ready.room
        side = {k: v.repeat_interleave(batch // len(v), 0) for k, v in self.host.side.items()}
        self.host.now = replace(base, training=model.training, side=side)
        _same_room(caches, space.wide if space else 0)
        if space is None:
            return None
        past = kv_cache.served(model, kwargs, caches)
        seen = kv_cache.length(past) if past is not None else 0
        if (place_B := getattr(past, "place_B", None)) is not None:
            # A cache of slots: each row is at a place of its own, and its virtual tokens were given among the ids.
            first = {n: seen - place_B + offset for n, offset in space.offset.items()}
            fed_B = torch.where(place_B > 0, 0, place_B + ids.shape[1] - space.need_B)
            self.host.now = replace(self.host.now, seen=seen, first=first, side=side | self._prompt(space, fed_B))
            return None
        if seen and space.wide and not hasattr(past, "_inlay_wide"):
            raise InlayError("this KV cache was made without virtual tokens; start from an empty cache after use()")
        if past is not None:
            cache_check.check(self.host, model, past)
        kwargs, first_B, prompt_B = room.widen(model, args, kwargs, space, seen)
        first = {n: first_B + offset for n, offset in space.offset.items()}
        self.host.now = replace(self.host.now, seen=seen, first=first, side=side | self._prompt(space, prompt_B))
        self._wide = 0 if seen else space.wide
        if past is not None and not seen:
            past._inlay_wide = space.wide
        return (), kv_cache.renamed(model, kwargs)

    def reserved(self, batch: int) -> int:
        """Columns that the present plan reserves in a batch of so many rows."""
        space = Ready(self.host, batch).room
        return space.wide if space else 0

    def _prompt(self, space: room.Room, found_B: Tensor) -> dict[str, Tensor]:
        """Where prompts end, for those who ask: as told, or as found in the forward's arguments."""
        if not space.prompted:
            return {}
        told = self.prompt_B
        return {"prompt": found_B if told is None else told.repeat_interleave(len(found_B) // len(told))}

    def _routed_packed(self, layout: Layout, training: bool) -> Route:
        if self.host._checkpointed and torch.is_grad_enabled():
            replay.wrap(self.host, self.host._checkpointed)
        with torch.inference_mode(False):
            made = route_packed(self.host.plan, self.host.order, layout)
            owner = layout.owner_RW.flatten().clamp(min=0)
            side = {k: v[owner // (len(layout.length_N) // len(v))] for k, v in self.host.side.items()}
            if any(self.host.edits[n].prompted for names in self.host.plan for n in names):
                side["prompt"] = torch.tensor(layout.prompt_N, device=owner.device)[owner]
        return replace(made, training=training, side=side)

    def end(self, model: nn.Module, args: tuple, kwargs: dict, out):
        if self.decoder_only and model is self.host.model:
            return None
        self._depth -= 1
        if self._depth:
            return None
        wide, self._wide = self._wide, 0
        if out is None:  # it failed on its way: nothing of it may reach the next one
            for site in self.host.sites.values():
                site.recover()
        elif not torch.compiler.is_compiling() and self._checked is not self.host.plan and not self.decoder_only:
            self._checked = self.host.plan
            self._warn_of_uncalled()
        if not wide or out is None:
            return None
        if hasattr(cache := kv_cache.returned(out), "__dict__"):
            cache._inlay_wide = wide
        ids = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        return room.strip(out, ids.shape[1] - wide, wide)

    def _warn_of_uncalled(self) -> None:
        """Say which places of the adapters in use this forward did not call: adapters do nothing there."""
        worn = {n for names in self.host.plan for n in names}
        sites = [s for s in self.host.sites.values() if not s.spot.tower and not worn.isdisjoint(s.places)]
        if quiet := [s for s in sites if not s.called]:
            some = ", ".join(s.spot.key for s in quiet[:6]) + (" ..." if len(quiet) > 6 else "")
            names = " and ".join(sorted({repr(n) for s in quiet for n in worn if n in s.places}))
            what = f"{len(quiet)} of {len(sites)} places are in layers that this forward did not call: {some}"
            warnings.warn(f"{names} did nothing at some places; {what}", stacklevel=2)


def _same_room(caches: list[kv_cache.Argument], wide: int) -> None:
    """A KV cache carries the reserved columns it was made with; another plan would miscount them."""
    if any(getattr(c.value, "_inlay_wide", wide) != wide for c in caches):
        raise InlayError("this KV cache was made under another plan; start from an empty cache after use()")
