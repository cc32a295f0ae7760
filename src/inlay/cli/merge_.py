"""`inlay merge`: an adapter into its base, as an ordinary model folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class MergeSettings(ThreadSettings):
    """What is merged, and where it goes."""

    adapter: tyro.conf.Positional[Path]
    """The adapter's folder, in any format that `inlay convert` reads."""
    out: Path
    """The model folder to write; it must not exist."""
    model: str | None = None
    """The base: a folder, a Hub id or an embedded base (default: the one that the adapter names)."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the merged weights (as stored, if not given). Merging is computed in fp32 and rounded once."""


def run(s: MergeSettings) -> None:
    """Merge, write, report."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.api import attach, merge
    from inlay.core.files import new_folder
    from inlay.interop import formats
    from inlay.models.base import load_base, save_tokenizer

    if s.out.exists():
        raise InlayError(f"{s.out} exists; name a new folder")
    base = s.model or base_of(s.adapter)
    model, _ = load_base(base, s.dtype)
    host = attach(model)
    name = formats.read(host, s.adapter)
    kind = host.edits[name].kind
    report = merge(host, name, keep=False)
    model = host.detach()
    with new_folder(s.out) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        save_tokenizer(base, folder)
    out = Console(highlight=False)
    into = f"{len(report.modules)} layers of {escape(base)}"
    out.print(f"{kind} merged into {into}: {escape(str(s.out))}", soft_wrap=True)
    out.print(f"weights rounded once: by at most {report.rounding:.1e} of the largest weight")
    out.print(
        f"logits within {report.deviation:.1e} of the adapter's, on random ids (largest logit {report.logits:.1f})"
    )
    if report.untied:
        out.print("[yellow]note:[/] embedding and head were tied and had to part")


def base_of(folder: Path) -> str:
    """The base that an adapter's own files name."""
    for file, path in (("adapter.json", ("base", "name")), ("adapter_config.json", ("base_model_name_or_path",))):
        try:
            found = json.loads((folder / file).read_text())
            for key in path:
                found = found[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found:
            return str(found)
    raise InlayError(f"{folder} does not say what its base is; give --model")


VERB = Verb(
    "merge",
    "Merge an adapter into its base and write an ordinary model folder; refuses what is not linear.",
    MergeSettings,
    run,
    (
        "inlay merge runs/math/adapter --out merged",
        "inlay merge math-peft --model tiny-llama --dtype bf16 --out merged",
    ),
)
