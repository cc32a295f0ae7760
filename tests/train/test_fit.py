"""The loop: exact accumulation, losses, guards, what it leaves behind and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from torch.nn import functional as F

import inlay
from inlay.core import processor
from inlay.core.errors import InlayError
from inlay.train import fit
from inlay.train.loop import Diverged
from tests.train.tiny import base, copy, rows, same, settings, wearing


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_accumulation_is_one_big_batch(tmp_path):
    """Rows of unequal numbers of learned tokens: normalising per micro-batch would not give this."""
    data, seen = rows(16, prompt=True), []
    for micro in (8, 3, 1):
        host = wearing()
        fit(
            host,
            "a",
            data,
            [],
            settings(tmp_path / str(micro), batch_size=8, micro_batch=micro, lr=1e-3),
            tmp_path / str(micro),
            None,
        )
        seen.append(
            (
                copy(host),
                [m["loss"] for m in lines(tmp_path / str(micro))],
                [m["grad_norm"] for m in lines(tmp_path / str(micro))],
            )
        )
    for tensors, losses, norms in seen[1:]:
        assert losses == pytest.approx(seen[0][1], rel=1e-5)
        assert norms == pytest.approx(seen[0][2], rel=1e-4)
        for k, v in tensors.items():
            torch.testing.assert_close(v, seen[0][0][k], rtol=2e-4, atol=2e-5)


def test_first_step_is_adamw_on_the_mean_over_learned_tokens(tmp_path):
    """Against a loop written out: one row at a time, no padding, no accumulation helper."""
    data = rows(4, prompt=True)
    host, by_hand = wearing(), wearing()
    s = settings(tmp_path, steps=1, warmup=0, lr=1e-3, schedule="constant", weight_decay=0.1, clip=0.5)
    fit(host, "a", data, [], s, tmp_path, None)
    parameters = by_hand.parameters("a")
    total = torch.zeros(())
    with by_hand.using("a"):
        for r in data:
            logits = by_hand.model(torch.tensor([r.input_ids])).logits[0, :-1]
            total = total + F.cross_entropy(logits, torch.tensor(r.labels[1:]), reduction="sum")
    loss = total / sum(x != -100 for r in data for x in r.labels[1:])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1).step()
    (line,) = lines(tmp_path)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6) and line["grad_norm"] == pytest.approx(
        norm.item(), rel=1e-5
    )
    for k, v in host.tensors("a").items():
        torch.testing.assert_close(v, by_hand.tensors("a")[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    ["lora", "series", "parallel", "prefix", "prompt", "ia3", "road1", "dora", "adalora", "full", "vera", "bitfit"],
)
def test_every_kind_learns_and_the_base_stays(tmp_path, method):
    host = wearing(method, **{"bitfit": {"new": True}, "adalora": {"target": 3}}.get(method, {}))
    before = {k: v.clone() for k, v in host.model.state_dict().items() if "inlay" not in k}
    fit(host, "a", rows(24), [], settings(tmp_path, steps=25, lr=3e-2, save_every=0), tmp_path, None)
    losses = [m["loss"] for m in lines(tmp_path)]
    assert sum(losses[-5:]) < sum(losses[:5])
    after = {k: v for k, v in host.model.state_dict().items() if "inlay" not in k}
    assert same(before, after)
    assert not host.model.training and host.plan == ((),)


def test_full_fine_tuning_is_plain_training(tmp_path):
    """Method `full` with no decay takes the steps that AdamW takes on the model's own weights."""
    data = rows(8)
    host, plain = wearing("full"), base()
    fit(host, "a", data, [], settings(tmp_path, steps=5, lr=1e-3, clip=0), tmp_path, None)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    from inlay.train.batches import Feed, collate, learned
    from inlay.train.loop import schedule
    from inlay.train.ways import loss_sum

    s = settings(tmp_path, steps=5, lr=1e-3)
    rate, feed = schedule(optimizer, s.optim, 5), Feed(data, 4, s.run.seed, False)
    losses = []
    for step in range(5):
        chosen = feed.step(step)
        loss = loss_sum(plain, collate(chosen, 0, torch.device("cpu"))) / sum(map(learned, chosen))
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [m["loss"] for m in lines(tmp_path)] == pytest.approx(losses, rel=2e-4)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25, 40])
def test_the_schedule_is_transformers(kind, warmup, tmp_path):
    from transformers import get_scheduler

    from inlay.train.loop import schedule

    s = settings(tmp_path, schedule=kind, warmup=warmup).optim
    rates = []
    for make in (
        lambda o: schedule(o, s, 20),
        lambda o: get_scheduler(
            "constant_with_warmup" if kind == "constant" else kind, o, round(20 * warmup) if warmup < 1 else warmup, 20
        ),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        rate = make(optimizer)
        rates.append([])
        for _ in range(25):
            rates[-1].append(rate.get_last_lr()[0])
            optimizer.step()
            rate.step()
    assert rates[0] == rates[1]


def test_training_does_not_import_the_peers():
    """PEFT and what it imports would take 75 MiB of every run."""
    code = (
        "import sys, inlay.train, inlay.train.loop as l, torch; from inlay.train.settings import OptimSettings;"
        "o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1); l.schedule(o, OptimSettings(), 3);"
        "print([m for m in ('peft', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_gradient_checkpointing_changes_nothing(tmp_path):
    made = []
    for on in (False, True):
        host = wearing("series")
        run = tmp_path / str(on)
        fit(host, "a", rows(8), [], settings(run, gradient_checkpointing=on), run, None)
        made.append(copy(host))
        assert not host.model.is_gradient_checkpointing
    assert same(*made)


def test_seed_decides_everything(tmp_path):
    made = {}
    for run, seed in (("x", 1), ("y", 1), ("z", 2)):
        torch.manual_seed(hash(run) % 1000)
        host = wearing(dropout=0.2)
        fit(host, "a", rows(20), [], settings(tmp_path / run, seed=seed), tmp_path / run, None)
        made[run] = copy(host)
    assert same(made["x"], made["y"]) and not same(made["x"], made["z"])


class Spoiler:
    """Makes the adapter ten times as large before every step from the eighth on: worse on any processor."""

    def begin(self, loop, run_dir):
        pass

    def before_step(self, loop):
        if loop.step >= 7:
            for p in loop.host.parameters():
                p.data.mul_(10)

    def after_step(self, loop):
        return {}


def test_best_or_last(tmp_path):
    """A run that gets worse halfway: `best` must not be the end."""
    data, val = rows(8), rows(6, seed=9)
    best, last = wearing(), wearing()
    changes = {"eval_every": 1, "steps": 12, "lr": 1e-2, "keep_last": 1, "save_every": 3, "warmup": 4}
    s = settings(tmp_path / "best", **changes)
    r = fit(best, "a", data, val, s, tmp_path / "best", None, observers=[Spoiler()])
    vals = [m["val_loss"] for m in lines(tmp_path / "best")]
    assert r.final == "best" and r.val_loss == min(vals) and r.best_step == vals.index(min(vals)) + 1 <= 7
    kept = {p.name for p in (tmp_path / "best").glob("checkpoint-*")}
    assert kept == {"checkpoint-12", f"checkpoint-{r.best_step}"}
    fresh = inlay.attach(base())
    inlay.load(fresh, r.adapter)
    assert same(copy(best), copy(fresh))
    s = settings(tmp_path / "last", final="last", **changes)
    r = fit(last, "a", data, val, s, tmp_path / "last", None, observers=[Spoiler()])
    assert r.final == "last" and not same(copy(best), copy(last))
    assert json.loads((r.adapter / "adapter.json").read_text())["about"]["training"]["weights"] == "last"


def test_validation_loss_is_the_mean_over_tokens(tmp_path):
    host, val = wearing(), rows(5, seed=3, prompt=True)
    r = fit(host, "a", rows(8), val, settings(tmp_path), tmp_path, None)
    total = count = 0
    with host.using("a"), torch.no_grad():
        for v in val:
            logits = host.model(torch.tensor([v.input_ids])).logits[0, :-1]
            total += F.cross_entropy(logits, torch.tensor(v.labels[1:]), reduction="sum").item()
            count += sum(x != -100 for x in v.labels[1:])
    assert r.val_loss == pytest.approx(total / count, rel=1e-5)


def test_penalty_and_after_step_are_called(tmp_path):
    host = wearing("adalora", rank=6, target=2, interval=1)
    fit(host, "a", rows(16), [], settings(tmp_path, steps=20, lr=1e-2), tmp_path, None)
    values = torch.stack([w["E"] for w in host.by_place("a").values()])
    assert int((values != 0).sum()) == 2 * len(values)
    assert all(m["penalty"] > 0 for m in lines(tmp_path))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_and_tells_the_last_checkpoint(tmp_path, monkeypatch, where):
    from inlay.train.ways import Packed

    host, real, calls = wearing(), Packed.loss, []

    def sabotage(way, examples):
        calls.append(1)
        out = real(way, examples)
        if len(calls) == 6:  # the trial before the run, then one pack a step: step 5
            kept.update(copy(host))
            return out * float("nan") if where == "loss" else Explode.apply(out)
        return out

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    kept: dict = {}
    monkeypatch.setattr(Packed, "loss", sabotage)
    with pytest.raises(Diverged, match=r"at step 5.*checkpoint-4"):
        fit(host, "a", rows(16), [], settings(tmp_path, steps=10), tmp_path, None)
    assert same(kept, copy(host)), "the step with the bad numbers must not be taken"
    assert "stopped after step 4" in (tmp_path / "log.txt").read_text()
    monkeypatch.setattr(Packed, "loss", real)
    assert fit(wearing(), "a", rows(16), [], settings(tmp_path, steps=10), tmp_path, None, resume=True).steps == 10


def test_ruined_weights_are_not_checkpointed(tmp_path, monkeypatch):
    from inlay.methods.lora import LoRA

    def ruin(self, adapter, step, total, state):
        if step == 4:
            next(iter(adapter.values()))["A"].data.fill_(float("inf"))

    monkeypatch.setattr(LoRA, "after_step", ruin)
    with pytest.raises(Diverged, match=r"no longer finite after step 4.*checkpoint-2"):
        fit(wearing(), "a", rows(16), [], settings(tmp_path), tmp_path, None)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_no_gradient_is_an_error(tmp_path):
    host = wearing()
    head = host.model.lm_head
    head.register_forward_pre_hook(lambda m, args: (args[0].detach().requires_grad_(),))
    with pytest.raises(InlayError, match="no gradient reached 'a'"):
        fit(host, "a", rows(8), [], settings(tmp_path), tmp_path, None)


def test_part_without_gradient_is_told(tmp_path):
    host = wearing(at="q,v")
    attention = host.model.model.layers[0].self_attn.q_proj
    attention.register_forward_hook(lambda m, args, out: out.detach())
    fit(host, "a", rows(8), [], settings(tmp_path), tmp_path, None)
    assert "no gradient reached 2 of 8 tensors in the first step: 0.q/A, 0.q/B" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "bf16"}, "the base is torch.float32"),
        ({"name": "b"}, None),
    ],
)
def test_settings_must_fit_the_host(tmp_path, changes, match):
    s = settings(tmp_path, **changes)
    if match:
        with pytest.raises(InlayError, match=match):
            fit(wearing(), "a", rows(4), [], s, tmp_path, None)
    else:
        with pytest.raises(InlayError, match="unknown adapter 'b'; there is: a"):
            fit(wearing(), "b", rows(4), [], s, tmp_path, None)


