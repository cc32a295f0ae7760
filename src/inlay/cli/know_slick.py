"""`inlay know slick`: how well a base knows each fact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.knowledge.commands import SlickFlags


def run(s: SlickFlags) -> None:
    """Ask, print the shares, and write the categories."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge import commands
    from inlay.knowledge.slick import shares

    known = commands.run_slick(s)
    out = Console(highlight=False)
    for category, share in shares(known).items():
        out.print(f"{category:<12} {100 * share:5.1f} %")
    out.print(f"categories: [bold]{escape(str(s.out))}[/]", soft_wrap=True)


VERB = Verb(
    "know slick",
    "How well a base knows each fact: HighlyKnown, MaybeKnown, WeaklyKnown or Unknown.",
    "inlay.knowledge.commands:SlickFlags",
    run,
    ("inlay know slick --model llama-dir --items facts.jsonl --out categories.json",),
)
