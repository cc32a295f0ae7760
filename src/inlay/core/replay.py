"""Gradient checkpointing: a layer recomputed during backward must meet the routing it was computed with.

The model's own checkpoint function is wrapped at the start of a forward, so it does not matter who switches
checkpointing on, or when. It also makes checkpointing non-reentrant: with the base frozen, the reentrant form finds no
input that requires a gradient and trains nothing.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from torch import nn

from inlay.compat.transformers import can_checkpoint, checkpoint_function, set_checkpoint_function

if TYPE_CHECKING:
    from inlay.core.host import Host


class Replayed:
    """`checkpoint(function, *args)` that runs `function` under the route of its first run."""

    def __init__(self, host: Host, inner):
        self.host, self.inner = host, inner
        if isinstance(inner, functools.partial) and inner.keywords.get("use_reentrant"):
            self.inner = functools.partial(inner.func, *inner.args, **{**inner.keywords, "use_reentrant": False})
        self.original = inner

    def __call__(self, function, *args, **kwargs):
        then = self.host.now

        @functools.wraps(getattr(function, "func", function))
        def under_its_route(*args, **kwargs):
            with _as(self.host, then):
                return function(*args, **kwargs)

        return self.inner(under_its_route, *args, **kwargs)


@contextlib.contextmanager
def _as(host: Host, then):
    now, host.now = host.now, then
    try:
        yield
    finally:
        host.now = now


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that can checkpoint."""
    return [m for m in model.modules() if can_checkpoint(m)]


def wrap(host: Host, modules: list[nn.Module]) -> None:
    """Wrap whatever checkpoint functions are new since the last forward."""
    for m in modules:
        inner = checkpoint_function(m)
        if m.gradient_checkpointing and inner is not None and not isinstance(inner, Replayed):
            set_checkpoint_function(m, Replayed(host, inner))


def unwrap(modules: list[nn.Module]) -> None:
    """Leave the modules as they were found."""
    for m in modules:
        inner = checkpoint_function(m)
        if isinstance(inner, Replayed):
            set_checkpoint_function(m, inner.original)
