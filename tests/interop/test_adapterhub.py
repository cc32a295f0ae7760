"""AdapterHub folders, made by AdapterHub (fixtures/make_adapterhub.py): our logits equal those it computed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import InlayError
from inlay.interop import formats
from tests.interop.peers import close

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
READ = [
    (family, name)
    for family, names in {
        "llama": (
            "seq_bn",
            "double_seq_bn",
            "seq_bn_learned",
            "double_seq_bn_channel",
            "seq_bn_sizes",
            "seq_bn_left_out",
            "compacter",
            "prefix_flat",
            "prefix_mlp",
            "lora",
            "ia3",
        ),
        "gptj": ("seq_bn", "double_seq_bn"),
        "gpt2": ("seq_bn", "double_seq_bn"),
    }.items()
    for name in names
]


@cache
def reference() -> dict[str, torch.Tensor]:
    """Bases, ids and logits."""
    return load_file(FIXTURES / "reference.safetensors")


def host_on(family: str):
    """A host on the base that AdapterHub was given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = json.loads((FIXTURES / "sizes.json").read_text())[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager").eval()
    held = {k.removeprefix(f"base/{family}/"): v for k, v in reference().items() if k.startswith(f"base/{family}/")}
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return inlay.attach(model)


@torch.no_grad()
def said(host, name: str | None) -> torch.Tensor:
    """Logits of the reference batch."""
    with host.using(name):
        return host.model(input_ids=reference()["ids"]).logits


@pytest.mark.parametrize(("family", "name"), READ)
def test_read(family, name):
    host = host_on(family)
    assert formats.detect(FIXTURES / family / name) == "adapterhub"
    formats.read(host, FIXTURES / family / name, "a")
    theirs = reference()[f"logits/{family}/{name}"]
    assert (said(host, None) - theirs).abs().max() > 1e-2
    close(said(host, "a"), theirs, name, family, "AdapterHub to Inlay")


@pytest.mark.parametrize(
    ("name", "why"), [("par_bn", "before the sub-layer's norm"), ("seq_bn_inv", "inv_adapter='nice'")]
)
def test_refused(name, why):
    host = host_on("llama")
    with pytest.raises(InlayError, match=why):
        formats.read(host, FIXTURES / "llama" / name, "a")
    assert not host.edits and not host.sites


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("seq_bn", {"mh_adapter": True, "use_gating": True}, "use_gating=True"),
        ("seq_bn", {"ln_after": True}, "ln_after=True"),
        ("seq_bn", {"non_linearity": "gelu_new"}, "unknown non_linearity"),
        ("seq_bn", {"original_ln_after": False}, "drops or doubles"),
        ("seq_bn", {"residual_before_ln": False}, "drops or doubles"),
        ("double_seq_bn", {"original_ln_before": True}, "between attention"),
        ("seq_bn", {"architecture": "reft"}, "unknown AdapterHub architecture"),
        ("prefix_flat", {"leave_out": [1]}, "leave_out"),
        ("prefix_mlp", {"non_linearity": "relu"}, "only tanh"),
        ("lora", {"use_dora": True}, "use_dora"),
        ("lora", {"r": 3}, "have rank 2"),
        ("compacter", {"factorized_phm_rule": True}, "factorized_phm_rule"),
        ("prefix_flat", {"prefix_length": 4}, "need 32"),
    ],
)
def test_settings_refused(name, fields, why, tmp_path):
    shutil.copytree(FIXTURES / "llama" / name, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"config": meta["config"] | fields}))
    host = host_on("llama")
    with pytest.raises(InlayError, match=why):
        formats.read(host, tmp_path / "a", "a")
    assert not host.edits and not host.sites


def test_a_missing_setting_is_named(tmp_path):
    shutil.copytree(FIXTURES / "llama" / "lora", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    meta = json.loads(file.read_text())
    del meta["config"]["alpha"]
    file.write_text(json.dumps(meta))
    with pytest.raises(InlayError, match="lacks 'alpha'"):
        formats.read(host_on("llama"), tmp_path / "a")


def test_other_family():
    with pytest.raises(InlayError, match="made for 'llama' and this model is a 'gptj'"):
        formats.read(host_on("gptj"), FIXTURES / "llama" / "seq_bn")


def test_fixtures_are_small():
    assert sum(f.stat().st_size for f in FIXTURES.rglob("*") if f.is_file()) < 200_000
