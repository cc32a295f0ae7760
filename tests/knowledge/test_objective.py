"""Weights inside the training loop: packed or plain, in parts, on ranks and resumed, they are those of one batch."""

from __future__ import annotations

import json

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.knowledge.objective import BINS, Semantic, edges, embeddings, objective
from inlay.knowledge.settings import KnowSettings
from inlay.knowledge.weights import soft_distance, weighted_loss, weights
from inlay.train import fit
from inlay.train.ways import Packed, Plain
from tests.knowledge.ranked import DISTANCES, made, run, run_each
from tests.train.ranked import launch
from tests.train.tiny import copy, rows, same, settings, wearing

STATIC = {"signal": "static", "items": "i", "table": "t"}
SIGNALS = ("static", "dynamic", "deviation", "confidence")


def know(**changes):
    return KnowSettings(**{**STATIC, **changes})


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def trained(out, k, *, method="lora", resume=False, beta=None, **changes):
    """A run of six steps on eleven rows: (adapter's tensors, metrics)."""
    data = rows(11, prompt=True)
    host = wearing(method)
    goal = made(host, data, k, beta)
    fit(host, "a", data, [], settings(out, **changes), out, None, resume=resume, objective=goal)
    return copy(host), metrics(out)


@pytest.mark.parametrize("way", ["plain", "packed"])
@pytest.mark.parametrize("signal", ["static", "dynamic", "confidence"])
def test_a_step_is_the_weighted_loss_of_its_batch(way, signal):
    """Against the pure functions on padded logits, for weights over the whole batch."""
    data = rows(8, prompt=True)
    host = wearing()
    k = know(signal=signal, beta=-1.5, gamma=0.7, exact=True)
    goal = made(host, data, k)
    way = Plain(host, 0, 3) if way == "plain" else Packed(host, 0, 30)
    with host.using("a"), way.active():
        goal.begin(data, 0.0, survey_of(goal, way))
        got = sum(goal.loss(way, group) for group in way.split(data))
        got.backward()
    found = {key: t.grad.clone() for key, t in host.tensors("a").items() if t.grad is not None}
    host.model.zero_grad()
    ids, labels = padded(data)
    with host.using("a"):
        logits = host.model(ids).logits[:, :-1]
    E = embeddings(host)
    d = soft_distance(logits, labels, E)
    p = torch.stack(
        [o.softmax(-1)[range(len(t)), t.clamp_min(0)][t != -100].mean() for o, t in zip(logits, labels, strict=True)]
    )
    x = {"static": torch.tensor(DISTANCES[:8]), "dynamic": d, "confidence": 1 - p}[signal]
    want = weighted_loss(logits, labels, weights(x, -1.5)) + 0.7 * d.mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    want.backward()
    for key, t in host.tensors("a").items():
        if t.grad is not None:
            torch.testing.assert_close(found[key], t.grad, rtol=1e-3, atol=1e-5 * float(t.grad.abs().max()) + 1e-8)


def padded(data):
    wide = max(len(r.input_ids) for r in data)
    ids = torch.tensor([r.input_ids + [0] * (wide - len(r.input_ids)) for r in data])
    labels = torch.tensor([r.labels[1:] + [-100] * (wide - len(r.labels)) for r in data])
    return ids, labels


def survey_of(goal, way):
    def survey(examples, read, reduce, width):
        found = torch.zeros(len(examples), width, dtype=torch.float64)
        with torch.no_grad():
            for group in way.split(examples):
                for row, own in zip(group, reduce(group, *way.tokens(group, read, False)), strict=True):
                    found[[id(e) for e in examples].index(id(row))] = own.double()
        return found

    return survey


