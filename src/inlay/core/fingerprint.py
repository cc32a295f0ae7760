"""Telling bases apart: the shape a config declares, and a few of the weights' values.

Values are compared with a tolerance that any change of floating-point type stays within, so an adapter trained on a
bfloat16 base is at home on the same base in float32. Quantised layers are left out of the sample.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from inlay.core.config import text_config

if TYPE_CHECKING:
    from inlay.core.host import Host

SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SAMPLED = ("embed", "0.o", "0.down", "last.o", "last.down")
SAMPLES = 12
ROUNDED = range(2**20, 2**24)
"""Sizes of tensors whose positions Inlay 0.1 rounded in float32, on some processors one too far."""
TOLERANCE = 2.0**-7
"""Relative; two roundings to bfloat16."""


def readable(weight: Any) -> TypeGuard[Tensor]:
    """Whether a weight is plain floating-point numbers: not quantised, not absent."""
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()


def fingerprint(host: Host) -> dict[str, Any]:
    """{"shape": config values, "values": {place: 12 sampled weights}, "next": {place: the weights after them},
    "form": what the weights are}.

    `form` is there for bases that say in their config (`base_form`) that their weights are not the published ones, such
    as dequantised ones; it goes wherever the fingerprint goes: adapters, checkpoints, evaluations. `next` is there for
    tensors in `ROUNDED` only, so that fingerprints of Inlay 0.1 are still recognised.
    """
    config = text_config(host.model.config)
    shape = {k: v for k in SHAPE if (v := getattr(config, k, None)) is not None}
    keys = {key: key.replace("last", str(host.anatomy.layers - 1)) for key in SAMPLED}
    paths = {s.key: s.path for s in host.anatomy.spots if s.part is None and s.key in keys.values()}
    layers = {key: host.model.get_submodule(paths[own]) for key, own in keys.items() if own in paths}
    weights = {key: getattr(layer, "weight", None) for key, layer in layers.items()}
    sampled = {key: w for key, w in weights.items() if readable(w) and not w.is_meta}
    following = {key: _sample(w, after=1) for key, w in sampled.items() if w.numel() in ROUNDED}
    values = {key: _sample(w) for key, w in sampled.items()}
    form = getattr(host.model.config, "base_form", None)
    optional = {"next": following, "form": form}
    return {"shape": shape, "values": values, **{k: v for k, v in optional.items() if v}}


@functools.lru_cache(maxsize=64)
def _positions(numbers: int, after: int, device: torch.device) -> Tensor:
    """`SAMPLES` evenly spaced positions in a tensor of so many numbers: integers, as float32 ends at 2^24."""
    last = numbers - 1
    exact = (i * last // (SAMPLES - 1) for i in range(SAMPLES))
    return torch.tensor([min(position + after, last) for position in exact], device=device)


def _sample(weight: Tensor, after: int = 0) -> list[float]:
    picked = weight.detach().take(_positions(weight.numel(), after, weight.device))
    return [float(f"{v:.6g}") for v in picked.float().tolist()]


def differences(theirs: dict[str, Any], ours: dict[str, Any], may_grow: bool = False) -> list[str]:
    """What tells two fingerprints apart, in words; empty if nothing does.

    Args:
        may_grow: take a base to which tokens were added, or whose vocabulary was padded, as the same: an adapter of the
            blocks computes the same there. Its embedding is then left out of the comparison.
    """
    a, b = theirs.get("shape", {}), ours["shape"]
    grown = may_grow and b.get("vocab_size", 0) > a.get("vocab_size", math.inf)
    found = [
        f"{k} is {b.get(k)!r} here and {a[k]!r} there"
        for k in a
        if k in b and a[k] != b[k] and not (grown and k == "vocab_size")
    ]
    if found:
        return found
    for key, there in theirs.get("values", {}).items():
        if grown and key == "embed":
            continue
        here = ours["values"].get(key)
        after = ours.get("next", {}).get(key, here)
        if here and not all(_close(x, y) or _close(x, z) for x, y, z in zip(there, here, after, strict=False)):
            found.append(f"the weights at {key!r} differ")
    return found


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= TOLERANCE * max(abs(x), abs(y)) + 1e-6
