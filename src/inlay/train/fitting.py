"""`fit`: an adapter on a host, encoded examples and settings in; a run folder and a trained adapter out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.config import context_length
from inlay.core.errors import InlayError, Terminated, unknown
from inlay.core.files import DiskError
from inlay.core.host import Host
from inlay.engine import cache
from inlay.engine.example import Example, as_example
from inlay.models.base import DTYPES
from inlay.tasks.protocols import PROTOCOLS
from inlay.tasks.template_choice import AnyTemplate, template_json
from inlay.train import checkpoint, record
from inlay.train.bar import Bar
from inlay.train.batches import usable
from inlay.train.loop import Diverged, Loop, seed_everything, training
from inlay.train.objective import Objective
from inlay.train.observe import Observer
from inlay.train.ranks import joined
from inlay.train.settings import TrainSettings, identity
from inlay.train.signals import Termination, termination
from inlay.train.track import Journal, Mute, chosen, trackers


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


def fit(
    host: Host,
    name: str,
    examples: Sequence[Example],
    val_examples: Sequence[Example],
    settings: TrainSettings,
    run_dir: str | Path,
    tokenizer: Any,
    *,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    observers: Sequence[Observer] = (),
    template: AnyTemplate | None = None,
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
        objective: what is minimised; the mean over learned tokens if not given.
        observers: told of every step (see `inlay.train.observe`).
        template: of the examples' prompts, which is recorded with the adapter; if not given, the one of
            `settings.data.protocol`.

    Raises:
        InlayError: no gradient reached the adapter; the loss or gradient is not finite (that step is not taken, and the
            message names the last checkpoint); a checkpoint cannot be written; the folder holds another run.
    """
    run_dir = Path(run_dir)
    _check(host, name, settings)
    if template is None and name not in host.templates and settings.data.protocol in PROTOCOLS:
        template = PROTOCOLS[settings.data.protocol].eval
    if template is not None:
        host.templates[name] = template_json(template)
    examples = [as_example(row, f"training example {i}") for i, row in enumerate(examples)]
    val_examples = [as_example(row, f"validation example {i}") for i, row in enumerate(val_examples)]
    train, val = usable(examples, "training"), usable(val_examples, "validation") if val_examples else []
    _check_lengths(host, name, [*train, *val])
    about = _about(examples, train, val_examples, val, facts or {})
    digests = [part["sha256_of_tokens"] for part in (about["train"], about["validation"]) if part]
    data = "+".join(digests) + (objective.digest if objective else "")
    with joined() as team, contextlib.ExitStack() as stack:
        team.from_first(lambda: stack.enter_context(record.locked(run_dir)))
        beside = team.from_first(lambda: record.beside(run_dir))
        found = team.from_first(lambda: record.start(run_dir, settings, resume, overwrite))
        team.same((data, settings.optim, settings.run, about["validation"]), "the data or the settings")
        seed_everything(settings.run.seed, team.rank)
        loop = Loop(host, name, train, val, settings, _pad(tokenizer), team, objective)
        if found is not None:
            loop.restore(found, data)
            if team.first:
                checkpoint.forget(run_dir, loop.step)
        if team.first:
            record.write_json(run_dir / "data.json", about)
        journal = Journal(run_dir, loop.step) if team.first else Mute()
        stack.callback(journal.close)
        if team.first:
            _announce(loop, journal, run_dir, found, beside)
        if (where := settings.run.cache_activations) != "off":
            keep = loop.way.remember
            journal.tell(keep(name, train, "ram" if where == "ram" else cache.file(run_dir), json.dumps(loop.base)))
        with training(host, name, settings.run.gradient_checkpointing), loop.active():
            _run(loop, run_dir, data, journal, stack, observers)
        return _finish(loop, run_dir, journal, about)


