"""docs/results/versions.md: the ranges, what each environment came to, and which pairs of bounds have met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from version_table import ENVIRONMENTS, LEFT_OUT, NEWEST, OLDEST, ROOT

PAGE = ROOT / "docs" / "results" / "versions.md"
HEAD = """# Versions

Written by `make test-versions` (`scripts/test_versions.py`) from [versions.json](versions.json); how it works is in
[../versions.md](../versions.md). Each environment runs the contract tests, those that meet another library
(`CONTRACT` in `scripts/version_table.py`), without {left_out} decoders of the zoo. CPU only.
"""


def write_page(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page from the records of all environments in the table."""
    known = {e.name: records[e.name] for e in ENVIRONMENTS if e.name in records}
    parts = [HEAD.format(left_out=len(LEFT_OUT)), ranges(), outcomes(known), failures(known), pairs(known)]
    PAGE.write_text("\n".join(part for part in parts if part))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def table(rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("---" for _ in rows[0]), *lines[1:]]) + "\n"


def ranges() -> str:
    """The supported ranges."""
    rows = [["library", "oldest", "newest tested"], *([p, OLDEST[p], NEWEST[p]] for p in OLDEST)]
    return "## Ranges\n\n" + table(rows)


def outcomes(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per environment."""
    rows: list[Sequence[object]] = [
        ["environment", "Python", *OLDEST, "passed", "failed", "skipped", "tests, s", "commit", "date"]
    ]
    for name, r in records.items():
        found = r.get("versions", {})
        shown = [f"**{found[p]}**" if p in r["pins"] else found.get(p) or "–" for p in OLDEST] if found else ["–"] * 8
        counts = [r.get(k, r["outcome"] if k == "passed" else "–") for k in ("passed", "failed", "skipped", "test_s")]
        rows.append([name, r.get("python", "–"), *shown, *counts, f"`{r['commit']}`", r["date"]])
    processors = ", ".join(sorted({r["processor"] for r in records.values()}))
    missing = [e.name for e in ENVIRONMENTS if e.name not in records]
    note = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    return f"## Environments\n\nProcessor: {processors}. Pinned versions are **bold**.\n\n" + table(rows) + note


def failures(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Names and first lines of what failed, or why an environment could not be made."""
    lines = []
    for name, r in records.items():
        if r.get("reason"):
            lines.append(f"- **{name}**: {r['reason']}")
        lines += [f"- **{name}** `{test}`: {message}" for test, message in r.get("failures", {}).items()]
    return "## Failures\n\n" + ("\n".join(lines) or "None.") + "\n"


def pairs(records: Mapping[str, Mapping[str, Any]]) -> str:
    """For every two libraries and bounds: the environments in which both were installed and the tests passed."""
    passed = {n: r["versions"] for n, r in records.items() if r["outcome"] == "passed"}
    rows: list[Sequence[object]] = [["", *(f"{b} {end}" for b in OLDEST for end in ("oldest", "newest"))]]
    sides = [(p, end, bound) for p in OLDEST for end, bound in (("oldest", OLDEST[p]), ("newest", NEWEST[p]))]
    for p, end, bound in sides:
        met = [sum(same(v.get(p), bound) and same(v.get(q), other) for v in passed.values()) for q, _, other in sides]
        rows.append([f"{p} {end}", *("" if q == p else n for n, (q, _, _) in zip(met, sides, strict=True))])
    missing = [
        f"{p} {x} with {q} {y}"
        for p, q in combinations(OLDEST, 2)
        for x, y in product((OLDEST[p], NEWEST[p]), (OLDEST[q], NEWEST[q]))
        if not any(same(v.get(p), x) and same(v.get(q), y) for v in passed.values())
    ]
    note = "\n\nNot met: " + "; ".join(missing) + ".\n" if missing else "\n"
    return "## Pairs of bounds\n\nEnvironments that passed with both installed.\n\n" + table(rows) + note


def same(version: str | None, bound: str) -> bool:
    """Whether an installed version is a bound: 2.6.0+cu124 is 2.6."""
    parts = (version or "").partition("+")[0].split(".")
    while parts and parts[-1] == "0":
        parts.pop()
    wanted = bound.split(".")
    while wanted and wanted[-1] == "0":
        wanted.pop()
    return parts == wanted
