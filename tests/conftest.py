"""For all tests: offline, one thread, and the optional folder of real files."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real files, no part of the repository; a test that needs it is skipped without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder ../shared with real files beside the repository")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def pytest_terminal_summary(terminalreporter):
    """Say that the tests on real bases did not run, if they did not."""
    from inlay.models import real

    for name, base in real.CATALOGUE.items():
        if not real.installed(name):
            reason = f"{name}, or what converts it, is not installed. To run it: {base.install}"
            terminalreporter.write_line(f"tests/real was skipped: {reason}")


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch) -> str:
    """The library of float32 products on CPUs: a test that asks for it runs with each, whatever the processor."""
    from inlay.core import processor

    if request.param == "onednn" and not processor.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(processor, "product_library", lambda: request.param)
    return request.param
