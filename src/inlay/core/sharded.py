"""Tensors of which each process holds a part (FSDP2's, as DTensors), and what needs them whole for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.core.edit import Edit, Weights


def is_sharded(value: object) -> bool:
    """Whether this process holds a part of a tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor: a part of a sharded one, all of another."""
    return value.detach().to_local() if is_sharded(value) else value  # type: ignore[attr-defined, no-any-return]


def is_spread(module: Any, kind: type) -> bool:
    """Whether a module is of exactly this kind but for FSDP2, which made a class of its own for it, gathers its tensors
    when it is called, and hands on what it says as it is."""
    if type(module).__bases__[1:] != (kind,):
        return False
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return False
    return module._get_fsdp_state()._mp_policy.output_dtype in (None, torch.float32)


def hooks(module: Any) -> list[Any]:
    """A module's forward hooks, FSDP2's own left out."""
    every = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [h for h in every if not str(getattr(h, "__module__", "")).startswith("torch.distributed.fsdp.")]


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts, on the CPU and nobody else's. For a sharded one, all ranks must ask at once."""
    return _full(value.detach()).to("cpu", copy=True)


def parted(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as `like` is spread; the same tensor where it is not."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    device = like.device_mesh.device_type
    return distribute_tensor(value.to(device), like.device_mesh, like.placements, src_data_rank=None)


def penalty(edit: Edit, adapter: Mapping[str, Weights]) -> Tensor | None:
    """`Edit.penalty` of an adapter (place key -> tensors); of a sharded one, every rank computes all of it, and each
    part's gradient is the whole penalty's: it is not to be summed or averaged over ranks. All ranks ask at once."""
    if not edit.has_penalty:
        return None
    return edit.penalty({key: {n: _full(t) for n, t in w.items()} for key, w in adapter.items()})


def after_step(edit: Edit, adapter: Mapping[str, Weights], step: int, total: int, state: dict[str, Tensor]) -> None:
    """`Edit.after_step` of an adapter. All ranks ask at once; `state` is whole on each."""
    if edit.has_after_step:
        with _held_whole(adapter) as own:
            edit.after_step(own, step, total, state)


@contextlib.contextmanager
def _held_whole(adapter: Mapping[str, Weights]) -> Iterator[dict[str, Weights]]:
    """Within the block, an adapter's tensors and their gradients, whole; what is written to the tensors stays."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def held(t: Tensor) -> Tensor:
        if not is_sharded(t):
            return t
        if id(t) not in made:  # places may share it
            copy = _full(t.detach()).clone()
            copy.grad = None if t.grad is None else _full(t.grad)
            made[id(t)] = t, copy
        return made[id(t)][1]

    yield {key: {n: held(t) for n, t in w.items()} for key, w in adapter.items()}
    with torch.no_grad():
        for t, copy in made.values():
            t.copy_(parted(copy, t))


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined, no-any-return]
