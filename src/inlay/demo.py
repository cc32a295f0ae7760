"""The demonstration: four adapters on one base, before and after on held-out questions; all in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError

if TYPE_CHECKING:
    from inlay.core.host import Host
    from inlay.tasks import Record


@dataclass(frozen=True)
class Arm:
    """One adapter of the demonstration."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3


ARMS = (
    Arm("lora", "lora", {"rank": 8}, lr=4e-3),
    Arm("series", "series", {"size": 64}, lr=2e-2),
    Arm("parallel", "parallel", {"size": 32}, lr=2e-2),
    Arm("prefix", "prefix", {"tokens": 10}, lr=0.3),
)
"""Sizes and rates suit a base of three million parameters and a hundred steps, not large models."""

REAL_ARMS = (
    Arm("lora", "lora", {"rank": 16}, lr=1e-3),
    Arm("series", "series", {"size": 64}, lr=2e-3),
    Arm("parallel", "parallel", {"size": 64}, lr=2e-3),
    Arm("prefix", "prefix", {"tokens": 10}, lr=3e-2),
)
"""For the bases of `inlay.models.real`: a hundred million parameters, some twenty steps."""


@dataclass(frozen=True)
class Scale:
    """How much of a demonstration takes a few minutes on two cores."""

    arms: tuple[Arm, ...]
    steps: int
    batch_size: int
    questions: int


SMALL = Scale(ARMS, steps=100, batch_size=16, questions=100)
REAL = Scale(REAL_ARMS, steps=25, batch_size=8, questions=20)


def scale_of(model: str) -> Scale:
    """What suits a base by its name."""
    from inlay.models import real

    return REAL if model in real.CATALOGUE else SMALL


@dataclass(frozen=True)
class Row:
    """One line of the table: the bare base, or an adapter."""

    name: str
    at: str
    parameters: int
    percent: float
    """Of base and adapter together."""
    correct: int
    n: int
    seconds: float
    """Training time."""


@dataclass(frozen=True)
class Result:
    """What the demonstration found."""

    task: str
    rows: tuple[Row, ...]
    question: str
    answer: str
    said: dict[str, str]
    """Who said what to the question, all in one batch."""


def demo(
    out: Path,
    *,
    model: str = "tiny-llama",
    task: str = "world-addsub",
    steps: int | None = None,
    batch_size: int | None = None,
    records: int = 2000,
    questions: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
    base: tuple[Any, Any] | None = None,
) -> Result:
    """Train the four adapters, score them on held-out questions, and mix them in one batch.

    Args:
        out: folder of the runs; each adapter is left in `<out>/<name>/adapter`.
        steps, batch_size: of each adapter's training; those of `scale_of(model)` if not given, as for `questions`.
        records: training records drawn.
        questions: held-out questions scored.
        say: told what happens, line by line.
        base: (model, tokenizer) instead of `model`.
    """
    import torch

    from inlay.api import attach
    from inlay.models.base import load_base
    from inlay.tasks import load

    scale = scale_of(model)
    steps, questions = scale.steps if steps is None else steps, scale.questions if questions is None else questions
    batch_size = batch_size or scale.batch_size
    if steps < 1 or questions < 1:
        raise InlayError(f"steps {steps} and questions {questions}: at least 1 each")
    torch.manual_seed(seed)
    frozen, tokenizer = base or load_base(model)
    total = sum(p.numel() for p in frozen.parameters())
    host = attach(frozen)
    train, test = load(task, "train", limit=records, seed=seed), load(task, "test", limit=questions, seed=seed)
    form = getattr(frozen.config, "base_form", None)
    say(f"base {model}: {total:,} frozen parameters" + (f"; {form}" if form else ""))
    say(f"task {task}: {len(train):,} training records, {len(test)} held-out questions")
    before = judge(host, tokenizer, task, test, [None], progress)[None]
    say(f"before: the bare base answers {sum(ok for ok, _ in before)} of {len(test)}")
    seconds = {}
    for arm in scale.arms:
        seconds[arm.name] = fit_arm(host, tokenizer, arm, train, out, steps, batch_size, seed, say, progress)
    after = judge(host, tokenizer, task, test, [arm.name for arm in scale.arms], progress)
    rows = [Row("bare base", "", 0, 0.0, sum(ok for ok, _ in before), len(test), 0.0)]
    for arm in scale.arms:
        count = host.count(arm.name)
        at = ",".join(dict.fromkeys(s.spot.role for s in host.sites.values() if arm.name in s.places))
        right = sum(ok for ok, _ in after[arm.name])
        rows.append(Row(arm.name, at, count, 100 * count / (total + count), right, len(test), seconds[arm.name]))
    i = telling(before, after)
    everyone: list[str | None] = [None, *(arm.name for arm in scale.arms)]
    said = mixed(host, tokenizer, test[i], everyone)
    spoken = {name or "bare base": text for name, text in said.items()}
    return Result(task, tuple(rows), test[i].instruction, test[i].answer, spoken)


