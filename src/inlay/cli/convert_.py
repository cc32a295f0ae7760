"""`inlay convert`: adapters between formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(ThreadSettings):
    """From which folder to which."""

    source: tyro.conf.Positional[Path]
    """The adapter's folder: Inlay, HF PEFT, LLM-Adapters or AdapterHub; told apart by its files."""
    target: tyro.conf.Positional[Path]
    """The folder to write; it must not exist."""
    model: str
    """The adapter's base: a folder, a Hub id, or an embedded base. Shapes, and a few of its weights, are checked."""
    to: Literal["inlay", "peft", "vllm"] = "inlay"
    """`peft` keeps the method; `vllm` writes any additive linear adapter as one plain LoRA."""
    rank: int | None = None
    """For vllm: the widest rank; what is wider is cut, and the error is printed."""
    road2: bool = False
    """Write a RoAd as the RoAd_2 that it equals: of RoAd_4, half the numbers and the same function."""


def run(s: ConvertSettings) -> None:
    """Read, hang, write."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.api import attach, save
    from inlay.core.files import new_folder
    from inlay.interop import formats
    from inlay.models.base import load_base

    if s.target.exists():
        raise InlayError(f"{s.target} exists; name a new folder")
    if s.rank is not None and s.to != "vllm":
        raise InlayError(f"--rank is a choice of --to vllm; {s.to} keeps the adapter's own")
    kind = formats.detect(s.source)
    model, _ = load_base(s.model)
    host = attach(model)
    name = formats.read(host, s.source)
    if s.road2:
        from inlay.methods.rotate import to_road2

        read, name = name, f"{name}-road2"
        to_road2(host, read, name)
        if read in host.templates:
            host.templates[name] = host.templates[read]
    out = Console(highlight=False)
    with new_folder(s.target) as folder:
        if s.to == "inlay":
            save(host, name, folder, about={"converted_from": kind})
        else:
            written = formats.write(host, name, folder, s.to, s.rank)
    if s.to != "inlay":
        for note in written.notes:
            out.print(f"[yellow]note:[/] {escape(note)}")
        if s.to == "vllm":
            out.print(f"rank {written.rank}, largest relative error {written.error:.2e}")
    what = f"{host.edits[name].kind}, {host.count(name):,} parameters"
    out.print(f"{kind} -> {s.to}: {what}, in {escape(str(s.target))}", soft_wrap=True)


VERB = Verb(
    "convert",
    "Convert an adapter between Inlay, HF PEFT and vLLM; read LLM-Adapters and AdapterHub.",
    ConvertSettings,
    run,
    (
        "inlay convert runs/math/adapter math-peft --model tiny-llama --to peft",
        "inlay convert old/llm-adapters-run mine --model yahma/llama-7b-hf",
        "inlay convert runs/math/adapter math-vllm --model tiny-llama --to vllm --rank 16",
        "inlay convert runs/road4/adapter road2 --model tiny-llama --road2",
    ),
)
