"""PEFT's `target_parameters`, read and written: equal logits with PEFT itself, and what it cannot hold is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import InlayError
from inlay.interop import formats
from inlay.interop import peft as ours
from tests.experts.models import CONFIGS, base, batch

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = list(CONFIGS)
BOTH = ("gate_up_proj", "down_proj")


def theirs(family: str, names=BOTH, modules=(), **settings):
    """A PEFT model whose adapter is off its start."""
    targets = [f"experts.{n}" for n in names]
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 6, **settings}, target_modules=list(modules), target_parameters=targets
    )
    model = peft.get_peft_model(base(family), config).eval()
    torch.manual_seed(1)
    for k, p in model.named_parameters():
        if "lora_" in k:
            p.data.normal_(std=0.2)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def adapted(family: str, at: str = "experts", method: str = "lora", **settings):
    host = inlay.attach(base(family))
    host.add("a", inlay.method(method).make(**{"rank": 2, "alpha": 4.0, **settings}), at=at, seed=0)
    torch.manual_seed(1)
    for p in host.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return host


@pytest.mark.parametrize("names", [BOTH, ("down_proj",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_files_give_their_logits_and_come_back_bit_for_bit(family, names, tmp_path):
    model = theirs(family, names, modules=["q_proj"], use_rslora=True)
    model.save_pretrained(tmp_path / "theirs")
    host = inlay.attach(base(family))
    name = ours.read(host, tmp_path / "theirs")
    with host.using(name):
        torch.testing.assert_close(logits(host.model), logits(model), rtol=0, atol=1e-5)
    assert (logits(host.model) - logits(model)).abs().max() > 1e-2
    written = ours.write(host, name, tmp_path / "ours")
    assert not written.notes
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())
    again = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("at", "method", "settings"),
    [
        ("experts", "lora", {}),
        ("experts.gate_up@1,experts.down@0", "rslora", {}),
        ("q,experts", "pissa", {}),
        ("experts", "lora", {"experts": "shared", "dropout": 0.1}),
        ("experts.down", "lora", {"experts": "shared-A"}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapters_give_peft_our_logits(family, at, method, settings, tmp_path):
    host = adapted(family, at, method, **settings)
    written = formats.write(host, "a", tmp_path)
    assert ("dropout 0.1" in str(written.notes)) == ("dropout" in settings)
    assert ("once for each expert" in str(written.notes)) == ("experts" in settings)
    model = peft.PeftModel.from_pretrained(base(family), tmp_path).eval()
    with host.using("a"):
        want = logits(host.model)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    assert (logits(base(family)) - want).abs().max() > 1e-2


def test_shelved_from_a_peft_folder_is_hung(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    host = inlay.attach(base("mixtral"))
    ours.read(host, tmp_path, "hung")
    formats.shelve(host, tmp_path, "one")
    formats.shelve(host, tmp_path, "two")
    with torch.no_grad():
        want = [logits_of(host, n) for n in ("hung", "one", "two")]
    torch.testing.assert_close(want[1], want[0])
    torch.testing.assert_close(want[2], want[0])


def logits_of(host, name):
    with host.using(name):
        return logits(host.model)


def test_several_ranks_and_scales_are_padded_and_folded(tmp_path):
    pattern = {"model.layers.0.mlp.experts.down_proj": 3}
    model = theirs("qwen3_moe", rank_pattern=pattern, alpha_pattern=pattern)
    model.save_pretrained(tmp_path)
    host = inlay.attach(base("qwen3_moe"))
    ours.read(host, tmp_path, "a")
    assert host.edits["a"].rank == 3
    torch.testing.assert_close(logits_of(host, "a"), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c, t: c.update(target_parameters=["experts.gate_up_proj"]), "has tensors of|does not name"),
        (lambda c, t: c.update(target_parameters=["experts.gate_up_proj", "experts.up"]), "no expert parameter"),
        (lambda c, t: c.update(target_parameters=["mlp.gate.weight"]), "no expert parameter"),
        (lambda c, t: c.update(target_parameters=None), "no module|Mixtral"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "PiSSA on target_parameters"),
        (lambda c, t: c.update(r=3), "have rank 2, but the config says 3"),
        (lambda c, t: t.pop(next(k for k in t if "lora_B" in k)), "wanted"),
        (lambda c, t: [t.pop(k) for k in list(t) if "base_layer" in k], "no tensors for it"),
        (lambda c, t: t.update({k: v[:-1] for k, v in t.items() if "lora_A" in k}), "has tensors of"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(change, why, tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    change(config, tensors)
    file.write_text(json.dumps(config))
    save_file(tensors, weights)
    host = inlay.attach(base("mixtral"))
    with pytest.raises(InlayError, match=why):
        ours.read(host, tmp_path, "a")
    assert not host.edits and not host.sites and torch.equal(logits(host.model), logits(base("mixtral")))


def test_what_peft_cannot_hold_is_refused(tmp_path):
    for method in ("dora", "adalora"):
        with pytest.raises(InlayError, match=f"PEFT has no {method} there"):
            ours.write(adapted("mixtral", method=method), "a", tmp_path / method)
    with pytest.raises(InlayError, match="vLLM serves LoRA at linears only"):
        ours.write(adapted("mixtral", at="q,experts"), "a", tmp_path / "v", format="vllm")
    assert not list(tmp_path.iterdir())
