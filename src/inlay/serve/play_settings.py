"""What a playground is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from inlay.core.errors import InlayError


@dataclass(frozen=True, kw_only=True)
class PlaySettings:
    """A base, the adapters to compare, and where the page is."""

    model: tyro.conf.Positional[str]
    """The base: tiny-llama, a folder or a Hub id."""
    adapters: tuple[str, ...] = ()
    """Folders of adapter folders, single adapter folders in any format that `inlay convert` reads, or hub:org/name."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all. Anybody who reaches it may use the page."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    template: Literal["auto", "clean", "published", "plain"] = "auto"
    """How what is typed becomes a prompt: by the tokenizer's chat template (`auto`; as `clean` if it has none), as in
    training under a protocol, or as it is."""
    rows: int = 16
    """Answers written at a time, over all browsers; others wait."""
    longest: int = 4096
    """Most tokens of a prompt and its answer; the base's context if that is less."""
    timeout: float = 600.0
    """Seconds after which an answer is given up."""
    adapter_memory: float = 4.0
    """GiB that adapters may take; the least recently used leave memory and come back from disk, those in use stay."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the base (as stored if not given)."""
    device: str | None = None
    """Where to run; the GPU if there is one."""
    threads: int | None = None
    """CPU threads of one product; PyTorch's choice if not given."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise InlayError("nothing to compare: give folders of adapters with --adapters (`inlay demo` makes some)")
        for key in ("rows", "longest", "timeout", "adapter_memory"):
            if getattr(self, key) <= 0:
                raise InlayError(f"{key} {getattr(self, key)} must be above 0")
        if not 0 <= self.port <= 65535:
            raise InlayError(f"port {self.port} does not exist; choose one of 0 to 65535")
