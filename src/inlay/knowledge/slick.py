"""How well a base knows each fact: HighlyKnown, MaybeKnown, WeaklyKnown or Unknown.

Gekhman et al., "Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?" (arXiv 2405.05904), SLiCK: the chance
of a right answer is estimated from 10 random 4-shot prompts of the same relation, greedily (T = 0) and from 16 samples
at T = 0.5 each.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.evaluate import GenerateSettings
from inlay.evaluate.bar import bar
from inlay.evaluate.decode import generate_each
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, answer_limit
from inlay.knowledge.wording import Wording, answer_of, exact, leading

CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
AT_A_TIME = 4096
"""Samples asked for in one generation: bounds what waits in memory, never the result."""


@dataclass(frozen=True, kw_only=True)
class SlickSettings:
    """The paper's, by default."""

    prompts: int = 10
    """Random prompts per item."""
    shots: int = 4
    """Examples of the same relation in each."""
    samples: int = 16
    """Sampled answers per prompt, besides the greedy one."""
    temperature: float = 0.5
    """Of the samples."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """Wording, longest answer and batch size; features are not looked at."""
    between: str = "\n"
    """What stands between an example and the next."""
    seed: int = 0
    """Of the choice of examples and of sampling."""

    def __post_init__(self) -> None:
        for name, lowest in {"prompts": 1, "shots": 0, "samples": 1}.items():
            if (value := getattr(self, name)) < lowest:
                raise InlayError(f"{name} must be at least {lowest}, not {value}")
        if self.temperature <= 0:
            raise InlayError("samples need a temperature above 0; greedy answers are taken besides")


@dataclass(frozen=True)
class Known:
    """How well one item is known."""

    id: str
    greedy: float
    """Share of the prompts whose greedy answer is right."""
    sampled: float
    """Share of all samples that are right."""

    @property
    def category(self) -> str:
        """HighlyKnown: greedy answers always right; MaybeKnown: sometimes; WeaklyKnown: never, but a sample is;
        Unknown: none of either."""
        if self.greedy == 1:
            return "HighlyKnown"
        if self.greedy > 0:
            return "MaybeKnown"
        return "WeaklyKnown" if self.sampled > 0 else "Unknown"


def slick(
    host: Host,
    tokenizer: Any,
    items: Sequence[Item],
    settings: SlickSettings | None = None,
    *,
    pool: Sequence[Item] | None = None,
    plan: str | None = None,
    progress: bool = False,
) -> list[Known]:
    """How well each item is known.

    Args:
        pool: where the prompts' examples are drawn from (the items themselves if not given); an item is never among its
            own examples.
        plan: the adapter worn; None is the bare base.

    Raises InlayError where a relation has too few items to draw examples from.
    """
    settings = settings or SlickSettings()
    dialogues = settings.measure.wording.chat is not None
    shots: Any = few_shot_dialogues if dialogues else functools.partial(few_shot, tokenizer=tokenizer)
    prompts = [p for item in items for p in shots(item, pool or items, settings)]
    limit = answer_limit(tokenizer, items, settings.measure)
    owner = [item for item in items for _ in range(settings.prompts)]
    with bar(progress) as shown:
        mark = shown.add_task("known?", total=len(prompts) * (1 + settings.samples))
        greedy = _right(host, tokenizer, prompts, owner, settings, limit, plan, None, lambda n: shown.advance(mark, n))
        turns = [(i.id, k, n) for i in items for k in range(settings.prompts) for n in range(settings.samples)]
        seeds = [_draw(settings.seed, *turn) for turn in turns]
        many = [p for p in prompts for _ in range(settings.samples)]
        owners = [i for i in owner for _ in range(settings.samples)]
        sampled = _right(host, tokenizer, many, owners, settings, limit, plan, seeds, lambda n: shown.advance(mark, n))
    k, m = settings.prompts, settings.prompts * settings.samples
    return [
        Known(item.id, sum(greedy[n * k : (n + 1) * k]) / k, sum(sampled[n * m : (n + 1) * m]) / m)
        for n, item in enumerate(items)
    ]


def few_shot(item: Item, pool: Sequence[Item], settings: SlickSettings, tokenizer: Any) -> list[str]:
    """The texts of an item's prompts: examples with their answers, then its own question."""
    wording = settings.measure.wording
    lead = leading(tokenizer) or " " if wording.lead is None else wording.lead
    made = []
    for examples in _examples(item, pool, settings):
        shown = [wording.ask(i.prompt) + lead + i.target for i in examples]
        made.append(settings.between.join([*shown, wording.ask(item.prompt)]))
    return made


