"""Attention that keeps the sequences of a packed batch apart, family by family, in any decoder.

Decoders on transformers' attention interface get a function that calls scaled-dot-product attention once per family:
nothing is spent on pairs that cannot see each other. Decoders with attention of their own (GPT-J, BLOOM, Falcon) get a
dense mask. Either is registered under a name of the host's own, so that it finds that host's layout, also when
gradient checkpointing replays a layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.layout import Family, Layout

SHORT = 512
"""Longest sequence (tokens) whose scores are formed whole on a CPU in 16 bits."""
UNKNOWN = ("s_aux", "position_bias")
"""Arguments of attention interfaces that change the mathematics and are not served here."""


def strange(arguments: Mapping[str, Any]) -> str | None:
    """The first argument given to an attention that is not served here."""
    return next((n for n in UNKNOWN if arguments.get(n) is not None), None)


def has_interface(model: Any) -> bool:
    """Whether a decoder's attention is looked up by name, so that another one can take its place."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


@contextlib.contextmanager
def apart(host: Host) -> Iterator[None]:
    """Within the block, packed forwards of this host attend within families only."""
    interface = has_interface(host.model)

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
    from transformers import AttentionInterface, AttentionMaskInterface

    config = host.model.config
    before = config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    set_attention(config, name)
    try:
        yield
    finally:
        set_attention(config, before)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def set_attention(config: Any, name: str | None) -> None:
    """Set the implementation of a config and its parts, past the checks that ask for built-in names."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._attn_implementation_internal = name


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
    if name := strange(more):
        raise InlayError(f"attention with {name!r} cannot be packed; use engine='plain'")
    R, H, W, _ = query.shape
    if (times := H // key.shape[1]) > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    sizes, pieces = _cuts(layout)
    parts = [t.split(sizes) for t in (q, k, v)]
    said = []
    for own, q_, k_, v_ in zip(pieces, *parts, strict=True):
        if own is None:
            said.append(v_)
            continue
        q_, k_, v_ = (t.transpose(0, 1) for t in (q_, k_, v_))
        mask = _seen(layout, own, sliding_window, query.device)
        if softcap is not None:
            out = capped(q_, k_, v_, mask, scaling, softcap, dropout)
        elif dropout == 0 and _short(q_):
            bias = _bias(layout, own, sliding_window, mask, q_)
            out = Recomputed.apply(q_, k_, v_, bias, scaling or q_.shape[-1] ** -0.5)
        else:
            causal = mask is None and own.length > 1
            out = scaled_dot_product_attention(
                q_[None], k_[None], v_[None], mask, dropout, is_causal=causal, scale=scaling
            )[0]
        said.append(out.transpose(0, 1))
    return torch.cat(said).view(R, W, H, -1)


class Recomputed(torch.autograd.Function):
    """softmax(s q k^T + bias) v for q, k, v (H, T, D); the probabilities are made again in backward, not kept.

    PyTorch's own kernel runs backward at a third of this speed on CPUs, for 16-bit types and short sequences.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias_TT: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias_TT)
        ctx.s = s
        return Recomputed.p(q * s, k, bias_TT) @ v

    @staticmethod
    def p(q: Tensor, k: Tensor, bias_TT: Tensor) -> Tensor:
        """Attention probabilities (H, T, T)."""
        return torch.bmm(q, k.mT).add_(bias_TT).softmax(-1)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        q, k, v, bias_TT = ctx.saved_tensors
        qs = q * ctx.s
        p = Recomputed.p(qs, k, bias_TT)
        ds = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
        return torch.bmm(ds, k).mul_(ctx.s), torch.bmm(ds.mT, qs), torch.bmm(p.mT, g), None, None


def _short(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[1] <= SHORT


def _bias(layout: Layout, own: Family, window: int | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """What is added to the scores of q (H, T, D): 0 where a token is seen, minus infinity elsewhere."""

    def make() -> Tensor:
        T = like.shape[1]
        if mask is None:
            return torch.full((T, T), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)
        return torch.zeros(T, T, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)

    return _once(layout, ("bias", _shape(own, window), like.dtype), make)


def _shape(own: Family, window: int | None) -> Any:
    """What a family's mask depends on."""
    near = window if window and own.length > window else None
    return (own.length, near) if own.mask_TT is None else (own.row, own.start, near)


def _once(layout: Layout, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What the first layer makes serves the others."""
    if key not in layout.made:
        layout.made[key] = make()
    return layout.made[key]


def _cuts(layout: Layout) -> tuple[list[int], list[Family | None]]:
    """Sizes of consecutive pieces of the flattened batch, and the family in each (None: empty columns)."""
    sizes: list[int] = []
    pieces: list[Family | None] = []
    at, W = 0, layout.shape[1]
    for f in layout.families:
        begin = f.row * W + f.start
        if begin > at:
            sizes.append(begin - at)
            pieces.append(None)
        sizes.append(f.length)
        pieces.append(f)
        at = begin + f.length
    if at < layout.shape[0] * W:
        sizes.append(layout.shape[0] * W - at)
        pieces.append(None)
    return sizes, pieces


def _seen(layout: Layout, own: Family, window: int | None, device: torch.device) -> Tensor | None:
    """A family's mask (T, T); None where plain causality says it all."""
    if not window or own.length <= window:
        return own.mask_TT
    if own.mask_TT is not None:
        raise InlayError("sequences that continue others cannot be longer than the sliding window")

    def make() -> Tensor:
        return torch.ones(own.length, own.length, dtype=torch.bool, device=device).tril_().triu_(1 - window)

    return _once(layout, ("seen", _shape(own, window)), make)


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


def capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, cap: float, dropout: float
) -> Tensor:
    """Gemma 2's attention: scores pass cap tanh(s / cap) before the softmax."""
    scores = q @ k.mT * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = cap * torch.tanh(scores / cap)
    T = q.shape[-2]
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril_() if mask is None else mask
    p = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(p, dropout) @ v
