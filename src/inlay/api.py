"""The front door: hosts on models; adapters to and from files; merging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core import store
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.merge import Merged, merge, merged
from inlay.methods import EDITS
from inlay.models.anatomy import anatomy

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Merged", "attach", "host_of", "load", "merge", "merged", "save"]


def attach(model: nn.Module, *, strategy: str = "auto", fast: bool = False) -> Host:
    """Let a causal language model wear adapters. It is frozen, and otherwise left as it is until `Host.detach()`.

    Args:
        model: any Hugging Face decoder (see `inlay.models.families`).
        strategy: `auto`, `segments`, `select` or `stack` (see `inlay.core.route`).
        fast: compute adapters in the base's dtype.
    """
    return Host(model, anatomy(model), strategy, fast)


def host_of(model: nn.Module) -> Host:
    """The host a model was given by `attach`."""
    host = getattr(model, "_inlay_host", None)
    if not isinstance(host, Host):
        raise InlayError("this model wears no adapters; call inlay.attach(model) first")
    return host


def save(host: Host, name: str, folder: str | Path, about: Mapping[str, Any] | None = None, **parts: Any) -> Path:
    """Write an adapter in Inlay's format (see `inlay.core.store.save`, which also takes the `parts`)."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("inlay", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return store.save(host, name, folder, about, versions, **parts)


def load(host: Host, folder: str | Path, name: str | None = None, allow_other_base: bool = False) -> str:
    """Hang an adapter saved in Inlay's format and return its name. For other formats see `inlay.interop.formats`."""
    return store.load(host, folder, EDITS, name, allow_other_base)
