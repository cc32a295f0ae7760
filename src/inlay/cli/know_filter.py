"""`inlay know filter`: which items to teach, by a measured table; or a control of equal size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlay.cli.verbs import Verb
from inlay.threads import ThreadSettings

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class FilterSettings(ThreadSettings):
    """What is kept, of what."""

    items: Path
    """The JSON-lines file of items; those of split `train` are filtered, the others go along."""
    table: Path
    """The folder that `inlay know measure` made of them."""
    out: Path
    """A JSON-lines file for the kept items; beside it, `.json` instead of `.jsonl`, stands what was chosen and why."""
    filter: Literal["features", "distances", "band"] = "features"
    """Near targets of spread `features`, near ones of spread `distances`, or the middle `band` of distances."""
    keep: float = 0.8
    """Share of the items that stay. Choose it on validation items, never on test items."""
    lam: float = 1.0
    """How much spread or variance counts against distance."""
    keep_per_relation: int = 0
    """At least so many items of each relation stay."""
    control: Literal["none", "random", "lowest-distance", "loss-ranked", "no-unknown"] = "none"
    """Keep as many items for another reason, to see what the filter itself is worth."""
    categories: Path | None = None
    """For `no-unknown`: a JSON object of item id -> SLiCK category."""
    model: str | None = None
    """For `loss-ranked`: the base whose losses rank the items."""
    device: str | None = None
    """Where the base runs."""
    seed: int = 0
    """Of the controls that draw."""
    front: bool = False
    """Also add the mean distance and spread for a range of lam, and of random subsets, to the JSON file."""
    progress: bool = True
    """Show a progress bar."""


def run(s: FilterSettings) -> None:
    """Choose, write, and print what it did to distance and spread."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.core.errors import InlayError
    from inlay.knowledge.controls import choose, facts
    from inlay.knowledge.items import read_items, write_items
    from inlay.knowledge.select import front
    from inlay.knowledge.settings import KnowSettings
    from inlay.knowledge.training import rows_of
    from inlay.train.record import write_json

    if s.out.suffix != ".jsonl":
        raise InlayError(f"--out {s.out} must end in .jsonl: the kept items go there")
    if s.control == "loss-ranked" and s.model is None:
        raise InlayError("control 'loss-ranked' needs --model, the base whose losses rank the items")
    know = KnowSettings(
        items=s.items, table=s.table, filter=s.filter, keep=s.keep, lam=s.lam, keep_per_relation=s.keep_per_relation,
        control=s.control, categories=s.categories,
    )  # fmt: skip
    items = read_items(s.items)
    taught = [i for i in items if i.split == "train"]
    table = rows_of(s.table, taught)
    made = choose(know, table, s.seed, lambda: _losses(s, taught))
    told: dict[str, Any] = facts(know, table, made)
    if s.front:
        told["front"] = front(
            table["tsd"], table["features"], s.keep, seed=s.seed, ids=table["id"].tolist(),
            keep_per_relation=s.keep_per_relation, relations=table["relation"].tolist(),
        )  # fmt: skip
    gone = set(told["dropped_ids"])
    s.out.parent.mkdir(parents=True, exist_ok=True)
    write_items(s.out, [i for i in items if i.split != "train" or i.id not in gone])
    write_json(s.out.with_suffix(".json"), told)
    out = Console(highlight=False)
    out.print(shown(told))
    out.print("a dropped fact is a fact not taught: report accuracy on kept and on all items", style="dim")
    out.print(f"kept items: [bold]{escape(str(s.out))}[/]", soft_wrap=True)


def _losses(s: FilterSettings, taught: Any) -> Any:
    from inlay.api import attach
    from inlay.knowledge.controls import base_losses
    from inlay.knowledge.training import wording_of
    from inlay.knowledge.wording import examples
    from inlay.models.base import load_base

    model, tokenizer = load_base(str(s.model), None, s.device)
    rows = examples(taught, tokenizer, wording_of(s.table))
    return base_losses(attach(model), rows, tokenizer.pad_token_id or 0, progress=s.progress)


def shown(told: dict[str, Any]) -> Table:
    """Kept against all."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2), title=f"{told['control'] or told['filter']}, keep {told['keep']:g}")
    for title in ("", "items", "mean distance", "spread"):
        made.add_column(title, justify="left" if not title else "right")
    for name, count in (("kept", told["kept"]), ("all", told["items"])):
        spread = told["spread"][name]
        made.add_row(
            name, f"{count:,}", f"{told['mean_distance'][name]:.4f}", "" if spread is None else f"{spread:.4f}"
        )
    return made


VERB = Verb(
    "know filter",
    "Which items to teach: near targets that are spread out, or a control of equal size.",
    FilterSettings,
    run,
    (
        "inlay know filter --items facts.jsonl --table table --keep 0.7 --out kept.jsonl",
        "inlay know filter --items facts.jsonl --table table --filter distances --lam 0.5 --out kept.jsonl",
        "inlay know filter --items facts.jsonl --table table --control random --seed 1 --out random.jsonl",
    ),
)
