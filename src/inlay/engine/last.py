"""The last block, computed behind its attention only where its output is read.

Nothing looks at the last hidden state of a token that is not learned. So what follows the attention there (its output
projection, the MLP, their adapters, and all of their backward) is spared for these tokens; what is returned for them is
zero. The block is entered twice: once to see what its attention is given, once, with the rows that are read and the
attention's answer at hand, for everything else. Blocks that add the residual inside their attention (BLOOM) are left
as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.compat import transformers as compat
from inlay.core.host import Host
from inlay.engine.linear import forwards

SHARE = 0.9
"""Most of a pack's columns that may be read for this to be worth it."""
ROLES = ("block", "attn", "o")
"""What a last block needs to be entered twice."""
_left: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Models whose last block turned out to be built otherwise -> what was met."""


class _Given(Exception):
    """Carries what a module was called with out of the block that called it."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args_, self.kwargs = args, kwargs


class _Last:
    """Stands in for the forward of the last block."""

    def __init__(self, host: Host, block: Any, attention: Any, out: Any):
        self.host, self.block, self.attention, self.out = host, block, attention, out
        self.served = True
        """Until it turns out that the block is not built like that."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block says, zero where it is not read."""
        whole = self.host.now
        read_N = whole.layout.read_N if whole.layout is not None else None
        # Where nothing is read the block is whole: decoders' own code need not bear a batch of no rows.
        if not self.served or read_N is None or not 0 < len(read_N) <= SHARE * whole.batch or self._met(args):
            return type(self.block).forward(self.block, *args, **kwargs)
        work = functools.partial(self._narrowed, read_N, **kwargs)
        checkpoint = compat.checkpoint_function(self.block) if compat.checkpoints(self.block) else None
        return work(*args) if checkpoint is None else checkpoint(work, *args)

    def _met(self, args: tuple) -> bool:
        """Whether this call cannot be narrowed; why is noted for `refused`."""
        if any(m._forward_hooks or m._backward_hooks for m in (self.block, self.attention)):
            _left[self.host.model] = "the last block or its attention carries hooks"
        elif not args:
            _left[self.host.model] = "the last block is given its hidden states by keyword"
        else:
            return False
        return True

    def _stop(self, why: str) -> None:
        self.served, _left[self.host.model] = False, why

    def _block(self, *args: Any, **kwargs: Any) -> Any:
        """The block itself. Transformers checkpoints within `forward`; here that is done around it."""
        return compat.own_forward(self.block)(self.block, *args, **kwargs)

    def _narrowed(self, read_N: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = self.host.now
        try:
            return self._rows(read_N, *args, **kwargs)
        finally:
            self.host.now = whole

    def _rows(self, read_N: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = self.host.now

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Given(args, kwargs)

        def enter(module: Any, given: tuple) -> tuple:
            self.host.now = whole.only(read_N)
            return (given[0].flatten(0, -2)[read_N][:, None], *given[1:])

        try:
            with forwards({self.attention: stop}):
                said = self._block(hidden, *args, **kwargs)
            self._stop("the last block does not call its attention")
            return said
        except _Given as given:
            handle = self.out.register_forward_pre_hook(enter, prepend=True)
            try:
                attended = self.attention.forward(*given.args_, **given.kwargs)
            finally:
                handle.remove()
        first = attended[0] if isinstance(attended, tuple) else attended
        if first.shape != (len(read_N), 1, hidden.shape[-1]):
            self._stop("the last block's attention does not end in its output projection")
            self.host.now = whole
            return self._block(hidden, *args, **kwargs)
        with forwards({self.attention: lambda *args, **kwargs: attended}):
            said = self._block(hidden.flatten(0, 1)[read_N][:, None], *args, **kwargs)
        out = said[0] if isinstance(said, tuple) else said
        flat = torch.zeros_like(hidden.flatten(0, 1)).index_copy(0, read_N, out.flatten(0, 1))
        return (flat.view_as(hidden), *said[1:]) if isinstance(said, tuple) else flat.view_as(hidden)


@contextlib.contextmanager
def only_read(host: Host) -> Iterator[None]:
    """Within the block, packed forwards compute the last block where `Layout.read_N` says, if they can."""
    if _built_otherwise(host):
        yield
        return
    block, attention, out = (host.model.get_submodule(_paths(host)[r]) for r in ROLES)
    with forwards({block: _Last(host, block, attention, out).forward}):
        yield


def refused(host: Host) -> str:
    """Why the last block is computed whole, as far as it is known by now; empty if it is not."""
    return _built_otherwise(host) or _left.get(host.model, "")


def _built_otherwise(host: Host) -> str:
    paths = _paths(host)
    if missing := [r for r in ROLES if r not in paths]:
        return f"the last block has no {missing[0]!r}"
    block, attention, _ = (host.model.get_submodule(paths[r]) for r in ROLES)
    if "residual" in inspect.signature(attention.forward).parameters:
        return "this decoder adds the residual inside its attention"
    if any("forward" in vars(m) for m in (block, attention)):
        return "another library has replaced the forward of the last block"
    return ""


def _paths(host: Host) -> dict[str, str]:
    """Role -> path of the whole modules of the last block."""
    last = host.anatomy.layers - 1
    return {s.role: s.path for s in host.anatomy.spots if s.layer == last and s.part is None}
