"""RoAd against published numbers and HF PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

import inlay
from inlay.methods.rotate import RoAd
from tests.laws.zoo import GQA, base, batch, excite, logits
from tests.methods.road import VARIANTS, layer, said

LLAMA = {"vocab_size": 32000, "intermediate_size": 11008}
SIZES = {
    "LLaMA-7B": lambda: hf.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    "LLaMA-13B": lambda: hf.LlamaConfig(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, **LLAMA | {"intermediate_size": 13824}
    ),
    "LLaMA3-8B": lambda: hf.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        intermediate_size=14336,
    ),
    "RoBERTa-base": lambda: hf.RobertaConfig(is_decoder=True),
    "RoBERTa-large": lambda: hf.RobertaConfig(
        is_decoder=True, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
COUNTS = [
    ("LLaMA-7B", "linear", 1, 1_359_872, 0.0202),
    ("LLaMA-7B", "linear", 2, 2_719_744, 0.0404),
    ("LLaMA-7B", "linear", 4, 5_439_488, 0.0807),
    ("LLaMA-13B", "linear", 1, 2_129_920, 0.0164),
    ("LLaMA3-8B", "linear", 1, 1_376_256, 0.0171),
    ("RoBERTa-base", "linear", 1, 82_944, None),
    ("RoBERTa-base", "fc1", 1, 36_864, None),
    ("RoBERTa-large", "linear", 1, 221_184, None),
    ("RoBERTa-large", "fc1", 1, 98_304, None),
]


@pytest.mark.parametrize(("size", "at", "variant", "count", "percent"), COUNTS)
def test_R19_published_parameter_counts(size, at, variant, count, percent):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(SIZES[size]())
    total = sum(p.numel() for p in model.parameters())
    host = inlay.attach(model)
    if size.startswith("RoBERTa"):
        at = [
            p
            for p, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and ".layer." in p and (at != "fc1" or "intermediate" in p)
        ]
    host.add("a", RoAd(variant=variant), at=at)
    assert host.count("a") == count
    assert percent is None or round(100 * count / total, 4) == pytest.approx(percent, abs=5e-5)


def test_R20_half_of_road4s_angles_never_move():
    torch.manual_seed(0)
    edit, place = RoAd(variant=4), layer(torch.float32, 16)[2]
    w = {k: torch.nn.Parameter(v) for k, v in edit.weights(place).items()}
    R = torch.randn(16, 16)
    optimizer = torch.optim.AdamW(w.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(300):
        h = torch.randn(32, 16)
        loss = (said(edit, w, h) - h @ R.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    diagonal, off = w["theta"].detach().chunk(2)  # t11, t22 and t12, t21
    assert not diagonal.any() and bool(off.all())
    assert sum(losses[-20:]) < sum(losses[:20])


def test_weight_decay_never_pulls_the_factors_to_zero():
    """A decaying `a` would kill the layer; the training loop decays matrices only."""
    host = inlay.attach(base("llama"))
    for variant in VARIANTS:
        host.add(f"v{variant}", RoAd(variant=variant))
    assert all(p.dim() == 1 for p in host.parameters())


# ---- HF PEFT ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [64, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_R21_pefts_checkpoints(variant, group, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    from inlay.interop import formats

    def llama():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**GQA | {"hidden_size": 128, "intermediate_size": 192})).eval()

    linears = ["q_proj", "o_proj", "up_proj"]
    config = peft.RoadConfig(task_type="CAUSAL_LM", variant=f"road_{variant}", group_size=group, target_modules=linears)
    theirs = peft.get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(**batch()).logits
    host = inlay.attach(llama())
    name = formats.read(host, tmp_path / "theirs")
    torch.testing.assert_close(logits(host, name, **batch()), want, rtol=0, atol=1e-6)
    if group == 2:  # neighbours: the file's tensors as they are
        file = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        theta = file["base_model.model.model.layers.0.self_attn.q_proj.road_theta"]
        mine, edit = host.by_place(name)["0.q"], replace(host.edits[name], pairing="adjacent")
        assert variant == 4 or torch.equal(mine["theta"], theta)
        h = torch.randn(5, 128)
        assert torch.equal(said(edit, mine, h), said(host.edits[name], mine, h))
    # Half of the blocks: PEFT has no such setting, and gets the identity for the others.
    host.add("part", RoAd(variant=variant, blocks="0.5-1", pairing="half", group=32), at="q,o")
    excite(host)
    formats.write(host, "part", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, logits(host, "part", **batch()), rtol=0, atol=1e-6)
    host.add("last", RoAd(positions="last-prompt"), at="q")
    with pytest.raises(inlay.InlayError, match="last-prompt positions only"):
        formats.write(host, "last", tmp_path / "last")


def test_R22_widths_that_cannot_be_paired_name_the_layer():
    config = hf.LlamaConfig(**GQA | {"intermediate_size": 33})
    host = inlay.attach(hf.LlamaForCausalLM(config))
    for settings in ({}, {"pairing": "half", "group": 5}):
        text = r"'0\.up' has an odd number, 33"
        with pytest.raises(inlay.InlayError, match=text):
            host.add("a", RoAd(**settings), at="up")
    with pytest.raises(inlay.InlayError, match=r"groups of 64 do not fit the 32 outputs of '0\.q'"):
        host.add("a", RoAd(pairing="half"), at="q")
    with pytest.raises(inlay.InlayError, match="leave the embedding out"):
        host.add("a", RoAd(), at="embed")
    assert not host.edits and not host.sites
