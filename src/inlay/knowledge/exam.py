"""Asking a model what it knows, again and again: answers, exact match, distances, paraphrases, other facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlay.core.host import Host
from inlay.knowledge.distance import nearest, tolerance
from inlay.knowledge.feature import features
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, answer_limit, answers, target_features
from inlay.knowledge.states import Recompute, states
from inlay.knowledge.wording import exact


class Exam:
    """The same questions for any adapter of a host; what stays the same is made once."""

    def __init__(self, host: Host, tokenizer: Any, items: Sequence[Item], settings: MeasureSettings | None = None):
        self.host, self.tokenizer, self.items = host, tokenizer, list(items)
        self.settings = settings or MeasureSettings()
        self.limit = answer_limit(tokenizer, self.items, self.settings)
        self.targets = target_features(host, tokenizer, self.items, self.settings)
        self.tau = tolerance(self.settings.space.name)

    def answers(self, plan: str | None, prompts: Sequence[str] | None = None) -> list[str]:
        """What the model says (to the items' own prompts), wearing an adapter or, for None, nothing."""
        asked = [i.prompt for i in self.items] if prompts is None else prompts
        return answers(self.host, self.tokenizer, asked, self.settings, self.limit, plan)

    def right(self, said: Sequence[str]) -> np.ndarray:
        """Exact match of an answer per item (N,)."""
        return np.array([exact(a, i) for a, i in zip(said, self.items, strict=True)], dtype=bool)

    def features(self, said: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Features (N, D) of answers, under the bare base."""
        asked = [i.prompt for i in self.items] if prompts is None else prompts
        s = self.settings
        z = features(self.host, self.tokenizer, asked, said, s.space, wording=s.wording, mean=self.targets.mean)
        made: np.ndarray = z.numpy()
        return made

    def distance(self, said: Sequence[str]) -> np.ndarray:
        """Distance of an answer per item from the nearest of its right ones (N,)."""
        return self._distance(self.features(said), np.arange(len(self.items)))

    def _distance(self, z: np.ndarray, of: np.ndarray) -> np.ndarray:
        import torch

        each = [self.targets.each[i] for i in of]
        made: np.ndarray = nearest(torch.from_numpy(z), each, self.settings.metric).numpy()
        return made

    def recompute(self, said: Sequence[str]) -> Recompute:
        """For the null of deviation: an answer dealt to another item, read in that item's prompt."""
        kept: dict[tuple[int, str], float] = {}

        def deal(receiving: np.ndarray, giving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            pairs = [(int(i), said[j]) for i, j in zip(receiving, giving, strict=True)]
            if fresh := [p for p in dict.fromkeys(pairs) if p not in kept]:
                of = np.array([i for i, _ in fresh])
                z = self.features([a for _, a in fresh], [self.items[i].prompt for i in of])
                kept.update(zip(fresh, self._distance(z, of), strict=True))
            em = np.array([exact(a, self.items[i]) for i, a in pairs], dtype=bool)
            return np.array([kept[p] for p in pairs]), em

        return deal

    def snapshot(self, plan: str | None, step: int, tsd: np.ndarray | None = None) -> dict[str, Any]:
        """One entry of a run's snapshots; without `tsd` it is the start, from which all is measured."""
        said = self.answers(plan)
        em, z = self.right(said), self.features(said)
        distance = self._distance(z, np.arange(len(said)))
        start = distance if tsd is None else tsd
        state = states(start, distance, em, self.tau)
        return {"step": step, "answers": said, "em": em, "distance": distance, "state": state, "features": z}

    def paraphrases(self, plan: str | None) -> np.ndarray:
        """Share of an item's paraphrases that are answered rightly (N,); NaN for items without any."""
        owner = [n for n, i in enumerate(self.items) for _ in i.paraphrases]
        if not owner:
            return np.full(len(self.items), np.nan)
        said = self.answers(plan, [p for i in self.items for p in i.paraphrases])
        right = [exact(a, self.items[n]) for a, n in zip(said, owner, strict=True)]
        count = np.bincount(owner, minlength=len(self.items))
        hits = np.bincount(owner, right, minlength=len(self.items))
        return np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)


def known(exam: Exam) -> list[Item]:
    """The items whose question the bare base answers rightly."""
    return [i for i, ok in zip(exam.items, exam.right(exam.answers(None)), strict=True) if ok]
