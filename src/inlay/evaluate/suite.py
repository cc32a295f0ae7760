"""Tasks x adapters: every record of every task through every adapter, all adapters of a task in the same batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.core.errors import InlayError, unknown
from inlay.core.fingerprint import fingerprint
from inlay.core.host import Host
from inlay.core.route import Worn, read_plan
from inlay.evaluate.bar import bar
from inlay.evaluate.batches import room
from inlay.evaluate.decode import generate_each
from inlay.evaluate.log import Log, adapter_digest, settle
from inlay.evaluate.options import NORMALISE, Normalise, option_scores_each
from inlay.evaluate.prepared import Item, Preparation, PreparedTask, read_records
from inlay.evaluate.prompting import Prompting
from inlay.evaluate.report import Cell, Report, saved_cells
from inlay.tasks import TASKS, AnyTemplate, Record, Task, template_json
from inlay.tasks import get as get_task
from inlay.tasks.protocols import Protocol
from inlay.tasks.protocols import get as get_protocol
from inlay.tasks.score import score
from inlay.tasks.table import COMMONSENSE, MATH

How = Literal["generate", "options"]
OptionForm = Literal["answer", "text"]
BASE = "base"
"""What the bare model is called in files and tables."""
GROUPS: dict[str, tuple[str, ...]] = {
    "math": MATH,
    "commonsense": COMMONSENSE,
    "world": tuple(t.name for t in TASKS.values() if t.group == "world"),
}
"""Names for several tasks at once."""


@dataclass(frozen=True)
class _Run:
    host: Host
    tokenizer: Any
    protocol: Protocol
    how: How
    option_form: OptionForm
    normalise: Normalise
    wearers: dict[str, Worn]
    templates: dict[str, AnyTemplate]
    mixed: bool
    log: Log


def expand(tasks: str | Task | Sequence[str | Task]) -> list[Task]:
    """Tasks from names and groups (`math`, `commonsense`, `world`), each once."""
    found: dict[str, Task] = {}
    for one in [tasks] if isinstance(tasks, str | Task) else tasks:
        for name in GROUPS.get(one, (one,)) if isinstance(one, str) else (one,):
            task = get_task(name)
            if task.group == "training":
                raise InlayError(f"{task.name} is a training set; evaluate on {', '.join([*GROUPS, *MATH])} ...")
            found[task.name] = task
    if not found:
        raise InlayError(f"no task to evaluate; name tasks or groups ({', '.join(GROUPS)})")
    return list(found.values())


def evaluate(
    host: Host,
    tokenizer: Any,
    tasks: str | Task | Sequence[str | Task],
    adapters: Sequence[str | None] = (None,),
    protocol: str | Protocol = "clean",
    how: How = "generate",
    *,
    template: str | AnyTemplate | None = None,
    data: str | Path | None = None,
    records: Mapping[str, Sequence[Record]] | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    decoding: Mapping[str, Any] | None = None,
    option_form: OptionForm = "answer",
    normalise: Normalise = "none",
    batch_size: int = 16,
    mixed: bool = True,
    out: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Score adapters on tasks.

    Args:
        tasks: names, groups (`math`, `commonsense`, `world`) or tasks.
        adapters: names on the host (`a+b`: worn together); None is the bare base, called `base` in the report.
        protocol: `clean` or `published`: prompts, extraction, and the default number of beams.
        how: `generate` a text and extract the answer, or pick the likeliest of the record's `options`.
        template: of the prompts, for the base and all adapters: `chat`, `alpaca`, `none`, a file, or a template. By
            default each adapter's prompts are written by the template that it records, those of others by the
            tokenizer's own chat template if it has one, else alpaca. `published` fixes its own.
        data: folder in LLM-Adapters' layout (see `inlay.tasks.load`); None: the Hub. Synthetic tasks need none.
        records: records per task name, instead of loading.
        limit: at most so many records per task, drawn with `seed`.
        decoding: overrides of `GenerateSettings`; by default the task's `max_new_tokens` and the protocol's `beams`.
        option_form: score an option as its trained statement (`answer`: "the correct answer is answer2") or as what it
            says (`text`).
        normalise: of option scores, see `option_scores`.
        mixed: all adapters of a task in the same batches; otherwise one after another. The results are the same.
        out: folder for `generations.jsonl`, `settings.json`, `report.json`, `report.md`. A run that finds generations
            made with the same settings goes on from them; made with others, it is an InlayError. The report in the
            folder also has what earlier calls were asked for.
        progress: show a bar.

    Returns what this call was asked for.
    """
    _check(how, option_form, normalise)
    chosen, rules, folder = expand(tasks), get_protocol(protocol), Path(out) if out is not None else None
    wearers = _wearers(host, adapters)
    rules.check_template(template)
    prompting = Prompting(host, tokenizer, rules.eval if rules.fixed else template)
    templates = {label: prompting.of(worn, label) for label, worn in wearers.items()}
    reserve = max(room(host, worn) for worn in wearers.values())
    found = ((task, read_records(task, records, split, data, limit, seed)) for task in chosen)
    prepare = Preparation(prompting, rules, how, reserve, decoding or {}, batch_size, templates)
    benches = [prepare(*one) for one in found]
    options = {"option_form": option_form, "normalise": normalise} if how == "options" else {}
    asked = {label: template_json(t) for label, t in templates.items()}
    about: dict[str, Any] = {"protocol": rules.name, "how": how, **options, "templates": asked}
    about |= {"split": split, "limit": limit, "seed": seed}
    about |= _made_by(host, benches, wearers, how)
    settings, earlier, log = settle(folder, about), saved_cells(folder), Log(folder)
    run = _Run(host, tokenizer, rules, how, option_form, normalise, wearers, templates, mixed, log)
    with bar(progress) as shown:
        for bench in benches:
            _answer(run, bench, shown)
    report = _report(benches, wearers, rules, log, about)
    if folder:
        _with_earlier(earlier, report, benches, rules, log, settings).save(folder)
    return report


