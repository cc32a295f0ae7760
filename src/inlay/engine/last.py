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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from inlay.core.host import Host
from inlay.engine.linear import forwards

SHARE = 0.9
"""Most of a pack's columns that may be read for this to be worth it."""


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
        hooked = any(m._forward_hooks or m._backward_hooks for m in (self.block, self.attention))
        # Where nothing is read the block is whole: decoders' own code need not bear a batch of no rows.
        if not self.served or read_N is None or not 0 < len(read_N) <= SHARE * whole.batch or hooked or not args:
            return type(self.block).forward(self.block, *args, **kwargs)
        work = functools.partial(self._narrowed, read_N, **kwargs)
        if getattr(self.block, "gradient_checkpointing", False) and self.block.training:
            return self.block._gradient_checkpointing_func(work, *args)
        return work(*args)

    def _block(self, *args: Any, **kwargs: Any) -> Any:
        """The block itself. Transformers checkpoints within `forward`; here that is done around it."""
        forward = type(self.block).forward
        inner = forward.__wrapped__ if isinstance(self.block, GradientCheckpointingLayer) else forward
        return inner(self.block, *args, **kwargs)

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
            self.served = False
            return said
        except _Given as given:
            handle = self.out.register_forward_pre_hook(enter, prepend=True)
            try:
                attended = self.attention.forward(*given.args_, **given.kwargs)
            finally:
                handle.remove()
        first = attended[0] if isinstance(attended, tuple) else attended
        if first.shape != (len(read_N), 1, hidden.shape[-1]):
            self.served, self.host.now = False, whole
            return self._block(hidden, *args, **kwargs)
        with forwards({self.attention: lambda *args, **kwargs: attended}):
            said = self._block(hidden.flatten(0, 1)[read_N][:, None], *args, **kwargs)
        out = said[0] if isinstance(said, tuple) else said
        flat = torch.zeros_like(hidden.flatten(0, 1)).index_copy(0, read_N, out.flatten(0, 1))
        return (flat.view_as(hidden), *said[1:]) if isinstance(said, tuple) else flat.view_as(hidden)


@contextlib.contextmanager
def only_read(host: Host) -> Iterator[None]:
    """Within the block, packed forwards compute the last block where `Layout.read_N` says, if they can."""
    last = host.anatomy.layers - 1
    own = {s.role: s.path for s in host.anatomy.spots if s.layer == last and s.part is None}
    if not {"block", "attn", "o"} <= own.keys():
        yield
        return
    block, attention, out = (host.model.get_submodule(own[r]) for r in ("block", "attn", "o"))
    inside = "residual" in inspect.signature(attention.forward).parameters
    if inside or any("forward" in vars(m) for m in (block, attention)):
        yield
        return
    with forwards({block: _Last(host, block, attention, out).forward}):
        yield
