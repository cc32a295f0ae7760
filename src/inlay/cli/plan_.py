"""`inlay plan`: count an adapter before training it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import tyro

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is counted."""

    model: tyro.conf.Positional[str]
    """A folder with config.json, a Hub id, tiny-llama, or a known shape such as llama-7b. No weights are read."""
    method: str = "lora"
    """The adapter's method."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The method's own settings."""
    at: str | None = None
    """Where it hangs, e.g. q,v@0-15 (default: the method's own places). `inlay inspect MODEL` shows what there is."""
    batch: int = 1
    """Rows of a training batch, for the memory estimate."""
    length: int = 512
    """Tokens of a row, for the memory estimate."""
    dtype: Literal["bf16", "fp16", "fp32", "int8", "nf4"] = "bf16"
    """How the frozen base is stored; the adapter is trained in fp32."""
    checkpointing: bool = False
    """Estimate with gradient checkpointing."""
    json: bool = False
    """Print one JSON object; `trainable` is in it."""


def run(s: PlanSettings) -> None:
    """Print the plan."""
    from inlay.cli.quiet import quiet

    quiet()
    from inlay.plan import plan

    p = plan(
        s.model,
        s.method,
        at=s.at,
        settings=s.settings,
        dtype=s.dtype,
        batch=s.batch,
        length=s.length,
        checkpointing=s.checkpointing,
    )
    if s.json:
        print(json.dumps(p.to_dict()))
    else:
        show(p)


def show(p: Plan) -> None:
    """The plan as tables for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console(highlight=False)
    settings = ", ".join(f"{k}={v}" for k, v in p.settings.items())
    out.print(f"[bold]{p.method}[/] on [bold]{escape(p.model)}[/] ({p.family}) at [cyan]{escape(p.at)}[/]")
    out.print(f"[dim]{escape(settings)}[/]\n")
    counts = Table(box=None, padding=(0, 2))
    for title in ("role", "places", "trainable"):
        counts.add_column(title, justify="left" if title == "role" else "right")
    for role, found in p.by_role.items():
        counts.add_row(role, f"{found['places']:,}", f"{found['trainable']:,}")
    counts.add_section()
    counts.add_row("[bold]all[/]", f"[bold]{p.places:,}[/]", f"[bold green]{p.trainable:,}[/]")
    out.print(counts)
    out.print(f"\n{p.percent:.3f} % of {p.total + p.trainable:,} (base {p.total:,}); file {size(p.file_bytes)} in fp32")
    memory = Table(
        box=None, padding=(0, 2), show_header=False, title="training memory, an estimate", title_justify="left"
    )
    memory.add_column(justify="left")
    memory.add_column(justify="right")
    m = p.memory
    for name, value in (
        (f"base weights, {p.dtype}", m.weights),
        ("adapter, gradients, AdamW", m.adapter + m.gradients + m.optimizer),
        (f"activations, {p.batch} x {p.length}{', checkpointed' if p.checkpointing else ''}", m.activations),
        ("logits and loss", m.logits),
        ("[bold]together[/]", m.total),
    ):
        memory.add_row(name, size(value))
    out.print(memory)
    for hint in p.hints:
        out.print(f"[yellow]hint:[/] {escape(hint)}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


VERB = Verb(
    "plan",
    "Count an adapter before training it: exact parameters, file size, an estimate of memory.",
    PlanSettings,
    run,
    (
        "inlay plan llama-7b --method lora",
        "inlay plan llama-13b --method series --size 256 --at gate:input,up:input,down",
        "inlay plan qwen3-8b --method prefix --tokens 30 --json",
        "inlay plan mistral-7b --rank 16 --at q,k,v,o --batch 8 --length 1024 --checkpointing",
    ),
)
