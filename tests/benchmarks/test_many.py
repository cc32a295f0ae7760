"""Many adapters on one model: both sides wear the same, and a row is a median of rounds in which they took turns."""

import pytest
import torch

from benchmarks.bases import llama
from benchmarks.harness import FASTER, SHARE
from benchmarks.many import Many, _ids, mean


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    many = Many("tiny", (1, 4, 6), 2, tmp_path_factory.mktemp("adapters"))
    return many, list(many.results())


def test_every_number_has_its_load_forward_and_switch_over_rounds(measured):
    found = {(r.workload, r.peer_is): (r.rounds, r.metric) for r in measured[1]}
    want = {("1 adapter, 14 places: load", "PEFT"): (2, FASTER)}
    want[("4 adapters, 14 places: last load", "PEFT")] = (2, FASTER)
    want[("6 adapters, 14 places: last load", "its own first load")] = (4, SHARE)
    for what in ("forward", "switch", "switch, then forward"):
        for n, peer in (("1 adapter", "PEFT"), ("4 adapters", "PEFT"), ("6 adapters", "PEFT with 4")):
            want[(f"{n}, 14 places: {what}", peer)] = (2, FASTER)
        want[(f"6 adapters, 14 places: {what}", "the same with 1")] = (2, SHARE)
    assert found == want and len(measured[1]) == len(want)
    assert all(r.low <= r.ratio <= r.high and r.ours > 0 for r in measured[1])
    assert all(len(r.note) < 60 for r in measured[1])


def test_the_models_hold_as_many_as_is_said_and_wear_what_was_trained(measured):
    many, _ = measured
    assert [s.count for s in (*many.ours.values(), *many.peers.values())] == [1, 4, 6, 1, 4]
    assert [len(s.host.edits) for s in many.ours.values()] == [1, 4, 6]
    assert [len(s.model.peft_config) for s in many.peers.values()] == [1, 4]
    with torch.no_grad():
        bare = llama("tiny")(_ids()).logits
    said = [s.logits() for s in (*many.ours.values(), *many.peers.values())]
    assert all(float((s - bare).abs().max()) > 1e-2 for s in said)
    many.agree()


def test_models_that_differ_stop_the_benchmark(measured):
    many, _ = measured
    host = many.ours[4].host
    with host.using(None), pytest.raises(RuntimeError, match="logits are .* apart"):
        many.agree()


def test_a_round_counts_the_mean_of_its_calls():
    seen = []
    took = mean(seen.append, 4)()
    assert seen == [0, 1, 2, 3] and 0 <= took.wall < 0.1
