"""All that makes packed forwards fast, in one place: `inlay.train`'s loop and `packed_forward` compute alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from inlay.core.host import Host
from inlay.engine.attention import apart
from inlay.engine.fused import fused_linears
from inlay.engine.gated import gated_mlps
from inlay.engine.last import only_read
from inlay.engine.linear import fast_linears
from inlay.engine.memory import kept
from inlay.engine.norm import rms_norms
from inlay.engine.rotary import rotary
from inlay.engine.steady import Steady


@contextlib.contextmanager
def engaged(host: Host, steady: Steady, narrow: bool = True) -> Iterator[None]:
    """Within the block, packed forwards attend within sequences, and compute by the engine's own nodes.

    Args:
        steady: what serves all packs of a step; its owner clears it when a step begins.
        narrow: whether the last block is computed only where it is read.
    """
    fast, host.fast = host.fast, True
    try:
        with contextlib.ExitStack() as stack:
            if host.device.type == "cpu":
                stack.enter_context(kept())
            stack.enter_context(apart(host))
            stack.enter_context(fused_linears(host, steady))
            stack.enter_context(gated_mlps(host))
            stack.enter_context(rms_norms(host.model))
            stack.enter_context(rotary(host))
            stack.enter_context(fast_linears(host.model))
            if narrow:
                stack.enter_context(only_read(host))
            yield
    finally:
        host.fast = fast