def _about(
    examples: Sequence[Example],
    train: Sequence[Example],
    val_examples: Sequence[Example],
    val: Sequence[Example],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What `data.json` says."""
    return {
        "train": record.counts(examples, train),
        "validation": record.counts(val_examples, val) if val else None,
        **facts,
    }


def _pad(tokenizer: Any) -> int:
    known = (getattr(tokenizer, a, None) for a in ("pad_token_id", "eos_token_id"))
    return next((i for i in known if i is not None), 0)


def _check(host: Host, name: str, settings: TrainSettings) -> None:
    if name not in host.edits:
        raise unknown("adapter", name, host.edits, "Hang it first with add() or load().")
    if not host.parameters(name):
        raise InlayError(f"{name!r} has nothing to train")
    wanted = settings.run.dtype
    if wanted and host.dtype != DTYPES[wanted]:
        raise InlayError(
            f"the settings say dtype {wanted}, but the base is {host.dtype}; load it so, or leave dtype out"
        )


def _check_lengths(host: Host, name: str, examples: Sequence[Example]) -> None:
    """Refuse examples that, behind the adapter's virtual tokens, are longer than the base's context."""
    limit, virtual = context_length(host.model.config), host.edits[name].room
    longest = max(len(e.input_ids) for e in examples)
    if limit is not None and longest + virtual > limit:
        over = sum(len(e.input_ids) + virtual > limit for e in examples)
        columns = f" and {virtual} virtual tokens" if virtual else ""
        raise InlayError(
            f"{over} of {len(examples)} examples do not fit into the base's context of {limit} positions: the longest "
            f"has {longest} tokens{columns}; set the cutoff to {limit - virtual} or less"
            if virtual < limit
            else f"{virtual} virtual tokens do not fit into the base's context of {limit} positions; use fewer"
        )


def _announce(
    loop: Loop, journal: Journal, run_dir: Path, found: checkpoint.Checkpoint | None, beside: Sequence[str]
) -> None:
    kept = loop.settings.run.cache_activations
    form = {"base_form": loop.base["form"]} if "form" in loop.base else {}
    changed = record.write_environment(
        run_dir, loop.host.device, loop.step, ranks=loop.team.size, cache_activations=kept, **form
    )
    if found is None:
        journal.say(
            f"begin: {loop.host.count(loop.name):,} trained numbers, {loop.total} steps, {loop.feed.per_epoch} an epoch"
        )
    else:
        for damaged in found.skipped:
            journal.tell(f"passed over: {damaged}")
        journal.say(f"go on from {found.path}, step {loop.step} of {loop.total}")
    if beside:
        more = ", ..." if len(beside) > 5 else ""
        journal.tell(f"there was no run in {run_dir} but {', '.join(beside[:5])}{more}: this one begins beside them")
    if found is not None and changed:
        journal.tell(f"what this session computes with differs, so the result may, too: {'; '.join(changed)}")
    for told in filter(None, (loop.asked, loop.notice)):
        journal.tell(told)
    if loop.schedule.get_last_lr()[0] < loop.settings.optim.lr and loop.settings.optim.warmup >= loop.total:
        journal.tell(
            f"warm-up ({loop.settings.optim.warmup:g} steps) is as long as the run: the full rate is not reached; "
            "give a shorter warmup"
        )
    if loop.val and loop.settings.run.final == "best" and not loop.settings.run.eval_every:
        journal.say("eval_every is 0: validation happens once, at the end")
    journal.say(f"metrics go to metrics.jsonl{''.join(f', {n}' for n in chosen(loop.settings.run))}")


def _run(
    loop: Loop, run_dir: Path, data: str, journal: Journal, stack: contextlib.ExitStack, observers: Sequence[Observer]
) -> None:
    outlets = trackers(run_dir, loop.settings, loop.step) if loop.team.first else []
    for outlet in outlets:
        stack.callback(outlet.close)
    bar = stack.enter_context(Bar(loop.total, loop.step, loop.settings.run.progress and loop.team.first))
    # Ranks take the signal in different steps: together they could not save, so there it ends them at once.
    asked = stack.enter_context(termination()) if loop.team.size == 1 else Termination()
    try:
        loop.objective.prepare(loop.survey)
        for observer in observers:
            observer.begin(loop, run_dir)
        while loop.step < loop.total:
            metrics = _step(loop, journal, observers)
            better = _validate(loop, metrics)
            journal.write(metrics)
            for outlet in outlets:
                outlet.log({k: v for k, v in metrics.items() if k != "step" and not isinstance(v, list)}, loop.step)
            bar.update(metrics)
            if _due(loop, better) or asked.requested:
                loop.save(run_dir, data)
            if asked.requested and loop.step < loop.total:
                raise Terminated
        loop.writer.wait()
        loop.team.ready()
    except BaseException as e:
        _stop(loop, run_dir, journal, e)
        if (told := _told(run_dir, e)) is not None:
            raise told from (None if isinstance(e, Diverged) else e)
        raise


def _step(loop: Loop, journal: Journal, observers: Sequence[Observer]) -> dict[str, Any]:
    """One step and its metrics."""
    loop.writer.check()
    first = loop.unreached is None
    for observer in observers:
        observer.before_step(loop)
    metrics = loop.advance()
    for observer in observers:
        metrics |= observer.after_step(loop)
    if first and (missed := loop.unreached):
        journal.tell(
            f"no gradient reached {len(missed)} of {len(loop.trained)} tensors in the first step: "
            + ", ".join(missed[:4])
        )
    return metrics


def _validate(loop: Loop, metrics: dict[str, Any]) -> bool:
    """Validate where it is time to; whether no step was better."""
    every = loop.settings.run.eval_every
    if not loop.val or not (loop.step == loop.total or (every and loop.step % every == 0)):
        return False
    metrics["val_loss"] = loop.validate()
    better = loop.best is None or metrics["val_loss"] < loop.best[0]
    loop.best = (metrics["val_loss"], loop.step) if better else loop.best
    return better


def _due(loop: Loop, better: bool) -> bool:
    """Whether this step gets a checkpoint."""
    run = loop.settings.run
    regular = run.save_every and loop.step % run.save_every == 0
    return bool(loop.step == loop.total or (better and run.final == "best") or regular)


def _stop(loop: Loop, run_dir: Path, journal: Journal, e: BaseException) -> None:
    """Leave everything in order, and say why it stopped."""
    with contextlib.suppress(BaseException):  # `e` came first
        loop.writer.wait()
    loop.optimizer.zero_grad(set_to_none=True)
    if isinstance(e, Exception) and not loop.unheard:
        loop.team.fail()
    with contextlib.suppress(OSError):  # the disk may be why it stopped
        if isinstance(e, (KeyboardInterrupt, Terminated)):
            there = checkpoint.last_good(run_dir)
            why = "" if isinstance(e, KeyboardInterrupt) else " by SIGTERM"
            journal.tell(f"stopped{why} after step {loop.step}. {there} To go on: --resume, or resume=True")
        else:
            journal.say(f"stopped after step {loop.step}: {type(e).__name__}: {e}")


def _told(run_dir: Path, e: BaseException) -> InlayError | None:
    """An error in words that say what to do, where it needs any."""
    if isinstance(e, DiskError):
        return InlayError(f"{e}. {checkpoint.last_good(run_dir)} Make room, then resume.")
    if isinstance(e, OSError):
        return InlayError(f"cannot write to {run_dir}: {e}. {checkpoint.last_good(run_dir)} Make room, then resume.")
    if isinstance(e, Diverged):
        return Diverged(f"{e}. {checkpoint.last_good(run_dir)} Try a lower lr, longer warm-up, or dtype bf16 or fp32.")
    return None


def _finish(loop: Loop, run_dir: Path, journal: Journal, facts: Mapping[str, Any]) -> RunResult:
    from inlay.api import save

    final = "best" if loop.best is not None and loop.settings.run.final == "best" else "last"
    val_loss, best_step = loop.best or (None, None)
    if final == "best" and best_step != loop.step:
        loop.fill(loop.team.from_first(lambda: checkpoint.read(run_dir / f"checkpoint-{best_step}").adapter))
    told = {"steps": loop.step, "weights": final, "val_loss": val_loss, "best_step": best_step, "tokens": loop.tokens}
    tensors = loop.tensors()
    try:
        adapter = loop.team.from_first(
            lambda: save(
                loop.host,
                loop.name,
                run_dir / "adapter",
                about={"training": {**told, **identity(loop.settings)}, "data": facts},
                tensors=tensors,
                base=loop.base,
            )
        )
    except DiskError as e:
        raise InlayError(f"{e}. {checkpoint.last_good(run_dir)} Make room, then resume.") from e
    journal.say(f"done: {adapter} holds the {final} weights{f' (step {best_step})' if final == 'best' else ''}")
    loss = loop.team.from_first(lambda: _last_loss(run_dir))
    return RunResult(
        run_dir=run_dir,
        adapter=adapter,
        final=final,
        steps=loop.step,
        loss=loss,
        val_loss=val_loss,
        best_step=best_step,
        tokens=loop.tokens,
        seconds=loop.seconds,
    )


def _last_loss(run_dir: Path) -> float:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
