"""`inlay know interfere`: what facts do to each other when they are learned together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.knowledge.interfering import InterfereSettings


def run(s: InterfereSettings) -> None:
    """Measure, print the curves, and say where the report is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.knowledge import interfering

    page, data = interfering.run(s)
    out = Console(highlight=False)
    for part in data["interference"]:
        shown = Table(title=f"{part['name']}: trained together against alone", title_justify="left")
        for name in ("together", "accuracy lost", "95 % interval", "accuracy", "retention", "steps"):
            shown.add_column(name, justify="right")
        for p in part["curve"]:
            values = (f"{100 * p[k]:.1f}" for k in ("em", "retention"))
            span = f"{100 * p['low']:.1f} to {100 * p['high']:.1f}"
            shown.add_row(str(p["k"]), f"{100 * p['drop']:.1f}", span, *values, str(p["steps"]))
        out.print(shown)
        moved = part["suppression"]
        out.print(f"features move {moved['ratio']:.2f} times as far together, at a cosine of {moved['cosine']:.2f}")
        if "gradients" in part:
            g, d = part["gradients"]["pairs"], part["influence"]["pairs"]
            out.print(
                f"gradients of two facts: cosine {g['mean']:.3f}, below 0 for {100 * g['below_zero']:.0f} % of pairs; "
                f"a step on one fact changes another's loss by {d['mean']:+.4f}"
            )
    out.print(f"report: [bold]{escape(str(page))}[/]", soft_wrap=True)


VERB = Verb(
    "know interfere",
    "Train facts alone and together, equally often: what they cost each other, and other facts.",
    "inlay.knowledge.interfering:InterfereSettings",
    run,
    (
        "inlay know interfere --model base --items facts.jsonl --method lora --rank 4 --out interference",
        "inlay know interfere --model base --items facts.jsonl --ks 1 4 24 96 360 --ranks 1 4 16 --out sweep",
    ),
)
