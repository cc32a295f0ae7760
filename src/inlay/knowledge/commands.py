"""`inlay know items|base|measure|watch`: their settings, and running them."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlay.core.errors import InlayError
from inlay.knowledge.settings import KnowSettings, KnowTrainSettings
from inlay.threads import ThreadSettings

if TYPE_CHECKING:
    from rich.table import Table as Shown

    from inlay.knowledge.items import Item
    from inlay.knowledge.measure import MeasureSettings
    from inlay.knowledge.slick import Known
    from inlay.knowledge.table import Table
    from inlay.knowledge.wording import Wording
    from inlay.train.fitting import RunResult


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are asked for and compared, but for the template."""

    space: str = "embed"
    """Where features live: `embed` (input embeddings of the answer's tokens) or `hidden:<layer>` of the bare base."""
    pool: Literal["mean", "last"] = "mean"
    """Over an answer's tokens."""
    center: bool = False
    """Subtract the mean feature of all targets; for hidden spaces, where all vectors point one way."""
    metric: Literal["cosine", "euclidean", "dot"] = "cosine"
    """Distance of features."""
    present: Literal["greedy", "soft"] = "greedy"
    """What stands for what the model says now: its free-running `greedy` answer, or what it expects along that answer
    (`soft`: mean embeddings under its probabilities). Exact match is the greedy answer's either way."""
    lead: str | None = None
    """Between prompt and answer: by default a blank, or nothing where the tokenizer or a chat template puts one."""
    answer_tokens: int | None = None
    """Most tokens of an answer; the longest target and 8 more if not given."""
    answer_batch: int = 128
    """Rows decoded at a time."""

    def made(self) -> MeasureSettings:
        """The settings that `measure` takes, with the usual wording."""
        from inlay.knowledge.feature import Space
        from inlay.knowledge.measure import MeasureSettings
        from inlay.knowledge.wording import Wording

        return MeasureSettings(
            space=Space(self.space, self.pool, self.center),
            metric=self.metric,
            present=self.present,
            wording=Wording(lead=self.lead),
            max_new_tokens=self.answer_tokens,
            batch_size=self.answer_batch,
        )


@dataclass(frozen=True, kw_only=True)
class HowSettings(AnswerSettings):
    """How answers are asked for and compared."""

    template: str | None = None
    """How an item becomes a prompt: chat (the tokenizer's own chat template), alpaca, none (as it is), a FILE (a Jinja
    chat template, or a text with {instruction}), or a text with {prompt} in it. If not given: chat if the tokenizer has
    one, else none."""

    def made(self) -> MeasureSettings:
        """As `AnswerSettings.made`; the template is only checked."""
        from inlay.knowledge.wording import check_wording

        check_wording(self.template)
        return super().made()

    def worded(self, measure: MeasureSettings, tokenizer: Any) -> MeasureSettings:
        """Those settings with the wording for this tokenizer."""
        from inlay.knowledge.wording import wording_for

        return dataclasses.replace(measure, wording=wording_for(self.template, tokenizer, self.lead))


@dataclass(frozen=True, kw_only=True)
class MeasureFlags(ThreadSettings):
    """Measure a base's knowledge of items."""

    model: str
    """An embedded base, a folder or a Hub id."""
    items: Path
    """A JSON-lines file of items: id, prompt, target, and what else they have."""
    split: Literal["train", "val", "test"] | None = None
    """Only the items of this split."""
    out: Path
    """A folder for table.parquet and table.json."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the base; as stored by default."""
    device: str | None = None
    """Where to run; the GPU if there is one."""
    cache: bool = True
    """Look among tables made before (in the user's cache), and keep this one there."""
    progress: bool = True
    """Show a progress bar."""
    how: HowSettings = field(default_factory=HowSettings)
    """How answers are asked for and compared."""


def run_measure(s: MeasureFlags) -> tuple[Table, Path]:
    """(the table, its folder)."""
    import inlay
    from inlay.core.files import cache_folder
    from inlay.knowledge.items import read_items
    from inlay.knowledge.measure import measure

    how, items = s.how.made(), read_items(s.items, s.split)
    model, tokenizer = inlay.load_base(s.model, s.dtype, s.device)
    kept = cache_folder("tables") if s.cache else None
    how = s.how.worded(how, tokenizer)
    table = measure(inlay.attach(model), tokenizer, items, how, cache=kept, progress=s.progress)
    return table, table.save(s.out)


