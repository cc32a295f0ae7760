"""The measuring itself: ratios by round, sides that compute the same, typical lengths, work that is counted."""

import json
import re
import subprocess
import time
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import inlay
from benchmarks import bound, report
from benchmarks.bases import llama
from benchmarks.harness import FASTER, SHARE, Took, clock, compare, faster, record, rounds, state, total
from benchmarks.lengths import BATCH, FILE, padding, rows, typical
from benchmarks.load import Watch
from benchmarks.train import METHODS, Ours, agree, alike, batches, pair, turn


def test_the_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians():
    made = compare("w", FASTER, [1.0, 2.0, 10.0], [4.0, 2.0, 30.0], "s", "p")
    assert (made.ratio, made.low, made.high, made.ours, made.peer, made.rounds) == (3.0, 1.0, 4.0, 2.0, 4.0, 3)
    assert compare("w", SHARE, [1.0], [4.0], "MiB", "p").ratio == 0.25


def test_wall_and_cpu_seconds_make_ratios_of_their_own():
    made = faster("w", [Took(1.0, 2.0)], [Took(3.0, 4.0)], "p")
    assert (made.ratio, made.cpu_ratio) == (3.0, 2.0)
    assert total([Took(1, 2), Took(3, 5)]) == Took(4, 7)


