"""The converted base is the GGUF file: its weights bit for bit, its tokenizer, its chat template; and it can speak."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
from inlay.models import real
from inlay.models.base import where
from tests.real.conftest import NAME, logits

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source():
    """The GGUF file."""
    if not real.installed(NAME):
        pytest.skip(f"{NAME} is not installed")
    return gguf.GGUFReader(real.source(NAME))


def stored(source, name: str) -> torch.Tensor:
    tensor = next(t for t in source.tensors if t.name == name)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def unrotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps a head's rotary halves interleaved; Hugging Face one after the other."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def test_weights_are_the_dequantised_ones_bit_for_bit(source, loaded):
    model = loaded[0].model
    assert torch.equal(model.embed_tokens.weight, stored(source, "token_embd.weight"))
    assert torch.equal(model.norm.weight, stored(source, "output_norm.weight"))
    for i in (0, 29):
        layer, attention = model.layers[i], model.layers[i].self_attn
        assert torch.equal(layer.mlp.down_proj.weight, stored(source, f"blk.{i}.ffn_down.weight"))
        assert torch.equal(attention.v_proj.weight, stored(source, f"blk.{i}.attn_v.weight"))
        assert torch.equal(attention.q_proj.weight, unrotated(stored(source, f"blk.{i}.attn_q.weight"), 9))
        assert torch.equal(attention.k_proj.weight, unrotated(stored(source, f"blk.{i}.attn_k.weight"), 3))
    assert loaded[0].lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_16_bit_type_holds_them(loaded, dtype):
    """Why the cache is float32."""
    weight = loaded[0].model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight.to(dtype).float(), weight)


def test_config_and_tokenizer_are_those_of_the_file(source, loaded):
    model, tokenizer = loaded
    told = {key: field.contents() for key, field in source.fields.items() if not key.endswith(("merges", "scores"))}
    config = model.config
    assert config.num_attention_heads == told["llama.attention.head_count"] == 9
    assert config.num_key_value_heads == told["llama.attention.head_count_kv"] == 3
    assert config.max_position_embeddings == told["llama.context_length"]
    assert config.rope_parameters["rope_theta"] == told["llama.rope.freq_base"]
    tokens = told["tokenizer.ggml.tokens"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens and len(tokenizer) == len(tokens)
    assert tokenizer.chat_template == told["tokenizer.chat_template"]
    for name in ("bos", "eos", "unk", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        assert getattr(tokenizer, f"{name}_token_id") == told[f"tokenizer.ggml.{key}_token_id"], name
    assert {model.generation_config.eos_token_id} == {tokenizer.eos_token_id} == {2}
    special = [i for i, kind in enumerate(told["tokenizer.ggml.token_type"]) if kind == 3]
    assert sorted(tokenizer.added_tokens_decoder) == special
    assert tokenizer("<|im_start|>user\n")["input_ids"][0] == 1
    text = "Süß 12345\n\n  def f(x):\treturn x  # <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_by_its_chat_template_it_answers(loaded):
    model, tokenizer = loaded
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_its_form_is_in_config_and_adapter(host, tmp_path):
    form = real.CATALOGUE[NAME].form
    assert "dequantised Q4_1" in form and json.loads((real.path(NAME) / "config.json").read_text())["base_form"] == form
    host.add("a", inlay.method("lora").make(rank=1), at="q@29", seed=0)
    inlay.save(host, "a", tmp_path / "a")
    base = json.loads((tmp_path / "a" / "adapter.json").read_text())["base"]
    assert (base["form"], base["name"]) == (form, NAME)


def test_plain_transformers_reads_the_cache(loaded, inputs):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(where(NAME))
    assert torch.equal(logits(plain, inputs), logits(loaded[0], inputs))
