"""Frozen linears computed together with the low-rank edits that hang on them, and with their neighbours.

Layers that read one input (q, k, v; gate, up) are one node of the graph: A x of all of them is one product, the input's
gradient is summed by the products themselves, and no edit is added in a pass of its own. What is fused says so to its
site (`Site.spoken`). Edits that are not low-rank, mixed batches and layers with hooks go the ordinary way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.torch import observed
from inlay.core.edit import LowRank
from inlay.core.host import Host
from inlay.core.product import add_product, product
from inlay.core.site import Site
from inlay.engine.linear import forwards, frozen, plain, weight_of
from inlay.engine.steady import Map, Steady, gain_gradient, mapped, turn_gradients

EACH = 5
"""Tensors of an edit that learn."""
GROUPS = (("q", "k", "v"), ("gate", "up"), ("o",), ("down",))
"""Roles of a block whose layers read one input."""


class Linears(torch.autograd.Function):
    """For each i: gain_i * (W_i x + s_i B_i A_i x) + b_i, x (N, D_in), or R_i (W_i x + b_i).

    Arguments after x: (W, b) of each, its s, its `Map` (None: the gain is applied to what W says), then A, B, gain,
    angle and length of each, None where it has none. W, b and maps are constants.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        layers: Sequence[tuple[Tensor, Tensor | None]],
        scales: Sequence[float],
        maps: Sequence[Map | None],
        *edits,
    ):
        edits = [edits[i : i + EACH] for i in range(0, len(edits), EACH)]  # type: ignore[assignment]
        tall = [A for A, *_ in edits if A is not None]
        h = product(x, _cat(tall)).split([len(A) for A in tall], -1) if tall else ()
        thin = iter(h)
        said, before = [], []
        for (W, b), s, map_, (A, B, gain, _, _) in zip(layers, scales, maps, edits, strict=True):
            y = product(x, W, b if gain is None else None) if map_ is None else product(x, map_.W, map_.b)
            if A is not None:
                add_product(y, next(thin), map_.B if map_ is not None and map_.B is not None else B, s)
            before.append(None if map_ is None and gain is None else y)
            said.append(y if gain is None or map_ is not None else _gained(y, gain, b))
        ctx.save_for_backward(
            x,
            *(W if map_ is None else map_.W for (W, _), map_ in zip(layers, maps, strict=True)),
            *(t for e in edits for t in e),
            *before,
            *h,
        )
        ctx.scales, ctx.maps = scales, [None if m is None else (m.b, m.B) for m in maps]
        ctx.set_materialize_grads(False)
        return tuple(said)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        n = len(ctx.scales)
        x, *rest = ctx.saved_tensors
        Ws, edits, rest = rest[:n], rest[n : (1 + EACH) * n], rest[(1 + EACH) * n :]
        before, h = rest[:n], iter(rest[n:])
        found: list[Tensor | None] = [None] * (EACH * n)
        slim: list[tuple[int, Tensor, Tensor]] = []
        dx = None
        for i, g in enumerate(grads):
            at = EACH * i
            A, B, gain, angle, length = edits[at : at + EACH]
            own = next(h) if A is not None else None
            if g is None:
                continue
            g = g.contiguous()
            if angle is not None:
                found[at + 3], found[at + 4] = turn_gradients(g, before[i], length)
            elif gain is not None and ctx.maps[i]:
                found[at + 2] = gain_gradient(g, before[i], gain, ctx.maps[i][0])
            elif gain is not None:
                found[at + 2] = (g * before[i]).sum(0, dtype=gain.dtype)
                g = _gained(g, gain, None)
            if ctx.needs_input_grad[0]:
                dx = product(g, Ws[i].t()) if dx is None else add_product(dx, g, Ws[i].t())
            if own is not None:
                mapped_B = B if ctx.maps[i] is None else ctx.maps[i][1]
                slim.append((i, A, product(g, (ctx.scales[i] * mapped_B).t())))
                # As (R, D_out), transposed: the product with few rows is the fast one.
                dB = product(own.t(), g.t()).t().mul_(ctx.scales[i])
                found[at + 1] = dB if ctx.maps[i] is None else (gain[:, None] * dB).to(B.dtype)
        if slim:
            dh = torch.cat([t for _, _, t in slim], -1) if len(slim) > 1 else slim[0][2]
            if dx is not None:
                add_product(dx, dh, _cat([A for _, A, _ in slim]).t())
            dA = product(dh.t(), x.t()).split([len(A) for _, A, _ in slim])
            for (i, _, _), part in zip(slim, dA, strict=True):
                found[EACH * i] = part
        return dx, None, None, None, *found


def _cat(tall: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tall)) if len(tall) > 1 else tall[0]


def _gained(y: Tensor, gain: Tensor, b: Tensor | None) -> Tensor:
    """gain * y + b. In 16 bits as y + (gain - 1) y: a small step away from 1 is not lost in rounding."""
    if y.dtype.itemsize > 2:
        return gain * y if b is None else torch.addcmul(b, y, gain)
    out = torch.addcmul(y, y, (gain - 1).to(y.dtype))
    return out if b is None else out.add_(b)


