"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from inlay.knowledge.figures import Drawn

STYLE = """
:root { --ink: #222; --soft: #666; --line: #ddd; --back: #fff; --panel: #f7f7f5; --accent: #0072b2; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
       max-width: 1120px; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .4rem;
     border-top: 2px solid var(--ink); } h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; }
p { max-width: 46rem; } .about, figcaption, .small { color: var(--soft); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav a { color: var(--accent); text-decoration: none; white-space: nowrap; }
figure { margin: 1.4rem 0 2rem; } figure img { max-width: 100%; height: auto; display: block; }
figure h3 { margin-bottom: .2rem; } figcaption { max-width: 46rem; margin-bottom: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } thead th { border-bottom: 2px solid var(--ink); }
ul.short { background: var(--panel); padding: .9rem 1rem .9rem 2rem; max-width: 44rem; }
tr.remedy td { font-weight: 600; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; max-width: 44rem; }
"""

TERMS = {
    "target semantic distance": "1 - cosine between the meaning of the base's own answer (before training) and of the "
    "right one; 0 is the same meaning, 1 unrelated. Meanings are the base's token embeddings, averaged, unless said "
    "otherwise.",
    "learned, approached, stalled, away": "At a snapshot an answer is right; or nearer to the right one than the "
    "base's; or as far; or farther.",
    "null, excess": "What shares would be if answers were dealt out at random among facts of the same relation; what "
    "is observed beyond that.",
    "accuracy": "Answers are generated freely, and count if they equal the right one. Where not said otherwise, of "
    "wordings that were not trained.",
    "retention": "Share of facts that nobody trained, right before, that are still right.",
    "two-lines test": "An inverted U is declared only if the curve rises clearly left of a break and falls clearly "
    "right of it, on items that had no part in choosing the break.",
}


def html(data: Mapping[str, Any], found: Mapping[str, Sequence[Drawn]]) -> str:
    """The page: what is in it, the main numbers, the runs, the figures, the terms."""
    title = escape(str(data.get("title") or "Knowledge learning"))
    parts = {k: v for k, v in found.items() if v}
    about = " · ".join(f"{escape(str(k))}: {escape(str(v))}" for k, v in data.get("about", {}).items())
    links = [("Runs", "runs"), *((k, _anchor(k)) for k in parts), ("Terms", "terms")]
    body = [
        f"<h1>{title}</h1>",
        f'<p class="about">{about}</p>' if about else "",
        "<nav>" + "".join(f'<a href="#{a}">{escape(t)}</a>' for t, a in links) + "</nav>",
        _short(data),
        _runs(data),
        _controls(data),
    ]
    for name, drawn in parts.items():
        body += [f'<h2 id="{_anchor(name)}">{escape(name)}</h2>', *map(_figure, drawn)]
    body += ['<h2 id="terms">Terms</h2><dl>', *(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in TERMS.items()), "</dl>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    content = "\n".join(filter(None, body))
    head = f"<head>{head}<style>{STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{content}\n</body></html>\n'


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _figure(one: Drawn) -> str:
    image = base64.b64encode(one.png).decode()
    return (
        f'<figure id="{escape(one.name)}"><h3>{escape(one.title)}</h3><figcaption>{escape(one.words)}</figcaption>'
        f'<img alt="{escape(one.title)}" src="data:image/png;base64,{image}">'
        f'<figcaption class="small">Numbers: figures/{escape(one.name)}.json</figcaption></figure>'
    )


def _short(data: Mapping[str, Any]) -> str:
    """What somebody reads who reads nothing else: notes given, and sentences made of the numbers."""
    said = [*data.get("notes", []), *_sentences(data)]
    return '<ul class="short">' + "".join(f"<li>{escape(str(s))}</li>" for s in said) + "</ul>" if said else ""


def _sentences(data: Mapping[str, Any]) -> list[str]:
    runs = [r for r in data.get("runs", []) if r.get("condition", "plain") == "plain"]
    said = []
    for regime in dict.fromkeys(r.get("regime", "") for r in runs):
        own = [r for r in runs if r.get("regime", "") == regime]
        em, other, kept = (np.mean([r[k] for r in own]) for k in ("em", "paraphrase_em", "retention"))
        said.append(
            f"{f'{regime}: ' if regime else ''}plain training answered {100 * em:.0f} % of the trained questions and "
            f"{100 * other:.0f} % of their paraphrases rightly, and kept {100 * kept:.0f} % of the facts that were not "
            f"trained (mean of {len(own)} run{'s' if len(own) > 1 else ''})."
        )
    for row in (r for r in data.get("controls", []) if r.get("remedy")):
        sure = row["low"] > 0 or row["high"] < 0
        said.append(
            f"{row['name']} changed accuracy on paraphrases by {100 * row['difference']:+.1f} points against "
            f"{row['against']} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            f"{'' if sure else ', so not clearly'}); see its controls."
        )
    return said


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], text: int, marked: Sequence[bool] = ()) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="text">{escape(c)}</{tag}>' if i < text else f"<{tag}>{escape(c)}</{tag}>"
            for i, c in enumerate(row)
        )

    lines = [
        f"<tr{' class=remedy' if i < len(marked) and marked[i] else ''}>{cells(r, 'td')}</tr>"
        for i, r in enumerate(rows)
    ]
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>{"".join(lines)}</table></div>'


