"""`inlay train` with semantic distance: items, the filter, the re-weighted loss, and the choice of beta."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.settings import CANDIDATES, KnowSettings, KnowTrainSettings
from inlay.train.fitting import RunResult
from inlay.train.ranks import Team, joined, place
from inlay.train.record import write_json
from inlay.train.run import Lesson, Teach, file_facts, records
from inlay.train.run import train as train_plainly

if TYPE_CHECKING:
    from inlay.core.host import Host
    from inlay.knowledge.items import Item
    from inlay.knowledge.table import Table
    from inlay.knowledge.wording import Wording


def train(settings: KnowTrainSettings, *, resume: bool | str | Path = False, overwrite: bool = False) -> RunResult:
    """Train one adapter as the settings say, as `inlay.train.train` does.

    With `beta: auto` there is a run in `<out>/beta_<value>` for each candidate first, and `<out>/beta.json` says how
    each did; then the run in `out` has the best. All are resumed and replaced together.
    """
    if settings.know.beta != "auto":
        return train_plainly(settings, resume=resume, overwrite=overwrite, plan=lambda s, show: plan(s, show))
    if isinstance(resume, (str, Path)):
        raise InlayError("with beta auto, resume goes on with all its runs: give no checkpoint")
    with joined() as team:
        beta = choose_beta(settings, team, resume, overwrite)
        return train_plainly(settings, resume=resume, overwrite=overwrite, plan=lambda s, show: plan(s, show, beta))


def plan(
    settings: KnowTrainSettings, progress: bool, beta: float | None = None, wording: Wording | None = None
) -> Teach:
    """The lesson of such settings; `beta` is the one chosen, where they say auto, and `wording` that of items, where no
    table says it."""
    know, run = settings.know, settings.run
    found = None if know.items is None else _Items(settings, progress, wording)
    plainly = records(settings, progress) if found is None else None
    start = float(know.beta) if beta is None and know.beta != "auto" else float(beta or 0.0)

    def teach(host: Host, tokenizer: Any) -> Lesson:
        from inlay.knowledge.objective import objective

        lesson = plainly(host, tokenizer) if plainly is not None else found.lesson(host, tokenizer)  # type: ignore[union-attr]
        x = None if found is None else found.distances()
        resolved = know if know.beta != "auto" else dataclasses.replace(know, beta=start, reduction=_auto(know))
        goal = objective(lesson.examples, resolved, start, host, tokenizer, x, run.seed, progress)
        told = {**lesson.facts, "know": {**lesson.facts.get("know", {}), **_told(know, start)}}
        return dataclasses.replace(lesson, facts=told, objective=goal)

    return teach


def _auto(know: KnowSettings) -> Any:
    """Candidates differ in beta only: 0, too, is then a mean over items."""
    return "item" if know.reduction == "auto" else know.reduction


def _told(know: KnowSettings, beta: float) -> dict[str, Any]:
    if know.signal == "none" and not know.gamma:
        return {}
    return {"signal": know.signal, "beta": beta, "gamma": know.gamma, "control": know.control}


class _Items:
    """Items that are taught, some of them asked by a paraphrase for validation."""

    def __init__(self, settings: KnowTrainSettings, progress: bool, wording: Wording | None = None):
        from inlay.knowledge.items import read_items
        from inlay.knowledge.wording import check_wording

        self.settings, self.know, self.progress = settings, settings.know, progress
        assert self.know.items is not None
        self.all = read_items(self.know.items, "train")
        self.items = self.all
        self.table = None if self.know.table is None else rows_of(self.know.table, self.all)
        check_wording(settings.data.template)
        self.given = wording

    def wording(self, tokenizer: Any) -> Wording:
        """How items are put to the base: as their table was measured, if there is one.

        Raises:
            InlayError: another template was asked for than the table's.
        """
        from inlay.knowledge.wording import wording_for

        asked = self.settings.data.template
        if self.know.table is None:
            return self.given or wording_for(asked, tokenizer)
        own = wording_of(self.know.table)
        if asked is not None and wording_for(asked, tokenizer, own.lead).as_template() != own.as_template():
            raise InlayError(
                f"{self.know.table} was measured with another template than {asked!r}; leave the template out, or "
                "measure the items with it"
            )
        return own

    def lesson(self, host: Host, tokenizer: Any) -> Lesson:
        from inlay.knowledge.controls import base_losses, choose, facts
        from inlay.knowledge.wording import examples

        know, table = self.know, self.table
        pad, wording = tokenizer.pad_token_id or 0, self.wording(tokenizer)
        rows = examples(self.all, tokenizer, wording)
        told: dict[str, Any] = {"items": len(self.all)}
        if know.filter != "none" and table is not None:
            made = choose(
                know, table, self.settings.run.seed, lambda: base_losses(host, rows, pad, progress=self.progress)
            )
            told = facts(know, table, made)
            self.items, rows = [self.all[i] for i in made.kept], [rows[i] for i in made.kept]
            self.table = table.only(made.kept)
        _short_enough(rows, self.items, self.settings.data.cutoff)
        held = validation(self.items, self.settings)
        asked = [dataclasses.replace(i, prompt=i.paraphrases[0]) for i in held]
        told = {**told, "validation_ids": [i.id for i in held]}
        files = file_facts([know.items, None if know.table is None else know.table / "table.parquet"])
        held_rows = examples(asked, tokenizer, wording)
        return Lesson(rows, held_rows, {"files": files, "know": told}, template=wording.as_template())

    def distances(self) -> Sequence[float] | None:
        """Of the items that are taught, in their order."""
        return None if self.table is None else self.table["tsd"].tolist()


def rows_of(folder: Path, items: Sequence[Item]) -> Table:
    """A table's rows of these items, in their order. Raises InlayError where one was not measured as it now is."""
    from inlay.knowledge.table import Table

    table = Table.load(folder)
    at = {name: n for n, name in enumerate(table["id"].tolist())}
    lacking = [i.id for i in items if i.id not in at]
    if lacking:
        raise InlayError(
            f"{folder} has no row for {len(lacking)} items, {lacking[0]!r} first; measure these items again"
        )
    rows = [at[i.id] for i in items]
    for i, n in zip(items, rows, strict=True):
        if (table["prompt"][n], table["target"][n]) != (i.prompt, i.target):
            raise InlayError(f"item {i.id!r} has another prompt or target in {folder}; measure these items again")
    return table.only(np.array(rows))


