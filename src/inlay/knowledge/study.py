"""Runs a study on the toy world, one JSON a run, and turns what is there into a report's data."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.evaluate.bar import bar
from inlay.knowledge import findings
from inlay.knowledge.design import Job, StudySettings, condition, jobs, method_of, rates
from inlay.knowledge.exam import Exam, known
from inlay.knowledge.figures.style import plain
from inlay.knowledge.gather import deviate
from inlay.knowledge.interfere import Bench, curve, pairwise
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, measure
from inlay.knowledge.report import build
from inlay.knowledge.slick import SlickSettings, slick
from inlay.knowledge.table import Table
from inlay.knowledge.trial import Practice, Trial, losses
from inlay.knowledge.world import World

VALIDATION = 1000
"""Seed of the items on which learning rates are chosen; no run has it."""


def study(s: StudySettings) -> Path:
    """Run what is not there yet, then write the report of all that is; returns its page.

    Raises InlayError for a folder that holds runs of other settings.
    """
    from inlay.knowledge.pretrain import FAMILIES

    if strange := [f for f in s.families if f not in FAMILIES]:
        raise InlayError(f"unknown family {strange[0]!r}; there is: {', '.join(FAMILIES)}")
    began, plan = time.monotonic(), jobs(s)
    missing = [job for job in plan if not _there(file_of(s, job), job)]
    lab = Lab(s)
    with bar(s.progress) as shown:
        mark = shown.add_task("study", total=len(plan), completed=len(plan) - len(missing))
        for job in missing:
            if s.minutes is not None and time.monotonic() - began > 60 * s.minutes:
                break
            shown.update(mark, description=f"{job.family} {job.method} {job.regime} {job.condition} {job.seed}")
            write_text(
                file_of(s, job), json.dumps(plain({"job": job.plain(), **lab.run(job)}), ensure_ascii=False) + "\n"
            )
            shown.advance(mark)
    data = assemble(s)
    found = plain(findings.findings(data))
    write_text(s.out / "findings.json", json.dumps(found, indent=1) + "\n")
    write_text(s.out / "findings.md", findings.markdown(found))
    return build(data, s.out, s.progress)


def file_of(s: StudySettings, job: Job) -> Path:
    """Where a job's result is kept."""
    return s.out / "runs" / f"{job.name}.json"


def _there(file: Path, job: Job) -> bool:
    if not file.exists():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["job"] != job.plain():
        raise InlayError(f"{file} is of a study with other settings; choose another --out, or the settings it was of")
    return True


