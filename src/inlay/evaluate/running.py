"""Rows decoded side by side in slots: a step feeds new rows or one token to each, and rows come and go between steps.

The one scheduler of generation: `inlay.evaluate.decode` gives it all rows at once, a server as requests arrive.
"""

from __future__ import annotations

import collections
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.engine.shared import LEAST
from inlay.evaluate import slots
from inlay.evaluate.batches import beginning, one_plan, quiet
from inlay.evaluate.rows import Generation, Row, Scored, end_ids, finish, pick

Begin = Callable[[Sequence[int], Sequence[Row]], Tensor]
"""Feeds new rows to free slots; logits (B, V) of their first tokens."""


class Running:
    """Rows that wait for a slot and rows that have one.

    Args:
        slots: rows decoded at a time.
        most: columns that no row will ever outgrow, virtual tokens included.
        prefill: most tokens of new rows that one step feeds, padding included, but for a row that is longer by itself;
            between two such steps, rows that have begun get a token each. None: all that slots are free for, at once.
    """

    def __init__(self, host: Host, tokenizer: Any, slots_: int, most: int, prefill: int | None = None):
        self.host, self.tokenizer, self.prefill = host, tokenizer, prefill
        self.cache = slots.Slots(host, slots_, most)
        self.ends = end_ids(host, tokenizer)
        self.waiting: collections.deque[Row] = collections.deque()
        self.live: list[Row | None] = []
        self.fed: list[Row] = []
        """Rows of the last forward, also if it failed."""
        self.begin: Begin = self._begin
        self.torn = False
        """Whether the last step failed after its forward, so that some of its rows may have got their token."""
        self._planned = False
        self._began = False
        self._where: dict[Row, int] = {}
        self._length: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or any(self.live)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Steps run inside this block; enter it anew when `cache.due`."""
        with quiet(self.host), self.host.steady(), self.host.using(None), self.cache.attending():
            self._planned = False
            yield

    def step(self) -> list[Row]:
        """One forward; the rows that have got a token by it. Those that are `done` have left their slots.

        If it raises, `again` feeds parts of `fed`, all of which stay where they are: in their slots, or in none yet.
        """
        if free := self._free():
            self.fed, where = [self.waiting.popleft() for _ in free], free
        else:
            self._close_up()
            self.fed, where = [row for row in self.live if row is not None], list(range(len(self.live)))
        self._began, self._length = bool(free), list(self.cache.length)
        self._where = dict(zip(self.fed, where, strict=True))
        self.torn = False
        if free:
            logits, self._planned = self.begin(free, self.fed), False
        else:
            if not self._planned:
                self.host.use(*one_plan([row.worn for row in self.fed]))
                self._planned = True
            last = torch.tensor([row.tokens[-1] for row in self.fed])
            logits = self.cache.step(last.to(self.host.device, non_blocking=True))
        return self._hear(logits, self.fed)

    def again(self, rows: Sequence[Row]) -> list[Row]:
        """Some rows of a step that failed in its forward (or it would be `torn`), by themselves."""
        return self._hear(self._fed_again([self._where[row] for row in rows], rows), rows)

    def try_on(self, row: Row, worn: Worn) -> None:
        """The forward of `again` for a row that wears something else: it raises or not, and nobody hears its token. The
        row cannot go on after that."""
        self._fed_again([self._where[row]], [replace(row, worn=worn)])

    def _fed_again(self, where: Sequence[int], rows: Sequence[Row]) -> Tensor:
        self.torn = False
        for s in where:
            self.cache.length[s] = self._length[s]
        self._planned = False
        if self._began:
            return self.begin(where, rows)
        self.host.use(*one_plan([row.worn for row in rows]))
        return self.cache.go_on(where, [row.tokens[-1:] for row in rows])

    def _hear(self, logits: Tensor, rows: Sequence[Row]) -> list[Row]:
        """Give each row its next token."""
        self.torn = True
        tokens = choose(logits, rows).tolist()
        score(logits, rows, tokens)
        for row, token in zip(rows, tokens, strict=True):
            s = self._where[row]
            self.live += [None] * (s + 1 - len(self.live))
            self.live[s] = row
            row.take(token, self.ends, self.tokenizer)
            if row.done:
                self.live[s], self._planned = None, False
        self.torn = False
        return list(rows)

    def drop(self, row: Row) -> None:
        """Let go of a row, wherever it is."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.live:
            self.live[self.live.index(row)], self._planned = None, False

    def result(self, row: Row) -> Generation:
        """What a row that is done has said."""
        return finish(row.tokens, self.tokenizer, self.ends, row.how.stop, row.stops)

    def _free(self) -> list[int]:
        """Slots for the rows that begin now."""
        if not self.waiting or (self.prefill is not None and self._began and any(self.live)):
            return []
        free = [s for s, row in enumerate(self.live) if row is None]
        free += range(len(self.live), len(self.cache.length))
        free = free[: len(self.waiting)]
        if self.prefill is None:
            return free
        longest, count = 0, 0
        for row, _ in zip(self.waiting, free, strict=False):
            longest = max(longest, len(row.ids))
            if count and (count + 1) * longest > self.prefill:
                break
            count += 1
        return free[:count]

    def _begin(self, free: Sequence[int], fed: Sequence[Row]) -> Tensor:
        self.host.use(*one_plan([r.worn for r in fed]))
        return self.cache.begin(free, [r.ids for r in fed], [r.worn for r in fed])

    def _close_up(self) -> None:
        """Bring the rows that are left to the first slots."""
        for s in reversed(range(len(self.live))):
            if self.live[s] is None:
                if s < len(self.live) - 1:
                    self.cache.copy(len(self.live) - 1, s)
                    self.live[s] = self.live[-1]
                self.live.pop()


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Each row's next token (B,), by its own settings and its own draws."""
    ways: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        ways.setdefault(row.sampled, []).append(i)
    if len(ways) == 1:
        return _choose(logits, rows)
    chosen = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for own in ways.values():
        where = torch.tensor(own, device=logits.device)
        chosen[where] = _choose(logits[where], [rows[i] for i in own])
    return chosen


