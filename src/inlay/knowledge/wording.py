"""From items to tokens and from generated text to answers: the same way wherever knowledge is measured or taught."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.evaluate.batches import prompt_ids
from inlay.evaluate.rows import end_ids
from inlay.knowledge.items import Item
from inlay.tasks.chat_template import ChatTemplate, own_template
from inlay.tasks.extract import normalise
from inlay.tasks.protocols import IGNORED, Example, encode_answer
from inlay.tasks.task import Record
from inlay.tasks.template_choice import AnyTemplate, check, choose
from inlay.tasks.templates import NONE, Messages, Template


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How an item is put to a model."""

    template: str = "{prompt}"
    """The text before the answer; `{prompt}` is the item's."""
    lead: str | None = None
    """What stands between prompt and answer. By default a blank, or nothing where the tokenizer puts one itself."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end an answer."""
    chat: str | None = None
    """A Jinja chat template in which that text is the user's message; the answer follows its generation prompt, by
    default without a blank."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InlayError(f"the template {self.template!r} must contain {{prompt}}")

    def ask(self, prompt: str) -> str:
        """The text a model is given."""
        return self.template.replace("{prompt}", prompt)

    def prompts(self, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, with the tokenizer's own start token or as the chat template writes it."""
        texts = [self.ask(p) for p in prompts]
        if (chat := self._chat()) is not None:
            return [chat.prompt_ids(Record(text), tokenizer) for text in texts]
        return prompt_ids(tokenizer, texts)

    def dialogues(self, tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
        """Ids of each conversation, up to its next answer; where there is a chat template."""
        chat = self._chat()
        if chat is None:
            raise InlayError("this wording has no chat template, so questions and answers are not messages")
        return [chat.conversation_ids(messages, tokenizer, today=False) for messages in dialogues]

    def answers(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each answer as it stands behind a prompt; none for an empty one."""
        if (chat := self._chat()) is not None:
            return [chat.option_ids((self.lead or "") + t, tokenizer) if t else [] for t in texts]
        lead = leading(tokenizer) if self.lead is None else self.lead
        return [encode_answer(lead + t, tokenizer) if t else [] for t in texts]

    def learned(self, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Ids that are learned behind each prompt: the answer, and the token that ends it."""
        if (chat := self._chat()) is not None:
            records = [Record(self.ask(p), output=(self.lead or "") + t) for p, t in zip(prompts, texts, strict=True)]
            return [chat.answer_ids(record, tokenizer) for record in records]
        return [[*ids, tokenizer.eos_token_id] for ids in self.answers(tokenizer, texts)]

    def stops(self, host: Host, tokenizer: Any) -> tuple[str, ...]:
        """Texts and special tokens that end an answer, besides those that end every text of this base."""
        chat = self._chat()
        end = None if chat is None else chat.end_of_turn(tokenizer)
        return self.stop if end is None or end[1] in end_ids(host, tokenizer) else (*self.stop, end[0])

    def as_template(self) -> AnyTemplate:
        """The template by which an adapter that learned items in this wording is to be asked."""
        if (chat := self._chat()) is not None:
            return chat
        if self.template == NONE.bare.replace("{instruction}", "{prompt}"):
            return NONE
        bare = self.template.replace("{prompt}", "{instruction}")
        return Template("items", bare, bare.replace("{instruction}", "{instruction}\n\n{input}"))

    def _chat(self) -> ChatTemplate | None:
        return None if self.chat is None else ChatTemplate("chat", self.chat)


def check_wording(asked: str | None) -> None:
    """Raise InlayError for what `wording_for` cannot read. Loads nothing."""
    if asked is not None and "{prompt}" not in asked:
        check(asked)


def wording_for(asked: str | None, tokenizer: Any, lead: str | None = None) -> Wording:
    """How items are put to a base.

    Args:
        asked: a template as `inlay.tasks.template_choice` names them, or a text with `{prompt}`. None: the tokenizer's
            own chat template if it has one, otherwise the item's prompt as it is.
        lead: between prompt and answer (see `Wording`).
    """
    if asked is not None and "{prompt}" in asked:
        return Wording(template=asked.replace("\\n", "\n"), lead=lead)
    template = choose(asked, tokenizer) if asked not in (None, "auto") else own_template(tokenizer) or NONE
    if isinstance(template, ChatTemplate):
        return Wording(lead=lead, chat=template.source)
    text = template.bare.replace("{instruction}", "{prompt}")
    return Wording(template=text, lead="" if lead is None and text[-1:].isspace() else lead)


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
    prompts = [i.prompt for i in items]
    heads = wording.prompts(tokenizer, prompts)
    made = []
    for head, learned in zip(heads, wording.learned(tokenizer, prompts, [i.target for i in items]), strict=True):
        made.append(Example(head + learned, [IGNORED] * len(head) + learned, False))
    return made
