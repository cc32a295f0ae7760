"""What facts do to each other when they are learned together: joint against single training, gradients, single steps.

I_K = mean over items of m(trained alone) - m(trained with K - 1 others), each shown equally often at a constant rate.
The definitions are ours; that facts learned together disturb each other is the claim of Wang & Li (2024, abstract).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.engine.example import scored
from inlay.evaluate.bar import bar
from inlay.knowledge.curves import paired_seeds
from inlay.knowledge.exam import Exam
from inlay.knowledge.feature import features
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings
from inlay.knowledge.states import progress as gone
from inlay.knowledge.trial import Practice, Trial, losses
from inlay.train.loop import adamw


# ---- on any parameters -----------------------------------------------------------------------------------------------
def gradients(loss_of: Callable[[int], Tensor], n: int, parameters: Sequence[Tensor]) -> Tensor:
    """Gradient of each item's loss, flattened (N, P), float32 on the CPU; parameters it does not reach have 0."""
    rows = []
    for i in range(n):
        found = torch.autograd.grad(loss_of(i), list(parameters), allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([g.detach().flatten().float().cpu() for g in flat]))
    return torch.stack(rows)


def cosines(g_NP: Tensor) -> np.ndarray:
    """Cosine of each pair of gradients (N, N); 0 where one vanishes."""
    g = g_NP.double()
    size = g.norm(dim=1, keepdim=True)
    g = torch.where(size > 0, g / size.clamp_min(1e-300), 0.0)
    made: np.ndarray = (g @ g.T).clamp(-1, 1).numpy()
    return made


def influence(
    step_on: Callable[[int], None], losses_now: Callable[[], Tensor], n: int, parameters: Sequence[Tensor]
) -> np.ndarray:
    """Change of item j's loss by one step on item i, (i, j) in an (N, N); parameters are as before at the end."""
    kept = [p.detach().clone() for p in parameters]
    before, rows = losses_now(), []
    for i in range(n):
        try:
            step_on(i)
            rows.append(losses_now() - before)
        finally:
            with torch.no_grad():
                for p, was in zip(parameters, kept, strict=True):
                    p.copy_(was)
    return torch.stack(rows).double().cpu().numpy()


def pairs(matrix, relation: Sequence[str], tsd=None) -> dict[str, float]:
    """Means over pairs of different items: all, share below 0, same and different relation, near and far targets.

    Args:
        tsd: distances (N,); a pair is near if both are in the nearer half, far if both are in the farther.
    """
    m = np.asarray(matrix, float)
    off = ~np.eye(len(m), dtype=bool)
    same = np.equal.outer(np.asarray(relation, dtype=object), np.asarray(relation, dtype=object))
    masks = {"mean": off, "same_relation": off & same, "other_relation": off & ~same.astype(bool)}
    if tsd is not None:
        near = np.asarray(tsd, float) <= np.median(tsd)
        masks |= {"near": off & np.outer(near, near), "far": off & np.outer(~near, ~near)}
    found = {k: float(m[v.astype(bool)].mean()) if v.any() else float("nan") for k, v in masks.items()}
    values = m[off]
    return found | {"below_zero": float((values < 0).mean()) if len(values) else float("nan")}


# ---- on the engine ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """A host to try things on, and how."""

    host: Host
    tokenizer: Any
    practice: Practice
    measure: MeasureSettings = field(default_factory=MeasureSettings)

    def __post_init__(self) -> None:
        if self.measure.present == "soft":
            raise InlayError("interference compares free-running answers: leave present at greedy")

    def trial(self, items: Sequence[Item], **more: Any) -> Trial:
        """A training on these items."""
        return Trial(self.host, self.tokenizer, items, self.practice, wording=self.measure.wording, **more)

    def exam(self, items: Sequence[Item]) -> Exam:
        """Questions about these items."""
        return Exam(self.host, self.tokenizer, items, self.measure)

    def said(self, items: Sequence[Item], plan: str | None, layer: int = -1) -> np.ndarray:
        """`predict` features: the state before the first word of the answer (N, D)."""
        prompts, nothing = [i.prompt for i in items], [""] * len(items)
        with self.host.using(plan):
            z = features(self.host, self.tokenizer, prompts, nothing, f"predict:{layer}", wording=self.measure.wording)
        made: np.ndarray = z.numpy()
        return made


