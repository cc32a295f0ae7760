"""The training loop's steps: exact accumulation, validation, guards, and a state that goes to disk and back."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map_only

from inlay.core.errors import InlayError
from inlay.core.fingerprint import differences as unlike
from inlay.core.fingerprint import fingerprint
from inlay.core.host import Host
from inlay.core.sharded import after_step, parted, penalty, whole
from inlay.core.store import describe
from inlay.engine.example import Example, learned
from inlay.engine.head import Read
from inlay.train import checkpoint
from inlay.train.batches import Feed
from inlay.train.objective import Objective, Reduce, TokenMean
from inlay.train.ranks import ALONE, Shared, Team, place, spread
from inlay.train.settings import OptimSettings, TrainSettings, differences, identity
from inlay.train.shards import Sharded, shard
from inlay.train.ways import Way, choose

T = TypeVar("T")


class Diverged(InlayError):
    """Numbers are no longer finite."""


def _finite(when: str, **values: float) -> None:
    for what, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"{what} is {value} {when}")


def seed_everything(seed: int, rank: int = 0) -> None:
    """Python, NumPy and PyTorch (all devices); other ranks drop out other numbers."""
    seed += 1_000_003 * rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def training(host: Host, name: str, gradient_checkpointing: bool) -> Iterator[None]:
    """The model in training mode, wearing one adapter; left as it was found."""
    model: Any = host.model
    was = model.training
    switch = gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False)
    if switch and not getattr(model, "supports_gradient_checkpointing", False):
        raise InlayError(f"{type(model).__name__} cannot checkpoint gradients; leave gradient_checkpointing off")
    if switch:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with host.using(name):
            model.train()
            yield
    finally:
        model.train(was)
        if switch:
            model.gradient_checkpointing_disable()


def adamw(trained: Mapping[str, nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (betas .9, .999); gains and biases, tensors of one dimension, do not decay."""
    groups = [
        {"params": [p for p in trained.values() if (p.dim() > 1) is matrices], "weight_decay": decay}
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.999))


def schedule(optimizer: torch.optim.Optimizer, settings: OptimSettings, total: int) -> LambdaLR:
    """The learning rate over `total` steps."""
    # Not transformers' get_scheduler, which says the same: importing it imports PEFT and all that PEFT can use, 75 MiB.
    warm = round(settings.warmup * total) if settings.warmup < 1 else round(settings.warmup)
    return LambdaLR(optimizer, partial(_share, kind=settings.schedule, warm=warm, total=total))


def _share(step: int, kind: str, warm: int, total: int) -> float:
    """Share of the full learning rate: up in a line during warm-up, then constant, down in a line, or half a cosine."""
    if step < warm:
        return step / warm
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warm))
    gone = (step - warm) / max(1, total - warm)
    return 1.0 if kind == "constant" else max(0.0, 0.5 * (1.0 + math.cos(math.pi * gone)))


def _plainly(work: Callable[[], T]) -> T:
    return work()


