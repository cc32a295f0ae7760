"""Gated MLPs that keep two tensors of their inner width, where they would keep four.

down(act(gate) * up): what the activation says and the product are made again in backward, once for both, from gate and
up; that is an element-wise pass each, for half of the memory that a block takes. Only MLPs are served whose `forward`
is that line.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from inlay.core.host import Host
from inlay.engine.linear import forwards

LINE = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What a served `forward` computes."""


class _Inner:
    """act(gate) * up of one forward, and again."""

    def __init__(self, act: nn.Module, gate: Tensor, up: Tensor):
        self.act, self.gate, self.up = act, gate.detach(), up.detach()
        self.opened: Tensor | None = None

    @torch.no_grad()
    def again(self) -> Tensor:
        """The product. What the activation says is kept until `Gated.backward` has asked for it."""
        self.opened = self.act(self.gate)
        return self.opened * self.up

    def open(self) -> Tensor:
        """What the activation says."""
        opened, self.opened = self.opened, None
        return self.act(self.gate) if opened is None else opened


class Gated(torch.autograd.Function):
    """act(gate) * up; act without parameters."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, inner: _Inner) -> Tensor:
        ctx.inner = inner
        opened = inner.act(gate)
        return opened.mul_(up) if opened.dtype == up.dtype else opened * up

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        inner: _Inner = ctx.inner
        dup = inner.open() * g if ctx.needs_input_grad[1] else None
        dgate = None
        if ctx.needs_input_grad[0]:
            g = g * inner.up
            if type(inner.act).__name__ in ("SiLU", "SiLUActivation"):
                dgate = torch.ops.aten.silu_backward(g, inner.gate)
            else:
                with torch.enable_grad():
                    gate = inner.gate.requires_grad_()
                    (dgate,) = torch.autograd.grad(inner.act(gate), gate, g)
        return dgate, dup, None


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)) or torch.compiler.is_compiling():
        return mlp.down_proj(mlp.act_fn(gate) * up)
    inner = _Inner(mlp.act_fn, gate, up)
    y = Gated.apply(gate, up, inner)
    place, size = y.data_ptr(), y.numel()

    def pack(t: Tensor) -> Any:
        return t.shape if t.data_ptr() == place and t.numel() == size else t

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else inner.again().view(kept)

    with saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(y)


def _served(mlp: Any) -> bool:
    if "forward" in vars(mlp) or "x" not in inspect.signature(type(mlp).forward).parameters:
        return False
    act = getattr(mlp, "act_fn", None)
    if not isinstance(act, nn.Module) or any(True for _ in act.parameters()) or act._forward_hooks:
        return False
    try:
        lines = inspect.getsource(type(mlp).forward)
    except (OSError, TypeError):
        return False
    return LINE in lines and lines.count("\n") <= 4 and "dropout" not in lines


@contextlib.contextmanager
def gated_mlps(host: Host) -> Iterator[None]:
    """Within the block, gated MLPs of the blocks keep what they must and make the rest again."""
    found = [host.model.get_submodule(s.path) for s in host.anatomy.spots if s.role == "mlp" and s.part is None]
    with forwards({m: functools.partial(_forward, m) for m in found if _served(m)}):
        yield
