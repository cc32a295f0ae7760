"""PEFT folders whose tensors mean something else than they seem to: scaled embeddings, BLOOM's old prefix."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.interop import formats
from tests.interop.peers import LIMIT, edit_config, shake
from tests.laws.zoo import GQA, batch, logits
from tests.laws.zoo import base as zoo_base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SCALED = {"gemma": {}, "gemma2": {"query_pre_attn_scalar": 8}, "gemma3_text": {"query_pre_attn_scalar": 8}}
"""Decoders whose embedding multiplies its rows by sqrt(hidden_size)."""


def scaled_base(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, head_dim=8, **GQA, **SCALED[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for p in model.parameters():
        p.data.normal_(std=0.15)
    return model


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", SCALED)
def test_lora_at_a_scaled_embedding_is_peft_s_both_ways(family, use_rslora, tmp_path):
    inputs = batch()
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(scaled_base(family), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        want = theirs(**inputs).logits
    theirs.save_pretrained(tmp_path / "peft")
    host = inlay.attach(scaled_base(family))
    formats.read(host, tmp_path / "peft", "a")
    torch.testing.assert_close(logits(host, "a", **inputs), want, rtol=0, atol=LIMIT)

    formats.write(host, "a", tmp_path / "again", "peft")
    back = peft.PeftModel.from_pretrained(scaled_base(family), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**inputs).logits, want, rtol=0, atol=LIMIT)
    assert (logits(host, None, **inputs) - want).abs().max() > 100 * LIMIT


LAYERS, HEADS, TOKENS = 2, 4, 5


def bloom_prefix_folder(folder, **more):
    """A prefix with the fields that the LLM-Adapters fork writes, and its table (TOKENS, 2 LAYERS width)."""
    table = torch.randn(TOKENS, 2 * LAYERS * 32, generator=torch.Generator().manual_seed(1))
    fields = {
        "base_model_name_or_path": "",
        "encoder_hidden_size": 32,
        "inference_mode": True,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": TOKENS,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": "CAUSAL_LM",
        "token_dim": 32,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields | more))
    torch.save({"prompt_embeddings": table}, folder / "adapter_model.bin")
    return table


def test_bloom_prefix_of_llm_adapters_is_read_in_its_old_layout(tmp_path):
    """The reference is PEFT's own function for BLOOM before transformers' change, on the cache that it then filled."""
    from peft.utils.constants import bloom_model_postprocess_past_key_value as old_layout
    from transformers import DynamicCache

    table, inputs = bloom_prefix_folder(tmp_path / "a"), batch(rows=3)
    blocks = table.expand(3, -1, -1).reshape(3, TOKENS, 2 * LAYERS, HEADS, -1).permute(2, 0, 3, 1, 4)
    cache = DynamicCache()
    for layer, (k, v) in enumerate(old_layout(blocks.split(2))):  # k (B H, D, V), v (B H, V, D)
        cache.update(k.unflatten(0, (3, HEADS)).mT, v.unflatten(0, (3, HEADS)), layer)
    mask = torch.cat([torch.ones(3, TOKENS, dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad():
        want = zoo_base("bloom")(input_ids=inputs["input_ids"], past_key_values=cache, attention_mask=mask).logits
    host = inlay.attach(zoo_base("bloom"))
    assert formats.detect(tmp_path / "a") in ("peft", "llm-adapters")
    formats.read(host, tmp_path / "a", "a")
    torch.testing.assert_close(logits(host, "a", **inputs), want, rtol=0, atol=LIMIT)

    formats.write(host, "a", tmp_path / "b", "peft")  # in today's layout, which PEFT and Inlay read
    formats.read(host, tmp_path / "b", "b")
    assert torch.equal(logits(host, "b", **inputs), logits(host, "a", **inputs))


def test_bloom_prefix_that_may_be_of_either_layout_is_refused(tmp_path):
    bloom_prefix_folder(tmp_path / "a", revision=None, auto_mapping=None)
    host = inlay.attach(zoo_base("bloom"))
    with pytest.raises(InlayError, match="save it again"):
        formats.read(host, tmp_path / "a", "a")
    assert not host.edits
    edit_config(tmp_path / "a", peft_version="0.21.0")
    formats.read(host, tmp_path / "a", "a")
