"""docs/benchmarks.md and its plot, from docs/benchmarks.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.harness import RESULTS, machine

MARK = "<!-- measured -->"
REQUESTS = re.compile(r"heterogeneous RoAd, +(\d+) requests")


def write(path: Path = RESULTS) -> None:
    """Replace what stands below the mark in docs/benchmarks.md, and draw the plot."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    text = page.read_text().split(MARK)[0] if page.exists() else "# Benchmarks\n\n"
    machines = by_processor(results)
    tables = "\n\n".join(f"### {name}\n\n{table(own)}" for name, own in machines.items())
    last = list(machines)[0]
    pictures = f"![times faster, {last}]({page.stem}.png)"
    plot([r for r in machines[last] if not REQUESTS.match(r["workload"])], path.with_suffix(".png"), last)
    if requests := [r for r in machines[last] if REQUESTS.match(r["workload"])]:
        file = path.with_name(f"{path.stem}_requests.png")
        plot_requests(requests, file, last)
        pictures += f"\n\n![RoAd over LoRA, by requests, {last}]({file.name})"
    page.write_text(f"{text}{MARK}\n\n{pictures}\n\n{tables}\n")


def by_processor(results: list[dict]) -> dict[str, list[dict]]:
    """Results apart by processor, this machine's first: ratios of different machines are not to be mixed."""
    found: dict[str, list[dict]] = {}
    here = machine()["processor"]
    for r in sorted(results, key=lambda r: r["machine"]["processor"] != here):
        found.setdefault(r["machine"]["processor"], []).append(r)
    return {name: sorted(own, key=lambda r: r["workload"]) for name, own in found.items()}


def table(results: list[dict]) -> str:
    """Every result, one row each; a row recorded before Inlay's state was has none."""
    first = ("workload", "peer", "ours", "peer's", "ratio (range over rounds)")
    columns = (*first, "by CPU time", "rounds", "others' load", "Inlay", "notes")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in results:
        ratio = f"{r['ratio']:.2f} {'×' if r['metric'] == 'times faster' else 'of it'} ({r['low']:.2f}–{r['high']:.2f})"
        digits = 0 if r["unit"] == "MiB" else 4
        cpu = f"{r['cpu_ratio']:.2f} ×" if r.get("cpu_ratio") is not None else ""
        load = f"{r['load']['others'] + r['load']['stolen']:.2f} cores"
        if before := r["load"].get("others_before"):
            load += f", before rounds ≤ {max(before):.2f}"
        lines.append(
            f"| {r['workload']} | {r['peer_is']} | {r['ours']:.{digits}f} {r['unit']} | "
            f"{r['peer']:.{digits}f} {r['unit']} | {ratio} | {cpu} | {r['rounds']} | {load} | "
            f"{r.get('inlay', '')} | {r['note']} |"
        )
    dates = sorted({r["date"] for r in results})
    machines = sorted({json.dumps(r["machine"], sort_keys=True) for r in results})
    about = "\n".join(f"- `{m}`" for m in machines)
    commands = "\n".join(f"- `{c}`" for c in sorted({r["command"] for r in results}))
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return "\n".join([*lines, "", f"Measured {when} on:", "", about, "", "Commands:", "", commands])


def plot_requests(results: list[dict], file: Path, title: str) -> None:
    """How many times faster RoAd is than each way of LoRA, over the requests in a batch."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for peer, colour, mark in zip(sorted({r["peer_is"] for r in results}), ("#c8553d", "#3b7dd8"), "os", strict=False):
        own = sorted((int(REQUESTS.match(r["workload"])[1]), r) for r in results if r["peer_is"] == peer)  # type: ignore[index]
        ratios = [r["ratio"] for _, r in own]
        ranges = [[r["ratio"] - r["low"] for _, r in own], [r["high"] - r["ratio"] for _, r in own]]
        axis.errorbar([n for n, _ in own], ratios, ranges, label=peer, color=colour, marker=mark, capsize=3)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    ticks = sorted({int(REQUESTS.match(r["workload"])[1]) for r in results})  # type: ignore[index]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xlabel("requests in the batch, each with an adapter of its own")
    axis.set_ylabel("tokens a second with RoAd,\ntimes those with LoRA")
    axis.set_title(f"{title} (median of rounds; whiskers: range)", fontsize=9, loc="left")
    axis.legend(frameon=False)
    _save(figure, axis, file)


def _pyplot():  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, axis, file: Path) -> None:  # type: ignore[no-untyped-def]
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(file, dpi=140)
    _pyplot().close(figure)


def plot(results: list[dict], file: Path, title: str) -> None:
    """How many times faster, as bars with the range over rounds."""
    plt = _pyplot()
    shown = [r for r in results if r["metric"] == "times faster" and r["ratio"] < 30]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2), layout="constrained")
    names = [f"{r['workload']}  |  {r['peer_is']}" for r in shown]
    ratios = [r["ratio"] for r in shown]
    ranges = [[r["ratio"] - r["low"] for r in shown], [r["high"] - r["ratio"] for r in shown]]
    axis.barh(names, ratios, xerr=ranges, color="#3b7dd8", ecolor="#333333", capsize=2, height=0.7)
    axis.axvline(1, color="black", linewidth=1)
    for y, ratio in enumerate(ratios):
        axis.text(shown[y]["high"] + 0.15, y, f"{ratio:.2f}×", va="center", fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("times faster than the peer (bars: median of rounds; whiskers: range)")
    axis.tick_params(axis="y", labelsize=8)
    _save(figure, axis, file)
