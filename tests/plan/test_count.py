"""Counting: the published integers, and the same count as real tensors and real files."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.plan import plan
from inlay.plan.skeleton import skeleton

PUBLISHED = [
    # LLM-Adapters, LLaMA (7B, 13B)
    ("llama-7b", "lora", None, {"rank": 32}, 56_098_816),
    ("llama-13b", "lora", None, {"rank": 32}, 87_818_240),
    ("llama-7b", "series", None, {"size": 256}, 67_108_864),
    ("llama-13b", "series", None, {"size": 256}, 104_857_600),
    ("llama-7b", "series", "gate:input,up:input,down", {}, 201_326_592),
    ("llama-7b", "series", "gate:input,up:input", {}, 134_217_728),
    ("llama-13b", "series", "gate:input,up:input,down", {}, 314_572_800),
    ("llama-7b", "parallel", "q,k,v", {}, 201_326_592),
    ("llama-13b", "parallel", "q,k,v", {}, 314_572_800),
    ("llama-7b", "parallel", "up,down", {}, 247_463_936),
    ("llama-13b", "parallel", None, {}, 387_973_120),
    ("llama-7b", "prefix", None, {"tokens": 10}, 2_621_440),
    ("llama-7b", "prefix", None, {"tokens": 30}, 7_864_320),
    ("llama-13b", "prefix", None, {"tokens": 10}, 4_096_000),
    # BLOOM-7B: published LoRA uses the fused qkv
    ("bloomz-7b", "lora", "qkv,up,down", {}, 55_050_240),
    ("bloomz-7b", "series", "up:input,down", {}, 125_829_120),
    ("bloomz-7b", "series", "down", {}, 62_914_560),
    ("bloomz-7b", "parallel", "qkv", {}, 125_829_120),
    ("bloomz-7b", "parallel", "up,down", {}, 314_572_800),
    ("bloomz-7b", "prefix", None, {"tokens": 10}, 2_457_600),
    # GPT-J-6B
    ("gpt-j-6b", "lora", "q,k,v,up,down", {}, 58_720_256),
    ("gpt-j-6b", "series", "up:input,down", {}, 117_440_512),
    ("gpt-j-6b", "series", None, {}, 58_720_256),
    ("gpt-j-6b", "parallel", "q,k,v", {}, 176_160_768),
    ("gpt-j-6b", "parallel", "up,down", {}, 293_601_280),
    # grouped-query heads: a prefix is as wide as the keys are
    ("llama-3-8b", "prefix", None, {"tokens": 10}, 10 * 2 * 32 * 1024),
    ("mistral-7b", "lora", "q,v", {"rank": 8}, 32 * 8 * (4096 + 4096 + 4096 + 1024)),
    ("llama-2-7b", "ia3", None, {}, 32 * (4096 + 4096 + 11008)),
]


@pytest.mark.parametrize("model,method,at,settings,trainable", PUBLISHED)
def test_published_integers(model, method, at, settings, trainable):
    assert plan(model, method, at=at, settings=settings).trainable == trainable


def test_percent_is_of_base_and_adapter_together():
    assert round(plan("llama-7b").percent, 3) == 0.826
    assert round(plan("llama-13b").percent, 3) == 0.670
    assert round(plan("llama-7b", "parallel").percent, 2) == 3.54


@pytest.mark.parametrize("method", inlay.METHODS)
def test_meta_counts_what_real_tensors_count(method, tmp_path):
    from tests.laws.zoo import base

    model = base("gpt_neox")
    model.config.save_pretrained(tmp_path / "model")
    found = plan(str(tmp_path / "model"), method, settings=small(method))
    host = inlay.attach(model)
    row = inlay.method(method)
    host.add("x", row.make(**small(method)), at=row.places)
    assert found.trainable == host.count("x")
    assert found.file_bytes == sum(4 * t.numel() for t in host.tensors("x").values())
    assert sum(r["trainable"] for r in found.by_role.values()) == found.trainable
    assert found.total == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in host.parameters())


def small(method: str) -> dict:
    fields = inlay.method(method).edit.__dataclass_fields__
    sizes = {"rank": 4, "size": 8, "tokens": 3, "hidden": 8, "group": 8}
    return {k: v for k, v in sizes.items() if k in fields} | ({"target": 2} if method == "adalora" else {})


def test_a_fused_family_hints_at_the_whole():
    asked = plan("bloom-560m", at="q,k,v")
    assert asked.trainable == 24 * 3 * 32 * (1024 + 1024)
    assert len(asked.hints) == 1 and "`qkv`" in asked.hints[0]
    assert plan("bloom-560m", at="qkv").hints == () == plan("llama-7b").hints


def test_no_weights_are_made():
    assert all(p.device == torch.device("meta") for p in skeleton("llama-65b").parameters())


def test_json_is_plain():
    import json

    data = json.loads(json.dumps(plan("gpt2", "dora").to_dict()))
    assert data["trainable"] == plan("gpt2", "dora").trainable
    assert data["memory"]["total"] == sum(v for k, v in data["memory"].items() if k not in ("total", "estimate"))


@pytest.mark.parametrize(
    "model,more,said",
    [
        ("lama-7b", {}, "did you mean llama-7b"),
        ("llama-7b", {"method": "lorra"}, "unknown method 'lorra'.*dora"),
        ("llama-7b", {"settings": {"size": 4}}, "no setting 'size'.*rank"),
        ("llama-7b", {"at": "c_attn"}, "unknown role or module pattern.*attn, block"),
        ("llama-7b", {"at": "q@40"}, "0-31"),
        ("llama-7b", {"dtype": "fp8"}, "unknown dtype"),
        ("nobody/nothing", {}, "cannot read the config of 'nobody/nothing'"),
    ],
)
def test_mistakes_are_named(model, more, said):
    with pytest.raises(inlay.InlayError, match=said):
        plan(model, **more)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(inlay.InlayError, match="without config.json"):
        plan(str(tmp_path))