def few_shot_dialogues(item: Item, pool: Sequence[Item], settings: SlickSettings) -> list[list[dict[str, str]]]:
    """An item's prompts as messages of a chat: examples asked and answered, then its own question."""
    ask = settings.measure.wording.ask
    made = []
    for examples in _examples(item, pool, settings):
        turns = [("user", ask(i.prompt), "assistant", i.target) for i in examples]
        messages = [{"role": role, "content": text} for a, b, c, d in turns for role, text in ((a, b), (c, d))]
        made.append([*messages, {"role": "user", "content": ask(item.prompt)}])
    return made


def _examples(item: Item, pool: Sequence[Item], settings: SlickSettings) -> list[list[Item]]:
    """The examples of each of an item's prompts, drawn from its relation."""
    others = [i for i in pool if i.relation == item.relation and i.id != item.id]
    if len(others) < settings.shots:
        raise InlayError(
            f"item {item.id!r}: {settings.shots} examples are wanted and relation {item.relation!r} has {len(others)} "
            "other items; give a larger pool, or fewer shots"
        )
    draw = random.Random(f"{settings.seed}-{item.id}")
    return [draw.sample(others, settings.shots) for _ in range(settings.prompts)]


def shares(known: Sequence[Known]) -> dict[str, float]:
    """Category -> share of the items."""
    found = [k.category for k in known]
    return {c: found.count(c) / max(1, len(found)) for c in CATEGORIES}


def shifts(before: Sequence[Known], after: Sequence[Known]) -> Mapping[tuple[str, str], int]:
    """(category before, category after) -> items: what training did to what was known."""
    if [k.id for k in before] != [k.id for k in after]:
        raise InlayError("categories before and after must be of the same items, in the same order")
    found = {(a, b): 0 for a in CATEGORIES for b in CATEGORIES}
    for a, b in zip(before, after, strict=True):
        found[a.category, b.category] += 1
    return found


def _right(
    host: Host, tokenizer: Any, prompts: list[Any], owner: list[Item], settings: SlickSettings, limit: int,
    plan: str | None, seeds: list[int] | None, told: Any,
) -> list[bool]:  # fmt: skip
    """Whether each answer is right; sampled, if there are seeds."""
    how = GenerateSettings(
        max_new_tokens=limit,
        batch_size=settings.measure.batch_size,
        stop=settings.measure.wording.stops(host, tokenizer),
        temperature=settings.temperature if seeds is not None else 0.0,
    )
    wording = settings.measure.wording
    # Texts are whole prompts already; messages are not.
    encode = Wording().prompts if wording.chat is None else wording.dialogues
    found = [False] * len(prompts)
    for at in range(0, len(prompts), AT_A_TIME):
        part = slice(at, at + AT_A_TIME)
        ids = encode(tokenizer, prompts[part])
        for done, _ in generate_each(host, tokenizer, ids, plan, how, seeds[part] if seeds is not None else None):
            for n, one in done.items():
                found[at + n] = exact(answer_of(one.text), owner[at + n])
            told(len(done))
    return found


def _draw(*of: object) -> int:
    """A stream of its own for each sample, whatever else is asked."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=7).digest(), "big")
