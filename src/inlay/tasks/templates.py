"""Prompt templates written as text: LLM-Adapters' three published strings, and Inlay's own for every use.

Published: LLM-Adapters' `finetune.py`, `evaluate.py` and `generate.py`. Training, evaluation and demo differ in
trailing blanks, and the first two indent every line by 16 blanks (of a multi-line instruction, the first line only).
All blanks below are meant. Templates that a tokenizer brings along are in `inlay.tasks.chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import InlayError
from inlay.tasks.task import Record

Messages = Sequence[Mapping[str, str]]
"""A conversation: each message has a `role` (system, user, assistant) and a `content`."""
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PAIR = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_PAD = " " * 16
RESPONSE = "### Response:"
"""What every template writes before the answer."""


@dataclass(frozen=True)
class Template:
    """Text before the answer, with and without an input; the answer and the tokenizer's EOS follow it directly."""

    name: str
    """What commands, manifests and errors call it."""
    bare: str
    """Prompt of a record without input; holds `{instruction}`."""
    paired: str
    """Prompt of a record with input; holds `{instruction}` and `{input}`."""
    separator: str = "\n\n"
    """Between the messages of a conversation, which together are the instruction."""

    @property
    def text(self) -> str:
        """All of it, for digests."""
        return f"{self.bare}\0{self.paired}"

    def prompt(self, record: Record) -> str:
        """The text that is given to the model. Braces inside the record stay as they are."""
        if record.input:
            before, _, rest = self.paired.partition("{instruction}")
            middle, _, after = rest.partition("{input}")
            return before + record.instruction + middle + record.input + after
        before, _, after = self.bare.partition("{instruction}")
        return before + record.instruction + after

    def render(self, record: Record) -> tuple[str, str]:
        """(prompt, answer): the text given, and the text learned (`record.output`)."""
        return self.prompt(record), record.output

    def prompt_ids(self, record: Record, tokenizer: Any) -> list[int]:
        """Ids of a prompt, with the tokenizer's own start token."""
        return text_ids(self.prompt(record), tokenizer)

    def conversation_ids(self, messages: Messages, tokenizer: Any) -> list[int]:
        """Ids of the prompt for an answer to `messages`; the start token alone where they are empty."""
        instruction = self.separator.join(m["content"] for m in messages)
        ids = text_ids(self.prompt(Record(instruction)), tokenizer)
        return ids or [start_id(tokenizer)]

    def answer_ids(self, record: Record, tokenizer: Any) -> list[int]:
        """Ids that are learned behind `prompt_ids`: the answer and the end token."""
        return [*self.option_ids(record.output, tokenizer), tokenizer.eos_token_id]

    def option_ids(self, text: str, tokenizer: Any) -> list[int]:
        """Ids of an answer behind `prompt_ids`, without an end token."""
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def end_of_turn(self, tokenizer: Any) -> tuple[str, int] | None:
        """(text, id) of the special token that ends an answer; None: the tokenizer's EOS does."""
        return None


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text with the tokenizer's start token, once; an EOS that some tokenizers append is taken off again."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text writes the token itself
        ids = ids[1:]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def start_id(tokenizer: Any) -> int:
    """The token that stands in for an empty prompt. Raises InlayError where the tokenizer has none."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InlayError("the prompt is empty, and the tokenizer has no start token to take its place")
    return int(start)


PUBLISHED_TRAIN = Template(
    "published-train",
    f"{_TASK}  \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n{_PAD}{RESPONSE}\n{_PAD}",
    f"{_PAIR} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n"
    f"{_PAD}### Input:\n{_PAD}{{input}}\n{_PAD}\n{_PAD}{RESPONSE}\n{_PAD}",
)
PUBLISHED_EVAL = Template(
    "published-eval",
    f"{_TASK} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n{_PAD}{RESPONSE}\n{_PAD}",
    f"{_PAIR}\n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n"
    f"{_PAD}### Input:\n{_PAD}{{input}}\n\n{_PAD}{RESPONSE}\n{_PAD}",
)
PUBLISHED_DEMO = Template(
    "published-demo",
    f"{_TASK}  \n\n### Instruction:\n{{instruction}}\n\n{RESPONSE}\n",
    f"{_PAIR} \n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{RESPONSE}\n",
)
ALPACA = Template(
    "alpaca",
    f"### Instruction:\n{{instruction}}\n\n{RESPONSE}\n",
    f"### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{RESPONSE}\n",
)
"""Ours: Alpaca's headings without its preamble, the same in training, evaluation and serving, no blank that could
change the answer's first token."""
NONE = Template("none", "{instruction}", "{instruction}\n\n{input}", separator="\n")
"""The text as it is."""
