"""What the base says to each item, how far that is from the target, and a table of it that is made once and kept.

Measuring costs one batched greedy pass; features in the embedding space are look-ups.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.core.store import content_digest
from inlay.evaluate import GenerateSettings
from inlay.evaluate.bar import bar
from inlay.evaluate.decode import generate_each
from inlay.knowledge.distance import Metric, flagged, tolerance
from inlay.knowledge.feature import Space, expected, features
from inlay.knowledge.items import Item, items_digest
from inlay.knowledge.table import SCHEMA, Table
from inlay.knowledge.wording import Wording, answer_of, exact

SPARE = 8
"""Tokens an answer may be longer than the longest target."""
SOFT_TAU = 0.01


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How knowledge is measured. All but `batch_size` decide the result and are part of a table's key."""

    space: Space = field(default_factory=Space)
    """Where features live."""
    metric: Metric = "cosine"
    """Distance of features."""
    present: Literal["greedy", "soft"] = "greedy"
    """Whose feature stands for what the model says now: its free-running `greedy` answer, or the answer it expects
    along that one (`soft`, see `feature.expected`). Exact match is the greedy answer's either way."""
    wording: Wording = field(default_factory=Wording)
    """How items are put to the model."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; the longest target and 8 more if not given."""
    batch_size: int = 128
    """Rows decoded at a time: speed and memory, never the result (in float32)."""

    def __post_init__(self) -> None:
        if self.space.kind == "predict":
            raise InlayError("distances need features of the bare base: use space embed or hidden:<layer>, not predict")
        if self.present not in ("greedy", "soft"):
            raise unknown("present", self.present, ("greedy", "soft"))
        if self.present == "soft" and self.space.kind != "embed":
            raise InlayError(f"present soft is an expected embedding, and {self.space.name} has none: use space embed")

    @property
    def tau(self) -> float:
        """How far a distance must move to count as moved: soft ones never stand quite still."""
        return tolerance(self.space.name) if self.present == "greedy" else SOFT_TAU


def answers(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: MeasureSettings,
    limit: int,
    plan: str | None = None,
    progress: str = "",
) -> list[str]:
    """The model's free-running greedy answer to each prompt, read by the one extractor.

    Args:
        limit: most new tokens.
        plan: the adapter worn; None is the bare base.
        progress: what the progress bar is called; none is shown without.
    """
    how = GenerateSettings(
        max_new_tokens=limit, batch_size=settings.batch_size, stop=settings.wording.stops(host, tokenizer)
    )
    found = [""] * len(prompts)
    with bar(bool(progress)) as shown:
        mark = shown.add_task(progress, total=len(prompts))
        for done, _ in generate_each(host, tokenizer, settings.wording.prompts(tokenizer, prompts), plan, how):
            for n, one in done.items():
                found[n] = answer_of(one.text)
            shown.advance(mark, len(done))
    return found


