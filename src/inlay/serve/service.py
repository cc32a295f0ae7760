"""A request's way: from what was asked to rows of the batch, and back as events."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from inlay.core.errors import InlayError
from inlay.evaluate.prompting import Prompting
from inlay.evaluate.rows import Row, row_seeds, stop_ids
from inlay.library.bank import Bank, Lease
from inlay.serve.batcher import Batcher, Event, Job
from inlay.serve.errors import Refused
from inlay.serve.text import Spoken, Texts
from inlay.serve.wire import Answer, Asked, Chat, ChatRequest, Completion, CompletionRequest, reason, usage
from inlay.tasks.template_choice import AnyTemplate

T = TypeVar("T")
Prompts = tuple[list[list[int]], tuple[int, ...]]
"""Ids of each prompt, and of special tokens that end their answers."""
log = logging.getLogger(__name__)


class Service:
    """What the routes share; lives on the event loop.

    Args:
        timeout: seconds after which any request is given up.
    """

    def __init__(self, batcher: Batcher, adapters: Bank, texts: Texts, timeout: float):
        self.batcher, self.adapters, self.texts, self.timeout = batcher, adapters, texts, timeout
        self.prompting = Prompting(adapters.host, texts.tokenizer, texts.asked, log.warning)
        # One thread, for a tokenizer is not to be used by two; beside the loop, for prompts may be long.
        self._reader = ThreadPoolExecutor(1, "inlay-reader")

    async def on_model(self, function: Callable[[], T]) -> T:
        """Run something between two steps of the model."""
        return await asyncio.wrap_future(self.batcher.call(function))

    async def complete(self, asked: CompletionRequest) -> Reply:
        """Rows for a completion."""
        prompts = asked.prompts
        ids = [await self._read(lambda p=p: self.texts.ids(p)) for p in prompts]  # type: ignore[misc]
        heads = [""] * len(ids)
        if asked.echo:
            heads = [p if isinstance(p, str) else self.texts.tokenizer.decode(p) for p in prompts]

        async def prompts_of(_: Lease) -> Prompts:
            return ids, ()

        return await self._begin(asked, prompts_of, Completion(), heads)

    async def chat(self, asked: ChatRequest) -> Reply:
        """Rows for a turn of a conversation, in the template of the adapters that are asked."""

        async def prompts_of(lease: Lease) -> Prompts:
            template = self._template(asked.model, lease)
            read = functools.partial(self.texts.chat_ids, asked.messages, template)
            return await self._read(lambda: ([read()], self.texts.ends(template)))

        return await self._begin(asked, prompts_of, Chat(), [""])

    def _template(self, model: str, lease: Lease) -> AnyTemplate:
        try:
            return self.prompting.of(lease.worn, model)
        except InlayError as e:
            raise Refused(str(e), 400, "invalid_template", "model") from e

    async def _lease(self, model: str) -> Lease:
        """What `model` stands for, read if it must be."""
        return self.adapters.lease(model) or await self._bring(model)

    async def _bring(self, model: str) -> Lease:
        """As `Bank.bring`; a lease that nobody waits for any more is released."""
        future = self.batcher.call(lambda: self.adapters.bring(model))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_let_go)
            raise

    async def _read(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)

    async def _begin(
        self,
        asked: Asked,
        prompts_of: Callable[[Lease], Awaitable[Prompts]],
        form: Chat | Completion,
        heads: list[str],
    ) -> Reply:
        begun = time.monotonic()
        lease = await self._lease(asked.model)
        leases = [lease]
        try:
            prompts, ends = await prompts_of(lease)
            rows = self._rows(asked, [p for p in prompts for _ in range(asked.n)], lease, ends)
            reply = Reply(asked, Answer(form, asked.model), self, [h for h in heads for _ in range(asked.n)])
            leases += [lease.again() for _ in rows[1:]]
            deadline = begun + min(self.timeout, asked.timeout or self.timeout)
            reply.jobs = [
                Job(row, own, reply.events.put_nowait, deadline, begun) for row, own in zip(rows, leases, strict=True)
            ]
            self.batcher.submit(reply.jobs)
        except BaseException:
            for own in leases:
                own.release()
            raise
        reply.prompt_tokens = sum(map(len, prompts))
        return reply

    def _rows(self, asked: Asked, ids: list[list[int]], lease: Lease, ends: tuple[int, ...]) -> list[Row]:
        if len(ids) > self.batcher.rows + self.batcher.most_waiting:
            raise Refused(f"{len(ids)} rows in one request are more than this server takes", 400, "too_many", "n")
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        seeds = row_seeds(seed, ids, [lease.worn] * len(ids))
        try:
            stops = (*stop_ids(self.texts.tokenizer, asked.stop), *ends)
        except InlayError as e:
            raise Refused(str(e), 400, "invalid_stop", "stop") from e
        rows = []
        for i, (own, drawn) in enumerate(zip(ids, seeds, strict=True)):
            limit = self.batcher.limit(own, lease, asked.most)
            rows.append(Row(i, own, lease.worn, drawn, limit, asked.settings(limit), asked.likeliest, stops))
        return rows


def _let_go(brought: Future[Lease]) -> None:
    if not brought.cancelled() and brought.exception() is None:
        brought.result().release()


class Reply:
    """The answer to one request while it is made."""

    def __init__(self, asked: Asked, answer: Answer, service: Service, heads: Sequence[str]):
        self.asked, self.answer, self.service, self.heads = asked, answer, service, heads
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.prompt_tokens = 0
        self._ended: set[int] = set()

    def close(self) -> None:
        """Whatever is still on its way is given up."""
        left = [job for job in self.jobs if job.row.index not in self._ended]
        if left:
            self.service.batcher.cancel(left)
        self._ended.update(job.row.index for job in left)

    async def _news(self) -> AsyncIterator[list[Event]]:
        """Events as they come, those that have piled up together; raises what went wrong."""
        while len(self._ended) < len(self.jobs):
            found = [await self.events.get()]
            while not self.events.empty():
                found.append(self.events.get_nowait())
            for e in found:
                if e.last:
                    self._ended.add(e.job.row.index)
                if e.error is not None:
                    raise e.error
            yield found

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        choices: list[dict[str, Any]] = [{} for _ in self.jobs]
        async for news in self._news():
            for e in news:
                if e.result is not None:
                    row, texts = e.job.row, self.service.texts
                    said = None
                    if row.likeliest is not None:
                        kept = zip(e.result.tokens, row.scores, strict=False)
                        said = [texts.scored(*pair) for pair in kept]
                    text = self.heads[row.index] + e.result.text
                    choices[row.index] = self.answer.form.choice(row.index, text, said, reason(e.result.finished))
        return self.answer.whole(choices, self._used())

    async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Pieces of the answer, each with one choice, as they are made."""
        form, texts = self.answer.form, self.service.texts
        spoken = [Spoken(texts.tokenizer, self.asked.stop) for _ in self.jobs]
        length = [0] * len(self.jobs)
        opening = [form.opening(i) for i in range(len(self.jobs))]
        first = [self.answer.piece([o]) for o in opening if o is not None]
        first += [self.answer.piece([form.delta(i, h, None, None, 0)]) for i, h in enumerate(self.heads) if h]
        if first:
            yield first
        async for news in self._news():
            found = []
            for e in news:
                assert e.token is not None
                i, finished = e.job.row.index, e.result.finished if e.result is not None else None
                text = spoken[i].end(e.result.text) if e.result is not None else spoken[i].add(e.token)
                said = [texts.scored(e.token, e.scored)] if e.scored is not None else None
                if text or said or finished:
                    delta = form.delta(i, text, said, finished and reason(finished), length[i])
                    found.append(self.answer.piece([delta]))
                    length[i] += sum(len(s.token) for s in said or ())
            if found:
                yield found
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield [self.answer.piece([], self._used())]

    def _used(self) -> dict[str, int]:
        return usage(self.prompt_tokens, sum(len(job.row.tokens) for job in self.jobs))
