"""Run the contract tests in one environment per row of `version_table.py`, and write docs/results/versions.md.

python scripts/test_versions.py                        all rows that were not measured with these sources
python scripts/test_versions.py --only oldest newest   some of them
python scripts/test_versions.py --try transformers==5.3.0 peft==0.18.0 --python 3.12
python scripts/test_versions.py --page                 write the page from docs/results/versions.json

Needs `uv` (`make test-versions` installs it). Environments lie in `.venvs/` and are removed once they are measured; uv
shares their files through its cache. UV_* variables (index, cache, find-links) are respected.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
from version_table import CONTRACT, ENVIRONMENTS, LEFT_OUT, ROOT, Environment  # noqa: E402
from versions_page import write_page  # noqa: E402

VENVS = ROOT / ".venvs"
LOCK = ROOT / "requirements" / "lock.txt"
RESULTS = ROOT / "docs" / "results" / "versions.json"
TRIED = VENVS / "tried.json"
LIMIT = 2 * 3600
"""Seconds after which the tests of an environment are stopped."""
KEPT_FAILURES = 20
"""Failures that are recorded by name."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "INLAY_UNTESTED": "1",
}


class NotInstallable(Exception):
    """The pins of an environment contradict each other, or a package has no wheel for its Python."""


def main() -> None:
    """Measure what was asked for, then write the page."""
    options = parse_options()
    if options.page:
        return write_page(read_records(RESULTS))
    environments, path = select(options)
    records = read_records(path)
    for environment in environments:
        key = source_key(environment)
        if not options.again and records.get(environment.name, {}).get("key") == key:
            print(f"{environment.name}: measured before", flush=True)
            continue
        records[environment.name] = {**measure(environment, options), "key": key}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records, indent=1) + "\n")
    if path == RESULTS:
        write_page(records)
    sys.exit(any(records[e.name]["outcome"] != "passed" for e in environments))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the table")
    parser.add_argument("--try", nargs="+", metavar="PACKAGE==VERSION", dest="pins", help="a row that is not recorded")
    parser.add_argument("--python", default="3.11", help="interpreter for --try (default: 3.11)")
    parser.add_argument("--tests", nargs="+", help="other tests than the contract (only with --try)")
    parser.add_argument("--jobs", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--again", action="store_true", help="measure rows that were measured, too")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--page", action="store_true", help="write the page from the recorded results, run nothing")
    options = parser.parse_args()
    if options.tests and not options.pins:
        parser.error("--tests needs --try: recorded rows all run the contract")
    return options


