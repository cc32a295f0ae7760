"""Run the tests that depend on the processor once for each choice of kernels, and write docs/results/processors.md.

An environment variable that a library reads makes it compute as on a lesser processor, so one machine stands for
several: kernels for AVX2, for AVX-512 without bfloat16, and either library for float32 products.

python scripts/test_processors.py              all combinations
python scripts/test_processors.py mkl onednn   some of them
python scripts/test_processors.py --tests tests/core --no-write
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "processors.md"
TESTS = ("tests/core", "tests/engine", "tests/laws", "tests/train", "tests/interop/test_trainer_packed.py")
COMBINATIONS: dict[str, dict[str, str]] = {
    "auto": {},
    "mkl": {"INLAY_CPU_PRODUCTS": "mkl"},
    "onednn": {"INLAY_CPU_PRODUCTS": "onednn"},
    "oldest": {"INLAY_CPU_PRODUCTS": "mkl", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "avx2-mkl": {"INLAY_CPU_PRODUCTS": "mkl", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx2-onednn": {"INLAY_CPU_PRODUCTS": "onednn", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512-onednn": {
        "INLAY_CPU_PRODUCTS": "onednn",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
"""Name -> environment."""


@dataclass(frozen=True)
class Outcome:
    """What one combination came to."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    """Names of tests that failed."""
    seconds: float

    def row(self, name: str) -> str:
        """A line of the table."""
        variables = " ".join(f"`{k}={v}`" for k, v in COMBINATIONS[name].items()) or "none"
        return f"| {name} | {variables} | {self.passed} | {len(self.failed)} | {self.skipped} | {self.seconds:.0f} s |"


def main() -> int:
    """Run, print, write; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="*", metavar="NAME", help=f"of {', '.join(COMBINATIONS)}; default all")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders to run")
    parser.add_argument("--jobs", type=int, default=1, help="processes, by pytest-xdist")
    parser.add_argument("--no-write", action="store_true", help="leave the page as it is")
    asked = parser.parse_args()
    if unknown := [n for n in asked.combinations if n not in COMBINATIONS]:
        parser.error(f"unknown combination {unknown[0]!r}; there is: {', '.join(COMBINATIONS)}")
    outcomes: dict[str, Outcome] = {}
    for name in asked.combinations or COMBINATIONS:
        outcomes[name] = outcome = run(COMBINATIONS[name], asked.tests, asked.jobs)
        print(f"{name}: {outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped", flush=True)
        for test in outcome.failed:
            print(f"  {test}", flush=True)
        if not asked.no_write:
            PAGE.write_text(page(outcomes, asked.tests))
    return int(any(o.failed for o in outcomes.values()))


def run(environment: Mapping[str, str], tests: Sequence[str], jobs: int) -> Outcome:
    """The fast tests in a process of their own, one thread each."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [*(["-n", str(jobs)] if jobs > 1 else []), *tests]
        quiet = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        cleared = {k: v for k, v in os.environ.items() if k not in {v for c in COMBINATIONS.values() for v in c}}
        made = subprocess.run(command, cwd=ROOT, env=cleared | quiet | environment, capture_output=True, text=True)
        if not report.is_file():
            raise SystemExit(
                f"pytest ended with {made.returncode} and no report:\n{made.stdout[-2000:]}{made.stderr[-2000:]}"
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = tuple(f"{c.get('classname', '').replace('.', '/')}.py::{c.get('name')}" for c in bad)
    return Outcome(len(cases) - len(bad) - skipped, skipped, names, time.monotonic() - began)


def page(outcomes: Mapping[str, Outcome], tests: Sequence[str]) -> str:
    """docs/results/processors.md."""
    import torch

    from inlay.core.processor import processor_name, product_library

    lines = [
        "# The tests on other processors' kernels",
        "",
        "Written by `make test-processors` (`scripts/test_processors.py`): the tests that depend on the processor, run",
        "once for each choice of kernels. What the variables mean: [engine](../engine.md#products).",
        "",
        f"- Processor: {processor_name()} ({torch.backends.cpu.get_cpu_capability()} in PyTorch); `auto` takes"
        f" {product_library()} here.",
        f"- Date: {datetime.date.today()}; Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {version('transformers')}.",
        f"- Command: `{shlex.join(['python', 'scripts/test_processors.py', *sys.argv[1:]])}`.",
        f"- Tests: {', '.join(f'`{t}`' for t in tests)}, without the slow ones.",
        "",
        "| combination | variables | passed | failed | skipped | time |",
        "| --- | --- | --- | --- | --- | --- |",
        *(o.row(name) for name, o in outcomes.items()),
    ]
    failed: dict[str, list[str]] = {}
    for name, o in outcomes.items():
        for test in o.failed:
            failed.setdefault(test, []).append(name)
    if failed:
        lines += ["", "Failed:", "", *(f"- `{test}`: {', '.join(names)}" for test, names in failed.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
