"""A task made ready to run: its records, and the prompt that each adapter is given for each of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.evaluate.batches import context
from inlay.evaluate.prompting import Prompting
from inlay.evaluate.rows import GenerateSettings, end_ids
from inlay.tasks import AnyTemplate, Record, Task, encode_prompt, load
from inlay.tasks.protocols import Protocol


@dataclass(frozen=True)
class Item:
    """A record and its prompt in one template."""

    index: int
    """In the task's own file."""
    record: Record
    ids: list[int]
    cut: bool
    """Whether the prompt lost its middle."""


@dataclass(frozen=True)
class PreparedTask:
    """One task, ready to run."""

    task: Task
    items: list[Item]
    """Prompts by the default template."""
    settings: GenerateSettings
    prompts: dict[str, list[Item]]
    """Adapter -> the same records in the adapter's own template."""


@dataclass(frozen=True)
class Preparation:
    """Makes tasks ready to run.

    Args:
        reserve: positions that virtual tokens take.
        decoding: overrides of `GenerateSettings`.
        templates: adapter -> its template.
    """

    prompting: Prompting
    protocol: Protocol
    how: Literal["generate", "options"]
    reserve: int
    decoding: Mapping[str, Any]
    batch_size: int
    templates: Mapping[str, AnyTemplate]

    def __call__(self, task: Task, records: list[tuple[int, Record]]) -> PreparedTask:
        protocol = self.protocol
        if self.how == "options" and task.kind not in ("choice", "letter"):
            raise InlayError(f"{task.name} asks for a {task.kind}, not for one of several options; use how='generate'")
        if task.kind not in protocol.rules:
            raise InlayError(
                f"protocol {protocol.name!r} has no rule for {task.kind} answers ({task.name}); use 'clean'"
            )
        settings = self._settings(task)
        default = self.prompting.default
        made: dict[AnyTemplate, list[Item]] = {}
        for template in (default, *self.templates.values()):
            if template not in made:
                made[template] = self._items(records, template, settings)
        prompts = {label: made[template] for label, template in self.templates.items()}
        return PreparedTask(task, made[default], settings, prompts)

    def _settings(self, task: Task) -> GenerateSettings:
        known = [f.name for f in dataclasses.fields(GenerateSettings)]
        if strange := [name for name in self.decoding if name not in known]:
            raise unknown("decoding setting", strange[0], known)
        beams = 1 if self.decoding.get("temperature") else self.protocol.beams
        default = {"max_new_tokens": task.max_new_tokens, "beams": beams, "batch_size": self.batch_size}
        settings = GenerateSettings(**{**default, **self.decoding})
        ends = end_ids(self.prompting.host, self.prompting.tokenizer)
        stops = self.prompting.stops(list(self.templates.values()), ends)
        return dataclasses.replace(settings, stop=tuple(dict.fromkeys([*settings.stop, *stops])))

    def _items(
        self, records: list[tuple[int, Record]], template: AnyTemplate, settings: GenerateSettings
    ) -> list[Item]:
        host, tokenizer = self.prompting.host, self.prompting.tokenizer
        cutoff = _cutoff(host, self.protocol, self.reserve, settings.max_new_tokens)
        chosen = None if self.protocol.fixed else template
        items = []
        for index, record in records:
            example = encode_prompt(record, tokenizer, self.protocol, cutoff, chosen)
            items.append(Item(index, record, example.input_ids, example.truncated))
        return items


def _cutoff(host: Host, protocol: Protocol, reserve: int, new: int) -> int | None:
    """Most tokens of a prompt: what the answer leaves of the context, but no less than half of it."""
    most = context(host)
    if most is None or protocol.truncation == "right":
        return None
    return (most - reserve) - min(new, (most - reserve) // 2)


def read_records(
    task: Task, given: Mapping[str, Sequence[Record]] | None, split: str, data: Any, limit: int | None, seed: int
) -> list[tuple[int, Record]]:
    """(index in the task's file, record). A limit keeps the indices of the whole file."""
    if given is not None:
        if task.name not in given:
            raise unknown("task in `records`", task.name, given)
        whole = list(given[task.name])
    elif task.group == "world" and data is None:
        return list(enumerate(load(task, split, None, limit, seed)))
    else:
        whole = load(task, split, data)
    if not whole:
        raise InlayError(f"{task.name} has no records")
    if limit is None or limit >= len(whole):
        return list(enumerate(whole))
    if limit < 1:
        raise InlayError(f"limit {limit}: at least 1 record, or None for all")
    return [(i, whole[i]) for i in sorted(random.Random(seed).sample(range(len(whole)), limit))]
