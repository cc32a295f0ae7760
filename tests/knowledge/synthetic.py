"""A made-up study as plain data: enough of everything for each figure."""

from __future__ import annotations

import numpy as np

from inlay.knowledge.states import states, unit

STEPS = (0, 25, 50, 100, 200)


def table(n: int = 120, wide: int = 24, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(3, wide))
    relation = draw.integers(3, size=n)
    target = centers[relation] + 0.8 * draw.normal(size=(n, wide))
    answer = target + draw.choice([0.4, 0.8, 1.3, 3.0], size=(n, 1)) * draw.normal(size=(n, wide))
    return {
        "id": [f"i{i}" for i in range(n)],
        "relation": [("city", "job", "colour")[r] for r in relation],
        "answer0": [f"w{i}" for i in range(n)],
        "target": [f"t{i}" for i in range(n)],
        "em0": np.zeros(n, bool),
        "tsd": 1 - (unit(answer) * unit(target)).sum(1),
        "empty": np.zeros(n, bool),
        "tie": np.zeros(n, bool),
        "n_tokens": draw.integers(1, 4, size=n),
        "features": target,
        "answer_features": answer,
    }


def run(made: dict, seed: int = 0, name: str = "lora", **more) -> dict:
    """Snapshots of items that wander, then arrive; the far ones late."""
    draw = np.random.default_rng([seed, *name.encode()])
    n, d0 = len(made["id"]), np.asarray(made["tsd"])
    target, answer = unit(made["features"]), unit(made["answer_features"])
    when = draw.exponential(60, n) * (0.5 + d0)
    snapshots = []
    for step in STEPS:
        em = when < step
        z = answer + (draw.normal(size=answer.shape) * 0.12 if step else 0)
        z[em] = target[em]
        d = 1 - (unit(z) * target).sum(1)
        snapshots.append(
            {
                "step": step,
                "answers": [
                    t if e else f"w{step}-{i}" for i, (t, e) in enumerate(zip(made["target"], em, strict=True))
                ],
                "em": em,
                "distance": d,
                "state": states(d0, d, em),
                "features": z,
            }
        )
    em = float(np.mean(snapshots[-1]["em"]))
    made_run = {
        "name": f"{name}-{seed}",
        "method": name,
        "model": "made-up",
        "seed": seed,
        "regime": "edits",
        "condition": "plain",
        "table": "made-up",
        "steps": STEPS[-1],
        "presentations": 8,
        "em": em,
        "paraphrase_em": 0.9 * em,
        "retention": float(draw.uniform(0.1, 0.6)),
        "snapshots": snapshots,
    }
    return made_run | more


def study(n: int = 120, seed: int = 0, seeds: int = 3) -> dict:
    """All parts of a report."""
    draw = np.random.default_rng(seed)
    made = table(n, seed=seed)
    runs = [run(made, s, m) for m in ("lora", "series", "prefix") for s in range(seeds)]
    block = np.equal.outer(made["relation"][:24], made["relation"][:24])
    gradients = 0.4 * block + 0.15 * draw.normal(size=(24, 24))
    np.fill_diagonal(gradients, 1)
    influence = 0.05 * draw.normal(size=(24, 24)) + 0.1 * block - 2 * np.eye(24)
    curve = [
        {
            "k": k,
            "drop": d,
            "low": d - 0.05,
            "high": d + 0.06,
            "em": 1 - d,
            "retention": r,
            "steps": 8,
            "presentations": 8,
            "drop_p": d,
        }
        for k, d, r in ((1, 0.0, 0.95), (4, 0.01, 0.9), (24, 0.05, 0.6), (96, 0.2, 0.3), (360, 0.4, 0.1))
    ]
    front = {
        "lam": [0, 0.5, 1, 2, 4],
        "distance": [0.3, 0.31, 0.35, 0.4, 0.48],
        "spread": [0.7, 0.75, 0.8, 0.83, 0.85],
        "random_distance": draw.normal(0.55, 0.02, 60),
        "random_spread": draw.normal(0.8, 0.01, 60),
    }
    names = (
        "random subset",
        "lowest distance",
        "filter A",
        "weights, β = -2",
        "confidence weights",
        "shuffled weights",
    )
    rows = [
        {
            "name": c,
            "kind": "filter" if i < 3 else "weights",
            "against": "random subset" if i < 3 else "uniform",
            "remedy": c in ("filter A", "weights, β = -2"),
            "difference": 0.05 * i,
            "low": 0.05 * i - 0.04,
            "high": 0.05 * i + 0.03,
            "em": 0.5,
            "paraphrase_em": 0.4,
            "paraphrase_em_kept": 0.6 if i < 3 else None,
            "retention": 0.2 + 0.02 * i,
            "seeds": 3,
        }
        for i, c in enumerate(names)
    ]
    return {
        "schema": 1,
        "title": "A made-up study",
        "about": {"model": "none", "items": n, "seeds": 3},
        "notes": ["Nothing here was measured."],
        "tables": {"made-up": made},
        "runs": runs,
        "interference": [
            {
                "name": "lora",
                "curve": curve,
                "gradients": {"cosine": gradients, "relation": made["relation"][:24]},
                "influence": {"delta": influence, "relation": made["relation"][:24]},
                "suppression": {"ratio": 0.8, "cosine": 0.7},
            },
            {"name": "series", "curve": [{**p, "drop": p["drop"] / 2} for p in curve]},
        ],
        "filter": {"front": front, "chosen": 1, "tsd": made["tsd"], "kept": made["tsd"] < 0.6},
        "weights": {
            "steps": [1, 50, 100],
            "counts": [[0] * 4 + [3, 26, 3] + [0] * 4, [0, 1, 2, 4, 6, 9, 5, 3, 1, 1, 0], [3] * 11],
            "edges": [5 ** (2 * i / 9 - 1) for i in range(10)],
        },
        "controls": rows,
    }
