"""Tiny random mixtures of experts, and what they compute as a loop over tokens and experts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
import transformers as hf
from torch import Tensor

COMMON = dict(
    vocab_size=97,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(intermediate_size=24, num_local_experts=4, **COMMON),
    "olmoe": lambda: hf.OlmoeConfig(intermediate_size=24, num_experts=4, num_experts_per_tok=2, **COMMON),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        intermediate_size=24,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **COMMON,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8, **COMMON
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        interleave_moe_layer_step=1,
        **COMMON,
    ),
}
TRANSPOSED = ("gpt_oss", "llama4")
ROUTED = tuple(f for f in CONFIGS if f != "llama4")
"""Families whose experts are called with indices and weights."""


def base(family: str, dtype: torch.dtype = torch.float32, experts: str = "eager"):
    """A random model whose weights are large enough that mistakes show."""
    torch.manual_seed(0)
    kind = hf.Llama4ForCausalLM if family == "llama4" else None
    implementation = {} if family == "llama4" else {"experts_implementation": experts}
    eager = {"attn_implementation": "eager"}
    config = CONFIGS[family]()
    model = (
        kind._from_config(config, **eager) if kind else hf.AutoModelForCausalLM.from_config(config, **implementation)
    )
    model = model.to(dtype).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p)) if p.dim() == 1 else p.data.normal_(std=0.15)
    return model


def batch(rows: int = 3, tokens: int = 7, pad: int = 0) -> dict[str, Tensor]:
    """Random ids; `pad` columns of left padding in every row but the first."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, :pad] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def expert_modules(model) -> dict[int, torch.nn.Module]:
    """Layer -> its experts module."""
    found = [m for _, m in model.named_modules() if "down_proj" in m._parameters and m.down_proj.dim() == 3]
    return dict(enumerate(found))


def plain_matrix(family: str, W: Tensor) -> Tensor:
    """One expert's matrix as (D_out, D_in)."""
    return W.T if family in TRANSPOSED else W


def gated(family: str, module, h: Tensor) -> Tensor:
    """The non-linearity between the two products, by each family's formula."""
    if family == "gpt_oss":
        gate, up = h[::2].clamp(max=module.limit), h[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = h.chunk(2)
    return up * torch.nn.functional.silu(gate)


@contextlib.contextmanager
def as_loops(family: str, model, weights_of) -> Iterator[None]:
    """In this block experts compute token by token and expert by expert.

    Args:
        weights_of: (layer, parameter name, token, expert) -> that expert's matrix (D_out, D_in) for that token.
    """

    def one(layer: int, module, x: Tensor, token: int, expert: int) -> Tensor:
        bias = {
            k: getattr(module, f"{k}_bias")[expert] if family == "gpt_oss" else 0.0
            for k in ("gate_up_proj", "down_proj")
        }
        h = weights_of(layer, "gate_up_proj", token, expert) @ x + bias["gate_up_proj"]
        return weights_of(layer, "down_proj", token, expert) @ gated(family, module, h) + bias["down_proj"]

    def routed(layer: int, module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(
            [
                sum(weight[t, k] * one(layer, module, x[t], t, int(index[t, k])) for k in range(index.shape[1]))
                for t in range(len(x))
            ]
        )

    def sorted_by_expert(layer: int, module, x: Tensor) -> Tensor:
        n = len(x) // 4
        return torch.stack([one(layer, module, x[e * n + t], t, e) for e in range(4) for t in range(n)])

    loop = sorted_by_expert if family == "llama4" else routed
    modules = expert_modules(model)
    for layer, module in modules.items():
        module.forward = functools.partial(loop, layer, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def looped_logits(
    family: str, model, tensors_of_row: list[list[tuple[float, Mapping[str, Tensor]]]], **inputs
) -> Tensor:
    """Logits with W_e + sum s B_e A_e, for rows with these adapters: (s, tensors by Inlay's names) each."""
    tokens = inputs["input_ids"].shape[1]

    def weights_of(layer: int, name: str, token: int, expert: int) -> Tensor:
        W = plain_matrix(family, expert_modules(model)[layer]._parameters[name][expert])
        key = f"{layer}.experts.{name.removesuffix('_proj')}"
        for s, own in tensors_of_row[token // tokens]:
            if f"{key}/A" in own:
                A, B = (own[f"{key}/{k}"] for k in "AB")
                W = W + s * (B if B.dim() == 2 else B[expert]) @ (A if A.dim() == 2 else A[expert])
        return W

    with as_loops(family, model, weights_of):
        return model(**inputs).logits
