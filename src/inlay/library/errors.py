"""What goes wrong with a name, a source or a composition."""

from __future__ import annotations

from typing import Literal, get_args

from inlay.core.errors import InlayError

Kind = Literal["unknown", "broken", "unfit", "exists", "bad-name", "bad-source", "invalid"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class BankError(InlayError):
    """A request to a bank of adapters that cannot be carried out; nothing has changed.

    Args:
        kind: `unknown` (no such name), `broken` (the adapter of that name cannot be read, which is remembered), `unfit`
            (what was to be loaded is damaged, of another base or not finite), `exists` (the name is taken), `bad-name`,
            `bad-source` (a folder that may not be read), `invalid` (a composition that cannot be made).
        field: whose fault it is: `model` (what was asked for), `name` or `source`.
    """

    def __init__(self, message: str, kind: Kind, field: str = "model"):
        super().__init__(message)
        self.kind: Kind = kind
        self.field = field
