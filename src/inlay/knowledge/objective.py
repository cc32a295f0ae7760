"""The loss that looks at semantic distance, as an objective of the training loop.

L = (1/B) sum_i w_i (1/n_i) sum_j CE_ij + gamma (1/B) sum_i Dsoft_i over the whole effective batch, all ranks and
micro-batches together. What is the paper's in this, and what is ours, is in docs/knowledge.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.engine.example import IGNORED, Example, learned
from inlay.evaluate.bar import bar
from inlay.knowledge.feature import embeddings
from inlay.knowledge.settings import KnowSettings
from inlay.knowledge.weights import RunningMean, item_means, token_distance, weights, weights_by_mean
from inlay.train.objective import Survey
from inlay.train.ways import Way

BINS = 11
"""Bins of the histogram of weights in the metrics; see `edges`."""
LOSS, SOFT, UNSURE = range(3)
"""Numbers of an item: mean cross entropy; mean soft distance; 1 - mean probability of the answer's tokens."""


def edges(kappa: float) -> list[float]:
    """Borders (BINS - 1) between the bins of weights: equal ratios from 1/kappa to kappa."""
    return [kappa ** (2 * i / (BINS - 2) - 1) for i in range(BINS - 1)]


class Semantic:
    """Weights by a signal, and the pull of gamma.

    Args:
        examples: all that are trained on.
        know: the settings; `beta` is taken from the argument of that name.
        x: distance of each example before training, for the static signal.
        E_VD: `embeddings`, needed by the soft distance.
        skip: tokens that are no part of an answer, such as the end token.
        seed: of the shuffled control.
    """

    def __init__(
        self, examples: Sequence[Example], know: KnowSettings, beta: float, x: Sequence[float] | None = None,
        E_VD: Tensor | None = None, skip: Sequence[int] = (), seed: int = 0, progress: bool = False,
    ):  # fmt: skip
        self.know, self.beta, self.E_VD, self.skip = know, beta, E_VD, frozenset(skip)
        self.seed, self.progress = seed, progress
        self.examples = list(examples)
        self.place = {id(e): i for i, e in enumerate(self.examples)}
        self.x_N = None if x is None else torch.tensor(list(x), dtype=torch.float64)
        if know.signal == "static" and (self.x_N is None or len(self.x_N) != len(self.examples)):
            raise InlayError("the static signal needs a distance for each example")
        if self.x_N is not None and not bool(self.x_N.isfinite().all()):
            raise InlayError("some distances are not finite; measure these items again or leave them out")
        if self._soft and E_VD is None:
            raise InlayError("soft distances need the base's embeddings (`inlay.knowledge.objective.embeddings`)")
        self.rate = 1.0
        self.mean = RunningMean()
        self.start_N: Tensor | None = None
        """Soft distances at the beginning of the run, for `deviation`."""

    @property
    def _soft(self) -> bool:
        return self.know.signal in ("dynamic", "deviation") or self.know.gamma > 0

    @property
    def _whole(self) -> bool:
        """Whether this step's weights are to be known before its backward passes."""
        know = self.know
        return know.weighs and (know.static or know.exact or know.control != "none" or not self.mean.known)

    @property
    def digest(self) -> str:
        """The distances and the chosen beta."""
        told = [self.beta, None if self.x_N is None else self.x_N.tolist()]
        return "-" + hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    # ---- a step ------------------------------------------------------------------------------------------------------
    def prepare(self, survey: Survey) -> None:
        """Soft distances at the start, where they are needed and no checkpoint brought them."""
        if self.know.signal != "deviation" or self.start_N is not None:
            return
        parts = []
        with bar(self.progress) as shown:
            mark = shown.add_task("distances at the start", total=len(self.examples))
            for at in range(0, len(self.examples), 256):
                some = self.examples[at : at + 256]
                parts.append(survey(some, self._read, self._numbers, 3)[:, SOFT])
                shown.advance(mark, len(some))
        self.start_N = torch.cat(parts)

    def begin(self, examples: Sequence[Example], done: float, survey: Survey) -> None:
        """The step's beta, and its weights where they are known before."""
        know = self.know
        end = self.beta if know.beta_end is None else know.beta_end
        self.now = self.beta + done * (end - self.beta)
        self.items, self.tokens = len(examples), sum(map(learned, examples))
        self.rate, self.weight, self.seen = 1.0, {}, torch.zeros(4 + BINS, dtype=torch.float64)
        if not self._whole:
            return
        rows = [self.place[id(e)] for e in examples]
        found = None
        if not know.static or know.control == "lr-matched":
            found = survey(examples, self._read if self._soft else None, self._numbers, 3)
        x_B = self._signal(found, rows)
        w_B = weights(x_B, self.now, know.kappa)
        if know.control == "shuffled":
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + int(done * 1e9))
            w_B = w_B[torch.randperm(len(w_B), generator=draw)]
        if know.control == "lr-matched" and found is not None:
            self.rate = float((w_B * found[:, LOSS]).sum() / found[:, LOSS].sum().clamp_min(1e-12))
            w_B = torch.ones_like(w_B)
        self.weight = {id(e): float(w) for e, w in zip(examples, w_B, strict=True)}
        self._tell(x_B, w_B)

    def loss(self, way: Way, rows: Sequence[Example]) -> Tensor:
        """These rows' share of the loss."""
        know = self.know
        read = know.gamma > 0 or (self._soft and know.weighs and not self.weight)
        loss_N, said_N = way.tokens(rows, self._read if read else None, know.gamma > 0)
        if not rows:  # a forward for other ranks' sake
            return loss_N.sum() + (said_N.sum() * 0.0 if said_N is not None else 0.0)
        if not know.weighs:
            w_R = torch.ones(len(rows))
        elif self.weight:
            w_R = torch.tensor([self.weight[id(e)] for e in rows])
        else:
            found = self._numbers(rows, loss_N.detach(), None if said_N is None else said_N.detach())
            x_R = self._signal(found.double().cpu(), [self.place[id(e)] for e in rows])
            w_R = weights_by_mean(x_R, self.now, self.mean.mean, know.kappa)
            self._tell(x_R, w_R)
        count_R = torch.tensor([learned(e) for e in rows])
        share_R = w_R / count_R / self.items if know.by_item else w_R / self.tokens
        each_N = torch.repeat_interleave(share_R, count_R).to(loss_N)
        total = (loss_N * each_N).sum()
        if know.gamma and said_N is not None:
            keep_N = self._answers(rows).to(said_N.device)
            soft_R = item_means(said_N[keep_N], self._per_row(rows, keep_N))
            total = total + know.gamma / self.items * soft_R.sum()
        return total

    def end(self, sums: Callable[[Sequence[float]], list[float]]) -> dict[str, Any]:
        """What weights were like: `beta`, `weights_used` (effective share of the items), `weights` (a histogram)."""
        if not self.know.weighs:
            return {}
        told = self.seen.tolist() if self.weight else sums(self.seen.tolist())  # all ranks know whole batches
        power, count, first, second, *bins = told
        self.mean.update(power, count)
        made: dict[str, Any] = {"beta": self.now, "weights_used": first**2 / (count * second)}
        return made | {"weights": [int(n) for n in bins]}

    def state(self) -> dict[str, Tensor]:
        """Running mean, soft distances at the start."""
        return {"mean": self.mean.state()} | ({} if self.start_N is None else {"start": self.start_N})

    def restore(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        if "mean" in state:
            self.mean.restore(state["mean"])
        self.start_N = state.get("start")

    # ---- the parts ---------------------------------------------------------------------------------------------------
    def _read(self, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        assert self.E_VD is not None
        if self.E_VD.device != logits_NV.device:
            self.E_VD = self.E_VD.to(logits_NV.device)
        return token_distance(logits_NV, target_N, self.E_VD)

    def _answers(self, rows: Sequence[Example]) -> Tensor:
        """Which learned tokens of these rows are of answers (N,)."""
        targets = [t for row in rows for t in row.labels[1:] if t != IGNORED]
        return torch.tensor([t not in self.skip for t in targets], dtype=torch.bool)

    @staticmethod
    def _per_row(rows: Sequence[Example], keep_N: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in keep_N.split([learned(r) for r in rows])])

    def _numbers(self, rows: Sequence[Example], loss_N: Tensor, said_N: Tensor | None) -> Tensor:
        """LOSS, SOFT (0 if not read) and UNSURE of each row (R, 3)."""
        keep_N = self._answers(rows).to(loss_N.device)
        count_R = self._per_row(rows, keep_N)
        loss_R = item_means(loss_N, torch.tensor([learned(r) for r in rows]))
        soft_R = torch.zeros_like(loss_R) if said_N is None else item_means(said_N[keep_N], count_R)
        return torch.stack([loss_R, soft_R, 1 - item_means((-loss_N[keep_N]).exp(), count_R)], 1)

    def _signal(self, found_B3: Tensor | None, rows: Sequence[int]) -> Tensor:
        """x of each item; `rows` are their places among the examples."""
        signal = self.know.signal
        if signal == "static":
            assert self.x_N is not None
            return self.x_N[list(rows)]
        assert found_B3 is not None
        if signal == "confidence":
            return found_B3[:, UNSURE]
        if signal == "dynamic":
            return found_B3[:, SOFT]
        assert self.start_N is not None
        return (found_B3[:, SOFT] - self.start_N[list(rows)]).clamp_min(0)

    def _tell(self, x: Tensor, w: Tensor) -> None:
        """Add to the step's sums: of exp(beta x), items, weights, their squares, and the histogram."""
        power = (self.now * x.double()).exp().sum()
        borders = torch.tensor(edges(self.know.kappa), dtype=torch.float64)
        bins = torch.bucketize(w.double(), borders * (1 + 1e-9)).bincount(minlength=BINS)
        sums = torch.stack([power, torch.tensor(float(len(w))), w.double().sum(), w.double().square().sum()])
        self.seen += torch.cat([sums.double(), bins.double()])


def plain(know: KnowSettings) -> bool:
    """Whether these settings ask for the plain loss."""
    return not know.weighs and not know.gamma and not know.by_item


def objective(
    examples: Sequence[Example], know: KnowSettings, beta: float, host: Host, tokenizer: Any,
    x: Sequence[float] | None = None, seed: int = 0, progress: bool = False,
) -> Semantic | None:  # fmt: skip
    """The objective that the settings ask for; None for the plain loss, whose run is then the unweighted one's."""
    if plain(know):
        return None
    soft = know.signal in ("dynamic", "deviation") or know.gamma > 0
    ends = [i for i in (tokenizer.eos_token_id,) if i is not None]
    E_VD = embeddings(host) if soft else None
    return Semantic(examples, know, beta, x, E_VD, ends, seed, progress)
