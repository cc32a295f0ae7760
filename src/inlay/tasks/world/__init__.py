"""Synthetic world: records to adapt on, facts to edit, declarative text to pretrain on; standard library only."""

from __future__ import annotations

from inlay.tasks.world.corpus import corpus
from inlay.tasks.world.people import Fact, facts
from inlay.tasks.world.records import NAMES, records

__all__ = ["NAMES", "Fact", "corpus", "facts", "records"]
