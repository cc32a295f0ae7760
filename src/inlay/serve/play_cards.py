"""Answers as HTML: a card a column, side by side where there is room."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from inlay.serve.playground import BASE, Answers, Column

CSS = Path(__file__).with_name("play.css").read_text()
NOTHING = '<div class="nothing">The answers appear here, one column each.</div>'
ENDS = {"": "", "eos": "", "stop": "", "length": "cut at the limit", "stopped": "stopped", "failed": ""}


def head(model: str, adapters: int) -> str:
    """The title, and what this is in one line."""
    count = f"{adapters} adapter{'s' * (adapters != 1)}"
    return (
        f"<h1>Inlay playground</h1><p>One prompt, several adapters of one frozen model ({escape(model)}, {count}): "
        "all answer side by side, in one batch.</p>"
    )


def problem(said: str) -> str:
    """What is wrong with a question."""
    return f'<div class="problem" role="alert">{escape(said)}</div>'


def answers(now: Answers) -> str:
    """All cards, and a line above them."""
    return (
        f'<p class="tally">{escape(tally(now))}</p>'
        f'<div class="answers" aria-busy="{"false" if now.done else "true"}">{"".join(map(_card, now.columns))}</div>'
    )


def tally(now: Answers) -> str:
    """What the columns share."""
    rows = [c for c in now.columns if c.ended != "failed" or c.tokens]
    if not rows:
        return "nobody could answer"
    tokens, seconds = sum(c.tokens for c in rows), max(c.seconds for c in rows)
    parts = [f"{len(rows)} answer{'s' * (len(rows) != 1)} in one batch"]
    if now.seed is not None:
        parts.append(f"seed {now.seed}")
    if tokens:
        parts.append(f"{tokens} tokens in {seconds:.1f} s")
    return " · ".join(parts)


def _card(c: Column) -> str:
    kind = " ".join(["card", *(["mix"] if c.weights else []), *(["failed"] if c.error else [])])
    caret = "" if c.ended else '<span class="caret"></span>'
    silent = c.ended and not c.error and not c.text.strip()
    said = '<div class="said none">(says nothing)</div>' if silent else ""
    said = said or f'<div class="said">{escape(c.text.strip())}{caret}</div>' if not c.error or c.text else ""
    wrong = f'<div class="wrong" role="alert">{escape(c.error)}</div>' if c.error else ""
    footer = f"<footer><small>{escape(_foot(c))}</small></footer>" if c.tokens else ""
    title = f"<header><b>{escape(c.name)}</b><small>{escape(_about(c))}</small></header>"
    return f'<article class="{kind}" data-name="{escape(c.name)}">{title}{said}{wrong}{footer}</article>'


def _about(c: Column) -> str:
    if c.weights:
        return weighted(c.weights)
    return c.method or ("no adapter" if c.name == BASE else "")


def weighted(weights: Mapping[str, float]) -> str:
    """A sum as one writes it."""
    signed = "".join(f" {'-+'[w > 0]} {abs(w):g} {name}" for name, w in weights.items() if w)
    return signed[3:] if signed.startswith(" +") else signed.replace(" - ", "-", 1)


def _foot(c: Column) -> str:
    tokens = f"{c.tokens} token{'s' * (c.tokens != 1)}"
    return " · ".join(filter(None, (tokens, f"{c.seconds:.1f} s", ENDS[c.ended])))
