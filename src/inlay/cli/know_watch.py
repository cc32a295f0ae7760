"""`inlay know watch`: train an adapter on items and watch each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.knowledge.commands import WatchFlags


def run(s: WatchFlags) -> None:
    """Train and watch, print the snapshots, and say where they are."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge import commands
    from inlay.train.ranks import rank

    result = commands.run_watch(s)
    if rank():
        return
    out = Console(highlight=False)
    out.print(commands.snapshots_shown(result.run_dir))
    if not s.retention:
        out.print("[yellow]what is forgotten was not looked at: give --retention FILE, facts not trained on[/]")
    out.print(f"adapter: [bold]{escape(str(result.adapter))}[/]", soft_wrap=True)
    out.print(f"watched: [bold]{escape(str(result.run_dir / 'watched'))}[/]", soft_wrap=True)


VERB = Verb(
    "know watch",
    "Train an adapter on facts and watch each: learned, approached, stalled or away; and what is forgotten.",
    "inlay.knowledge.commands:WatchFlags",
    run,
    (
        "inlay know watch --model base --items facts.jsonl --retention kept.jsonl --method lora --out runs/edits",
        "inlay know watch --model base --items facts.jsonl --method series --size 16 --at-steps 50 400 --out runs/s",
    ),
)
