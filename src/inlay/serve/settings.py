"""What a server and a playground are told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import tyro

from inlay.core.errors import InlayError
from inlay.tasks.template_choice import TemplateSettings
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class SharedSettings(TemplateSettings, ThreadSettings):
    """What `inlay serve` and `inlay play` have in common: a base, its adapters, where to listen, how much to decode."""

    above_zero: ClassVar[tuple[str, ...]] = ("rows", "longest", "timeout", "adapter_memory")
    not_below: ClassVar[tuple[str, ...]] = ("port",)

    model: tyro.conf.Positional[str]
    """The base: tiny-llama, a folder or a Hub id."""
    adapters: tuple[str, ...] = ()
    """Folders of adapter folders, single adapter folders in any format that `inlay convert` reads, or hub:org/name."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    rows: int = 32
    """Rows decoded at a time, others wait. The KV cache grows to so many times the longest row."""
    longest: int = 4096
    """Most tokens of a row, prompt included; the base's context if that is less."""
    timeout: float = 600.0
    """Seconds after which an answer is given up."""
    adapter_memory: float = 4.0
    """GiB that adapters may take; the least recently used leave memory and come back from disk, those in use stay."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the base (as stored if not given)."""
    device: str | None = None
    """Where to run; the GPU if there is one."""

    def __post_init__(self) -> None:
        for key in self.above_zero:
            if getattr(self, key) <= 0:
                raise InlayError(f"{key} {getattr(self, key)} must be above 0")
        for key in self.not_below:
            if getattr(self, key) < 0:
                raise InlayError(f"{key} {getattr(self, key)} must be 0 or more")
        if self.port > 65535:
            raise InlayError(f"port {self.port} does not exist; choose one up to 65535")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(SharedSettings):
    """A base, its adapters, and how much anybody may ask for."""

    above_zero = (*SharedSettings.above_zero, "prefill", "body")
    not_below = (*SharedSettings.not_below, "waiting", "drain", "drain_delay")

    name: str | None = None
    """What requests call the base, beside `base`; by default the last part of `model`."""
    api_key: str | None = None
    """Key that /v1 asks for; better set by the variable INLAY_API_KEY, which other users cannot see. None: open."""
    admin_key: str | None = None
    """Key that /admin asks for, or the variable INLAY_ADMIN_KEY; without one, /admin is closed."""
    waiting: int = 256
    """Most rows that wait for a slot; more are refused with 429."""
    prefill: int = 2048
    """Most prompt tokens fed between two steps of the rows that are being decoded."""
    timeout: float = 600.0
    """Seconds after which a request is given up; a request may ask for less."""
    body: int = 2_000_000
    """Most bytes of a request."""
    drain: float = 30.0
    """Seconds that requests in flight have to end after SIGTERM."""
    drain_delay: float = 0.0
    """Seconds after SIGTERM in which new requests are still taken, while /ready says no: time for a load balancer."""
    log: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged; `info` has a line per request."""

    @property
    def base_names(self) -> tuple[str, ...]:
        """What requests may call the base."""
        own = self.name or self.model.rstrip("/").rpartition("/")[2]
        return tuple(dict.fromkeys((own, "base")))

    def keys(self, environment: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
        """(API key, admin key), given or of the environment."""
        api = self.api_key or environment.get("INLAY_API_KEY") or None
        admin = self.admin_key or environment.get("INLAY_ADMIN_KEY") or None
        if admin is not None and admin == api:
            raise InlayError("the admin key and the API key must differ, or every client could change adapters")
        return api, admin


@dataclass(frozen=True, kw_only=True)
class PlaySettings(SharedSettings):
    """A base, the adapters to compare, and where the page is."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all. Anybody who reaches it may use the page."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    rows: int = 16
    """Answers written at a time, over all browsers; others wait."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise InlayError("nothing to compare: give folders of adapters with --adapters (`inlay demo` makes some)")
        super().__post_init__()