class _Group:
    """Layers of one block that are given the same tensor, one after another."""

    def __init__(self, host: Host, members: Sequence[tuple[Any, Site | None]], steady: Steady | None):
        self.host, self.members, self.steady = host, list(members), steady
        self.together = len(members) > 1
        """Until it turns out that they are not given the same."""
        self._called: int | None = None
        self._x: tuple[Tensor, int] | None = None
        self._said: dict[int, tuple[Tensor, bool]] = {}

    def hook(self, i: int, *_: Any) -> None:
        """Before a layer is called as a module: `forward` alone is how an edit asks for the bare layer."""
        self._called = i

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Stands in for the forward of member i."""
        m, site = self.members[i]
        called, self._called = self._called == i, None
        if not called or not _fit(m, site, x):
            return plain(m, x)
        ready = self._x is not None and self._x[0] is x and self._x[1] == x._version
        if not (ready and i in self._said):
            self._compute(i, x)
        y, spoken = self._said.pop(i)
        if not self._said:
            self._x = None
        if site is not None:
            site.spoken = spoken
        return y

    def forget(self) -> None:
        """Drop what nobody has come for."""
        self._x, self._said, self._called = None, {}, None
        for _, site in self.members:
            if site is not None:
                site.spoken = False

    def _compute(self, i: int, x: Tensor) -> None:
        if self._said and not self._replayed():  # replays may stop halfway
            self.together = False
        which = [
            j for j, (m, s) in enumerate(self.members) if j == i or (self.together and _fit(m, s, x) and not _before(s))
        ]
        layers = [(weight_of(self.members[j][0]), self.members[j][0].bias) for j in which]
        forms, maps = [], []
        for j, (W, b) in zip(which, layers, strict=True):
            form, map_ = self._form(j, x, W, b)
            forms.append(form)
            maps.append(map_)
        flat = [t for f in forms for t in ((f.A, f.B, f.gain, *(f.turn or (None, None))) if f else (None,) * EACH)]
        scales = [f.s if f else 0.0 for f in forms]
        ys = Linears.apply(x.flatten(0, -2), layers, scales, maps, *flat)
        self._said = {
            j: (y.unflatten(0, x.shape[:-1]), f is not None) for j, y, f in zip(which, ys, forms, strict=True)
        }
        self._x = x, x._version

    def _replayed(self) -> bool:
        return any(m.gradient_checkpointing for m in self.host._checkpointed)

    def _form(self, j: int, x: Tensor, W: Tensor, b: Tensor | None) -> tuple[LowRank | None, Map | None]:
        """The edit of member j, its norm in its gain, and the layer under it where that pays."""
        site = self.members[j][1]
        form = None if site is None else site.low_rank(x)
        if site is None or form is None or (form.gain is None and form.turn is None):
            return form, None
        state = (
            tuple(getattr(step, "name", None) for step in self.host.now.steps),
            tuple(t._version for t in site.wear.parameters()),
        )
        if form.norm is not None:
            norm = form.norm() if self.steady is None else self.steady.get((site, "norm"), state, form.norm)
            assert form.gain is not None
            form = replace(form, gain=form.gain / norm)
        map_ = None
        if self._pays(x):
            gain, own = form.gain, form
            map_ = self.steady.get((site, "map"), state, lambda: mapped(W, b, own, gain))  # type: ignore[union-attr]
        return (None if map_ is None and form.turn is not None else form), map_

    def _pays(self, x: Tensor) -> bool:
        """Whether a copy of the weight costs less than passes over what it says, in memory as well."""
        tokens, wide = x.shape[:-1].numel(), x.shape[-1]
        return self.steady is not None and torch.is_grad_enabled() and 2 * tokens >= wide and not self._replayed()


def _before(site: Site | None) -> bool:
    return site is not None and site.edits_input


def _fit(m: Any, site: Site | None, x: Tensor) -> bool:
    """Whether nothing stands between a layer's forward and its site."""
    hooks = len(m._forward_hooks) == (
        site is not None
    )  # hooks before it change what the forward and the site see alike
    same = x.dtype == m.weight.dtype and x.device == m.weight.device and not x.is_inference()
    return hooks and same and not observed() and not torch.is_autocast_enabled(x.device.type)


@contextlib.contextmanager
def fused_linears(host: Host, steady: Steady | None = None) -> Iterator[None]:
    """Within the block, the frozen linears of the blocks compute in groups, together with low-rank edits.

    Args:
        steady: where to keep what serves all packs of a step.
    """
    sites = {s.spot.path: s for s in host.sites.values() if s.spot.part is None}
    cut = {s.path for s in host.anatomy.spots if s.part is not None and s.key in host.sites}
    groups: list[_Group] = []
    for layer in range(host.anatomy.layers):
        own = {s.role: s.path for s in host.anatomy.spots if s.layer == layer and s.part is None}
        for roles in GROUPS:
            paths = [own[r] for r in roles if r in own and own[r] not in cut]
            members = [(host.model.get_submodule(p), sites.get(p)) for p in paths]
            groups += [_Group(host, [mm for mm in members if frozen(mm[0])], steady)]
    of: dict[nn.Module, Any] = {}
    with contextlib.ExitStack() as stack:
        if steady is not None:
            stack.callback(steady.clear)
        for g in groups:
            stack.callback(g.forget)
            for i, (m, _) in enumerate(g.members):
                of[m] = functools.partial(g.forward, i)
                stack.callback(m.register_forward_pre_hook(functools.partial(g.hook, i)).remove)
        stack.enter_context(forwards(of))
        yield
