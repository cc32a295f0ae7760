"""Where everything is in each decoder: one entry a family. A new architecture is one entry here, or none at all if
`infer.py` can read it off the modules.

A path is relative to its block; `path#part` is a part of a fused projection, cut as the family's layout says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inlay.core.place import Part

Parts = Mapping[str, Part]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One decoder family: where its blocks, embedding and head are, and the roles inside a block."""

    blocks: str
    embed: str
    head: str = "lm_head"
    roles: Mapping[str, str]
    parts: Callable[[Any], Parts] = field(default=lambda config: {})


def _heads(config) -> tuple[int, int]:
    """(query heads, key/value heads)."""
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def interleaved(config) -> Parts:
    """Per head (q, k, v): BLOOM, GPT-NeoX."""
    n, _ = _heads(config)
    return {role: Part(n, 3, i, i + 1) for i, role in enumerate("qkv")}


def blocked(config) -> Parts:
    """All of q, then all of k, then all of v; with fewer key/value heads, those blocks are narrower: GPT-2, Phi-3."""
    n, kv = _heads(config)
    slots = n + 2 * kv
    return {
        "q": Part(1, slots, 0, n),
        "k": Part(1, slots, n, n + kv),
        "v": Part(1, slots, n + kv, slots),
        "gate": Part(1, 2, 0, 1),
        "up": Part(1, 2, 1, 2),
    }


def falcon(config) -> Parts:
    """Three layouts in one family: grouped (new decoder), one shared key/value head (7B), per head (RW)."""
    n = config.num_attention_heads
    if config.new_decoder_architecture:
        kv = config.num_kv_heads
        q = n // kv
        return {"q": Part(kv, q + 2, 0, q), "k": Part(kv, q + 2, q, q + 1), "v": Part(kv, q + 2, q + 1, q + 2)}
    if config.multi_query:
        return {"q": Part(1, n + 2, 0, n), "k": Part(1, n + 2, n, n + 1), "v": Part(1, n + 2, n + 1, n + 2)}
    return interleaved(config)


LLAMA = Family(
    blocks="model.layers",
    embed="model.embed_tokens",
    roles={
        "attn": "self_attn",
        "mlp": "mlp",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)
MOE = (
    Family(  # the experts are 3-D parameters, which `inlay.models.experts` finds; adapters also hang around their block
        blocks="model.layers",
        embed="model.embed_tokens",
        roles={k: v for k, v in LLAMA.roles.items() if k not in ("gate", "up", "down")},
    )
)
PHI3 = Family(
    blocks="model.layers",
    embed="model.embed_tokens",
    parts=blocked,
    roles={
        "attn": "self_attn",
        "mlp": "mlp",
        "qkv": "self_attn.qkv_proj",
        **{r: f"self_attn.qkv_proj#{r}" for r in "qkv"},
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "gate": "mlp.gate_up_proj#gate",
        "up": "mlp.gate_up_proj#up",
        "down": "mlp.down_proj",
    },
)
GPTJ = Family(
    blocks="transformer.h",
    embed="transformer.wte",
    roles={
        "attn": "attn",
        "mlp": "mlp",
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.out_proj",
        "up": "mlp.fc_in",
        "down": "mlp.fc_out",
    },
)
BLOOM = Family(
    blocks="transformer.h",
    embed="transformer.word_embeddings",
    parts=interleaved,
    roles={
        "attn": "self_attention",
        "mlp": "mlp",
        "qkv": "self_attention.query_key_value",
        **{r: f"self_attention.query_key_value#{r}" for r in "qkv"},
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
)
FALCON = Family(blocks="transformer.h", embed="transformer.word_embeddings", parts=falcon, roles=BLOOM.roles)
NEOX = Family(
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    parts=interleaved,
    roles={
        "attn": "attention",
        "mlp": "mlp",
        "qkv": "attention.query_key_value",
        **{r: f"attention.query_key_value#{r}" for r in "qkv"},
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
)
OPT = Family(
    blocks="model.decoder.layers",
    embed="model.decoder.embed_tokens",
    roles={
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
)
GPT2 = Family(
    blocks="transformer.h",
    embed="transformer.wte",
    parts=blocked,
    roles={
        "attn": "attn",
        "mlp": "mlp",
        "qkv": "attn.c_attn",
        **{r: f"attn.c_attn#{r}" for r in "qkv"},
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "smollm3": LLAMA,
    "olmo2": LLAMA,
    "phi3": PHI3,
    "gptj": GPTJ,
    "bloom": BLOOM,
    "falcon": FALCON,
    "gpt_neox": NEOX,
    "opt": OPT,
    "gpt2": GPT2,
    "mixtral": MOE,
    "olmoe": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
}
"""`config.model_type` -> family."""