def _check(how: str, option_form: str, normalise: str) -> None:
    for what, value, known in (
        ("way to evaluate", how, ("generate", "options")),
        ("option form", option_form, ("answer", "text")),
        ("normalisation", normalise, NORMALISE),
    ):
        if value not in known:
            raise unknown(what, value, known)


def _wearers(host: Host, adapters: Sequence[str | None]) -> dict[str, Worn]:
    if isinstance(adapters, str) or not adapters:
        raise InlayError(f"adapters must be a list of names (None: the bare base), not {adapters!r}")
    if None in adapters and BASE in adapters:
        raise InlayError(f"{BASE!r} is what the bare base is called in reports; give that adapter another name")
    plans = read_plan(adapters, host.edits)
    return {BASE if a is None else a: worn for a, worn in zip(adapters, plans, strict=True)}


def _made_by(host: Host, benches: list[PreparedTask], wearers: dict[str, Worn], how: How) -> dict[str, Any]:
    def data(bench: PreparedTask) -> dict[str, Any]:
        text = repr([(i.index, dataclasses.astuple(i.record), i.ids) for i in bench.items])
        decoding = {k: v for k, v in dataclasses.asdict(bench.settings).items() if k != "batch_size"}
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"records": len(bench.items), "digest": digest, **(decoding if how == "generate" else {})}

    return {
        "model": getattr(host.model.config, "_name_or_path", "") or host.anatomy.family,
        "dtype": str(host.dtype).removeprefix("torch."),
        "datasets": {bench.task.name: data(bench) for bench in benches},
        "adapters": {label: adapter_digest(host, worn) for label, worn in wearers.items()},
        "base": fingerprint(host),
    }


def _answer(run: _Run, bench: PreparedTask, shown: Any) -> None:
    """Whatever the log does not have yet of this task."""
    wanted = [
        (label, item)
        for label in run.wearers
        for item in bench.prompts[label]
        if (label, bench.task.name, item.index) not in run.log.rows
    ]
    total = len(run.wearers) * len(bench.items)
    mark = shown.add_task(bench.task.name, total=total, completed=total - len(wanted))
    turns = [wanted] if run.mixed else [[w for w in wanted if w[0] == label] for label in run.wearers]
    for rows in filter(None, turns):
        made = _generated(run, bench, rows) if run.how == "generate" else _chosen(run, bench, rows)
        for done, seconds in made:
            lines = []
            for at, told in done.items():
                label, item = rows[at]
                line = {"adapter": label, "dataset": bench.task.name, "index": item.index, **told}
                (judged,) = score([{**told, "label": item.record.answer}], bench.task, run.protocol).predictions
                line |= {"prediction": judged.prediction, "label": judged.label}
                line["seconds"] = round(seconds / len(done), 6)
                lines.append(line)
            run.log.add(lines)
            shown.advance(mark, len(done))


