"""`inlay know ...`: what a model learns of facts. The verbs are in files beside this one, `know_<verb>.py`."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.cli.verbs import Verb


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """The group has no settings of its own."""


VERB = Verb(
    "know",
    "Measure, watch and steer what is learned of facts, by semantic distance.",
    Nothing,
    lambda _: None,
    ("inlay know measure --model base --items facts.jsonl --out table",),
)
