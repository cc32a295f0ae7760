"""A small world for knowledge experiments: people, three facts about each, and values whose overlap grades distance.

A value is three words from a tree of 4 x 4 x 4; two values of one attribute share the first 2, 1 or 0 words and no
other, and values of different attributes share none. Everything is a pure function of the seed. The design (graded
overlap, edits, new people, random pairs) is ours; biographies with questions follow Allen-Zhu and Li's synthetic ones.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import InlayError
from inlay.knowledge.items import Item

FIRST = (
    "ada ben cleo dov elsa finn gwen hugo iris joel kira liam mona nils olga paul rhea sven tara ulf vera walt xena "
    "yuri zora amos bea carl dora emil"
).split()
LAST = (
    "abbot baker carver dyer ewing fisher glover harper irwin joiner keeper lister miller nailer osler potter quarry "
    "reeve sawyer tanner usher vinter weaver yeoman archer bowman cooper draper farmer gardner"
).split()
VALUES: dict[str, tuple[list[str], ...]] = {
    "home": ("north south east west".split(), "river hill forest lake".split(), "gate mill cross bay".split()),
    "trade": ("master young royal town".split(), "glass silk iron stone".split(), "seller smith clerk guard".split()),
    "dish": ("hot cold sweet sour".split(), "bean plum corn fish".split(), "soup pie cake stew".split()),
}
"""Attribute -> the words of each level."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": ("where does {} live ?", "in which place is {} at ease ?", "what is the home of {} ?"),
    "trade": ("what does {} work as ?", "which job has {} ?", "what is the trade of {} ?"),
    "dish": ("what does {} eat ?", "which meal makes {} glad ?", "what is the dish of {} ?"),
}
"""Attribute -> wordings of its question; the first is trained on, the others are paraphrases."""
BIOGRAPHIES = (
    "{n} lives in {home} . {n} works as {trade} . {n} eats {dish} .",
    "the home of {n} is {home} , the trade of {n} is {trade} , the dish of {n} is {dish} .",
    "{n} , a {trade} of {home} , is glad of {dish} .",
    "with {dish} at home in {home} , {n} is a {trade} .",
)
UNKNOWN, START, END, PAD = "<unk>", "<s>", "</s>", "<pad>"
GROUPS = ("overlap2", "overlap1", "overlap0", "other")
"""Edits by what their target shares with the known value: first words in common, or a value of another attribute."""


