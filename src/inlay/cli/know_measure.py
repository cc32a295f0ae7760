"""`inlay know measure`: what a base says to each question now, and how far that is from the right answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.knowledge.commands import MeasureFlags


def run(s: MeasureFlags) -> None:
    """Measure, print a summary, and say where the table is."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge import commands

    table, folder = commands.run_measure(s)
    out = Console(highlight=False)
    out.print(commands.shown(table))
    out.print(f"table: [bold]{escape(str(folder))}[/]", soft_wrap=True)


VERB = Verb(
    "know measure",
    "The base's own answer to each question, and its semantic distance from the right one.",
    "inlay.knowledge.commands:MeasureFlags",
    run,
    (
        "inlay know measure --model base --items facts.jsonl --out table",
        "inlay know measure --model llama-dir --items facts.jsonl --template 'Question: {prompt} Answer:' --out table",
        "inlay know measure --model base --items facts.jsonl --space hidden:-1 --center --out hidden-table",
    ),
)
