"""The training loop: one adapter, exact accumulation, validation, guards, and checkpoints it can go on from bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.core.store import describe
from inlay.train import checkpoint, record
from inlay.train.batches import IGNORED, Batch, Example, Feed, collate, learned, usable
from inlay.train.bar import Bar
from inlay.train.settings import OptimSettings, TrainSettings, differences, identity
from inlay.train.track import Journal, chosen, trackers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(InlayError):
    """Numbers are no longer finite."""


def _finite(when: str, **values: float) -> None:
    for what, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"{what} is {value} {when}")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    run_dir: Path
    adapter: Path
    """The saved adapter (`inlay.load` reads it). The host holds the same tensors."""
    final: str
    """Which weights it has: `best` or `last`."""
    steps: int
    loss: float
    """Training loss of the last step, per token."""
    val_loss: float | None
    """Lowest validation loss, per token."""
    best_step: int | None
    tokens: int
    """Tokens seen, padding not counted."""
    seconds: float
    """Time spent in all sessions of the run."""


def seed_everything(seed: int) -> None:
    """Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a batch, summed over its learned tokens, in fp32."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    target = batch.labels[:, 1:]
    keep = target != IGNORED
    return F.cross_entropy(out.logits[:, :-1][keep].float(), target[keep], reduction="sum")


@contextlib.contextmanager
def training(host: Host, name: str, gradient_checkpointing: bool) -> Iterator[None]:
    """The model in training mode, wearing one adapter; left as it was found."""
    model, was = host.model, host.model.training
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


def schedule(optimizer: torch.optim.Optimizer, settings: OptimSettings, total: int) -> Any:
    """The learning rate over `total` steps."""
    from transformers import get_scheduler

    warm = round(settings.warmup * total) if settings.warmup < 1 else round(settings.warmup)
    kind = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(kind, optimizer, num_warmup_steps=warm, num_training_steps=total)