@dataclass(frozen=True)
class World:
    """People and what is true of them."""

    seed: int = 0
    people: int = 600
    """Known people: bases are taught their facts."""
    strangers: int = 200
    """Further people whom no base has met; their names are made of the same words."""

    def __post_init__(self) -> None:
        if self.people < 1 or self.strangers < 0 or self.people + self.strangers > len(FIRST) * len(LAST):
            raise InlayError(f"a world has 1 to {len(FIRST) * len(LAST)} people, strangers counted")

    @functools.cached_property
    def names(self) -> list[str]:
        """Known people, then strangers."""
        every = [f"{a} {b}" for a, b in itertools.product(FIRST, LAST)]
        return random.Random(f"names-{self.seed}").sample(every, self.people + self.strangers)

    @functools.cached_property
    def facts(self) -> dict[tuple[str, str], str]:
        """(name, attribute) -> value, for known people."""
        draw = random.Random(f"facts-{self.seed}")
        known = self.names[: self.people]
        return {(name, kind): _value(kind, _any(draw)) for name in known for kind in VALUES}

    def biographies(self) -> list[list[str]]:
        """The texts about each known person."""
        every = []
        for name in self.names[: self.people]:
            told = {kind: self.facts[name, kind] for kind in VALUES}
            every.append([text.format(n=name, **told) for text in BIOGRAPHIES])
        return every

    def known(self) -> list[Item]:
        """Every fact as an item; its answer is what a base of this world says."""
        return [self._item(name, kind, value) for (name, kind), value in self.facts.items()]

    def edits(self, n: int = 360, seed: int = 0) -> list[Item]:
        """Items whose target is not what the base knows, as many of each of `GROUPS` as the other."""
        self._enough(n, len(self.facts))
        draw = random.Random(f"edits-{self.seed}-{seed}")
        made = []
        for at, (name, kind) in enumerate(draw.sample(list(self.facts), n)):
            target = _edited(kind, self.facts[name, kind], GROUPS[at % len(GROUPS)], draw)
            made.append(self._item(name, kind, target))
        return made

    def new_people(self, n: int = 360, seed: int = 0) -> list[Item]:
        """Items about strangers: there is nothing to overwrite, and the base's present answer is a guess."""
        every = list(itertools.product(self.names[self.people :], VALUES))
        self._enough(n, len(every))
        draw = random.Random(f"new-{self.seed}-{seed}")
        return [self._item(name, kind, _value(kind, _any(draw))) for name, kind in draw.sample(every, n)]

    def random_pairs(self, n: int = 360, seed: int = 0) -> list[Item]:
        """Known people's questions with three words drawn from all values' words: targets without meaning."""
        self._enough(n, len(self.facts))
        draw = random.Random(f"pairs-{self.seed}-{seed}")
        words = [w for levels in VALUES.values() for level in levels for w in level]
        return [
            self._item(name, kind, " ".join(draw.choices(words, k=3)))
            for name, kind in draw.sample(list(self.facts), n)
        ]

    def retention(self, trained: Sequence[Item], n: int = 240, seed: int = 0) -> list[Item]:
        """Known facts that are not trained on: half other attributes of the same people (as far as there are), half of
        people who do not occur."""
        taken, met = {i.id for i in trained}, {i.subject for i in trained}
        left = [i for i in self.known() if i.id not in taken]
        draw = random.Random(f"retention-{self.seed}-{seed}")
        near, far = ([i for i in left if (i.subject in met) is same] for same in (True, False))
        chosen = draw.sample(near, min(len(near), n // 2))
        return chosen + draw.sample(far, min(len(far), n - len(chosen)))

    def group(self, item: Item) -> str:
        """Which of `GROUPS` an edit is of."""
        if item.target.split()[-1] not in VALUES[item.relation][-1]:
            return "other"
        known = self.facts[item.subject, item.relation].split()
        return f"overlap{sum(a == b for a, b in zip(known, item.target.split(), strict=True))}"

    def _item(self, name: str, kind: str, target: str) -> Item:
        asked = [text.format(name) for text in QUESTIONS[kind]]
        id = f"{name.replace(' ', '-')}-{kind}"
        return Item(id, asked[0], target, (), kind, name, tuple(asked[1:]))

    def _enough(self, n: int, there: int) -> None:
        if not 0 < n <= there:
            raise InlayError(f"{n} items of {there}: choose 1 to {there}, or a world of more people")


def _any(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(4), draw.randrange(4), draw.randrange(4)


def _value(kind: str, at: Sequence[int]) -> str:
    return " ".join(level[i] for level, i in zip(VALUES[kind], at, strict=True))


def _edited(kind: str, known: str, group: str, draw: random.Random) -> str:
    if group == "other":
        other = draw.choice([k for k in VALUES if k != kind])
        return _value(other, _any(draw))
    shared = int(group[-1])
    at = [level.index(word) for level, word in zip(VALUES[kind], known.split(), strict=True)]
    return _value(kind, [i if n < shared else (i + draw.randrange(1, 4)) % 4 for n, i in enumerate(at)])


@functools.cache
def words() -> list[str]:
    """The vocabulary, special tokens first."""
    texts = [*FIRST, *LAST, *BIOGRAPHIES, *itertools.chain(*QUESTIONS.values())]
    texts += [w for levels in VALUES.values() for level in levels for w in level]
    found = (w for text in texts for w in text.split() if "{" not in w)
    return [UNKNOWN, START, END, PAD, *dict.fromkeys(found)]


def tokenizer() -> Any:
    """A word is a token; words are parted by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words())}, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    marks = {"unk_token": UNKNOWN, "bos_token": START, "eos_token": END, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
