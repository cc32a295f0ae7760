"""Two named protocols, `published` and `clean`: template, loss, truncation, decoding and extraction, never mixed.

Published follows LLM-Adapters to the letter, so that its numbers can be compared; its templates are fixed, whatever the
tokenizer brings along. Clean uses one template for everything (by default the tokenizer's own chat template if it has
one, see `inlay.tasks.template_choice`), learns the answer only, and never loses an answer's end. Which protocol and
template made a number is always written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from inlay.core.errors import InlayError, unknown
from inlay.tasks import extract
from inlay.tasks.extract import Extractor
from inlay.tasks.task import Kind, Record
from inlay.tasks.template_choice import AnyTemplate, choose
from inlay.tasks.templates import ALPACA, PUBLISHED_EVAL, PUBLISHED_TRAIN, Template

IGNORED = -100
"""Label of a token that is not learned (PyTorch's `ignore_index`)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How records become tokens, and generations become predictions."""

    name: str
    """`published` or `clean`: written into every result."""
    train: Template
    """Template of training rows where none is given."""
    eval: Template
    """Template of evaluation prompts where none is given."""
    fixed: bool
    """Whether no other template may be given."""
    loss_on: Literal["all", "answer"]
    """Tokens that are learned: prompt and answer, or the answer and its EOS."""
    beams: int
    """Beams of generation; 1 is greedy."""
    truncation: Literal["right", "prompt"]
    """What a row over the cutoff loses: its right end, answer and EOS included, or the middle of its prompt."""
    response: Callable[[str], str] = field(repr=False)
    """Text to the model's own response."""
    rules: Mapping[Kind, Extractor] = field(repr=False)
    """Extraction rule per kind of answer."""

    def extract(self, text: str, kind: Kind, answers: Sequence[str] = ()) -> str | None:
        """The prediction in a model's text; None for no answer. InlayError where there is no rule for `kind`."""
        if kind not in self.rules:
            raise InlayError(f"protocol {self.name!r} has no extraction rule for {kind!r} answers; use 'clean'")
        return self.rules[kind](self.response(text), answers)

    def template(self, asked: str | AnyTemplate | None, tokenizer: Any) -> AnyTemplate | None:
        """The template of prompts under this protocol: the one asked for, or the tokenizer's default.

        Returns None where the protocol fixes its templates, which `encode` and `encode_prompt` then take.
        """
        self.check_template(asked)
        return None if self.fixed else choose(asked, tokenizer)

    def check_template(self, asked: str | AnyTemplate | None) -> None:
        """Raise InlayError for a template that this protocol does not let one choose."""
        if self.fixed and asked not in (None, "auto", self.name):
            raise InlayError(
                f"protocol {self.name!r} fixes its templates; leave template {asked!r} out, or use protocol 'clean'"
            )


PUBLISHED = Protocol(
    name="published",
    train=PUBLISHED_TRAIN,
    eval=PUBLISHED_EVAL,
    fixed=True,
    loss_on="all",
    beams=4,
    truncation="right",
    response=extract.published_response,
    rules=extract.PUBLISHED,
)
CLEAN = Protocol(
    name="clean",
    train=ALPACA,
    eval=ALPACA,
    fixed=False,
    loss_on="answer",
    beams=1,
    truncation="prompt",
    response=extract.clean_response,
    rules=extract.CLEAN,
)
PROTOCOLS = {p.name: p for p in (PUBLISHED, CLEAN)}


def get(name: str | Protocol) -> Protocol:
    """The protocol of this name; a Protocol is returned as it is. InlayError, listing them, where there is none."""
    if isinstance(name, Protocol):
        return name
    if name.lower() not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name.lower()]


@dataclass(frozen=True)
class Example:
    """One row of tokens."""

    input_ids: list[int]
    """Token ids, without padding."""
    labels: list[int]
    """As `input_ids`, with -100 where nothing is learned."""
    truncated: bool
    """Whether tokens were cut to fit the cutoff."""


