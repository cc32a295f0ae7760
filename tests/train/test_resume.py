"""A run that stops, however it stops, goes on bit for bit; a checkpoint is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inlay.core import files, processor
from inlay.core.errors import InlayError
from inlay.train import checkpoint, fit
from inlay.train.record import threads_of
from tests.train.tiny import copy, rows, same, settings, wearing

KILLED = {"method": "lora", "dropout": 0.1}


def killed_settings(run: Path):
    return settings(run, steps=80, save_every=1, eval_every=25, batch_size=4, micro_batch=3, lr=1e-3)


def trace(run_dir: Path):
    """The metrics, but for the time they took."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Stop(Exception):
    """What a test throws to end a run."""


def stopped(host, data, val, s, run, at, monkeypatch, resume=False):
    """Train until step `at` is over, then fail."""
    from inlay.train.track import Journal

    write = Journal.write

    def fail(self, values):
        if values["step"] > at:
            raise Stop
        write(self, values)

    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(Journal, "write", fail)
        fit(host, "a", data, val, s, run, None, resume=resume)


@pytest.mark.parametrize(
    ("kind", "method", "own"),
    [
        ("llama", "lora", {"dropout": 0.2}),
        ("gpt2", "series", {"dropout": 0.1}),
        ("llama", "adalora", {"rank": 6, "target": 2, "interval": 2}),
        ("llama", "prefix", {}),
        ("llama", "full", {}),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"group_by_length": True, "gradient_checkpointing": True, "micro_batch": 1}])
def test_half_and_half_is_the_whole(tmp_path, monkeypatch, kind, method, own, changes):
    """13 examples in batches of 4 and 10 steps: the stop after step 6 is in mid-epoch."""
    data, val = rows(13, prompt=True), rows(3, 5)
    changes = {"steps": 10, "save_every": 3, "eval_every": 2, "schedule": "cosine", **changes}
    whole, half = wearing(method, kind=kind, **own), wearing(method, kind=kind, **own)
    a = fit(whole, "a", data, val, settings(tmp_path / "a", **changes), tmp_path / "a", None)
    stopped(half, data, val, settings(tmp_path / "b", **changes), tmp_path / "b", 7, monkeypatch)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    new = wearing(method, kind=kind, seed=0, **own)
    b = fit(new, "a", data, val, settings(tmp_path / "b", **changes), tmp_path / "b", None, resume=True)
    assert "go on from" in (tmp_path / "b" / "log.txt").read_text()
    assert same(copy(whole), copy(new)) and trace(tmp_path / "a") == trace(tmp_path / "b")
    assert (a.loss, a.val_loss, a.best_step, a.tokens) == (b.loss, b.val_loss, b.best_step, b.tokens)
    last = [torch.load(tmp_path / r / "checkpoint-10" / "state.pt", weights_only=True) for r in "ab"]
    assert torch.equal(last[0]["random"]["torch"], last[1]["random"]["torch"])


def test_from_a_named_checkpoint(tmp_path):
    """Also one that is not the last: the later ones are made again, and are the same."""
    s, data = settings(tmp_path / "a", keep_last=9), rows(13)
    host = wearing(dropout=0.3)
    fit(host, "a", data, [], s, tmp_path / "a", None)
    before = checkpoint.read(tmp_path / "a" / "checkpoint-6")
    again = wearing(dropout=0.3)
    fit(again, "a", data, [], s, tmp_path / "a", None, resume=tmp_path / "a" / "checkpoint-2")
    assert same(copy(host), copy(again)) and same(
        before.adapter, checkpoint.read(tmp_path / "a" / "checkpoint-6").adapter
    )
    assert len(trace(tmp_path / "a")) == 6
    elsewhere = wearing(dropout=0.3)
    moved = replace(s, out=tmp_path / "b")
    fit(elsewhere, "a", data, [], moved, tmp_path / "b", None, resume=tmp_path / "a" / "checkpoint-4")
    assert same(copy(host), copy(elsewhere))


