"""A base that is larger than one device: every block's tensors, frozen and trained, are spread over the ranks (FSDP2).

Adapters are children of the layers they edit, so they are sharded with them and nothing is told which tensors are
whose. Around the model stands a root of our own. A forward is whatever happens inside a call of that root: the packed
engine calls the decoder and the head apart, and both find their tensors gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.host import Host
from inlay.engine.example import Example
from inlay.engine.head import Read
from inlay.train.ranks import Shared, Team
from inlay.train.ways import Way


class Root(nn.Module):
    """Calls what it is given, with the model's tensors gathered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        """`work()`."""
        return work()


def shard(host: Host, team: Team, device: torch.device) -> Root:
    """Spread a host's model over the ranks; it is computed with through the root from then on, and only so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (team.size,))
    blocks = {s.layer: s.path for s in host.anatomy.spots if s.role == "block"}
    for layer in sorted(k for k in blocks if k is not None):
        fully_shard(host.model.get_submodule(blocks[layer]), mesh=mesh)
    root = Root(host.model)
    fully_shard(root, mesh=mesh)
    return root


class Sharded(Shared):
    """A way whose forwards go through the root; every rank makes as many as the one with most to do.

    Cached activations spare the computing of the blocks below the adapter, which are gathered all the same.
    """

    def __init__(self, way: Way, root: Any, team: Team, filler: Example):
        super().__init__(way, team)
        self.root, self.filler = root, filler
        root.reshard()  # the trial that chose the way left it gathered

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This rank's groups; an empty one stands for a forward that others need to gather their tensors."""
        groups = [self.way.split(part) for part in self.parts(examples)]
        mine = groups[self.team.rank]
        return mine + [[]] * (max(map(len, groups)) - len(mine))

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """As the way's own; its gradients are averaged over the ranks."""
        loss = self.root(lambda: self.way.loss(rows or [self.filler]) * (1.0 if rows else 0.0))
        self._done(loss)
        return loss

    def tokens(self, rows: Sequence[Example], read: Read | None, through: bool) -> tuple[Tensor, Tensor | None]:
        """As the way's own; a forward for the others' sake gives one token of no loss."""
        loss, said = self.root(lambda: self.way.tokens(rows or [self.filler], read, through))
        self._done(loss, said)
        return (loss, said) if rows else (loss.sum()[None] * 0.0, said)

    def _done(self, *made: Tensor | None) -> None:
        if not any(t is not None and t.requires_grad for t in made):
            self.root.reshard()  # a backward would have done it
