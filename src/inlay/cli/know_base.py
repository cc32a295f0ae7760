"""`inlay know base`: a small base that knows the toy world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay.cli.verbs import Verb
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class BaseSettings(ThreadSettings):
    """Which base."""

    family: Literal["llama", "gptj", "bloom"] = "llama"
    """Its architecture: two layers of width 96."""
    seed: int = 0
    """Of its weights, the order of its texts, and its world."""
    people: int = 600
    """Known people, with three facts each."""
    strangers: int = 200
    """Further people, whom it never meets."""
    steps: int = 1800
    """Steps of 64 texts."""
    out: Path | None = None
    """Its folder; one in the user's cache if not given. A base that is there is not made again."""
    progress: bool = True
    """Show a progress bar."""


def run(s: BaseSettings) -> None:
    """Make it, and say what it knows."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge.pretrain import make_base
    from inlay.knowledge.world import World

    world = World(s.seed, s.people, s.strangers)
    folder = make_base(s.family, s.seed, s.out, world=world, steps=s.steps, progress=s.progress)
    scores = json.loads((folder / "world.json").read_text(encoding="utf-8"))["exact_match"]
    out = Console(highlight=False)
    told = ", ".join(f"{100 * x:.1f} %" for x in scores)
    out.print(f"facts known, by wording of the question: {told}")
    out.print(f"base: [bold]{escape(str(folder))}[/]", soft_wrap=True)


VERB = Verb(
    "know base",
    "A small base that knows a toy world of people, taught from scratch in minutes and kept.",
    BaseSettings,
    run,
    ("inlay know base --family llama --out base", "inlay know base --family bloom --people 100 --out small"),
)