def fit_arm(
    host: Host, tokenizer: Any, arm: Arm, train: Sequence[Record], out: Path, steps: int, batch_size: int, seed: int,
    say: Callable[[str], None], progress: bool,
) -> float:  # fmt: skip
    """Hang and train one adapter; its training time in seconds."""
    from inlay.methods import method
    from inlay.tasks import CLEAN, choose, encode_all
    from inlay.train import DataSettings, OptimSettings, RunSettings, TrainSettings, fit

    row = method(arm.method)
    host.add(arm.name, row.make(**arm.settings), at=row.places, seed=seed)
    say(f"training {arm.name}: {host.count(arm.name):,} parameters, {steps} steps of {batch_size}")
    template = choose(None, tokenizer)
    examples, _ = encode_all(list(train), tokenizer, CLEAN, 256, template)
    settings = TrainSettings(
        model=str(getattr(host.model.config, "_name_or_path", "") or "base"),
        method=arm.method,
        settings=arm.settings,
        name=arm.name,
        out=out / arm.name,
        data=DataSettings(protocol="clean", group_by_length=True),
        optim=OptimSettings(batch_size=batch_size, micro_batch=batch_size, steps=steps, lr=arm.lr, warmup=0.1),
        run=RunSettings(seed=seed, save_every=0, loggers=("none",), progress=progress),
    )
    began = time.perf_counter()
    fit(host, arm.name, examples, [], settings, settings.out, tokenizer, overwrite=True, template=template)
    return time.perf_counter() - began


def judge(
    host: Host, tokenizer: Any, task: str, records: Sequence[Record], names: Sequence[str | None], progress: bool
) -> dict[str | None, list[tuple[bool, str]]]:
    """(right or not, text) per adapter and record; the batches mix all adapters."""
    from inlay.evaluate import GenerateSettings
    from inlay.evaluate.decode import generate_each
    from inlay.tasks import choose, get
    from inlay.tasks.score import score

    rows = [(name, i) for i in range(len(records)) for name in names]
    template = choose(None, tokenizer)
    prompts = [template.prompt_ids(records[i], tokenizer) for _, i in rows]
    settings = GenerateSettings(max_new_tokens=get(task).max_new_tokens, batch_size=50)
    texts: dict[int, str] = {}
    with _bar(progress) as bar:
        ticket = bar.add_task("answering", total=len(rows))
        for done, _ in generate_each(host, tokenizer, prompts, [name for name, _ in rows], settings):
            texts |= {i: one.text for i, one in done.items()}
            bar.advance(ticket, len(done))
    found: dict[str | None, list[tuple[bool, str]]] = {}
    for name in names:
        mine = [texts[j] for j, (who, _) in enumerate(rows) if who == name]
        made = [{"text": text, "label": record.answer} for text, record in zip(mine, records, strict=True)]
        found[name] = [(p.correct, text) for p, text in zip(score(made, task, "clean").predictions, mine, strict=True)]
    return found


def _bar(show: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def telling(before: list[tuple[bool, str]], after: dict[Any, list[tuple[bool, str]]]) -> int:
    """The first question that the base misses and most adapters answer."""
    votes = [sum(answers[i][0] for answers in after.values()) - 10 * ok for i, (ok, _) in enumerate(before)]
    return votes.index(max(votes))


def mixed(host: Host, tokenizer: Any, record: Record, plan: Sequence[str | None]) -> dict[str | None, str]:
    """One question, one batch, each row another adapter."""
    from inlay.evaluate import GenerateSettings, generate
    from inlay.tasks import choose

    prompts = [choose(None, tokenizer).prompt_ids(record, tokenizer)] * len(plan)
    said = generate(host, tokenizer, prompts, list(plan), GenerateSettings(max_new_tokens=64, batch_size=len(plan)))
    return {name: one.text for name, one in zip(plan, said, strict=True)}
