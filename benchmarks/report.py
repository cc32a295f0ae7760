"""docs/benchmarks.md and its plot, from docs/benchmarks.json."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import RESULTS, machine

MARK = "<!-- measured -->"


def write(path: Path = RESULTS) -> None:
    """Replace what stands below the mark in docs/benchmarks.md, and draw the plot."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    text = page.read_text().split(MARK)[0] if page.exists() else "# Benchmarks\n\n"
    machines = by_processor(results)
    tables = "\n\n".join(f"### {name}\n\n{table(own)}" for name, own in machines.items())
    last = list(machines)[0]
    page.write_text(f"{text}{MARK}\n\n![times faster, {last}]({page.stem}.png)\n\n{tables}\n")
    plot(machines[last], path.with_suffix(".png"), last)


def by_processor(results: list[dict]) -> dict[str, list[dict]]:
    """Results apart by processor, this machine's first: ratios of different machines are not to be mixed."""
    found: dict[str, list[dict]] = {}
    here = machine()["processor"]
    for r in sorted(results, key=lambda r: r["machine"]["processor"] != here):
        found.setdefault(r["machine"]["processor"], []).append(r)
    return {name: sorted(own, key=lambda r: r["workload"]) for name, own in found.items()}


def table(results: list[dict]) -> str:
    """Every result, one row each."""
    lines = [
        "| workload | peer | ours | peer's | ratio (range over rounds) | by CPU time | rounds | others' load | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ratio = f"{r['ratio']:.2f} {'×' if r['metric'] == 'times faster' else 'of it'} ({r['low']:.2f}–{r['high']:.2f})"
        digits = 0 if r["unit"] == "MiB" else 4
        cpu = f"{r['cpu_ratio']:.2f} ×" if r.get("cpu_ratio") is not None else ""
        load = f"{r['load']['others'] + r['load']['stolen']:.2f} cores"
        lines.append(
            f"| {r['workload']} | {r['peer_is']} | {r['ours']:.{digits}f} {r['unit']} | "
            f"{r['peer']:.{digits}f} {r['unit']} | {ratio} | {cpu} | {r['rounds']} | {load} | {r['note']} |"
        )
    dates = sorted({r["date"] for r in results})
    machines = sorted({json.dumps(r["machine"], sort_keys=True) for r in results})
    about = "\n".join(f"- `{m}`" for m in machines)
    commands = "\n".join(f"- `{c}`" for c in sorted({r["command"] for r in results}))
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return "\n".join([*lines, "", f"Measured {when} on:", "", about, "", "Commands:", "", commands])


def plot(results: list[dict], file: Path, title: str) -> None:
    """How many times faster, as bars with the range over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in results if r["metric"] == "times faster" and r["ratio"] < 30]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2), layout="constrained")
    names = [f"{r['workload']}  |  {r['peer_is']}" for r in shown]
    ratios = [r["ratio"] for r in shown]
    ranges = [[r["ratio"] - r["low"] for r in shown], [r["high"] - r["ratio"] for r in shown]]
    axis.barh(names, ratios, xerr=ranges, color="#3b7dd8", ecolor="#333333", capsize=2, height=0.7)
    axis.axvline(1, color="black", linewidth=1)
    for y, ratio in enumerate(ratios):
        axis.text(shown[y]["high"] + 0.15, y, f"{ratio:.2f}×", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("times faster than the peer (bars: median of rounds; whiskers: range)")
    axis.tick_params(axis="y", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(file, dpi=140)
    plt.close(figure)