def groups(probes: int, others: int, k: int) -> list[tuple[list[int], list[int]]]:
    """(probes, others) of each joint training of k items, as indices: every probe is in one group; groups are filled up
    with others, different ones as far as they last."""
    found, taken = [], 0
    for at in range(0, probes, k):
        own = list(range(at, min(at + k, probes)))
        lacking = k - len(own)
        if lacking > others:
            raise InlayError(f"{k} items together need {lacking} besides {len(own)} probes, but there are {others}")
        found.append((own, [(taken + n) % others for n in range(lacking)]))
        taken += lacking
    return found


def curve(
    bench: Bench,
    probes: Sequence[Item],
    others: Sequence[Item],
    retained: Sequence[Item],
    ks: Sequence[int],
    presentations: int = 8,
    show: bool = False,
) -> dict[str, Any]:
    """The curve of I_K, and suppression of features, over group sizes `ks` (1 is always there).

    Args:
        probes: items that are trained alone, and in groups of each size.
        others: items that fill up larger groups.
        retained: facts that are never trained, which the base knows.

    Returns:
        `curve`: per k its drop (of exact match) with a 95 % bootstrap interval, `drop_p` (probability of the target),
        `drop_progress`, em, p, retention, optimizer steps, presentations; `suppression`: of the largest group, the
        ratio of feature movements joint to single and their cosine, means over probes.
    """
    _apart(probes, others, retained)
    ks = sorted({1, *ks})
    plans = {k: groups(len(probes), len(others), k) for k in ks}
    exam, kept = bench.exam(probes), bench.exam(retained)
    base, tsd = bench.said(probes, None), exam.distance(exam.answers(None))
    found: dict[int, dict[str, Any]] = {}
    with bar(show) as shown:
        mark = shown.add_task("interference", total=sum(map(len, plans.values())))
        for k, plan in plans.items():
            found[k] = _size(bench, exam, kept, list(others), plan, presentations, tsd, lambda: shown.advance(mark))
    single, points = found[1], []
    for k, now in found.items():
        drop = paired_seeds(single["em_N"][None].astype(float), now["em_N"][None].astype(float))
        points.append(
            {
                "k": k,
                "drop": drop.difference,
                "low": drop.low,
                "high": drop.high,
                "drop_p": float(np.mean(single["p_N"] - now["p_N"])),
                "drop_progress": float(np.nanmean(single["progress_N"] - now["progress_N"])),
                "em": float(now["em_N"].mean()),
                "p": float(now["p_N"].mean()),
                "retention": float(np.mean(now["retention"])),
                "steps": now["steps"],
                "presentations": presentations,
            }
        )
    last = found[ks[-1]]
    return {"curve": points, "suppression": suppression(base, single["said_ND"], last["said_ND"])}


def _apart(probes: Sequence[Item], others: Sequence[Item], retained: Sequence[Item]) -> None:
    if not probes or not retained:
        raise InlayError("interference needs probe items, and facts that are not trained to see what they lose")
    trained = {i.id for i in (*probes, *others)}
    if both := [i.id for i in retained if i.id in trained] or [i.id for i in others if i.id in {p.id for p in probes}]:
        raise InlayError(f"item {both[0]!r} has two roles; probes, others and retained facts must be different items")


