"""Several processes train one adapter: who computes what, and what they tell each other.

A launcher (`torchrun`, `accelerate launch`) starts the processes, one a device, and numbers them. Each computes its
share of every optimizer step's batch; gradients are added up once a step. Which examples a step has, and by how many
tokens the loss is divided, follows from the data alone, so nothing has to be agreed on before a forward.

What is small and decides how the run goes on (losses, whether everybody is well) travels between CPUs, in float64.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlay.compat import accelerate
from inlay.core.errors import InlayError
from inlay.engine.cache import file, needed
from inlay.engine.example import Example
from inlay.engine.head import Read
from inlay.train.ways import Plain, Way

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets."""
ASTRAY = "another process of this run has failed; its own message says why"


def rank() -> int:
    """This process's number, 0 if it is the only one; no process group is needed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """The processes of this run. A process group that is already there is used, one that is missing is made."""
    if dist.is_available() and dist.is_initialized():
        spoken = "gloo" in str(dist.get_backend_config())  # a group made for GPUs alone moves no CPU's words
        yield Team(dist.get_rank(), dist.get_world_size(), None if spoken else dist.new_group(backend="gloo"))
        return
    size = int(os.environ.get("WORLD_SIZE", 1)) if all(os.environ.get(n) for n in LAUNCHED) else 1
    if size == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def place(wanted: str | None) -> torch.device:
    """Where this process computes: its own GPU if there are any. Raises InlayError if all would share one."""
    if wanted is None:
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if torch.device(wanted).index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InlayError(f"device {wanted!r} would be every process's; leave device out: each takes one of its own")
    return torch.device(wanted)


def spread(wanted: Literal["auto", "ddp", "fsdp"], size: int) -> tuple[bool, str]:
    """(whether `size` processes hold one base together, what to say if `accelerate launch` was asked for something).

    What accelerate itself would do is of no account: it replicates on CPUs where FSDP is asked for.
    """
    launched = all(os.environ.get(n) for n in LAUNCHED)
    asked = accelerate.asked() if launched else set()
    fsdp = accelerate.FSDP in asked
    sharded = size > 1 and (wanted == "fsdp" or wanted == "auto" and fsdp)
    if fsdp and sharded:
        return (
            sharded,
            "accelerate asks for FSDP: Inlay shards the base itself (FSDP2); accelerate's settings of it are not read",
        )
    names = ["FSDP"] * fsdp + [name for n, name in accelerate.OTHERS.items() if n in asked]
    if not names:
        return sharded, ""
    how = "one process holds the whole base" if size == 1 else "each process holds the whole base (parallel: ddp)"
    if sharded:
        how = "the base is sharded by FSDP2 (parallel: fsdp)"
    elif not fsdp and size > 1:
        how += "; parallel: fsdp shards it"
    return sharded, f"accelerate asks for {' and '.join(names)}, but {how}"


def shares(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Examples for each of `size` ranks, the longest first to whoever has least; some may be empty."""
    parts: list[list[Example]] = [[] for _ in range(size)]
    tokens = [0] * size
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i)):
        least = tokens.index(min(tokens))
        parts[least].append(examples[i])
        tokens[least] += len(examples[i].input_ids)
    return parts


