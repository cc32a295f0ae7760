"""Which template a prompt is written by: a name or a file that was asked for, what an adapter records, or the default.

    chat      the tokenizer's own chat template
    alpaca    `### Instruction: ... ### Response:`
    none      the text as it is
    FILE      a Jinja chat template, which renders `messages`; or a text with `{instruction}` and, if wanted, `{input}`

The default is the tokenizer's own chat template if it has one, otherwise alpaca.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.tasks.chat_template import ChatTemplate, own_template
from inlay.tasks.templates import ALPACA, NONE, PUBLISHED_EVAL, Template

AnyTemplate = Template | ChatTemplate
TEXTS = {"alpaca": ALPACA, "none": NONE, "published": PUBLISHED_EVAL}
"""Templates by name. `published` is LLM-Adapters' evaluation prompt."""
EARLIER = {"clean": "alpaca", "plain": "none"}
"""Names of before, still read."""
_JINJA = re.compile(r"\{[{%].*\bmessages\b", re.DOTALL)
_FIELD = re.compile(r"(?<!\{)\{instruction\}(?!\})")


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """What all commands that ask adapters have in common."""

    template: str | None = None
    """How what is asked becomes a prompt: chat (the tokenizer's own chat template), alpaca (`### Instruction: ...`),
    none (as it is), or a FILE (a Jinja chat template, or a text with {instruction}). If not given, each adapter is
    asked as it was trained; the base, and adapters that do not record it, by chat if the tokenizer has one, else
    alpaca."""


def check(asked: str | None) -> None:
    """Raise InlayError for a template that is neither a known name nor a readable template file. Loads nothing."""
    if asked is not None and asked not in ("chat", "auto"):
        _named(asked)


def choose(asked: str | AnyTemplate | None, tokenizer: Any) -> AnyTemplate:
    """The template that was asked for; None is the default (see the head of this file).

    Raises:
        InlayError: an unknown name, a file that is no template, or `chat` where the tokenizer has none.
    """
    if isinstance(asked, Template | ChatTemplate):
        return asked
    if asked is None or asked in ("auto", "chat"):
        own = own_template(tokenizer)
        if own is None and asked == "chat":
            raise InlayError(
                "this tokenizer has no chat template; leave the template out, or give alpaca, none or a template file"
            )
        return own or ALPACA
    return _named(asked)


def template_json(template: AnyTemplate) -> dict[str, str]:
    """A template as adapters and reports record it; `recorded` reads it back. Those that Inlay knows go by their name,
    others with all their text."""
    if isinstance(template, ChatTemplate):
        return {"name": template.name, "chat_template": template.source}
    if known := next((name for name, text in TEXTS.items() if text == template), None):
        return {"name": known}
    return {"name": template.name, "bare": template.bare, "paired": template.paired}


def recorded(about: Mapping[str, Any] | None) -> AnyTemplate | None:
    """The template that an adapter records; None for none.

    Raises:
        InlayError: a template of a kind that this Inlay does not know.
    """
    if about is None:
        return None
    if not isinstance(about, Mapping):  # written by hand: the name alone
        about = {"name": EARLIER.get(about, about) if isinstance(about, str) else about}
    name = about.get("name")
    if isinstance(name, str) and isinstance(source := about.get("chat_template"), str):
        return ChatTemplate(name, source)
    if isinstance(name, str) and isinstance(bare := about.get("bare"), str) and isinstance(about.get("paired"), str):
        return Template(name, bare, about["paired"])
    if isinstance(name, str) and name in TEXTS and len(about) == 1:
        return TEXTS[name]
    raise InlayError(
        f"the adapter records the template {str(dict(about))[:80]}, which this Inlay does not know: a newer one may "
        "have written it; choose a template for it"
    )


def shown(template: AnyTemplate) -> str:
    """A template in a sentence."""
    if isinstance(template, ChatTemplate):
        return "the tokenizer's chat template" if template.name == "chat" else f"the chat template {template.name}"
    return {"none": "no template"}.get(template.name, f"the template {template.name}")


def shown_json(about: Mapping[str, Any]) -> str:
    """A recorded template in a sentence."""
    template = recorded(about)
    return shown(template) if template is not None else "no template on record"


def read_template(path: str | Path) -> AnyTemplate:
    """The template in a file: Jinja if it renders `messages`, otherwise text with `{instruction}`.

    The text is used to its last byte: a file that ends in a line break puts the answer on a line of its own. Of a
    record without input, the paragraph that holds `{input}` is left out; a text without `{input}` has it behind the
    instruction, after a blank line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InlayError(f"the template file {str(path)!r} cannot be read: {e}") from e
    jinja, fields = _JINJA.search(text), len(_FIELD.findall(text))
    if jinja and not fields:
        _check_jinja(text, path)
        return ChatTemplate(path.name, text)
    if jinja or fields != 1 or text.count("{input}") > 1:
        raise InlayError(
            f"{str(path)!r} is no template: it must be a Jinja chat template, which renders `messages`, or a text that "
            "holds {instruction} once and {input} at most once"
        )
    if "{input}" not in text:
        return Template(path.name, text, text.replace("{instruction}", "{instruction}\n\n{input}"))
    if text.index("{input}") < text.index("{instruction}"):
        raise InlayError(f"in {str(path)!r}, {{input}} must stand behind {{instruction}}")
    paragraphs = text.split("\n\n")
    bare = "\n\n".join(p for p in paragraphs if "{input}" not in p)
    if "{instruction}" not in bare:
        bare = text.replace("{input}", "")
    return Template(path.name, bare, text)


def _named(asked: str) -> AnyTemplate:
    name = EARLIER.get(asked, asked)
    if name in TEXTS:
        return TEXTS[name]
    if not Path(asked).is_file():
        raise InlayError(
            f"there is no template {asked!r}: choose chat, {', '.join(TEXTS)}, or the file of a template (Jinja, or "
            "text with {instruction})"
        )
    return read_template(asked)


def _check_jinja(text: str, path: Path) -> None:
    """Raise InlayError for what Jinja cannot parse; transformers adds loop controls and `generation`."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # checked when it is rendered
        return
    try:
        _compile_jinja_template(text)
    except ImportError as e:
        raise InlayError(f"chat templates need jinja2: pip install jinja2 ({e})") from e
    except Exception as e:
        line = getattr(e, "lineno", None)
        raise InlayError(f"{str(path)!r} is no Jinja template: {e}{f', in line {line}' if line else ''}") from e
