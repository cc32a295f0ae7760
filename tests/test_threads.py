"""The number of CPU threads: what is set, what is left alone, and what the system's files are read as."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from inlay import InlayError, threads


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(threads, "_last_default", None)
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A machine with 8 logical CPUs on 4 cores, all of them ours and idle; a function that writes a control group."""
    topology, groups = tmp_path / "cpu", tmp_path / "cgroup"
    for cpu in range(8):
        (topology / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (topology / f"cpu{cpu}" / "topology" / "physical_package_id").write_text("0\n")
        (topology / f"cpu{cpu}" / "topology" / "core_id").write_text(f"{cpu % 4}\n")
    monkeypatch.setattr(threads, "_TOPOLOGY", topology)
    monkeypatch.setattr(threads, "_CGROUPS", groups)
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(8)))
    monkeypatch.setattr(threads, "busy_elsewhere", lambda: 0.0)
    monkeypatch.setattr(threads, "_quotas", lambda: iter(()))
    return groups


def test_a_given_number_is_set_and_returned():
    assert threads.set_threads(2) == torch.get_num_threads() == 2
    assert threads.set_threads(1) == torch.get_num_threads() == 1


def test_a_resumed_run_keeps_its_number_unless_the_user_chose_one(monkeypatch, system):
    torch.set_num_threads(3)
    assert threads.keep_threads(2) == 3, "the user's"
    torch.set_num_threads(8)
    monkeypatch.setattr(threads, "busy_elsewhere", lambda: 2.0)
    assert threads.set_threads(None) == 4
    assert threads.keep_threads(None) == 4 and threads.keep_threads(64) == 4, "unknown, or of a larger machine"
    assert threads.keep_threads(2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("number", [0, -3])
def test_fewer_than_one_is_refused(number):
    with pytest.raises(InlayError, match=f"at least 1, not {number}"):
        threads.set_threads(number)


def test_what_the_user_chose_stays(monkeypatch, system):
    torch.set_num_threads(3)  # neither the 4 cores, the 8 CPUs, nor what this machine has
    if os.cpu_count() != 3:
        assert threads.set_threads(None) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    torch.set_num_threads(8)
    assert threads.set_threads(None) == 8


def test_hyperthreads_of_a_core_count_once(system):
    torch.set_num_threads(8)
    assert threads.usable_cores() == 4
    assert threads.set_threads(None) == 4


def test_cores_that_others_keep_busy_are_left_to_them(monkeypatch, system):
    for busy, number in ((5.1, 3), (5.6, 2), (8.0, 1), (20.0, 1)):
        torch.set_num_threads(8)
        monkeypatch.setattr(threads, "busy_elsewhere", lambda busy=busy: busy)
        assert threads.set_threads(None) == number
    monkeypatch.setattr(threads, "busy_elsewhere", lambda: 0.0)
    assert threads.set_threads(None) == 4, "an earlier default is no choice of the user's"


def test_quotas_of_control_groups_are_read(system, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_CGROUPS", system)
    inner = system / "pod" / "box"
    inner.mkdir(parents=True)
    assert threads._quota(inner) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert threads._quota(inner) is None
    (inner / "cpu.max").write_text("250000 100000\n")
    assert threads._quota(inner) == 2.5
    old = tmp_path / "v1"
    old.mkdir()
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert threads._quota(old) is None
    (old / "cpu.cfs_quota_us").write_text("150000\n")
    assert threads._quota(old) == 1.5


def test_the_quota_of_a_group_above_counts(system, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_CGROUPS", system)
    (system / "pod" / "box").mkdir(parents=True)
    (system / "pod" / "cpu.max").write_text("120000 100000\n")
    (system / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    assert list(threads._quotas_of("0::/pod/box")) == [1.2]
    (system / "cpu" / "a").mkdir(parents=True)
    (system / "cpu" / "a" / "cpu.cfs_quota_us").write_text("300000\n")
    (system / "cpu" / "a" / "cpu.cfs_period_us").write_text("100000\n")
    assert list(threads._quotas_of("4:cpu,cpuacct:/a")) == [3.0]
    assert list(threads._quotas_of("8:memory:/a")) == []


def test_a_quota_below_one_cpu_leaves_one_thread(system, monkeypatch):
    monkeypatch.setattr(threads, "_quotas", lambda: iter((0.5,)))
    assert threads.default_threads() == 1


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system has no /proc/stat")
def test_another_process_is_seen_and_our_own_work_is_not():
    quiet = threads.busy_elsewhere(0.2)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        beside = threads.busy_elsewhere(0.4)
    finally:
        other.kill()
        other.wait()
    cpus = len(threads._affinity())
    assert 0 <= quiet <= cpus + 0.2
    assert beside > min(0.5, quiet + 0.2)


def test_a_system_that_tells_nothing_is_taken_as_idle(monkeypatch):
    monkeypatch.setattr(threads, "_busy_ticks", lambda: None)
    assert threads.busy_elsewhere() == 0.0
