"""What autograd recorded."""

from __future__ import annotations

import torch


def nodes(loss: torch.Tensor) -> list[str]:
    """Names of all nodes behind a loss."""
    met, new = set(), [loss.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in met:
            met.add(node)
            new += [n for n, _ in node.next_functions]
    return [n.name() for n in met]