def _percent(values: Sequence[Any]) -> str:
    x = np.array([np.nan if v is None else v for v in values], float)
    x = x[np.isfinite(x)]
    if not len(x):
        return "–"
    return f"{100 * x.mean():.1f}" + (f" ± {100 * x.std(ddof=1) / np.sqrt(len(x)):.1f}" if len(x) > 1 else "")


def _runs(data: Mapping[str, Any]) -> str:
    """One line for each kind of run, means over seeds with standard errors."""
    runs = data.get("runs", [])
    if not runs:
        return ""
    keys = ("regime", "model", "method", "condition")
    groups: dict[tuple, list] = {}
    for r in runs:
        groups.setdefault(tuple(str(r.get(k, "")) for k in keys), []).append(r)
    rows = [
        [
            *key,
            str(len(own)),
            *(_percent([r[k] for r in own]) for k in ("em", "paraphrase_em", "retention")),
            _percent([_most_away(r) for r in own]),
            "/".join(dict.fromkeys(str(r.get("steps", "")) for r in own)),
            "/".join(dict.fromkeys(f"{r['presentations']:g}" for r in own if "presentations" in r)),
        ]
        for key, own in groups.items()
    ]
    head = [
        *keys,
        "seeds",
        "accuracy, %",
        "paraphrases, %",
        "retention, %",
        "away at most, %",
        "steps",
        "presentations",
    ]
    said = '<p class="small">Means over seeds ± standard error. Accuracy never stands without retention.</p>'
    return f'<h2 id="runs">Runs</h2>{said}{_grid(head, rows, 4)}'


def _most_away(run: Mapping[str, Any]) -> float | None:
    shares = [np.mean(np.asarray(s["state"], dtype=object) == "away") for s in run.get("snapshots", [])]
    return float(max(shares)) if shares else run.get("away_most")


def _controls(data: Mapping[str, Any]) -> str:
    rows = data.get("controls", [])
    if not rows:
        return ""
    head = [
        "condition",
        "against",
        "difference",
        "95 % interval",
        "paraphrases: kept, %",
        "all, %",
        "retention, %",
        "seeds",
    ]
    made = [
        [
            str(r["name"]),
            str(r["against"]),
            f"{100 * r['difference']:+.1f}",
            f"{100 * r['low']:+.1f} to {100 * r['high']:+.1f}",
            _percent([r.get("paraphrase_em_kept")]),
            _percent([r["paraphrase_em"]]),
            _percent([r["retention"]]),
            str(r.get("seeds", "")),
        ]
        for r in rows
    ]
    said = (
        '<p class="small">Differences in points of accuracy on unseen paraphrases; remedies in bold. A filter is '
        "judged on the facts it kept and on all of them.</p>"
    )
    return f"<h2>Controls</h2>{said}{_grid(head, made, 2, [bool(r.get('remedy')) for r in rows])}"
