"""Tiny random models of every supported family, and every method in a small size."""

from __future__ import annotations

import functools

import torch
import transformers as hf

import inlay

COMMON = dict(vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GQA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **COMMON
)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **COMMON)
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "mistral": lambda: hf.MistralConfig(**GQA),
    "qwen2": lambda: hf.Qwen2Config(**GQA),
    "qwen3": lambda: hf.Qwen3Config(head_dim=8, **GQA),
    "gemma": lambda: hf.GemmaConfig(head_dim=8, **GQA),
    "phi3": lambda: hf.Phi3Config(max_position_embeddings=128, original_max_position_embeddings=128, **GQA),
    "gptj": lambda: hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, **COMMON),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **COMMON,
    ),
    "opt": lambda: hf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        **COMMON,
    ),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **COMMON),
    "falcon": lambda: hf.FalconConfig(num_kv_heads=2, new_decoder_architecture=True, **FALCON),
    "falcon-mq": lambda: hf.FalconConfig(multi_query=True, new_decoder_architecture=False, **FALCON),
    "falcon-rw": lambda: hf.FalconConfig(
        multi_query=False, new_decoder_architecture=False, alibi=True, bias=True, **FALCON
    ),
    "mixtral": lambda: hf.MixtralConfig(num_local_experts=4, **GQA),
    "olmoe": lambda: hf.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **GQA),
    "inferred (stablelm)": lambda: hf.StableLmConfig(**GQA),
}
FAMILIES = list(CONFIGS)
MOE = ("mixtral", "olmoe")
AT_EXPERTS = "-at-experts"
"""Ends the names under which methods hang on expert parameters."""
LOW_RANK = ("lora", "rslora", "pissa", "dora", "adalora")

SMALL = {"rank": 4, "size": 8, "tokens": 3, "hidden": 8, "group": 8}


def base(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model whose weights are large enough that mistakes show."""
    torch.manual_seed(seed)
    moe = {"experts_implementation": "eager"} if family in MOE else {}  # the grouped kernel knows no float64
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), **moe).to(dtype).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p)) if p.dim() == 1 else p.data.normal_(std=0.15)
    return model


def method(name: str) -> inlay.Method:
    """The row of a method, wherever it hangs."""
    return inlay.method(name.removesuffix(AT_EXPERTS))


def small(name: str, **settings):
    """A method in a small size."""
    row = method(name)
    known = row.edit.__dataclass_fields__
    if row.edit.kind == "adalora":
        settings = {"target": 2, **settings}
    return row.make(**{k: v for k, v in SMALL.items() if k in known} | settings)


def places(name: str, family: str) -> str:
    """Where a method hangs in the tests: its default, or attention where a mixture of experts has no such linear."""
    if name.endswith(AT_EXPERTS):
        return "experts"
    at = inlay.method(name).places
    if family in MOE:
        at = {"q,k,v,up,down": "q,k,v,o", "down": "o", "up,down": "q,o", "o,down": "o", "k,v,down": "k,v"}.get(at, at)
    if family == "opt" and at == "mlp":
        at = "attn"
    return at


def methods(family: str) -> list[str]:
    """The methods that this family can wear."""
    biased = any(n.endswith("bias") for n, _ in base(family).named_parameters())
    some = [n for n in inlay.METHODS if biased or n != "bitfit"]
    return some + [f"{n}{AT_EXPERTS}" for n in LOW_RANK if family in MOE]


def excite(host, scale: float = 0.1, seed: int = 1) -> None:
    """Move every trained tensor off its start."""
    torch.manual_seed(seed)
    for p in host.parameters():
        p.data.add_(scale * torch.randn_like(p))


@functools.lru_cache(maxsize=4)
def dressed(family: str, dtype: torch.dtype = torch.float32):
    """A host that wears every method, excited."""
    host = inlay.attach(base(family, dtype))
    for name in methods(family):
        host.add(name, small(name), at=places(name, family), seed=0)
    excite(host)
    return host


def batch(rows: int = 3, tokens: int = 7, pad: int = 0, seed: int = 3) -> dict:
    """Random ids; `pad` columns of left padding in every row but the first."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, tokens), generator=g)
    mask = torch.ones_like(ids)
    mask[1:, :pad] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def positioned(family: str, inputs: dict) -> dict:
    """With positions from the mask, as `generate` gives them, where the decoder takes any."""
    if family in ("bloom", "falcon-rw"):
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def logits(host, *plan, **inputs):
    with torch.no_grad(), host.using(*plan):
        return host.model(**inputs).logits