def test_fp16_base_learns_as_one_in_fp32_does_until_a_step_overflows(tmp_path):
    for bits in (16, 32):
        host = inlay.attach(base().half() if bits == 16 else base())
        host.add("a", inlay.method("lora").make(rank=2), seed=1)
        fit(host, "a", rows(24), [], settings(tmp_path / str(bits), steps=20, lr=1e-2), tmp_path / str(bits), None)
        assert all(p.dtype == torch.float32 for p in host.parameters("a"))
    half, full = lines(tmp_path / "16"), lines(tmp_path / "32")
    same_so_far = next(i + 1 for i, m in enumerate(half) if "overflow" in m)
    assert same_so_far >= 5
    for a, b in zip(half[:same_so_far], full, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert half[-1]["loss"] < half[0]["loss"] - 0.05


def test_bf16_base(tmp_path):
    host = inlay.attach(base().bfloat16()).add("a", inlay.method("lora").make(rank=2), seed=1)
    fit(host, "a", rows(24), [], settings(tmp_path, dtype="bf16", steps=20, lr=3e-2), tmp_path, None)
    losses = [m["loss"] for m in lines(tmp_path)]
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in host.parameters("a"))


def test_rows_without_a_learned_token(tmp_path):
    from tests.train.tiny import Row

    blank = Row([5, 6, 7], [-100, -100, -100])
    fit(wearing(), "a", [blank, *rows(8)], [], settings(tmp_path), tmp_path, None)
    assert json.loads((tmp_path / "data.json").read_text())["train"]["without_a_token_to_learn"] == 1
    with pytest.raises(InlayError, match="none of the 1 training examples has a token to learn"):
        fit(wearing(), "a", [blank], [], settings(tmp_path / "x"), tmp_path / "x", None)