def _size(
    bench: Bench, exam: Exam, kept: Exam, others: list[Item], plan: list, presentations: int, tsd: np.ndarray, tick: Any
) -> dict[str, Any]:
    """All groups of one size: what became of every probe (N,), and of the retained facts."""
    n = len(exam.items)
    out: dict[str, Any] = {"em_N": np.zeros(n, bool), "p_N": np.zeros(n), "said_ND": [None] * n, "retention": []}
    said = [""] * n
    for own, filling in plan:
        mine = [exam.items[i] for i in own]
        with bench.trial([*mine, *(others[i] for i in filling)], presentations=presentations) as trial:
            trial.to()
            part = bench.exam(mine)
            answers = part.answers(trial.name)
            z, p = bench.said(mine, trial.name), _probability(trial, len(mine))
            for i, a, em, state, prob in zip(own, answers, part.right(answers), z, p, strict=True):
                said[i], out["em_N"][i], out["said_ND"][i], out["p_N"][i] = a, em, state, prob
            out["retention"].append(float(kept.right(kept.answers(trial.name)).mean()))
            out["steps"] = trial.total
        tick()
    out["said_ND"] = np.stack(out["said_ND"])
    out["progress_N"] = gone(tsd, exam.distance(said))
    return out


def _probability(trial: Trial, first: int) -> np.ndarray:
    """Probability of the whole target of the first items of a trial (n,), end token included."""
    rows = trial.rows[:first]
    with _still(trial):
        mean = losses(trial.loop, rows)
    made: np.ndarray = torch.exp(-mean * torch.tensor([scored(r.labels) for r in rows], dtype=torch.float64)).numpy()
    return made


@contextlib.contextmanager
def _still(trial: Trial) -> Iterator[None]:
    """The adapter worn, without dropout."""
    with trial.active():
        trial.host.model.eval()
        yield


def suppression(base_ND, single_ND, joint_ND) -> dict[str, float]:
    """How far `predict` features move jointly against alone, and whether the same way: means over items."""
    one, many = np.asarray(single_ND, float) - base_ND, np.asarray(joint_ND, float) - base_ND
    a, b = np.linalg.norm(one, axis=1), np.linalg.norm(many, axis=1)
    moved = (a > 1e-9) & (b > 1e-9)
    if not moved.any():
        return {"ratio": float("nan"), "cosine": float("nan")}
    return {
        "ratio": float((b[moved] / a[moved]).mean()),
        "cosine": float(((one * many).sum(1)[moved] / (a * b)[moved]).mean()),
    }


def pairwise(bench: Bench, items: Sequence[Item], after: int = 0, show: bool = False) -> dict[str, Any]:
    """Gradient cosines and the influence matrix of at most some dozen items.

    Args:
        after: steps of joint training before they are taken; 0: at the adapter's start.
    """
    relation = [i.relation for i in items]
    exam = bench.exam(items)
    tsd = exam.distance(exam.answers(None))
    with bench.trial(items, steps=max(1, after)) as trial:
        trial.to(after)
        parameters = list(trial.loop.trained.values())
        named = trial.loop.trained
        with _still(trial), bar(show) as shown:
            mark = shown.add_task("influence", total=2 * len(items))

            def loss_of(i: int) -> Tensor:
                shown.advance(mark)
                row = trial.rows[i]
                return trial.loop.way.loss([row]) / scored(row.labels)

            g = gradients(loss_of, len(items), parameters)

            def step_on(i: int) -> None:
                optimizer = adamw(named, trial.loop.settings.optim)
                loss_of(i).backward()
                nn.utils.clip_grad_norm_(parameters, trial.loop.settings.optim.clip or float("inf"))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            delta = influence(step_on, lambda: losses(trial.loop, trial.rows), len(items), parameters)
    cosine = cosines(g)
    return {
        "gradients": {"cosine": cosine, "relation": relation, "pairs": pairs(cosine, relation, tsd), "after": after},
        "influence": {"delta": delta, "relation": relation, "pairs": pairs(delta, relation, tsd), "after": after},
    }
