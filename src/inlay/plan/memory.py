"""An estimate of training memory, by formula; docs/plan.md has the formula and compares it with real counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from inlay.core.config import text_config
from inlay.core.errors import unknown
from inlay.core.host import Host
from inlay.core.place import Place, Spot, widths

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.5625}
"""Bytes per weight; nf4 counts one fp32 scale per 64. int8 and nf4 apply to linears inside blocks, the rest is bf16."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while an adapter is trained with AdamW; an estimate, without the allocator's own overhead."""

    weights: int
    """The frozen base."""
    adapter: int
    """The adapter, fp32."""
    gradients: int
    """Its gradients, fp32."""
    optimizer: int
    """AdamW's two moments, fp32."""
    activations: int
    """What autograd keeps of the blocks."""
    logits: int
    """Logits, their fp32 copy, log-softmax and gradient."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.logits


def estimate(
    host: Host, name: str, *, dtype: str = "bf16", batch: int = 1, length: int = 512, checkpointing: bool = False
) -> Memory:
    """Memory to train the adapter `name` of a host on batches of `batch` rows of `length` tokens."""
    if dtype not in BYTES:
        raise unknown("dtype", dtype, BYTES)
    b = 4 if dtype == "fp32" else 2
    n = batch * (length + host.edits[name].room)
    count, stored = host.count(name), sum(t.numel() for t in host.tensors(name).values())
    vocabulary = text_config(host.model.config).vocab_size
    return Memory(
        weights=weight_bytes(host, dtype),
        adapter=4 * stored,
        gradients=4 * count,
        optimizer=8 * count,
        activations=n * per_token(host, name, b, checkpointing),
        logits=n * vocabulary * (b + 12),
    )


def weight_bytes(host: Host, dtype: str) -> int:
    """Bytes of the frozen weights."""
    worn = {id(p) for p in host.parameters()}
    plain = 2.0 if dtype in ("int8", "nf4") else BYTES[dtype]
    linears = {
        id(m.weight)
        for path, m in host.model.named_modules()
        if hasattr(m, "in_features") and "head" not in path.split(".")[-1]
    }
    return int(
        sum(
            p.numel() * (BYTES[dtype] if id(p) in linears else plain)
            for p in host.model.parameters()
            if id(p) not in worn
        )
    )


def per_token(host: Host, name: str, b: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps per token: blocks from the first adapted one on, or their inputs and one block."""
    by_layer: dict[int, int] = {}
    first = host.anatomy.layers
    for site in host.sites.values():
        if name in site.places:
            layer = -1 if site.spot.role == "embed" or site.spot.tower else site.spot.layer
            layer = host.anatomy.layers if layer is None else layer
            # Gradients begin at the adapter: behind a block's last linear, nothing of that block needs to be kept.
            first = min(first, layer + (site.spot.role in ("embed", "down", "mlp", "block")))
            by_layer[layer] = by_layer.get(layer, 0) + _adapter_bytes(host, name, site.places[name])
    blocks = range(first, host.anatomy.layers)
    block = _block_bytes(host, b)
    whole = {i: (block if i in blocks else 0) + by_layer.get(i, 0) for i in range(host.anatomy.layers)}
    if checkpointing:
        return len(blocks) * b * host.hidden + max(whole.values(), default=0)
    return sum(whole.values())


def _adapter_bytes(host: Host, name: str, place: Place) -> int:
    """An edit keeps an fp32 copy of what it reads, and its inner values."""
    edit = host.edits[name]
    if edit.room:
        return 0
    wiring = edit.wiring_of(place)
    if place.role == "embed":
        read = 0
    elif wiring == "output" or edit.kind == "road":
        read = place.d_out
    elif edit.kind == "road-lora":
        read = place.d_out + place.d_in
    else:
        read = place.d_in
    inner = getattr(edit, "rank", 0) + 2 * getattr(edit, "size", 0)
    each = _experts_per_token(host) if place.experts else 1
    return 4 * each * (read + inner)


def _experts_per_token(host: Host) -> int:
    config = host.model.config.get_text_config()  # type: ignore[union-attr,operator]
    return getattr(config, "num_experts_per_tok", None) or 1


def _block_bytes(host: Host, b: int) -> int:
    """One frozen block: norms, fused attention, the MLP's non-linearity; no linear keeps its input."""
    h, w = host.hidden, _widths(host)
    norms = [s for s in host.anatomy.spots if s.role == "norm" and s.layer == 0]
    rms = "RMS" in type(host.model.get_submodule(norms[0].path)).__name__ if norms else False
    norm = len(norms) * h * (4 if rms else b)
    q, k, v = (w.get(role, h) for role in "qkv")
    attention = b * (2 * q + k + v)
    config = text_config(host.model.config)
    experts = getattr(config, "num_experts_per_tok", None) if "down" not in w else None
    inner = experts * _expert_width(config) if experts else w.get("down", 4 * h)
    act = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or "")
    gated = experts or "gate" in w or "gate_up" in w
    # gated: the gate, its activation and `up`; GELUs written out in Python keep more than a fused kernel does
    kept = 3 if gated else 5 if act in ("gelu_new", "gelu_fast") else 2 if host.anatomy.family == "bloom" else 1
    return norm + attention + b * kept * inner


def _expert_width(config) -> int:
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def _widths(host: Host) -> dict[str, int]:
    """role -> width in block 0: what q, k, v give and what `down` reads."""
    found = {}
    for s in host.anatomy.spots:
        if s.layer == 0 and s.role in ("q", "k", "v", "gate", "gate_up", "down"):
            d_in, d_out = _of(host, s)
            found[s.role] = d_in if s.role == "down" else d_out
    return found


def _of(host: Host, spot: Spot) -> tuple[int, int]:
    module: nn.Module = host.model.get_submodule(spot.path)
    d_in, d_out = widths(module, host.hidden)
    return d_in, spot.part.width(d_out) if spot.part else d_out
