"""A KV cache of slots: rows come and go, each at a place of its own, and nothing is moved when one makes room for
another.

    slot 0   [room room | a a a a a a . . . .]        every row begins at column 0 and has its own length;
    slot 1   [b b b b b b b b b . . . . . . .]        columns beyond it (.) hold what is left of earlier rows,
    slot 2   [c c . . . . . . . . . . . . . .]        and nobody sees them

A forward feeds some of the rows further tokens: whole prompts, what follows a shared beginning, or one token each.
Virtual tokens are fed like others, before the first token of their row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from inlay.compat import kv_cache
from inlay.compat.transformers import attention_name, has_attention_interface, set_attention_name, unserved
from inlay.core import cache_check
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.room import plan_room
from inlay.core.rounding import rounding
from inlay.core.route import Worn
from inlay.engine.attention import additive, attending, grouped
from inlay.engine.linear import fast_linears
from inlay.engine.pack import twice_biased
from inlay.engine.reorder import Reordered
from inlay.evaluate.batches import Tried, quiet, takes

REORDER = 64
"""Steps that take as long as reordering a base's weights: who comes so far will mostly take many more."""


class Slots(Cache):
    """Keys and values of rows that come and go, and the forwards that feed them.

    Args:
        host: its plan names, at each forward, what the rows fed wear. Forwards run inside `with slots.attending():`.
        most: columns that no row will ever outgrow, virtual tokens included.
    """

    def __init__(self, host: Host, slots: int, most: int):
        super().__init__(layers=[])
        self.host = host
        self.most = most + 1  # the last column takes the keys of padding
        self.length = [0] * slots
        self.place_B: Tensor = torch.zeros(0)
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._capacity = 0
        self._rows: slice | Tensor = slice(0)
        self._column_BT = self._index_B = self.place_B
        self._sees: dict[int | None, Tensor] = {}
        self._steps = 0
        self._reordered: Reordered | None = None
        self._columns = self._tokens = 0
        self._attention: str | None = None
        self._with_positions, self._with_keep = takes(host, "position_ids", "logits_to_keep")

    # ---- what a decoder asks of its cache ----------------------------------------------------------------------------
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Write the new keys and values (B, H, T, D) to their columns; all columns in use of the rows fed."""
        while len(self._buffers) <= layer_idx:
            self._buffers.append(
                tuple(t.new_zeros(len(self.length), t.shape[1], 0, t.shape[3]) for t in (key_states, value_states))  # type: ignore[arg-type]
            )
        if self._buffers[layer_idx][0].shape[2] < self._capacity:
            self._buffers[layer_idx] = tuple(_longer(t, self._capacity) for t in self._buffers[layer_idx])  # type: ignore[assignment]
        found = []
        for kept, new in zip(self._buffers[layer_idx], (key_states, value_states), strict=True):
            kept[self._index_B[:, None], :, self._column_BT] = new.transpose(1, 2)
            found.append(kept[self._rows, :, : self._columns])
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this forward's, counted from the longest row."""
        return self._columns - self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns in use, 0)."""
        return self._columns, 0

    # ---- forwards ----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Within the block, the base attends to slots, and its products are as fast as they get."""
        interface = has_attention_interface(self.host.model)

        def mask(*args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor | None:
            return None if interface else additive(self.sees(None), dtype)

        model = self.host.model
        self._attention = attention_name(model.config)
        if self.due:
            made = Reordered(model, len(self.length))
            self._reordered = made if made.fits() else Reordered()
        with (
            attending(self.host, f"inlay-slots-{id(self)}", self._attend, mask),
            self._reordered.active() if self._reordered is not None else contextlib.nullcontext(),
            fast_linears(model),
        ):
            yield

    @property
    def due(self) -> bool:
        """Whether entering `attending` anew would make the next steps faster."""
        return self._steps >= REORDER and self._reordered is None

    def begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], worn: Sequence[Worn]) -> Tensor:
        """Feed new rows, virtual tokens before their prompts; logits (B, V) of their next tokens."""
        for s in slots:
            self.length[s] = 0
        space = plan_room(worn, self.host.edits, torch.device("cpu"))
        if space is not None:
            cache_check.once(self.host, self.host.model, Slots, functools.partial(_tried, self.host, self._attention))
        need = [0] * len(slots) if space is None else space.need_B.tolist()
        ids = [[0] * n + list(p) for n, p in zip(need, prompts, strict=True)]
        positions = [list(range(len(row))) for row in ids]
        for own, n, reserved in zip(positions, need, space.position_BR.tolist() if space else [], strict=False):
            own[:n] = reserved[:n]
        return self._feed(slots, ids, positions)

    def go_on(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed rows that have begun; logits (B, V) of their next tokens."""
        begun = [self.length[s] for s in slots]
        return self._feed(
            slots,
            tokens,
            [range(n, n + len(own)) for n, own in zip(begun, tokens, strict=True)],  # type: ignore[misc]
        )

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one token to each of the first B slots; logits (B, V)."""
        B, device = len(token_B), self.host.device
        self._steps += 1
        length_B = torch.tensor(self.length[:B]).to(device, non_blocking=True)
        self._columns, self._tokens = max(self.length[:B]) + 1, 1
        self._reserve(self._columns)
        self._rows, self._index_B = slice(0, B), torch.arange(B, device=device)
        self.place_B, self._column_BT = length_B, length_B[:, None]
        self._see(self._column_BT)
        for s in range(B):
            self.length[s] += 1
        return self._forward(token_B[:, None], self._column_BT)

    def _feed(self, slots: Sequence[int], ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
        device = self.host.device
        T = max(map(len, ids))
        pad = [T - len(own) for own in ids]
        begun = [self.length[s] for s in slots]
        self._columns, self._tokens = max(n + len(own) for n, own in zip(begun, ids, strict=True)), T
        self._reserve(self._columns)
        first = slots[0]
        together = list(slots) == list(range(first, first + len(slots)))
        self._index_B = torch.tensor(slots, device=device)
        self._rows = slice(first, first + len(slots)) if together else self._index_B
        place = torch.tensor([n - p for n, p in zip(begun, pad, strict=True)])
        column = place[:, None] + torch.arange(T)
        padding = torch.arange(T) < torch.tensor(pad)[:, None]
        self.place_B = place.to(device)
        self._column_BT = column.masked_fill(padding, self._capacity - 1).to(device)
        self._see(column.clamp(min=0).to(device))
        for s, own in zip(slots, ids, strict=True):
            self.length[s] += len(own)
        tokens, where = ([[0] * p + list(own) for p, own in zip(pad, rows, strict=True)] for rows in (ids, positions))
        return self._forward(torch.tensor(tokens, device=device), torch.tensor(where, device=device))

    def _forward(self, ids_BT: Tensor, position_BT: Tensor) -> Tensor:
        more: dict[str, Any] = {"position_ids": position_BT} if self._with_positions else {}
        if self._with_keep:
            more["logits_to_keep"] = 1
        # Decoders with ALiBi count keys from it; who sees whom comes from `sees`.
        cache = kv_cache.argument(self.host.model, self)
        begun = self.sees(None)[:, 0, -1].long()
        out = self.host.model(input_ids=ids_BT, attention_mask=begun, use_cache=True, **cache, **more)
        return out.logits[:, -1]

    # ---- attention ---------------------------------------------------------------------------------------------------
    def _see(self, last_BT: Tensor) -> None:
        """Each query sees the columns up to `last`."""
        self._last_BT = last_BT
        self._sees = {}

    def sees(self, window: int | None) -> Tensor:
        """True where a query sees a key (B, 1, T, columns); with a window, only the keys that are near enough."""
        if window not in self._sees:
            column = torch.arange(self._columns, device=self._last_BT.device)
            far = self._last_BT[..., None]
            seen = column <= far
            self._sees[window] = (seen if window is None else seen & (column > far - window))[:, None]
        return self._sees[window]

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """q (B, H, T, D), k and v (B, H_kv, columns, D) -> (B, T, H, D)."""
        if name := unserved(more):
            raise InlayError(f"attention with {name!r} is not served")
        near = sliding_window if sliding_window and sliding_window < self._columns else None
        return grouped(query, key, value, self.sees(near), scaling, softcap).transpose(1, 2), None

    # ---- columns -----------------------------------------------------------------------------------------------------
    def _reserve(self, columns: int) -> None:
        """Room for so many columns and one more; buffers at least double, so that little is ever copied."""
        if columns + 1 > self._capacity:
            self._capacity = max(columns + 1, min(2 * self._capacity, self.most))

    def copy(self, source: int, target: int) -> None:
        """Make a slot a copy of another."""
        n = self.length[target] = self.length[source]
        for kept in self._buffers:
            for t in kept:
                t[target, :, :n] = t[source, :, :n]

    def read(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """A slot's keys and values, to be written to slots later."""
        return [tuple(t[slot, :, : self.length[slot]].clone() for t in kept) for kept in self._buffers]  # type: ignore[misc]

    def write(self, slot: int, beginning: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Let a slot begin with what `read` gave."""
        n = self.length[slot] = beginning[0][0].shape[1]
        for kept, was in zip(self._buffers, beginning, strict=True):
            for t, w in zip(kept, was, strict=True):
                t[slot, :, :n] = w


def _longer(kept: Tensor, columns: int) -> Tensor:
    new = kept.new_zeros(*kept.shape[:2], columns, kept.shape[3])
    new[:, :, : kept.shape[2]] = kept
    return new


def _tried(host: Host, attention: str | None, draw: int) -> tuple[Tensor, Tensor]:
    """Logits (rows, V) of the last of a few tokens under the host's plan: in slots, and without a cache.

    Args:
        attention: the base's own; the present one is that of the slots which are about to begin.
    """
    rows, config = list(range(len(host.plan))), host.model.config
    ids = cache_check.tokens(host, len(rows), draw)
    columns = ids.shape[1] + host.forward.reserved(len(rows))
    now = attention_name(config)
    set_attention_name(config, attention)
    try:
        slots = Slots(host, len(rows), columns)
        with slots.attending():
            slots.begin(rows, ids[:, :-1].tolist(), host.plan)
            got = slots.step(ids[:, -1])
        with host.prompts([ids.shape[1] - 1] * len(rows)):
            want: Any = host.model(ids, use_cache=False)
    finally:
        set_attention_name(config, now)
    return got.float(), want.logits[:, -1].float()


def _refused(host: Host) -> str:
    """Rows of unlike length begin together, one goes on, another takes its place: as alone and without a cache?"""
    if twice_biased(host.model):
        return "this decoder's ALiBi cannot be had under another attention"
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = [[(7 * i + 3 * r + 1) % vocabulary for i in range(n)] for r, n in enumerate((3, 5, 4))]
    slots = Slots(host, 2, 8)
    try:
        with quiet(host), host.using(None):
            with slots.attending():
                slots.begin([0, 1], [ids[0][:2], ids[1][:3]], [(), ()])
                slots.go_on([1], [ids[1][3:4]])
                got = [slots.step(torch.tensor([ids[0][2], ids[1][4]], device=host.device))]
                slots.begin([0], [ids[2][:3]], [()])
                got.append(slots.go_on([0], [ids[2][3:]]))
            want = [host.model(torch.tensor([row], device=host.device), use_cache=False).logits[0, -1] for row in ids]
    except Exception as e:  # a decoder that nobody has seen may fail anywhere
        return f"{type(e).__name__}: {e}"
    off = (torch.cat(got).float() - torch.stack(want).float()).abs().max()
    near = rounding(host.dtype)
    return "" if off <= near * max(t.abs().max() for t in want) else f"this model's logits would change by {off:.2g}"


serves = Tried("generating in padded batches, not in slots", _refused)
"""Whether slots give a base's logits."""
