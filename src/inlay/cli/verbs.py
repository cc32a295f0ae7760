"""What a verb is: a settings class, a function that runs it, and examples. Each file of this folder holds one."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = (
    "demo",
    "plan",
    "train",
    "eval",
    "score",
    "know",
    "convert",
    "merge",
    "compose",
    "chat",
    "serve",
    "play",
    "inspect",
)
"""The verbs, in the order of a first visit. `inlay.cli.<name>_` holds each as `VERB`."""
GROUPS = {"know": ("items", "base", "measure", "slick", "watch", "filter", "interfere", "study", "report")}
"""Verbs that have verbs of their own, in the order of their use: `inlay.cli.<name>_<verb>` holds each as `VERB`."""


@dataclass(frozen=True)
class Verb:
    """One row of the command line."""

    name: str
    about: str
    settings: type | str
    """A dataclass, or `module:Class` where importing it costs time: its fields are the flags and the keys of a recipe,
    their docstrings the help."""
    run: Callable[[Any], int | None]
    examples: tuple[str, ...]

    @property
    def settings_class(self) -> type:
        """The dataclass."""
        if isinstance(self.settings, type):
            return self.settings
        module, _, name = self.settings.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found


def verb(name: str) -> Verb:
    """A verb by its name, `eval` or `know watch`."""
    module = name.replace(" ", "_") if " " in name else f"{name}_"
    found: Verb = importlib.import_module(f"inlay.cli.{module}").VERB
    return found


def named(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(the verb's name, its arguments) of what is typed behind `inlay`."""
    words = 2 if argv[0] in GROUPS and len(argv) > 1 and not argv[1].startswith("-") else 1
    return " ".join(argv[:words]), list(argv[words:])


def every() -> list[str]:
    """The names of all verbs, with those of groups in place of the groups."""
    return [name for top in NAMES for name in (verbs_of(top) if top in GROUPS else [top])]


def verbs_of(group: str) -> list[str]:
    """The verbs of a group that are there."""
    there = (f"{group} {name}" for name in GROUPS[group])
    return [name for name in there if importlib.util.find_spec(f"inlay.cli.{name.replace(' ', '_')}")]


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, parents first."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for line, following in zip(body, body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                docs.pop(line.target.id, None)
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    docs[line.target.id] = " ".join(str(following.value.value).split())
    return docs
