"""Chat templates: the Jinja program that a tokenizer brings along, or a file, and what training needs to know of it.

A record is a conversation of one user message, the instruction, and one answer. Prompts are rendered with
`add_generation_prompt=True`; what is learned behind them is the rest of the whole conversation as the template writes
it, up to the special token that ends the assistant's turn. So the prompt of an evaluation is an exact prefix of the
training row, token by token, which is checked for each record. Rendered text has its start token from the template
alone, as in `apply_chat_template(tokenize=True)` of transformers.
"""

from __future__ import annotations

import functools
import re
import weakref
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from inlay.core.errors import InlayError
from inlay.tasks.task import Record
from inlay.tasks.templates import Messages

DATE = datetime(2024, 7, 26)
"""What templates that write today's date (Llama 3.1 on) are given for records: a run must not change overnight. It is
the date that Llama 3's template falls back to. Conversations have the real one."""
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
_QUESTION, _ANSWER = "How many ducks swim", "Eleven ducks"
"""A user's and an assistant's message that no template holds by itself."""


@dataclass(frozen=True)
class Turn:
    """What a template writes around an assistant's answer."""

    opening: str
    """From the user's message to the place where generation begins."""
    lead: str
    """From there to the answer (an empty block of thoughts, a blank); learned with the answer."""
    close: str
    """Behind the answer, to the end of the conversation."""
    end: str
    """The part of `close` that is learned: up to the special token that ends the turn; empty if there is none."""
    end_token: tuple[str, int] | None
    """(text, id) of that token; None: the tokenizer's EOS is learned behind the answer."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that renders `messages`."""

    name: str
    """`chat` for a tokenizer's own, or the name of its file."""
    source: str
    """The Jinja program."""

    @property
    def text(self) -> str:
        """All of it, for digests."""
        return self.source

    def prompt_ids(self, record: Record, tokenizer: Any) -> list[int]:
        """Ids of a record's prompt, up to the place where the answer is generated."""
        return _ids(self._asked(record, tokenizer), tokenizer)

    def conversation_ids(self, messages: Messages, tokenizer: Any, *, today: bool = True) -> list[int]:
        """Ids of the prompt for an answer to `messages`.

        Args:
            today: write today's date, if the template asks for one; otherwise that of records.

        Raises:
            InlayError: the template refuses them (a system message, two user messages in a row ...).
        """
        return _ids(self.render(messages, tokenizer, today=today), tokenizer)

    def answer_ids(self, record: Record, tokenizer: Any) -> list[int]:
        """Ids that are learned behind `prompt_ids`: the answer as the template writes it, and the end of the turn.

        Raises:
            InlayError: what the template writes of the whole conversation does not begin with the prompt, or does not
                end as it ends behind other answers.
        """
        turn, asked = self.turn(tokenizer), self._asked(record, tokenizer)
        whole = self.render([*_user(record), _assistant(record.output)], tokenizer, generate=False)
        if not whole.startswith(asked) or not whole.endswith(turn.close) or len(whole) < len(asked) + len(turn.close):
            raise InlayError(
                f"the chat template {self.name!r} writes the conversation of the record {record.instruction[:60]!r} in "
                "another form than its prompt, so what is learned would not be what is asked; change the record, or "
                "choose another template"
            )
        answer = whole[len(asked) : len(whole) - len(turn.close)]
        ids = _behind(turn.opening, answer + turn.end, tokenizer)
        return ids if turn.end_token else [*ids, tokenizer.eos_token_id]

    def option_ids(self, text: str, tokenizer: Any) -> list[int]:
        """Ids of an answer behind `prompt_ids`, without the end of the turn."""
        turn = self.turn(tokenizer)
        return _behind(turn.opening, turn.lead + text, tokenizer)

    def end_of_turn(self, tokenizer: Any) -> tuple[str, int] | None:
        """(text, id) of the special token that ends an answer; None: the tokenizer's EOS does, or it is not known."""
        try:
            return self.turn(tokenizer).end_token
        except InlayError:  # a template that one may ask by, but not train on
            return None

    def render(self, messages: Messages, tokenizer: Any, *, generate: bool = True, today: bool = False) -> str:
        """The text of a conversation; with `generate`, up to the place where the assistant begins to answer."""
        source = self.source if today else self._undated
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                plain, chat_template=source, add_generation_prompt=generate, tokenize=False
            )
        except ImportError as e:
            raise InlayError(f"chat templates need jinja2: pip install jinja2 ({e})") from e
        except Exception as e:  # templates raise errors of their own
            roles = ", ".join(m["role"] for m in plain) or "no messages"
            why = str(e).strip() or type(e).__name__
            raise InlayError(f"the chat template {self.name!r} refuses a conversation of {roles}: {why}") from e
        return text

    @functools.cached_property
    def _undated(self) -> str:
        """The program with `DATE` for today's. (Functions cannot be handed to it: `apply_chat_template` takes data.)"""
        fixed = _TODAY.sub(lambda call: repr(DATE.strftime(call["format"])), self.source)
        if "strftime_now(" in fixed:
            raise InlayError(
                f"the chat template {self.name!r} writes the time in a form that it computes, so prompts would change "
                "from day to day; write the form as a text, or choose another template"
            )
        return fixed

    def turn(self, tokenizer: Any) -> Turn:
        """What the template writes around an answer, found by rendering a conversation; kept per tokenizer.

        Raises:
            InlayError: the template leaves out a message, or its prompt is not the beginning of the whole conversation.
        """
        known = _TURNS.setdefault(tokenizer, {})
        if self not in known:
            known[self] = self._turn(tokenizer)
        return known[self]

    def _turn(self, tokenizer: Any) -> Turn:
        record = Record(_QUESTION)
        asked = self._asked(record, tokenizer)
        whole = self.render([*_user(record), _assistant(_ANSWER)], tokenizer, generate=False)
        if _QUESTION not in asked:
            raise InlayError(f"the chat template {self.name!r} leaves out what the user says; choose another template")
        lead, found, close = whole[len(asked) :].partition(_ANSWER)
        if not found or not whole.startswith(asked):
            raise InlayError(
                f"the chat template {self.name!r} cannot be trained on: its prompt for an answer, which ends in "
                f"{asked[-40:]!r}, is not how it writes the beginning of a conversation that has the answer, so "
                "prompts of evaluation would differ from those of training; choose another template, such as alpaca"
            )
        end, token = _end(close, tokenizer)
        opening = asked.rpartition(_QUESTION)[2]
        if token and _behind(opening, lead + _ANSWER + end, tokenizer)[-1] != token[1]:
            raise InlayError(
                f"the tokenizer does not read {token[0]!r}, which ends an answer in the chat template {self.name!r}, "
                "as one token; choose another template"
            )
        return Turn(opening, lead, close, end, token)

    def _asked(self, record: Record, tokenizer: Any) -> str:
        return self.render(_user(record), tokenizer)