def measure(
    host: Host,
    tokenizer: Any,
    items: Sequence[Item],
    settings: MeasureSettings | None = None,
    *,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Table:
    """The base's present answer to each item and its target semantic distance. The host may wear what it likes.

    Args:
        cache: a folder of tables; one made of the same base, items and settings is read from it, a new one is added.

    Raises:
        InlayError: no items, items that share an id, or a prompt that leaves no room for an answer.
    """
    settings = settings or MeasureSettings()
    _check(items)
    key = table_key(host, tokenizer, items, settings)
    kept = Path(cache) / key[:16] if cache is not None else None
    if kept is not None and kept.is_dir():
        found = Table.load(kept)
        if found.about["key"] == key:
            return found
    limit = answer_limit(tokenizer, items, settings)
    prompts = [i.prompt for i in items]
    said = answers(host, tokenizer, prompts, settings, limit, progress="measuring" if progress else "")
    table = _table(host, tokenizer, items, settings, said, key)
    if kept is not None:
        table.save(kept)
    return table


def answer_limit(tokenizer: Any, items: Sequence[Item], settings: MeasureSettings) -> int:
    """Most tokens an answer may have."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    return max(map(len, settings.wording.answers(tokenizer, [i.target for i in items]))) + SPARE


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise InlayError("no items to measure")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InlayError(f"two items have the id {item.id!r}; give each its own")
        seen.add(item.id)


@dataclass(frozen=True)
class Targets:
    """Features of what should be said."""

    target: Tensor
    """(N, D)"""
    each: list[Tensor]
    """Per item, of target and aliases (1 + aliases, D)."""
    mean: Tensor | None
    """What was subtracted (D,), if the space is centred."""


def target_features(host: Host, tokenizer: Any, items: Sequence[Item], settings: MeasureSettings) -> Targets:
    """Features of all items' targets and aliases, under the bare base."""
    raw = dataclasses.replace(settings.space, center=False)
    prompts = [i.prompt for i in items for _ in i.answers]
    texts = [a for i in items for a in i.answers]
    z = features(host, tokenizer, prompts, texts, raw, wording=settings.wording)
    each = list(z.split([len(i.answers) for i in items]))
    target = torch.stack([own[0] for own in each])
    if not settings.space.center:
        return Targets(target, each, None)
    mean = target.double().mean(0).float()
    return Targets(target - mean, [own - mean for own in each], mean)


def present_features(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[str],
    said: Sequence[str],
    settings: MeasureSettings,
    mean: Tensor | None = None,
    plan: str | None = None,
) -> Tensor:
    """Features (N, D) of a model's answers to prompts; `plan` is what it wore, which matters to soft ones."""
    how: dict[str, Any] = {"wording": settings.wording, "mean": mean}
    if settings.present == "soft":
        return expected(host, tokenizer, prompts, said, settings.space, plan=plan, **how)
    return features(host, tokenizer, prompts, said, settings.space, **how)


def _table(
    host: Host, tokenizer: Any, items: Sequence[Item], settings: MeasureSettings, said: list[str], key: str
) -> Table:
    targets = target_features(host, tokenizer, items, settings)
    prompts = [i.prompt for i in items]
    mine = present_features(host, tokenizer, prompts, said, settings, targets.mean)
    right = [exact(a, i) for a, i in zip(said, items, strict=True)]
    found = flagged(mine, targets.each, right, settings.metric)
    rows: dict[str, np.ndarray] = {
        "id": _texts([i.id for i in items]),
        "relation": _texts([i.relation for i in items]),
        "subject": _texts([i.subject for i in items]),
        "split": _texts([i.split for i in items]),
        "prompt": _texts(prompts),
        "target": _texts([i.target for i in items]),
        "answer0": _texts(said),
        "em0": np.array(right, dtype=bool),
        "tsd": found.d.numpy(),
        "empty": found.empty.numpy(),
        "tie": found.semantic_tie.numpy(),
        "n_tokens": np.array([len(t) for t in settings.wording.answers(tokenizer, [i.target for i in items])]),
        "features": targets.target.numpy(),
        "answer_features": mine.numpy(),
    }
    form = getattr(host.model.config, "base_form", None)
    about = {
        "schema": SCHEMA,
        "key": key,
        "model": getattr(host.model.config, "_name_or_path", "") or host.anatomy.family,
        **({"base_form": form} if form else {}),
        "items": items_digest(items),
        "settings": dataclasses.asdict(settings),
        "mean": None if targets.mean is None else targets.mean.tolist(),
    }
    return Table(rows, json.loads(json.dumps(about)))


def _texts(values: Sequence[str]) -> np.ndarray:
    return np.array(list(values), dtype=object)


# ---- what a table was made of ----------------------------------------------------------------------------------------
def base_digest(host: Host) -> str:
    """SHA-256 over every tensor of the bare base; adapters do not count."""
    hung = {id(t) for name in host.edits for t in host.tensors(name).values()}
    named = [*host.model.named_parameters(), *host.model.named_buffers()]
    return content_digest({k: t for k, t in named if id(t) not in hung})


def table_key(host: Host, tokenizer: Any, items: Sequence[Item], settings: MeasureSettings) -> str:
    """SHA-256 over base, tokenisation of the items, items and settings: tables of one key are equal."""
    plain = dataclasses.asdict(settings)
    plain.pop("batch_size")
    if settings.wording.chat is None:  # keys of before there was a choice
        del plain["wording"]["chat"]
    wording = settings.wording
    tokens = [
        wording.prompts(tokenizer, [i.prompt for i in items]),
        wording.answers(tokenizer, [a for i in items for a in i.answers]),
    ]
    told = [SCHEMA, base_digest(host), items_digest(items), plain, hashlib.sha256(repr(tokens).encode()).hexdigest()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
