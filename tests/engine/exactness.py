"""Gradients of two ways of training, and how exact each is against float64."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import inlay
from inlay.train.ways import Plain
from tests.laws.zoo import base, dressed, methods, places, small
from tests.train.tiny import Row

FACTOR = 16.0
"""How many times as far from float64 a way may be as the plain one. Both distances are chance: over every method and
family the ratio stays below 9."""


def gradients(host, name, way, budget_rows) -> tuple[float, dict[str, Tensor]]:
    """Loss of a step over several forwards, and the gradient of every tensor."""
    total = 0.0
    with host.using(name), way.active():
        for part in way.split(budget_rows):
            loss = way.loss(part)
            loss.backward()
            total += loss.item()
    found = {}
    for key, t in host.tensors(name).items():
        if t.grad is not None:
            found[key], t.grad = t.grad, None
    return total, found


@functools.lru_cache(maxsize=4)
def doubled(family: str):
    """`dressed(family)` in float64, with the same numbers in every tensor."""
    single, host = dressed(family), inlay.attach(base(family).double())
    for name in methods(family):
        host.add(name, small(name), at=places(name, family), seed=0)
        host.fill(name, {k: t.double() for k, t in single.tensors(name).items()})
    return host


@functools.cache
def _exact(family: str, name: str, rows: tuple) -> tuple[float, dict[str, Tensor]]:
    host = doubled(family)
    return gradients(host, name, Plain(host, 0, 1), [Row(list(ids), list(labels)) for ids, labels in rows])


def exact_gradients(family: str, name: str, rows: Sequence) -> tuple[float, dict[str, Tensor]]:
    """What `gradients` of `dressed(family)` should be: in float64, one row at a time, the plain way."""
    return _exact(family, name, tuple((tuple(r.input_ids), tuple(r.labels)) for r in rows))


def assert_as_exact(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], msg: str = ""
) -> None:
    """Each gradient is about as near to float64's as the plain way's, whatever kernels either went through.

    |got - exact| <= FACTOR max(|plain - exact|, r |exact|) for each tensor, in the Euclidean norm, where r is the plain
    way's relative error over all tensors: one tensor's may be small by luck. A tensor of one number (a gate's bias) is
    a sum that may cancel; in place of its own size stands that of the adapter's numbers, in the quadratic mean.
    """
    assert got.keys() == plain.keys() == exact.keys(), msg
    wrong = {k: float((plain[k] - g).norm()) for k, g in exact.items()}
    every = float(torch.cat([g.flatten() for g in exact.values()]).square().mean().sqrt())
    size = {k: float(g.norm()) if g.numel() > 1 else max(float(g.norm()), every) for k, g in exact.items()}
    relative = torch.tensor([*wrong.values()]).norm() / torch.tensor([*size.values()]).norm()
    relative = max(float(relative), torch.finfo(torch.float32).eps)
    for key, g in exact.items():
        found, bound = float((got[key] - g).norm()), FACTOR * max(wrong[key], relative * size[key])
        assert found <= bound, f"{msg} {key}: {found:.2e} from float64 where {bound:.2e} is allowed, of {size[key]:.2e}"
