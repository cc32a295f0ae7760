"""A method's name: what users type, and the edit, settings and places it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inlay.core.edit import Edit
from inlay.core.errors import InlayError


@dataclass(frozen=True)
class Method:
    """One row of the table of methods. Variants of a formula are rows, not classes."""

    name: str
    edit: type[Edit]
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    at: str | None = None
    """Default placement, if it is not the edit's."""

    def make(self, **settings: Any) -> Edit:
        """The edit with these settings over the row's and the edit's own; an unknown setting is an error."""
        known = [f.name for f in dataclasses.fields(self.edit)]
        for name in settings:
            if name not in known:
                raise InlayError(
                    f"method {self.name!r} has no setting {name!r}; its settings are: {', '.join(known) or 'none'}"
                )
        return self.edit(**{**self.settings, **settings})

    @property
    def places(self) -> str:
        """Where it hangs unless told otherwise."""
        return self.at or self.edit.at