def test_beta_zero_is_the_unweighted_run_to_the_last_bit(tmp_path):
    want = trained(tmp_path / "plain", None)
    for signal in SIGNALS:
        k = know(signal=signal, beta=0.0)
        assert objective(rows(3), k, 0.0, None, None) is None
        got = trained(tmp_path / signal, k)
        assert same(got[0], want[0]) and [m["loss"] for m in got[1]] == [m["loss"] for m in want[1]]
    by_item = trained(tmp_path / "items", know(signal="none", reduction="item"))
    zero = trained(tmp_path / "zero", know(beta=0.0, reduction="item"))
    assert same(zero[0], by_item[0]) and not same(zero[0], want[0])


def test_equal_distances_are_the_unweighted_run(tmp_path):
    k = know(beta=2.0)
    host, data = wearing(), rows(11, prompt=True)
    goal = Semantic(data, k, 2.0, [0.4] * 11)
    fit(host, "a", data, [], settings(tmp_path / "a"), tmp_path / "a", None, objective=goal)
    by_item = trained(tmp_path / "b", know(signal="none", reduction="item"))
    assert same(copy(host), by_item[0])


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_packed_and_plain_runs_agree(tmp_path, signal, method):
    k = know(signal=signal, beta=1.0, gamma=0.5, exact=True)
    one, other = (
        trained(tmp_path / engine, k, method=method, engine=engine, pack_tokens=24)[1] for engine in ("packed", "plain")
    )
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-3
        )
        assert b["weights"] == a["weights"] and b["weights_used"] == pytest.approx(a["weights_used"], rel=1e-4)


@pytest.mark.parametrize("signal", SIGNALS)
def test_accumulation_changes_nothing(tmp_path, signal):
    """Batches of eight, at once and in fours of two (plain), or in packs of few tokens."""
    k = know(signal=signal, beta=1.0, exact=True)
    found = [
        trained(tmp_path / str(i), k, batch_size=8, **how)[1]
        for i, how in enumerate(
            ({"engine": "plain", "micro_batch": 8}, {"engine": "plain", "micro_batch": 2}, {"pack_tokens": 16})
        )
    ]
    for other in found[1:]:
        assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in found[0]], rel=2e-5)


