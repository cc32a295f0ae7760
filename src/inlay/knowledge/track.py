"""Watching an adapter learn facts: states at snapshots, soft distances between them, and what is forgotten meanwhile.

watched/table/                the base's answers and distances
watched/snapshot-<step>.json  answers, exact matches, distances, states; paraphrases; retention
watched/probes.jsonl          soft distances of a few items just before and just after a step
watched/watch.json            what is watched and how
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.engine.example import Example, learned
from inlay.knowledge.distance import flagged, tolerance
from inlay.knowledge.feature import features
from inlay.knowledge.items import Item, items_digest
from inlay.knowledge.measure import MeasureSettings, answer_limit, answers, measure, table_key, target_features
from inlay.knowledge.states import direction, progress, shares, states
from inlay.knowledge.table import Table
from inlay.knowledge.weights import item_means, token_distance
from inlay.knowledge.wording import exact, examples

if TYPE_CHECKING:
    from inlay.train.loop import Loop

FOLDER = "watched"
SNAPSHOT, PROBES, WATCH, TABLE = "snapshot-{}.json", "probes.jsonl", "watch.json", "table"


@dataclass(frozen=True, kw_only=True)
class TrackSettings:
    """What is watched, and how often."""

    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """How answers are made and compared."""
    snapshots: int = 3
    """Snapshots after the one before the first step, evenly spaced, the last one at the end; 0: none at all."""
    at: tuple[int, ...] = ()
    """Steps after which snapshots are taken, in place of evenly spaced ones."""
    probes: int = 16
    """Items whose soft distance is looked at just before and after a step; 0: none."""
    probe_every: int = 50
    """Steps between two such looks; the first is at step 1."""
    tau: float | None = None
    """Smallest change of distance that counts; 1e-6 among embeddings and 0.01 among hidden states by default."""
    rule: Literal["distance", "direction"] = "distance"
    """Away is a larger distance, or motion against the target's direction."""
    seed: int = 0
    """Of the choice of probes."""

    def __post_init__(self) -> None:
        least = (("snapshots", self.snapshots, 0), ("probes", self.probes, 0), ("probe_every", self.probe_every, 1))
        for name, value, lowest in least:
            if value < lowest:
                raise InlayError(f"{name} must be at least {lowest}, not {value}")
        if any(s < 1 for s in self.at):
            raise InlayError(f"snapshots are taken after steps 1 and later, not after {min(self.at)}")

    def steps(self, total: int) -> list[int]:
        """When snapshots are taken in a run of so many steps."""
        if self.at or not self.snapshots:
            return sorted({min(s, total) for s in self.at})
        return sorted({max(1, round(total * n / self.snapshots)) for n in range(1, self.snapshots + 1)})


