"""Naming the linears and sub-layers of one decoder block: by their usual spellings, else by their module names.

Nothing is left without a name: `linear` is every linear of a block, whatever it is called.

| name | what |
|---|---|
| `q k v o qkv` | projections of attention; `q_a q_b kv_a kv_b` the factors of latent attention (MLA) |
| `gate up down gate_up` | the MLP |
| `shared_gate shared_up ...` | the expert of every token; `expert_gate ...` experts that are layers |
| `router` | what scores the experts, where it is a layer |
| `cross_q cross_k ...` | attention to an encoder or to pictures |
| `indexer_... compressor_...` | the helpers of sparse attention |
| others | the module's own name: `in_proj`, `x_proj`, `out_proj` of a state-space layer |
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

ATTENTION = {
    "q": ("q_proj", "q_attn", "query", "query_proj", "wq", "q_lin", "q", "project_q"),
    "k": ("k_proj", "k_attn", "key", "key_proj", "wk", "k_lin", "k", "project_k"),
    "v": ("v_proj", "v_attn", "value", "value_proj", "wv", "v_lin", "v", "project_v"),
    "o": (
        "o_proj",
        "out_proj",
        "c_proj",
        "dense",
        "wo",
        "out_lin",
        "o",
        "attention_out",
        "output",
        "linear_out",
        "proj",
        "projection",
    ),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv"),
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj", "kv_a_proj_with_mqa"),
    "kv_b": ("kv_b_proj",),
    "kv": ("kv_proj",),
}
MLP = {
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "fc_in", "fc1", "c_fc", "dense_h_to_4h", "w3", "wi", "wi_1", "lin1", "linear_fc1"),
    "down": ("down_proj", "fc_out", "fc2", "c_proj", "dense_4h_to_h", "w2", "wo", "lin2", "linear_fc2"),
    "gate_up": ("gate_up_proj",),
}
"""Role -> names that decoders give it, in lower case."""

GENERIC = ("linear", "lin", "proj", "layer", "dense", "wg", "classifier", "fc")
"""Module names that say nothing without their parent's."""

SHARED = re.compile(r"shared?_(experts?|mlp)|shared_experts?")
CROSS = re.compile(r"cross|enc(oder)?_?(dec_)?att|EncDec", re.I)
LINEAR_ATTENTION = re.compile(r"linear_attn|DeltaNet|LinearAttention|Lightning|mamba|lstm", re.I)
FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn|moe|experts?", re.I)
HELPERS = ("indexer", "compressor", "forget_gate")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix product: `nn.Linear`, `Conv1D`, a quantised linear; not what just inherits it."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")) and not hasattr(module, "nf"):
        return False
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # `nn.MultiheadAttention` reads its weight and never calls it
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return not own_forward or _says_what_a_linear_says(module)


