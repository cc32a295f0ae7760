"""`inlay demo`: adapters on one base, before and after, in minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb
from inlay.threads import ThreadSettings

if TYPE_CHECKING:
    from inlay.demo import Result


@dataclass(frozen=True, kw_only=True)
class DemoSettings(ThreadSettings):
    """How much of a demonstration; the defaults take a few minutes on two cores."""

    out: Path = Path("runs/demo")
    """Where the trained adapters are left; what an earlier demo left there is replaced."""
    model: str = "tiny-llama"
    """The base: an embedded one, or a real one such as smollm2-135m (see docs/real.md)."""
    task: str = "world-addsub"
    """The task (the synthetic ones need no download)."""
    steps: int | None = None
    """Training steps of each adapter; by default what takes minutes: 100, or 25 on a real base."""
    questions: int | None = None
    """Held-out questions; by default 100, or 20 on a real base."""
    seed: int = 0
    """Of everything."""
    progress: bool = True
    """Show progress bars."""


def run(s: DemoSettings) -> None:
    """Train, compare, mix."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    import time

    from inlay.demo import demo

    out = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    result = demo(
        s.out,
        model=s.model,
        task=s.task,
        steps=s.steps,
        questions=s.questions,
        seed=s.seed,
        progress=s.progress,
        say=lambda text: out.print(f"[dim]{escape(text)}[/]"),
    )
    show(result, s, time.perf_counter() - began)


def show(result: Result, s: DemoSettings, seconds: float) -> None:
    """The tables, and what to do next."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(title=f"{result.task}: held-out questions answered right", title_justify="left")
    for title in ("", "at", "trained", "%", "right", "seconds"):
        table.add_column(title, justify="left" if title in ("", "at") else "right")
    for row in result.rows:
        share = f"{row.percent:.2f}" if row.parameters else ""
        took = f"{row.seconds:.0f}" if row.parameters else ""
        table.add_row(row.name, row.at, f"{row.parameters:,}", share, f"[bold]{row.correct}[/] of {row.n}", took)
    out.print()
    out.print(table)
    out.print("\n[bold]One question, one batch, each row another adapter[/]")
    out.print(f"{escape(result.question)} [dim](answer: {escape(result.answer)})[/]\n")
    mix = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in result.said.items():
        mix.add_row(f"[cyan]{name}[/]", escape(" ".join(text.split())) or "[dim]nothing[/]")
    out.print(mix)
    names = " ".join(str(s.out / row.name / "adapter") for row in result.rows if row.parameters)
    out.print(f"\n[dim]{seconds:.0f} seconds. Go on with:[/]")
    out.print(f"  inlay chat {s.model} --adapters {names}", soft_wrap=True)
    out.print(f"  inlay inspect {s.out / 'lora' / 'adapter'}", soft_wrap=True)


VERB = Verb(
    "demo",
    "See it work: train four adapters on the embedded base, compare, and mix them in one batch.",
    DemoSettings,
    run,
    ("inlay demo", "inlay demo --task world-boolq --steps 300", "inlay demo --model smollm2-135m"),
)
