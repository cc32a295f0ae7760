"""`inlay know study`: remedies, controls and interference on the toy world, run by run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.knowledge.design import StudySettings


def run(s: StudySettings) -> None:
    """Run what is missing, and say where the report is."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge.design import jobs
    from inlay.knowledge.study import load, study

    page = study(s)
    done, total = len(load(s)), len(jobs(s))
    out = Console(highlight=False)
    more = "" if done == total else "; the same command goes on with the rest"
    out.print(f"{done} of {total} runs{more}")
    out.print(f"report: [bold]{escape(str(page))}[/]", soft_wrap=True)


VERB = Verb(
    "know study",
    "Families, methods, remedies and all their controls on the toy world; resumable, with a report.",
    "inlay.knowledge.design:StudySettings",
    run,
    (
        "inlay know study --out study --minutes 25",
        "inlay know study --out small --families llama --methods lora:rank=4 --seeds 0 1 --ks 1 24",
    ),
)