def _choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    if not rows[0].how.temperature:
        return logits.argmax(-1)
    draw = torch.tensor([r.draws[len(r.tokens)] for r in rows], dtype=torch.float64).to(logits.device)
    return pick(logits.float(), draw, rows[0].how)


def score(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> None:
    """Note the model's log-probabilities (before temperature and truncation) of rows that ask for them."""
    asking = [i for i, row in enumerate(rows) if row.likeliest is not None]
    if not asking:
        return
    where = torch.tensor(asking, device=logits.device)
    logp = logits[where].float().log_softmax(-1)
    said = torch.tensor([tokens[i] for i in asking], device=logits.device)
    own = logp.gather(1, said[:, None])[:, 0].tolist()
    top = logp.topk(max(rows[i].likeliest or 0 for i in asking))
    for i, p, ids, values in zip(asking, own, top.indices.tolist(), top.values.tolist(), strict=True):
        n = rows[i].likeliest or 0
        rows[i].scores.append(Scored(p, list(zip(ids[:n], values[:n], strict=True))))


def sharing(running: Running, rows: Sequence[Row]) -> Begin:
    """A `Running.begin` for rows that are all known: a beginning that all prompts share is computed once for everything
    that is worn, and copied."""
    host, cache = running.host, running.cache
    shared = beginning([r.ids for r in rows], leave=1)
    if any(host.edits[n].prompted for worn in {r.worn for r in rows} for n in worn):
        return running.begin  # a part of a prompt would be taken for all of it
    if shared < LEAST or len(rows) < 2 * len(Counter(r.worn for r in rows)):
        return running.begin
    kept: dict[Worn, list[tuple[Tensor, Tensor]]] = {}

    def begin(free: Sequence[int], fed: Sequence[Row]) -> Tensor:
        for s, row in zip(free, fed, strict=True):
            if row.worn not in kept:
                host.use(row.worn)
                cache.begin([s], [row.ids[:shared]], [row.worn])
                kept[row.worn] = cache.read(s)
            cache.write(s, kept[row.worn])
        host.use(*one_plan([r.worn for r in fed]))
        return cache.go_on(free, [r.ids[shared:] for r in fed])

    return begin
