"""Real steps of `transformers.Trainer` and of TRL's SFTTrainer on models that wear adapters, both unchanged."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.engine.trainer import PackingCollator, packed_forward
from inlay.interop.trainer import AdapterCallback
from inlay.train import fit
from inlay.train.batches import collate
from tests.engine.graph import nodes
from tests.train.tiny import base, copy, rows, same, settings, wearing

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")


def arguments(out, cls=None, **changes):
    from transformers import TrainingArguments

    values = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "lr_scheduler_type": "constant",
    }
    return (cls or TrainingArguments)(**{**values, **changes})


def pad(features):
    batch = collate(features, 0, torch.device("cpu"))
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def trainer(host, out, data, **changes):
    from transformers import Trainer

    changes = {"remove_unused_columns": False, **changes}
    return Trainer(
        model=host.model,
        args=arguments(out, **changes),
        train_dataset=data,
        data_collator=pad,
        callbacks=[AdapterCallback(host, "a")],
    )


def losses(t):
    return [line["loss"] for line in t.state.log_history if "loss" in line]


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
@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter or digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:?"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sft(host, out, data, tokenizer, callbacks=True, **changes):
    trl = pytest.importorskip("trl")
    args = arguments(out, trl.SFTConfig, **{"max_length": None if changes.get("padding_free") else 32, **changes})
    own = [AdapterCallback(host, "a")] if callbacks else []
    return trl.SFTTrainer(model=host.model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=own)


def texts(n=24):
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"say {i % 7}:", "completion": f" {i % 7}{i % 7}{i % 7}"} for i in range(n)])


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


# ---- the engine under Trainer and TRL --------------------------------------------------------------------------------
def through_head(model):
    """Counts the positions that the head computes logits for; with a hook on it, it computes them again in backward."""
    counted = []
    head = model.get_output_embeddings()

    def count(module, args, out):
        if torch._C._current_graph_task_id() == -1:
            counted.append(out.shape[:-1].numel())

    handle = head.register_forward_hook(count)
    return counted, handle


def trained(model, out, data, packing=None, collator=pad, **changes):
    """(metrics of each step, positions through the head) of a run of Trainer, its forwards packed or not."""
    from transformers import Trainer

    counted, handle = through_head(model)
    t = Trainer(
        model=model,
        args=arguments(out, **{"remove_unused_columns": False, "max_steps": 4, **changes}),
        train_dataset=data,
        data_collator=collator,
    )
    with packed_forward(model) if packing else contextlib.nullcontext():
        t.train()
    handle.remove()
    return [[line["loss"], line["grad_norm"]] for line in t.state.log_history if "loss" in line], sum(counted)


def near(got, want):
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("collator", [pad, PackingCollator()], ids=["padded", "flat"])
@pytest.mark.parametrize(
    ("method", "kind", "changes"),
    [
        ("lora", "llama", {}),
        ("lora", "llama", {"gradient_checkpointing": True}),
        ("series", "gpt2", {}),
        ("prefix", "llama", {}),
    ],
)
def test_packed_trainer_learns_what_trainer_learns(tmp_path, method, kind, changes, collator):
    """Uneven micro-batches, accumulated over two, each learned token counting alike."""
    data, made = rows(22, prompt=True), []
    for packing in (False, True):
        host = wearing(method, kind=kind).use("a")
        drop(host.model)
        run = trained(host.model, tmp_path, data, packing, collator if packing else pad, **changes)
        made.append((*run, copy(host)))
    (want, all_of_them, plain), (got, learned, packed) = made
    near(got, want)
    for k, v in plain.items():
        torch.testing.assert_close(packed[k], v, rtol=1e-3, atol=1e-3)
    assert learned < 0.75 * all_of_them


def drop(model):
    """Without dropout, so that two runs can be compared."""
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0


def test_packed_forward_serves_peft_and_bare_models(tmp_path):
    import peft

    data = rows(22, prompt=True)

    def lora(model):
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        )

    def saved(model):
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        )

    for make in (lora, saved, lambda m: m.requires_grad_(True)):
        runs = []
        for packing in (False, True):
            torch.manual_seed(0)
            model = make(base())
            learns = [n for n, p in model.named_parameters() if p.requires_grad]
            runs.append(trained(model, tmp_path, data, packing, PackingCollator() if packing else pad)[0])
            assert learns == [n for n, p in model.named_parameters() if p.requires_grad]
            assert not hasattr(getattr(model, "get_base_model", lambda: model)(), "_inlay_host")  # noqa: B023
            assert model.config._attn_implementation == "sdpa"
        near(*runs)


def test_what_cannot_be_packed_goes_its_own_way(tmp_path):
    import peft

    prompts = peft.get_peft_model(base(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(InlayError, match="virtual tokens"), packed_forward(prompts):
        pass
    host = wearing("prefix").use("a")
    model = host.model
    batch = pad(rows(3, prompt=True))
    with torch.no_grad():
        want = model.eval()(**batch)
        with packed_forward(host):
            torch.testing.assert_close(model(**batch).logits, want.logits)  # an evaluation keeps its logits
            model.train()
            assert model(**batch).logits is None
            assert float(model(**batch).loss) == pytest.approx(float(want.loss), rel=1e-5)
            with pytest.warns(UserWarning, match="not packed: rows are not padded on the right"):
                model(**{k: v.flip(1) for k, v in batch.items()})
            made = model.eval().generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
        assert torch.equal(
            made, model.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
        )
        assert "forward" not in vars(model)


def test_another_loss_is_never_computed(tmp_path):
    """A decoder that scales its logits: the first batch shows it."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 61,
    }
    model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0, initializer_range=0.5)).train()
    inlay.attach(model).add("a", inlay.method("lora").make(rank=2), at="q", seed=0).use("a")
    batch = rows(4)
    want = model(**pad(batch)).loss
    with packed_forward(model):
        with pytest.warns(UserWarning, match="behind the head"):
            got = model(**pad(batch)).loss
        with pytest.raises(InlayError, match="flattened batch must be packed"):
            model(**PackingCollator()(batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_what_rounding_would_hide_is_refused():
    """In bfloat16 a mild cap of the logits, and ALiBi of Falcon's own, stay within what a trial lets pass."""
    from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
    gemma = {
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.2,
    }
    for config, why in (
        (Gemma2Config(**sizes, **gemma, final_logit_softcapping=8.0), "behind the head"),
        (FalconConfig(**sizes, alibi=True), "ALiBi"),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).train()
        inlay.attach(model).add("a", inlay.method("lora").make(rank=2), at="o", seed=0).use("a")
        batch = pad(rows(4))
        want = model(**batch).loss
        with packed_forward(model), pytest.warns(UserWarning, match=why):
            assert model(**batch).loss.item() == want.item()


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_packed_sft_learns_what_sft_learns(tmp_path, tokenizer, method, padding_free):
    made = []
    for packing in (False, True):
        host = wearing(method).use("a")
        t = sft(host, tmp_path, texts(22), tokenizer, max_steps=4, bf16=False, padding_free=packing and padding_free)
        with packed_forward(host) if packing else contextlib.nullcontext():
            t.train()
        lines = [line for line in t.state.log_history if "loss" in line]
        made.append([[line[k] for k in ("loss", "grad_norm", "entropy", "mean_token_accuracy")] for line in lines])
    near(*made)


@pytest.mark.parametrize("method", ["lora", "road1"])
def test_packed_sft_under_autocast_learns_what_sft_learns(tmp_path, tokenizer, method):
    made = []
    for packing in (False, True):
        host = wearing(method).use("a")
        t = sft(host, tmp_path, texts(22), tokenizer, max_steps=4, bf16=True)
        with packed_forward(host) if packing else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="batches are padded")
            t.train()
        assert not torch.is_autocast_enabled("cpu")
        lines = [line for line in t.state.log_history if "loss" in line]
        made.append([[line[k] for k in ("loss", "grad_norm")] for line in lines])
    for got, want in zip(*made, strict=True):
        assert got == pytest.approx(want, rel=3e-2)


def test_packed_forward_computes_by_the_nodes_of_the_own_loop():
    """Groups of layers, gated MLPs, norms and positions are the engine's; the last MLP sees learned tokens only."""
    host = wearing(at="linear").use("a")
    model, batch = host.model.train(), pad(rows(5, prompt=True))
    learned = int((batch["labels"][:, 1:] != -100).sum())
    seen = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape[:-1]))
    with packed_forward(host):
        loss = model(**batch).loss
    handle.remove()
    assert {"LinearsBackward", "GatedBackward", "RMSNormBackward", "RotaryBackward"} <= set(nodes(loss))
    assert seen[-1].numel() == learned
    assert all("forward" not in vars(m) for m in model.modules())


def test_either_goes_on_from_the_others_checkpoint(tmp_path):
    """Trainer's adapter in `fit`, and the other way round: the next step's loss is the same in both."""
    data = rows(8, prompt=True)
    fitted = wearing().use("a")
    s = settings(tmp_path / "fit", batch_size=8, steps=2, lr=1e-2)
    fit(fitted, "a", data, [], s, tmp_path / "fit", None)
    host = wearing().use("a")
    t = trainer(host, tmp_path / "trainer", data, max_steps=2, save_strategy="steps", save_steps=2)
    with packed_forward(host):
        t.train()
    for folder in (tmp_path / "fit" / "adapter", tmp_path / "trainer" / "checkpoint-2" / "adapter"):
        ours, theirs = inlay.attach(base()), inlay.attach(base())
        for h in (ours, theirs):
            inlay.load(h, folder)
            h.use("a")
        one = settings(tmp_path / "next", batch_size=8, steps=1, lr=1e-2, warmup=0)
        r = fit(ours, "a", data, [], one, tmp_path / "next", None, overwrite=True)
        t = trainer(theirs, tmp_path / "more", data, max_steps=1)
        with packed_forward(theirs):
            t.train()
        assert losses(t) == pytest.approx([r.loss], rel=1e-4)
