"""Packed forwards under Trainer and TRL on two gloo ranks: one process's losses, gradient norms and adapter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import inlay
from tests.interop.ranked import HEAVY, first_kind, run, tuned
from tests.train.ranked import PRELOAD, launch
from tests.train.tiny import base, copy

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

PRELOAD += HEAVY
NEAR = {"rel": 1e-4}
FSDP = {"fsdp": True}


def alike(one, two):
    """The same adapter in two runs' last checkpoints."""
    hosts = [inlay.attach(base()), inlay.attach(base())]
    for host, folder in zip(hosts, (one, two), strict=True):
        inlay.load(host, folder / "checkpoint-4" / "adapter")
    a, b = map(copy, hosts)
    for k, v in a.items():
        torch.testing.assert_close(b[k], v, rtol=1e-3, atol=1e-3)


# Each step accumulates two micro-batches, and its loss is divided by the learned tokens of both on both ranks.
@pytest.mark.parametrize(
    ("way", "changes", "method", "idle"),
    [
        ("padded", {}, "lora", False),
        ("flat", {"gradient_checkpointing": True}, "lora", False),
        ("flat", {}, "adalora", False),
        ("flat", {}, "prefix", True),
        ("padded", FSDP, "lora", False),
        ("flat", FSDP, "adalora", False),
        ("flat", FSDP, "prefix", True),
    ],
)
def test_two_ranks_of_trainer_compute_what_one_computes(tmp_path, way, changes, method, idle):
    plainly = {k: v for k, v in changes.items() if k != "fsdp"}
    want = run(tmp_path / "one", "plain", plainly, method, idle)
    for got in launch(2, run, tmp_path / "two", way, changes, method, idle):
        assert len(got) == 4
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, **NEAR)
    alike(tmp_path / "one", tmp_path / "two")


def test_tokens_counted_by_each_rank_alone_are_counted_so_when_packed(tmp_path):
    changes = {"average_tokens_across_devices": False}
    want, got = (launch(2, run, tmp_path / way, way, changes)[0] for way in ("plain", "flat"))
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, **NEAR)


def test_two_ranks_of_sft_compute_what_one_computes(tmp_path):
    pytest.importorskip("trl")
    want = tuned(tmp_path / "one", "plain")
    for got in launch(2, tuned, tmp_path / "two", "flat"):
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, **NEAR)
    alike(tmp_path / "one", tmp_path / "two")


def test_fsdp_of_the_first_kind_is_refused():
    for text in launch(2, first_kind):
        assert "set fsdp_config={'version': 2}" in text


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path):
    want = run(tmp_path / "one", "plain", {})
    command = f"torch.distributed.run --nproc-per-node 2 -m tests.interop.ranked {tmp_path}".split()
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, timeout=300)
    for a, b in zip(json.loads((tmp_path / "logged.json").read_text()), want, strict=True):
        assert a == pytest.approx(b, **NEAR)
    alike(tmp_path / "one", tmp_path)
