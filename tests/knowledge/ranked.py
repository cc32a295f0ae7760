"""A weighted run, also for several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inlay.knowledge.objective import Semantic, embeddings, plain
from inlay.knowledge.settings import KnowSettings

DISTANCES = [0.0, 0.3, 0.9, 0.1, 0.5, 1.4, 0.2, 0.7, 0.35, 1.1, 0.6]


def made(host: Any, data: Any, know: KnowSettings | None, beta: float | None = None) -> Semantic | None:
    """The objective of some settings on rows whose distances are known."""
    if know is None or plain(know):
        return None
    start = know.beta if beta is None else beta
    x = DISTANCES[: len(data)] if know.signal == "static" else None
    return Semantic(data, know, float(start), x, embeddings(host), seed=42)


def run(out: Path, know: dict[str, Any], changes: dict[str, Any]) -> int:
    """Six steps on eleven rows; the number taken."""
    from inlay.train import fit
    from tests.train.tiny import rows, settings, wearing

    host, data = wearing(), rows(11, prompt=True)
    goal = made(host, data, KnowSettings(**know))
    return fit(host, "a", data, [], settings(out, **changes), out, None, objective=goal).steps


def run_each(runs: list[tuple[Path, dict[str, Any], dict[str, Any]]]) -> list[int]:
    """The same, one after the other in one process group."""
    with _group():
        return [run(*own) for own in runs]


def watched(out: Path) -> None:
    """A watched run, and its last four steps again."""
    from tests.knowledge.test_track import run as watch
    from tests.knowledge.test_track import tracker

    with _group():
        watch(out, tracker(), parallel="ddp")
        watch(out, tracker(), parallel="ddp", resume=out / "checkpoint-2")


@contextlib.contextmanager
def _group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
