"""What a run can afford to watch: items, paraphrases and retained facts for a share of the steps' time.

Counted in tokens, never in seconds: the same run watches the same facts after the same steps on every machine.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from inlay.knowledge.items import Item

ASKED = 0.45
"""Time of a question, as a share of a training step's over as many tokens; measured are 0.25 to 0.4 where many are
asked at a time."""
LOOKED = 0.4
"""The same for a forward that looks at a probe."""
BEGUN = 1 / 16
"""What a snapshot costs for each token of its longest answer, however few are asked, in training steps."""
LEAST = 24
"""Items of a snapshot; where the budget has fewer, there are fewer snapshots."""
EARLY = 8
"""The first of several snapshots is after this part of the run, the others at equal ratios up to its end."""


@dataclass(frozen=True)
class Portion:
    """What is watched of a run, and when."""

    at: list[int]
    """Steps after which there is a snapshot; one before the first step comes on top."""
    items: list[int]
    """Places of the items that are asked, in ascending order."""
    paraphrases: list[int] | None
    """Of each of these items, which paraphrase is asked (-1: it has none); None: all of them."""
    retained: list[int]
    """Places of the retained facts that are asked."""
    probe_every: int
    """Steps between two looks at probes."""
    share: float
    """Expected part of the steps' time."""

    def chosen(self, items: Sequence[Item]) -> list[Item]:
        """The items that are asked, with the paraphrases that are."""
        own = [items[n] for n in self.items]
        if self.paraphrases is None:
            return own
        kept = [i.paraphrases[k : k + 1] if k >= 0 else () for i, k in zip(own, self.paraphrases, strict=True)]
        return [dataclasses.replace(i, paraphrases=tuple(p)) for i, p in zip(own, kept, strict=True)]


@dataclass(frozen=True)
class Asking:
    """What may be asked, and what that costs in training steps."""

    paraphrases: Sequence[int]
    """How many each item has."""
    retained: int
    """Facts that are only asked."""
    question: float
    """Tokens of a question and the longest answer, on average."""
    again: int
    """Further forwards of an item and its answer, such as for features of a hidden space."""
    limit: int
    """Tokens of the longest answer."""
    step: float
    """Tokens of a training step, on average."""

    def snapshots(self, many: int, items: int, reworded: int, retained: int) -> float:
        """So many snapshots and the one at the start, which knows the items' answers from their table."""
        asked = (reworded + retained) * (many + 1) + items * many * (1 + self.again)
        return (many + 1) * BEGUN * self.limit + ASKED * asked * self.question / self.step if many else 0.0

    def probes(self, probes: int, every: int, total: int) -> float:
        """All looks at probes, two forwards each."""
        rows = 2 * min(probes, len(self.paraphrases)) * (1 + (total - 1) // every)
        return LOOKED * rows * self.question / self.step


def spaced(total: int, snapshots: int) -> list[int]:
    """Steps of so many snapshots: at equal ratios from an eighth of the run to its end, as answers go astray early."""
    if snapshots == 1:
        return [total]
    each = (total * EARLY ** (n / (snapshots - 1) - 1) for n in range(snapshots))
    return sorted({max(1, round(step)) for step in each}) if snapshots else []


def everything(asking: Asking, at: list[int], probes: int, probe_every: int, total: int) -> Portion:
    """All of it, with what it will cost."""
    items, retained = list(range(len(asking.paraphrases))), list(range(asking.retained))
    steps = asking.snapshots(len(at), len(items), sum(asking.paraphrases), len(retained))
    steps += asking.probes(probes, probe_every, total)
    return Portion(at, items, None, retained, probe_every, steps / total)


def afford(
    asking: Asking, budget: float, snapshots: int, probes: int, probe_every: int, total: int, seed: int
) -> Portion:
    """As much as the budget has; at least a snapshot of a few items at the end, which a very short run cannot afford.

    Args:
        budget: part of the steps' time.
        probes: items that are looked at before and after a step; at most a third of the budget goes there.
    """
    whole = everything(asking, spaced(total, snapshots), probes, probe_every, total)
    if whole.share <= budget:
        return whole
    most, among = budget * total, len(asking.paraphrases)
    while probe_every < total and asking.probes(probes, probe_every, total) > most / 3:
        probe_every *= 2
    looks = asking.probes(probes, probe_every, total)
    if not snapshots:
        return dataclasses.replace(whole, probe_every=probe_every, share=looks / total)
    draw = random.Random(f"watched-{seed}")
    items, retained = draw.sample(range(among), among), draw.sample(range(asking.retained), asking.retained)
    reworded = [draw.randrange(n) if n else -1 for n in asking.paraphrases]
    having = sum(k >= 0 for k in reworded) / among

    def costs(n: int, many: int) -> float:
        return asking.snapshots(many, n, math.ceil(n * having), min(n, asking.retained))

    for many in range(snapshots, 0, -1):
        at = spaced(total, many)
        n = bisect.bisect_right(range(1, among + 1), most - looks, key=lambda k: costs(k, len(at)))
        if n >= min(LEAST, among):
            break
    n = max(n, min(LEAST, among))
    own, kept = sorted(items[:n]), sorted(retained[:n])
    steps = costs(n, len(at)) + looks
    return Portion(at, own, [reworded[i] for i in own], kept, probe_every, steps / total)
