"""Attention that keeps the sequences of a packed batch apart, family by family, in any decoder.

Decoders on transformers' attention interface get a function that calls scaled-dot-product attention once per family:
nothing is spent on pairs that cannot see each other. Decoders with attention of their own (GPT-J, BLOOM, Falcon) get a
dense mask. Either is registered under a name of the host's own, so that it finds that host's layout, also when
gradient checkpointing replays a layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.utils.checkpoint import checkpoint

from inlay.compat.torch import softmax_backward
from inlay.compat.transformers import (
    attention_name,
    has_attention_interface,
    register_attention,
    set_attention_name,
    unregister_attention,
    unserved,
)
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.layout import Family, Layout

SHORT = 512
"""Longest sequence (tokens) whose scores are formed whole on a CPU in 16 bits."""
COPIES = 2
"""How often the keys of a family may be copied for backward, on average, before they are gathered again there: short
answers behind a long beginning would else keep that beginning each."""


@contextlib.contextmanager
def apart(host: Host) -> Iterator[None]:
    """Within the block, packed forwards of this host attend within families only."""
    interface = has_attention_interface(host.model)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **more: Any):
        layout = host.now.layout
        if layout is None:
            raise InlayError("attention over packs met a batch that is none; leave the block `apart(host)` first")
        return attention(layout, query, key, value, **more), None

    def dense(*args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor | None:
        layout = host.now.layout
        if interface or layout is None:
            return None
        return additive(layout.sees()[:, None], dtype)

    with attending(host, f"inlay-{id(host)}", attend, dense):
        yield


@contextlib.contextmanager
def attending(host: Host, name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the base's attention and the mask it is given come from these functions."""
    config = host.model.config
    before = attention_name(config)
    register_attention(name, attend, mask)
    set_attention_name(config, name)
    try:
        yield
    finally:
        set_attention_name(config, before)
        unregister_attention(name)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, of the same shape: 0 where something is seen, else the smallest number."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def attention(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> Tensor:
    """Attention of a packed batch: q (R, H, W, D), k and v (R, H_kv, W, D) -> (R, W, H, D)."""
    if name := unserved(more):
        raise InlayError(f"attention with {name!r} cannot be packed; use engine='plain'")
    R, H, W, _ = query.shape
    sizes, pieces = _cuts(layout)
    q, k, v = (t.transpose(1, 2).flatten(0, 1).split(sizes) for t in (query, key, value))
    work = functools.partial(_path, layout, scaling=scaling, dropout=dropout, softcap=softcap, window=sliding_window)
    skips = softcap is None and not _recomputes(query)
    said: list[Tensor] = []
    for own in pieces:
        here = slice(len(said), len(said) + (1 if own is None else len(own.sizes)))
        if own is None:  # nothing is read of these columns: any numbers of the right shape do
            said += [_heads(v[here.start], H, dim=1)]
        else:
            said += _answers(own, q[here], k[here], v[here], work, skips)
    return torch.cat(said).view(R, W, H, -1)


def _answers(
    own: Family, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], work: Callable[..., Tensor], skips: bool
) -> list[Tensor]:
    """What the sequences of a family are told, from what each asks and offers (T, H, D). Sequences that continue one
    another attend as the one that they are; what several of these share asks once.

    Args:
        skips: whether attention that is plainly causal skips what is not seen, half of the work: asking again behind a
            short beginning then costs less than a mask.
    """
    paths = own.paths
    copied = sum(own.sizes[i] for path, _ in paths for i in path)
    later = torch.is_grad_enabled() and copied > COPIES * own.length
    told: dict[int, Tensor] = {}
    for path, known in paths:
        behind, ask = sum(own.sizes[i] for i in path[:known]), path[known:]
        fresh = [own.sizes[i] for i in ask]
        again = behind if skips and behind <= sum(fresh) else 0
        asking = path if again else ask
        given = (*(q[i] for i in asking), *(k[i] for i in path), *(v[i] for i in path))
        attend = functools.partial(_gathered, work, len(asking))
        out = checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False) if later else attend(*given)
        told |= zip(ask, out[again:].split(fresh), strict=True)
    return [told[i] for i in range(len(own.sizes))]


def _gathered(work: Callable[..., Tensor], asking: int, *given: Tensor) -> Tensor:
    """Attention of one path, from the parts of its queries (so many), keys and values."""
    seen = asking + (len(given) - asking) // 2
    parts = (given[:asking], given[asking:seen], given[seen:])
    return work(*(own[0] if len(own) == 1 else torch.cat(own) for own in parts))


