"""What adapters reach in every decoder and image-text type of the installed transformers: `python -m tests.models.coverage`
writes docs/coverage.md.

A place is reached if its adapter changes the logits. All places are asked at once: with random A and B = 0 the gradient of a
random projection of the logits with respect to B is not zero wherever a small B would change them. Places without a gradient
(a router's choice, an indexer's) are asked one by one, with a large B.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import inlay
from inlay.core.place import Spot
from tests.models import tiny_configs as tiny


@dataclass
class Row:
    """One type: what its places are, and what was reached."""

    kind: str
    auto: str
    name: str
    """Class of the model."""
    layers: int = 0
    roles: dict[str, int] = field(default_factory=dict)
    """Role -> layers that it is in."""
    reached: int = 0
    linears: int = 0
    """Linears of the blocks, and how many of them change the logits."""
    unreached: list[str] = field(default_factory=list)
    """What the coverage line lists."""
    uncalled: list[str] = field(default_factory=list)
    """Places that the forward did not call, of which it warned."""
    silent: list[str] = field(default_factory=list)
    """Places that change nothing without a word."""
    refused: list[str] = field(default_factory=list)
    """Places that were refused, with the reason."""


def excite(host: Any, name: str) -> dict[str, torch.Tensor]:
    """Random A and B = 0 at every place of an adapter; {key: B}, the only tensors that want gradients."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for key, w in host.by_place(name).items():
        for k, t in w.items():
            t.requires_grad_(k == "B")
            t.data = torch.randn(t.shape, generator=generator) if k == "A" else torch.zeros_like(t)
        found[key] = w["B"]
    return found


def dead(host: Any, name: str, row: Row) -> list[str]:
    """Keys of an adapter's places that change no logit without a word."""
    inputs, B = tiny.inputs(row.kind, row.auto), excite(host, name)
    with host.using(name), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = tiny.logits(host.model, inputs)
    uncalled = [k for k in B if not host.sites[k].called]
    if any(f"{len(uncalled)} of {len(B)} places" in str(w.message) for w in said):
        row.uncalled += uncalled
    way = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    try:
        grads = torch.autograd.grad((y * way).sum(), list(B.values()), allow_unused=True)
    except RuntimeError:  # RWKV and xLSTM write in place, Reformer recomputes: no gradients on a frozen base
        grads = (None,) * len(B)
    quiet = [k for k, g in zip(B, grads, strict=True) if g is None or not g.isfinite().all() or not g.abs().max() > 0]
    return [k for k in quiet if k not in row.uncalled and not _changes(host, name, B[k], inputs, y.detach())]


@torch.no_grad()
def _changes(host: Any, name: str, B: torch.Tensor, inputs: dict, bare: torch.Tensor) -> bool:
    """Whether a large B changes the logits."""
    try:
        for seed in range(3):
            B.normal_(std=30.0, generator=torch.Generator().manual_seed(seed))
            with host.using(name):
                if not torch.equal(tiny.logits(host.model, inputs), bare):
                    return True
        return False
    finally:
        B.zero_()


def hung(model: Any, name: str, at: Any, host: Any = None) -> tuple[Any, list[str]]:
    """A host that wears a LoRA there, and what was said."""
    host = host or inlay.attach(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        host.add(name, inlay.method("lora").make(rank=1), at=at, seed=0)
    return host, [str(w.message) for w in said]


def measure(kind: str, auto: str, every_role: bool = False) -> Row:
    """One type: its linears, and with `every_role` every other place as well."""
    model = tiny.model(kind, auto)
    row = Row(kind, auto, type(model).__name__)
    host, said = hung(model, "linear", "linear")
    spots = {s.key: s for s in host.anatomy.spots}
    row.layers = host.anatomy.layers
    for s in host.anatomy.spots:
        row.roles.setdefault(s.role, len({t.layer for t in host.anatomy.spots if t.role == s.role}))
    row.unreached = list(host.anatomy.unreached)
    row.linears = len(host.by_place("linear"))
    row.silent = dead(host, "linear", row)
    row.reached = row.linears - len(row.silent) - len(row.uncalled)
    if row.unreached and not any("linear" in w for w in said):
        row.silent += row.unreached
    host.remove("linear")
    if every_role:
        _others(row, host, spots)
    return row


def _others(row: Row, host: Any, spots: dict[str, Spot]) -> None:
    """The places that are no linears of the blocks: sub-layers, norms, ends. What is refused names its place."""
    keys = [k for k, s in spots.items() if not s.linear and not s.tower]
    while keys:
        try:
            hung(host.model, "others", keys, host)
            row.silent += dead(host, "others", row)
            host.remove("others")
            return
        except inlay.InlayError as e:
            if "others" in host.edits:
                host.remove("others")
            named = [k for k in keys if repr(k) in str(e)]
            if not named:
                raise
            row.refused += [f"{k}: {e}" for k in named]
            keys = [k for k in keys if spots[k].role != spots[named[0]].role]


def peft_linears(model: Any) -> set[str]:
    """Paths that PEFT's `target_modules="all-linear"` names: an independent list of a model's linears."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from transformers.pytorch_utils import Conv1D

    chosen = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    ends = {t for t in chosen}
    return {
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and any(n == t or n.endswith(f".{t}") for t in ends)
    }


def kinds() -> Iterator[tuple[str, str]]:
    """Every type that can be built."""
    return ((k, a) for k, a in tiny.kinds() if k not in tiny.UNBUILT)