def test_a_host_with_other_adapters(tmp_path):
    host, alone = wearing(), wearing()
    host.add("other", inlay.method("prefix").make(tokens=3), seed=3)
    other = copy(host, "other")
    fit(host, "a", rows(8), [], settings(tmp_path / "1"), tmp_path / "1", None)
    fit(alone, "a", rows(8), [], settings(tmp_path / "2"), tmp_path / "2", None)
    assert same(copy(host), copy(alone)) and same(other, copy(host, "other"))
    assert all(p.grad is None for p in host.parameters())


def test_run_folder(tmp_path):
    s = settings(tmp_path, eval_every=3, loggers=("tensorboard",))
    fit(wearing(), "a", rows(8), rows(3, 1), s, tmp_path, None, facts={"task": "counting"})
    from inlay.train.settings import TrainSettings, read_recipe

    assert read_recipe(tmp_path / "settings.yaml", TrainSettings) == s
    environment = json.loads((tmp_path / "environment.json").read_text())["sessions"][0]
    assert environment["packages"]["torch"] == version("torch") and environment["threads"] == torch.get_num_threads()
    assert environment["cpu_products"] == processor.product_library() and environment["processor"]
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["task"] == "counting" and data["train"]["examples"] == 8 and data["validation"]["examples"] == 3
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert {p.name for p in (tmp_path / "checkpoint-6").iterdir()} == {
        "adapter.safetensors",
        "state.pt",
        "checkpoint.json",
    }


