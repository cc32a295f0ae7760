"""The load test's own judgement: what a request may have met while adapters change."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")

from benchmarks.serve_load import Load, Span  # noqa: E402


class Client:
    """Answers with one text."""

    def __init__(self, text: str):
        self.completions = self
        self.text = text

    async def create(self, **asked):
        async def parts():
            for letter in self.text:
                yield SimpleNamespace(choices=[SimpleNamespace(text=letter)], usage=None)
            yield SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=len(self.text)))

        return parts()


def load() -> Load:
    made = Load("", {"a0": "old", "spare/a0": "new", "a1": "other"}, 1, ["a0", "a1"])
    made.spans["a0"] = [Span("a0", 0.0, until=5.0), Span("spare/a0", 4.0, until=8.0), Span(None, 7.0)]
    return made


def test_only_versions_that_may_have_served_a_request_are_right():
    assert load().possible("a0", 3.0) == {"a0", "spare/a0", None}
    assert load().possible("a0", 6.0) == {"spare/a0", None}
    assert load().possible("a0", 9.0) == {None}


def test_answers_of_others_and_of_former_versions_are_wrong(monkeypatch):
    monkeypatch.setattr("benchmarks.serve_load.time.monotonic", lambda: 6.0)
    counts = {}
    for text in ("old", "new", "other", "ne", ""):
        made = load()
        asyncio.run(made.ask(Client(text), "a0"))
        counts[text] = made.count["wrong"]
    assert counts == {"old": 1, "new": 0, "other": 1, "ne": 1, "": 1}
