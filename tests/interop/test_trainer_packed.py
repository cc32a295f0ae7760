"""The engine under `transformers.Trainer` and TRL: packed runs learn what the plain ones learn."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.engine.trainer import PackingCollator, packed_forward
from inlay.train import fit
from inlay.train.ways import Packed
from tests.engine.graph import nodes
from tests.interop.trainers import arguments, losses, pad, sft, texts, trainer
from tests.train.tiny import Row, base, copy, rows, settings, wearing

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")


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


def drop(model):
    """Without dropout, so that two runs can be compared."""
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0


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


@pytest.mark.parametrize(("method", "kind"), [("lora", "llama"), ("series", "gpt2")])
def test_packed_trainer_under_autocast_learns_what_trainer_learns(tmp_path, method, kind):
    """Rounded to bfloat16 in other places, the gradients of the first step agree, and the losses of all."""
    data, made = rows(22, prompt=True), []
    for packing in (False, True):
        host = wearing(method, kind=kind).use("a")
        drop(host.model)
        collator = PackingCollator() if packing else pad
        made.append(trained(host.model, tmp_path, data, packing, collator, bf16=True)[0])
    want, got = made
    assert got[0][1] == pytest.approx(want[0][1], rel=5e-3)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], rel=2e-3)


@pytest.mark.parametrize("method", ["lora", "dora", "road1", "ia3", "series", "prefix"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_packs_without_learned_tokens_have_a_loss_of_zero(library, method, tokens):
    """In the engine's own loop, too; one token a row is the least there is."""
    host, data = wearing(method), [Row([5, 6, 7, 8][:tokens], [-100] * tokens)] * 2
    way = Packed(host, 0, 64)
    with host.using("a"), way.active():
        for part in way.split(data):
            loss = way.loss(part)
            loss.backward()
            assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in host.parameters())


def test_a_first_batch_without_learned_tokens_decides_nothing(library):
    model, batch = wearing().use("a").model.train(), rows(3, prompt=True)
    unlearned = [Row(r.input_ids, [-100] * len(r.labels)) for r in batch]
    with packed_forward(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = model(**PackingCollator()(unlearned)).loss
        nothing.backward()
        assert nothing.item() == 0
        assert "LinearsBackward" in nodes(model(**PackingCollator()(batch)).loss)


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
    """To bfloat16's rounding: the gradient of the first step, and all losses. Later gradients follow Adam's steps,
    which turn the sign of a gradient near zero into a whole step."""
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
    want, got = made
    eps = torch.finfo(torch.bfloat16).eps
    assert got[0][1] == pytest.approx(want[0][1], rel=eps)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], rel=eps)


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


def test_a_model_of_a_derived_class_has_the_same_nodes():
    """As FSDP2 derives one, in a module of its own."""
    model = wearing(at="linear").use("a").model.train()
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    with packed_forward(model):
        assert {"LinearsBackward", "RotaryBackward"} <= set(nodes(model(**pad(rows(3))).loss))


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
