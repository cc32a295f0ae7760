"""Trackers: what they are sent, and what is said when one is not installed. W&B and trackio are stood in for."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

from inlay.core.errors import InlayError
from inlay.train import fit
from inlay.train.settings import RunSettings
from inlay.train.track import Journal, chosen
from tests.train.tiny import rows, settings, wearing


class Calls(list):
    """Records `f(...)` as (name, args, kwargs)."""

    def taker(self, name, result=None):
        return lambda *args, **kwargs: self.append((name, args, kwargs)) or result

    def of(self, name):
        return [(a, k) for n, a, k in self if n == name]


@pytest.fixture
def calls(monkeypatch):
    made = Calls()
    run = types.SimpleNamespace(id="run7", log=made.taker("log"), finish=made.taker("finish"))
    fakes = {
        "wandb": {"init": made.taker("init", run)},
        "trackio": {n: made.taker(n) for n in ("init", "log", "finish")},
    }
    for name, functions in fakes.items():
        fake = types.ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None)  # accelerate looks for it
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, name, fake)
    return made


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_arrive(tmp_path, calls, name):
    s = settings(tmp_path / "run", loggers=(name,), eval_every=3, project="mine", steps=4)
    fit(wearing(), "a", rows(8), rows(2), s, tmp_path / "run", None)
    ((_, init),) = calls.of("init")
    assert init["project"] == "mine" and init["name"] == "run" and init["config"]["optim"]["lr"] == 0.01
    logged = calls.of("log")
    assert (
        [k["step"] for _, k in logged] == [1, 2, 3, 4] and "val_loss" in logged[2][0][0] and logged[0][0][0]["loss"] > 0
    )
    assert len(calls.of("finish")) == 1


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("wandb", (None, None), ("run7", "must")), ("trackio", (None, "never"), (None, "allow"))],
)
def test_a_resumed_run_is_the_same_run(tmp_path, calls, name, first, second):
    s = settings(tmp_path, loggers=(name,))
    fit(wearing(), "a", rows(8), [], s, tmp_path, None)
    fit(wearing(), "a", rows(8), [], s, tmp_path, None, resume=tmp_path / "checkpoint-4")
    assert [(k.get("id"), k.get("resume")) for _, k in calls.of("init")] == [first, second]
    assert [k["step"] for _, k in calls.of("log")] == [1, 2, 3, 4, 5, 6, 5, 6]


def test_closed_even_if_the_run_fails(tmp_path, calls, monkeypatch):
    from inlay.methods.lora import LoRA

    monkeypatch.setattr(LoRA, "after_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(wearing(), "a", rows(8), [], settings(tmp_path, loggers=("wandb",)), tmp_path, None)
    assert len(calls.of("finish")) == 1


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
        ("tensorboard", "torch.utils.tensorboard", "inlay\\[track\\]"),
    ],
)
def test_missing_package(tmp_path, monkeypatch, name, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InlayError, match=f"pip install {install}"):
        fit(wearing(), "a", rows(8), [], settings(tmp_path, loggers=(name,)), tmp_path, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_auto(monkeypatch):
    import importlib.util

    assert chosen(RunSettings(loggers=("none",))) == [] and chosen(RunSettings(loggers=("wandb", "wandb"))) == ["wandb"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert chosen(RunSettings(loggers=("auto", "trackio"))) == ["tensorboard", "trackio"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen(RunSettings()) == []


def test_tensorboard_reads_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = settings(tmp_path, loggers=("tensorboard",))
    fit(wearing(), "a", rows(8), [], s, tmp_path, None)
    fit(wearing(), "a", rows(8), [], s, tmp_path, None, resume=tmp_path / "checkpoint-4")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_what_a_user_should_know_is_shown(tmp_path, capsys, monkeypatch):
    """On stderr as in log.txt, once, with a progress bar or without."""
    for show in (True, False):
        out = tmp_path / str(show)
        s = settings(out, progress=show, warmup=6, cache_activations="ram")
        fit(wearing(at="q,v@1"), "a", rows(8), [], s, out, None)
        shown, kept = capsys.readouterr().err, (out / "log.txt").read_text()
        for told in ("warm-up (6 steps) is as long as the run", "caching that takes"):
            assert shown.count(told) == 1 and kept.count(told) == 1
        assert ("tok/s" in shown) == show
    monkeypatch.setattr("inlay.train.ways._refused", lambda *_: "no reason")
    fit(wearing(), "a", rows(8), [], settings(tmp_path / "p", progress=True), tmp_path / "p", None)
    assert capsys.readouterr().err.count("batches are padded, not packed: no reason") == 1


@pytest.mark.parametrize("show", [True, False])
def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, monkeypatch, show):
    write = Journal.write

    def stops(self, values):
        write(self, values)
        if values["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(wearing(), "a", rows(8), [], settings(tmp_path, progress=show), tmp_path, None)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "stopped after step 3. The last good checkpoint is" in told and "checkpoint-2. To go on: --resume" in told


def test_bar(tmp_path, capsys):
    fit(wearing(), "a", rows(8), rows(2), settings(tmp_path, progress=True), tmp_path, None)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss" in shown and "tok/s" in shown
    fit(wearing(), "a", rows(8), rows(2), settings(tmp_path / "x"), tmp_path / "x", None)
    assert capsys.readouterr().err == ""
