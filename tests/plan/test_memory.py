"""The memory estimate against what autograd really keeps, on tiny models of many families."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import inlay
from inlay.plan.memory import estimate, per_token, weight_bytes

LLAMA = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "llama-gqa": lambda: hf.LlamaConfig(**LLAMA, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=32),
    "gemma": lambda: hf.GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=32),
    "phi3": lambda: hf.Phi3Config(**LLAMA, pad_token_id=0),
    "gptj": lambda: hf.GPTJConfig(n_embd=128, n_layer=4, n_head=4, rotary_dim=16, vocab_size=64),
    "bloom": lambda: hf.BloomConfig(hidden_size=128, n_layer=4, n_head=4, vocab_size=64),
    "neox": lambda: hf.GPTNeoXConfig(**{**LLAMA, "intermediate_size": 512}),
    "opt": lambda: hf.OPTConfig(
        hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=128, vocab_size=64
    ),
    "gpt2": lambda: hf.GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=64),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=4),
}
METHODS = ("lora", "series", "parallel", "prefix", "ia3")
BATCH, LENGTH = 2, 32


def attached(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    return inlay.attach(hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).train())


def kept(host, name: str) -> int:
    """Bytes of the blocks' tensors that a forward leaves for its backward, parameters apart."""
    own = {t.untyped_storage()._cdata for t in (*host.model.parameters(), *host.model.buffers())}
    found = {}

    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in own:
            found[s._cdata] = s
        return t

    ids = torch.randint(0, 64, (BATCH, LENGTH))
    with host.using(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        host.model.base_model(input_ids=ids, use_cache=False)
    return sum(s.nbytes() for s in found.values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_are_near_what_is_kept(family, dtype):
    host = attached(family, dtype)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for method in METHODS:
        at = (
            {"lora": "q,v", "series": "o", "parallel": "q,v", "ia3": "k,v"}.get(method) if family == "mixtral" else None
        )
        row = inlay.method(method)
        host.add(method, row.make(), at=at or row.places)
        want = kept(host, method)
        got = estimate(host, method, dtype=name, batch=BATCH, length=LENGTH).activations
        assert 0.6 < got / want < 1.6, f"{method}: estimated {got}, kept {want}"


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_checkpointing_keeps_the_inputs_of_blocks(family):
    host = attached(family, torch.float32)
    host.add("lora", inlay.method("lora").make())
    host.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = BATCH * LENGTH * 4 * 4 * 128  # layers x fp32 x width
    assert inputs <= kept(host, "lora") < 2 * inputs
    plain, checkpointed = (per_token(host, "lora", 4, c) for c in (False, True))
    assert 4 * 4 * 128 < checkpointed < plain


def test_nothing_is_kept_below_the_first_adapter():
    host = attached("llama", torch.float32)
    for name, at in (("all", "q"), ("last", "q@3"), ("end", "down@3")):
        host.add(name, inlay.method("lora").make(rank=2), at=at)
    whole, last, end = (per_token(host, n, 4, False) for n in ("all", "last", "end"))
    assert whole == 4 * last > 4 * end > 0


def test_weights_by_dtype():
    host = attached("llama", torch.float32)
    total = sum(p.numel() for p in host.model.parameters())
    linears = sum(
        m.weight.numel() for p, m in host.model.named_modules() if hasattr(m, "in_features") and p != "lm_head"
    )
    host.add("lora", inlay.method("lora").make())
    assert weight_bytes(host, "fp32") == 4 * total
    assert weight_bytes(host, "bf16") == 2 * total
    assert weight_bytes(host, "int8") == 2 * (total - linears) + linears


def test_an_unknown_dtype_names_those_there_are():
    host = attached("llama", torch.float32)
    host.add("lora", inlay.method("lora").make())
    with pytest.raises(inlay.InlayError, match="unknown dtype 'fp8'.*bf16"):
        estimate(host, "lora", dtype="fp8")