_TURNS: weakref.WeakKeyDictionary[Any, dict[ChatTemplate, Turn]] = weakref.WeakKeyDictionary()


def own_template(tokenizer: Any) -> ChatTemplate | None:
    """The chat template that a tokenizer brings along; None if it has none.

    Raises:
        InlayError: it has several by name and none for ordinary conversations.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatTemplate("chat", tokenizer.get_chat_template())
    except ValueError as e:
        raise InlayError(f"this tokenizer has several chat templates and no default one: {e}") from e


def _user(record: Record) -> list[dict[str, str]]:
    """The instruction, and its input behind a blank line."""
    content = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    return [{"role": "user", "content": content}]


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _behind(opening: str, text: str, tokenizer: Any) -> list[int]:
    """Ids of `text` as it stands behind `opening`; encoded by itself where the tokenizer would join the two.

    Encoded by themselves, texts begin with a blank in SentencePiece's tokenizers.
    """
    before, both = _ids(opening, tokenizer), _ids(opening + text, tokenizer)
    return both[len(before) :] if both[: len(before)] == before else _ids(text, tokenizer)


def _end(close: str, tokenizer: Any) -> tuple[str, tuple[str, int] | None]:
    """(`close` up to its first special token, that token); ("", None) where it has none."""
    places = [(at, -len(text), text) for text in _specials(tokenizer) if (at := close.find(text)) >= 0]
    if not places:
        return "", None
    at, _, text = min(places)
    return close[: at + len(text)], (text, _specials(tokenizer)[text])


def _specials(tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens by their text."""
    added = {str(t): i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: i for text, i in (added | named).items() if text}
