"""`train(settings)`: from a recipe to an adapter. Loads base and data, hangs the adapter, lets `fit` do the rest."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError
from inlay.core.files import sha256
from inlay.threads import keep_threads
from inlay.train.ahead import Ahead
from inlay.train.fitting import RunResult, fit
from inlay.train.loop import seed_everything
from inlay.train.ranks import Team, joined, place, spread
from inlay.train.record import check, threads_of
from inlay.train.settings import DataSettings, TrainSettings

if TYPE_CHECKING:
    from inlay.core.host import Host
    from inlay.engine.example import Example
    from inlay.tasks import AnyTemplate, Protocol, Record
    from inlay.train.objective import Objective
    from inlay.train.observe import Observer


@dataclass(frozen=True)
class Lesson:
    """What a run learns from."""

    examples: Sequence[Example]
    val_examples: Sequence[Example]
    facts: dict[str, Any] = field(default_factory=dict)
    """Entries for `data.json`."""
    objective: Objective | None = None
    template: AnyTemplate | None = None
    """By which the adapter is to be asked; recorded with it."""
    observers: Sequence[Observer] = ()


Teach = Callable[["Host", Any], Lesson]
"""From a host and a tokenizer to a lesson."""


def train(
    settings: TrainSettings,
    *,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    plan: Callable[[Any, bool], Teach] | None = None,
) -> RunResult:
    """Train one adapter as the settings say and leave it in `<out>/adapter`.

    Args:
        resume: True goes on from the last checkpoint in `settings.out`, or begins if there is none; a path names the
            checkpoint.
        overwrite: replace the run in `settings.out`.
        plan: called with the settings, and whether to show progress, before the base is loaded: reads what is cheap to
            get wrong, and returns what makes the lesson. `records`, the settings' data, if not given.

    Raises:
        InlayError: as `fit`, and for an unknown base, method, setting, place, task or file.
    """
    with joined() as team:
        return _train(settings, resume, overwrite, team, plan or records)


def records(settings: TrainSettings, progress: bool) -> Teach:
    """The lesson of a task or file, tokenised while the base is loaded."""
    from inlay.models.base import load_tokenizer
    from inlay.tasks import encode, protocols, template_choice

    protocol, asked = protocols.get(settings.data.protocol), settings.data.template
    protocol.check_template(asked)
    template_choice.check(asked)
    train, val = read(settings.data, settings.run.seed)

    def prepare() -> Callable[[Record], Example]:
        own = load_tokenizer(settings.model)
        template = protocol.template(asked, own)
        return lambda record: encode(record, own, protocol, settings.data.cutoff, template)

    ahead = Ahead([*train, *val], prepare)

    def teach(host: Host, tokenizer: Any) -> Lesson:
        examples = ahead.get("tokenising", progress)
        template = protocol.template(asked, tokenizer)
        facts = provenance(settings.data, protocol, template or protocol.train)
        return Lesson(examples[: len(train)], examples[len(train) :], facts, template=template or protocol.eval)

    return teach


def _train(
    settings: TrainSettings,
    resume: bool | str | Path,
    overwrite: bool,
    team: Team,
    plan: Callable[[Any, bool], Teach],
) -> RunResult:
    from inlay.api import attach
    from inlay.methods import method
    from inlay.models.base import known_device, load_base

    # Whatever is cheap to get wrong is looked at before the base is loaded.
    row = method(settings.method)
    edit = row.make(**settings.settings)
    known_device(settings.run.device)
    team.from_first(lambda: check(settings.out, settings, resume, overwrite))
    if resume:
        keep_threads(threads_of(settings.out))
    teach = plan(settings, settings.run.progress and team.first)
    # A base to be sharded is taken to the devices block by block.
    device = "cpu" if spread(settings.run.parallel, team.size)[0] else str(place(settings.run.device))
    model, tokenizer = load_base(settings.model, settings.run.dtype, device)
    seed_everything(settings.run.seed)
    host = attach(model)
    host.add(
        settings.name,
        edit.tokenised(tokenizer),
        at=settings.at if settings.at is not None else row.places,
        seed=settings.run.seed,
    )
    lesson = teach(host, tokenizer)
    return fit(
        host,
        settings.name,
        lesson.examples,
        lesson.val_examples,
        settings,
        settings.out,
        tokenizer,
        resume=resume,
        overwrite=overwrite,
        facts=lesson.facts,
        objective=lesson.objective,
        observers=lesson.observers,
        template=lesson.template,
    )


def read(data: DataSettings, seed: int) -> tuple[list[Record], list[Record]]:
    """(training records, validation records), the latter from their own file or drawn from the former with the seed."""
    from inlay.tasks import Task, load

    if data.task is None and data.train_file is None:
        raise InlayError(
            "nothing to train on: give a task (such as world-arith; `inlay.tasks.TASKS` has all), train_file, or both"
        )
    if data.val_file is not None and data.val_size:
        raise InlayError("give val_file or val_size, not both")
    file = Task(name="your file", kind="text", group="training", licence="not known", sizes={})
    records = with_output(load(data.task or file, "train", data.train_file, data.limit, seed), data)
    if data.val_file is not None:
        return records, load(file, "train", data.val_file)
    if data.val_size >= len(records):
        raise InlayError(f"val_size {data.val_size} leaves nothing to train on: there are {len(records)} records")
    held = set(random.Random(seed).sample(range(len(records)), data.val_size))
    return [r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)]


def with_output(records: list[Record], data: DataSettings) -> list[Record]:
    """Return the records that have something to learn where only the output is learned.

    Raises:
        InlayError: `data.empty_outputs` is `refuse` and some have no output; it names them all.
    """
    from inlay.tasks import protocols

    if protocols.get(data.protocol).loss_on != "answer":
        return records
    empty = [i for i, r in enumerate(records) if not r.output.strip()]
    if not empty:
        return records
    source = data.train_file or data.task
    which = ", ".join(map(str, empty[:20])) + (", ..." if len(empty) > 20 else "")
    drawn = "" if data.limit is None else f" of the {len(records)} that were drawn"
    if data.empty_outputs == "refuse":
        raise InlayError(
            f"{source}: {len(empty)} of {len(records)} records have an empty output, so there is nothing to learn: "
            f"record {which}{drawn}, counted from 0. Mend them, or leave them out with --empty-outputs skip"
        )
    warnings.warn(f"{source}: {len(empty)} of {len(records)} records left out, their output is empty", stacklevel=2)
    return [r for r in records if r.output.strip()]


def provenance(data: DataSettings, protocol: Protocol, template: AnyTemplate) -> dict[str, Any]:
    """Where the data came from and how it was written out, for `data.json`."""
    from inlay.tasks import get

    shown = hashlib.sha256(template.text.encode()).hexdigest()
    task = get(data.task) if data.task is not None else None
    return {
        "task": task.name if task else None,
        "licence": task.licence if task else None,
        "leaks": leak_hint(task.note if task else ""),
        "files": file_facts([data.train_file, data.val_file]),
        "protocol": protocol.name,
        "loss_on": protocol.loss_on,
        "template": {"name": template.name, "sha256": shown},
    }


def file_facts(paths: Sequence[Path | None]) -> list[dict[str, Any]]:
    """Path, SHA-256 and size of each file, for `data.json`."""
    found = []
    for path in (p for p in paths if p is not None):
        whole = path.is_file()
        found.append(
            {
                "path": str(path.resolve()),
                "sha256": sha256(path) if whole else None,
                "bytes": path.stat().st_size if whole else None,
            }
        )
    return found


def leak_hint(note: str) -> str:
    """What is known of the overlap with test sets, and how to measure it."""
    told = "Not measured here: inlay.tasks.leaks.report(train, test) counts test questions in a training set"
    return f"{note}. {told}" if note else told