class Lab:
    """Bases, items and tables of a study, each made once."""

    def __init__(self, s: StudySettings):
        self.s = s
        self.hosts: dict[str, tuple[Any, Any, World]] = {}
        self.tables: dict[tuple[str, str, int], tuple[list[Item], Table, Exam, Exam]] = {}
        self.rates: dict[str, float] = {}

    def host(self, family: str) -> tuple[Any, Any, World]:
        """(host, tokenizer, world) of a family."""
        import inlay
        from inlay.knowledge.pretrain import make_base, world_of

        if family not in self.hosts:
            out = self.s.bases / family if self.s.bases is not None else None
            folder = make_base(family, 0, out, progress=self.s.progress)
            model, tokenizer = inlay.load_base(folder)
            self.hosts[family] = inlay.attach(model), tokenizer, world_of(folder)
        return self.hosts[family]

    def items(self, world: World, regime: str, seed: int) -> list[Item]:
        """The facts of a regime."""
        make = {"edits": world.edits, "new people": world.new_people, "random pairs": world.random_pairs}[regime]
        return make(self.s.items, seed)

    def measured(self, family: str, regime: str, seed: int) -> tuple[list[Item], Table, Exam, Exam]:
        """(items, their table, their exam, the exam of what is to be retained)."""
        key = family, regime, seed
        if key not in self.tables:
            host, tokenizer, world = self.host(family)
            items = self.items(world, regime, seed)
            how = MeasureSettings(batch_size=256)
            spare = Exam(host, tokenizer, world.retention(items, self.s.retained, seed), how)
            kept = Exam(host, tokenizer, known(spare), how)
            self.tables[key] = items, measure(host, tokenizer, items, how), Exam(host, tokenizer, items, how), kept
        return self.tables[key]

    def rate(self, spec: str) -> float:
        """A method's learning rate: the best on validation items of the first family, kept in `rates.json`."""
        file = self.s.out / "rates.json"
        if not self.rates and file.exists():
            self.rates = json.loads(file.read_text(encoding="utf-8"))
        if spec not in self.rates:
            family = self.s.families[0]
            found = {}
            for lr in rates(spec):
                items, _, exam, _ = self.measured(family, self.s.regimes[0], VALIDATION)
                with self.trial(family, items, spec, lr, VALIDATION, self.s.steps // 2) as trial:
                    trial.to()
                    found[lr] = float(np.nanmean(exam.paraphrases(trial.name)))
            self.rates[spec] = max(found, key=lambda r: found[r])
            write_text(file, json.dumps(self.rates, indent=1) + "\n")
        return self.rates[spec]

    def trial(
        self, family: str, items: Sequence[Item], spec: str, lr: float, seed: int, steps: int, **more: Any
    ) -> Trial:
        """A training, the rate falling to 0."""
        host, tokenizer, _ = self.host(family)
        name, settings = method_of(spec)
        how = Practice(
            method=name, settings=settings, lr=lr, schedule="linear", batch_size=self.s.batch_size, seed=seed
        )
        return Trial(host, tokenizer, items, how, steps=steps)

    def run(self, job: Job) -> dict[str, Any]:
        """What a job finds."""
        lr = self.rate(job.method)
        began = time.perf_counter()
        if job.kind == "interference":
            found = self._interference(job, lr)
        elif job.condition == "plain":
            found = self._plain(job, lr)
        else:
            found = self._condition(job, lr)
        return {**found, "lr": lr, "seconds": round(time.perf_counter() - began, 2)}

    def _plain(self, job: Job, lr: float) -> dict[str, Any]:
        items, table, exam, kept = self.measured(job.family, job.regime, job.seed)
        tsd = table["tsd"]
        snapshots = [exam.snapshot(None, 0)]
        with self.trial(job.family, items, job.method, lr, job.seed, job.steps) as trial:
            for step in job.snapshots:
                trial.to(step)
                snap = exam.snapshot(trial.name, step, tsd)
                snap["retention"] = float(kept.right(kept.answers(trial.name)).mean())
                snapshots.append(snap)
            paraphrases = exam.paraphrases(trial.name)
            numbers = {"steps": trial.total, "presentations": trial.presentations}
        full = job.seed == self.s.seeds[0]  # features of one seed are enough for pictures, and most of the bytes
        run = {
            **self._about(job),
            **numbers,
            "em": float(np.mean(snapshots[-1]["em"])),
            "paraphrase_em": float(np.nanmean(paraphrases)),
            "retention": snapshots[-1]["retention"],
            "deviation": deviate(exam, tsd, table["em0"], table["relation"].tolist(), snapshots),
            "snapshots": snapshots if full else [{k: v for k, v in s.items() if k != "features"} for s in snapshots],
        }
        rows = {k: v for k, v in table.rows.items() if full or "features" not in k}
        return {"run": run, "table": rows}

    def _about(self, job: Job) -> dict[str, Any]:
        return {
            "name": job.name,
            "method": job.method,
            "model": job.family,
            "seed": job.seed,
            "regime": job.regime,
            "condition": job.condition,
            "table": f"{job.family}, {job.regime}, seed {job.seed}",
        }

    def _condition(self, job: Job, lr: float) -> dict[str, Any]:
        from inlay.knowledge.objective import objective

        items, table, exam, kept = self.measured(job.family, job.regime, job.seed)
        how, host, tokenizer = condition(job.condition), *self.host(job.family)[:2]
        measured = {"tsd": table["tsd"], "features": table["features"]}
        if how.subset == "loss-ranked":
            measured["loss"] = self._base_losses(job, items)
        if how.subset == "no-unknown":
            measured["categories"] = self._categories(job, items)
        mask = how.keep(measured, job.more["keep"], job.seed)
        chosen = [i for i, yes in zip(items, mask, strict=True) if yes]
        trial = self.trial(job.family, chosen, job.method, lr, job.seed, job.steps)
        weighing: list[dict[str, Any]] = []
        if (know := how.settings()) is not None:
            x = table["tsd"][mask].tolist()
            trial.objective = objective(trial.rows, know, float(know.beta), host, tokenizer, x, job.seed)
        with trial:
            for step in sorted({1, job.steps // 4, job.steps // 2, job.steps}):
                weighing.append({"step": step, **trial.to(step)})
            said = exam.answers(trial.name)
            em, paraphrases = exam.right(said), exam.paraphrases(trial.name)
            retention = float(kept.right(kept.answers(trial.name)).mean())
            numbers = {"steps": trial.total, "presentations": trial.presentations}
        run = {
            **self._about(job),
            **numbers,
            "em": float(em.mean()),
            "paraphrase_em": float(np.nanmean(paraphrases)),
            "paraphrase_em_kept": float(np.nanmean(paraphrases[mask])),
            "em_kept": float(em[mask].mean()),
            "retention": retention,
            "away": float(np.mean(exam.distance(said)[~em] > table["tsd"][~em] + exam.tau)) if (~em).any() else 0.0,
        }
        weighed = [{"step": w["step"], "weights": w["weights"]} for w in weighing if "weights" in w]
        return {"run": run, "paraphrase_N": paraphrases, "kept_N": mask, "weighed": weighed}

    def _categories(self, job: Job, items: Sequence[Item]) -> np.ndarray:
        """SLiCK's category of each item under the base."""
        host, tokenizer, _ = self.host(job.family)
        how = SlickSettings(measure=MeasureSettings(batch_size=256), seed=job.seed)
        found = [k.category for k in slick(host, tokenizer, items, how, progress=self.s.progress)]
        if (many := found.count("Unknown")) in (0, len(found)):
            raise InlayError(
                f"{many} of {len(found)} facts are Unknown to the base, so leaving them out compares nothing; run "
                f"{job.condition!r} on another regime (new people)"
            )
        return np.array(found, dtype=object)

    def _base_losses(self, job: Job, items: Sequence[Item]) -> np.ndarray:
        """Cross entropy of each target under the base: of an adapter that is fresh, and so changes nothing."""
        with self.trial(job.family, items, job.method, 1e-3, job.seed, 1) as trial, trial.active():
            trial.host.model.eval()
            made: np.ndarray = losses(trial.loop, trial.rows).numpy()
        return made

    def _interference(self, job: Job, lr: float) -> dict[str, Any]:
        items, _, _, kept = self.measured(job.family, job.regime, job.seed)
        host, tokenizer, _ = self.host(job.family)
        name, settings = method_of(job.method)
        practice = Practice(method=name, settings=settings, lr=lr, batch_size=self.s.batch_size, seed=job.seed)
        bench = Bench(host, tokenizer, practice, MeasureSettings(batch_size=256))
        probes = items[:24]
        ks = [k for k in job.more["ks"] if k <= len(items)]
        part = {"name": f"{job.family}, {job.method}", **curve(bench, probes, items[24:], kept.items, ks)}
        if job.method == self.s.methods[0]:
            part |= pairwise(bench, items[:32])
        return {"interference": part}


def load(s: StudySettings) -> list[dict[str, Any]]:
    """The runs that are there, in the plan's order."""
    files = [file_of(s, job) for job in jobs(s)]
    return [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]


def assemble(s: StudySettings) -> dict[str, Any]:
    """A report's data from the runs that are there."""
    found = load(s)
    if not found:
        raise InlayError(f"{s.out} holds no runs yet; give the study more --minutes")
    total = len(jobs(s))
    about = {"testbed": "toy world", "runs": f"{len(found)} of {total}", "facts a run": s.items}
    data: dict[str, Any] = {
        "schema": 1,
        "title": "Knowledge learning by semantic distance, on a toy world",
        "about": about,
        "notes": [
            "Toy models of a quarter of a million parameters: none of these numbers reproduces a published one.",
            "Learning rates were chosen on items of their own; nothing else was tuned.",
        ],
        "tables": {},
        "runs": [f["run"] for f in found if "run" in f],
        "interference": [f["interference"] for f in found if "interference" in f],
    }
    for one in found:
        if "table" in one:
            data["tables"].setdefault(one["run"]["table"], one["table"])
    controlled = [f for f in found if "paraphrase_N" in f]
    data["controls"] = findings.control_rows(controlled)
    if part := findings.filter_part(s, controlled, data["tables"]):
        data["filter"] = part
    if part := findings.weights_part(controlled):
        data["weights"] = part
    return data