class Tracker:
    """An observer of `inlay.train.fit`. What it makes is read with `read_watched`.

    Args:
        items: facts whose answers are watched.
        retention: facts that are not trained on; their accuracy stands beside every other.
        table: of the base, for these items and `settings.measure`; measured before the first step if not given.
    """

    def __init__(
        self,
        tokenizer: Any,
        items: Sequence[Item],
        retention: Sequence[Item] = (),
        settings: TrackSettings | None = None,
        table: Table | None = None,
    ):
        if not items:
            raise InlayError("no items to watch")
        self.tokenizer, self.items, self.retention = tokenizer, list(items), list(retention)
        self.settings, self.table = settings or TrackSettings(), table
        if table is not None and table["id"].tolist() != [i.id for i in items]:
            raise InlayError("the table is of other items than those to be watched; measure these")
        chosen = random.Random(self.settings.seed).sample(self.items, min(self.settings.probes, len(self.items)))
        self.probe: list[Example] = list(examples(chosen, tokenizer, self.settings.measure.wording))
        self.probed = [i.id for i in chosen]
        self.before: Tensor | None = None
        self.when: list[int] = []

    # ---- what the loop calls -----------------------------------------------------------------------------------------
    def begin(self, loop: Loop, run_dir: Path) -> None:
        """Before the first step of a session: what a resumed run will do again is forgotten."""
        if loop.sharded:
            raise InlayError("watching needs the whole base in each process: train with parallel ddp, or do not watch")
        self.folder, self.when = run_dir / FOLDER, self.settings.steps(loop.total)
        with loop.aside():
            self._targets(loop)
            if loop.team.first:
                self._claim(loop.step)
            if loop.step == 0 and self.when:
                self._take(loop, bare=True)

    def before_step(self, loop: Loop) -> None:
        """Soft distances before a step that is looked at."""
        looked = self.probe and loop.step % self.settings.probe_every == 0
        self.before = self.soft(loop) if looked else None

    def after_step(self, loop: Loop) -> dict[str, float]:
        """Numbers for the metrics, of the steps that have any."""
        told: dict[str, float] = {}
        if self.before is not None:
            after = self.soft(loop)
            told = {"soft_distance": float(after.mean()), "pushed_away": float((after > self.before).double().mean())}
            if loop.team.first:
                line = {"step": loop.step, **told, "before": self.before.tolist(), "after": after.tolist()}
                with open(self.folder / PROBES, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if loop.step in self.when:
            with loop.aside():
                told |= self._take(loop)
        return told

    # ---- soft distance -----------------------------------------------------------------------------------------------
    def soft(self, loop: Loop) -> Tensor:
        """Soft distance of each probe (P,), under the adapter as it is: one forward, teacher-forced."""
        E, end = self._E(loop), self.tokenizer.eos_token_id

        def reduce(rows: Sequence[Example], loss: Tensor, read: Tensor | None) -> Tensor:
            count = torch.tensor([learned(r) for r in rows])
            inside = torch.tensor([t != end for r in rows for t in r.labels if t >= 0]).to(loss)
            assert read is not None
            return (item_means(read * inside, count) / item_means(inside, count))[:, None]

        return loop.survey(self.probe, functools.partial(token_distance, E_VD=E), reduce, 1)[:, 0]

    def _E(self, loop: Loop) -> Tensor:
        return loop.host.model.get_input_embeddings().weight.detach()  # type: ignore[operator, union-attr, return-value]

    # ---- snapshots ---------------------------------------------------------------------------------------------------
    def _targets(self, loop: Loop) -> None:
        how = self.settings.measure
        if self.table is None:
            kept = self.folder / TABLE
            found = Table.load(kept) if loop.step and kept.is_dir() else None
            if found is None or found.about["key"] != table_key(loop.host, self.tokenizer, self.items, how):
                found = measure(loop.host, self.tokenizer, self.items, how)
            self.table = found
        self.targets = target_features(loop.host, self.tokenizer, self.items, how)
        self.limit = answer_limit(self.tokenizer, [*self.items, *self.retention], how)

    def _claim(self, step: int) -> None:
        """The folder, without what comes after this step; raises InlayError if it is of another watch."""
        about = {
            "items": items_digest(self.items), "retention": items_digest(self.retention), "probed": self.probed,
            "settings": dataclasses.asdict(self.settings),
        }  # fmt: skip
        about = json.loads(json.dumps(about))
        file = self.folder / WATCH
        if step and file.exists() and json.loads(file.read_text(encoding="utf-8")) != about:
            raise InlayError(
                f"{self.folder} was watched otherwise (other items or settings); resume with the same ones"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(SNAPSHOT.format("*")):
            if step == 0 or _step(old) > step:
                old.unlink()
        kept = [r for r in _lines(self.folder / PROBES) if step and r["step"] <= step]
        write_text(self.folder / PROBES, "".join(json.dumps(r) + "\n" for r in kept))
        write_text(file, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        assert self.table is not None
        self.table.save(self.folder / TABLE)

    def _take(self, loop: Loop, bare: bool = False) -> dict[str, float]:
        """One snapshot, all its prompts in one generation."""
        assert self.table is not None
        owners, again = [i for i in self.items for _ in i.paraphrases], [p for i in self.items for p in i.paraphrases]
        prompts = [i.prompt for i in self.items] + again + [i.prompt for i in self.retention]
        plan = None if bare else loop.name
        said = answers(loop.host, self.tokenizer, prompts, self.settings.measure, self.limit, plan)
        n, m = len(self.items), len(self.items) + len(again)
        right = [exact(a, i) for a, i in zip(said, self.items, strict=False)]
        found: dict[str, Any] = {"step": loop.step, "answers": said[:n], "em": right}
        found |= self._moved(loop, said[:n], right)
        other = [exact(a, i) for a, i in zip(said[n:m], owners, strict=True)]
        found["paraphrase_em"] = _means(owners, other, self.items)
        found["retention_em"] = [exact(a, i) for a, i in zip(said[m:], self.retention, strict=True)]
        found["summary"] = summary(found)
        if loop.team.first:
            write_text(self.folder / SNAPSHOT.format(loop.step), json.dumps(found, ensure_ascii=False) + "\n")
        return {k: v for k, v in found["summary"].items() if v is not None}

    def _moved(self, loop: Loop, said: list[str], right: list[bool]) -> dict[str, Any]:
        assert self.table is not None
        how, prompts = self.settings.measure, [i.prompt for i in self.items]
        z = features(loop.host, self.tokenizer, prompts, said, how.space, wording=how.wording, mean=self.targets.mean)
        d = flagged(z, self.targets.each, right, how.metric)
        start, tsd = self.table["answer_features"], self.table["tsd"]
        toward = direction(start, z.numpy(), self.targets.target.numpy())
        tau = tolerance(how.space.name) if self.settings.tau is None else self.settings.tau
        state = states(tsd, d.d.numpy(), right, tau)
        if self.settings.rule == "direction":
            moved = (state == "away") | (state == "approached")
            state = np.where(moved & (toward < 0), "away", np.where(moved, "approached", state))
        return {
            "distance": d.d.tolist(),
            "state": state.tolist(),
            "progress": _plain(progress(tsd, d.d.numpy())),
            "direction": _plain(toward),
            "empty": d.empty.tolist(),
        }


def summary(snapshot: Mapping[str, Any]) -> dict[str, float | None]:
    """Shares of a snapshot: `em`, each state, `paraphrase_em`, `retention_em`; None where nothing was asked."""

    def mean(values: Sequence[Any]) -> float | None:
        there = [float(v) for v in values if v is not None]
        return sum(there) / len(there) if there else None

    told: dict[str, float | None] = {"em": mean(snapshot["em"]), **shares(snapshot["state"])}
    return told | {k: mean(snapshot[k]) for k in ("paraphrase_em", "retention_em")}


@dataclass(frozen=True)
class Watched:
    """What a tracker left: a table, snapshots by step (the first at step 0), and looks at probes."""

    table: Table
    snapshots: list[dict[str, Any]]
    """step, answers, em, distance, state, progress, direction, empty: an entry an item; paraphrase_em: an item's share
    or None; retention_em: an entry a retained item; summary."""
    probes: list[dict[str, Any]]
    """step, soft_distance and pushed_away (means), before and after (an entry a probe)."""
    about: dict[str, Any]


def read_watched(run_dir: str | Path) -> Watched:
    """Read what a tracker left in a run folder."""
    folder = Path(run_dir) / FOLDER
    if not (folder / WATCH).is_file():
        raise InlayError(
            f"{run_dir} was not watched: it has no {FOLDER}/{WATCH}; `inlay know watch` trains and watches"
        )
    files = sorted(folder.glob(SNAPSHOT.format("*")), key=_step)
    snapshots = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    about = json.loads((folder / WATCH).read_text(encoding="utf-8"))
    return Watched(Table.load(folder / TABLE), snapshots, _lines(folder / PROBES), about)


def _step(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines; the one that a kill cut short is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]


def _plain(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN."""
    return [None if np.isnan(v) else float(v) for v in values]


def _means(owners: Sequence[Item], right: Sequence[bool], items: Sequence[Item]) -> list[float | None]:
    """Per item, the share of its prompts that is right; None where it has none."""
    own: dict[str, list[bool]] = {}
    for item, one in zip(owners, right, strict=True):
        own.setdefault(item.id, []).append(one)
    return [sum(own[i.id]) / len(own[i.id]) if i.id in own else None for i in items]