@torch.no_grad()
def _says_what_a_linear_says(module: Any) -> bool:
    """Routers and grouped products inherit from `nn.Linear`, too: two random rows tell them apart. Quantised weights
    are not compared."""
    weight, kind = module.weight, type(module)
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        return True
    if kind not in _PLAIN:
        x = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
        try:
            y = module.forward(x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            y = None
        want = nn.functional.linear(x, weight, module.bias)
        alike = isinstance(y, torch.Tensor) and y.shape == want.shape
        _PLAIN[kind] = alike and (want.is_meta or torch.allclose(y.float(), want.float(), rtol=1e-2, atol=1e-3))
    return _PLAIN[kind]


_PLAIN: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""Class that inherits from `nn.Linear` -> whether it computes the same."""


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """{path in the block: linear}, in the block's order; without those that are never called."""
    modules = dict(block.named_modules())
    return {p: m for p, m in modules.items() if p and is_linear(m) and not _only_read(p, modules)}


def _only_read(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layer above multiplies by this linear's weight instead of calling it (Mamba's `dt_proj`), as its
    source says: hooks would not run. A source that cannot be read says nothing."""
    above, _, leaf = path.rpartition(".")
    return leaf.isidentifier() and _reads(type(modules[above]), leaf)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _reads(kind: type, leaf: str) -> bool:
    try:
        source = "".join(inspect.getsource(c) for c in kind.__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
    except (OSError, TypeError):
        return False
    weight = rf"self\.{leaf}\.weight"
    multiplied = re.search(rf"{weight}\s*@|@\s*{weight}|linear\([^()]*{weight}", source)
    return bool(multiplied or (re.search(weight, source) and not re.search(rf"self\.{leaf}\(", source)))


def linear_roles(block: nn.Module, known: Mapping[str, str]) -> dict[str, str]:
    """{path in the block: role} of each linear; `known` names some of them beforehand."""
    modules = dict(block.named_modules())
    named = {p: known.get(p) or role(p, modules) for p in linears(block)}
    taken = set(known.values())
    groups: dict[str, list[str]] = defaultdict(list)
    for path, name in named.items():
        if path not in known:
            groups[name].append(path)
    for name, paths in groups.items():
        first = None if name in taken else re.sub(r"\d+", "#", _first(paths))
        for path in paths:
            if re.sub(r"\d+", "#", path) != first:  # alike but for a number: instances of one role
                named[path] = _qualified(name, path)
    return named


def _first(paths: list[str]) -> str:
    """The one that keeps a name that several linears of a block have: the least deep."""
    return min(paths, key=lambda p: (p.count("."), paths.index(p)))


def _qualified(name: str, path: str) -> str:
    above = [s for s in path.split(".")[:-1] if not s.isdigit()]
    return f"{above[-1]}_{name}" if above else path.split(".")[-1]


def role(path: str, modules: Mapping[str, nn.Module]) -> str:
    """What a linear at this path of its block is called."""
    parts = path.split(".")
    above = [type(modules[".".join(parts[:i])]).__name__ for i in range(len(parts))]
    leaf, inside = parts[-1], parts[:-1]
    names = [s for s in parts if not s.isdigit()]
    if "router" in names or leaf == "gate" or "gate" in inside:
        rest = [s for s in names[max(i for i, s in enumerate(names) if s in ("router", "gate")) + 1 :]]
        return "router" if not rest or rest[-1] in GENERIC else f"router_{rest[-1]}"
    if helper := next((h for h in HELPERS if h in inside), None):
        return f"{helper}_{leaf}"
    if norm := next((s for s in inside if "norm" in s and "att" not in s.replace("post_attention", "")), None):
        return f"{norm}_{leaf}"  # a norm with products of its own
    attends = _attends(inside, above)
    state_space = any(LINEAR_ATTENTION.search(s) for s in [*inside, *above])
    crossing = any(CROSS.search(s) for s in [*inside, *above])
    table = ATTENTION if attends else MLP
    spelt = _spelt(leaf, table)
    if spelt is None and leaf in GENERIC and len(names) > 1:
        spelt = _spelt(names[-2], table) or _bert(names, attends)
    if spelt == "o" and state_space and leaf == "out_proj":
        spelt = None  # the way out of a state-space or linear-attention layer keeps the name it is known by
    if spelt is None:
        spelt = _other(leaf, names, attends)
    if any(SHARED.fullmatch(s) for s in inside):
        return f"shared_{spelt}"
    if re.search(r"(^|\.)experts?\.\d+\.", path):
        return f"expert_{spelt}"
    return f"cross_{spelt}" if crossing and attends else spelt


def _attends(inside: list[str], above: list[str]) -> bool:
    """Whether a linear belongs to attention: by the names above it, else by the classes."""
    if any(re.search("att|mlstm", s, re.I) for s in inside):
        return True
    return not any(FEED_FORWARD.search(s) for s in inside) and any(re.search(r"Att(entio)?n$", c) for c in above[-1:])


def _spelt(leaf: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((r for r, spellings in table.items() if leaf.lower() in spellings), None)


def _bert(names: list[str], attends: bool) -> str | None:
    """BERT and its kin: `intermediate.dense` and `output.dense` beside attention are the MLP."""
    return None if attends else {"intermediate": "up", "dense": "up", "output": "down"}.get(names[-2])


def _other(leaf: str, names: list[str], attends: bool) -> str:
    """A name for what has no usual one: the module's own, with its parent's where it says nothing alone."""
    if attends and (mlp := _spelt(leaf, MLP)):
        return f"attn_{mlp}"
    alone = not (leaf.isdigit() or leaf in GENERIC or _spelt(leaf, ATTENTION)) or leaf in ("out_proj", "c_proj")
    above = names if leaf.isdigit() else names[:-1]
    return leaf if alone else f"{above[-1]}_{leaf}" if above else f"block_{leaf}"


# ---- sub-layers ------------------------------------------------------------------------------------------------------
ATTN = re.compile(r"(self_?)?(linear_?)?att(n|ention|)?", re.I)
FFN = re.compile(r".*(mlp|feed_?forward|ffn|moe)(_block)?|ff", re.I)
NO_SUBLAYER = re.compile(r"norm|hyper|_hc|dropout|router|^experts$", re.I)


def sublayers(block: nn.Module, known: Mapping[str, str]) -> dict[str, str]:
    """{path in the block: role} of its sub-layers: `attn`, `cross_attn`, `mlp`, else by their own names (`mamba`)."""
    named = {p: r for p, r in known.items()}
    taken = set(named.values())
    children = [(n, m) for n, m in block.named_children() if n not in named and _holds_matrices(m)]
    for name, module in sorted(children, key=lambda nm: not ATTN.fullmatch(nm[0])):  # the plainest name first
        if is_linear(module) or isinstance(module, nn.ModuleList) or NO_SUBLAYER.search(name):
            continue
        called = next(c for c in (_sublayer(name, module), name) if c not in taken or c == name)
        if called in taken:
            continue
        taken.add(called)
        named[name] = called
    return named


def _sublayer(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if CROSS.search(name):
        return "cross_attn"
    if "att" in name.lower() or kind.endswith("Attention"):
        return "attn"
    if FFN.fullmatch(name) or (name == "mixer" and re.search(r"MLP|MoE", kind, re.I)):
        return "mlp"
    return name


def _holds_matrices(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) and bool(list(module.children()) or not is_linear(module))


# ---- what no linear is -----------------------------------------------------------------------------------------------
CALLED = (nn.Embedding, nn.modules.conv._ConvNd)
STATE = ("A_log", "A", "D")
"""Parameters of state-space layers that multiply element by element."""


def raw_matrices(module: nn.Module, reached: set[int]) -> Iterator[str]:
    """Names of parameters of two dimensions or more that belong to no linear: experts, routers, hand-written products.

    Args:
        reached: ids of the modules that `linear` reaches.
    """
    for path, inner in module.named_modules():
        if id(inner) in reached or isinstance(inner, CALLED) or type(inner).__name__.endswith("Norm"):
            continue
        for name, p in inner.named_parameters(recurse=False):
            if p.dim() >= 2 and min(p.shape) > 1 and name not in STATE and not name.endswith("bias"):
                yield f"{path}.{name}".lstrip(".")
