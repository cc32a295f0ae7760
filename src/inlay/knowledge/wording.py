"""From items to tokens and from generated text to answers: the same way wherever knowledge is measured or taught."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import InlayError
from inlay.evaluate.batches import prompt_ids
from inlay.knowledge.items import Item
from inlay.tasks.extract import normalise
from inlay.tasks.protocols import IGNORED, Example, encode_answer


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How an item is put to a model."""

    template: str = "{prompt}"
    """The text before the answer; `{prompt}` is the item's."""
    lead: str | None = None
    """What stands between prompt and answer. By default a blank, or nothing where the tokenizer puts one itself."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end an answer."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InlayError(f"the template {self.template!r} must contain {{prompt}}")

    def ask(self, prompt: str) -> str:
        """The text a model is given."""
        return self.template.replace("{prompt}", prompt)

    def prompts(self, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, with the tokenizer's own start token."""
        return prompt_ids(tokenizer, [self.ask(p) for p in prompts])

    def answers(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each answer as it stands behind a prompt; none for an empty one."""
        lead = leading(tokenizer) if self.lead is None else self.lead
        return [encode_answer(lead + t, tokenizer) if t else [] for t in texts]


def leading(tokenizer: Any) -> str:
    """A blank, or nothing for tokenizers that mark the beginning of a word themselves (SentencePiece's)."""
    ids = encode_answer("a", tokenizer)
    first = tokenizer.convert_ids_to_tokens(ids[:1])
    return "" if first and first[0].startswith("\u2581") else " "


def answer_of(text: str) -> str:
    """The answer in a generated text: its first line that is not empty, without quotes and closing punctuation.

    The last period stays where the last word has others ("the U.S.").
    """
    line = next((s.strip() for s in text.split("\n") if s.strip()), "")
    line = line.strip("\"'\u201c\u201d` ")
    words = line.split()
    if not words or re.fullmatch(r"(\w+\.){2,}", words[-1]):
        return line
    return line.rstrip(".,;:!? ").rstrip("\"'\u201c\u201d` ")


def exact(answer: str, item: Item) -> bool:
    """Exact match with the target or an alias, up to case, punctuation, articles and spacing (as in SQuAD)."""
    return any(alike(answer, right) for right in item.answers)


def alike(a: str, b: str) -> bool:
    """Whether two answers are the same by that measure; texts of nothing else are compared as they are."""
    x, y = normalise(a), normalise(b)
    return x == y if x or y else a.strip() == b.strip()


def examples(items: Sequence[Item], tokenizer: Any, wording: Wording | None = None) -> list[Example]:
    """Training rows: prompt, target, end token; the last two are learned. Row n is item n.

    Prompt and answer are tokenised apart, so that training and generation meet the same tokens.
    """
    wording = wording or Wording()
    if tokenizer.eos_token_id is None:
        raise InlayError("the tokenizer has no end-of-sequence token; set `tokenizer.eos_token`")
    heads = wording.prompts(tokenizer, [i.prompt for i in items])
    tails = wording.answers(tokenizer, [i.target for i in items])
    made = []
    for head, tail in zip(heads, tails, strict=True):
        learned = [*tail, tokenizer.eos_token_id]
        made.append(Example(head + learned, [IGNORED] * len(head) + learned, False))
    return made
