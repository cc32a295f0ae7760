"""One prompt, several adapters: rows of one batch, told as columns while they are spoken."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from inlay.core.errors import InlayError, unknown
from inlay.evaluate.prompting import Prompting
from inlay.evaluate.rows import GenerateSettings, Row, row_seeds
from inlay.library.bank import Bank, Lease
from inlay.library.errors import BankError
from inlay.serve.batcher import Batcher, Event, Job
from inlay.serve.errors import Refused
from inlay.serve.text import Spoken, Texts
from inlay.serve.wire import Message

log = logging.getLogger(__name__)
BASE = "base"
MIX = "mix"
PAUSE = 0.05
"""Seconds between two looks at what was said: a page need not be drawn for every token."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, of whom, and how they answer."""

    prompt: str
    names: tuple[str, ...]
    """Adapters, and `base`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of adapters in one more column, their weighted sum; none: no such column."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    """None: another one every time."""

    @property
    def settings(self) -> GenerateSettings:
        """As `generate` reads it; without a temperature, the rest of sampling means nothing."""
        sampled = {"top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        return GenerateSettings(max_new_tokens=self.max_new_tokens, temperature=self.temperature, **sampled)  # type: ignore[arg-type]


@dataclass
class Column:
    """An answer on its way."""

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of a sum; none for an adapter or the base."""
    method: str = ""
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    """From the question to its latest token."""
    ended: Literal["", "eos", "stop", "length", "stopped", "failed"] = ""
    error: str = ""


@dataclass(frozen=True)
class Answers:
    """All columns at one moment."""

    columns: tuple[Column, ...]
    seed: int | None = None
    """Of sampling."""

    @property
    def done(self) -> bool:
        """Whether nothing follows."""
        return all(c.ended for c in self.columns)


