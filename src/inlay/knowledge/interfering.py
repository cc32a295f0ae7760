"""`inlay know interfere`: from a base and a file of items to curves, matrices and a report."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.knowledge.feature import Space
from inlay.knowledge.interfere import Bench, curve, pairwise
from inlay.knowledge.items import Item, read_items
from inlay.knowledge.measure import MeasureSettings
from inlay.knowledge.report import SCHEMA, build
from inlay.knowledge.trial import Practice
from inlay.knowledge.wording import check_wording, wording_for
from inlay.methods import method
from inlay.threads import ThreadSettings
from inlay.train.settings import Pairs


@dataclass(frozen=True, kw_only=True)
class InterfereSettings(ThreadSettings):
    """What is tried."""

    model: str
    """The base: an embedded one, a folder or a Hub id."""
    items: Path
    """Facts to learn, a JSON-lines file; those that the base knows already are not trained."""
    retention: Path | None = None
    """Facts that are not trained, to see what is lost (those of them that the base knows). By default the facts of
    `items` that it knows."""
    out: Path
    """A folder for the report."""
    method: str = "lora"
    """The adapter's method."""
    settings: Pairs = field(default_factory=dict)
    """The method's own settings."""
    at: str | None = None
    """Where it hangs (default: the method's own places)."""
    ks: tuple[int, ...] = (1, 4, 24, 96)
    """Sizes of groups that are trained together."""
    probes: int = 24
    """Items that are compared: trained alone, and in a group of each size."""
    presentations: int = 8
    """How often each item is shown, alone or together."""
    lr: float = 3e-3
    """Learning rate, constant. Large enough that single items are learned."""
    batch_size: int = 32
    """Items per optimizer step."""
    ranks: tuple[int, ...] = ()
    """Repeat the curve for these ranks, as a sweep of capacity (methods with a rank)."""
    pairs: int = 32
    """Items of the gradient and influence matrices; 0: none."""
    after: int = 0
    """Steps of joint training before these matrices are taken; 0: at the adapter's start."""
    template: str | None = None
    """How an item becomes a prompt: chat (the tokenizer's own chat template), alpaca, none (as it is), a FILE (a Jinja
    chat template, or a text with {instruction}), or a text with {prompt} in it. If not given: chat if the tokenizer has
    one, else none."""
    space: str = "embed"
    """Where distances are measured: embed or hidden:<layer>."""
    seed: int = 0
    """Of the choice of items, the adapters' start and the order of items."""
    device: str | None = None
    """Where to run; the GPU if there is one."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("probes", self.probes, 1), ("presentations", self.presentations, 1), ("pairs", self.pairs, 0),
            ("after", self.after, 0), ("batch_size", self.batch_size, 1),
            ("the smallest of ks", min(self.ks, default=1), 1),
        ):  # fmt: skip
            if value < least:
                raise InlayError(f"{name} must be at least {least}, not {value}")
        if self.lr <= 0:
            raise InlayError(f"lr must be positive, not {self.lr:g}")


def practices(s: InterfereSettings) -> dict[str, Practice]:
    """Name -> how to train, for each rank."""

    def one(settings: dict[str, Any]) -> Practice:
        return Practice(method=s.method, settings=settings, at=s.at, lr=s.lr, batch_size=s.batch_size, seed=s.seed)

    method(s.method).make(**s.settings)
    if not s.ranks:
        return {s.method: one(dict(s.settings))}
    return {f"{s.method}, rank {r}": one({**s.settings, "rank": r}) for r in s.ranks}


def roles(s: InterfereSettings, wrong: Sequence[Item], right: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(probes, others) drawn from what the base does not know; raises InlayError where there is too little."""
    if not right:
        raise InlayError(
            "the base knows none of the facts that would not be trained, so nothing could be lost; give facts that it "
            "knows as --retention"
        )
    drawn = random.Random(s.seed).sample(list(wrong), len(wrong))
    most = max([*s.ks, s.probes])
    if len(drawn) < most:
        raise InlayError(
            f"{len(drawn)} of the items are not known to the base, and {most} are wanted; lower --ks and --probes"
        )
    return drawn[: s.probes], drawn[s.probes :]


def run(s: InterfereSettings) -> tuple[Path, dict[str, Any]]:
    """Measure, and write a report; returns its page and its data."""
    import inlay

    ways = practices(s)
    check_wording(s.template)
    measure = MeasureSettings(space=Space(s.space))
    items = read_items(s.items)
    spare = read_items(s.retention) if s.retention is not None else items
    base, tokenizer = inlay.load_base(s.model, device=s.device)
    measure = dataclasses.replace(measure, wording=wording_for(s.template, tokenizer))
    host = inlay.attach(base)
    made: list[dict[str, Any]] = []
    for name, practice in ways.items():
        bench = Bench(host, tokenizer, practice, measure)
        if not made:
            wrong, right = _sorted(bench, items), _sorted(bench, spare)
            probes, others = roles(s, wrong[1], right[0])
            trained = {i.id for i in (*probes, *others)}
            retained = [i for i in right[0] if i.id not in trained]
        part = {"name": name, **curve(bench, probes, others, retained, s.ks, s.presentations, s.progress)}
        if s.pairs and not made:
            part |= pairwise(bench, [*probes, *others][: s.pairs], s.after, s.progress)
        made.append(part)
    about = {
        "model": s.model, "items": s.items.name, "probes": len(probes), "retained facts": len(retained),
        "presentations": s.presentations, "lr": s.lr, "seed": s.seed,
    }  # fmt: skip
    data = {"schema": SCHEMA, "title": "Interference of facts learned together", "about": about, "interference": made}
    return build(data, s.out), data


def _sorted(bench: Bench, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(known, not known) to the bare base."""
    exam = bench.exam(items)
    right = exam.right(exam.answers(None))
    return [i for i, ok in zip(items, right, strict=True) if ok], [
        i for i, ok in zip(items, right, strict=True) if not ok
    ]