def select(options: argparse.Namespace) -> tuple[Sequence[Environment], Path]:
    """The environments to measure, and the file that keeps their records."""
    if options.pins:
        pins = dict(pin.split("==") for pin in options.pins)
        name = "-".join(["try", options.python, *(f"{p}-{v}" for p, v in pins.items())])
        return [Environment(name, options.python, pins)], TRIED
    known = {e.name: e for e in ENVIRONMENTS}
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        raise SystemExit(f"no environments {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[n] for n in options.only or known], RESULTS


# ---- one environment -------------------------------------------------------------------------------------------------
def measure(environment: Environment, options: argparse.Namespace) -> dict[str, Any]:
    """Create an environment, run the tests in it and describe the outcome."""
    print(f"{environment.name}: Python {environment.python}, {dict(environment.pins) or 'the lock'}", flush=True)
    folder = VENVS / environment.name
    record = {"pins": dict(environment.pins), **describe_run()}
    start = time.monotonic()
    try:
        python = create(environment, folder)
        installed = time.monotonic()
        record |= installed_versions(python)
        record |= run_tests(python, folder, options)
        record |= {"install_s": round(installed - start), "test_s": round(time.monotonic() - installed)}
    except NotInstallable as e:
        record |= {"outcome": "not installable", "reason": str(e)}
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    counts = " ".join(f"{k} {record[k]}" for k in ("passed", "failed", "skipped") if k in record)
    print(f"{environment.name}: {record['outcome']} {counts} {record.get('reason', '')}", flush=True)
    return record


def create(environment: Environment, folder: Path) -> Path:
    """Install Inlay for development with the environment's pins, all else as in the lock where the pins allow it.

    `uv pip compile` takes the versions of an existing output file wherever they satisfy the requirements.
    """
    shutil.rmtree(folder, ignore_errors=True)
    uv("venv", "--quiet", "--seed", "--python", environment.python, str(folder))
    python = folder / "bin" / "python"
    pins, wanted = folder / "pins.txt", folder / "requirements.txt"
    pins.write_text("".join(f"{p}=={v}\n" for p, v in environment.pins.items()))
    shutil.copy(LOCK, wanted)
    uv("pip", "compile", "--quiet", "--python", str(python), "--extra", "dev", "--extra", "real", "--constraint",
       str(pins), "--output-file", str(wanted), "pyproject.toml")  # fmt: skip
    uv("pip", "install", "--quiet", "--python", str(python), "--requirements", str(wanted))
    uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--editable", ".")
    return python


def uv(*arguments: str) -> None:
    """Run uv at the root of the repository.

    Raises:
        NotInstallable: with uv's last lines.
    """
    command = os.environ.get("UV") or shutil.which("uv") or "uv"
    done = subprocess.run([command, *arguments], cwd=ROOT, env=uv_variables(), capture_output=True, text=True)
    if done.returncode:
        raise NotInstallable(" ".join(done.stderr.split())[-600:])


def uv_variables() -> dict[str, str]:
    """The environment, with pyenv's interpreters on the path where there are any, for uv to find."""
    folders = sorted(glob.glob(str(Path.home() / ".pyenv/versions/3.*/bin")))
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    return {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {"PATH": path}


def installed_versions(python: Path) -> dict[str, Any]:
    """The interpreter's version, and those of the libraries with a range."""
    code = """
import json, platform
from inlay.compat.versions import TESTED, installed
versions = {r.package: installed(r.package) for r in TESTED}
print(json.dumps({"python": platform.python_version(), "versions": versions}))
"""
    done = subprocess.run([python, "-c", code], env=test_variables(), capture_output=True, text=True)
    if done.returncode:
        raise NotInstallable("import inlay: " + done.stderr.strip().splitlines()[-1])
    return dict(json.loads(done.stdout))


def run_tests(python: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run pytest and count."""
    report = folder / "report.xml"
    tests = options.tests or [t for t in CONTRACT if (ROOT / t).exists()]
    command = [
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "--tb=short",
        "--continue-on-collection-errors",
        f"--junitxml={report}",
    ]
    command += ["-n", str(options.jobs)] if options.jobs > 1 else []
    command += [] if options.tests else ["-k", " and ".join(f"not {family}" for family in LEFT_OUT)]
    log = VENVS / f"{folder.name}.log"
    with log.open("w") as out:
        try:
            subprocess.run([*command, *tests], cwd=ROOT, env=test_variables(), stdout=out, stderr=out, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"outcome": "stopped", "reason": f"not done after {LIMIT} s"}
    if not report.exists():
        return {"outcome": "failed", "reason": f"pytest wrote no report: {log.read_text()[-600:]}"}
    return count(report)


def test_variables() -> dict[str, str]:
    """Offline, one thread, the sources of this checkout."""
    return dict(os.environ) | QUIET | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def count(report: Path) -> dict[str, Any]:
    """Read a JUnit report: numbers, the failed tests with their first line, and why tests were skipped."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    passed, failures, skipped = 0, {}, {}
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            failures[name] = " ".join((bad.get("message") or "").split())[:200]
        elif skip is not None:
            reason = re.sub(r"\s+", " ", skip.get("message") or "")[:120]
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {
        "outcome": "failed" if failures or not passed else "passed",
        "passed": passed,
        "failed": len(failures),
        "skipped": sum(skipped.values()),
        "failures": dict(list(failures.items())[:KEPT_FAILURES]),
        "skip_reasons": skipped,
    }


# ---- records ---------------------------------------------------------------------------------------------------------
def read_records(path: Path) -> dict[str, Any]:
    """Name -> record."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def source_key(environment: Environment) -> str:
    """A digest of what an outcome depends on: sources, tests, lock, pins. Equal keys need no second run."""
    digest = hashlib.sha256(repr((environment, CONTRACT, LEFT_OUT)).encode())
    for path in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), LOCK, ROOT / "pyproject.toml"]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_run() -> dict[str, str]:
    """When, where and on which commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "commit": commit.stdout.strip(), "processor": processor()}


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names: Mapping[str, str] = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ": " in line)
    return names.get("model name") or platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
