"""Telling bases apart: the shape a config declares, and a few of the weights' values.

Values are compared with a tolerance that any change of floating-point type stays within, so an adapter trained on a
bfloat16 base is at home on the same base in float32. Quantised layers are left out of the sample.
"""

from __future__ import annotations

import functools
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
TOLERANCE = 2.0**-7
"""Relative; two roundings to bfloat16."""


def readable(weight: Any) -> TypeGuard[Tensor]:
    """Whether a weight is plain floating-point numbers: not quantised, not absent."""
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()


def fingerprint(host: Host) -> dict[str, Any]:
    """{"shape": config values, "values": {place: 12 sampled weights}}."""
    config = text_config(host.model.config)
    shape = {k: v for k in SHAPE if (v := getattr(config, k, None)) is not None}
    keys = {key: key.replace("last", str(host.anatomy.layers - 1)) for key in SAMPLED}
    paths = {s.key: s.path for s in host.anatomy.spots if s.part is None and s.key in keys.values()}
    layers = {key: host.model.get_submodule(paths[own]) for key, own in keys.items() if own in paths}
    weights = {key: getattr(layer, "weight", None) for key, layer in layers.items()}
    return {"shape": shape, "values": {key: _sample(w) for key, w in weights.items() if readable(w) and not w.is_meta}}


@functools.lru_cache(maxsize=64)
def _picks(numbers: int, device: torch.device) -> Tensor:
    return torch.linspace(0, numbers - 1, 12, device=device).long()


def _sample(weight: Tensor) -> list[float]:
    picked = weight.detach().take(_picks(weight.numel(), weight.device))
    return [float(f"{v:.6g}") for v in picked.float().tolist()]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What tells two fingerprints apart, in words; empty if nothing does."""
    a, b = theirs.get("shape", {}), ours["shape"]
    found = [f"{k} is {b.get(k)!r} here and {a[k]!r} there" for k in a if k in b and a[k] != b[k]]
    if found:
        return found
    for key, there in theirs.get("values", {}).items():
        here = ours["values"].get(key)
        if here and any(abs(x - y) > TOLERANCE * max(abs(x), abs(y)) + 1e-6 for x, y in zip(there, here, strict=False)):
            found.append(f"the weights at {key!r} differ")
    return found