@pytest.mark.parametrize("control", ["none", "shuffled", "lr-matched"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, signal, control):
    k = know(signal=signal, beta=-1.0, beta_end=1.0, gamma=0.2, control=control)
    whole = trained(tmp_path / "whole", k)
    host, data = wearing(), rows(11, prompt=True)
    out = tmp_path / "whole" / "checkpoint-4"
    fit(host, "a", data, [], settings(tmp_path / "b"), tmp_path / "b", None, resume=out, objective=made(host, data, k))
    assert same(copy(host), whole[0])
    told = metrics(tmp_path / "b")
    assert [m["loss"] for m in told] == [m["loss"] for m in whole[1][4:]]


def test_a_run_goes_on_under_the_same_distances_only(tmp_path):
    k = know(beta=1.0)
    trained(tmp_path, k)
    host, data = wearing(), rows(11, prompt=True)
    goal = Semantic(data, k, 1.0, [d + 0.1 for d in DISTANCES])
    with pytest.raises(InlayError, match="trained on other data"):
        fit(host, "a", data, [], settings(tmp_path), tmp_path, None, resume=True, objective=goal)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_running_mean_comes_near_the_batch(tmp_path, signal):
    exact, running = (
        trained(tmp_path / str(exact), know(signal=signal, beta=1.0, exact=exact), steps=8)[1]
        for exact in (True, False)
    )
    assert running[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-6)  # the first step knows no earlier one
    assert [m["loss"] for m in running] == pytest.approx([m["loss"] for m in exact], rel=0.25)
    if signal == "static":
        assert [m["loss"] for m in running] == [m["loss"] for m in exact]


def test_the_schedule_goes_from_beta_to_beta_end(tmp_path):
    told = trained(tmp_path, know(beta=-2.0, beta_end=2.0))[1]
    assert [m["beta"] for m in told] == pytest.approx([-2.0, -1.2, -0.4, 0.4, 1.2, 2.0])
    assert all(0 < m["weights_used"] <= 1 and sum(m["weights"]) in (3, 4) and len(m["weights"]) == BINS for m in told)
    assert edges(5.0)[0] == pytest.approx(0.2) and edges(5.0)[-1] == pytest.approx(5.0)


def test_shuffled_weights_are_the_same_weights(tmp_path):
    k = know(beta=2.0)
    own, mixed = (trained(tmp_path / c, know(beta=2.0, control=c))[1] for c in ("none", "shuffled"))
    assert [m["weights"] for m in own] == [m["weights"] for m in mixed] and k.weighs
    assert [m["loss"] for m in own] != [m["loss"] for m in mixed]


def test_a_matched_rate_scales_the_step_and_not_the_items(tmp_path):
    matched = trained(tmp_path / "m", know(beta=2.0, control="lr-matched"), clip=0)[1]
    uniform = trained(tmp_path / "u", know(signal="none", reduction="item"), clip=0)[1]
    assert matched[0]["loss"] == pytest.approx(uniform[0]["loss"], rel=1e-6)
    assert matched[0]["grad_norm"] == pytest.approx(uniform[0]["grad_norm"], rel=1e-5)
    rate = [a["lr"] / b["lr"] for a, b in zip(matched, uniform, strict=True) if b["lr"]]
    assert all(0.2 < r < 5 for r in rate) and any(abs(r - 1) > 1e-3 for r in rate)


def test_gamma_alone_pulls(tmp_path):
    data = rows(11, prompt=True)
    want, got = (trained(tmp_path / str(g), know(signal="none", reduction="item", gamma=g))[1] for g in (0.0, 1.0))
    host = wearing()
    E = embeddings(host)
    ids, labels = padded(data)
    with torch.no_grad(), host.using("a"):
        d = soft_distance(host.model(ids).logits[:, :-1], labels, E)
    from inlay.train.batches import Feed

    first = [data.index(e) for e in Feed(data, 4, 42, False).step(0)]
    assert got[0]["loss"] - want[0]["loss"] == pytest.approx(d[first].mean().item(), rel=1e-4)


CASES = [
    (parallel, signal, changes)
    for parallel in ("ddp", "fsdp")
    for signal, changes in (
        ("static", {}),
        ("dynamic", {"gamma": 0.5}),
        ("deviation", {"exact": True}),
        ("confidence", {"control": "lr-matched"}),
    )
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Every case as a run of two processes, the same two for all: starting them is most of the time."""
    out = tmp_path_factory.mktemp("two")
    runs = [(out / str(n), _ranked(*case), {"batch_size": 5, "parallel": case[0]}) for n, case in enumerate(CASES)]
    said = launch(2, run_each, runs, patience=300)
    assert said == [[6] * len(CASES)] * 2, said
    return out


def _ranked(parallel, signal, changes):
    return {**STATIC, "signal": signal, "beta": -1.0, **changes}


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{CASES[n][1]}")
def test_two_ranks_weigh_as_one(tmp_path, two_ranks, case):
    """Batches of five of eleven rows: the last has one, so that a rank is idle."""
    run(tmp_path, _ranked(*CASES[case]), {"batch_size": 5, "parallel": CASES[case][0]})
    for a, b in zip(metrics(tmp_path), metrics(two_ranks / str(case)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-3
        )
        assert b["weights"] == a["weights"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"signal": "none", "beta": 2.0}, "say what they follow"),
        ({"kappa": 0.5}, "kappa"),
        ({"beta": "auto", "beta_end": 1.0}, "exclude each other"),
        ({"control": "random"}, "stands in for a filter"),
        ({"signal": "none", "control": "shuffled"}, "stands in for weights"),
        ({"table": None}, "needs items and their table"),
        ({"filter": "band", "control": "no-unknown"}, "needs categories"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(InlayError, match=match):
        know(**changes)
