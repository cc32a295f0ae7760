"""`inlay know items`: facts as a file of items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay.cli.verbs import Verb


@dataclass(frozen=True, kw_only=True)
class ItemsSettings:
    """Which facts, and where they are written."""

    source: Literal[
        "popqa", "entityquestions", "zsre", "counterfact", "world-edits", "world-new", "world-pairs", "world-known"
    ]
    """A public set, or the toy world: edits of known facts, facts about new people, targets without meaning, or what
    its bases know."""
    file: Path | None = None
    """The public set's own file or folder; without one the Hub is asked."""
    split: Literal["train", "val", "test"] = "train"
    """Which split of the public set."""
    limit: int | None = None
    """At most so many items, drawn with the seed; 360 of the toy world if not given."""
    seed: int = 0
    """Of what is drawn."""
    base: Path | None = None
    """For the toy world: a base of `inlay know base`, whose world it is; the default world if not given."""
    out: Path
    """The JSON-lines file of items."""
    retention: Path | None = None
    """A second file: facts that learning the first should leave as they are."""


def run(s: ItemsSettings) -> None:
    """Make the files, and say what is in them."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.knowledge.items import write_items

    items, kept = _world(s) if s.source.startswith("world-") else _public(s)
    out = Console(highlight=False)
    for path, some in ((s.out, items), (s.retention, kept)):
        if path is not None:
            write_items(path, some)
            out.print(f"{len(some)} items: [bold]{escape(str(path))}[/]", soft_wrap=True)


def _public(s: ItemsSettings):
    from inlay.core.errors import InlayError
    from inlay.knowledge.loaders import load_items

    if s.base is not None:
        raise InlayError("base is of the toy world; leave it out for public sets")
    items = load_items(s.source, s.file, s.split, limit=s.limit, seed=s.seed)
    if s.retention is None:
        return items, []
    return items, load_items(s.source, s.file, s.split, retention=True, limit=s.limit, seed=s.seed)


def _world(s: ItemsSettings):
    from inlay.core.errors import InlayError
    from inlay.knowledge.pretrain import world_of
    from inlay.knowledge.world import World

    if s.file is not None:
        raise InlayError("file is of public sets; the toy world is generated")
    world = World() if s.base is None else world_of(s.base)
    if s.source == "world-known":
        items = world.known()[: s.limit]
    else:
        make = {"world-edits": world.edits, "world-new": world.new_people, "world-pairs": world.random_pairs}[s.source]
        items = make(s.limit or 360, s.seed)
    return items, world.retention(items, seed=s.seed)


VERB = Verb(
    "know items",
    "Facts as a file of items: from public sets (PopQA, EntityQuestions, zsRE, CounterFact) or the toy world.",
    ItemsSettings,
    run,
    (
        "inlay know items --source world-edits --out facts.jsonl --retention kept.jsonl",
        "inlay know items --source counterfact --file counterfact.json --limit 1000 --out facts.jsonl",
    ),
)
