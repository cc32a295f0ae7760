"""`inlay know report`: one page from what was measured, watched and tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from inlay.cli.verbs import Verb
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class ReportSettings(ThreadSettings):
    """What is reported."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `know watch`, tables of `know measure`, folders of `know interfere` and `know study`, or a
    report's JSON. Several are put together."""
    out: Path
    """A folder for report.html, report.json and the figures."""
    title: str | None = None
    """The page's title."""
    model: str | None = None
    """The base of watched runs: with it, moving away is compared with its null."""
    progress: bool = True
    """Show what is being drawn."""


def run(s: ReportSettings) -> None:
    """Gather, check, draw, and say where the page is."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet
    from inlay.core.errors import InlayError

    if not s.sources:
        raise InlayError("nothing to report on; give folders of `know watch`, `know interfere` or `know measure`")
    if s.model is not None:
        quiet()
    from inlay.knowledge.gather import gather
    from inlay.knowledge.report import build, merge

    data = merge([gather(path, s.model) for path in s.sources])
    if s.title is not None:
        data["title"] = s.title
    page = build(data, s.out, s.progress)
    out = Console(highlight=False)
    count = len(list((s.out / "figures").glob("*.png")))
    out.print(f"{len(data.get('runs', []))} runs, {count} figures: [bold]{escape(str(page))}[/]", soft_wrap=True)


VERB = Verb(
    "know report",
    "One self-contained page of figures and numbers; retention beside every accuracy.",
    ReportSettings,
    run,
    (
        "inlay know report runs/edits --model base --out report",
        "inlay know report runs/a runs/b interference --out report --title 'Two runs'",
    ),
)