def shown(table: Table) -> Shown:
    """Per relation: items, accuracy of the base, distances of what it gets wrong, flags."""
    import numpy as np
    from rich.table import Table as Shown

    made = Shown(title="the base's own answers", title_justify="left")
    for name in ("relation", "items", "right, %", "median distance", "of the wrong ones", "empty", "tie"):
        made.add_column(name, justify="left" if name == "relation" else "right")
    relations = sorted(set(table["relation"].tolist()))
    for name in relations if len(relations) == 1 else [*relations, None]:
        part = table if name is None else table.only(table["relation"] == name)
        wrong = part["tsd"][~part["em0"]]
        far = f"{np.median(wrong):.3f}" if len(wrong) else "-"
        label = "all" if name is None else name or "-"
        cells = (str(len(part)), f"{100 * part['em0'].mean():.1f}", f"{np.median(part['tsd']):.3f}", far)
        made.add_row(label, *cells, str(int(part["empty"].sum())), str(int(part["tie"].sum())))
    return made


@dataclass(frozen=True, kw_only=True)
class SlickFlags(ThreadSettings):
    """Tell how well a base knows items."""

    model: str
    """An embedded base, a folder or a Hub id."""
    items: Path
    """A JSON-lines file of items."""
    split: Literal["train", "val", "test"] | None = None
    """Only the items of this split; examples in prompts may be of any."""
    out: Path
    """A JSON file: an object of item id -> category."""
    prompts: int = 10
    """Random prompts per item."""
    shots: int = 4
    """Examples of the same relation in each prompt."""
    samples: int = 16
    """Sampled answers per prompt, besides the greedy one."""
    temperature: float = 0.5
    """Of the samples."""
    seed: int = 0
    """Of examples and samples."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the base; as stored by default."""
    device: str | None = None
    """Where to run; the GPU if there is one."""
    progress: bool = True
    """Show a progress bar."""
    how: HowSettings = field(default_factory=HowSettings)
    """How answers are asked for."""


def run_slick(s: SlickFlags) -> list[Known]:
    """Ask, and write the categories."""
    import inlay
    from inlay.core.files import write_text
    from inlay.knowledge.items import read_items
    from inlay.knowledge.slick import SlickSettings, slick

    how = SlickSettings(
        prompts=s.prompts,
        shots=s.shots,
        samples=s.samples,
        temperature=s.temperature,
        seed=s.seed,
        measure=s.how.made(),
    )
    items, pool = read_items(s.items, s.split), read_items(s.items)
    model, tokenizer = inlay.load_base(s.model, s.dtype, s.device)
    how = dataclasses.replace(how, measure=s.how.worded(how.measure, tokenizer))
    known = slick(inlay.attach(model), tokenizer, items, how, pool=pool, progress=s.progress)
    write_text(s.out, json.dumps({k.id: k.category for k in known}, indent=1, ensure_ascii=False) + "\n")
    return known


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is watched, and how often."""

    snapshots: int = 3
    """Snapshots after the one before the first step, closer together early, the last one at the end."""
    at_steps: tuple[int, ...] = ()
    """Steps after which snapshots are taken, in place of those; all facts are asked then, whatever that costs."""
    budget: float | None = 0.05
    """Part of the steps' time that watching may take; None: no limit. Where that does not reach for all facts at all
    snapshots, some are drawn with the seed, and which is said before the first step."""
    probes: int = 16
    """Items whose soft distance is looked at just before and after a step; 0: none."""
    probe_every: int = 50
    """Steps between two such looks."""
    tau: float | None = None
    """Smallest change of distance that counts; 1e-6 among embeddings, 0.01 among hidden states."""
    rule: Literal["distance", "direction"] = "distance"
    """Away is a larger distance, or motion against the target's direction."""


