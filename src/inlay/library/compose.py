"""Adapters made of adapters, from one line of text.

    sum(0.7*math, 0.3*chat)      y + sum_i s_i (edit_i(x, y) - y); exact: of LoRAs, a LoRA of the summed rank
    average(math, chat)          a sum with weights 1/n
    stack(style, math)           one after another, as a row that wears them all
    union(half-a, half-b)        RoAd adapters of disjoint sub-spaces; the order does not matter, to the last bit
    stack(average(a, b), c)      nested

The result is an adapter like any other: worn, mixed in batches, saved, merged where its parts can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.methods.compose import Chain, Sum, own_name
from inlay.methods.rotate import RoAd

KINDS = ("sum", "average", "stack", "union")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+\.?\d*(?:e-?\d+)?)(?=\s*\*)"
    r"|(?P<name>[A-Za-z0-9_-]*[A-Za-z0-9_][A-Za-z0-9_-]*)|(?P<mark>[(),*]))"
)


@dataclass(frozen=True)
class Node:
    """A parsed composition: a kind and its parts, or an adapter's name."""

    name: str
    parts: tuple[tuple[float, Node], ...] = ()


def parse(text: str) -> Node:
    """Read a composition.

    Raises:
        InlayError: what cannot be read, and where.
    """
    tokens: list[tuple[str, str, int]] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise InlayError(f"cannot read {text!r} from {text[at:].strip()[:12]!r} on; write e.g. sum(0.7*a, 0.3*b)")
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind], match.start(kind)))
        at = match.end()
    node, rest = _node(tokens, text)
    if rest:
        raise InlayError(f"{text[rest[0][2] :]!r} is left over in {text!r}; write e.g. sum(0.7*a, 0.3*b)")
    return node


def _take(tokens: Sequence[tuple[str, str, int]], wanted: str, text: str) -> Sequence[tuple[str, str, int]]:
    if not tokens or tokens[0][1] != wanted:
        found = f"{tokens[0][1]!r}" if tokens else "the end"
        raise InlayError(f"expected {wanted!r} and found {found} in {text!r}; write e.g. sum(0.7*a, 0.3*b)")
    return tokens[1:]


def _node(tokens: Sequence[tuple[str, str, int]], text: str) -> tuple[Node, Sequence[tuple[str, str, int]]]:
    if not tokens or tokens[0][0] != "name":
        raise InlayError(f"expected a name in {text!r}; write e.g. sum(0.7*a, 0.3*b)")
    name, tokens = tokens[0][1], tokens[1:]
    if not tokens or tokens[0][1] != "(":
        return Node(name), tokens
    if name not in KINDS:
        raise unknown("composition", name, KINDS)
    tokens = tokens[1:]
    parts: list[tuple[float, Node]] = []
    while True:
        scale = 1.0
        if tokens and tokens[0][0] == "number":
            if name != "sum":
                raise InlayError(f"{name} takes no weights, and {tokens[0][1]} is one: only sum does, in {text!r}")
            scale, tokens = float(tokens[0][1]), _take(tokens[1:], "*", text)
        node, tokens = _node(tokens, text)
        parts.append((scale, node))
        if tokens and tokens[0][1] == ",":
            tokens = tokens[1:]
            continue
        return Node(name, tuple(parts)), _take(tokens, ")", text)


@dataclass(frozen=True)
class Loose:
    """An adapter off any host: its edit, its places with their wirings, its tensors by the names of `Host.tensors`."""

    edit: Edit
    wirings: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def at(self) -> list[str]:
        """As a placement."""
        return [f"{key}:{wiring}".rstrip(":") for key, wiring in self.wirings.items()]


def compose(host: Host, name: str, text: str, hang: bool = False) -> Host:
    """Make an adapter of adapters that the host has; they stay, and later changes of theirs do not reach it.

    It is asked by the template that its parts were trained with, where they all were trained with the same.

    Args:
        text: see the head of this file.
        hang: hang it, so that it can be saved, merged and trained on; otherwise it is only worn (`Host.shelve`).

    Raises:
        InlayError: what cannot be composed, with the reason.
    """
    node = parse(text)
    made = _build(host, node)
    if hang:
        host.add(name, made.edit, at=made.at)
        host.fill(name, made.tensors)
    else:
        host.keep(name, made.edit, made.at, made.tensors)
    templates = [host.templates.get(leaf) for leaf in leaves(node)]
    if templates[0] is not None and all(t == templates[0] for t in templates):
        host.templates[name] = templates[0]
    return host


def leaves(node: Node) -> list[str]:
    """The adapters that a composition names."""
    return [name for _, part in node.parts for name in leaves(part)] if node.parts else [node.name]


def _build(host: Host, node: Node) -> Loose:
    if not node.parts:
        return _leaf(host, node.name)
    parts = [_build(host, part) for _, part in node.parts]
    scales = [s if node.name == "sum" else 1 / len(parts) for s, _ in node.parts]
    if node.name == "union":
        _disjoint(host, [n.name for _, n in node.parts], parts)
    wirings = _wirings(parts)
    where = tuple(tuple(p.wirings) for p in parts)
    edits = tuple(p.edit for p in parts)
    edit: Edit = (
        Sum(edits=edits, where=where, scales=tuple(scales))
        if node.name in ("sum", "average")
        else Chain(edits=edits, where=where)
    )
    tensors = {}
    for i, part in enumerate(parts):
        for key, t in part.tensors.items():
            place, _, k = key.rpartition("/")
            tensors[f"{place}/{own_name(i, k)}"] = t.detach()
    return Loose(edit, wirings, tensors)


def _leaf(host: Host, name: str) -> Loose:
    host._known(name)
    if (folded := host.shelf.get(name)) is None:
        wirings = {key: s.places[name].wiring for key, s in host.sites.items() if name in s.places}
        return Loose(host.edits[name], wirings, host.tensors(name))
    edits = list(folded.cut.edits.values())
    if any(e != edits[0] for e in edits):
        raise InlayError(f"{name!r} is shelved and differs from place to place; load it onto the model to compose it")
    return Loose(edits[0], dict(folded.cut.wirings), folded.loose())


def _wirings(parts: Iterable[Loose]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        for key, wiring in part.wirings.items():
            if wiring and found.get(key) and found[key] != wiring:
                raise InlayError(
                    f"two parts are wired differently at {key!r} ({found[key]}, {wiring}); "
                    "let rows wear both: use('a+b')"
                )
            found[key] = wiring or found.get(key, "")
    return found


def _disjoint(host: Host, names: Sequence[str], parts: Sequence[Loose]) -> None:
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part.edit, RoAd):
            raise InlayError(
                f"a union is of RoAd adapters on disjoint blocks, and {name!r} is {part.edit.kind or 'folded'!r}; "
                "use stack or sum"
            )
    for (a, one), (b, other) in combinations(zip(names, parts, strict=True), 2):
        for key in one.wirings.keys() & other.wirings.keys():
            place = host.sites[key].place
            (lo_a, hi_a), (lo_b, hi_b) = (p.edit.span(place) for p in (one, other))  # type: ignore[attr-defined]
            lo, hi = max(lo_a, lo_b), min(hi_a, hi_b)
            if lo < hi:
                raise InlayError(
                    f"{a!r} and {b!r} both turn the outputs {lo}:{hi} at {key!r}; a union needs disjoint blocks"
                )
