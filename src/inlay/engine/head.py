"""From a packed forward to scores: the head sees the scored positions and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from inlay.core.fingerprint import readable
from inlay.core.host import Host
from inlay.core.route import Route
from inlay.core.sharded import hooks, is_spread, local
from inlay.engine.linear import forwards
from inlay.engine.loss import at_a_time, linear_cross_entropies, linear_cross_entropy
from inlay.engine.pack import Pack, twice_biased

Read = Callable[[Tensor, Tensor], Tensor]
"""A question to logits: (logits (n, V) in float32, targets (n,)) -> (n,), float32."""


def hidden(host: Host, pack: Pack) -> Tensor:
    """Last hidden states of the scored positions (N, D). Call under `apart(host)`."""
    with host.packed(pack.layout):
        out: Any = host.model.base_model(**pack.inputs, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[pack.scored_N]


@torch.no_grad()
def is_whole(host: Host) -> bool:
    """Whether logits are what the head says of the last hidden states: no cap (Gemma 2), no scale (Cohere, Granite).

    The same products are compared, so that no precision hides a difference.
    """
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.arange(4, device=host.device)[None] % vocabulary
    with host.using(None):
        said: Any = host.model(ids, use_cache=False).logits
        states: Any = host.model.base_model(ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        bare = host.model.get_output_embeddings()(states)  # type: ignore[operator]
    return bool((bare - said).abs().max() <= 1e-5 * said.abs().max())


def refused(host: Host) -> str:
    """Why this decoder is never packed, whatever a trial finds (16 bits hide differences from it); empty if it may be.
    The model is in evaluation mode and under its own attention."""
    if twice_biased(host.model):
        return "this decoder's ALiBi cannot be had under another attention"
    return "" if is_whole(host) else "this decoder changes its logits behind the head"


def log_likelihood(host: Host, pack: Pack) -> Tensor:
    """log p(target) at each scored position (N,), float32, no gradients."""
    h = hidden(host, pack)
    return torch.cat([-_slice(host, *part, "none") for part in _parts(host, pack, h)])


def loss_sum(host: Host, pack: Pack) -> Tensor:
    """Cross entropy summed over the scored positions, float32."""
    h = hidden(host, pack)
    head = host.model.get_output_embeddings()
    if _frozen(head):
        return _beside(head, linear_cross_entropy, h, pack.target_N)
    # A head with an adapter, or one that is quantised: called, and called again in backward.
    total = h.new_zeros((), dtype=torch.float32)
    for part in _parts(host, pack, h):
        total = total + _again(_slice, host, *part, "sum")
    return total


def losses(host: Host, pack: Pack, read: Read | None = None, through: bool = False) -> tuple[Tensor, Tensor | None]:
    """(cross entropy, what `read` says) of each scored position (N,), float32.

    Args:
        through: whether gradients reach what is read; they always reach the cross entropy.
    """
    h = hidden(host, pack)
    head = host.model.get_output_embeddings()
    parts = list(_parts(host, pack, h))  # at once: the head's calls move the route
    if _frozen(head):
        each_N = _beside(head, linear_cross_entropies, h, pack.target_N)
    else:
        each_N = _joined([_again(_slice, host, *part, "none") for part in parts], h)
    if read is None:
        return each_N, None
    with contextlib.nullcontext() if through else torch.no_grad():
        return each_N, _joined([_again(_read, host, *part, read) for part in parts], h)


def _beside(head: Any, entropy: Callable[..., Tensor], h_ND: Tensor, target_N: Tensor) -> Tensor:
    """Cross entropy by a frozen head's weight. A spread head is entered for it: its weight is gathered then, and FSDP2,
    which counts who of those gathered together has been called, finds everything done."""

    def entered(h_ND: Tensor) -> Tensor:
        return entropy(h_ND, head.weight, head.bias, target_N)

    if type(head) is torch.nn.Linear:
        return entered(h_ND)
    with forwards({head: entered}):
        return head(h_ND)  # type: ignore[no-any-return]


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A function whose insides are computed again in backward, if there is one."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def _joined(parts: list[Tensor], h_ND: Tensor) -> Tensor:
    return torch.cat(parts) if parts else h_ND.new_zeros(0, dtype=torch.float32)


def _parts(host: Host, pack: Pack, h_ND: Tensor) -> Iterator[tuple[Route, Tensor, Tensor]]:
    """(route, hidden states, targets) of as many positions at a time as logits may be held for."""
    step, now = at_a_time(host.model.get_output_embeddings().out_features), host.now  # type: ignore[operator]
    for at, h, target in zip(*(t.split(step) for t in (pack.scored_N, h_ND, pack.target_N)), strict=True):
        yield now.only(at), h, target


def _slice(host: Host, now: Route, h_ND: Tensor, target_N: Tensor, reduction: str) -> Tensor:
    """Cross entropy of some positions."""
    return cross_entropy(_logits(host, now, h_ND), target_N, reduction=reduction)


def _read(host: Host, now: Route, h_ND: Tensor, target_N: Tensor, read: Read) -> Tensor:
    """What is read of some positions."""
    return read(_logits(host, now, h_ND), target_N)


def _logits(host: Host, now: Route, h_ND: Tensor) -> Tensor:
    """What the head says, in float32. The route goes with it: adapters of the head find their rows, also again."""
    host.now = now
    return host.model.get_output_embeddings()(h_ND[:, None])[:, 0].float()  # type: ignore[operator]


def _frozen(head: Any) -> bool:
    """Whether a head is its weight and nothing else; any hook, an adapter's for one, may change what it says."""
    if type(head) is torch.nn.Linear:
        weight = head.weight
    elif is_spread(head, torch.nn.Linear):
        weight = local(head.weight)
    else:
        return False
    trained = any(p.requires_grad for p in head.parameters())
    return readable(weight) and not hooks(head) and not trained
