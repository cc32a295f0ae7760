"""Where edits hang: roles, parts of fused projections, and the placement language.

The language, used by the API, the command line and recipes alike, is a comma-separated list of

    target[:wiring][@layers]

- target: a role (`q k v o gate up down attn mlp block embed head norm`, `qkv` and `gate_up` where they are fused, and
  what else a decoder has: `router`, `shared_gate`, `q_a`, `in_proj` ...), `linear` for every linear of its blocks,
  `experts` for the 3-D parameters of a mixture of experts (`experts.gate_up`, `experts.down` for one of them), a role
  of another part of the model (`vision.q`, `vision.linear`, `connector`), or a pattern of module paths
  (`model.layers.*.self_attn.q_proj`, `*.q_proj`);
- wiring: `input` (before the layer), `output` (after it; `series` says the same) or `parallel` (from its input to its
  output), for methods with a choice;
- layers: `3`, `0-3`, `16-`, `-7` (through 7), `first4`, `last8`, joined by `+`. They hold for their item and for the
  items before it that name none: `q,v@0-3` is q and v in layers 0 to 3.

Whatever matches nothing is an error that names what exists. A role that some layers lack, and matrices that `linear`
does not reach, are warnings.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inlay.core.errors import InlayError, unknown

WIRINGS = {"series": "output", "output": "output", "input": "input", "parallel": "parallel"}


@dataclass(frozen=True)
class Part:
    """Slots `lo:hi` of a fused output laid out as (groups, slots, width): one pair of cuts serves every decoder.

    Interleaved per head (BLOOM, GPT-NeoX): groups = heads, slots = 3. Blocked (GPT-2, Phi-3): groups = 1.
    Grouped (Falcon): groups = key/value heads, slots = queries per group + 2.
    """

    groups: int
    slots: int
    lo: int
    hi: int

    def get(self, y: Tensor) -> Tensor:
        """(..., D_fused) -> (..., D_part)."""
        return y.unflatten(-1, (self.groups, self.slots, -1))[..., self.lo : self.hi, :].flatten(-3)

    def put(self, y: Tensor, new: Tensor) -> Tensor:
        """y with this part replaced by `new`."""
        cut = y.unflatten(-1, (self.groups, self.slots, -1))
        new = new.unflatten(-1, (self.groups, self.hi - self.lo, -1))
        return torch.cat([cut[..., : self.lo, :], new, cut[..., self.hi :, :]], -2).flatten(-3)

    def width(self, fused: int) -> int:
        """D_part of a fused output of `fused` features."""
        return fused // self.slots * (self.hi - self.lo)


@dataclass(frozen=True)
class Spot:
    """One place an edit may hang, before any model is touched: `key` is its name in files (`3.q`, `embed`)."""

    key: str
    role: str
    layer: int | None
    path: str
    part: Part | None = None
    linear: bool = False
    """Whether `linear` (`vision.linear` of a tower's) includes it."""
    tower: str = ""
    """The part of the model beside the decoder that it is in (`vision`); `layer` then counts that part's layers."""
    width: int | None = None
    """Width of the residual stream here, where it is not the decoder's."""
    parameter: str | None = None
    """A parameter of the module at `path` that holds a linear per expert; None: the module itself is the layer."""

    @property
    def full_path(self) -> str:
        """The module's path, or that of the parameter."""
        return f"{self.path}.{self.parameter}" if self.parameter else self.path


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in one model: made from a table of decoder families, or inferred (`inlay.models`)."""

    family: str
    layers: int
    """Blocks of the decoder."""
    spots: tuple[Spot, ...]
    unreached: tuple[str, ...] = ()
    """Matrices of the language model that `linear` does not reach: parameters that belong to no linear (experts,
    routers), and linears outside the blocks."""
    hidden: int | None = None
    """Width of the decoder's residual stream; None: as the model's configuration says."""

    @property
    def roles(self) -> list[str]:
        """Roles this model has, in the order of the table."""
        return list(dict.fromkeys(s.role for s in self.spots))

    @property
    def towers(self) -> list[str]:
        """Parts beside the decoder: `vision`, `audio`, `connector` ..."""
        return list(dict.fromkeys(s.tower for s in self.spots if s.tower))

    def layers_of(self, tower: str) -> int:
        """Blocks of one part; of the decoder if it is empty."""
        if not tower:
            return self.layers
        return 1 + max((s.layer for s in self.spots if s.tower == tower and s.layer is not None), default=-1)

    def left_out(self) -> str:
        """One line of what `linear` does not reach; empty if it reaches everything."""
        if not self.unreached:
            return ""
        which = collapsed(self.unreached)
        some = ", ".join(which[:6]) + (f" and {len(which) - 6} more" if len(which) > 6 else "")
        how = "; 'experts' reaches those of experts" if any(s.parameter for s in self.spots) else ""
        return f"'linear' reaches every linear of the blocks, but not these matrices of {self.family}: {some}{how}"


@dataclass(frozen=True)
class Place:
    """One layer of the base, or one part of a fused layer, as an edit sees it: a function and two widths."""

    f: Callable[[Tensor], Tensor]
    """The frozen layer, quantised or not: (..., D_in) -> (..., D_out); an embedding takes ids."""
    d_in: int
    d_out: int
    role: str
    key: str
    wiring: str = ""
    has_bias: bool = False
    tied: bool = False
    """An embedding or head whose weight is the other's too."""
    experts: int = 0
    """Number of linears that an expert parameter holds; 0: one linear."""
    expert_f: Callable[[int, Tensor], Tensor] | None = None
    """Expert e as a function of (e, x), without its bias."""

    def expert(self, e: int) -> Place:
        """One expert of an expert parameter, as a linear of its own."""
        assert self.expert_f is not None, "only an expert parameter has experts"
        return replace(self, f=functools.partial(self.expert_f, e), experts=0, expert_f=None)


@dataclass(frozen=True)
class Target:
    """One parsed item of a placement."""

    text: str
    name: str
    wiring: str
    layers: str
    """Its own; empty if it names none."""
    among: str
    """Its own layers or those of the next item that names some."""


def parse(at: str | Iterable[str]) -> list[Target]:
    """Read a placement; a string is split at commas."""
    items = [i.strip() for i in (at.split(",") if isinstance(at, str) else at)]
    if not any(items):
        raise InlayError("the placement is empty; name roles such as 'q,v' or a pattern such as '*.q_proj'")
    targets: list[Target] = []
    inherited = ""
    for item in reversed(list(filter(None, items))):
        name, _, layers = item.partition("@")
        name, _, wiring = name.partition(":")
        if wiring and wiring not in WIRINGS:
            raise unknown("wiring", wiring, WIRINGS, f"It stands in {item!r}.")
        inherited = layers or inherited
        targets.insert(0, Target(item, name, WIRINGS.get(wiring, ""), layers, inherited))
    return targets


def layer_set(text: str, layers: int) -> set[int]:
    """`0-3+last2` -> {0, 1, 2, 3, n-2, n-1}."""
    chosen: set[int] = set()
    for piece in text.split("+"):
        if m := re.fullmatch(r"(first|last)(\d+)", piece):
            n = int(m[2])
            span = range(n) if m[1] == "first" else range(layers - n, layers)
        elif m := re.fullmatch(r"(\d*)-(\d*)|(\d+)", piece):
            lo, hi = (m[3], m[3]) if m[3] else (m[1] or 0, m[2] or layers - 1)
            span = range(int(lo), int(hi) + 1)
        else:
            raise InlayError(f"cannot read the layers {text!r}; write e.g. 3, 0-3, 16-, last8 or 0-1+last2")
        if not span or span[0] < 0 or span[-1] >= layers:
            raise InlayError(f"layers {piece!r} reach outside this model, which has layers 0-{layers - 1}")
        chosen |= set(span)
    return chosen


def locate(model: nn.Module, anatomy: Anatomy, at: str | Iterable[str]) -> dict[str, tuple[Spot, str]]:
    """{key: (spot, wiring)} for each place that a placement names, in the model's order. Nothing may match nothing."""
    modules = dict(model.named_modules())
    known_paths = {s.full_path: s for s in anatomy.spots if s.part is None}
    every = [*modules, *(s.full_path for s in anatomy.spots if s.parameter)]
    found: dict[str, tuple[Spot, str]] = {}
    for target in parse(at):
        hits = _named(anatomy, target.name)
        if not hits:
            # A path is looked up, for a file may name hundreds of them.
            paths = [target.name] if target.name in modules or target.name in known_paths else every
            hits = [known_paths.get(p) or _unnamed(p) for p in paths if p and fnmatch.fnmatchcase(p, target.name)]
        if not hits:
            raise unknown(
                f"role or module pattern in {anatomy.family}",
                target.name,
                anatomy.roles,
                "`linear` names every linear. A pattern must match a whole module path, e.g. '*.q_proj'.",
            )
        if target.among:
            named, hits = hits, _in_layers(anatomy, target, hits)
            if not hits:
                where = ranges(s.layer for s in named if s.layer is not None)
                why = f"exists in layers {where} only" if where else "does not stand in layers"
                raise InlayError(f"{target.text!r} selects layers of {target.name!r}, which {why}")
        else:
            _warn(anatomy, target.name, hits)
        for spot in hits:
            if found.setdefault(spot.key, (spot, target.wiring))[1] != target.wiring:
                raise InlayError(f"{target.text!r} gives {spot.key!r} a second wiring; hang two adapters instead")
    order = {s.key: i for i, s in enumerate(anatomy.spots)}
    return dict(sorted(found.items(), key=lambda kv: order.get(kv[0], len(order))))


def _named(anatomy: Anatomy, name: str) -> list[Spot]:
    tower, _, rest = name.rpartition(".") if name.count(".") == 1 else ("", "", name)
    if rest == "linear" or name in anatomy.towers:
        tower = name if name in anatomy.towers else tower
        return [s for s in anatomy.spots if s.linear and s.tower == tower]
    return [s for s in anatomy.spots if name in (s.role, s.key) or s.role.startswith(f"{name}.")]


def _in_layers(anatomy: Anatomy, target: Target, hits: list[Spot]) -> list[Spot]:
    """Those of a target's places that are in the layers it names; places outside all layers only if it names none."""
    chosen = {t: layer_set(target.among, anatomy.layers_of(t)) for t in {s.tower for s in hits if s.layer is not None}}
    if not chosen:
        layer_set(target.among, anatomy.layers)
    return [s for s in hits if (not target.layers if s.layer is None else s.layer in chosen[s.tower])]


def _warn(anatomy: Anatomy, name: str, hits: list[Spot]) -> None:
    """Say it where a role is missing in some of the layers, and where `linear` leaves matrices out."""
    if name == "linear" and anatomy.unreached:
        warnings.warn(anatomy.left_out(), stacklevel=4)
    role, tower = hits[0].role, hits[0].tower
    if role != name:
        return
    layers, every = {s.layer for s in hits if s.layer is not None}, anatomy.layers_of(tower)
    if layers and len(layers) < every:
        where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"
        warnings.warn(
            f"{name!r} exists in {where} of 0-{every - 1} only; the other layers are left alone", stacklevel=4
        )


def ranges(numbers: Iterable[int]) -> str:
    """`{0, 1, 2, 5}` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{lo}-{hi}" if hi > lo else f"{lo}" for lo, hi in runs)


def collapsed(paths: Iterable[str]) -> list[str]:
    """Paths that differ in their first number only, as one: `layers.{0-3}.mlp.experts.down_proj`."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "\0", path, count=1)
        first = re.search(r"(?<=\.)(\d+)(?=\.)", path)
        numbers.setdefault(pattern, []).extend([int(first[1])] if first else [])
    return [
        p.replace("\0", f"{{{ranges(n)}}}" if len(set(n)) > 1 else f"{n[0]}") if n else p for p, n in numbers.items()
    ]


def _unnamed(path: str) -> Spot:
    layer = re.search(r"\.(\d+)(?:\.|$)", path)
    return Spot(path, "module", int(layer[1]) if layer else None, path)


def widths(layer: nn.Module, hidden: int) -> tuple[int, int]:
    """(D_in, D_out) of a linear (plain, Conv1D, quantised), an embedding, a norm, or any hidden-to-hidden module."""
    if isinstance(layer, nn.Embedding) or hasattr(layer, "num_embeddings"):
        return layer.num_embeddings, layer.embedding_dim  # type: ignore[return-value]
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features  # type: ignore[return-value]
    if hasattr(layer, "nf"):
        return layer.nx, layer.nf  # type: ignore[return-value]
    weight = getattr(layer, "weight", None)
    own = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 1 else hidden
    return own, own
