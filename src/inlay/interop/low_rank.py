"""Any additive adapter as low-rank factors per module: exactly where it is low-rank, else by SVD with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.edit import Call, Edit, Weights
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.place import Place, Spot

Worn = tuple[Spot, Place, Weights]
ADDITIVE = ("lora", "adalora", "vera", "loha", "lokr", "full")
"""Kinds of edit that add (a matrix) x to what a linear says."""


@dataclass(frozen=True)
class Factors:
    """scale * B A, and how far that is from the update it stands for."""

    A: Tensor
    B: Tensor
    scale: float
    error: float = 0.0
    """|B A - Delta| / |Delta|, Frobenius; 0 where the factors are the update."""

    @property
    def rank(self) -> int:
        """Inner width."""
        return self.A.shape[0]

    def folded(self, rank: int) -> Factors:
        """The same product with scale 1, padded with zeros to `rank`."""
        more = rank - self.rank
        A = nn.functional.pad(self.A, (0, 0, 0, more))
        return Factors(A, nn.functional.pad(self.B * self.scale, (0, more)), 1.0, self.error)


def worn_by_path(host: Host, name: str) -> dict[str, list[Worn]]:
    """Module path -> the adapter's places on it: one, or several parts of a fused projection. Tensors on the CPU.
    Expert parameters are no modules and left out (see `inlay.interop.peft_experts`)."""
    found: dict[str, list[Worn]] = {}
    for site in (s for s in host.sites.values() if name in s.places and s.spot.parameter is None):
        w = {k: v.detach().float().cpu() for k, v in site.tensors(name).items()}
        found.setdefault(site.spot.path, []).append((site.spot, site.places[name], w))
    return found


def whole_place(host: Host, path: str) -> Place:
    """The whole module at a path as a place, where an adapter knows only parts of it."""
    layer = host.model.get_submodule(path)
    key = next(k for k, s in host.sites.items() if s.spot.path == path)
    site = host.sites[key]
    part = site.spot.part
    d_out = site.place.d_out if part is None else site.place.d_out * part.slots // (part.hi - part.lo)

    def f(x: Tensor) -> Tensor:
        return layer.forward(x.to(host.device, host.dtype)).float().cpu()

    return replace(site.place, f=f, d_out=d_out, role="module", key=path)


def spread_rows(spot: Spot, fused: int, rows: Tensor, rest: Tensor | float = 0.0) -> Tensor:
    """Rows of a part (D_part, ...) put into a fused output of `fused` rows; the other rows hold `rest`."""
    if spot.part is None:
        return rows
    flat = rows.flatten(1).T if rows.dim() > 1 else rows[None]
    base = torch.zeros(len(flat), fused) + rest
    put = spot.part.put(base, flat)
    return put.T.reshape(fused, *rows.shape[1:])


def exact(edit: Any, place: Place, w: Weights) -> Factors | None:
    """Factors that are the update itself; None if the update is not written as a low-rank product."""
    if edit.kind == "lora":
        if "_A0" in w:  # s (B A - B0 A0) = s [B, -B0] [A; A0]
            return Factors(torch.cat([w["A"], w["_A0"]]), torch.cat([w["B"], -w["_B0"]], 1), edit.scale)
        return Factors(w["A"], w["B"], edit.scale)
    if edit.kind == "adalora":
        return Factors(w["Q"], w["P"] * w["E"], edit.alpha / edit.rank)
    if edit.kind == "vera":
        A, B = w["_A"][:, : place.d_in], w["_B"][: place.d_out]
        return Factors(w["d"][:, None] * A, w["b"][:, None] * B, 1.0)
    if edit.kind == "loha" and edit.rank**2 < min(place.d_in, place.d_out):
        left, right = edit.factors(w)
        return Factors(right, left, edit.alpha / edit.rank)
    return None


def dense(edit: Edit, place: Place, w: Weights) -> Tensor:
    """Delta (D_out, D_in) of an additive edit, read off by feeding it the identity."""
    if set(w) & {"bias", "gain", "tied"}:
        raise InlayError(
            f"{edit.kind} at {place.key!r} moves a bias, a norm or a tied embedding, which no low-rank product can"
        )
    eye = torch.eye(place.d_in)
    return edit.after(w, eye, torch.zeros(place.d_in, place.d_out), Call(place)).T


def by_svd(delta: Tensor, rank: int | None, tolerance: float = 1e-6) -> Factors:
    """The best factors of rank at most `rank`; without one, of the smallest rank with an error below `tolerance`."""
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    total = S.square().sum()
    if not total:
        return Factors(torch.zeros(1, delta.shape[1]), torch.zeros(delta.shape[0], 1), 1.0)
    left = 1 - S.square().cumsum(0) / total
    needed = int((left.clamp(min=0).sqrt() > tolerance).sum()) + 1
    r = min(needed, rank or needed, len(S))
    root = S[:r].sqrt()
    A, B = (root[:, None] * Vh[:r]).float(), (U[:, :r] * root).float()
    error = float((B.double() @ A.double() - delta).norm() / delta.norm())
    return Factors(A, B, 1.0, error)


@torch.no_grad()
def factorise(host: Host, name: str, rank: int | None = None) -> dict[str, Factors]:
    """Module path -> factors of the whole update there. Parts of a fused projection become one product of summed rank.

    Args:
        rank: the widest that is wanted. Exact factors wider than that are cut by SVD too, and their error is reported.
    """
    edit: Any = host.edits[name]
    if edit.kind not in ADDITIVE:
        raise InlayError(
            f"{name!r} is {edit.kind!r}, which does not add a matrix to a linear, so it has no plain LoRA; "
            f"these kinds have: {', '.join(ADDITIVE)}"
        )
    made = {}
    for path, places in worn_by_path(host, name).items():
        fused = whole_place(host, path).d_out
        parts = []
        for spot, place, w in places:
            f = exact(edit, place, w) or by_svd(dense(edit, place, w), rank)
            parts.append(replace(f, B=spread_rows(spot, fused, f.B)))
        made[path] = _joined(parts, rank)
    return made


def _joined(parts: list[Factors], rank: int | None) -> Factors:
    whole = parts[0]
    if len(parts) > 1:
        scale = parts[0].scale
        B = torch.cat([p.B if p.scale == scale else p.B * (p.scale / scale) for p in parts], 1)
        whole = Factors(torch.cat([p.A for p in parts]), B, scale, max(p.error for p in parts))
    if rank and whole.rank > rank:
        cut = by_svd(whole.B @ whole.A, rank)
        return replace(cut, scale=whole.scale, error=max(cut.error, whole.error))
    return whole


def widest(factors: Mapping[str, Factors]) -> int:
    """The largest rank."""
    return max(f.rank for f in factors.values())
