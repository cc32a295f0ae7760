"""Expert parameters: one 3-D tensor that holds a linear per expert, W (E, D_out, D_in) or stored transposed.

A place at such a parameter stands for E linears. The tensors of an adapter there are those of E ordinary linears,
stacked to (E, ...), except the ones that its method shares among experts (`Edit.shared_by_experts`); every formula is
applied to one expert at a time and never sees the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.core.edit import Edit, Weights
from inlay.core.errors import InlayError
from inlay.core.place import Place

INPUTS = ("gate_up_proj", "gate_proj", "up_proj")
"""Names of parameters that read the hidden state."""
OUTPUT = "down_proj"
"""The one that writes it."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertLayout:
    """How a 3-D parameter holds the matrices of its experts."""

    experts: int
    d_in: int
    d_out: int
    transposed: bool
    """Whether it is stored as (E, D_in, D_out) instead of (E, D_out, D_in)."""

    def matrices(self, stored: Tensor) -> Tensor:
        """The parameter, or one expert's part of it, as (..., D_out, D_in); the way back is the same."""
        return stored.mT if self.transposed else stored


def expert_layout(module: nn.Module, name: str) -> ExpertLayout:
    """Read the layout of parameter `name` (E, a, b) from its shape and those of its neighbours.

    The projections of one module meet in the width of an expert, which leaves one layout possible, or none; what the
    module declares (`is_transposed`, `input_size` and `output_size`, `hidden_size` or `hidden_dim`) must agree.

    Raises:
        InlayError: the layout cannot be established, with the shapes.
    """
    stored = module._parameters.get(name)
    if stored is None or stored.dim() != 3 or stored.dtype not in FLOATS:
        raise InlayError(f"{name!r} of {type(module).__name__} is no 3-D floating-point parameter of experts")
    experts, a, b = stored.shape
    possible = [t for t in (False, True) if _fits(module, name, t)]
    if len(possible) != 1:
        shapes = {k: tuple(p.shape) for k, p in module._parameters.items() if p is not None and p.dim() == 3}
        raise InlayError(
            f"cannot establish whether {name!r} of {type(module).__name__} is stored as (experts, out, in) or "
            f"(experts, in, out) from {shapes}; adapters cannot hang on it"
        )
    return ExpertLayout(experts, a, b, True) if possible[0] else ExpertLayout(experts, b, a, False)


def _fits(module: nn.Module, name: str, transposed: bool) -> bool:
    """Whether everything that is known of a module agrees with this way of storing its matrices."""
    if getattr(module, "is_transposed", transposed) is not transposed:
        return False

    def widths(which: str) -> tuple[int, int]:
        """(D_in, D_out) if so."""
        _, a, b = module._parameters[which].shape  # type: ignore[union-attr]
        return (a, b) if transposed else (b, a)

    declared = getattr(module, "input_size", None), getattr(module, "output_size", None)
    if all(isinstance(n, int) for n in declared):
        return widths(name) == declared
    known = [k for k in (*INPUTS, OUTPUT) if _is_3d(module._parameters.get(k))]
    if name not in known or OUTPUT not in known or len(known) < 2:
        return False
    inner, hidden = widths(OUTPUT)
    for which in known[:-1]:
        if widths(which) != (hidden, 2 * inner if which == "gate_up_proj" else inner):
            return False
    hidden_size = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    square = all(widths(which) == (hidden, inner) for which in known[:-1])  # up and down: swapped, they fit as well
    return not square or hasattr(module, "is_transposed") or (inner != hidden == hidden_size)


def _is_3d(p: Tensor | None) -> bool:
    return p is not None and p.dim() == 3


# ---- the tensors of an adapter at such a place -----------------------------------------------------------------------
def shared_names(edit: Edit, place: Place) -> tuple[str, ...]:
    """Names of an edit's tensors that all experts of a place share.

    Raises:
        InlayError: the method cannot hang on experts.
    """
    shared = edit.shared_by_experts(place)
    if shared is None:
        raise InlayError(
            f"{edit.kind} cannot hang on expert parameters ({place.key!r}); LoRA and its variants can. Hang it around "
            "the expert block instead: at='mlp'"
        )
    return shared


def start_weights(edit: Edit, place: Place) -> dict[str, Tensor]:
    """An edit's fresh tensors at a place, stacked over its experts if it has any."""
    if not place.experts:
        return edit.weights(place)
    shared = shared_names(edit, place)
    return stacked([edit.weights(place.expert(e)) for e in range(place.experts)], shared)


def fold_weights(edit: Edit, w: Weights, place: Place) -> tuple[Edit, Weights]:
    """`Edit.folded`, expert by expert where the place has experts."""
    if not place.experts:
        return edit.folded(w, place)
    experts = [
        edit.folded(own, place.expert(e))
        for e, own in enumerate(by_expert(w, shared_names(edit, place), place.experts))
    ]
    folded = experts[0][0]
    return folded, stacked([own for _, own in experts], shared_names(folded, place))


def stacked(experts: Sequence[Weights], shared: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of E experts as one adapter's: (E, ...) each, shared ones as they are."""
    return {k: t if k in shared else torch.stack([w[k] for w in experts]) for k, t in experts[0].items()}


def by_expert(w: Weights, shared: Sequence[str], experts: int) -> list[dict[str, Tensor]]:
    """The way back: each expert's own tensors, as views."""
    parts = {k: t.unbind(0) for k, t in w.items() if k not in shared}
    return [{k: parts[k][e] if k in parts else t for k, t in w.items()} for e in range(experts)]


class ExpertWeights:
    """An adapter's tensors, given out expert by expert."""

    def __init__(self, w: Weights, shared: Sequence[str]):
        # One `unbind` makes one gradient of all experts; indexing would make a zero-filled one for each of them.
        graph = torch.is_grad_enabled()
        self._each: Mapping[str, tuple[Tensor, ...] | Tensor] = {
            k: t.unbind(0) if graph and t.requires_grad else t for k, t in w.items() if k not in shared
        }
        self._shared = {k: t for k, t in w.items() if k in shared}

    def __getitem__(self, expert: int) -> dict[str, Tensor]:
        return {**{k: t[expert] for k, t in self._each.items()}, **self._shared}
