"""Short trainings on the training engine that leave nothing behind: for questions that need dozens of them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.engine.example import Example
from inlay.knowledge.items import Item
from inlay.knowledge.wording import Wording, examples
from inlay.methods import method
from inlay.train.loop import Loop, seed_everything, training
from inlay.train.settings import OptimSettings, Pairs, RunSettings, TrainSettings

if TYPE_CHECKING:
    from inlay.train.objective import Objective

_number = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Practice:
    """How items are trained in a trial."""

    method: str = "lora"
    """One of `inlay.METHODS`."""
    settings: Pairs = field(default_factory=dict)
    """The method's own settings, e.g. `rank=4`."""
    at: str | None = None
    """Where it hangs; the method's own places if not given."""
    lr: float = 3e-3
    """Learning rate, without warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does: constant, so that runs of different length compare step by step; or falling to 0."""
    batch_size: int = 32
    """Items per optimizer step; all of them where there are fewer."""
    seed: int = 0
    """Of the adapter's start and the order of items."""


class Trial:
    """An adapter that learns items. A context: it is taken off the host at the end.

    Args:
        presentations: how often each item is shown; or
        steps: optimizer steps.
        objective: what is minimised (see `inlay.train.objective`); the mean over learned tokens if not given.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: Any,
        items: Sequence[Item],
        practice: Practice,
        *,
        presentations: int | None = None,
        steps: int | None = None,
        wording: Wording | None = None,
        objective: Objective | None = None,
    ):
        if (presentations is None) == (steps is None):
            raise InlayError("say how long a trial is: presentations of each item, or steps; not both")
        if not items:
            raise InlayError("a trial needs items to train on")
        self.host, self.tokenizer, self.practice = host, tokenizer, practice
        self.rows: list[Example] = list(examples(items, tokenizer, wording))
        self.name = f"trial{next(_number)}"
        self.batch = min(practice.batch_size, len(items))
        self.per_epoch = math.ceil(len(items) / self.batch)
        self.total = steps if steps is not None else (presentations or 0) * self.per_epoch
        self.presentations = self.total / self.per_epoch
        self.objective, self._stack = objective, contextlib.ExitStack()

    def __enter__(self) -> Trial:
        p = self.practice
        row = method(p.method)
        edit = row.make(**p.settings).tokenised(self.tokenizer)
        seed_everything(p.seed)
        with contextlib.ExitStack() as undo:
            self.host.add(self.name, edit, at=p.at if p.at is not None else row.places, seed=p.seed)
            undo.callback(self.host.remove, self.name)
            optim = OptimSettings(
                batch_size=self.batch, micro_batch=self.batch, steps=self.total, lr=p.lr, warmup=0, schedule=p.schedule
            )
            run = RunSettings(seed=p.seed, progress=False, loggers=("none",))
            about = TrainSettings(
                model="", out=Path(), method=p.method, settings=p.settings, at=p.at, optim=optim, run=run
            )
            pad = self.tokenizer.pad_token_id or 0
            self.loop = Loop(self.host, self.name, self.rows, [], about, pad, objective=self.objective)
            if self.objective is not None:
                with self.active():
                    self.loop.objective.prepare(self.loop.survey)
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model in training mode, wearing the adapter, its batches computed as training computes them."""
        with training(self.host, self.name, False), self.loop.way.active():
            yield

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.loop.step

    def to(self, step: int | None = None) -> dict[str, Any]:
        """Train up to this step (the last one if not given); returns the last step's metrics."""
        metrics: dict[str, Any] = {}
        with self.active():
            while self.loop.step < min(self.total, self.total if step is None else step):
                metrics = self.loop.advance()
        return metrics


@torch.no_grad()
def losses(loop: Loop, rows: Sequence[Any]) -> Tensor:
    """Mean cross entropy of each row (N,), float64, in the rows' order; call while training."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    place = {id(r): n for n, r in enumerate(rows)}
    for group in loop.way.split(rows):
        loss_N, _ = loop.way.tokens(group, None, False)
        counts = [sum(label != -100 for label in r.labels[1:]) for r in group]
        for row, own in zip(group, loss_N.double().cpu().split(counts), strict=True):
            found[place[id(row)]] = own.mean()
    return found