def wording_of(folder: Path | None) -> Wording:
    """How a table's items were put to the base; the usual way without a table."""
    from inlay.knowledge.table import Table
    from inlay.knowledge.wording import Wording

    if folder is None:
        return Wording()
    told = Table.load(folder).about["settings"]["wording"]
    return Wording(**{**told, "stop": tuple(told["stop"])})


def validation(items: Sequence[Item], settings: KnowTrainSettings) -> list[Item]:
    """`val_size` of the taught items, drawn with the seed: their first paraphrase is asked, and never taught."""
    size = settings.data.val_size
    able = [i for i in items if i.paraphrases]
    if size > len(able):
        raise InlayError(f"val_size {size}: only {len(able)} of {len(items)} taught items have a paraphrase to ask by")
    chosen = set(random.Random(settings.run.seed).sample(range(len(able)), size))
    return [i for n, i in enumerate(able) if n in chosen]


def _short_enough(rows: Sequence[Any], items: Sequence[Item], cutoff: int) -> None:
    long = [i.id for r, i in zip(rows, items, strict=True) if len(r.input_ids) > cutoff]
    if long:
        raise InlayError(f"{len(long)} items are longer than cutoff {cutoff}, {long[0]!r} first; raise cutoff")


# ---- beta ------------------------------------------------------------------------------------------------------------
def choose_beta(settings: KnowTrainSettings, team: Team, resume: bool, overwrite: bool) -> float:
    """Train with each candidate and take the one whose adapter answers most validation paraphrases exactly."""
    scores: dict[float, float] = {}
    for beta in CANDIDATES:
        out = settings.out / f"beta_{beta:+g}"
        own = dataclasses.replace(settings, out=out)
        train_plainly(
            own,
            resume=resume,
            overwrite=overwrite,
            plan=lambda s, show, b=beta: plan(s, show, b),  # type: ignore[misc]
        )
        scores[beta] = team.from_first(lambda o=out: _right(settings, o))  # type: ignore[misc]
    best = max(CANDIDATES, key=lambda b: scores[b])
    if team.first:
        told = [{"beta": b, "exact_match": scores[b]} for b in CANDIDATES]
        write_json(settings.out / "beta.json", {"chosen": best, "asked": settings.data.val_size, "candidates": told})
    return best


def _right(settings: KnowTrainSettings, out: Path) -> float:
    """Share of a run's validation paraphrases that its adapter answers exactly, decoding freely."""
    from inlay.api import attach, load
    from inlay.knowledge.measure import MeasureSettings, answer_limit, answers
    from inlay.knowledge.wording import exact
    from inlay.models.base import load_base

    source = _Items(settings, settings.run.progress)
    held = set(json.loads((out / "data.json").read_text(encoding="utf-8"))["know"]["validation_ids"])
    asked = [i for i in source.all if i.id in held]
    model, tokenizer = load_base(settings.model, settings.run.dtype, str(place(settings.run.device)))
    host = attach(model)
    name = load(host, out / "adapter")
    how = MeasureSettings(wording=source.wording(tokenizer))
    said = answers(
        host,
        tokenizer,
        [i.paraphrases[0] for i in asked],
        how,
        answer_limit(tokenizer, asked, how),
        name,
        f"asking {out.name}" if settings.run.progress else "",
    )
    return float(np.mean([exact(a, i) for a, i in zip(said, asked, strict=True)]))
