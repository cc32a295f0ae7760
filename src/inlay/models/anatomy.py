"""Finding the roles of one model: from the table of families, or from its modules if the table does not know it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from inlay.core.errors import InlayError
from inlay.core.place import Anatomy, Spot
from inlay.models.experts import expert_spots
from inlay.models.families import FAMILIES, Family

SPELLINGS = {
    "q": ("q_proj", "q_attn", "query", "wq"),
    "k": ("k_proj", "k_attn", "key", "wk"),
    "v": ("v_proj", "v_attn", "value", "wv"),
    "o": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc_in", "fc1", "c_fc", "dense_h_to_4h", "w3"),
    "down": ("down_proj", "fc_out", "fc2", "dense_4h_to_h", "w2"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "gate_up": ("gate_up_proj",),
}
"""How decoders spell their linears, for the inference of roles."""


def anatomy(model: nn.Module) -> Anatomy:
    """The roles of a causal language model, by `config.model_type` or by inference from its modules."""
    kind: str = model.config.model_type  # type: ignore[union-attr,assignment]
    family = FAMILIES.get(kind) or infer(model)
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as e:
        raise InlayError(
            f"{type(model).__name__} has no {family.blocks!r}; attach to the whole causal language model"
        ) from e
    return Anatomy(kind, len(blocks), tuple(_spots(model, family, blocks)))  # type: ignore[arg-type]


def _spots(model: nn.Module, family: Family, blocks: nn.Module) -> Iterator[Spot]:
    parts = family.parts(model.config)
    yield Spot("embed", "embed", None, family.embed)
    for i, block in enumerate(blocks.children()):
        prefix = f"{family.blocks}.{i}"
        yield Spot(f"{i}.block", "block", i, prefix)
        inside = dict(block.named_modules())
        for role, path in family.roles.items():
            path, _, part = path.partition("#")
            if path in inside:
                yield Spot(f"{i}.{role}", role, i, f"{prefix}.{path}", parts[part] if part else None)
        yield from expert_spots(block, i, prefix)
        for path, module in inside.items():
            if _is_norm(module):
                yield Spot(f"{i}.norm.{path}", "norm", i, f"{prefix}.{path}")
    for path, module in model.named_modules():
        if _is_norm(module) and not path.startswith(family.blocks + "."):
            yield Spot(f"norm.{path}", "norm", None, path)
    if _has(model, family.head):
        yield Spot("head", "head", None, family.head)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


def _has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def infer(model: nn.Module) -> Family:
    """Roles read off a decoder that no table knows: its longest list of blocks, and linears by their usual spellings.

    Fused projections are offered whole (`qkv`, `gate_up`): how their parts interleave cannot be seen from outside.
    """
    lists = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and not re.search(r"\.\d+\.", n)
    }
    if not lists:
        raise InlayError(f"cannot find the blocks of {type(model).__name__}; add an entry to inlay.models.families")
    name = max(lists, key=lambda n: (len(lists[n]), -len(n)))
    roles: dict[str, str] = {}
    inside = dict(lists[name][0].named_modules())
    for role, spellings in SPELLINGS.items():
        linears = [p for p, m in inside.items() if p.split(".")[-1] in spellings and not list(m.children())]
        attention = [p for p in linears if "att" in p]
        wanted = attention if role in ("q", "k", "v", "o", "qkv") else [p for p in linears if p not in attention]
        if len(wanted) == 1:
            roles[role] = wanted[0]
    for role, pattern in (("attn", r".*att[^.]*"), ("mlp", r".*(mlp|feed_forward|ffn|moe)")):
        if found := [
            p for p in inside if "." not in p and re.fullmatch(pattern, p, re.I) and list(inside[p].children())
        ]:
            roles[role] = found[0]
    if not roles:
        raise InlayError(f"cannot read the roles of {type(model).__name__}; add an entry to inlay.models.families")
    names = {id(m): n for n, m in model.named_modules()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    embed = model.get_input_embeddings()  # type: ignore[operator]
    return Family(blocks=name, embed=names[id(embed)], head=names.get(id(head), "lm_head"), roles=roles)
