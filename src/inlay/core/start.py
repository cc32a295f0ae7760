"""What the starts of several methods have in common; methods never import each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.errors import InlayError
from inlay.core.place import Place


def kaiming(*shape: int) -> Tensor:
    """U(-1/sqrt(in), 1/sqrt(in)): Kaiming-uniform with a = sqrt(5), the start of `nn.Linear`."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=5**0.5)


def frozen_weight(place: Place) -> Tensor:
    """W (D_out, D_in) of a frozen linear, whatever stores it: the layer is fed the identity."""
    zero = place.f(torch.zeros(1, place.d_in))
    return (place.f(torch.eye(place.d_in)) - zero).T.float()


def linears_only(method: str, place: Place) -> None:
    """Refuse an embedding."""
    if place.role == "embed":
        raise InlayError(f"{method} writes a linear's update; leave the embedding out")