def test_rounds_interleave_and_the_first_is_thrown_away():
    order = []
    given = iter([Took(9.0, 9.0), Took(1.0, 1.0), Took(2.0, 2.0)])
    found = rounds({"a": lambda: order.append("a") or next(given), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert found["a"] == [Took(1.0, 1.0), Took(2.0, 2.0)] and len(found["b"]) == 2


def test_a_cpu_clock_does_not_count_waiting():
    began = clock()
    time.sleep(0.05)
    took = began.since()
    assert took.wall >= 0.05 > took.cpu


def test_a_result_takes_the_place_of_an_older_one_and_every_column_is_written(tmp_path):
    path = tmp_path / "benchmarks.json"
    load = Watch().told()
    for workload, ratio in (("b", 5.0), ("a", 2.0), ("b", 3.0)):
        record(
            faster(workload, [Took(1.0, 1.0)], [Took(ratio, 1.0)], "peer", "why"), "python -m benchmarks", load, path
        )
    found = json.loads(path.read_text())
    assert [(r["workload"], r["ratio"]) for r in found] == [("a", 2.0), ("b", 3.0)]
    assert {"machine", "command", "date", "inlay", "load", "low", "high", "cpu_ratio"} <= found[0].keys()
    assert found[0]["machine"]["ram_gib"] > 0
    assert {"torch", "numpy", "transformers", "accelerate"} <= found[0]["machine"]["packages"].keys()
    header, rule, *lines = report.table(found).split("\n\n")[0].splitlines()
    assert len(lines) == 2 and len({line.count("|") for line in (header, rule, *lines)}) == 1


def test_a_row_tells_the_state_of_inlay_and_an_older_one_tells_none(tmp_path):
    path = tmp_path / "benchmarks.json"
    record(compare("a", FASTER, [1.0], [2.0], "s", "p"), "c", Watch().told(), path)
    (row,) = json.loads(path.read_text())
    older = {k: v for k, v in row.items() if k != "inlay"}
    header, _, *lines = report.table([row, older]).split("\n\n")[0].splitlines()
    at = [cell.strip() for cell in header.split("|")].index("Inlay")
    assert [line.split("|")[at].strip() for line in lines] == [state(), ""]


def git(folder, *words):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


def test_the_state_is_the_commit_marked_where_files_differ_and_the_version_without_one(tmp_path):
    for name in ("src", "installed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    assert state.__wrapped__(tmp_path / "src") == inlay.__version__
    (tmp_path / ".gitignore").write_text("installed\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = state.__wrapped__(tmp_path / "src")
    assert re.fullmatch("[0-9a-f]{7}", clean)
    assert state.__wrapped__(tmp_path / "installed") == inlay.__version__  # another project's repository
    (tmp_path / "src" / "__init__.py").write_text("1\n")
    assert state.__wrapped__(tmp_path / "src") == f"{clean}+"


@pytest.mark.parametrize("kind", ["math", "commonsense", "alpaca"])
def test_the_batches_that_are_timed_are_padded_like_the_data(kind):
    measures = json.loads(FILE.read_text())[kind]["rows"]
    whole = padding(measures)
    for count in (2, 4, 8):
        assert padding(measures[: count * BATCH]) == pytest.approx(whole, rel=0.02)
    assert sorted(typical(measures)) == sorted(measures)


def test_rows_have_the_lengths_of_the_file():
    made = rows("math", 16, 200)
    assert [(sum(x == -100 for x in r.labels), sum(x != -100 for x in r.labels)) for r in made] == [
        tuple(measure[:2]) for measure in json.loads(FILE.read_text())["math"]["rows"][:16]
    ]


def test_rows_begin_as_the_files_do():
    """LLM-Adapters' template, and within it the words that all questions of a data set share."""
    made, held = rows("commonsense", 16, 200), json.loads(FILE.read_text())["commonsense"]
    first = held["beginnings"][0]
    assert len({tuple(r.input_ids[:first]) for r in made}) == 1
    for (_, _, begins), r in zip(held["rows"], made, strict=False):
        own = first + held["beginnings"][begins[1]]
        assert r.labels[: own + 1] == [-100] * (own + 1)
        assert sum(o.input_ids[:own] == r.input_ids[:own] for o in made) == sum(
            b[2] == begins for b in held["rows"][:16]
        )


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_compute_the_same_losses(method, tmp_path):
    examples = rows("math", 16, 200)
    ours, peer = pair("tiny", examples, method, "fp32", 8, tmp_path / "a")
    agree(ours, peer, 2, 1e-5)
    assert turn(ours, 1)().wall > 0


def trained(monkeypatch, *words):
    """Names of what `train` times, and of what `series` times, when that is asked."""
    from benchmarks import __main__ as command

    names = []
    monkeypatch.setattr(command, "pair", lambda *a, **k: (None, None))
    monkeypatch.setattr(command, "agree", lambda *a: "")
    monkeypatch.setattr(command, "_steps", lambda name, *a: names.append(name))
    monkeypatch.setattr(command.adapterhub, "PYTHON", FILE)
    monkeypatch.setattr(command.adapterhub, "sides", lambda *a: (Namespace(examples=[]), PEER))
    asked = command.of(command.parsed(["train", "series", *words]))
    list(command.train(asked)), list(command.series(asked))
    return names


PEER = Namespace(versions={}, close=lambda: None)


def test_training_is_timed_on_every_kind_size_and_method_unless_a_part_is_asked_for(monkeypatch):
    kinds, sizes = ("math", "commonsense", "alpaca"), ("60M", "small")
    want = {f"train {m} {k} {s} {d}" for m in METHODS for k in kinds for s in sizes for d in ("fp32", "bf16")}
    want |= {f"train series {k} {s} fp32" for k in kinds for s in sizes}
    names = trained(monkeypatch)
    assert len(names) == len(want) == 42 and set(names) == want
    part = trained(monkeypatch, *"--methods road --kinds math alpaca --dtypes bf16 --size small".split())
    assert part == ["train road math small bf16", "train road alpaca small bf16",
                    "train series math small fp32", "train series alpaca small fp32"]  # fmt: skip


def test_losses_that_differ_stop_a_benchmark():
    with pytest.raises(RuntimeError, match="losses differ"):
        alike([1.0, 2.0], [1.0, 2.001], 1e-4)


def test_the_plain_engine_can_be_asked_for():
    examples = rows("math", 8, 200)
    ways = [Ours(llama("tiny"), "lora", examples, 8, engine=engine).loop.way for engine in ("packed", "plain")]
    assert [type(way).__name__ for way in ways] == ["Packed", "Plain"]


def test_work_is_what_pytorch_counts():
    model = llama("tiny").requires_grad_(False)
    (batch,) = cut = batches(rows("math", 1, 200), 1)
    ids = torch.tensor([batch[0].input_ids])
    learned = sum(x != -100 for x in batch[0].labels[1:])
    x = model.get_input_embeddings()(ids).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        model.lm_head(hidden[0, -learned:]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert bound.work(model.config, cut) == products
