"""What Prometheus reads from /metrics. No label grows with adapters or clients."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inlay.library.bank import Bank
from inlay.serve.batcher import Batcher, Job, Watch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """A registry of one server."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("inlay_requests", "HTTP requests answered", ["path", "status"], registry=r)
        self.seconds = Histogram("inlay_request_seconds", "HTTP requests, to the last byte", ["path"], buckets=SECONDS,
                                 registry=r)  # fmt: skip
        self.ended = Counter("inlay_rows_ended", "Rows that ended, by how", ["how"], registry=r)
        self.prompt = Counter("inlay_prompt_tokens", "Tokens of prompts of rows that ended", registry=r)
        self.generated = Counter("inlay_generated_tokens", "Tokens generated", registry=r)
        self.first = Histogram("inlay_first_token_seconds", "From a row's arrival to its first token", buckets=SECONDS,
                               registry=r)  # fmt: skip
        self.step = Histogram("inlay_step_seconds", "Forwards of the model", buckets=STEPS, registry=r)
        self.batch = Histogram("inlay_step_rows", "Rows of a forward", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
                               registry=r)  # fmt: skip
        self.changes = Counter("inlay_adapter_changes", "Adapters loaded, replaced, unloaded; refused", ["what"],
                               registry=r)  # fmt: skip

    def watch(self) -> Watch:
        """What a batcher reports to."""
        return Watch(self._stepped, self.first.observe, self._ended)

    def follow(self, batcher: Batcher, adapters: Bank) -> None:
        """Gauges of what is going on."""
        r = self.registry
        Gauge("inlay_rows_running", "Rows being decoded", registry=r).set_function(
            lambda: batcher.jobs - batcher.waiting
        )
        Gauge("inlay_rows_waiting", "Rows that wait for a slot", registry=r).set_function(lambda: batcher.waiting)
        Gauge("inlay_adapters_known", "Adapters that may be asked for", registry=r).set_function(
            lambda: len(adapters.names())
        )
        Gauge("inlay_adapters_loaded", "Adapters in memory", registry=r).set_function(lambda: adapters.loaded)
        Gauge("inlay_adapters_bytes", "Memory that they take", registry=r).set_function(lambda: adapters.bytes)
        Gauge("inlay_adapters_broken", "Adapters that are refused since they failed", registry=r).set_function(
            lambda: adapters.broken
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _stepped(self, rows: int, seconds: float) -> None:
        self.step.observe(seconds)
        self.batch.observe(rows)
        self.generated.inc(rows)

    def _ended(self, job: Job, how: str) -> None:
        self.ended.labels(how).inc()
        self.prompt.inc(len(job.row.ids))
