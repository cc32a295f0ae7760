"""Folders of tiny adapters of several methods, and a host that wears them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import inlay
from tests.evaluate import tiny

SMALL = {"lora": {"rank": 4}, "series": {"size": 8}, "prefix": {"tokens": 3}, "prompt": {"tokens": 2}}


def write(root: Path) -> None:
    """`root/base`, `root/adapters/NAME` and `root/spare/NAME`: the same methods with other tensors."""
    tiny.base("llama").save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    for folder, seed in (("adapters", 1), ("spare", 2)):
        host = inlay.attach(tiny.base("llama"))
        for name, settings in SMALL.items():
            method = inlay.method(name)
            host.add(name, method.make(**settings), at=method.places, seed=0)
            torch.manual_seed(seed)
            for p in host.parameters(name):
                p.data.add_(0.1 * torch.randn_like(p))
            inlay.save(host, name, root / folder / name)


def host(root: Path, folder: str = "adapters") -> Any:
    """A host of this process's own that wears the same, for comparison."""
    made = inlay.attach(tiny.base("llama"))
    for name in SMALL:
        inlay.load(made, root / folder / name)
    return made
