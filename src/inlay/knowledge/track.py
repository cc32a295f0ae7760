"""Watching an adapter learn facts: states at snapshots, soft distances between them, and what is forgotten meanwhile.

watched/table/                the base's answers and distances
watched/snapshot-<step>.json  answers, exact matches, distances, states; paraphrases; retention
watched/snapshot-<step>.npy   features (N, D), of soft answers only: others are made anew from the answers
watched/probes.jsonl          soft distances of a few items just before and just after a step
watched/watch.json            what is watched and how
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.engine.example import Example, learned
from inlay.knowledge.budget import Asking, Portion, afford, everything, spaced
from inlay.knowledge.exam import Exam
from inlay.knowledge.items import Item, items_digest
from inlay.knowledge.measure import MeasureSettings, answer_limit, measure, table_key
from inlay.knowledge.states import direction, progress, shares
from inlay.knowledge.table import Table
from inlay.knowledge.weights import item_means, token_distance
from inlay.knowledge.wording import examples

if TYPE_CHECKING:
    from inlay.train.loop import Loop

FOLDER = "watched"
SAMPLE = 64
"""Items whose tokens are counted to know what asking costs."""
SNAPSHOT, FEATURES, PROBES, WATCH, TABLE = "snapshot-{}.json", "snapshot-{}.npy", "probes.jsonl", "watch.json", "table"


@dataclass(frozen=True, kw_only=True)
class TrackSettings:
    """What is watched, and how often."""

    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """How answers are made and compared."""
    snapshots: int = 3
    """Snapshots after the one before the first step, closer together early, the last one at the end; 0: none at all."""
    at: tuple[int, ...] = ()
    """Steps after which snapshots are taken, in place of those; all facts are asked then, whatever that costs."""
    budget: float | None = 0.05
    """Part of the steps' time that watching may take. Where all facts at all snapshots would take more, a share of them
    is drawn with the seed, then snapshots become fewer. Counted in tokens, so the machine decides nothing. None: no
    limit."""
    probes: int = 16
    """Items whose soft distance is looked at just before and after a step; 0: none."""
    probe_every: int = 50
    """Steps between two such looks; the first is at step 1."""
    tau: float | None = None
    """Smallest change of distance that counts; 1e-6 among embeddings and 0.01 among hidden states by default."""
    rule: Literal["distance", "direction"] = "distance"
    """Away is a larger distance, or motion against the target's direction."""
    seed: int = 0
    """Of the choice of probes, and of what is asked where the budget does not reach for all."""

    def __post_init__(self) -> None:
        least = (("snapshots", self.snapshots, 0), ("probes", self.probes, 0), ("probe_every", self.probe_every, 1))
        for name, value, lowest in least:
            if value < lowest:
                raise InlayError(f"{name} must be at least {lowest}, not {value}")
        if any(s < 1 for s in self.at):
            raise InlayError(f"snapshots are taken after steps 1 and later, not after {min(self.at)}")

        if self.budget is not None and not self.budget > 0:
            raise InlayError(
                f"budget is a part of the steps' time, such as 0.05, or None for no limit; not {self.budget:g}"
            )

    def steps(self, total: int) -> list[int]:
        """When snapshots are taken in a run of so many steps, as far as the budget reaches."""
        return sorted({min(s, total) for s in self.at}) if self.at else spaced(total, self.snapshots)


