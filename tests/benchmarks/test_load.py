"""What runs beside a measurement is started, counted and ended."""

import os
import time

import torch

from benchmarks import __main__ as command
from benchmarks import load
from benchmarks.harness import Took, rounds


def test_busy_loops_run_while_they_are_asked_for_and_count_as_own():
    before = load.own_seconds()
    with load.busy_cores(1):
        deadline = time.monotonic() + 20
        while load.own_seconds() - before < 0.1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert load.own_seconds() - before >= 0.1
    assert not load_children()


def load_children():
    return [
        f
        for f in load.Path("/proc").glob("[0-9]*/stat")
        if f.read_text().rpartition(")")[2].split()[1] == str(os.getpid())
    ]


def test_the_machine_is_looked_at_before_each_round_that_counts(monkeypatch):
    order = []
    rounds({"a": lambda: order.append("a")}, 2, lambda: order.append("look"))
    assert order == ["a", "look", "a", "look", "a"]


def test_a_machine_that_is_not_quiet_is_warned_of_and_noted(monkeypatch, capsys):
    monkeypatch.setattr(load, "PAUSE", 0.0)
    seconds = iter([(0.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)])
    monkeypatch.setattr(load, "machine_seconds", lambda: next(seconds))
    monkeypatch.setattr(load, "own_seconds", lambda: 0.0)
    watch = load.Watch()
    watch.before_round()
    assert "not one of a quiet machine" in capsys.readouterr().err
    watch.before_round()
    assert capsys.readouterr().err == ""
    noted = watch.noted(2)
    assert len(noted["loadavg_before"]) == 2 and noted["others_before"][0] > 1 and noted["others_before"][1] == 0.0


def test_rounds_beside_a_load_say_so_in_their_row(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        command.sys, "argv", "bench train --quick --methods lora --kinds math --dtypes fp32 --beside-load 2".split()
    )
    monkeypatch.setattr(load, "PAUSE", 0.0)
    import benchmarks.asked

    monkeypatch.setattr(benchmarks.asked, "busy_cores", lambda n: asked.append(n) or load.contextlib.nullcontext())
    command.main()
    out = capsys.readouterr().out
    assert asked == [2] and "train lora math tiny fp32, beside 2 busy" in out and "'beside': 2" in out


def test_threads_are_compared_with_each_other_and_with_the_peer(monkeypatch):
    """Each variant runs with its number, which is the caller's again afterwards."""
    from benchmarks import threads

    monkeypatch.setattr(load, "PAUSE", 0.0)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(threads, "turn", lambda side, n: lambda: seen.append(torch.get_num_threads()) or Took(1.0, 1.0))
    asked = command.of(command.parsed("threads --quick --kinds math --dtypes fp32 --threads 1".split()))
    made = list(threads.threads(asked))
    assert [r.peer_is for r in made] == ["PEFT + Trainer, threads 1", "ours, threads 2", "PEFT + Trainer, threads 2"]
    assert seen == [1, 1, 2, 2] * 2 and torch.get_num_threads() == before
