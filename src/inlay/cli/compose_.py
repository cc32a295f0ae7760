"""`inlay compose`: adapters made of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class ComposeSettings(ThreadSettings):
    """What is composed, and where it goes."""

    text: tyro.conf.Positional[str]
    """The composition: sum(0.7*a, 0.3*b), average(a, b), stack(a, b), union(a, b), or nested."""
    adapters: tuple[Path, ...]
    """Folders of the adapters that it names, in any format; a folder NAME (or NAME/adapter) is called NAME."""
    out: Path
    """The adapter folder to write; it must not exist."""
    model: str | None = None
    """The base: a folder, a Hub id or an embedded base (default: the one that the first adapter names)."""


def run(s: ComposeSettings) -> None:
    """Read, compose, write."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.api import attach, save
    from inlay.cli.merge_ import base_of
    from inlay.interop import formats
    from inlay.library import compose
    from inlay.models.base import load_base

    if s.out.exists():
        raise InlayError(f"{s.out} exists; name a new folder")
    if not s.adapters:
        raise InlayError("name the folders of the adapters: --adapters A B")
    base = s.model or base_of(s.adapters[0])
    model, _ = load_base(base)
    host = attach(model)
    for folder in s.adapters:
        formats.read(host, folder, folder.resolve().parent.name if folder.name == "adapter" else folder.resolve().name)
    compose(host, "composed", s.text, hang=True)
    save(host, "composed", s.out, {"composition": s.text, "adapters": [str(a) for a in s.adapters]})
    size = f"{host.count('composed'):,} numbers at {len(host.placement('composed'))} places of {escape(base)}"
    Console(highlight=False).print(f"{escape(s.text)}: {size}, in {escape(str(s.out))}", soft_wrap=True)


VERB = Verb(
    "compose",
    "Make one adapter of several: a weighted sum, an average, a stack, a union of sub-spaces.",
    ComposeSettings,
    run,
    (
        'inlay compose "sum(0.7*math, 0.3*chat)" --adapters runs/math/adapter runs/chat/adapter --out both',
        'inlay compose "stack(average(a, b), c)" --adapters a b c --out mixed',
    ),
)
