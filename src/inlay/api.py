"""The front door: put a host on a model, or load a model and do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.core.errors import InlayError
from inlay.core.host import Host

if TYPE_CHECKING:
    from torch import nn


def attach(model: nn.Module, *, strategy: str = "gather", fast: bool = False) -> Host:
    """Let a causal language model wear adapters. It is frozen, and otherwise left as it is until `Host.detach()`.

    Args:
        model: any Hugging Face decoder (see `inlay.models.families`).
        strategy: `gather`, `select` or `stack` (see `inlay.core.route`).
        fast: compute adapters in the base's dtype.
    """
    from inlay.models.anatomy import anatomy

    return Host(model, anatomy(model), strategy, fast)


def host_of(model: nn.Module) -> Host:
    """The host a model was given by `attach`."""
    host = getattr(model, "_inlay_host", None)
    if not isinstance(host, Host):
        raise InlayError("this model wears no adapters; call inlay.attach(model) first")
    return host
