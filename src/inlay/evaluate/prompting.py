"""By which template each adapter is asked: the one that was chosen, else its own, else the base's default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.tasks.template_choice import AnyTemplate, choose, recorded, shown


class Prompting:
    """Templates by adapter.

    An adapter is asked as it was trained: by the template that its file records (`Host.templates`). One that records
    none, and the bare base, are asked by the default, which is the tokenizer's own chat template if it has one. A
    template that is chosen takes the place of all.

    Args:
        asked: the template chosen for all; None leaves it to the adapters.
        notify: told, once per adapter, that it is asked by a template that may not be the one it learned; a warning by
            default.

    Raises:
        InlayError: `asked` is no template, or one that this tokenizer does not have.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: Any,
        asked: str | AnyTemplate | None = None,
        notify: Callable[[str], None] | None = None,
    ):
        self.host, self.tokenizer = host, tokenizer
        self.asked = None if asked in (None, "auto") else choose(asked, tokenizer)
        self.default = self.asked or choose(None, tokenizer)
        self.notify = notify or (lambda text: warnings.warn(text, stacklevel=3))
        self._notified: set[str] = set()

    def of(self, worn: Worn, label: str | None = None) -> AnyTemplate:
        """The template for rows that wear these adapters.

        Args:
            label: what the adapters are called in notes; their names by default.

        Raises:
            InlayError: an adapter records a template that this Inlay does not know, and none is chosen.
        """
        if not worn:
            return self.default
        label = label or "+".join(worn)
        if self.asked is None:
            return self._own(worn, label)
        about = [self.host.templates.get(name) for name in worn]
        other = [text for a in about if (text := self._other(a))]
        if other:
            self._note(label, f"{label} was trained with {other[0]}; it is asked by {shown(self.asked)}")
        return self.asked

    def _other(self, about: Mapping[str, Any] | None) -> str:
        """A recorded template in a sentence, where it is another than the chosen one."""
        try:
            template = recorded(about)
        except InlayError:
            return "a template that this Inlay does not know"
        return "" if template is None or template == self.asked else shown(template)

    def _own(self, worn: Worn, label: str) -> AnyTemplate:
        found = [t for name in worn if (t := recorded(self.host.templates.get(name))) is not None]
        if not found:
            self._note(
                label,
                f"{label} does not record the template it was trained with; it is asked by {shown(self.default)} "
                "(--template chooses another)",
            )
            return self.default
        if any(t != found[0] for t in found):
            self._note(
                label,
                f"the adapters of {label} were trained with different templates; they are asked by "
                f"{shown(self.default)} (--template chooses another)",
            )
            return self.default
        return found[0]

    def _note(self, label: str, text: str) -> None:
        if label not in self._notified:
            self._notified.add(label)
            self.notify(text)

    def stops(self, templates: list[AnyTemplate], ends: list[int]) -> tuple[str, ...]:
        """Special tokens, as stop texts, that end a turn in these templates and are not among `ends` already."""
        found = (t.end_of_turn(self.tokenizer) for t in templates)
        return tuple(dict.fromkeys(end[0] for end in found if end is not None and end[1] not in ends))