def encode(
    record: Record, tokenizer: Any, protocol: Protocol, cutoff: int, template: AnyTemplate | None = None
) -> Example:
    """A training row of at most `cutoff` tokens.

    published: the whole text at once, cut on the right; EOS follows if there is room and it does not end in one
    already; every token is learned. clean: the prompt, and the answer with its end (EOS, or what ends a turn in the
    chat template), are encoded apart, so that generation meets the very same tokens; only the latter are learned; a
    prompt too long loses its middle, from a quarter on.

    Args:
        template: of a protocol that does not fix its own; `protocol.train` by default.

    Raises InlayError for a tokenizer without EOS and, in clean, for an empty answer, one that fills the cutoff alone,
    or a chat template whose prompts are not what its conversations begin with.
    """
    _check(tokenizer, cutoff)
    protocol.check_template(template)
    everything = protocol.loss_on == "all"
    if protocol.truncation == "right":
        prompt, answer = protocol.train.render(record)
        ids, cut = _cut_right(tokenizer, prompt + answer, cutoff)
        if len(ids) < cutoff and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        masked = 0 if everything else len(_cut_right(tokenizer, prompt, cutoff)[0])
        return Example(ids, _labels(ids, masked), cut)
    if not record.output.strip():
        raise InlayError(f"nothing to learn: the output of the record {record.instruction[:60]!r} is empty")
    template = template or protocol.train
    tail = template.answer_ids(record, tokenizer)
    if len(tail) >= cutoff:
        raise InlayError(
            f"the answer alone has {len(tail)} tokens with its EOS, the cutoff is {cutoff}: raise the cutoff or drop "
            f"the record {record.instruction[:60]!r}"
        )
    head, cut = _cut_middle(template.prompt_ids(record, tokenizer), cutoff - len(tail))
    return Example(head + tail, _labels(head + tail, 0 if everything else len(head)), cut)


def encode_prompt(
    record: Record,
    tokenizer: Any,
    protocol: Protocol,
    cutoff: int | None = None,
    template: AnyTemplate | None = None,
) -> Example:
    """An evaluation prompt; all its labels are -100.

    published: never cut (as `evaluate.py`), so one longer than `cutoff` is an InlayError. clean: loses its middle
    beyond `cutoff`.

    Args:
        template: of a protocol that does not fix its own; `protocol.eval` by default.
    """
    _check(tokenizer, cutoff)
    protocol.check_template(template)
    if protocol.truncation == "right":
        ids, cut = list(tokenizer(protocol.eval.prompt(record))["input_ids"]), False
        if cutoff is not None and len(ids) > cutoff:
            raise InlayError(
                f"prompt of {len(ids)} tokens over the cutoff {cutoff}; the published protocol never cuts a prompt"
            )
    else:
        ids = (template or protocol.eval).prompt_ids(record, tokenizer)
        ids, cut = (ids, False) if cutoff is None else _cut_middle(ids, cutoff)
    return Example(ids, [IGNORED] * len(ids), cut)


def encode_answer(text: str, tokenizer: Any) -> list[int]:
    """Ids of an answer as `encode` (clean) places them behind a prompt: no special tokens. For scoring options, too."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(
    records: Iterable[Record], tokenizer: Any, protocol: Protocol, cutoff: int, template: AnyTemplate | None = None
) -> tuple[list[Example], int]:
    """Every record encoded, and how many rows were truncated."""
    examples = [encode(r, tokenizer, protocol, cutoff, template) for r in records]
    return examples, sum(e.truncated for e in examples)


def _labels(ids: list[int], prompt: int) -> list[int]:
    return [IGNORED] * min(prompt, len(ids)) + ids[prompt:]


def _check(tokenizer: Any, cutoff: int | None) -> None:
    if tokenizer.eos_token_id is None:
        raise InlayError("the tokenizer has no end-of-sequence token; set `tokenizer.eos_token`")
    if cutoff is not None and cutoff < 1:
        raise InlayError(f"cutoff {cutoff}: at least 1 token is needed")


def _cut_right(tokenizer: Any, text: str, cutoff: int) -> tuple[list[int], bool]:
    side = getattr(tokenizer, "truncation_side", "right")
    tokenizer.truncation_side = "right"
    try:
        ids = list(tokenizer(text, truncation=True, max_length=cutoff)["input_ids"])
    finally:
        tokenizer.truncation_side = side
    return ids, len(ids) == cutoff and len(tokenizer(text, verbose=False)["input_ids"]) > cutoff


def _cut_middle(ids: list[int], room: int) -> tuple[list[int], bool]:
    """At most `room` ids: a quarter of them from the front (start token, heading), the rest from the end."""
    if len(ids) <= room:
        return ids, False
    front = room // 4
    return ids[:front] + ids[len(ids) - (room - front) :], True
