"""From what a model said to its answer: the published rules, faults included, and strict clean ones.

Published (LLM-Adapters' `evaluate.py` and `commonsense_evaluate.py`): last number, first capital A-E anywhere, first
occurrence of an option. Clean: a stated answer first; then only what is unambiguous; otherwise no answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from inlay.tasks.numerals import numbers
from inlay.tasks.task import Kind
from inlay.tasks.templates import RESPONSE

Extractor = Callable[[str, Sequence[str]], str | None]
"""(response, answers of the task) to the prediction as text, or None for no answer."""

_PROMPT = ("### Instruction:", "Below is an instruction", "<s>", "<|begin_of_text|>")
"""How a logged text begins that holds the prompt before the generation."""


def generation(text: str) -> str:
    """Return the generation alone: a leading prompt, up to its `### Response:`, is dropped."""
    prompted = text.lstrip().startswith(_PROMPT) and RESPONSE in text
    return text.split(RESPONSE, 1)[1] if prompted else text


# --------------------------------------------------------------------------------------------- published


def published_response(text: str) -> str:
    """Return the generation up to a `### Response:` of its own.

    The authors' scripts split prompt and generation at the marker and take the second piece. That is the same,
    whether the text holds the prompt or not.
    """
    return generation(text).split(RESPONSE)[0].strip()


def published_number(text: str, answers: Sequence[str] = ()) -> str | None:
    """The last match of `-?\\d+\\.?\\d*` once all commas are gone. So `5-3` says -3, `1/2` says 2, `3.` says 3."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return str(float(found[-1])) if found else None


def published_letter(text: str, answers: Sequence[str] = "ABCDE") -> str | None:
    """The first capital A-E anywhere, even inside a word: `Divide` says D."""
    return published_choice(text, "ABCDE")


def published_choice(text: str, answers: Sequence[str]) -> str | None:
    """The first answer that occurs, as a case-sensitive substring: `untrue` says true, `answer12` says answer1.

    All of answer1 to answer5 are looked for even where a task has fewer, as the published pattern does.
    """
    words = [f"answer{i}" for i in range(1, 6)] if "answer1" in answers else list(answers)
    found = re.search("|".join(map(re.escape, words)), text)
    return found[0] if found else None


# --------------------------------------------------------------------------------------------- clean

_ENDS = re.compile(r"</s>|<\|(?:endoftext|eot_id|im_end|end_of_text|end|eom_id)\|>|<(?:eos|end_of_turn)>")
_MARKS = re.compile(r"<s>|<pad>|<unk>|<bos>|<\|begin_of_text\|>")
_NEXT = re.compile(r"\n\s*###\s|\n\s*(?:Question|Instruction|Q)\s*:|Below is an instruction that describes")
_STATES = re.compile(
    r"\b(?:answers?|solution)\b(?!\s*(?:format|choices))(?:(?!\b(?:is|are|was|equals)\b)[^.\n:=#]){0,40}?"
    r"(?:\s(?:is|are|was|equals|would be|should be|must be)\b:?|\s*[:=])\s*"
    r"|\b(?:correct|right|best)\s+(?:option|choice|one)\b(?:\s+is\b:?|\s*:)\s*"
    r"|####\s*",
    re.IGNORECASE,
)
_STOP = re.compile(r"[.!?;](?=\s|$|[\"'*)])|\n")
_ITEM = re.compile(r"\s*(?:Step\s+)?\d+[.):]\s+(?=\S)", re.IGNORECASE)
_ITEMS = re.compile(r"^\s*(?:Step\s+)?\d+[.):]\s+(?=[A-Za-z])", re.IGNORECASE | re.MULTILINE)
_NOT = re.compile(r"\b(?:not|rather than|instead of)\b[^,.;]*", re.IGNORECASE)


def clean_response(text: str) -> str:
    """The model's own turn: a leading prompt is dropped, and all from an end token or an invented next turn on."""
    text = _MARKS.sub("", _ENDS.split(generation(text), maxsplit=1)[0]).strip()
    return _NEXT.split(text, maxsplit=1)[0].strip()


def _boxed(text: str) -> list[tuple[int, str]]:
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        found.append((match.start(), text[match.end() : at - 1 if not depth else at]))
    return found