@dataclass(frozen=True, kw_only=True)
class WatchFlags(KnowTrainSettings, ThreadSettings):
    """Train on items, with or without filter and weights, and watch all items of split `train`."""

    know: KnowSettings = field(default_factory=KnowSettings)
    """The items, and training that looks at their semantic distance."""
    retention: Path | None = None
    """Items that are not trained on: what is forgotten of them is shown beside every accuracy."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder; begin if there is none."""
    overwrite: bool = False
    """Replace the run in that folder."""
    watch: WatchSettings = field(default_factory=WatchSettings)
    """What is watched, and how often."""
    how: AnswerSettings = field(default_factory=AnswerSettings)
    """How answers are asked for and compared; the wording is the table's where there is one."""


def measured(folder: Path, items: list[Item], how: MeasureSettings) -> Table | None:
    """The rows of a table, where it was measured in the way that answers are to be compared now."""
    from inlay.knowledge.gather import settings_of
    from inlay.knowledge.training import rows_of

    table = rows_of(folder, items)
    same = dataclasses.replace(settings_of(table), batch_size=how.batch_size) == how
    return table if same else None


def _wording(s: WatchFlags) -> Wording:
    """The table's wording, or the one that was asked for."""
    from inlay.knowledge.training import wording_of
    from inlay.knowledge.wording import check_wording, wording_for
    from inlay.models.base import load_tokenizer

    check_wording(s.data.template)
    if s.know.table is not None:
        return wording_of(s.know.table)
    return wording_for(s.data.template, load_tokenizer(s.model), s.how.lead)


def run_watch(s: WatchFlags) -> RunResult:
    """Train as `inlay train` does, with a tracker of all items."""
    from inlay.knowledge.items import read_items
    from inlay.knowledge.track import Tracker, TrackSettings
    from inlay.knowledge.training import plan
    from inlay.train.run import Lesson, Teach, train

    if s.know.items is None:
        raise InlayError("nothing to watch: give --items FILE (`inlay know items` makes one)")
    if s.know.beta == "auto":
        raise InlayError("beta auto trains several times: let `inlay train` choose beta, then watch with that one")
    items, kept = read_items(s.know.items, "train"), read_items(s.retention) if s.retention else []
    if both := {i.id for i in items} & {i.id for i in kept}:
        raise InlayError(f"{len(both)} items are trained on and to be retained, such as {min(both)!r}; leave them out")
    w, how = s.watch, s.how.made()
    how = dataclasses.replace(how, wording=_wording(s))
    table = measured(s.know.table, items, how) if s.know.table is not None else None
    track = TrackSettings(
        measure=how, snapshots=w.snapshots, at=w.at_steps, budget=w.budget, probes=w.probes, probe_every=w.probe_every,
        tau=w.tau, rule=w.rule, seed=s.run.seed,
    )  # fmt: skip

    def tell(text: str) -> None:
        if s.run.progress:
            print(f"watching: {text}", file=sys.stderr)

    def watched(settings: Any, progress: bool) -> Teach:
        teach = plan(settings, progress, wording=how.wording)

        def both(host: Any, tokenizer: Any) -> Lesson:
            lesson = teach(host, tokenizer)
            observers = (*lesson.observers, Tracker(tokenizer, items, kept, track, table, tell))
            return dataclasses.replace(lesson, observers=observers)

        return both

    settings = KnowTrainSettings(**{f.name: getattr(s, f.name) for f in dataclasses.fields(KnowTrainSettings)})
    return train(settings, resume=s.resume, overwrite=s.overwrite, plan=watched)


def snapshots_shown(run_dir: Path) -> Shown:
    """A line per snapshot."""
    from rich.table import Table as Shown

    from inlay.knowledge.track import read_watched

    found = read_watched(run_dir)
    made = Shown(title=found.told, title_justify="left")
    names = ("em", "paraphrase_em", "retention_em", "learned", "approached", "stalled", "away")
    for name in ("step", "right, %", "reworded", "retained", *names[3:]):
        made.add_column(name, justify="right")
    for snapshot in found.snapshots:
        made.add_row(str(snapshot["step"]), *(_percent(snapshot["summary"][n]) for n in names))
    return made


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