class Loop:
    """The state of a run between two steps."""

    def __init__(self, host: Host, name: str, train: list[Example], val: list[Example], settings: TrainSettings, pad: int):
        self.host, self.name, self.settings, self.pad = host, name, settings, pad
        self.edit, self.val = host.edits[name], sorted(val, key=lambda e: -len(e.input_ids))
        o = settings.optim
        self.feed = Feed(train, o.batch_size, o.micro_batch, settings.run.seed, settings.data.group_by_length)
        self.total = self.feed.steps(o.epochs, o.steps)
        # Sorted by name: the optimizer's order must not depend on what else hangs on the model.
        named = {k: t for k, t in sorted(host.tensors(name).items()) if isinstance(t, nn.Parameter)}
        self.trained = named
        self.optimizer = adamw(named, o)
        self.schedule = schedule(self.optimizer, o, self.total)
        half = host.dtype == torch.float16
        if half and host.device.type != "cuda":
            raise InlayError("fp16 trains on a GPU only (its gradients need scaling); use dtype fp32 or bf16 here")
        self.scaler = torch.amp.GradScaler(host.device.type, enabled=half)
        self.method_state: dict[str, Tensor] = {}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best: tuple[float, int] | None = None
        self.unreached: list[str] | None = None
        """Tensors that the first step gave no gradient: experts that no token chose, layers that are never called."""

    # ---- one step ----------------------------------------------------------------------------------------------------
    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its metrics. Raises InlayError before the adapter is touched if numbers are not finite."""
        began, number, lr = time.perf_counter(), self.step + 1, self.schedule.get_last_lr()[0]
        micros = self.feed.step(self.step)
        count = sum(learned(e) for rows in micros for e in rows)
        loss, tokens = 0.0, 0
        for rows in micros:
            batch = collate(rows, self.pad, self.host.device)
            part = loss_sum(self.host.model, batch) / count
            self.scaler.scale(part).backward()
            loss, tokens = loss + float(part.detach()), tokens + batch.tokens
        penalty = self.edit.penalty(self.host.by_place(self.name))
        if penalty is not None:
            self.scaler.scale(penalty).backward()
        metrics = {"loss": loss} | ({} if penalty is None else {"penalty": float(penalty.detach())})
        _finite(f"at step {number}, which was not taken", **metrics)
        updated = self._update(number)
        self.step = number
        self.tokens += tokens
        self.seconds += time.perf_counter() - began
        epoch = round(number / self.feed.per_epoch, 4)
        return {"step": number, "epoch": epoch, **metrics, "lr": lr, **updated, "tokens": self.tokens, "seconds": self.seconds}

    def _update(self, number: int) -> dict[str, float]:
        """Clip, step, tell the method; returns the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        if self.unreached is None:
            self._reached()
        norm = float(nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.optim.clip or math.inf))
        # In fp16 an overflow is how the scale is found: the step is left out and the scale halved.
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not overflow:
            _finite(f"at step {number}, which was not taken", grad_norm=norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if not overflow:
            self.edit.after_step(self.host.by_place(self.name), number, self.total, self.method_state)
        self.optimizer.zero_grad(set_to_none=True)
        return {"overflow": 1.0} if overflow else {"grad_norm": norm}

    def _reached(self) -> None:
        """An adapter that the loss does not depend on would train without a sound."""
        self.unreached = [k for k, p in self.trained.items() if p.grad is None]
        if not any(p.grad is not None and bool(p.grad.any()) for p in self.trained.values()):
            places = ", ".join(list(self.host.by_place(self.name))[:4])
            raise InlayError(
                f"no gradient reached {self.name!r} in its first step, so it would not learn: the loss does not depend on "
                f"its places ({places} ...). Look for a detached output, or places that the model never calls"
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Validation loss per learned token; draws no random numbers."""
        model, size = self.host.model, self.settings.optim.micro_batch
        model.eval()
        batches = (collate(self.val[i : i + size], self.pad, self.host.device) for i in range(0, len(self.val), size))
        sums = [(float(loss_sum(model, b)), b.learned) for b in batches]
        model.train()
        loss = math.fsum(s for s, _ in sums) / sum(n for _, n in sums)
        _finite(f"after step {self.step}", val_loss=loss)
        return loss

    # ---- to disk and back --------------------------------------------------------------------------------------------
    def save(self, run_dir: Path, data: str) -> Path:
        """Write a checkpoint and delete those that are no longer wanted."""
        if not all(bool(p.isfinite().all()) for p in self.trained.values()):
            raise Diverged(f"the adapter is no longer finite after step {self.step}; no checkpoint of it was written")
        state = {
            "names": list(self.trained),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_states(),
            "method": {k: v.detach().cpu() for k, v in self.method_state.items()},
        }
        epoch, at = divmod(self.step, self.feed.per_epoch)
        about = {
            "step": self.step, "total": self.total, "epoch": epoch, "examples_into_epoch": at * self.feed.batch,
            "best": self.best, "tokens": self.tokens, "seconds": self.seconds, "data": data,
            "settings": identity(self.settings), "adapter": self.adapter(),
        }
        path = checkpoint.write(run_dir, self.step, self.host.tensors(self.name), state, about)
        checkpoint.prune(run_dir, self.settings.run.keep_last, self.best[1] if self.best else None)
        return path

    def adapter(self) -> dict[str, Any]:
        """What hangs where, as JSON has it."""
        at = [f"{k}:{s.places[self.name].wiring}".rstrip(":") for k, s in self.host.sites.items() if self.name in s.places]
        return json.loads(json.dumps({**describe(self.host.edits[self.name]), "at": at}))

    def restore(self, found: checkpoint.Checkpoint, data: str) -> None:
        """Become what was saved. Raises InlayError for other data or another adapter."""
        if found.about["data"] != data:
            raise InlayError(f"{found.path} was trained on other data (or the same data, tokenised differently)")
        if changed := differences(found.about["adapter"], self.adapter()):
            raise InlayError(f"{found.path} is of another adapter: {'; '.join(changed)}")
        if found.state["names"] != list(self.trained):
            raise InlayError(f"{found.path} holds the optimizer of an adapter with other tensors")
        self.host.fill(self.name, found.adapter)
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.schedule.load_state_dict(found.state["schedule"])
        self.scaler.load_state_dict(found.state["scaler"])
        self.method_state = {k: v.to(self.host.device) for k, v in found.state["method"].items()}
        about = found.about
        self.step, self.tokens, self.seconds = about["step"], about["tokens"], about["seconds"]
        self.best = tuple(about["best"]) if about["best"] else None
        checkpoint.set_random_states(found.state["random"])


def fit(
    host: Host, name: str, examples: Sequence[Example], val_examples: Sequence[Example], settings: TrainSettings,
    run_dir: str | Path, tokenizer: Any, *, resume: bool | str | Path = False, overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train the adapter `name`, which hangs on `host`, on encoded examples.

    Args:
        examples: rows of `input_ids` and `labels` (`inlay.tasks.encode`).
        val_examples: the same for validation; may be empty.
        settings: `optim` and `run` are obeyed, the rest is recorded: loading model and data is `train`'s work.
        run_dir: the run folder (see docs/training.md).
        tokenizer: only its padding id is used; None pads with 0 (masked, so the value does not matter).
        resume: True goes on from the last checkpoint, or begins if there is none; a path names the checkpoint.
        overwrite: replace the run in this folder.
        facts: further entries for `data.json`, also kept with the adapter.

    Raises:
        InlayError: no gradient reached the adapter; the loss or gradient is not finite (the adapter on the host is then the one
            before that step, and the message names the last checkpoint); a checkpoint cannot be written; the folder holds another
            run.
    """
    run_dir = Path(run_dir)
    _check(host, name, settings)
    train, val = usable(examples, "training"), usable(val_examples, "validation") if val_examples else []
    pad = next((i for i in (getattr(tokenizer, a, None) for a in ("pad_token_id", "eos_token_id")) if i is not None), 0)
    about = {"train": record.counts(examples, train), "validation": record.counts(val_examples, val) if val else None, **(facts or {})}
    with record.locked(run_dir), contextlib.ExitStack() as stack:
        found = record.start(run_dir, settings, resume, overwrite)
        seed_everything(settings.run.seed)
        loop = Loop(host, name, train, val, settings, pad)
        data = about["train"]["sha256_of_tokens"]
        if found is not None:
            loop.restore(found, data)
        record.write_json(run_dir / "data.json", about)
        journal = Journal(run_dir, loop.step)
        stack.callback(journal.close)
        _announce(loop, journal, run_dir, found)
        with training(host, name, settings.run.gradient_checkpointing):
            _run(loop, run_dir, data, journal, stack)
        return _finish(loop, run_dir, journal, about)


def _check(host: Host, name: str, settings: TrainSettings) -> None:
    if name not in host.edits:
        raise unknown("adapter", name, host.edits, "Hang it first with add() or load().")
    if not host.parameters(name):
        raise InlayError(f"{name!r} has nothing to train")
    wanted = settings.run.dtype
    if wanted and host.dtype != DTYPES[wanted]:
        raise InlayError(f"the settings say dtype {wanted}, but the base is {host.dtype}; load it so, or leave dtype out")


def _announce(loop: Loop, journal: Journal, run_dir: Path, found: checkpoint.Checkpoint | None) -> None:
    changed = record.write_environment(run_dir, loop.host.device, loop.step)
    if found is None:
        journal.say(f"begin: {loop.host.count(loop.name):,} trained numbers, {loop.total} steps, {loop.feed.per_epoch} an epoch")
    else:
        journal.say(f"go on from {found.path}, step {loop.step} of {loop.total}")
    if found is not None and changed:
        journal.say(f"this machine or software differs, so the result may, too: {'; '.join(changed)}")
    if loop.schedule.get_last_lr()[0] < loop.settings.optim.lr and loop.settings.optim.warmup >= loop.total:
        journal.say(f"warm-up ({loop.settings.optim.warmup:g} steps) is as long as the run: the full learning rate is never reached")
    if loop.val and loop.settings.run.final == "best" and not loop.settings.run.eval_every:
        journal.say("eval_every is 0: validation happens once, at the end")
    journal.say(f"metrics go to metrics.jsonl{''.join(f', {n}' for n in chosen(loop.settings.run))}")


def _run(loop: Loop, run_dir: Path, data: str, journal: Journal, stack: contextlib.ExitStack) -> None:
    run = loop.settings.run
    outlets = trackers(run_dir, loop.settings, loop.step)
    for outlet in outlets:
        stack.callback(outlet.close)
    bar = stack.enter_context(Bar(loop.total, loop.step, run.progress))
    try:
        while loop.step < loop.total:
            first = loop.unreached is None
            metrics = loop.advance()
            if first and (missed := loop.unreached):
                journal.say(f"no gradient reached {len(missed)} of {len(loop.trained)} tensors in the first step: {', '.join(missed[:4])}")
            last = loop.step == loop.total
            better = False
            if loop.val and (last or (run.eval_every and loop.step % run.eval_every == 0)):
                metrics["val_loss"] = loop.validate()
                better = loop.best is None or metrics["val_loss"] < loop.best[0]
                loop.best = (metrics["val_loss"], loop.step) if better else loop.best
            journal.write(metrics)
            for outlet in outlets:
                outlet.log({k: v for k, v in metrics.items() if k != "step"}, loop.step)
            bar.update(metrics)
            if last or better and run.final == "best" or (run.save_every and loop.step % run.save_every == 0):
                loop.save(run_dir, data)
    except BaseException as e:
        loop.optimizer.zero_grad(set_to_none=True)
        with contextlib.suppress(OSError):  # the disk may be why it stopped
            journal.say(f"stopped after step {loop.step}: {type(e).__name__}: {e}")
        if isinstance(e, OSError):
            raise InlayError(f"cannot write to {run_dir}: {e}. {checkpoint.last_good(run_dir)} Make room, then resume.") from e
        if isinstance(e, Diverged):
            raise Diverged(f"{e}. {checkpoint.last_good(run_dir)} Try a lower lr, longer warm-up, or dtype bf16 or fp32.") from None
        raise


def _finish(loop: Loop, run_dir: Path, journal: Journal, facts: Mapping[str, Any]) -> RunResult:
    from inlay.api import save

    final = "best" if loop.best is not None and loop.settings.run.final == "best" else "last"
    if final == "best" and loop.best[1] != loop.step:  # type: ignore[index]
        loop.host.fill(loop.name, checkpoint.read(run_dir / f"checkpoint-{loop.best[1]}").adapter)  # type: ignore[index]
    val_loss, best_step = loop.best or (None, None)
    told = {"steps": loop.step, "weights": final, "val_loss": val_loss, "best_step": best_step, "tokens": loop.tokens}
    try:
        adapter = save(loop.host, loop.name, run_dir / "adapter", about={"training": {**told, **identity(loop.settings)}, "data": facts})
    except OSError as e:
        raise InlayError(f"cannot write {run_dir / 'adapter'}: {e}. {checkpoint.last_good(run_dir)} Make room, then resume.") from e
    journal.say(f"done: {adapter} holds the {final} weights{f' (step {best_step})' if final == 'best' else ''}")
    loss = _last_loss(run_dir)
    return RunResult(
        run_dir=run_dir, adapter=adapter, final=final, steps=loop.step, loss=loss, val_loss=val_loss, best_step=best_step,
        tokens=loop.tokens, seconds=loop.seconds,
    )


def _last_loss(run_dir: Path) -> float:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
