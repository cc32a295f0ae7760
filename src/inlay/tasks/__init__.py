"""Data sets as declarations, two named protocols, extraction, scoring, leak reports; without torch or datasets."""

from inlay.tasks.loading import load, read_records, to_json
from inlay.tasks.protocols import CLEAN, PUBLISHED, Example, Protocol, encode, encode_all, encode_answer, encode_prompt
from inlay.tasks.table import COMMONSENSE, MATH, TASKS, get
from inlay.tasks.task import Record, Task
from inlay.tasks.template_choice import AnyTemplate, choose, recorded, template_json
from inlay.tasks.templates import Template

__all__ = [
    "AnyTemplate",
    "CLEAN",
    "COMMONSENSE",
    "Example",
    "MATH",
    "PUBLISHED",
    "Protocol",
    "Record",
    "TASKS",
    "Task",
    "Template",
    "choose",
    "encode",
    "encode_all",
    "encode_answer",
    "encode_prompt",
    "get",
    "load",
    "read_records",
    "recorded",
    "template_json",
    "to_json",
]
