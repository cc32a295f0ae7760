"""Checkpoints written in the background: the same files, the same errors, whole whenever the process is killed."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.train import checkpoint, fit
from inlay.train.track import Journal
from tests.train.test_resume import KILLED, killed, killed_settings, trace
from tests.train.tiny import copy, rows, same, settings, wearing


def equal(a, b) -> bool:
    """Nested states, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, list) else len(a) == len(b) and all(map(equal, a, b))


@pytest.mark.parametrize(("method", "own"), [("lora", {"dropout": 0.2}), ("adalora", {"rank": 6, "target": 2})])
def test_a_checkpoint_is_that_of_its_step(tmp_path, monkeypatch, method, own):
    """Step 3 is over before the first byte of checkpoint 2 is written, and leaves no trace in it."""
    changes = {"steps": 4, "keep_last": 9}
    s = settings(tmp_path / "at once", async_save=False, **changes)
    fit(wearing(method, **own), "a", rows(8), [], s, tmp_path / "at once", None)
    write, save_file, over = Journal.write, checkpoint.save_file, threading.Event()
    waited = []

    def tells(self, values):
        write(self, values)
        if values["step"] == 3:
            over.set()

    def waits(*args):
        waited.append(over.wait(20))
        save_file(*args)

    monkeypatch.setattr(Journal, "write", tells)
    monkeypatch.setattr(checkpoint, "save_file", waits)
    fit(wearing(method, **own), "a", rows(8), [], settings(tmp_path / "later", **changes), tmp_path / "later", None)
    assert waited == [True, True]
    for step in (2, 4):
        a, b = (checkpoint.read(tmp_path / r / f"checkpoint-{step}") for r in ("at once", "later"))
        assert same(a.adapter, b.adapter) and equal(a.state, b.state)
        assert a.about | {"seconds": 0, "digest": ""} == b.about | {"seconds": 0, "digest": ""}


def test_errors_surface_in_the_run(tmp_path, monkeypatch):
    """A disk that fills up under checkpoint 4 stops the run before checkpoint 6 is begun."""
    save_file = checkpoint.save_file

    def full(tensors, path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    with (
        monkeypatch.context() as m,
        pytest.raises(InlayError, match=r"cannot write .*-4: .*No space .*checkpoint-2\."),
    ):
        m.setattr(checkpoint, "save_file", full)
        fit(wearing(), "a", rows(8), [], settings(tmp_path, steps=40, keep_last=99), tmp_path, None)
    assert checkpoint.steps(tmp_path) == [2] and not list(tmp_path.glob(".*.partial"))
    assert not any(t.name.startswith("checkpoint") for t in threading.enumerate())


def test_the_last_error_is_not_lost(tmp_path, monkeypatch):
    """Nothing comes after the last checkpoint but the end, which waits for it; and so does a run that fails."""
    with monkeypatch.context() as m, pytest.raises(InlayError, match="cannot write .*checkpoint-6"):
        m.setattr(checkpoint, "save_file", lambda *a: (time.sleep(0.1), (_ for _ in ()).throw(OSError("gone"))))
        fit(wearing(), "a", rows(8), [], settings(tmp_path / "a", save_every=0), tmp_path / "a", None)
    write, save_file = Journal.write, checkpoint.save_file

    def stops(self, values):
        if values["step"] == 3:
            raise RuntimeError("stopped")
        write(self, values)

    def slow(*args):
        time.sleep(0.2)
        save_file(*args)

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="stopped"):
        m.setattr(checkpoint, "save_file", slow)
        m.setattr(Journal, "write", stops)
        fit(wearing(), "a", rows(8), [], settings(tmp_path / "b"), tmp_path / "b", None)
    assert checkpoint.steps(tmp_path / "b") == [2]


def test_keep_last(tmp_path):
    fit(wearing(), "a", rows(8), [], settings(tmp_path, steps=12, keep_last=2), tmp_path, None)
    assert checkpoint.steps(tmp_path) == [10, 12]


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_while_it_writes(tmp_path, kills):
    """SIGKILL while a checkpoint is half written, the disk being slow; the run still ends in the same bits."""
    run, whole, draw = tmp_path / "run", tmp_path / "whole", random.Random(time.time())
    for _ in range(kills):
        with killed(run, "slow") as process:
            time.sleep(draw.uniform(0, 0.1))
            while process.poll() is None and not list(run.glob(".checkpoint-*.partial")):
                pass
    assert max(checkpoint.steps(run)) < 80, "the run was through before it was killed"
    host, straight = wearing(**KILLED), wearing(**KILLED)
    s = killed_settings(run)
    fit(host, "a", rows(30), rows(4, 1), s, run, None, resume=True)
    quiet = replace(s, run=replace(s.run, save_every=0, async_save=False))
    fit(straight, "a", rows(30), rows(4, 1), quiet, whole, None)
    assert same(copy(host), copy(straight)) and trace(run) == trace(whole)
    assert not list(run.glob(".*.partial"))
