"""Every workload takes the rounds that are asked for."""

from benchmarks import __main__ as command


def test_memory_is_the_median_of_as_many_processes_as_rounds(monkeypatch):
    given = {"ours": iter([5.0, 1.0, 3.0, 2.0, 4.0]), "peer": iter([12.0] * 5), "empty": iter([0.5] * 5)}
    monkeypatch.setattr(command, "peak", lambda side, *words: next(given[side]))
    asked = command.of(command.parsed(["memory", "--kinds", "math"]))
    whole, above = command.memory(asked)
    assert (whole.rounds, whole.ours, whole.peer) == (above.rounds, above.ours + 0.5, above.peer + 0.5) == (5, 3.0, 12)
