"""docs/results/real_model.md from the folders that `scripts/real_model.py` filled: what it prints is what they hold."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from real_data import scores, training_files, unseen

HEAD = """# Real data on a real base

`{model}` ({form}), adapted with `inlay train` to real training files and scored with `inlay eval` on real test files.
Protocol `clean`, template `{template}`, base in {dtype}. Training: {steps}. Test files: {items}, drawn with seed 0.
Intervals: 95 %, Wilson for accuracies; bootstrap over items for differences to the bare base on the same items, with
McNemar's exact p. *Unseen*: the items whose question does not stand in the training file. Written by
`scripts/real_model.py`.

"""


def page(trained: list[Any], scored: list[Any], args: argparse.Namespace) -> str:
    """The whole page as Markdown."""
    settings = json.loads((scored[0].out / "settings.json").read_text())
    steps = ", ".join(f"{args.steps[kind]} steps of 16 rows ({kind})" for kind in args.kinds)
    sizes = [f"{n or 'all'} of {task}" for task, n in args.items_of.items()]
    items = ", ".join([f"{args.items or 'all'} items each", *sizes])
    form = settings["base"].get("form", "as published")
    template = json.loads((trained[0].out / "data.json").read_text())["template"]["name"]
    parts = [
        HEAD.format(model=args.model, form=form, template=template, dtype=args.dtype, steps=steps, items=items),
    ]
    for kind in args.kinds:
        folders: dict[str, list[Path]] = {}
        for job in scored:
            if job.out.parent.name == kind:
                folders.setdefault(job.out.name.split("-")[1], []).append(job.out)
        for how, outs in folders.items():
            parts.append(f"## {kind}: {HOW_WORDS[how]}\n\n{_accuracies(kind, how, outs, args)}\n")
            parts.append(f"Points above the bare base, same items:\n\n{_differences(outs)}\n")
    parts.append(f"## Cost of training\n\n{_costs(trained)}\n")
    parts.append(f"## Commands\n\n```bash\n{_commands([*trained, *scored], args)}\n```\n")
    parts.append(_versions(trained[0].out))
    return "\n".join(parts)


HOW_WORDS = {"generate": "answers generated, greedy", "options": "the likeliest of the given options"}


def _reports(outs: list[Path]) -> list[dict[str, Any]]:
    return [json.loads((out / "report.json").read_text()) for out in outs]


def _accuracies(kind: str, how: str, outs: list[Path], args: argparse.Namespace) -> str:
    cells = {(c["dataset"], c["adapter"]): c for report in _reports(outs) for c in report["cells"]}
    adapters = list(dict.fromkeys(adapter for _, adapter in cells))
    rows = [["test file", "n", *adapters]]
    tasks = list(dict.fromkeys(dataset for dataset, _ in cells))
    file = training_files(args.data, args.out)[kind]
    fresh = unseen(args.data, file, tasks) if how == "generate" else {}
    for out in outs if fresh else ():
        for (task, adapter), (_, part) in scores(out, fresh).items():
            if part is not None and part.n:
                low, high = part.interval
                cells[f"{task}, unseen", adapter] = {"n": part.n, "accuracy": part.accuracy, "low": low, "high": high}
    for task in tasks:
        for label in (task, f"{task}, unseen"):
            if (label, adapters[0]) in cells:
                found = [cells[label, a] for a in adapters]
                shown = [f"{c['accuracy']:.1f} ({c['low']:.1f}–{c['high']:.1f})" for c in found]
                rows.append([label, str(found[0]["n"]), *shown])
    means = [sum(cells[t, a]["accuracy"] for t in tasks) / len(tasks) for a in adapters]
    rows.append(["mean of the files", "", *(f"{m:.1f}" for m in means)])
    return _table(rows)


def _differences(outs: list[Path]) -> str:
    found = {
        (c["dataset"], c["second"]): c
        for report in _reports(outs)
        for c in report["comparisons"]
        if c["first"] == "base" and (c["dataset"] != "all" or len(outs) == 1)
    }
    adapters = list(dict.fromkeys(adapter for _, adapter in found))
    rows = [["test file", *adapters]]
    for task in dict.fromkeys(dataset for dataset, _ in found):
        pairs = [found[task, a] for a in adapters]
        rows.append([task, *(_above(p) for p in pairs)])
    return _table(rows)


def _above(p: dict[str, Any]) -> str:
    """The second run's gain over the first, which the report has the other way round; 0 - x has no negative zero."""
    return f"{0 - p['difference']:+.1f} ({0 - p['high']:+.1f} to {0 - p['low']:+.1f}), p {p['p']:.2g}"


def _costs(trained: list[Any]) -> str:
    rows = [["run", "trained numbers", "steps", "tokens", "last loss", "minutes", "CPU minutes", "peak MiB"]]
    for job in trained:
        costs = json.loads((job.out / "cost.json").read_text())
        steps = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
        last = [s for s in steps if "loss" in s][-1]
        record = json.loads(job.done.read_text())
        rows.append(
            [
                f"{job.out.parent.name}/{job.out.name}",
                f"{record['tensors']['parameters']:,}",
                str(last["step"]),
                f"{last['tokens']:,}",
                f"{last['loss']:.3f}",
                f"{sum(c['seconds'] for c in costs) / 60:.1f}",
                f"{sum(c['cpu_seconds'] for c in costs) / 60:.1f}",
                f"{max(c['peak_mib'] for c in costs):,.0f}",
            ]
        )
    return _table(rows)


def _commands(jobs: list[Any], args: argparse.Namespace) -> str:
    text = "\n".join(" ".join(job.command.split()) for job in jobs)
    return text.replace(str(args.data), "DATA").replace(str(args.out), "runs/real_model")


def _versions(out: Path) -> str:
    session = json.loads((out / "environment.json").read_text())["sessions"][-1]
    packages = ", ".join(f"{name} {version}" for name, version in session["packages"].items())
    return f"Python {session['python']}, {packages}; {session['device']}, {session['platform']}.\n"


def _table(rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