class Tracker:
    """An observer of `inlay.train.fit`. What it makes is read with `read_watched`.

    Args:
        items: facts whose answers are watched, or drawn from.
        retention: facts that are not trained on; their accuracy stands beside every other.
        table: of the base, for these items and `settings.measure`; measured before the first step if not given.
        tell: is told before the first step what will be watched.
    """

    def __init__(
        self,
        tokenizer: Any,
        items: Sequence[Item],
        retention: Sequence[Item] = (),
        settings: TrackSettings | None = None,
        table: Table | None = None,
        tell: Callable[[str], None] | None = None,
    ):
        if not items:
            raise InlayError("no items to watch")
        self.tokenizer, self.all, self.facts = tokenizer, list(items), list(retention)
        self.settings, self.table, self.tell = settings or TrackSettings(), table, tell
        if table is not None and table["id"].tolist() != [i.id for i in items]:
            raise InlayError("the table is of other items than those to be watched; measure these")
        self.before: Tensor | None = None
        self.when: list[int] = []

    # ---- what the loop calls -----------------------------------------------------------------------------------------
    def begin(self, loop: Loop, run_dir: Path) -> None:
        """Before the first step of a session: what a resumed run will do again is forgotten."""
        if loop.sharded:
            raise InlayError("watching needs the whole base in each process: train with parallel ddp, or do not watch")
        self.folder = run_dir / FOLDER
        self._choose(loop)
        with loop.aside():
            self.base = self._base_table(loop)
            self.exam = Exam(loop.host, self.tokenizer, self.items, self.settings.measure, self.retained)
            if loop.team.first:
                self._claim(loop.step)
                if self.tell is not None:
                    self.tell(self.told)
            if loop.step == 0 and self.when:
                self._take(loop, bare=True)

    def before_step(self, loop: Loop) -> None:
        """Soft distances before a step that is looked at."""
        looked = self.probe and loop.step % self.portion.probe_every == 0
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

    # ---- what is watched ---------------------------------------------------------------------------------------------
    def _choose(self, loop: Loop) -> None:
        """The portion of the items that is asked, and when; that of a run that is gone on with is kept."""
        s, file, own = self.settings, self.folder / WATCH, None
        if loop.step and file.exists():
            own = json.loads(file.read_text(encoding="utf-8")).get("portion")
        made = self._portion(loop) if own is None else Portion(**own)
        again = s.steps(loop.total) if s.at else spaced(loop.total, len(made.at))
        self.portion = dataclasses.replace(made, at=again)
        self.when = self.portion.at
        self.items, self.retained = made.chosen(self.all), [self.facts[n] for n in made.retained]
        draw = random.Random(s.seed)
        chosen = draw.sample(self.items, min(s.probes, len(self.items)))
        self.probe: list[Example] = list(examples(chosen, self.tokenizer, s.measure.wording))
        self.probed = [i.id for i in chosen]

    def _portion(self, loop: Loop) -> Portion:
        s, feed = self.settings, loop.feed
        some = random.Random(s.seed).sample(self.all, min(SAMPLE, len(self.all)))  # lengths need not be exact
        limit = answer_limit(self.tokenizer, some, s.measure)
        prompts = s.measure.wording.prompts(self.tokenizer, [i.prompt for i in some])
        asking = Asking(
            paraphrases=[len(i.paraphrases) for i in self.all],
            retained=len(self.facts),
            question=sum(map(len, prompts)) / len(prompts) + limit,
            again=int(s.measure.present == "soft" or s.measure.space.kind == "hidden"),
            limit=limit,
            step=sum(feed.lengths) / feed.per_epoch,
        )
        if s.at or s.budget is None:
            return everything(asking, s.steps(loop.total), s.probes, s.probe_every, loop.total)
        return afford(asking, s.budget, s.snapshots, s.probes, s.probe_every, loop.total, s.seed)

    @property
    def told(self) -> str:
        """What is watched, in words."""
        return portion_told(self.portion, len(self.all), len(self.facts))

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
    def _base_table(self, loop: Loop) -> Table:
        """Of the items that are watched."""
        if self.table is not None:
            return self.table.only(np.array(self.portion.items))
        how, kept = self.settings.measure, self.folder / TABLE
        found = Table.load(kept) if loop.step and kept.is_dir() else None
        if found is None or found.about["key"] != table_key(loop.host, self.tokenizer, self.items, how):
            found = measure(loop.host, self.tokenizer, self.items, how)
        return found

    def _claim(self, step: int) -> None:
        """The folder, without what comes after this step; raises InlayError if it is of another watch."""
        about = {
            "items": items_digest(self.all), "retention": items_digest(self.facts), "probed": self.probed,
            "settings": dataclasses.asdict(self.settings), "of": [len(self.all), len(self.facts)],
            "portion": dataclasses.asdict(self.portion),
        }  # fmt: skip
        about = json.loads(json.dumps(about))
        file = self.folder / WATCH
        if step and file.exists():
            was = json.loads(file.read_text(encoding="utf-8"))
            if any(was.get(k) != about[k] for k in about if k != "portion"):
                raise InlayError(
                    f"{self.folder} was watched otherwise (other items or settings); resume with the same ones"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (*self.folder.glob(SNAPSHOT.format("*")), *self.folder.glob(FEATURES.format("*"))):
            if step == 0 or _step(old) > step:
                old.unlink()
        kept = [r for r in _lines(self.folder / PROBES) if step and r["step"] <= step]
        write_text(self.folder / PROBES, "".join(json.dumps(r) + "\n" for r in kept))
        write_text(file, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        self.base.save(self.folder / TABLE)

    def _take(self, loop: Loop, bare: bool = False) -> dict[str, float]:
        """One snapshot: all its questions at once. Before the first step, items have the table's answers."""
        exam, plan = self.exam, None if bare else loop.name
        first = self.base["answer0"].tolist() if bare else []
        prompts = exam.reworded + [i.prompt for i in self.retained]
        said = first + exam.answers(plan, prompts if bare else exam.prompts + prompts)
        n, m = len(self.items), len(self.items) + len(exam.reworded)
        found = self._placed(loop, said[:n], bare)
        found["paraphrase_em"] = _plain(exam.right_reworded(said[n:m]))
        found["retention_em"] = exam.right_retained(said[m:]).tolist()
        found["summary"] = summary(found)
        if loop.team.first:
            write_text(self.folder / SNAPSHOT.format(loop.step), json.dumps(found, ensure_ascii=False) + "\n")
        return {k: v for k, v in found["summary"].items() if v is not None}

    def _placed(self, loop: Loop, said: list[str], bare: bool) -> dict[str, Any]:
        """Where the items' answers are, as JSON has it."""
        z = self.base["answer_features"] if bare else self.exam.features(said, plan=loop.name)
        tsd = self.base["tsd"]
        found = self.exam.placed(loop.step, said, z, tsd, self.settings.tau)
        toward = direction(self.base["answer_features"], z, self.exam.targets.target.numpy())
        state = found["state"]
        if self.settings.rule == "direction":
            moved = (state == "away") | (state == "approached")
            state = np.where(moved & (toward < 0), "away", np.where(moved, "approached", state))
        if self.settings.measure.present == "soft" and loop.team.first:
            np.save(self.folder / FEATURES.format(loop.step), z)
        return {
            "step": loop.step,
            "answers": said,
            "em": found["em"].tolist(),
            "distance": found["distance"].tolist(),
            "state": state.tolist(),
            "progress": _plain(progress(tsd, found["distance"])),
            "direction": _plain(toward),
            "empty": np.logical_not(z.any(1)).tolist(),
        }


def portion_told(portion: Portion, items: int, retained: int) -> str:
    """What is watched, in words."""
    steps = ", ".join(map(str, portion.at)) or "none"
    some = len(portion.items) < items or len(portion.retained) < retained or portion.paraphrases is not None
    told = f"snapshots at step 0 and {steps}" if portion.at else "no snapshots"
    told += f": {len(portion.items)} of {items} items, {len(portion.retained)} of {retained} retained facts"
    told += ", drawn with the seed (one paraphrase each)" if some else ""
    return f"{told}; about {100 * portion.share:.1f} % of the steps' time"


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

    @property
    def told(self) -> str:
        """What was watched, in words."""
        if "portion" not in self.about:
            return f"{len(self.table)} items"
        return portion_told(Portion(**self.about["portion"]), *self.about["of"])


def read_watched(run_dir: str | Path) -> Watched:
    """Read what a tracker left in a run folder."""
    folder = Path(run_dir) / FOLDER
    if not (folder / WATCH).is_file():
        raise InlayError(
            f"{run_dir} was not watched: it has no {FOLDER}/{WATCH}; `inlay know watch` trains and watches"
        )
    files = sorted(folder.glob(SNAPSHOT.format("*")), key=_step)
    snapshots = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    for snap in snapshots:
        if (kept := folder / FEATURES.format(snap["step"])).exists():
            snap["features"] = np.load(kept)
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
