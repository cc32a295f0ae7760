"""The roles of one model: from the table of families where it knows them, else read off its modules, block by block.

Blocks need not be alike: a decoder with attention here and a state-space layer there has the roles of both, each where
it is. What stands beside the decoder has roles of its own: `vision.q`, `audio.linear`, `connector`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from inlay.core.config import text_config
from inlay.core.errors import InlayError
from inlay.core.place import Anatomy, Spot
from inlay.models import parts, roles
from inlay.models.experts import expert_spots
from inlay.models.families import FAMILIES, Family


def anatomy(model: nn.Module) -> Anatomy:
    """The roles of a language model, alone or with towers beside it.

    Raises:
        InlayError: no decoder can be told apart in it.
    """
    kind: str = model.config.model_type  # type: ignore[union-attr,assignment]
    text = text_config(model.config)
    table = FAMILIES.get(kind)
    if table is not None and not _has(model, table.blocks):
        raise InlayError(f"{type(model).__name__} has no {table.blocks!r}; attach to the whole causal language model")
    found = parts.find(model, table.blocks, table.embed, table.head) if table else parts.find(model)
    family = table or FAMILIES.get(getattr(text, "model_type", ""))
    reader = _Reader(model, found, family, text)
    spots = [*reader.decoder(), *reader.towers()]
    if not any(s.linear for s in spots if not s.tower) and not reader.unreached:
        raise InlayError(f"cannot read the roles of {type(model).__name__}; add an entry to inlay.models.families")
    layers = 1 + max(s.layer for s in spots if s.role == "block" and s.layer is not None)
    return Anatomy(kind, layers, tuple(spots), tuple(reader.unreached), _hidden(model, found, text))


def _hidden(model: nn.Module, found: parts.Parts, text: Any) -> int | None:
    """Width of the residual stream; where the configuration does not say, that of the embedding."""
    if width := getattr(text, "hidden_size", None):
        return width
    embed = model.get_submodule(found.embed) if found.embed else None
    return getattr(embed, "embedding_dim", None)


class _Reader:
    """Reads the spots of one model; a module that stands in several places is named at its first."""

    def __init__(self, model: nn.Module, found: parts.Parts, family: Family | None, text: Any):
        self.model, self.parts, self.family = model, found, family
        self.fused = family.parts(text) if family else {}
        self.named: set[int] = set()
        self.unreached: list[str] = []

    def decoder(self) -> Iterator[Spot]:
        """Embedding, blocks, what is between and after them, head."""
        if self.parts.embed:
            yield Spot("embed", "embed", None, self.parts.embed)
        yield from self._stacks(self.parts.stacks, "", self.family)
        inside = tuple(f"{s}." for s in self.parts.stacks)
        beside = {n: m for n, m in self.model.named_modules() if n and not n.startswith(inside)}
        mine = {n: m for n, m in beside.items() if self.parts.of(n) in ("", "head")}
        ends = (self.parts.head or "-", self.parts.embed or "-")
        for path, module in mine.items():
            if not path.startswith(ends) and roles.is_linear(module) and self._new(module):
                self.unreached.append(path)
                name = path.removeprefix(self.parts.decoder).strip(".").replace(".", "_")
                yield Spot(path, name, None, path)
        for path, module in mine.items():
            if _is_norm(module):
                yield Spot(f"norm.{path}", "norm", None, path)
        if self.parts.head:
            head = self.model.get_submodule(self.parts.head)
            several = [f".{n}" for n, _ in head.named_children()] if isinstance(head, nn.ModuleList) else [""]
            for n in several:
                yield Spot(f"head{n}", "head", None, self.parts.head + n)

    def towers(self) -> Iterator[Spot]:
        """Spots of the parts beside the decoder, their roles after the part's name."""
        inside = tuple(f"{s}." for s in self.parts.stacks)
        apart: dict[str, list[tuple[str, nn.Module]]] = {t: [] for t in self.parts.towers}
        lists = tuple(f"{s}." for each in self.parts.towers.values() for s in each)
        for path, module in self.model.named_modules():
            if path and not path.startswith(inside + lists) and roles.is_linear(module):
                part = self.parts.of(path)
                if part not in ("", "head") and self._new(module):
                    apart.setdefault(part, []).append((path, module))
        for tower, rest in apart.items():
            yield from self._stacks(self.parts.towers.get(tower, []), tower, None)
            for path, _ in rest:
                yield Spot(f"{tower}.{path}", f"{tower}.{_last_name(path)}", None, path, linear=True, tower=tower)

    def _stacks(self, stacks: list[str], tower: str, family: Family | None) -> Iterator[Spot]:
        layer = 0
        for stack in stacks:
            for name, block in self.model.get_submodule(stack).named_children():
                yield from self._block(block, f"{stack}.{name}", layer, tower, family)
                layer += 1

    def _block(self, block: nn.Module, path: str, layer: int, tower: str, family: Family | None) -> Iterator[Spot]:
        before = f"{tower}." if tower else ""
        width = None if family else _width(block)
        yield Spot(f"{before}{layer}.block", f"{before}block", layer, path, tower=tower, width=width)
        modules = dict(block.named_modules())
        fixed = {r: p for r, p in family.roles.items() if p.partition("#")[0] in modules} if family else {}
        whole = {p: r for r, p in fixed.items() if "#" not in p}
        cut = {p.partition("#")[0] for p in fixed.values() if "#" in p}
        named = roles.sublayers(block, {p: r for p, r in whole.items() if not roles.is_linear(modules[p])})
        linear = roles.linear_roles(block, {p: r for p, r in whole.items() if roles.is_linear(modules[p])})
        every = [*fixed.items(), *((r, p) for p, r in (named | linear).items() if p not in whole)]
        used: dict[str, str] = {}
        for role, inner in every:
            inner, _, part = inner.partition("#")
            module = modules[inner]
            if not part and not self._new(module):
                continue
            key = f"{before}{layer}.{role}" if role not in used else f"{before}{layer}.{role}.{inner}"
            used[role] = inner
            is_linear = bool(part) or (inner in linear and inner not in cut)
            spot = self.fused[part] if part else None
            own = None if is_linear else width
            yield Spot(key, before + role, layer, f"{path}.{inner}", spot, is_linear, tower, own)
        for inner, module in modules.items():
            if _is_norm(module):
                yield Spot(f"{before}{layer}.norm.{inner}", f"{before}norm", layer, f"{path}.{inner}", tower=tower)
        if not tower:
            yield from expert_spots(block, layer, path)
            reached = {id(m) for p, m in modules.items() if p in linear}
            self.unreached += [f"{path}.{name}" for name in roles.raw_matrices(block, reached)]

    def _new(self, module: nn.Module) -> bool:
        """Whether this module has no spot yet."""
        if id(module) in self.named:
            return False
        self.named.add(id(module))
        return True


def _last_name(path: str) -> str:
    """`merger.mlp.0` -> `mlp_0`: the last name of a path with the numbers behind it."""
    names = path.split(".")
    last = max((i for i, n in enumerate(names) if not n.isdigit()), default=0)
    return "_".join(names[last:])


def _width(block: nn.Module) -> int | None:
    """Width of a block's residual stream: what its first norm is of; None if that cannot be seen."""
    weights = (getattr(m, "weight", None) for n, m in block.named_children() if "Norm" in type(m).__name__)
    return next((w.shape[0] for w in weights if isinstance(w, nn.Parameter) and w.dim() == 1), None)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
