"""Adapt SmolLM2-135M to real data (LoRA, series, parallel, prefix), and score base and adapters on the real test files.

    python scripts/real_model.py --data DATA                 # everything; started again, it goes on where it stopped
    python scripts/real_model.py --data DATA --estimate      # ten steps and a few items of each kind: how long it takes

DATA is a folder in LLM-Adapters' layout (AddSub/test.json, boolq/train.json ...) that also holds mawps/trainset.json.
Every step is an `inlay` command, printed before it runs, in a process of its own; `--jobs` of them run at a time, with
`--threads` threads each. The result is docs/results/real_model.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_data import training_files
from real_model_page import page

METHODS = {
    "lora": "--rank 16 --alpha 32 --at linear --lr 1e-3",
    "series": "--size 64 --at o,down --lr 1e-3",
    "parallel": "--size 64 --at q,k,v,up,down --lr 1e-3",
    "prefix": "--tokens 16 --lr 3e-2",
}
COMMON = (
    "--protocol clean --batch-size 16 --micro-batch 16 --group-by-length --warmup 0.1 --schedule cosine --cutoff 512 "
    "--final last --save-every 20 --keep-last 1 --loggers none --no-progress --resume"
)
TRAIN = {"math": "--task mawps", "commonsense": ""}
TESTS = {
    "math": "AddSub MultiArith SingleEq SVAMP gsm8k AQuA mawps".split(),
    "commonsense": "boolq piqa social_i_qa winogrande ARC-Easy ARC-Challenge openbookqa".split(),
}
HOW = {
    "math": {"generate": "--how generate --max-new-tokens 48"},
    "commonsense": {"generate": "--how generate --max-new-tokens 10", "options": "--how options"},
}


@dataclass(frozen=True)
class Job:
    """One `inlay` command, and the folder that it fills."""

    command: str
    out: Path
    done: Path
    """A file that is there once it need not run again."""


def train_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """The first method for every seed, the others for the first one, on each kind of training data."""
    files = training_files(args.data, args.out)
    for kind in args.kinds:
        for method in args.methods:
            for seed in args.seeds if method == args.methods[0] else args.seeds[:1]:
                out = args.out / kind / f"{method}-{seed}"
                command = (
                    f"inlay train --model {args.model} --dtype {args.dtype} --method {method} {METHODS[method]} "
                    f"--train-file {files[kind]} {TRAIN[kind]} --steps {args.steps[kind]} {COMMON} --seed {seed} "
                    f"--out {out} {args.train_flags}"
                )
                yield Job(command, out, out / "adapter" / "adapter.json")


def eval_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Files of one kind that are asked for the same number of items share a command, and all adapters share batches."""
    for kind in args.kinds:
        adapters = " ".join(str(j.out / "adapter") for j in train_jobs(args) if j.out.parent.name == kind)
        sizes = {task: args.items_of.get(task, args.items) for task in TESTS[kind]}
        for how, flags in HOW[kind].items():
            for size in sorted(set(sizes.values())):
                tasks = " ".join(task for task in TESTS[kind] if sizes[task] == size)
                out = args.out / kind / f"eval-{how}-{size or 'all'}"
                command = (
                    f"inlay eval --model {args.model} --dtype {args.dtype} --adapters {adapters} --bare "
                    f"--tasks {tasks} --data {args.data} --protocol clean {flags} {f'--limit {size}' if size else ''} "
                    f"--batch-size {args.batch_size} --out {out} {args.eval_flags}"
                )
                yield Job(command, out, out / "report.json")


def run(job: Job, threads: int) -> None:
    """Run a job that is not done, and add its time and peak memory to `cost.json` in its folder."""
    if job.done.exists():
        return
    print(f"$ {job.command}", flush=True)
    code = "from inlay.cli import main; raise SystemExit(main())"
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    argv = [sys.executable, "-c", code, *shlex.split(job.command)[1:]]
    process = subprocess.Popen(argv, env=os.environ | env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # the peak of this child, not of all children
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {job.command}")
    path = job.out / "cost.json"
    costs = json.loads(path.read_text()) if path.exists() else []
    cost = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    path.write_text(json.dumps([*costs, cost]))
    print(f"{job.out}: {cost['seconds'] / 60:.1f} minutes, peak {cost['peak_mib']:,.0f} MiB", flush=True)


def run_all(jobs: list[Job], args: argparse.Namespace) -> None:
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(job, args.threads), jobs))


def pairs(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--data", type=Path, required=True)
    add("--model", default="smollm2-135m")
    add("--out", type=Path, default=Path("runs/real_model"))
    add("--kinds", nargs="+", default=list(TESTS), choices=list(TESTS))
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the first method; the others run with the first seed")
    add("--steps", type=pairs, nargs="+", default=[], help="of 16 rows, default math=80 commonsense=60")
    add("--items", type=int, default=100, help="items of each test file, drawn with seed 0; 0: all")
    add("--items-of", type=pairs, nargs="+", default=[], help="items of single files, e.g. gsm8k=50 mawps=0")
    add("--dtype", default="bf16", help="of the base, in training and evaluation")
    add("--batch-size", type=int, default=48, help="of evaluation: prompts x adapters")
    add("--jobs", type=int, default=2)
    add("--threads", type=int, default=1, help="of each job")
    add("--train-flags", default="", help="more flags for `inlay train`")
    add("--eval-flags", default="", help="more flags for `inlay eval`")
    add("--page", type=Path, default=Path("docs/results/real_model.md"))
    add("--estimate", action="store_true", help="ten steps and eight items a file, in OUT/estimate; no page")
    args = parser.parse_args()
    args.steps = {"math": 80, "commonsense": 60} | dict(args.steps)
    args.items_of = dict(args.items_of)
    return args


def estimate(args: argparse.Namespace) -> None:
    """What the whole takes, from ten steps of each run and eight items of each file; start-up counted once a job."""
    steps, items, items_of = args.steps, args.items, args.items_of
    start_up = 12.0  # seconds: imports, loading, tokenising
    args.out, args.steps, args.items, args.items_of = args.out / "estimate", dict.fromkeys(TESTS, 10), 8, {}
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0.0
    for jobs, factor in ((train_jobs, lambda job: steps[job.out.parent.name] / 10), (eval_jobs, None)):
        run_all(list(jobs(args)), args)
        for job in jobs(args):
            cost = json.loads((job.out / "cost.json").read_text())[-1]
            kind = job.out.parent.name
            grow = factor(job) if factor else sum(items_of.get(t, items) or 1000 for t in TESTS[kind]) / 56
            seconds = start_up + max(cost["cpu_seconds"] - start_up, 1.0) * grow
            print(f"{job.out.relative_to(args.out)}: {cost['cpu_seconds']:.0f} s now, {seconds / 60:.1f} min in full")
            total += seconds
    print(f"in all {total / 60:.0f} CPU minutes: {total / 60 / args.jobs / args.threads:.0f} minutes on idle cores")


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.estimate:
        return estimate(args)
    trained, scored = list(train_jobs(args)), list(eval_jobs(args))
    run_all(trained, args)
    run_all(scored, args)
    args.page.write_text(page(trained, scored, args))


if __name__ == "__main__":
    main()
