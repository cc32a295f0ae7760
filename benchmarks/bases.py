"""The models that are compared: LLaMAs of random weights in several sizes, and real ones."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "small": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4),
    "60M": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8),
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "32-layer": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4),
    "60M-blocks": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
}
VOCABULARY = {"60M-blocks": 200, "tiny": 200, "32-layer": 200}
REAL = ("smollm2-135m",)
"""Bases of `inlay.load_base` with weights and a tokenizer of their own."""
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(size: str, dtype: str = "fp32", device: str = "cpu") -> Any:
    """A LLaMA of random weights, vocabulary 32,000, embedding and head apart; or one of `REAL`, which is a LLaMA too.

    On the device "meta", only its shapes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if size in REAL:
        return _real(size, dtype, device)

    torch.manual_seed(0)
    vocabulary = VOCABULARY.get(size, 32000)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, pad_token_id=0, **SIZES[size])
    usual = torch.get_default_dtype()
    torch.set_default_dtype(
        {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )  # 7B in fp32 first: 28 GB for a moment
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)


def _real(name: str, dtype: str, device: str) -> Any:
    from inlay.models import base

    if device != "meta":
        return base.load_base(name, dtype, device)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.where(name)))
