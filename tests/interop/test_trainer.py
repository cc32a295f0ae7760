"""Real steps of `transformers.Trainer` and of TRL's SFTTrainer on models that wear adapters, both unchanged."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.interop.trainer import AdapterCallback
from inlay.train import fit
from tests.interop.trainers import arguments, losses, sft, texts, trainer
from tests.train.tiny import base, copy, rows, same, settings, wearing

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")


def untouched(host):
    return {k: v.clone() for k, v in host.model.state_dict().items() if "inlay" not in k}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "series", "prefix"])
def test_trainer_learns_and_the_base_stays(tmp_path, method, checkpointing):
    host = wearing(method).use("a")
    before, start = untouched(host), copy(host)
    t = trainer(host, tmp_path, rows(24), gradient_checkpointing=checkpointing)
    t.train()
    assert sum(losses(t)[-3:]) < sum(losses(t)[:3])
    assert same(before, untouched(host)) and not same(start, copy(host))


@pytest.mark.parametrize("method", ["lora", "series", "prefix"])
def test_checkpointing_under_trainer_gives_the_same_adapter(tmp_path, method):
    made = []
    for on in (False, True):
        host = wearing(method).use("a")
        trainer(host, tmp_path / str(on), rows(24), gradient_checkpointing=on, max_steps=3).train()
        made.append(copy(host))
    assert same(*made)


@pytest.mark.parametrize("method", ["lora", "prefix", "adalora"])
def test_fit_and_trainer_agree(tmp_path, method):
    """The same eight rows in each step, in two micro-batches, under the same schedule: the same adapter."""
    settings_of = {"target": 3} if method == "adalora" else {}
    ours, theirs = wearing(method, **settings_of), wearing(method, **settings_of).use("a")
    data = rows(8, prompt=True)
    s = settings(tmp_path / "fit", batch_size=8, micro_batch=4, steps=3, lr=1e-2, warmup=0, schedule="linear")
    fit(ours, "a", data, [], s, tmp_path / "fit", None)
    t = trainer(theirs, tmp_path / "trainer", data, max_steps=3, learning_rate=1e-2, lr_scheduler_type="linear")
    t.train()
    mine = [json.loads(line) for line in (tmp_path / "fit" / "metrics.jsonl").read_text().splitlines()]
    assert losses(t) == pytest.approx([m["loss"] for m in mine], rel=1e-4)
    norms = [line["grad_norm"] for line in t.state.log_history if "loss" in line]
    assert norms == pytest.approx([m["grad_norm"] for m in mine], rel=1e-3)
    for k, v in ours.tensors("a").items():
        torch.testing.assert_close(v, theirs.tensors("a")[k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_checkpoints_hold_the_adapter_and_resume(tmp_path, method):
    own = {"rank": 6, "target": 2, "interval": 2} if method == "adalora" else {"dropout": 0.1}
    data = rows(24)
    whole, half, fresh = (wearing(method, **own).use("a") for _ in range(3))
    trainer(whole, tmp_path / "whole", data, max_steps=8).train()

    class Stop(AdapterCallback):
        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            control.should_training_stop = True

    t = trainer(half, tmp_path / "half", data, max_steps=8, save_strategy="steps", save_steps=4)
    t.pop_callback(AdapterCallback)
    t.add_callback(Stop(half, "a"))
    t.train()
    read = inlay.attach(base())
    inlay.load(read, tmp_path / "half" / "checkpoint-4" / "adapter")
    assert same(copy(half), copy(read))
    trainer(fresh, tmp_path / "half", data, max_steps=8).train(resume_from_checkpoint=True)
    assert same(copy(whole), copy(fresh))


def test_ranks_are_allocated_under_trainer(tmp_path):
    host = wearing("adalora", rank=6, target=2, interval=1).use("a")
    trainer(host, tmp_path, rows(24), max_steps=16).train()
    values = torch.stack([w["E"] for w in host.by_place("a").values()])
    assert int((values != 0).sum()) == 2 * len(values)


def test_callback_refuses_what_would_not_train(tmp_path):
    host = wearing()
    with pytest.raises(InlayError, match="no row wears 'a'.*host.use"):
        trainer(host, tmp_path, rows(8)).train()
    with pytest.raises(InlayError, match="unknown adapter 'b'"):
        AdapterCallback(host, "b")
    host.use("a")
    host.model.lm_head.register_forward_pre_hook(lambda m, args: (args[0].detach().requires_grad_(),))
    with pytest.raises(InlayError, match="no gradient reached 'a'"):
        trainer(host, tmp_path, rows(8)).train()
    other = wearing("adalora").use("a")
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(InlayError, match="use bf16"):
        AdapterCallback(other, "a").on_train_begin(args, None, None)


# ---- TRL -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "series", "prefix"])
def test_sft_learns_and_the_base_stays(tmp_path, tokenizer, method, checkpointing):
    host = wearing(method).use("a")
    before = untouched(host)
    t = sft(
        host, tmp_path, texts(), tokenizer, gradient_checkpointing=checkpointing, save_strategy="steps", save_steps=12
    )
    t.train()
    assert sum(losses(t)[-3:]) < sum(losses(t)[:3])
    assert same(before, untouched(host))
    read = inlay.attach(base())
    inlay.load(read, tmp_path / "checkpoint-12" / "adapter")
    assert same(copy(host), copy(read))


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_fit_and_sft_agree(tmp_path, tokenizer, method):
    ours, theirs = wearing(method), wearing(method).use("a")
    data = texts(8)
    t = sft(theirs, tmp_path / "sft", data, tokenizer, max_steps=1)
    t.train()
    from tests.train.tiny import Row

    encoded = [Row(list(r["input_ids"]), list(r["labels"])) for r in t.train_dataset]
    assert {-100} < {x for r in encoded for x in r.labels}
    s = settings(tmp_path / "fit", batch_size=8, micro_batch=4, steps=1, lr=3e-2, warmup=0, schedule="constant")
    r = fit(ours, "a", encoded, [], s, tmp_path / "fit", None)
    assert losses(t) == pytest.approx([r.loss], rel=1e-4)


def test_sft_never_calls_the_head(tmp_path, tokenizer):
    host = wearing("full", at="head").use("a")
    with pytest.raises(InlayError, match="TRL multiplies by the head's weight itself"):
        sft(host, tmp_path, texts(8), tokenizer).train()


# ---- a quantised base ------------------------------------------------------------------------------------------------
def test_quantised_base_needs_one_flag(tmp_path):
    """Trainer refuses a quantised model in which it sees no PEFT adapter; the flag is needed while it is built."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    base().save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit)
    host = inlay.attach(model).add("a", inlay.method("lora").make(rank=4), seed=0).use("a")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(host, tmp_path, rows(24))
    model._hf_peft_config_loaded = True
    t = trainer(host, tmp_path, rows(24), save_strategy="steps", save_steps=12)
    model._hf_peft_config_loaded = False
    t.train()
    assert (
        sum(losses(t)[-3:]) < sum(losses(t)[:3]) and (tmp_path / "checkpoint-12" / "adapter" / "adapter.json").exists()
    )
    before = copy(host)
    fit(host, "a", rows(24), [], settings(tmp_path / "fit"), tmp_path / "fit", None)
    assert not same(before, copy(host))
