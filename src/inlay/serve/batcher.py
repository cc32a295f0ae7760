"""Continuous batching: one thread owns the model, requests join and leave its batch between two steps.

A request's text is what `inlay.evaluate.generate` gives for the same prompt, adapter and settings: both are decoded by
`inlay.evaluate.running`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.evaluate import slots
from inlay.evaluate.batches import context
from inlay.evaluate.rows import Generation, Row, Scored
from inlay.evaluate.running import Running
from inlay.library.bank import Bank, Lease
from inlay.serve.blame import apart, at_fault
from inlay.serve.errors import Refused

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A row on its way, and who is told of it."""

    row: Row
    lease: Lease
    tell: Callable[[Event], None]
    """Called for each token and at the end, on the thread that `Batcher.post` chooses."""
    deadline: float = float("inf")
    """When it ends at the latest (`time.monotonic`)."""
    begun: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Event:
    """News of a job: a token, and at the end what it said or why it failed."""

    job: Job
    token: int | None = None
    scored: Scored | None = None
    result: Generation | None = None
    error: BaseException | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.result is not None or self.error is not None


@dataclass
class Watch:
    """What an observer may count; every method may be replaced."""

    step: Callable[[int, float], None] = lambda rows, seconds: None
    """After each forward: rows, seconds."""
    first: Callable[[float], None] = lambda seconds: None
    """A row's first token, seconds after it came."""
    ended: Callable[[Job, str], None] = lambda job, how: None
    """`eos`, `stop`, `length`, `cancelled`, `expired` or `failed`."""


