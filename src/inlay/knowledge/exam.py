"""Asking a model what it knows, again and again: answers, exact match, distances, paraphrases, other facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inlay.core.host import Host
from inlay.knowledge.distance import nearest
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, answer_limit, answers, present_features, target_features
from inlay.knowledge.states import Recompute, states
from inlay.knowledge.wording import exact


class Exam:
    """The same questions for any adapter of a host; what stays the same is made once.

    Args:
        items: facts that are asked and placed by their distance.
        retained: facts that are only asked.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: Any,
        items: Sequence[Item],
        settings: MeasureSettings | None = None,
        retained: Sequence[Item] = (),
    ):
        self.host, self.tokenizer, self.items, self.retained = host, tokenizer, list(items), list(retained)
        self.settings = settings or MeasureSettings()
        self.limit = answer_limit(tokenizer, [*self.items, *self.retained], self.settings)
        self.targets = target_features(host, tokenizer, self.items, self.settings)
        self.tau = self.settings.tau
        self.prompts = [i.prompt for i in self.items]
        self.reworded = [p for i in self.items for p in i.paraphrases]
        self.owner = [n for n, i in enumerate(self.items) for _ in i.paraphrases]

    # ---- what is said ------------------------------------------------------------------------------------------------
    def answers(self, plan: str | None, prompts: Sequence[str] | None = None) -> list[str]:
        """What the model says (to the items' own prompts), wearing an adapter or, for None, nothing."""
        asked = self.prompts if prompts is None else prompts
        return answers(self.host, self.tokenizer, asked, self.settings, self.limit, plan)

    def right(self, said: Sequence[str]) -> np.ndarray:
        """Exact match of an answer per item (N,)."""
        return _right(said, self.items)

    def right_reworded(self, said: Sequence[str]) -> np.ndarray:
        """Of answers to all paraphrases, an item's share that is right (N,); NaN for items without any."""
        right = _right(said, [self.items[n] for n in self.owner])
        count = np.bincount(self.owner, minlength=len(self.items)) if self.owner else np.zeros(len(self.items))
        hits = np.bincount(self.owner, right, minlength=len(self.items)) if self.owner else count
        return np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)

    def right_retained(self, said: Sequence[str]) -> np.ndarray:
        """Exact match of an answer per retained fact (R,)."""
        return _right(said, self.retained)

    def paraphrases(self, plan: str | None) -> np.ndarray:
        """Share of an item's paraphrases that are answered rightly (N,); NaN for items without any."""
        return self.right_reworded(self.answers(plan, self.reworded))

    # ---- where that is -----------------------------------------------------------------------------------------------
    def features(
        self, said: Sequence[str], prompts: Sequence[str] | None = None, plan: str | None = None
    ) -> np.ndarray:
        """Features (N, D) of answers; `plan` is what the model wore that said them, which matters to soft ones."""
        asked = self.prompts if prompts is None else prompts
        z = present_features(self.host, self.tokenizer, asked, said, self.settings, self.targets.mean, plan)
        made: np.ndarray = z.numpy()
        return made

    def distance(self, said: Sequence[str], plan: str | None = None) -> np.ndarray:
        """Distance of an answer per item from the nearest of its right ones (N,)."""
        return self.distance_of(self.features(said, plan=plan))

    def distance_of(self, z_ND: np.ndarray, of: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The same from features, of all items or of some."""
        each = self.targets.each if of is None else [self.targets.each[i] for i in of]
        made: np.ndarray = nearest(torch.from_numpy(z_ND), each, self.settings.metric).numpy()
        return made

    def recompute(self, said: Sequence[str], z_ND: np.ndarray | None = None) -> Recompute:
        """For the null of deviation: an answer dealt to another item, read in that item's prompt.

        Args:
            z_ND: features of the answers, for soft ones: they are dealt as they are, as embeddings know no prompt, and
                reading them under another prompt would tell what the model expects there.
        """
        kept: dict[tuple[int, int | str], float] = {}

        def deal(receiving: np.ndarray, giving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            soft = self.settings.present == "soft" and z_ND is not None
            pairs = [(int(i), int(j)) for i, j in zip(receiving, giving, strict=True)]
            keys = [(i, j if soft else said[j]) for i, j in pairs]
            if fresh := {k: p for k, p in zip(keys, pairs, strict=True) if k not in kept}:
                of, giver = (list(side) for side in zip(*fresh.values(), strict=True))
                prompts = [self.prompts[i] for i in of]
                z = z_ND[giver] if soft and z_ND is not None else self.features([said[j] for j in giver], prompts)
                kept.update(zip(fresh, self.distance_of(z, of), strict=True))
            em = np.array([exact(said[j], self.items[i]) for i, j in pairs], dtype=bool)
            return np.array([kept[k] for k in keys]), em

        return deal

    def snapshot(self, plan: str | None, step: int, tsd: np.ndarray | None = None) -> dict[str, Any]:
        """One entry of a run's snapshots, arrays over items; without `tsd` it is the start of all the others."""
        said = self.answers(plan)
        return self.placed(step, said, self.features(said, plan=plan), tsd)

    def placed(
        self, step: int, said: Sequence[str], z_ND: np.ndarray, tsd: np.ndarray | None = None, tau: float | None = None
    ) -> dict[str, Any]:
        """The same, of answers with their features. `tau`: smallest change that counts; the settings' if not given."""
        em, distance = self.right(said), self.distance_of(z_ND)
        state = states(distance if tsd is None else tsd, distance, em, self.tau if tau is None else tau)
        return {
            "step": step, "answers": list(said), "em": em, "distance": distance, "state": state, "features": z_ND
        }  # fmt: skip


def _right(said: Sequence[str], items: Sequence[Item]) -> np.ndarray:
    return np.array([exact(a, i) for a, i in zip(said, items, strict=True)], dtype=bool)


def known(exam: Exam) -> list[Item]:
    """The items whose question the bare base answers rightly."""
    return [i for i, ok in zip(exam.items, exam.right(exam.answers(None)), strict=True) if ok]