@contextlib.contextmanager
def _faster(optimizer: torch.optim.Optimizer, rate: float) -> Iterator[None]:
    """Learning rates times `rate`, for one step."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= rate
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr


class Loop:
    """The state of a run between two steps."""

    def __init__(
        self,
        host: Host,
        name: str,
        train: list[Example],
        val: list[Example],
        settings: TrainSettings,
        pad: int,
        team: Team = ALONE,
        objective: Objective | None = None,
    ):
        self.team, self.base = team, fingerprint(host)
        team.align(host.tensors(name))
        self.sharded, self.asked = spread(settings.run.parallel, team.size)
        root = shard(host, team, place(settings.run.device)) if self.sharded else None
        self.host, self.name, self.settings = host, name, settings
        self.edit, self.val = host.edits[name], val
        self.objective: Objective = objective or TokenMean()
        o = settings.optim
        self.feed = Feed(train, o.batch_size, settings.run.seed, settings.data.group_by_length)
        self.total = self.feed.steps(o.epochs, o.steps)
        # Sorted by name: the optimizer's order must not depend on what else hangs on the model.
        named = {k: t for k, t in sorted(host.tensors(name).items()) if isinstance(t, nn.Parameter)}
        self.trained = named
        self.optimizer = adamw(named, o)
        self.schedule = schedule(self.optimizer, o, self.total)
        # All ranks find the same overflows: replicas look at sums, and of parts PyTorch asks every rank.
        self.scaler = torch.amp.GradScaler(host.device.type, enabled=host.dtype == torch.float16)
        chosen: tuple[Way, str] = (root or _plainly)(lambda: choose(host, name, settings, pad, train))
        way, self.notice = chosen
        """How batches are computed, and what is to be said of it."""
        self.way = way
        if root is not None:
            self.way = Sharded(way, root, team, min(train, key=lambda e: len(e.input_ids)))
        elif team.size > 1:
            self.way = Shared(way, team)
        self.unheard = False
        """Whether the other ranks wait for this one where they would not hear that it has failed."""
        self.writer = checkpoint.Writer(settings.run.async_save)
        self.method_state: dict[str, Tensor] = {}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best: tuple[float, int] | None = None
        self.unreached: list[str] | None = None
        """Tensors that the first step gave no gradient: experts that no token chose, layers that are never called."""

    # ---- how batches are computed ------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around the steps of a session."""
        self._prepared = contextlib.ExitStack()
        self._prepared.enter_context(self.way.active())
        try:
            yield
        finally:
            self._prepared.close()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within `active`, a block in which the model computes the ordinary way: generation, padded forwards."""
        self._prepared.close()
        try:
            yield
        finally:
            self._prepared.enter_context(self.way.active())

    # ---- one step ----------------------------------------------------------------------------------------------------
    def advance(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics. Raises Diverged, the adapter untouched, if one is not finite."""
        began, number, lr = time.perf_counter(), self.step + 1, self.schedule.get_last_lr()[0]
        examples = self.feed.step(self.step)
        self.objective.begin(examples, self.step / max(1, self.total - 1), self.survey)
        extra = penalty(self.edit, self.host.by_place(self.name))

        def backward() -> float:
            loss = 0.0
            for rows in self.way.split(examples):
                part = self.objective.loss(self.way, rows)
                self.scaler.scale(part).backward()
                loss += float(part.detach())
            if extra is not None:  # every rank has all of it
                self.scaler.scale(extra / self.team.size).backward()
            return loss

        loss = self._each(backward)
        loss, *ranks = self.team.sums([loss, *(p.grad is not None for p in self.trained.values())])
        if self.sharded:
            self.team.sum_of_mean(self.trained)
        else:
            self.team.add_gradients(self.trained, [n > 0 for n in ranks])
        metrics: dict[str, Any] = {"loss": loss} | ({} if extra is None else {"penalty": float(extra.detach())})
        _finite(f"at step {number}, which was not taken", **metrics)
        metrics |= self.objective.end(self.team.sums)
        updated = self._update(number)
        self.step = number
        self.tokens += sum(len(e.input_ids) for e in examples)
        self.seconds += time.perf_counter() - began
        epoch = round(number / self.feed.per_epoch, 4)
        return {
            "step": number,
            "epoch": epoch,
            **metrics,
            "lr": lr * self.objective.rate,
            **updated,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def _each(self, compute: Callable[[], T]) -> T:
        """This rank's part of a sum. Ranks that hold parts of one base meet within, where no error can be told."""
        self.team.ready()
        if not self.sharded:
            return self.team.together(compute)
        self.unheard = True
        made = compute()
        self.unheard = False
        return made

    def _update(self, number: int) -> dict[str, float]:
        """Clip, step, tell the method; returns the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        if self.unreached is None:
            self._reached()
        norm = float(whole(nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.optim.clip or math.inf)))
        # In fp16 an overflow is how the scale is found: the step is left out and the scale halved.
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not overflow:
            _finite(f"at step {number}, which was not taken", grad_norm=norm)
        with _faster(self.optimizer, self.objective.rate):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if not overflow:
            after_step(self.edit, self.host.by_place(self.name), number, self.total, self.method_state)
        self.optimizer.zero_grad(set_to_none=True)
        return {"overflow": 1.0} if overflow else {"grad_norm": norm}

    def _reached(self) -> None:
        """An adapter that the loss does not depend on would train without a sound."""
        self.unreached = [k for k, p in self.trained.items() if p.grad is None]
        if not any(p.grad is not None and bool(whole(p.grad).any()) for p in self.trained.values()):
            places = ", ".join(list(self.host.by_place(self.name))[:4])
            raise InlayError(
                f"no gradient reached {self.name!r} in its first step, so it would not learn: the loss does not depend "
                f"on its places ({places} ...). Look for a detached output, or places that the model never calls"
            )

    @torch.no_grad()
    def survey(self, examples: Sequence[Example], read: Read | None, reduce: Reduce, width: int) -> Tensor:
        """`width` numbers of each example; see `inlay.train.objective`. Draws no random numbers."""
        place = {id(e): i for i, e in enumerate(examples)}
        mine = torch.zeros(len(examples), width + 1, dtype=torch.float64)

        def compute() -> None:
            for rows in self.way.split(examples):
                said = self.way.tokens(rows, read, False)
                if rows:
                    at = [place[id(row)] for row in rows]
                    mine[at, :-1] = reduce(rows, *said).to(mine)
                    mine[at, -1] = 1  # an example that occurs twice may be computed by two ranks

        self.host.model.eval()
        self._each(compute)
        self.host.model.train()
        total = torch.tensor(self.team.sums(mine.flatten().tolist()), dtype=torch.float64).view_as(mine)
        total = total[[place[id(e)] for e in examples]]
        return total[:, :-1] / total[:, -1:]

    @torch.no_grad()
    def validate(self) -> float:
        """Validation loss per learned token; draws no random numbers."""
        model = self.host.model
        model.eval()
        own = self._each(lambda: math.fsum(float(self.way.loss(rows)) for rows in self.way.split(self.val)))
        (total,) = self.team.sums([own])
        model.train()
        loss = total / sum(map(learned, self.val))
        _finite(f"after step {self.step}", val_loss=loss)
        return loss

    # ---- to disk and back --------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors, whole, on the CPU. All ranks ask at once."""
        return {k: whole(v) for k, v in sorted(self.host.tensors(self.name).items())}

    def save(self, run_dir: Path, data: str) -> None:
        """Copy the state to the CPU and let it be written; older checkpoints that are not wanted are deleted then."""
        self.team.ready()
        tensors = self.tensors()
        finite = all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
        if any(self.team.sums([not finite])):
            raise Diverged(f"the adapter is no longer finite after step {self.step}; no checkpoint of it was written")
        state = {
            "names": list(self.trained),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.method_state,
            "objective": self.objective.state(),
        }
        state = tree_map_only(Tensor, whole, state)
        state["random"], *others = self.team.gathered(checkpoint.random_states())
        if others:
            state["random_of_other_ranks"] = others
        epoch, at = divmod(self.step, self.feed.per_epoch)
        about = {
            "step": self.step,
            "total": self.total,
            "epoch": epoch,
            "examples_into_epoch": at * self.feed.batch,
            "best": self.best,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": data,
            "settings": identity(self.settings),
            "adapter": self.adapter(),
            "base": self.base,
        }
        if self.team.first:
            best = self.best[1] if self.best else None
            self.writer.put(run_dir, self.step, (tensors, state, about), self.settings.run.keep_last, best)

    def adapter(self) -> dict[str, Any]:
        """What hangs where, as JSON has it."""
        about = {**describe(self.host.edits[self.name]), "at": self.host.placement(self.name)}
        return json.loads(json.dumps(about))

    def restore(self, found: checkpoint.Checkpoint, data: str) -> None:
        """Become what was saved. Raises InlayError for other data, another base or another adapter."""
        if found.about["data"] != data:
            raise InlayError(
                f"{found.path} was trained on other data, or validated on other data (or the same, tokenised otherwise)"
            )
        if changed := unlike(found.about.get("base", {}), self.base):
            raise InlayError(f"{found.path} was trained on another base: {'; '.join(changed)}")
        if changed := differences(found.about["adapter"], self.adapter()):
            raise InlayError(f"{found.path} is of another adapter: {'; '.join(changed)}")
        if found.state["names"] != list(self.trained):
            raise InlayError(f"{found.path} holds the optimizer of an adapter with other tensors")
        self.fill(found.adapter)
        self.optimizer.load_state_dict(found.state["optimizer"])
        for p, kept in self.optimizer.state.items():
            kept |= {k: parted(v, p) for k, v in kept.items() if v.shape == p.shape}
        self.schedule.load_state_dict(found.state["schedule"])
        self.scaler.load_state_dict(found.state["scaler"])
        self.method_state = {k: v.to(self.host.device) for k, v in found.state["method"].items()}
        self.objective.restore(found.state.get("objective", {}))
        about = found.about
        self.step, self.tokens, self.seconds = about["step"], about["tokens"], about["seconds"]
        self.best = tuple(about["best"]) if about["best"] else None
        self._random(found.state)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the adapter's tensors, given whole."""
        mine = self.host.tensors(self.name)
        self.host.fill(self.name, {k: parted(v, mine[k]) if k in mine else v for k, v in tensors.items()})

    def _random(self, state: Mapping[str, Any]) -> None:
        """Each rank's generators; a rank that the saved run did not have begins its own."""
        states = [state["random"], *state.get("random_of_other_ranks", [])]
        if self.team.rank < len(states):
            checkpoint.set_random_states(states[self.team.rank])
        else:
            seed_everything(self.settings.run.seed + self.step, self.team.rank)
