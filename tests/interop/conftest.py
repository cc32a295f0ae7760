"""Rewrites docs/results/interop.md from the differences just measured, if INLAY_WRITE_RESULTS is set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HEAD = """# Interoperability, measured

Largest absolute difference of logits between Inlay and the other library, over a batch of 3 x 9 tokens (AdapterHub:
2 x 7), on tiny random models (2 layers, hidden 32 or 16, LLaMA with 2 of 4 key/value heads) in float32 on the CPU, with
random adapter weights. An empty cell: the other library has no such method for that family, or the comparison is not
made. AdapterHub's side was computed by adapters 1.3.0 on transformers 4.57.6 (tests/interop/fixtures).

Made by `INLAY_WRITE_RESULTS=1 pytest tests/interop` with {versions}.
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """One token a letter or digit."""
    from tests.interop.trainers import letters

    return letters()


def pytest_sessionfinish(session, exitstatus):
    from tests.interop import peers

    if not os.environ.get("INLAY_WRITE_RESULTS") or exitstatus or not peers.DIFFERENCES:
        return
    from importlib.metadata import version

    versions = ", ".join(f"{p} {version(p)}" for p in ("peft", "transformers", "torch"))
    out = Path(__file__).parents[2] / "docs" / "results" / "interop.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(HEAD.format(versions=versions) + peers.table())
