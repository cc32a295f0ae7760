"""Finding the expert parameters of a mixture-of-experts block, and their roles.

transformers keeps the matrices of all experts in one 3-D parameter each: `gate_up_proj` (E, 2 I, H) and `down_proj`
(E, H, I), or transposed (GPT-OSS, Llama 4), or `up_proj` without a gate (Nemotron-H). Their roles are
`experts.gate_up`, `experts.down`, `experts.up`; `experts` names them all. How one is stored is established when an
adapter hangs there (`inlay.core.experts.expert_layout`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from inlay.core.experts import FLOATS, INPUTS, OUTPUT
from inlay.core.place import Spot


def expert_parameters(block: nn.Module) -> list[tuple[str, str]]:
    """(module path in the block, parameter name) of every 3-D parameter of experts, in the module's order.

    Those are 3-D floating-point parameters that stand beside others by the usual names, or whose module declares as
    many experts as they have matrices.
    """
    found = []
    for path, module in block.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.dtype in FLOATS}
        usual = OUTPUT in own and any(k in own for k in INPUTS)
        experts = getattr(module, "num_experts", None)
        found += [(path, k) for k, p in own.items() if (usual and k in (*INPUTS, OUTPUT)) or len(p) == experts]
    return found


def expert_spots(block: nn.Module, layer: int, prefix: str) -> Iterator[Spot]:
    """The spots at the expert parameters of one block, whose path is `prefix`."""
    found = expert_parameters(block)
    short = [f"experts.{name.removesuffix('_proj')}" for _, name in found]
    often = Counter(short)
    for (path, name), role in zip(found, short, strict=True):
        # Two such modules in a block (routed and shared experts, attention by experts) are told apart by their paths.
        own = role if often[role] == 1 else f"experts.{path}.{name.removesuffix('_proj')}"
        yield Spot(f"{layer}.{own}", own, layer, f"{prefix}.{path}".rstrip("."), parameter=name)
