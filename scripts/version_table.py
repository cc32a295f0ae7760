"""The environments of `make test-versions`, and the tests that run in each.

The bounds are those of `inlay.compat.versions`, which `import inlay` enforces: changing one there changes what is
tested. What an environment does not pin is taken from `requirements/lock.txt` as far as the pins allow.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

CONTRACT = (
    "tests/compat",
    "tests/core/test_store.py",
    "tests/engine/test_fused.py",
    "tests/engine/test_last.py",
    "tests/engine/test_packed.py",
    "tests/evaluate/test_decode.py",
    "tests/evaluate/test_lm_eval.py",
    "tests/evaluate/test_slots.py",
    "tests/interop/test_peft.py",
    "tests/interop/test_trainer.py",
    "tests/interop/test_trainer_packed.py",
    "tests/laws/test_laws.py",
    "tests/serve/test_answers.py",
    "tests/serve/test_play.py",
    "tests/train/test_train.py",
)
"""Tests that meet another library: a file or folder each."""
LEFT_OUT = ("bloom", "falcon", "gemma", "gpt2", "gpt_neox", "mistral", "olmoe", "[opt", "phi3", "qwen", "stablelm")
"""Decoders left out of the contract for time: LLaMA, GPT-J and Mixtral remain."""


def load_bounds() -> ModuleType:
    """`inlay.compat.versions` without importing Inlay, which would need torch."""
    spec = importlib.util.spec_from_file_location("bounds", ROOT / "src" / "inlay" / "compat" / "versions.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


RANGES = load_bounds().TESTED
OLDEST = {r.package: r.oldest for r in RANGES}
NEWEST = {r.package: r.newest for r in RANGES}


@dataclass(frozen=True)
class Environment:
    """One row.

    Args:
        name: folder under `.venvs`, key of the results.
        python: minor version of the interpreter.
        pins: package -> version; empty: the lock's.
    """

    name: str
    python: str
    pins: Mapping[str, str] = field(default_factory=dict)


def only(*packages: str, of: Mapping[str, str] = OLDEST) -> dict[str, str]:
    """The bounds of some packages."""
    return {p: of[p] for p in packages}


ENVIRONMENTS = (
    Environment("lock-3.10", "3.10"),
    Environment("lock-3.11", "3.11"),
    Environment("lock-3.12", "3.12"),
    Environment("lock-3.13", "3.13"),
    Environment("oldest", "3.10", OLDEST),
    Environment("newest", "3.13", NEWEST),
    Environment("torch-oldest", "3.11", only("torch")),
    Environment("transformers-oldest", "3.11", only("transformers")),
    Environment("others-oldest", "3.11", {p: v for p, v in OLDEST.items() if p not in ("torch", "transformers")}),
)
