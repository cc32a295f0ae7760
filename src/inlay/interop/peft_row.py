"""What one line of the table of PEFT methods says, and the helpers that the lines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from inlay.core.edit import Edit, Weights
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.place import Spot
from inlay.interop.low_rank import worn_by_path
from inlay.interop.peft_folder import Found, Tensors, paths_of

Here = Callable[[str, Tensors], Mapping[str, Tensor]]
Values = Callable[[Host, str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Loaded:
    """A folder as an edit: what to hang, and how its tensors are ours."""

    edit: Edit
    here: Here | None = None
    """(module path, the file's tensors there) -> ours there."""
    values: Values | None = None
    """Every tensor at once, where `here` does not do."""
    at: Sequence[str] | None = None
    """Placement; by default the modules of the file."""


@dataclass(frozen=True)
class Dumped:
    """An adapter as a folder: config fields of the method, tensors per module path, tensors of no module."""

    fields: Mapping[str, Any]
    places: Mapping[str, Tensors] = field(default_factory=dict)
    top: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    wrapped: Mapping[str, Tensors] = field(default_factory=dict)
    """Tensors on expert parameters, by module path with a level for each wrapper."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One PEFT method: its names on disk, the settings it honours, and the two directions."""

    type: str
    """`peft_type`."""
    kinds: tuple[str, ...]
    """`Edit.kind` of the adapters that are written as this."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The file's tensor name after the module path -> ours."""
    top: Mapping[str, str] = field(default_factory=dict)
    """Whole keys of tensors that belong to no module -> ours."""
    fields: frozenset[str]
    """Config fields that are read. Any other that is set is refused."""
    training: frozenset[str] = frozenset()
    """Fields that change training only and that Inlay has not: read with a warning."""
    layers: tuple[str, ...] = ()
    """Layers that PEFT's method can stand on."""
    load: Callable[[Found], Loaded]
    dump: Callable[[Host, str], Dumped]


def number(x: float) -> float | int:
    """A whole number as an integer, also after a multiplication and division that left the last digit off."""
    return round(x) if abs(x - round(x)) < 1e-9 * max(1.0, abs(x)) else x


def layer_kind(layer: nn.Module) -> str:
    """`linear`, `conv1d`, `embedding`, or the class's name."""
    if hasattr(layer, "num_embeddings"):
        return "embedding"
    if hasattr(layer, "nf"):
        return "conv1d"
    return "linear" if hasattr(layer, "in_features") else type(layer).__name__


def embedding_scale(layer: nn.Module) -> float:
    """Return the factor by which an embedding scales its output (Gemma: sqrt(hidden)), 1 for other layers.

    PEFT multiplies a LoRA at such an embedding by it as well (`_get_embed_scale`); an edit here adds to the output as
    it is, so files hold B divided by this factor. Raises InlayError for a factor that is not one number.
    """
    scale = getattr(layer, "embed_scale", None)
    if scale is None or layer_kind(layer) != "embedding":
        return 1.0
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise InlayError(
            f"{type(layer).__name__} scales its output by {tuple(scale.shape)} factors; PEFT knows only one"
        )
    return float(scale)


def need(found: Found, *sets: set[str]) -> None:
    """Every module must have exactly one of these sets of tensors."""
    for path, t in found.places.items():
        have = set(t) - {"base"}
        if have not in sets:
            wanted = " or ".join(str(sorted(s)) for s in sets)
            raise found.error(f"{path} has the tensors {sorted(have)}, wanted {wanted}")


def fill_places(host: Host, name: str, found: Found, here: Here) -> dict[str, Tensor]:
    """`here` over all modules of a file, under the names of `host.tensors`."""
    keys = paths_of(host, name)
    return {f"{keys[p]}/{k}": v for p, t in found.places.items() for k, v in here(p, t).items()}


def plain_worn(host: Host, name: str, method: str) -> dict[str, tuple[Spot, Weights]]:
    """Module path -> (spot, tensors), for methods that PEFT cannot hang on a part of a fused projection."""
    made = {}
    for path, places in worn_by_path(host, name).items():
        if len(places) > 1 or places[0][0].part is not None:
            roles = ", ".join(spot.key for spot, *_ in places)
            raise InlayError(
                f"{name!r} hangs at {roles}, parts of the fused {path}; PEFT's {method} knows only the whole of it. "
                "Write it with format='vllm' if it is additive, or hang it at the fused role"
            )
        made[path] = places[0][0], places[0][2]
    return made