def test_a_run_taken_back_forgets_what_came_later(tmp_path):
    """Later checkpoints are not counted among the last ones, and a stopped run does not go on from them."""

    class Stop:
        def begin(self, loop, run_dir):
            pass

        def before_step(self, loop):
            if loop.step == 5:
                raise KeyboardInterrupt

        def after_step(self, loop):
            return {}

    s, data = settings(tmp_path, keep_last=9), rows(13)
    whole = fit(host := wearing(), "a", data, [], s, tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        back = tmp_path / "checkpoint-2"
        fit(wearing(), "a", data, [], s, tmp_path, None, resume=back, observers=[Stop()])
    assert checkpoint.steps(tmp_path) == [2, 4]
    done = fit(again := wearing(), "a", data, [], s, tmp_path, None, resume=True)
    assert same(copy(host), copy(again)) and done.loss == whole.loss
    assert [line["step"] for line in trace(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_nothing_to_go_on_from(tmp_path):
    """resume=True suits a restarted job: it begins where there is nothing yet, and a finished run stays."""
    host, data, s = wearing(), rows(8), settings(tmp_path)
    fit(host, "a", data, [], s, tmp_path, None, resume=True)
    done = fit(again := wearing(), "a", data, [], s, tmp_path, None, resume=True)
    assert done.steps == 6 and same(copy(host), copy(again)) and len(trace(tmp_path)) == 6
    with pytest.raises(
        InlayError, match="no checkpoint: it has no checkpoint.json. The last good checkpoint is .*checkpoint-6"
    ):
        fit(wearing(), "a", data, [], s, tmp_path, None, resume=tmp_path / "checkpoint-5")


def test_a_cache_may_be_switched_off_and_on(tmp_path, capsys):
    """It changes nothing that is learned, and a disk may be full; that bits may differ is said."""
    data, s = rows(12), settings(tmp_path, steps=9, cache_activations="disk", keep_last=9)
    whole = fit(host := wearing(at="q,v@1"), "a", data, [], s, tmp_path, None)
    capsys.readouterr()
    off = replace(s, run=replace(s.run, cache_activations="off"))
    done = fit(again := wearing(at="q,v@1"), "a", data, [], off, tmp_path, None, resume=tmp_path / "checkpoint-2")
    assert done.loss == pytest.approx(whole.loss, rel=1e-5)
    for key, value in copy(host).items():
        torch.testing.assert_close(copy(again)[key], value, rtol=1e-3, atol=1e-5)
    assert "cache_activations: 'disk' before, 'off' now" in capsys.readouterr().err.replace("\n", " ")


def test_what_decides_the_bits_is_refused_with_a_way_out(tmp_path):
    s, data = settings(tmp_path, pack_tokens=64), rows(8)
    fit(wearing(), "a", data, [], s, tmp_path, None)
    for name, value in (("pack_tokens", 32), ("engine", "plain")):
        other = replace(s, run=replace(s.run, **{name: value}))
        with pytest.raises(InlayError, match=f"run.{name}: .* give these as before and resume to go on with it, over"):
            fit(wearing(), "a", data, [], other, tmp_path, None, resume=True)
        elsewhere = replace(other, out=tmp_path / "b")
        with pytest.raises(InlayError, match=f"other settings: run.{name}: .*; give these as before to go on from it"):
            fit(wearing(), "a", data, [], elsewhere, tmp_path / "b", None, resume=tmp_path / "checkpoint-4")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_said(tmp_path, capsys, resume):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").write_text("")
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None, resume=resume)
    told = f"there was no run in {tmp_path} but notes.txt, photos: this one begins beside"
    shown, kept = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    assert (told in shown.replace("\n", " ")) and told in kept
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None, resume=True)
    assert "no run in" not in capsys.readouterr().err


def test_other_things_are_refused(tmp_path):
    s, data = settings(tmp_path), rows(8)
    fit(wearing(), "a", data, [], s, tmp_path, None)
    with pytest.raises(InlayError, match="trained on other data"):
        fit(wearing(), "a", rows(8, seed=1), [], s, tmp_path, None, resume=True)
    with pytest.raises(InlayError, match="validated on other data"):
        fit(wearing(), "a", data, rows(8), s, tmp_path, None, resume=True)
    with pytest.raises(InlayError, match="trained on another base: the weights at"):
        fit(wearing(seed=1), "a", data, [], s, tmp_path, None, resume=True)
    with pytest.raises(InlayError, match="of another adapter: settings.alpha: 64.0 before, 8.0 now"):
        fit(wearing(alpha=8.0), "a", data, [], s, tmp_path, None, resume=True)
    with pytest.raises(InlayError, match="of another adapter: at:"):
        fit(wearing(at="q,v"), "a", data, [], s, tmp_path, None, resume=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 7 // 10] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("file", ["state.pt", "adapter.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage, capsys):
    """No changed bit is believed: the run goes on from the checkpoint before, to the same adapter."""
    s, data, whole, host = settings(tmp_path), rows(8), wearing(), wearing()
    fit(whole, "a", data, [], s, tmp_path, None)
    damage(tmp_path / "checkpoint-6" / file)
    with pytest.raises(InlayError, match=r"checkpoint-6 is damaged .*there is: checkpoint-2, checkpoint-4"):
        fit(host, "a", data, [], s, tmp_path, None, resume=tmp_path / "checkpoint-6")
    fit(host, "a", data, [], s, tmp_path, None, resume=True)
    assert "passed over" in capsys.readouterr().err
    assert same(copy(whole), copy(host)) and checkpoint.read(tmp_path / "checkpoint-6").about["step"] == 6


def test_a_checkpoint_of_another_step_is_not_believed(tmp_path):
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None)
    about = tmp_path / "checkpoint-6" / "checkpoint.json"
    about.write_text(about.read_text().replace('"step": 6', '"step": 5'))
    with pytest.raises(InlayError, match=r"checkpoint.json was changed"):
        checkpoint.read(tmp_path / "checkpoint-6")
    assert checkpoint.latest(tmp_path).about["step"] == 4
    for step in (2, 4):
        truncate(tmp_path / f"checkpoint-{step}" / "state.pt")
    with pytest.raises(InlayError, match="checkpoint-6 is damaged"):
        checkpoint.latest(tmp_path)


def test_sigterm_saves_and_says_where_to_go_on(tmp_path):
    """A real process, a real signal: the step is finished and saved, and the resumed run ends in the same adapter."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    command = [sys.executable, str(Path(__file__).with_name("kill_me.py")), str(run), "never"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not ((run / "metrics.jsonl").exists() and len(trace(run)) > 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    (at,) = checkpoint.steps(run)
    assert process.returncode != 0 and len(trace(run)) == at < 80
    assert f"stopped by SIGTERM after step {at}" in (run / "log.txt").read_text() and "--resume" in printed
    whole, resumed = wearing(**KILLED), wearing(**KILLED)
    for host, folder in ((whole, straight), (resumed, run)):
        s = replace(killed_settings(folder), run=replace(killed_settings(folder).run, save_every=0))
        fit(host, "a", rows(30), rows(4, 1), s, folder, None, resume=True)
    assert same(copy(whole), copy(resumed)) and trace(run) == trace(straight)


def test_what_sigterm_did_before_it_does_again_after_training(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_pickled_code_is_run(tmp_path):
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "checkpoint-6"
    torch.save({"names": Evil()}, path / "state.pt")
    about = json.loads((path / "checkpoint.json").read_text())  # whoever plants code can mend digests, too
    about["sha256"]["state.pt"] = files.sha256(path / "state.pt")
    about["digest"] = checkpoint._digest(about)
    (path / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(InlayError, match="damaged"):
        fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None, resume=path)
    assert not (tmp_path / "owned").exists()


# ---- interruptions ---------------------------------------------------------------------------------------------------
def test_a_crash_at_any_write(tmp_path, monkeypatch):
    """Every fsync and rename is made to fail in turn, without any clean-up being run: the folder must stay usable."""
    data, s = rows(8), settings(tmp_path / "whole", steps=3, save_every=1)
    host = wearing(dropout=0.1)
    fit(host, "a", data, [], s, tmp_path / "whole", None)
    want, calls = copy(host), 0

    class Power(BaseException):
        pass

    def dies(real, at):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= at:
                raise Power
            return real(*args, **kwargs)

        return call

    # Enough to pass every write of a run; after `at` calls nothing reaches the disk any more.
    for at in range(1, 80, 6):
        run, calls = tmp_path / str(at), 0
        with monkeypatch.context() as m:
            for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
                m.setattr(owner, name, dies(getattr(owner, name), at))
            with contextlib.suppress(Power):
                fit(wearing(dropout=0.1), "a", data, [], replace(s, out=run), run, None)
        last = calls
        for step in checkpoint.steps(run):
            checkpoint.read(run / f"checkpoint-{step}")
        again = wearing(dropout=0.1)
        fit(again, "a", data, [], replace(s, out=run), run, None, resume=True)
        assert same(want, copy(again)) and not list(run.glob(".*.partial")) and not list(run.glob(".*.old"))
    assert last < at, "the last round was to be undisturbed"


@contextlib.contextmanager
def killed(run, *how):
    """A training process, once it has written a checkpoint of its own; then SIGKILL, and all checkpoints are whole."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kill_me.py")), str(run), *how]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before = max(checkpoint.steps(run), default=0)
    while process.poll() is None and max(checkpoint.steps(run), default=0) <= before:
        time.sleep(0.002)
    yield process
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    for step in checkpoint.steps(run):
        checkpoint.read(run / f"checkpoint-{step}")


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_for_real(tmp_path, kills):
    """SIGKILL at random moments of a run that saves after every step; it still ends where an undisturbed one ends."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    seed = int(os.environ.get("INLAY_KILL_SEED", time.time_ns() % 2**32))
    again, draw, steps = f"INLAY_KILL_SEED={seed} draws the same moments", random.Random(seed), []
    for _ in range(kills):
        before = max(checkpoint.steps(run), default=0)
        with killed(run):
            time.sleep(draw.uniform(0, 0.3 / kills))
        steps.append(max(checkpoint.steps(run)))
        assert steps[-1] > before, again
    assert steps[-1] < 80, f"the run was through before it was killed; {again}"
    host = wearing(**KILLED)
    fit(host, "a", rows(30), rows(4, 1), killed_settings(run), run, None, resume=True)
    straight = wearing(**KILLED)
    s = killed_settings(whole)
    fit(straight, "a", rows(30), rows(4, 1), replace(s, run=replace(s.run, save_every=0)), whole, None)
    assert same(copy(host), copy(straight)) and trace(run) == trace(whole), again
    assert not list(run.glob(".*.partial")), again


# ---- a full disk -----------------------------------------------------------------------------------------------------
def full_disk(kind, monkeypatch):
    def raises(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        *{"tensors": (checkpoint, "save_file"), "state": (torch, "save"), "fsync": (os, "fsync")}[kind], raises
    )


@pytest.mark.parametrize("kind", ["tensors", "state", "fsync"])
def test_full_disk(tmp_path, monkeypatch, kind):
    from inlay.methods.lora import LoRA

    data, s = rows(8), settings(tmp_path, async_save=False)
    with monkeypatch.context() as m:
        m.setattr(LoRA, "after_step", lambda self, a, step, total, state: full_disk(kind, m) if step == 4 else None)
        with pytest.raises(
            InlayError,
            match=r"cannot write .*checkpoint-4: .*No space left on device.*checkpoint-2\. Make room, then resume",
        ):
            fit(wearing(dropout=0.1), "a", data, [], s, tmp_path, None)
    assert checkpoint.steps(tmp_path) == [2] and not list(tmp_path.glob(".*.partial"))
    checkpoint.read(tmp_path / "checkpoint-2")
    resumed, whole = wearing(dropout=0.1), wearing(dropout=0.1)
    fit(resumed, "a", data, [], s, tmp_path, None, resume=True)
    fit(whole, "a", data, [], settings(tmp_path / "w"), tmp_path / "w", None)
    assert same(copy(resumed), copy(whole))


def test_full_disk_under_the_metrics(tmp_path, monkeypatch):
    from inlay.train.track import Journal

    write = Journal.write

    def full(self, values):
        if values["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, values)

    with (
        monkeypatch.context() as m,
        pytest.raises(InlayError, match=r"cannot write to .*No space left.*checkpoint-2\. Make room"),
    ):
        m.setattr(Journal, "write", full)
        fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None)
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None, resume=True)
    assert [m["step"] for m in trace(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_files_that_may_not_grow(tmp_path):
    """A limit of the system instead of a patch: the writers' own errors, in the middle of a file."""
    data, s = rows(8), settings(tmp_path)
    fit(wearing(), "a", data, [], settings(tmp_path, steps=6), tmp_path, None)
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = torch.load(tmp_path / "checkpoint-6" / "state.pt", weights_only=True)
    tensors = checkpoint.read(tmp_path / "checkpoint-6").adapter
    for limit in (1000, 10_000):  # in the tensors, in the state
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, was[1]))
        try:
            with pytest.raises(
                InlayError, match=r"cannot write .*checkpoint-8.*The last good checkpoint is .*checkpoint-6"
            ):
                checkpoint.write(tmp_path, 8, tensors, state, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert checkpoint.steps(tmp_path) == [2, 4, 6] and not list(tmp_path.glob(".*.partial"))
    fit(wearing(), "a", data, [], s, tmp_path, None, resume=True)


def test_random_states_round_trip():
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    np.random.standard_normal()  # leaves a cached second number
    states = checkpoint.random_states()

    def draws():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    first = draws()
    checkpoint.set_random_states(states)
    assert draws() == first


def test_another_library_for_products_is_reported(tmp_path, monkeypatch, capsys):
    """A run goes on, and says that its bits may differ from here on."""
    s, data = settings(tmp_path, keep_last=9), rows(8)
    libraries = ["mkl", "onednn"] if processor.has_onednn() else ["mkl", "mkl"]
    for library, resume in zip(libraries, (False, tmp_path / "checkpoint-4"), strict=True):
        monkeypatch.setattr(processor, "product_library", lambda library=library: library)
        fit(wearing(), "a", data, [], s, tmp_path, None, resume=resume)
    sessions = json.loads((tmp_path / "environment.json").read_text())["sessions"]
    assert [session["cpu_products"] for session in sessions] == libraries
    reported = capsys.readouterr().err.replace("\n", " ")
    assert ("cpu_products: 'mkl' before, 'onednn' now" in reported) == (len(set(libraries)) == 2)
    assert threads_of(tmp_path) == torch.get_num_threads() and threads_of(tmp_path / "nothing") is None
