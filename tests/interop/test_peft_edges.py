"""PEFT folders off the main road: patterns, embeddings, parts of fused projections, and plain LoRA for vLLM."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import InlayError
from inlay.interop import peft as ours
from tests.interop.peers import (
    LINEARS,
    attach,
    base,
    close,
    differs,
    edit_config,
    host_logits,
    loaded,
    logits,
    saved,
    shake,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 6, "up_proj": 2},
    "alpha_pattern": {"^model.layers.0.mlp.down_proj": 3, "v_proj": 32},
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LoRA, patterns", lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS["llama"], **PATTERNS)),
        (
            "rsLoRA, patterns",
            lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=LINEARS["llama"], **PATTERNS),
        ),
        (
            "DoRA, patterns",
            lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=LINEARS["llama"], **PATTERNS),
        ),
        ("LoHa, patterns", lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LINEARS["llama"], **PATTERNS)),
        ("LoKr, patterns", lambda: peft.LoKrConfig(r=2, alpha=8, target_modules=LINEARS["llama"], **PATTERNS)),
    ],
)
def test_patterns(name, config, tmp_path):
    theirs = saved(config(), tmp_path / "theirs")
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    close(host_logits(host, "a"), theirs, name, "llama", "PEFT to Inlay")
    ours.write(host, "a", tmp_path / "ours")
    close(loaded(tmp_path / "ours"), theirs, name, "llama", "Inlay to PEFT")


@pytest.mark.parametrize("tokens", [["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_embedding_and_head(tokens, tmp_path):
    theirs = saved(peft.LoraConfig(r=3, lora_alpha=6, target_modules=tokens), tmp_path / "theirs")
    assert any("base_layer" in k for k in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    name = "LoRA at embedding" + (" and head" if "lm_head" in tokens else "")
    close(host_logits(host, "a"), theirs, name, "llama", "PEFT to Inlay")
    ours.write(host, "a", tmp_path / "ours")
    close(loaded(tmp_path / "ours"), theirs, name, "llama", "Inlay to PEFT")
    other = attach("llama")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1)
    with pytest.raises(InlayError, match="brings its own base weights"):
        ours.read(other, tmp_path / "theirs", "a")


@pytest.mark.parametrize("layers", [[1], 0])
def test_layers_to_transform(layers, tmp_path):
    theirs = saved(peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=layers), tmp_path / "theirs")
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    assert list(host.by_place("a")) == [f"{layers if isinstance(layers, int) else layers[0]}.q"]
    close(host_logits(host, "a"), theirs, "LoRA, one layer", "llama", "PEFT to Inlay")
    ours.write(host, "a", tmp_path / "ours")
    close(loaded(tmp_path / "ours"), theirs, "LoRA, one layer", "llama", "Inlay to PEFT")


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*\.1\..*"},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
)
def test_modules_left_out(fields, tmp_path):
    theirs = saved(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields), tmp_path / "theirs")
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    close(host_logits(host, "a"), theirs, "LoRA, modules left out", "llama", "PEFT to Inlay")
    ours.write(host, "a", tmp_path / "ours")
    close(loaded(tmp_path / "ours"), theirs, "LoRA, modules left out", "llama", "Inlay to PEFT")


@pytest.mark.parametrize("target", ["all-linear", r".*self_attn\.(q|k)_proj"])
def test_target_rules(target, tmp_path):
    theirs = saved(peft.LoraConfig(r=2, target_modules=target), tmp_path / "theirs")
    edit_config(tmp_path / "theirs", target_modules=target)
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    close(
        host_logits(host, "a"),
        theirs,
        "LoRA, " + ("all-linear" if target == "all-linear" else "regex"),
        "llama",
        "PEFT to Inlay",
    )


def test_adalora_after_pruning(tmp_path):
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=2,
        lora_alpha=12,
        total_step=20,
        tinit=2,
        tfinal=6,
        target_modules=["q_proj", "up_proj"],
    )
    model = peft.get_peft_model(base("llama"), config)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randint(0, 50, (2, 8))
    for step in range(20):
        model(input_ids=x, labels=x).loss.backward()
        adam.step()
        model.base_model.update_and_allocate(step)
        adam.zero_grad()
    model.eval().save_pretrained(tmp_path / "theirs")
    ranks = {
        v.shape[0] for k, v in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items() if "lora_A" in k
    }
    assert ranks != {6}
    host = attach("llama")
    ours.read(host, tmp_path / "theirs", "a")
    # What PEFT says of its own file; the live model still masks triplets by zero, which is the same.
    close(host_logits(host, "a"), logits(model), "AdaLoRA, pruned", "llama", "PEFT to Inlay")
    ours.write(host, "a", tmp_path / "ours")
    close(loaded(tmp_path / "ours"), host_logits(host, "a"), "AdaLoRA, pruned", "llama", "Inlay to PEFT")


# ---- parts of fused projections --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ("bloom", "gpt2"))
@pytest.mark.parametrize(
    ("method", "at"), [("lora", "q,v"), ("lora", "v,down"), ("dora", "q,k"), ("pissa", "k"), ("ia3", "k,v,down")]
)
def test_parts_become_one(method, at, family, tmp_path):
    host = attach(family)
    settings = {} if method == "ia3" else {"rank": 3, "alpha": 4.0}
    host.add("a", inlay.method(method).make(**settings), at=at, seed=0)
    torch.manual_seed(9)
    with torch.no_grad():
        for p in host.parameters("a"):
            p.add_(0.2 * torch.randn_like(p))
    ours.write(host, "a", tmp_path)
    differs(host_logits(host, "a"), family)
    close(host_logits(host, "a"), loaded(tmp_path, family), f"{method} at {at} (parts)", family, "Inlay to PEFT")


def test_parts_that_peft_cannot(tmp_path):
    for method in ("adalora", "loha", "lokr", "vera", "road1"):
        host = attach("bloom")
        host.add("a", inlay.method(method).make(), at="q,v")
        with pytest.raises(InlayError, match="parts of the fused"):
            ours.write(host, "a", tmp_path)


# ---- plain LoRA for vLLM ---------------------------------------------------------------------------------------------
VLLM = {
    "lora": {"rank": 3, "alpha": 5.0},
    "rslora": {"rank": 3, "alpha": 5.0},
    "pissa": {"rank": 3},
    "adalora": {"rank": 4},
    "vera": {"rank": 6},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "krona": {},
    "full": {},
}


@pytest.mark.parametrize("method", VLLM)
@pytest.mark.parametrize(("family", "at"), [("llama", "q,v,down"), ("bloom", "q,v,up")])
def test_vllm(method, family, at, tmp_path):
    if method == "full" and family == "bloom":
        pytest.skip("moves biases")
    host = attach(family)
    host.add("a", inlay.method(method).make(**VLLM[method]), at=at, seed=0)
    torch.manual_seed(9)
    with torch.no_grad():
        for p in host.parameters("a"):
            p.add_(0.2 * torch.randn_like(p))
    done = ours.write(host, "a", tmp_path, "vllm")
    assert done.error < 2e-6 and (done.error == 0 or method in ("lokr", "krona", "full"))
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert (
        config["r"] == config["lora_alpha"] == done.rank and config["bias"] == "none" and not config["modules_to_save"]
    )
    assert {k.rsplit(".", 2)[1] for k in tensors} == {"lora_A", "lora_B"} and all(
        k.startswith("base_model.model.") for k in tensors
    )
    assert {t.shape[0 if "lora_A" in k else 1] for k, t in tensors.items()} == {done.rank}
    said = host_logits(host, "a")
    differs(said, family)
    close(said, loaded(tmp_path, family), f"{method} as plain LoRA", family, "Inlay to vLLM folder, read by PEFT")


def test_vllm_cut_reports_its_error(tmp_path):
    host = attach("llama")
    host.add("a", inlay.method("krona").make(), at="q,down", seed=0)
    shake(host.parameters("a"))
    wide, narrow = ours.write(host, "a", tmp_path / "w", "vllm"), ours.write(host, "a", tmp_path / "n", "vllm", rank=4)
    assert narrow.rank == 4 < wide.rank and wide.error < 1e-6 < 0.1 < narrow.error < 1
    tensors = load_file(tmp_path / "n" / "adapter_model.safetensors")
    worst = 0.0
    for key, path in (("0.q", "layers.0.self_attn.q_proj"), ("1.down", "layers.1.mlp.down_proj")):
        w = host.by_place("a")[key]
        delta = torch.kron(w["w1"], w["w2"]) * host.edits["a"].alpha / host.edits["a"].rank
        near = (
            tensors[f"base_model.model.model.{path}.lora_B.weight"]
            @ tensors[f"base_model.model.model.{path}.lora_A.weight"]
        )
        worst = max(worst, float((near - delta).norm() / delta.norm()))
        best = torch.linalg.svdvals(delta)[4:].norm() / delta.norm()  # Eckart-Young
        assert float((near - delta).norm() / delta.norm()) == pytest.approx(float(best), rel=1e-3)
    assert worst <= narrow.error * 1.001


@pytest.mark.parametrize(
    ("method", "at", "why"),
    [
        ("dora", "q", "does not add a matrix"),
        ("ia3", "k", "does not add a matrix"),
        ("series", "down", "does not add a matrix"),
        ("prefix", "k,v", "does not add a matrix"),
        ("lora", "embed", "linears only"),
        ("full", "norm", "a bias, a norm"),
    ],
)
def test_vllm_refuses(method, at, why, tmp_path):
    host = attach("llama")
    host.add("a", inlay.method(method).make(), at=at)
    with pytest.raises(InlayError, match=why):
        ours.write(host, "a", tmp_path, "vllm")


@pytest.mark.parametrize(
    ("method", "at", "why"),
    [
        ("series", "down", "PEFT has no method"),
        ("full", "q", "PEFT has no method"),
        ("bitfit", "norm", ""),
        ("lora", "mlp", "cannot hang LORA"),
    ],
)
def test_peft_write_refuses(method, at, why, tmp_path):
    host = attach("llama")
    try:
        host.add("a", inlay.method(method).make(), at=at)
    except InlayError:
        return
    with pytest.raises(InlayError, match=why):
        ours.write(host, "a", tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
