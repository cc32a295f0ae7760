"""Weights by semantic distance, the soft distance they may follow, and the weighted loss.

That training attentive to semantic distance helps is the paper's claim ("Semantic are Beacons", Wang and Li 2024,
abstract); its weight function is not known. These formulas are ours.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inlay.core.errors import InlayError

IGNORED = -100
KAPPA = 5.0
AT_A_TIME = 1 << 22
"""Probabilities held at a time."""


@torch.no_grad()
def weights(x: Tensor, beta: float, kappa: float = KAPPA) -> Tensor:
    """Weights (B,) of mean 1, in float64, from signals x (B,): exp(beta x) over its mean, between 1/kappa and kappa
    before it is brought to mean 1 once more. Far items weigh more for beta > 0, near ones for beta < 0.
    """
    check(beta, kappa)
    if not bool(x.isfinite().all()):
        raise InlayError("a signal is not finite, so there is no weight; measure the items again")
    if not x.numel():
        return x.detach().double()
    power = beta * x.detach().double()
    raw = (power - power.max()).exp()  # a common factor leaves with the mean
    clipped = (raw / raw.mean()).clamp(1 / kappa, kappa)
    return clipped / clipped.mean()


@torch.no_grad()
def weights_by_mean(x: Tensor, beta: float, mean: float, kappa: float = KAPPA) -> Tensor:
    """Approximate weights (B,) where not all of a batch is known: exp(beta x) over a mean of earlier steps, between
    1/kappa and kappa. Their mean is only near 1."""
    check(beta, kappa)
    return ((beta * x.detach().double()).exp() / mean).clamp(1 / kappa, kappa)


def check(beta: float, kappa: float) -> None:
    """Raises InlayError for settings that make no weights."""
    if kappa < 1:
        raise InlayError(f"kappa bounds weights to between 1/kappa and kappa and must be 1 or more, not {kappa:g}")
    if not abs(beta) <= 100:
        raise InlayError(f"beta {beta:g} is out of reach of exp(beta x); values between -5 and 5 make sense")


class RunningMean:
    """Mean of exp(beta x) over steps, exponentially fading, without the bias of its start (as Adam's moments).

    sum and count fade alike, so that steps with more items count more; a schedule that moves beta makes it lag, by
    about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float = 0.9):
        self.decay, self.total, self.count = decay, 0.0, 0.0

    @property
    def known(self) -> bool:
        """Whether any step has been seen."""
        return self.count > 0

    @property
    def mean(self) -> float:
        """The mean; known only after an update."""
        return self.total / self.count

    def update(self, total: float, count: float) -> None:
        """One step's sum of exp(beta x) and number of items, over all ranks."""
        self.total = self.decay * self.total + (1 - self.decay) * total
        self.count = self.decay * self.count + (1 - self.decay) * count

    def state(self) -> Tensor:
        """For a checkpoint."""
        return torch.tensor([self.total, self.count], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """From a checkpoint."""
        self.total, self.count = state.tolist()


def token_distance(logits_NV: Tensor, target_N: Tensor, E_VD: Tensor, top_k: int | None = None) -> Tensor:
    """1 - cos(sum_v p(v) E[v], E[target]) per position (N,), float32: 0 where the right token has all probability.

    A zero vector counts as orthogonal. Differentiable in the logits. `top_k`: only the likeliest tokens enter the sum.
    """
    logits = logits_NV.float()
    if top_k is not None and top_k < logits.shape[-1]:
        value, token = logits.topk(top_k, dim=-1)
        expected_ND = torch.einsum("nk,nkd->nd", value.softmax(-1), E_VD[token].float())
    else:
        expected_ND = logits.softmax(-1) @ E_VD[: logits.shape[-1]].float()
    a, b = F.normalize(expected_ND, dim=-1), F.normalize(E_VD[target_N].float(), dim=-1)
    # Half the squared distance of unit vectors: 1 - cos, but exact near 0.
    square = (a - b).square().sum(-1)
    nothing = ~a.bool().any(-1) | ~b.bool().any(-1)
    return torch.where(nothing, torch.ones_like(square), square / 2)


def soft_distance(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    E_VD: Tensor,
    *,
    chunk: int | None = None,
    top_k: int | None = None,
    skip: Collection[int] = (),
) -> Tensor:
    """Soft distance (B,) of what is predicted from what should be: the mean of `token_distance` over answer positions.

    Args:
        logits_BTV: at each position, of the token `labels_BT` has at the same position (already shifted).
        labels_BT: -100 where nothing is to be said. An item without positions has distance 0.
        E_VD: input embeddings of the bare base.
        chunk: positions computed at a time; as many as fit a small buffer by default. Changes memory, not the result.
        skip: labels that are no part of an answer, such as the end token.
    """
    keep_BT = answer_positions(labels_BT, skip)
    logits_NV, target_N = logits_BTV[keep_BT], labels_BT[keep_BT]
    step = chunk or max(1, AT_A_TIME // logits_BTV.shape[-1])
    again = torch.is_grad_enabled() and logits_NV.requires_grad
    parts = [
        checkpoint(token_distance, logits, target, E_VD, top_k, use_reentrant=False)
        if again
        else token_distance(logits, target, E_VD, top_k)
        for logits, target in zip(logits_NV.split(step), target_N.split(step), strict=True)
    ]
    each_N = torch.cat(parts) if parts else logits_NV.new_zeros(0)
    return item_means(each_N, keep_BT.sum(1))


def answer_positions(labels: Tensor, skip: Collection[int] = ()) -> Tensor:
    """Where labels are part of an answer."""
    keep = labels != IGNORED
    for token in skip:
        keep = keep & (labels != token)
    return keep


def item_means(each_N: Tensor, count_B: Tensor) -> Tensor:
    """Means (B,) of values that stand item after item, `count_B[i]` of item i; 0 for an item without any."""
    owner_N = torch.repeat_interleave(torch.arange(len(count_B), device=each_N.device), count_B.to(each_N.device))
    total_B = each_N.new_zeros(len(count_B)).index_add(0, owner_N, each_N)
    return total_B / count_B.to(total_B).clamp_min(1)


def weighted_loss(logits_BTV: Tensor, labels_BT: Tensor, w_B: Tensor | None = None) -> Tensor:
    """(1/B) sum_i w_i (1/n_i) sum_j CE_ij: the mean over items of their weighted mean cross entropies.

    Args as of `soft_distance`. No gradient reaches the weights (ones if not given); an item without positions adds 0.
    """
    keep_BT = labels_BT != IGNORED
    each_N = F.cross_entropy(logits_BTV[keep_BT].float(), labels_BT[keep_BT], reduction="none")
    loss_B = item_means(each_N, keep_BT.sum(1))
    return (loss_B if w_B is None else loss_B * w_B.detach().to(loss_B)).mean()
