"""Adapt the embedded LLaMA-style base to real data (LoRA, series, parallel, prefix), and score the real test sets.

    python scripts/real_data.py DATA --out runs/real --seeds 0 1 2

DATA is a folder in LLM-Adapters' layout (AddSub/test.json, boolq/train.json ...) that also holds mawps/trainset.json.
Every step is an `inlay` command, printed before it runs; steps that are done are not done again. The result is
docs/results/real_data.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from inlay.tasks import get, load
from inlay.tasks.leaks import normalise, read_questions
from inlay.tasks.score import Score, score

BASE = "tiny-llama"
METHODS = {
    "lora": "--rank 16 --alpha 32 --at linear --lr 3e-3",
    "series": "--size 64 --at o,down --lr 1e-2",
    "parallel": "--size 64 --at q,k,v,up,down --lr 5e-3",
    "prefix": "--tokens 16 --std 1.0 --lr 0.2",
}
COMMON = (
    "--protocol clean --batch-size 32 --micro-batch 32 --group-by-length --warmup 0.06 --schedule cosine --cutoff 512 "
    "--final last --loggers none"
)
KINDS = {
    "math": (
        "--task mawps --epochs 5",
        "AddSub MultiArith SingleEq SVAMP gsm8k AQuA mawps".split(),
        "--max-new-tokens 48",
    ),
    "commonsense": (
        "--limit 3000 --epochs 1",
        "boolq piqa social_i_qa winogrande ARC-Easy ARC-Challenge openbookqa".split(),
        "--max-new-tokens 10",
    ),
}
TRAINED_ON = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")


def run(command: str) -> float:
    print(f"$ {command}", flush=True)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from inlay.cli import main; raise SystemExit(main())", *shlex.split(command)[1:]],
        check=True,
    )
    return time.perf_counter() - start


def training_files(data: Path, out: Path) -> dict[str, Path]:
    """MAWPS as it is; the four commonsense training sets in one file."""
    joined = out / "commonsense.json"
    if not joined.exists():
        rows = [row for name in TRAINED_ON for row in json.loads((data / name / "train.json").read_text())]
        joined.write_text(json.dumps(rows))
    return {"math": data / "mawps" / "trainset.json", "commonsense": joined}


def train_command(kind: str, method: str, seed: int, file: Path, out: Path) -> str:
    return (
        f"inlay train --model {BASE} --method {method} {METHODS[method]} --train-file {file} {KINDS[kind][0]} {COMMON} "
        f"--seed {seed} --out {out / kind / f'{method}-{seed}'}"
    )


def eval_command(kind: str, data: Path, out: Path, seeds: list[int]) -> str:
    folders = " ".join(str(out / kind / f"{m}-{s}" / "adapter") for m in METHODS for s in seeds)
    _, tasks, limit = KINDS[kind]
    return (
        f"inlay eval --model {BASE} --adapters {folders} --bare --tasks {' '.join(tasks)} --data {data} "
        f"--protocol clean {limit} --batch-size 128 --out {out / kind / 'eval'}"
    )


def unseen(data: Path, file: Path, tasks: list[str]) -> dict[str, set[int]]:
    """Per task, the test items whose question does not stand in the training file (words and numbers compared)."""
    known = {normalise(q) for q in read_questions(file)}
    tests = {get(t).name: load(t, "test", data) for t in tasks}
    return {t: {i for i, r in enumerate(rows) if normalise(r.instruction) not in known} for t, rows in tests.items()}


def scores(folder: Path, fresh: dict[str, set[int]]) -> dict[tuple[str, str], tuple[Score, Score | None]]:
    """(task, adapter) -> its score, and its score on unseen items alone where some were seen."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for line in (folder / "generations.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault((row["dataset"], row["adapter"]), []).append(row)
    found = {}
    for (task, adapter), mine in rows.items():
        kept = [r for r in mine if r["index"] in fresh[task]]
        found[task, adapter] = (
            score(mine, task, "clean"),
            score(kept, task, "clean") if 0 < len(kept) < len(mine) else None,
        )
    return found


def cell(values: list[Score]) -> str:
    """Accuracy in percent: one run with its 95 % interval (Wilson), or mean and standard deviation over seeds."""
    if len(values) == 1:
        low, high = values[0].interval
        return f"{values[0].accuracy:.1f} ({low:.1f}–{high:.1f})"
    accuracies = [v.accuracy for v in values]
    return f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"


def table(found: dict[tuple[str, str], tuple[Score, Score | None]], tasks: list[str], seeds: list[int]) -> str:
    lines = ["| test set | n | bare base | " + " | ".join(METHODS) + " |", "|---" * (3 + len(METHODS)) + "|"]
    for task in (get(t).name for t in tasks):
        for part, label in ((0, task), (1, f"{task}, unseen")):
            base = found[task, "base"][part]
            if base is None:
                continue
            row = [cell([base])] + [cell([found[task, f"{m}-{s}"][part] for s in seeds]) for m in METHODS]
            lines.append(f"| {label} | {base.n} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--report", type=Path, default=Path("docs/results/real_data.md"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = training_files(args.data, args.out)
    for kind in args.kinds:
        for method in METHODS:
            for seed in args.seeds:
                if not (args.out / kind / f"{method}-{seed}" / "adapter" / "adapter.json").exists():
                    run(train_command(kind, method, seed, files[kind], args.out))
        run(eval_command(kind, args.data, args.out, args.seeds))
    write(args, files)


def write(args: argparse.Namespace, files: dict[str, Path]) -> None:
    import transformers

    from inlay import __version__

    seeds = ", ".join(map(str, args.seeds))
    parts = [
        "# Real data on the embedded base\n\n"
        f"Adapters trained on `{BASE}` with real training files and scored on real test files: clean protocol, greedy "
        f"decoding, accuracy in percent, seeds {seeds}. "
        + (
            "One run each: 95 % Wilson intervals over the items. "
            if len(args.seeds) == 1
            else "Mean ± standard deviation over seeds; the bare base with its 95 % Wilson interval. "
        )
        + "*Unseen*: the items whose question does not stand in the training file. Written by "
        "`python scripts/real_data.py DATA`, DATA being a folder in LLM-Adapters' layout; its commands follow each "
        "table.\n"
    ]
    data = Path("DATA")
    shown = {"math": data / "mawps/trainset.json", "commonsense": Path("runs/real/commonsense.json")}
    for kind in args.kinds:
        tasks = KINDS[kind][1]
        found = scores(args.out / kind / "eval", unseen(args.data, files[kind], tasks))
        parts.append(f"## {kind}\n\n{table(found, tasks, args.seeds)}\n")
        commands = [train_command(kind, m, s, shown[kind], Path("runs/real")) for m in METHODS for s in args.seeds]
        commands.append(eval_command(kind, data, Path("runs/real"), args.seeds))
        parts.append("```bash\n" + "\n".join(commands) + "\n```\n")
    parts.append(f"inlay {__version__}, torch {torch.__version__}, transformers {transformers.__version__}.\n")
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
