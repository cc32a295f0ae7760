"""Between texts and tokens: prompts in, words out while they are made."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from inlay.core.errors import InlayError
from inlay.evaluate.batches import prompt_ids
from inlay.evaluate.rows import Scored, said
from inlay.serve.errors import Refused
from inlay.serve.wire import Message, Said
from inlay.tasks.template_choice import AnyTemplate, choose

TORN = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Texts:
    """A tokenizer of its own, for one thread.

    Args:
        template: how a conversation becomes a prompt where an adapter's own template does not say; a name or a file
            (see `inlay.tasks.template_choice`). None: the tokenizer's chat template, or alpaca if it has none.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, template: str | AnyTemplate | None = None):
        self.tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers are not to be changed while another thread reads
        self.vocabulary = vocabulary
        self.asked, self.template = template, choose(template, tokenizer)
        self.piece = functools.lru_cache(maxsize=vocabulary)(self._piece)
        self._before = self._plain_ids("a")[-1:]

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's ids."""
        if not isinstance(prompt, str) and not all(0 <= i < self.vocabulary for i in prompt):
            raise Refused(f"token ids are 0 to {self.vocabulary - 1}", 400, "invalid_token", "prompt")
        try:
            return prompt_ids(self.tokenizer, [prompt])[0]
        except InlayError as e:
            raise Refused(str(e), 400, "invalid_prompt", "prompt") from e

    def chat_ids(self, messages: Sequence[Message], template: AnyTemplate | None = None) -> list[int]:
        """A conversation's ids in a template, the default one if not given.

        Raises:
            Refused: the template does not take these messages.
        """
        turns = [{"role": m.role, "content": m.text} for m in messages]
        try:
            return (template or self.template).conversation_ids(turns, self.tokenizer)
        except InlayError as e:
            raise Refused(str(e), 400, "invalid_messages", "messages") from e

    def ends(self, template: AnyTemplate) -> tuple[int, ...]:
        """Ids of special tokens that end a turn in a template, besides those that end every text."""
        end = template.end_of_turn(self.tokenizer)
        return () if end is None else (end[1],)

    def scored(self, token: int, scored: Scored) -> Said:
        """A token and its rivals as answers show them."""
        likeliest = [(self.piece(i), p) for i, p in scored.likeliest]
        return Said(token=self.piece(token), logp=scored.logp, likeliest=likeliest)

    def _piece(self, token: int) -> str:
        """A token's text as it stands after another: alone, some decoders drop its space."""
        before, both = (self.tokenizer.decode([*self._before, *more]) for more in ([], [token]))
        return both[len(before) :]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Spoken:
    """A text while it is made: what is given out never has to be taken back, and all of it together is the result."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._from = self._to = 0
        self._text, self._sent = "", 0

    def add(self, token: int) -> str:
        """What is certain after one more token: neither torn characters nor what may begin a stop text."""
        self._tokens.append(token)
        before = said(self._tokenizer, self._tokens[self._from : self._to])
        now = said(self._tokenizer, self._tokens[self._from :])
        if now.endswith(TORN) or len(now) <= len(before):
            return ""
        self._text += now[len(before) :]
        self._from, self._to = self._to, len(self._tokens)
        return self._give(len(self._text) - self._held())

    def end(self, text: str) -> str:
        """What is left when the result is known."""
        self._text = text
        return self._give(len(text))

    def _give(self, end: int) -> str:
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        most = max((min(len(s) - 1, len(self._text)) for s in self._stop), default=0)
        return next((n for n in range(most, 0, -1) if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)