def test_a_run_that_never_began_claims_no_folder(tmp_path, monkeypatch):
    """What was wrong is put right and asked for again; there is nothing to overwrite."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    data, s = rows(8), settings(tmp_path, lr=0.5, loggers=("wandb",))
    with pytest.raises(InlayError, match="not installed"):
        fit(wearing(), "a", data, [], s, tmp_path, None)
    assert (tmp_path / "settings.yaml").exists()
    assert fit(wearing(), "a", data, [], settings(tmp_path), tmp_path, None).steps == 6
    sessions = json.loads((tmp_path / "environment.json").read_text())["sessions"]
    assert len(sessions) == 1, "what did not begin is no session of this run"


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoint-2", ".checkpoint-2.old", "adapter"])
def test_whatever_a_step_left_is_kept(tmp_path, left):
    fit(wearing(), "a", rows(8), [], settings(tmp_path), tmp_path, None)
    if left.startswith(".checkpoint"):
        (tmp_path / "checkpoint-2").rename(tmp_path / left)
    for path in tmp_path.iterdir():
        if path.name not in ("settings.yaml", left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InlayError, match="holds a run with other settings"):
        fit(wearing(), "a", rows(8), [], settings(tmp_path, lr=0.5), tmp_path, None)
    assert (tmp_path / left).exists()


def test_two_runs_are_not_mixed(tmp_path):
    s, data = settings(tmp_path), rows(8)
    fit(wearing(), "a", data, [], s, tmp_path, None)
    with pytest.raises(InlayError, match="holds a run with these settings: resume"):
        fit(wearing(), "a", data, [], s, tmp_path, None)
    other = replace(s, optim=replace(s.optim, lr=0.5))
    for resume in (False, True):
        with pytest.raises(InlayError, match=r"other settings \(optim.lr: 0.01 before, 0.5 now\)"):
            fit(wearing(), "a", data, [], other, tmp_path, None, resume=resume)
    (tmp_path / "notes.txt").write_text("mine")
    fit(wearing(), "a", data, [], other, tmp_path, None, overwrite=True)
    assert len(lines(tmp_path)) == 6 and (tmp_path / "notes.txt").exists()
    with pytest.raises(InlayError, match="exclude each other"):
        fit(wearing(), "a", data, [], other, tmp_path, None, overwrite=True, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InlayError, match="file is a file|a file has that name"):
        fit(wearing(), "a", data, [], s, tmp_path / "file", None)
    from inlay.train.record import locked

    with locked(tmp_path), pytest.raises(InlayError, match="another process is training"):
        fit(wearing(), "a", data, [], other, tmp_path, None, overwrite=True)