Made = Iterator[tuple[dict[int, dict[str, Any]], float]]


def _generated(run: _Run, bench: PreparedTask, rows: list[tuple[str, Item]]) -> Made:
    plan = [run.wearers[label] for label, _ in rows]
    seeds = [_draw(bench.settings.seed, bench.task.name, item.index) for _, item in rows]
    ids = [item.ids for _, item in rows]
    for done, seconds in generate_each(run.host, run.tokenizer, ids, plan, bench.settings, seeds):
        told = {
            i: {"text": g.text, "truncated": g.finished == "length", "tokens": len(g.tokens)} for i, g in done.items()
        }
        yield told, seconds


def _draw(seed: int, name: str, index: int) -> int:
    """A seed of its own for each record, the same for every adapter: a comparison is then less noisy."""
    return int.from_bytes(hashlib.blake2b(repr((seed, name, index)).encode(), digest_size=7).digest(), "big")


def _chosen(run: _Run, bench: PreparedTask, rows: list[tuple[str, Item]]) -> Made:
    task = bench.task
    names = [task.options(item.record) for _, item in rows]
    said = [[statement(task, name) for name in own] for own in names]
    scored = said if run.option_form == "answer" else [task.option_texts(item.record) for _, item in rows]
    templates = [run.templates[label] for label, _ in rows]
    ids = [[t.option_ids(text, run.tokenizer) for text in own] for t, own in zip(templates, scored, strict=True)]
    plan = [run.wearers[label] for label, _ in rows]
    prompts = [item.ids for _, item in rows]
    each = option_scores_each(
        run.host, run.tokenizer, prompts, ids, plan, run.normalise, batch_size=bench.settings.batch_size
    )
    for done, seconds in each:
        told = {}
        for i, scores in done.items():
            best = max(range(len(scores)), key=scores.__getitem__)
            told[i] = {"text": said[i][best], "truncated": False, "scores": [round(s, 5) for s in scores]}
        yield told, seconds


def statement(task: Task, option: str) -> str:
    """How training says that this option is the answer."""
    return f"The answer is ({option})" if task.kind == "letter" else f"the correct answer is {option}"


def _right(rows: Sequence[Mapping[str, Any]], task: Task, protocol: Protocol) -> dict[int, bool]:
    return {p.index: p.correct for p in score(rows, task, protocol).predictions}


def _with_earlier(
    earlier: Sequence[Cell],
    report: Report,
    benches: Sequence[PreparedTask],
    protocol: Protocol,
    log: Log,
    settings: Mapping[str, Any],
) -> Report:
    """A report with what earlier calls found, too, where their answers are still there: the settings were the same, or
    this call would have been refused."""
    tasks = TASKS | {b.task.name: b.task for b in benches}
    cells, right = {}, dict(report.right)
    for cell in earlier:
        key = cell.adapter, cell.dataset
        rows = log.cell(*key)
        if key in right or (len(rows) == cell.n and cell.dataset in tasks):
            cells[key] = cell
            right.setdefault(key, _right(rows, tasks[cell.dataset], protocol))
    cells |= {(c.adapter, c.dataset): c for c in report.cells}
    shown = {"adapters": {a for a, _ in cells}, "datasets": {d for _, d in cells}}
    named = {k: {n: v for n, v in settings[k].items() if n in names} for k, names in shown.items()}
    return Report(tuple(cells.values()), {**settings, **named}, right)


def _report(
    benches: list[PreparedTask], wearers: dict[str, Worn], protocol: Protocol, log: Log, settings: Mapping[str, Any]
) -> Report:
    cells, right = [], {}
    for label in wearers:
        for bench in benches:
            rows = log.of(label, bench.task.name, [i.index for i in bench.items])
            found = score(rows, bench.task, protocol)
            low, high = found.interval
            cells.append(
                Cell(
                    adapter=label,
                    dataset=bench.task.name,
                    n=found.n,
                    correct=found.correct,
                    accuracy=found.accuracy,
                    low=low,
                    high=high,
                    no_answer=found.no_answer,
                    truncated=found.truncated or 0,
                    shortened=sum(i.cut for i in bench.prompts[label]),
                    seconds=sum(r["seconds"] for r in rows),
                )
            )
            right[label, bench.task.name] = {p.index: p.correct for p in found.predictions}
    return Report(tuple(cells), settings, right)