class Team:
    """The processes that train together, seen from one of them; alone, everything here is the identity.

    `words` is the process group for what CPUs say to each other; the default one if None.

    Every method but `fail` is called by all ranks in the same order. An error in one rank reaches the others where they
    next meet, in `ready` or in a method that begins with it.
    """

    def __init__(self, rank: int = 0, size: int = 1, words: Any = None):
        self.rank, self.size, self.words = rank, size, words

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def ready(self, well: bool = True) -> None:
        """Meet the others; raises InlayError if one of them, this one excepted, is not well."""
        if self.size == 1:
            return
        ill = torch.tensor([0.0 if well else 1.0], dtype=torch.float64)
        dist.all_reduce(ill, group=self.words)
        if well and ill.item():
            raise InlayError(ASTRAY)

    def fail(self) -> None:
        """Tell the others, who meet this rank in `ready`, that it stops. Never raises."""
        with contextlib.suppress(RuntimeError):  # they may be gone already
            self.ready(False)

    def together(self, compute: Callable[[], T]) -> T:
        """Each rank's own result; if one fails, it raises its own error and all others an InlayError."""
        if self.size == 1:
            return compute()
        try:
            made = compute()
        except Exception:
            self.fail()
            raise
        self.ready()
        return made

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, the same to the last bit on each."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.words)
        return total.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes. An InlayError of its is raised on all ranks."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                told[0] = make()
            except Exception as e:
                error, told[1] = e, str(e)
        dist.broadcast_object_list(told, src=0, group=self.words)
        if error is not None:
            raise error
        if told[1] is not None:
            raise InlayError(told[1])
        return told[0]

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, on rank 0; elsewhere this rank's own."""
        if self.size == 1 or not self.first:
            if self.size > 1:
                dist.gather_object(value, None, dst=0, group=self.words)
            return [value]
        found: list[Any] = [None] * self.size
        dist.gather_object(value, found, dst=0, group=self.words)
        return found

    def neighbours(self) -> list[int]:
        """The ranks of this machine, this one among them."""
        names: list[Any] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(names, platform.node(), group=self.words)
        return [r for r, name in enumerate(names) if name == names[self.rank]]

    def same(self, value: Any, what: str) -> None:
        """Raises InlayError on every rank if one of them has another value than rank 0."""
        mine = self.from_first(lambda: value)
        (others,) = self.sums([float(mine != value)])
        if others:
            raise InlayError(f"{what} is not the same in all processes of this run; start them with the same inputs")

    @torch.no_grad()
    def align(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all ranks the values of rank 0, in place."""
        for name in sorted(tensors) if self.size > 1 else ():
            dist.broadcast(tensors[name].detach(), src=0)

    @torch.no_grad()
    def add_gradients(self, trained: Mapping[str, nn.Parameter], reached: Sequence[bool]) -> None:
        """Replace gradients by their sums over the ranks.

        One bucket in the order of names: an order that all ranks share, whatever their part of the batch met. A rank
        that gave a tensor no gradient contributes zeros; a tensor that no rank reached keeps none.
        """
        if self.size == 1:
            return
        own = [trained[n] for n, there in zip(sorted(trained), reached, strict=True) if there]
        if not own:
            return
        bucket = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten().float() for p in own])
        dist.all_reduce(bucket)
        for p, total in zip(own, bucket.split([p.numel() for p in own]), strict=True):
            p.grad = total.view_as(p).to(p.dtype)

    @torch.no_grad()
    def sum_of_mean(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Turn gradients that were averaged over the ranks into sums. Here and not in the loss: its backward in fp16
        would overflow the earlier the more ranks there are."""
        for p in trained.values():
            if p.grad is not None:
                p.grad.mul_(self.size)


ALONE = Team()


class Shared:
    """A way of which each rank goes its part."""

    def __init__(self, way: Way, team: Team):
        self.way, self.team, self.host = way, team, way.host
        self.home: dict[int, int] = {}
        """The rank that always computes an example, by the example's identity, where that matters."""

    def parts(self, examples: Sequence[Example]) -> list[list[Example]]:
        """What each rank computes; some may be empty."""
        if not all(id(e) in self.home for e in examples):
            return shares(examples, self.team.size)
        return [[e for e in examples if self.home[id(e)] == rank] for rank in range(self.team.size)]

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This rank's groups; none if there are fewer examples than ranks."""
        return self.way.split(self.parts(examples)[self.team.rank])

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """As the way's own."""
        return self.way.loss(rows)

    def tokens(self, rows: Sequence[Example], read: Read | None, through: bool) -> tuple[Tensor, Tensor | None]:
        """As the way's own."""
        return self.way.tokens(rows, read, through)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """As the way's own."""
        return self.way.active()

    def remember(
        self, name: str, examples: Sequence[Example], where: Path | Literal["ram"], base: str = "", beside: int = 0
    ) -> str:
        """Each rank keeps a share of its own, and computes the examples in it from now on: one that went to another
        rank in the next epoch would not be found there."""
        if isinstance(self.way, Plain):
            return self.way.remember(name, examples, where)
        team, every = self.team, shares(examples, self.team.size)
        sizes = [needed(self.host, part) for part in every]
        mates = sum(sizes[r] for r in team.neighbours() if r != team.rank)
        own = where if where == "ram" else file(where.parent, team.rank, team.size)
        said = team.together(lambda: self.way.remember(name, every[team.rank], own, base, mates))
        self.home = {id(e): rank for rank, part in enumerate(every) for e in part}
        return f"{said} in process {team.rank} of {team.size}, {max(sizes):,} in the fullest, {sum(sizes):,} in all"
