"""A tiny random base in a folder, and adapters of it, for whatever the command line does with models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import inlay
from inlay.cli import main


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A random LLaMA with a byte tokenizer."""
    from tests.evaluate.tiny import base, tokenizer

    folder = tmp_path_factory.mktemp("models") / "base"
    base("llama", positions=512).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(base_folder, tmp_path_factory) -> dict[str, Path]:
    """Saved adapters that say something: `lora`, `series`, `prefix`."""
    root = tmp_path_factory.mktemp("adapters")
    host = inlay.attach(inlay.load_base(base_folder, device="cpu")[0])
    small = {"lora": {"rank": 4}, "series": {"size": 8}, "prefix": {"tokens": 3}}
    for name, settings in small.items():
        row = inlay.method(name)
        host.add(name, row.make(**settings), at=row.places, seed=0)
        torch.manual_seed(1)
        for p in host.parameters(name):
            p.data.add_(0.1 * torch.randn_like(p))
        inlay.save(host, name, root / name)
    return {name: root / name for name in small}


@pytest.fixture
def inlay_(capsys):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:  # tyro's own errors and --help
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def records(tmp_path) -> Path:
    """A training file in LLM-Adapters' schema."""
    rows = [
        {"instruction": f"What is {a} + {b}?", "input": "", "output": f"{a} + {b} = {a + b}", "answer": str(a + b)}
        for a in range(6)
        for b in range(4)
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    return file
