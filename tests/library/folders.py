"""Folders of tiny adapters of several methods, and a host that wears them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.evaluate import GenerateSettings, generate
from inlay.library.errors import BankError
from tests.evaluate import tiny

SHORT = GenerateSettings(max_new_tokens=8)
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


def says(host, lease):
    """What a host says under a lease."""
    return generate(host, tiny.tokenizer(), ["Tom has"], [lease.worn], SHORT)[0].text


def want(root, name, folder="adapters"):
    """What an adapter of a folder says."""
    return generate(host(root, folder), tiny.tokenizer(), ["Tom has"], name, SHORT)[0].text


def worn(host):
    """The adapters that have a version on a host."""
    return {name.partition("--")[0] for name in host.edits}


def kind(call):
    """Of the refusal that a call ends in."""
    with pytest.raises(BankError) as e:
        call()
    return e.value.kind