class Playground:
    """Asks a running batcher, on an event loop.

    Args:
        timeout: seconds after which an answer is given up.
    """

    def __init__(self, batcher: Batcher, adapters: Bank, texts: Texts, timeout: float = 600.0):
        self.batcher, self.adapters, self.texts, self.timeout = batcher, adapters, texts, timeout
        self.prompting = Prompting(adapters.host, texts.tokenizer, texts.asked, log.warning)
        self._runs: dict[str, asyncio.Queue[Event | None]] = {}

    def names(self) -> list[str]:
        """Whom one may ask."""
        return [BASE, *self.adapters.names()]

    def stop(self, session: str) -> None:
        """End what this session has asked; what was said stays."""
        if (events := self._runs.get(session)) is not None:
            events.put_nowait(None)

    async def ask(self, q: Question, session: str = "") -> AsyncIterator[Answers]:
        """Answers while they grow, and at last when all have ended. What goes wrong with one column is told there.

        Args:
            session: whose question; an earlier one of the same session ends.

        Raises:
            InlayError: questions that nobody can answer.
        """
        columns = self._columns(q)
        self.stop(session)
        events = self._runs[session] = asyncio.Queue()
        jobs: list[Job] = []
        ended: set[int] = set()
        seed = secrets.randbits(32) if q.seed is None else q.seed

        def shown() -> Answers:
            return Answers(tuple(replace(c) for c in columns), seed if q.temperature else None)

        try:
            jobs = await self._begin(q, columns, seed, events)
            yield shown()
            spoken = {job.row.index: Spoken(self.texts.tokenizer, ()) for job in jobs}
            while len(ended) < len(jobs):
                for event in await _news(events):
                    if event is None:
                        _stopped(columns)
                        yield shown()
                        return
                    _hear(event, columns[event.job.row.index], spoken[event.job.row.index])
                    if event.last:
                        ended.add(event.job.row.index)
                yield shown()
        finally:
            left = [job for job in jobs if job.row.index not in ended]
            if left:
                self.batcher.cancel(left)
            if self._runs.get(session) is events:
                del self._runs[session]

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _columns(self, q: Question) -> list[Column]:
        if not q.prompt.strip():
            raise InlayError("there is nothing to answer; type a prompt")
        columns = [Column(name) for name in dict.fromkeys(q.names)]
        if q.weights:
            columns.append(Column(MIX, weights=dict(q.weights), method="sum"))
        if not columns:
            raise InlayError("nobody is asked; choose the base or an adapter")
        if len(columns) > self.batcher.rows:
            raise InlayError(f"{len(columns)} columns do not fit one batch; choose at most {self.batcher.rows}")
        return columns

    async def _begin(
        self, q: Question, columns: list[Column], seed: int, events: asyncio.Queue[Event | None]
    ) -> list[Job]:
        """Jobs of all columns that can be answered, accepted together so that they share each step."""
        how = q.settings
        leases = await self._leases(columns)
        loop, begun = asyncio.get_running_loop(), time.monotonic()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        jobs = []
        try:
            prompts = {i: self._prompt(q, columns[i], lease) for i, lease in leases.items()}
            worn = [lease.worn for lease in leases.values()]
            seeds = row_seeds(seed, [ids for ids, _ in prompts.values()], worn)
            for (i, lease), (ids, ends), drawn in zip(leases.items(), prompts.values(), seeds, strict=True):
                try:
                    limit = self.batcher.limit(ids, lease, how.max_new_tokens)
                except Refused as e:
                    _failed(columns[i], e)
                    continue
                row = Row(i, ids, lease.worn, drawn, limit, how, stops=ends)
                jobs.append(Job(row, lease, tell, begun + self.timeout, begun))
            self.batcher.submit(jobs)
        except BaseException:
            jobs = []
            raise
        finally:
            kept = {job.row.index for job in jobs}
            _release({i: lease for i, lease in leases.items() if i not in kept})
        return jobs

    def _prompt(self, q: Question, column: Column, lease: Lease) -> tuple[list[int], tuple[int, ...]]:
        """(ids of the question in the column's own template, ids that end an answer in it)."""
        template = self.prompting.of(lease.worn, column.name)
        return self.texts.chat_ids([Message(role="user", content=q.prompt)], template), self.texts.ends(template)

    async def _leases(self, columns: list[Column]) -> dict[int, Lease]:
        """What each column wears, by its index; those for which there is nothing have failed."""
        future = self.batcher.call(lambda: [self._lease(c) for c in columns])
        try:
            found = await asyncio.wrap_future(future)
        except BaseException:  # the asker has left while adapters were read
            future.add_done_callback(_forgotten)
            raise
        for column, lease in zip(columns, found, strict=True):
            if isinstance(lease, InlayError):
                _failed(column, lease)
        return {i: lease for i, lease in enumerate(found) if isinstance(lease, Lease)}

    def _lease(self, column: Column) -> Lease | InlayError:
        """On the model's thread: what a column wears, or why it cannot."""
        try:
            if column.weights:
                return self.adapters.mix(self._parts(column.weights))
            lease = self.adapters.bring(column.name)
            column.method = "+".join(self.adapters.host.edits[v.shelved].kind for v in lease.versions)
            return lease
        except BankError as e:
            if e.kind == "unknown":
                return unknown("adapter", column.name, self.adapters.names())
            return InlayError(f"{e} (A slider at 0 leaves an adapter out.)") if len(column.weights) > 1 else e
        except InlayError as e:
            return e

    def _parts(self, weights: Mapping[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not self.adapters.has(name):
                raise unknown("adapter", name, self.adapters.names())
            if not math.isfinite(weight):
                raise InlayError(f"the weight of {name} is {weight}; give a number")
        parts = {name: weight for name, weight in weights.items() if weight}
        if not parts:
            raise InlayError("all weights are 0, which is the bare base; move a slider")
        return parts


async def _news(events: asyncio.Queue[Event | None]) -> list[Event | None]:
    """What has come, and what comes in the next moment."""
    found = [await events.get()]
    if found[0] is not None:
        await asyncio.sleep(PAUSE)
    while not events.empty():
        found.append(events.get_nowait())
    return found


def _hear(event: Event, column: Column, spoken: Spoken) -> None:
    if event.error is not None:
        _failed(column, event.error)
        return
    assert event.token is not None
    column.tokens += 1
    column.seconds = time.monotonic() - event.job.begun
    if event.result is None:
        column.text += spoken.add(event.token)
    else:
        column.text, column.ended = event.result.text, event.result.finished


def _failed(column: Column, e: BaseException) -> None:
    column.ended, column.error = "failed", str(e)


def _stopped(columns: list[Column]) -> None:
    for column in columns:
        column.ended = column.ended or "stopped"


def _release(leases: Mapping[int, Lease]) -> None:
    for lease in leases.values():
        lease.release()


def _forgotten(future: concurrent.futures.Future[list[Lease | InlayError]]) -> None:
    """Leases that came after their asker had left."""
    if not future.cancelled() and future.exception() is None:
        _release({i: lease for i, lease in enumerate(future.result()) if isinstance(lease, Lease)})