def statements(text: str) -> list[str]:
    """What the text states as its answer, in order: behind `the answer is`, `Answer:`, `####`, and inside `\\boxed{}`.

    A statement reaches to the end of its sentence or line. `not ...`, `rather than ...` are left out of it, and a
    numbered list below `answer:` is no statement.
    """
    found = _boxed(text)
    for match in _STATES.finditer(text):
        rest = text[match.end() :]
        if "\n" in match[0] and _ITEM.match(rest):
            continue
        stop = _STOP.search(rest)
        found.append((match.start(), rest[: stop.start()] if stop else rest))
    return [_NOT.sub("", said).strip() for _, said in sorted(found)]


def clean_number(text: str, answers: Sequence[str] = ()) -> str | None:
    """The number of the last statement that has one, else the last number of the text.

    In a statement: the first number behind its last `=` (`the answer is 4 * 6 = 24 apples` says 24), else its first
    number. Numbers of list items and steps (`2. Add ...`) are no answers.
    """
    for said in reversed(statements(text)):
        found = numbers(said.rpartition("=")[2]) or numbers(said)
        if found:
            return str(found[0].value)
    found = numbers(_ITEMS.sub("", text))
    return str(found[-1].value) if found else None


def _letters(said: str, answers: Sequence[str]) -> set[str]:
    """Letters a statement names: `(C)` or `(c)`, `option C`, or a bare capital that no word follows."""
    one = f"[{''.join(answers)}]"
    marked = re.findall(rf"\(\s*({one})\s*\)", said, re.IGNORECASE)
    marked += re.findall(rf"(?i:option|choice)\s+\(?({one})\b", said)
    marked += re.findall(rf"(?:^|[\s$*\"'{{])({one})(?=\s*(?:[().:,*\"'$}}]|$|or\b|and\b))", said)
    return {letter.upper() for letter in marked}


def clean_letter(text: str, answers: Sequence[str] = "ABCDE") -> str | None:
    """The letter of the last statement that names one; else a response that is only a letter; else the one letter
    it holds as `(C)`, `option C` or a line's `C)`. Two letters in that statement, or several without one: no answer.
    """
    for said in reversed(statements(text)):
        named = _letters(said, answers)
        if named:
            return named.pop() if len(named) == 1 else None
    one = f"[{''.join(answers)}]"
    alone = re.fullmatch(rf"\s*({one})[.:)]?\s*", text)
    if alone:
        return alone[1]
    named = set(re.findall(rf"(?<!\w)\(({one})\)", text)) | set(re.findall(rf"(?m)^\s*({one})\)", text))
    named |= set(re.findall(rf"(?i:option|choice)\s+\(?({one})\b", text))
    return named.pop() if len(named) == 1 else None


def _words(said: str, answers: Sequence[str]) -> set[str]:
    """Answers that occur as whole words, in any case; `answer 3` is answer3."""
    spelled = {re.sub(r"(?<=[a-z])(?=\d)", r"\\s?", re.escape(a)): a for a in answers}
    return {a for pattern, a in spelled.items() if re.search(rf"(?<!\w){pattern}(?!\w)", said, re.IGNORECASE)}


def clean_choice(text: str, answers: Sequence[str]) -> str | None:
    """The option of the last statement that names one, else the only option of the text. Two are no answer."""
    for said in reversed(statements(text)):
        named = _words(said, answers)
        if named:
            return named.pop() if len(named) == 1 else None
    named = _words(_NOT.sub("", text), answers)
    return named.pop() if len(named) == 1 else None


def normalise(text: str) -> str:
    """Free text for comparison: case, punctuation, articles and spacing are nothing (as in SQuAD's exact match)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if c in string.punctuation else c for c in text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def clean_text(text: str, answers: Sequence[str] = ()) -> str | None:
    """The last statement, else the first line that is not empty; normalised."""
    said = [s for s in map(normalise, statements(text)) if s]
    lines = [s for s in map(normalise, text.splitlines()) if s]
    return said[-1] if said else lines[0] if lines else None


PUBLISHED: dict[Kind, Extractor] = {"number": published_number, "letter": published_letter, "choice": published_choice}
"""By kind of answer. There is no published rule for free text."""
CLEAN: dict[Kind, Extractor] = {
    "number": clean_number,
    "letter": clean_letter,
    "choice": clean_choice,
    "text": clean_text,
}
