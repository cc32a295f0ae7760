"""Several processes train what one trains: the same losses, gradients and adapter, whatever each of them computes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import inlay
from inlay.train import checkpoint
from inlay.train.ranks import ALONE, shares, spread
from tests.train.ranked import (
    breaks,
    counts_below,
    launch,
    metrics,
    no_dropout,
    no_room,
    overflows,
    resumed,
    stops_after,
    train,
    train_differently,
)
from tests.train.tiny import base, copy, rows, same

NEAR = {"rel": 1e-5}
NEAR_16 = {"rel": 2e-3}
"""float16 rounds each pack by its shape."""


def alike(one, other):
    """The same metrics, step by step."""
    one, other = metrics(one), metrics(other)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() - {"seconds"}:
            assert b[k] == pytest.approx(a[k], **NEAR), (k, a["step"])


def adapters_alike(one, other, kind="llama"):
    a, b = inlay.attach(base(kind=kind)), inlay.attach(base(kind=kind))
    inlay.load(a, one / "adapter"), inlay.load(b, other / "adapter")
    for k, v in copy(a).items():
        torch.testing.assert_close(copy(b)[k], v, rtol=1e-3, atol=2e-5)


# Packs of 16 tokens: in most steps one rank has more of them than the other.
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_cached_activations_are_computed_once_by_one_of_two_ranks(tmp_path, parallel, where):
    own, changes = {"at": "q,up@last1"}, {"steps": 9, "eval_every": 0, "parallel": parallel, "pack_tokens": 16}
    cached = {**changes, "cache_activations": where}
    want = train(tmp_path / "one", "lora", own, changes, rig=counts_below)
    once = sum(len(e.input_ids) for e in rows(11, prompt=True))
    assert want["below"] > 2 * once
    two = launch(2, train, tmp_path / "two", "lora", own, cached, 11, False, counts_below)
    assert [got["loss"] for got in two] == pytest.approx(2 * [want["loss"]], **NEAR)
    below = sum(got["below"] for got in two)
    idle = min(len(e.input_ids) for e in rows(11))  # computed where a rank has nothing to do and parts are gathered
    assert below == once if parallel == "ddp" else once <= below <= once + 2 * 9 * idle
    alike(tmp_path / "one", tmp_path / "two")
    adapters_alike(tmp_path / "one", tmp_path / "two")
    sizes = [16 * 4 * sum(len(e.input_ids) for e in part) for part in shares(rows(11, prompt=True), 2)]
    told = f"takes {sizes[0]:,} bytes in process 0 of 2, {max(sizes):,} in the fullest, {sum(sizes):,} in all"
    assert told in (tmp_path / "two" / "log.txt").read_text()
    kept = {p.name: p.stat().st_size for p in (tmp_path / "two").glob("activations-*.bin")}
    assert kept == ({f"activations-{r}-of-2.bin": sizes[r] for r in range(2)} if where == "disk" else {})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_cached_activations_on_disk_outlive_a_stop(tmp_path, parallel):
    """The same number of ranks computes nothing below the adapter again; another number begins anew."""
    own = {"at": "q,up@last1"}
    changes = {"steps": 9, "save_every": 3, "eval_every": 0, "parallel": parallel, "cache_activations": "disk"}
    want = train(tmp_path / "one", "lora", own, {**changes, "cache_activations": "off"})
    run = tmp_path / "run"
    launch(2, train, run, "lora", own, changes, 11, False, stops_after(6))
    assert checkpoint.steps(run)[-1] == 6
    shutil.copytree(run, tmp_path / "alone"), shutil.copytree(run, tmp_path / "strange")
    once = sum(len(e.input_ids) for e in rows(11, prompt=True))
    idle = 0 if parallel == "ddp" else 3 * 2 * min(len(e.input_ids) for e in rows(11))

    again = launch(2, train, run, "lora", own, changes, 11, True, counts_below)
    assert sum(got["below"] for got in again) <= idle

    for p in (tmp_path / "strange").glob("activations-*"):  # each rank finds the other's file in its place
        p.rename(p.with_name("." + p.name.replace("-0-", "-x-").replace("-1-", "-0-").replace("-x-", "-1-")))
    for p in (tmp_path / "strange").glob(".activations-*"):
        p.rename(p.with_name(p.name[1:]))
    strange = launch(2, train, tmp_path / "strange", "lora", own, changes, 11, True, counts_below)
    assert once <= sum(got["below"] for got in strange) <= once + idle

    (alone,) = launch(1, train, tmp_path / "alone", "lora", own, changes, 11, True, counts_below)
    assert alone["below"] == once
    assert {p.name.partition(".")[0] for p in (tmp_path / "alone").glob("activations*")} == {"activations"}
    for got, where in [(again[0], run), (strange[0], tmp_path / "strange"), (alone, tmp_path / "alone")]:
        assert got["loss"] == pytest.approx(want["loss"], **NEAR)
        alike(tmp_path / "one", where)
        adapters_alike(tmp_path / "one", where)


def test_a_rank_without_room_for_its_activations_stops_all(tmp_path):
    own, changes = {"at": "q,up@last1"}, {"parallel": "fsdp", "cache_activations": "disk"}
    said = launch(2, train, tmp_path, "lora", own, changes, 11, False, no_room)
    told = r"need [\d,]+ bytes \(and [\d,]+ in other processes of this machine\), [\d,]+ are free"
    assert ASTRAY in said[0] and re.search(told, said[1])


def test_shares_are_even_and_whole():
    data = rows(13)
    for size in (1, 2, 3, 5, 20):
        parts = shares(data, size)
        assert len(parts) == size
        assert sorted(map(id, sum(parts, []))) == sorted(map(id, data))
        tokens = [sum(len(e.input_ids) for e in p) for p in parts]
        assert max(tokens) - min(tokens) <= max(len(e.input_ids) for e in data)
    assert shares([], 2) == [[], []]
    assert ALONE.sums([1.5]) == [1.5] and ALONE.from_first(lambda: 3) == 3 and ALONE.gathered("x") == ["x"]


# 11 examples in batches of 4: the last step of an epoch has 3, and with batches of 5 it has 1, so one rank is idle.
@pytest.mark.parametrize(
    ("parallel", "method", "own", "changes"),
    [
        ("ddp", "lora", {}, {}),
        ("ddp", "adalora", {"rank": 6, "target": 2, "interval": 2}, {"batch_size": 5, "gradient_checkpointing": True}),
        ("ddp", "prefix", {}, {"batch_size": 5, "engine": "plain"}),
        ("fsdp", "lora", {}, {"batch_size": 5, "pack_tokens": 16}),
        ("fsdp", "lora", {"at": "q,up,head,embed"}, {"gradient_checkpointing": True}),
        ("fsdp", "adalora", {"rank": 6, "target": 2, "interval": 2}, {"batch_size": 5}),
        ("fsdp", "vera", {}, {"engine": "plain"}),
        ("fsdp", "prefix", {}, {}),
        ("fsdp", "series", {"kind": "gpt2"}, {}),  # embedding and head are one tensor
    ],
)
def test_two_ranks_compute_what_one_computes(tmp_path, parallel, method, own, changes):
    changes = {**changes, "parallel": parallel}
    want = train(tmp_path / "one", method, own, changes, rig=no_dropout)
    all_of_it = want.pop("kept")
    for got in launch(2, train, tmp_path / "two", method, own, changes, 11, False, no_dropout):
        assert got.pop("kept") == (pytest.approx(all_of_it / 2, rel=0.1) if parallel == "fsdp" else all_of_it)
        assert got == pytest.approx(want, **NEAR)
    alike(tmp_path / "one", tmp_path / "two")
    adapters_alike(tmp_path / "one", tmp_path / "two", kind=own.get("kind", "llama"))
    assert "padded" not in (tmp_path / "two" / "log.txt").read_text()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, parallel, before, after):
    changes = {"steps": 6, "parallel": parallel, "save_every": 3, "eval_every": 4}
    train(tmp_path / "whole", "lora", {}, changes)
    run = tmp_path / "run"
    first = launch(before, train, run, "lora", {}, changes, 11, False, stops_after(3))
    assert all("stopped on purpose" in answer for answer in first), first
    assert checkpoint.steps(run) == [3]
    for answer in launch(after, train, run, "lora", {}, changes, 11, True):
        assert answer["steps"] == 6
    assert "go on from" in (run / "log.txt").read_text()
    alike(tmp_path / "whole", run)
    adapters_alike(tmp_path / "whole", run)
    if before < after:
        assert "ranks: 1 before, 2 now" in (run / "log.txt").read_text()


def test_two_ranks_resume_to_the_last_bit(tmp_path):
    """With dropout, which every rank draws for itself."""
    own, changes = {"dropout": 0.3}, {"steps": 6, "save_every": 3, "eval_every": 4}
    launch(2, train, tmp_path / "whole", "lora", own, changes)
    launch(2, train, tmp_path / "run", "lora", own, changes, 11, False, stops_after(3))
    launch(2, train, tmp_path / "run", "lora", own, changes, 11, True)
    a, b = (checkpoint.read(tmp_path / r / "checkpoint-6") for r in ("whole", "run"))
    assert same(a.adapter, b.adapter)
    drawn = [s["torch"] for s in (a.state["random"], *a.state["random_of_other_ranks"])]
    assert not torch.equal(*drawn) and torch.equal(drawn[1], b.state["random_of_other_ranks"][0]["torch"])


ASTRAY = "InlayError: another process of this run has failed"


@pytest.mark.parametrize(
    ("parallel", "how", "on", "here", "there"),
    [
        ("ddp", "compute", 1, "ValueError: out of luck", ASTRAY),
        ("ddp", "write", 0, "InlayError: cannot write", ASTRAY),
        ("ddp", "diverge", 1, "Diverged: ", "Diverged: "),
        ("fsdp", "compute", 1, "ValueError: out of luck", "RuntimeError: "),  # the connection is closed on the other
        ("fsdp", "write", 0, "InlayError: cannot write", ASTRAY),
        ("fsdp", "diverge", 1, "Diverged: ", "Diverged: "),
    ],
)
def test_an_error_of_one_rank_stops_all(tmp_path, parallel, how, on, here, there):
    said = launch(2, train, tmp_path, "lora", {}, {"steps": 8, "parallel": parallel}, 11, False, breaks(2, on, how))
    assert here in said[on] and there in said[1 - on], said
    assert not (tmp_path / "adapter").exists()


def test_ranks_with_other_data_are_refused(tmp_path):
    said = launch(2, train_differently, tmp_path)
    assert all("not the same in all processes" in text for text in said), said


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_overflow_in_one_rank_leaves_out_the_step_of_all(tmp_path, parallel):
    """Losses, gradient norms and the loss scale in fp16, also after a resumption on one rank."""
    own = {"at": "q,up"}
    changes = {"steps": 6, "parallel": parallel, "dtype": "fp16", "save_every": 3, "eval_every": 4}
    (want,) = launch(1, train, tmp_path / "one", "lora", own, changes, 11, False, overflows(2, 0))
    said = launch(2, train, tmp_path / "two", "lora", own, changes, 11, False, overflows(2, 1))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in one if "overflow" in m] == [2] == [m["step"] for m in two if "overflow" in m]
    for got in said:
        assert got["scales"] == want["scales"] == [65536.0] + 5 * [32768.0]
        assert got["loss"] == pytest.approx(want["loss"], **NEAR_16)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() & {"loss", "val_loss", "grad_norm", "lr"}:
            assert b[k] == pytest.approx(a[k], **NEAR_16), (k, a["step"])
    path = tmp_path / "two" / "checkpoint-3"
    (again,) = launch(1, resumed, tmp_path / "two", path, own, changes, overflows(2, 0))
    assert again["scales"] == 3 * [32768.0] and again["loss"] == pytest.approx(want["loss"], **NEAR_16)


LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "wanted", "size", "sharded", "says"),
    [
        (LAUNCH, "auto", 2, False, ""),
        (LAUNCH, "fsdp", 2, True, ""),
        (LAUNCH, "fsdp", 1, False, ""),
        ({"ACCELERATE_USE_FSDP": "true"}, "auto", 2, False, ""),  # left there by a Trainer
        ({**LAUNCH, "ACCELERATE_USE_FSDP": "false"}, "auto", 2, False, ""),
        ({**LAUNCH, "ACCELERATE_USE_FSDP": "true"}, "auto", 2, True, "Inlay shards the base itself"),
        ({**LAUNCH, "ACCELERATE_USE_FSDP": "true"}, "fsdp", 2, True, "Inlay shards the base itself"),
        ({**LAUNCH, "ACCELERATE_USE_FSDP": "true"}, "ddp", 2, False, "FSDP, but each process holds the whole base"),
        ({**LAUNCH, "ACCELERATE_USE_FSDP": "true"}, "auto", 1, False, "FSDP, but one process holds the whole base"),
        ({**LAUNCH, "ACCELERATE_USE_DEEPSPEED": "true"}, "auto", 2, False, "DeepSpeed, but each process holds"),
        (
            {**LAUNCH, "ACCELERATE_USE_DEEPSPEED": "true"},
            "fsdp",
            2,
            True,
            "DeepSpeed, but the base is sharded by FSDP2",
        ),
    ],
)
def test_what_accelerate_is_asked_for_is_done_or_said(monkeypatch, variables, wanted, size, sharded, says):
    for n in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", *LAUNCH):
        monkeypatch.delenv(n, raising=False)
    for n, value in variables.items():
        monkeypatch.setenv(n, value)
    got = spread(wanted, size)
    assert got[0] is sharded and (says in got[1] if says else not got[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says", "part"),
    [
        ("", "asks for FSDP: Inlay shards the base itself", 0.5),
        ("--parallel ddp", "asks for FSDP, but each process holds the whole base (parallel: ddp)", 1.0),
    ],
)
def test_accelerate_asked_for_fsdp_on_cpus(tmp_path, flags, says, part):
    """By its own configuration file, in real processes; each counts what it holds of the base when it ends."""
    config = tmp_path / "fsdp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
        "machine_rank: 0\nmain_process_port: 0\nmixed_precision: 'no'\nnum_machines: 1\nnum_processes: 2\n"
    )
    own = "--model tiny-llama --task world-addsub --limit 40 --steps 2 --warmup 1 --loggers none"
    alone = f"-m inlay train {own} --out {tmp_path / 'one'}".split()
    spread_ = f"-m accelerate.commands.launch --config_file {config} -m tests.train.held {own} {flags}".split()
    for command in (alone, [*spread_, "--out", str(tmp_path / "two")]):
        made = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stderr
    assert " ".join(made.stderr.split()).count(says) == 1 and says in (tmp_path / "two" / "log.txt").read_text()
    alike(tmp_path / "one", tmp_path / "two")
    held = [float(line.split()[1]) for line in made.stdout.splitlines() if line.startswith("held ")]
    assert held == pytest.approx([part, part], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ["torch.distributed.run --nproc-per-node 2", "accelerate.commands.launch --multi_gpu --num_processes 2"],
)
def test_launchers_and_the_command_line(tmp_path, launcher):
    """Both start the same processes; without a GPU they speak gloo."""
    flags = f"--model tiny-llama --task world-addsub --limit 40 --steps 2 --loggers none --no-progress --out {tmp_path}"
    command = f"{launcher} -m inlay train {flags}".split()
    made = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("2 steps") == 1
    assert json.loads((tmp_path / "environment.json").read_text())["sessions"][0]["ranks"] == 2