class Batcher:
    """Decodes the rows of all requests side by side, whatever each wears.

    Args:
        host: nothing else may use its model while the batcher runs.
        adapters: what rows wear; its loading runs on the batcher's thread, between steps.
        rows: decoded at a time.
        longest: most positions of a row, prompt and virtual tokens included; the base's context if less. The KV cache
            has room for `rows` times as many tokens as the longest row so far.
        waiting: most rows that wait for a slot.
        prefill: most tokens of new prompts per step (see `Running`).
        post: how listeners are called, e.g. `loop.call_soon_threadsafe`; on the batcher's own thread by default.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: Any,
        adapters: Bank,
        *,
        rows: int = 32,
        longest: int = 4096,
        waiting: int = 256,
        prefill: int = 2048,
        post: Callable[[Callable[[], None]], object] | None = None,
        watch: Watch | None = None,
    ):
        if not slots.serves(host):
            raise InlayError("this base cannot be served: its rows cannot be decoded in slots (the warning says why)")
        self.host, self.adapters, self.watch = host, adapters, watch or Watch()
        self.longest = min(longest, context(host) or longest)
        self.most_waiting, self.rows = waiting, rows
        self.post = post or (lambda call: call())
        self._running = Running(host, tokenizer, rows, self.longest, prefill)
        self._jobs: dict[Row, Job] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._accepted = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inlay-batcher", daemon=True)

    # ---- for other threads -------------------------------------------------------------------------------------------
    def start(self) -> Batcher:
        """Let the thread run."""
        self._thread.start()
        return self

    def stop(self, timeout: float | None = None) -> None:
        """End the thread; jobs that are left fail."""
        self._ending.set()
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def jobs(self) -> int:
        """Rows accepted and not yet ended."""
        return self._accepted

    @property
    def waiting(self) -> int:
        """Rows without a slot yet."""
        return max(0, self._accepted - self.rows)

    def limit(self, ids: Sequence[int], lease: Lease, asked: int | None) -> int:
        """Most new tokens of a prompt; Refused if it is too long."""
        most = self.longest - lease.room - len(ids)
        if most < 1:
            raise Refused(
                f"the prompt has {len(ids)} tokens"
                + (f" ({lease.room} virtual ones of the adapter come on top)" if lease.room else "")
                + f", but at most {self.longest} positions are served; shorten the prompt",
                400,
                "context_length_exceeded",
                "messages",
            )
        return most if asked is None else min(asked, most)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Accept all of these jobs or none; Refused (429) if too many rows wait."""
        with self._lock:
            if self._accepted + len(jobs) > self.rows + self.most_waiting:
                raise Refused(f"{self.waiting} rows are waiting already; try again in a moment", 429, "queue_full")
            self._accepted += len(jobs)
        self._inbox.put(lambda: self._join(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let go of these jobs; whoever listened hears nothing more."""
        self._inbox.put(lambda: self._cancel(jobs))

    def call(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run something that touches the model between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as e:  # whoever asked is told; the batch goes on
                future.set_exception(e)

        self._inbox.put(run)
        return future

    # ---- the model's thread ------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._obey(wait=not self._running.busy)
                if self._running.busy:
                    self._steps()
        finally:
            self._end(list(self._jobs.values()), "failed", Refused("the server is going down", 503, "shutting_down"))
            self._fail_inbox()

    def _fail_inbox(self) -> None:
        """Whoever asked too late hears so."""
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                break
        self._end(list(self._jobs.values()), "failed", Refused("the server is going down", 503, "shutting_down"))

    def _obey(self, wait: bool) -> None:
        """What other threads have asked for."""
        with contextlib.suppress(queue.Empty):
            self._inbox.get(block=wait)()
            while True:
                self._inbox.get_nowait()()
        self.adapters.sweep()

    def _steps(self) -> None:
        """Steps until somebody asks for something, or all is done."""
        try:
            with self._running.active():
                while self._running.busy and self._inbox.empty() and not self._running.cache.due:
                    self._step()
        except Exception as e:  # not of a forward; rows that were not fed go on
            log.exception("a step failed")
            self._blame([(row, e) for row in self._running.fed if row in self._jobs])

    def _step(self) -> None:
        start = time.monotonic()
        self._expire(start)
        if not self._running.busy:
            return
        fed = self._fed()
        now = time.monotonic()
        self.watch.step(len(fed), now - start)
        events = []
        for row in fed:
            job = self._jobs[row]
            if len(row.tokens) == 1:
                self.watch.first(now - job.begun)
            result = self._running.result(row) if row.done else None
            events.append(Event(job, row.tokens[-1], row.scores[-1] if row.scores else None, result))
            if result is not None:
                self._forget(job, result.finished)
        self._tell(events)

    def _fed(self) -> list[Row]:
        """A step; rows that make it fail, by their adapter or by their size, end with an error and the others go on."""
        try:
            return self._running.step()
        except Exception as e:
            log.warning("a step of %d rows failed (%s); they are tried apart", len(self._running.fed), type(e).__name__)
            fed, failed = apart(self._running, e)
            for row, why in failed:
                log.error("a row that wears %s failed", "+".join(row.worn) or "nothing", exc_info=why)
            self._remember(failed)
            self._blame(failed)
            self._refuse([job for row in self._running.waiting if (job := self._jobs.get(row))])
            return fed

    def _remember(self, failed: Sequence[tuple[Row, Exception]]) -> None:
        """Tell the bank which adapters are at fault, so that nobody tries them again."""
        for row, why in failed:
            if self.adapters.fault(row.worn) is None:
                for worn in at_fault(self._running, row, why):
                    self.adapters.blame(self._jobs[row].lease, worn, why)

    def _refuse(self, jobs: Sequence[Job]) -> None:
        """End those of jobs that have not begun whose adapters have failed since they came."""
        for job in jobs:
            if (error := self.adapters.fault(job.lease.worn)) is not None:
                self._end([job], "failed", Refused.by_bank(error))

    def _blame(self, failed: Sequence[tuple[Row, Exception]]) -> None:
        for row, e in failed:
            said = Refused(f"the model failed: {type(e).__name__}: {e}", 500, "model_failed")
            self._end([self._jobs[row]], "failed", said)

    def _join(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.row.worn = job.lease.worn
            self._jobs[job.row] = job
            self._running.waiting.append(job.row)
        self._refuse(jobs)

    def _expire(self, now: float) -> None:
        late = [job for job in self._jobs.values() if job.deadline <= now]
        if late:
            self._end(
                late, "expired", Refused("the request's time is over; ask for less, or give it more", 504, "timeout")
            )

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.row in self._jobs:
                self._running.drop(job.row)
                self._forget(job, "cancelled")

    def _end(self, jobs: Sequence[Job], how: str, error: Refused) -> None:
        for job in jobs:
            self._running.drop(job.row)
            self._forget(job, how)
        self._tell([Event(job, error=error) for job in jobs])

    def _forget(self, job: Job, how: str) -> None:
        del self._jobs[job.row]
        job.lease.release()
        with self._lock:
            self._accepted -= 1
        self.watch.ended(job, how)

    def _tell(self, events: Sequence[Event]) -> None:
        if not events:
            return

        def tell() -> None:
            for e in events:
                e.job.tell(e)

        with contextlib.suppress(RuntimeError):  # the loop of the listeners is closed: nobody listens
            self.post(tell)
