"""What a data set is to this library: a record, a declaration, and the options of a multiple-choice record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inlay.core.errors import InlayError

Kind = Literal["number", "letter", "choice", "text"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One example in the schema of LLM-Adapters: four strings."""

    instruction: str
    """The problem, its options included."""
    input: str = ""
    """Further context; empty in every published file of the reasoning sets."""
    output: str = ""
    """What a model is trained to say (a worked solution, or `the correct answer is ...`)."""
    answer: str = ""
    """The gold answer that a prediction is compared with."""


@dataclass(frozen=True)
class Format:
    """A public form of a data set: the fields that tell it, and how a row becomes a record."""

    fields: tuple[str, ...]
    """Names every row of this form has."""
    build: Callable[[Row], Record | None]
    """Row to record; None leaves the row out (loading counts and reports these)."""


@dataclass(frozen=True)
class Hub:
    """Where the public source lies on the Hugging Face Hub."""

    id: str
    """Repository, as `owner/name`, or a local folder that `datasets` can read."""
    splits: Mapping[str, tuple[tuple[str | None, str], ...]]
    """Our split to the (config, split) pairs that are concatenated for it."""


@dataclass(frozen=True)
class Checksum:
    """Digests of one published file; either suffices to recognise it."""

    sha256: str | None = None
    """SHA-256 of the file's bytes."""
    blob: str | None = None
    """Git blob id (`git hash-object`), known even for files that were never downloaded here."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set, declared. All tasks are rows of `inlay.tasks.table`; none is a class of its own."""

    name: str
    """The name in tables and files, as the paper spells it."""
    kind: Kind
    """What an answer is: decides extraction and comparison."""
    group: Literal["math", "commonsense", "training", "world"]
    """Which table of the paper it belongs to."""
    licence: str
    """Licence of the public source as generally stated; check it before you redistribute."""
    aliases: tuple[str, ...] = ()
    """Other names; case, blanks, `-` and `_` never matter."""
    formats: tuple[Format, ...] = ()
    """Public forms that `load` recognises besides the LLM-Adapters schema."""
    hub: Hub | None = None
    """Public source, where one is known to hold exactly this set."""
    answers: tuple[str, ...] = ()
    """Every answer that may occur (letters, or `answer1` ...); empty for numbers and free text."""
    option_word: str = ""
    """The word that introduces each option in the instruction (`Answer` for `Answer1: ...`); empty if none does."""
    metric: str = "accuracy"
    """Share of records whose prediction equals the answer; numbers within 0.001."""
    max_new_tokens: int = 32
    """Tokens a model may generate (LLM-Adapters: 256 for arithmetic, 32 for commonsense)."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Records per split of the published files, where known."""
    checksums: Mapping[str, Checksum] = field(default_factory=dict)
    """Digests per split of the published files, where known."""
    parts: tuple[str, ...] = ()
    """Tasks whose training splits, concatenated, give this training set."""
    note: str = ""
    """What a user should know before trusting this set."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits this task declares."""
        known = [*self.sizes, *self.checksums, *(self.hub.splits if self.hub else ())]
        return tuple(dict.fromkeys(known)) or (("train",) if self.group == "training" else ("train", "test"))

    def options(self, record: Record) -> list[str]:
        """The answers open to this record, in order (`["answer1", "answer2", "answer3"]`); empty without options."""
        if self.kind not in ("choice", "letter"):
            return []
        stated = re.search(r"Answer format: (\S+)\s*$", record.instruction)
        if stated is None:
            return list(self.answers)
        return stated[1].split("/")

    def option_texts(self, record: Record) -> list[str]:
        """What each option says, read back from the instruction; the answers themselves where options have no text.

        Raises InlayError where the instruction does not have the published form.
        """
        options = self.options(record)
        if self.kind == "letter":
            return _lettered(self, record, options)
        if not self.option_word or not options:
            return options
        body = record.instruction.rpartition("Answer format:")[0] or record.instruction
        return _cut(self, record, body, [f"{self.option_word}{i + 1}: " for i in range(len(options))])


def _lettered(task: Task, record: Record, letters: list[str]) -> list[str]:
    """Options of AQuA (`(A) ...`) and MathQA (`A ) ... ,`)."""
    head = "Answer Choices:" if "Answer Choices:" in record.instruction else "The options:"
    _, found, body = record.instruction.rpartition(head)
    if not found:
        raise InlayError(f"{task.name}: no 'Answer Choices:' or 'The options:' in {record.instruction[-120:]!r}")
    marks = [f"({x}) " for x in letters] if head == "Answer Choices:" else [f"{x} ) " for x in letters]
    return [text.strip(" ,'[]") if head != "Answer Choices:" else text for text in _cut(task, record, body, marks)]


def _cut(task: Task, record: Record, body: str, marks: list[str]) -> list[str]:
    """The stretches of `body` after each of `marks`, which must follow one another."""
    starts: list[int] = []
    at = body.find("\n\n" + marks[0]) + 2 if "\n\n" + marks[0] in body else body.find(marks[0])
    for mark in marks:
        at = body.find(mark, at) if at >= 0 else -1
        if at < 0:
            raise InlayError(f"{task.name}: no {mark.strip()!r} in the instruction {record.instruction[:120]!r}")
        starts.append(at)
        at += len(mark)
    ends = [*starts[1:], len(body)]
    return [body[s + len(m) : e].strip() for s, e, m in zip(starts, ends, marks, strict=True)]
