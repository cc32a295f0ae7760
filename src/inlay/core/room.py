"""Reserved columns: virtual tokens stand in extra columns on a row's left, which no caller ever sees.

At the top of a forward whose plan needs room, ids, mask, labels and positions are widened; on the way out the extra
columns are cut off again. Each row's columns stand right before its first token, after its left padding:

    [pad pad | room room room | tokens]

So prompt tuning is an edit at the embedding and prefix tuning an edit at k and v, in any decoder, under gradient
checkpointing, without a KV cache, and in the same batch as every other method.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from inlay.compat import kv_cache
from inlay.compat.transformers import COLUMNS, per_token, places_media
from inlay.core.edit import Edit
from inlay.core.errors import InlayError
from inlay.core.route import Worn


@dataclass(frozen=True)
class Room:
    """How much room each row of a batch needs, and for whom."""

    wide: int
    """Columns added to the batch: the widest row's."""
    need_B: Tensor
    offset: Mapping[str, Tensor]
    """adapter -> where its own columns begin after the row's first reserved one (B,)."""
    position_BR: Tensor
    """Position id of each reserved column, counted from the row's first one (B, wide)."""
    prompted: bool = False
    """Whether somebody asks where prompts end."""


def plan_room(rows: Sequence[Worn], edits: Mapping[str, Edit], device: torch.device) -> Room | None:
    """Lay out the reserved columns of a batch; None if nobody needs any."""
    need, positions = [], []
    offset = {n: [0] * len(rows) for n in edits if edits[n].positional and any(n in names for names in rows)}
    for row, names in enumerate(rows):
        columns: list[int] = []
        for n in (n for n in edits if n in names):
            if n in offset:
                offset[n][row] = len(columns)
            columns += (
                [0] * edits[n].room
                if edits[n].room_positions == "zero"
                else range(len(columns), len(columns) + edits[n].room)
            )
        for n in (n for n in offset if edits[n].prompted):
            offset[n][row] = len(columns)
        need.append(len(columns))
        positions.append(columns)
    wide = max(need, default=0)
    if not offset:
        return None
    return Room(
        wide,
        torch.tensor(need, device=device),
        {n: torch.tensor(v, device=device) for n, v in offset.items()},
        torch.tensor([c + [0] * (wide - len(c)) for c in positions], device=device, dtype=torch.long),
        any(edits[n].prompted for n in offset),
    )


def widen(model: nn.Module, args: tuple, kwargs: dict, room: Room, seen: int) -> tuple[dict, Tensor, Tensor]:
    """(keyword arguments with room made, first reserved column of each row (B,), tokens of each row's prompt (B,)).

    `seen` counts the cache's columns, reserved ones included; a step that continues a cache gets its mask and positions
    widened, but no new columns, and its prompt is behind it (0).

    Raises:
        InlayError: an argument is not of a form that can be widened, or the mask and the cache disagree on what was
            seen before.
    """
    names = kv_cache.parameters(model)
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **(given.pop(names.rest, {}) if names.rest else {})}
    ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    batch, tokens = ids.shape[:2]
    new = room.wide if not seen else 0
    before = seen - room.wide if seen else 0
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones((batch, before + tokens), dtype=torch.long, device=ids.device)
    _check(model, given, mask, batch, tokens, before)
    own_B = mask.to(torch.int8).argmax(-1)
    prompt_B = _prompt(mask, own_B, given.get("labels")) if not seen else torch.zeros_like(own_B)
    first_B = own_B + room.wide - room.need_B
    if not room.wide:
        return given, first_B, prompt_B
    wide_mask = pad(mask, (room.wide, 0))
    column = torch.arange(wide_mask.shape[1], device=mask.device)
    reserved = (column >= first_B[:, None]) & (column < (first_B + room.need_B)[:, None])
    given["attention_mask"] = wide_mask | reserved.to(wide_mask)
    if "position_ids" in names.names:
        old = given.get("position_ids")
        if old is None:
            old = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        # (B, T), or (P, B, T) where a position has several parts (M-RoPE): virtual tokens are text, all parts alike.
        position = pad(old.expand(*old.shape[:-2], batch, -1) + room.need_B[:, None], (new, 0))
        if new:
            inside = (column - first_B[:, None]).clamp(0, max(room.wide - 1, 0))
            position = torch.where(reserved, room.position_BR.gather(1, inside), position)
        given["position_ids"] = position
    if given.get("cache_position") is not None:  # until transformers 5.3
        given["cache_position"] = torch.arange(seen, seen + new + tokens, device=ids.device)
    for name, value in COLUMNS.items():
        if isinstance(given.get(name), Tensor) and new:
            given[name] = pad(given[name], (new, 0), value=value)
    if given.get("inputs_embeds") is not None and new:
        given["inputs_embeds"] = pad(given["inputs_embeds"], (0, 0, new, 0))
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor):
        given["logits_to_keep"] = torch.where(keep < 0, keep, keep + new)
    elif isinstance(keep, int):
        given["logits_to_keep"] = min(keep, tokens)
    return given, first_B, prompt_B


def _check(model: nn.Module, given: Mapping[str, Any], mask: Any, batch: int, tokens: int, before: int) -> None:
    """Raise InlayError for what cannot be widened; `before` counts the tokens that a KV cache holds of each row."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise InlayError(
            "virtual tokens and edits of single positions need a 2-D attention mask; static caches hand the model a "
            "4-D one: use a dynamic cache"
        )
    if mask.shape[1] != before + tokens:
        raise InlayError(
            f"the attention mask has {mask.shape[1]} columns, and {type(model).__name__} was given {tokens} tokens and "
            f"{f'a KV cache of {before}' if before else 'no KV cache that Inlay knows'}; {kv_cache.CURE}"
        )
    if before:
        return
    if name := per_token(given, batch, tokens):
        raise InlayError(
            f"{name!r} of {type(model).__name__} has an entry per token, and Inlay does not know which one a virtual "
            f"token gets; leave it out, or adapters with virtual tokens"
        )
    if given.get("position_ids") is None and places_media(model, given):
        raise InlayError(
            f"{type(model).__name__} finds the positions of pictures itself, without virtual tokens; give position_ids "
            f"(model.get_rope_index computes them)"
        )


def _prompt(mask: Tensor, own_B: Tensor, labels: Tensor | None) -> Tensor:
    """A row's prompt ends where its first label stands; without labels all of it is prompt."""
    whole_B = mask.sum(-1)
    if labels is None:
        return whole_B
    learned = labels != -100
    return torch.where(learned.any(-1), learned.to(torch.int8).argmax(-1) - own_B, whole_B)


def strip(out, tokens: int, wide: int):
    """Cut the reserved columns off whatever runs over columns in a model's output."""

    def cut(t):
        if isinstance(t, Tensor) and t.dim() >= 3 and t.shape[1] == tokens + wide:
            return t[:, wide:]
        return t

    if isinstance(out, tuple):
        return tuple(cut(t) for t in out)
    for name in ("logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            out[name] = cut(out[name])
    if getattr(out, "hidden_states", None) is not None:
        out["hidden_states"] = tuple(cut(t) for t in out["hidden_states"])
    return out