def _path(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of one sequence's last L tokens to all T of it.

    q (L, H, D), k and v (T, H_kv, D) -> (L, H, D); keys that several heads share are not repeated where that is served.
    """
    L, T = len(q), len(k)
    near = window if window and window < T else None
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    H, groups = len(q), len(q) // len(k)
    if softcap is not None:
        k, v = _heads(k, H), _heads(v, H)
        out = capped(q, k, v, _seen(layout, L, T, near, q.device), scaling, softcap, dropout)
    elif dropout == 0 and _recomputes(k) and T <= SHORT:
        out = Recomputed.apply(q, k, v, _bias(layout, L, T, near, q), scaling or q.shape[-1] ** -0.5)
    else:
        plain = near is None and L == T
        mask = None if plain else _bias(layout, L, T, near, q)
        causal = plain and T > 1
        shares = groups > 1 and _shares_keys(q.device.type, q.dtype, mask is not None)
        if not shares:
            k, v = _heads(k, H), _heads(v, H)
        more = {"enable_gqa": True} if shares else {}
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], mask, dropout, is_causal=causal, scale=scaling, **more
        )[0]
    return out.transpose(0, 1)


def _heads(t: Tensor, H: int, dim: int = 0) -> Tensor:
    """Keys or values of grouped heads, repeated for each of the H query heads."""
    times = H // t.shape[dim]
    return t.repeat_interleave(times, dim) if times > 1 else t


@functools.cache
def _shares_keys(device: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether PyTorch's fused CPU kernel reads grouped keys as they are; asked of PyTorch once.

    Its other kernels repeat them or form all scores; there keys are repeated here, as transformers does.
    """
    if device != "cpu":
        return False
    q, kv = torch.zeros(1, 2, 4, 8, dtype=dtype), torch.zeros(1, 1, 4, 8, dtype=dtype)
    mask = torch.zeros(4, 4, dtype=dtype) if masked else None
    try:
        chosen = torch._fused_sdp_choice(q, kv, kv, mask, 0.0, not masked, enable_gqa=True)
    except (AttributeError, TypeError, RuntimeError):  # a PyTorch that has no such choice
        return False
    return chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


class Recomputed(torch.autograd.Function):
    """softmax(s q k^T + bias) v for q (H, L, D), k and v (H_kv, T, D); backward makes the probabilities again.

    Heads that share keys are read as further queries of these keys: (H_kv, G L, D) with G = H / H_kv. PyTorch's own
    kernel runs backward at a third of this speed on CPUs, for 16-bit types and short sequences.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias_LT: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias_LT)
        ctx.s = s
        p = Recomputed.p((q * s).reshape(len(k), -1, q.shape[-1]), k, bias_LT)
        return (p @ v).view(*q.shape[:2], -1)

    @staticmethod
    def p(q: Tensor, k: Tensor, bias_LT: Tensor) -> Tensor:
        """Attention probabilities (H_kv, G L, T)."""
        scores = torch.bmm(q, k.mT)
        scores.view(len(k), -1, *bias_LT.shape).add_(bias_LT)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        q, k, v, bias_LT = ctx.saved_tensors
        shape, g = q.shape, g.reshape(len(k), -1, g.shape[-1])
        qs = (q * ctx.s).reshape(len(k), -1, shape[-1])
        p = Recomputed.p(qs, k, bias_LT)
        ds = softmax_backward(torch.bmm(g, v.mT), p)
        return torch.bmm(ds, k).mul_(ctx.s).view(shape), torch.bmm(ds.mT, qs), torch.bmm(p.mT, g), None, None


def _recomputes(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype.itemsize == 2


def _bias(layout: Layout, L: int, T: int, near: int | None, like: Tensor) -> Tensor:
    """What is added to the scores of the last L of T tokens (L, T): 0 where a token is seen, else minus infinity."""

    def make() -> Tensor:
        seen = _seen(layout, L, T, near, like.device)
        return torch.zeros(L, T, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)

    return _once(layout, ("bias", L, T, near, like.dtype), make)


def _seen(layout: Layout, L: int, T: int, near: int | None, device: torch.device) -> Tensor:
    """True where one of the last L of T tokens sees another (L, T): those before it, and only so near ones if told."""

    def make() -> Tensor:
        seen = torch.ones(L, T, dtype=torch.bool, device=device).tril_(T - L)
        return seen if near is None else seen.triu_(T - L + 1 - near)

    return _once(layout, ("seen", L, T, near), make)


def _once(layout: Layout, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What the first layer makes serves the others."""
    if key not in layout.made:
        layout.made[key] = make()
    return layout.made[key]


def _cuts(layout: Layout) -> tuple[list[int], list[Family | None]]:
    """Sizes of consecutive pieces of the flattened batch, and the families in them (None: empty columns)."""
    sizes: list[int] = []
    pieces: list[Family | None] = []
    at, W = 0, layout.shape[1]
    for f in layout.families:
        begin = f.row * W + f.start
        if begin > at:
            sizes.append(begin - at)
            pieces.append(None)
        sizes += f.sizes
        pieces.append(f)
        at = begin + f.length
    if at < layout.shape[0] * W:
        sizes.append(layout.shape[0] * W - at)
        pieces.append(None)
    return sizes, pieces


def grouped(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """Attention without gradients of q (B, H, T, D) to k and v (B, H_kv, S, D) under a mask (B, 1, T, S): (B, H, T, D).
    Heads that share keys are read as further queries, so that keys are never repeated."""
    B, H, T, _ = q.shape
    if (shared := H // k.shape[1]) > 1:
        q = q.reshape(B, k.shape[1], shared * T, -1)
        sees = sees.expand(B, shared, T, -1).reshape(B, 1, shared * T, -1)
    if softcap is None:
        out = scaled_dot_product_attention(q, k, v, sees, scale=scaling)
    else:
        out = capped(q, k, v, sees, scaling, softcap, 0.0)
    return out.reshape(B, H, T, -1)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, cap: float, dropout: float) -> Tensor:
    """Gemma 2's attention: scores pass cap tanh(s / cap) before the softmax."""
    scores = q @ k.mT * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = cap * torch.tanh(scores / cap)
    p = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(p, dropout) @ v
