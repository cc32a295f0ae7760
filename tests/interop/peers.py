"""Tiny random models, random adapters and the record of differences, for the comparisons with other libraries."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay

DIFFERENCES: dict[tuple[str, str, str], float] = {}
"""(method, family, direction) -> largest logit difference, filled while tests run."""
LIMIT = 1e-5

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 50, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64},
}
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "gptj": ["q_proj", "v_proj", "fc_in", "fc_out"],
    "bloom": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
ROLES = {"llama": "q,k,v,up,down", "gptj": "q,v,up,down", "bloom": "qkv,up,down", "gpt2": "qkv,o,up,down"}


@cache
def _base(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **SIZES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():  # linears of the usual size, and biases that are not zero
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.3) + (1.0 if _is_gain(p, model) else 0.0))
    return model


def _is_gain(p: Tensor, model: nn.Module) -> bool:
    return any(p is m._parameters.get("weight") for m in model.modules() if "Norm" in type(m).__name__)


def base(family: str) -> nn.Module:
    """A fresh copy of the family's tiny model, always the same."""
    return copy.deepcopy(_base(family))


def ids(rows: int = 3, tokens: int = 9) -> Tensor:
    """A batch of random ids."""
    return torch.randint(0, 50, (rows, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What a model says to the batch, virtual tokens cut off."""
    said = model(input_ids=ids()).logits.float()
    return said[:, -ids().shape[1] :]


def host_logits(host: Any, name: str) -> Tensor:
    """What a host says when every row wears one adapter."""
    with host.using(name):
        return logits(host.model)


@torch.no_grad()
def shake(parameters: Any, around: float = 0.0, size: float = 0.2) -> None:
    """Random values far from the start."""
    for p in parameters:
        p.copy_(around + size * torch.randn(p.shape))


def close(ours: Tensor, theirs: Tensor, method: str, family: str, direction: str, limit: float = LIMIT) -> None:
    """Note the difference and hold it to the limit; the adapter must also have said something."""
    off = float((ours - theirs).abs().max())
    DIFFERENCES[method, family, direction] = off
    assert off <= limit, f"{method} on {family} ({direction}): logits differ by {off:.2e}"


def differs(ours: Tensor, family: str) -> None:
    """An adapter that changes nothing proves nothing."""
    assert float((ours - logits(base(family))).abs().max()) > 1e-2


def attach(family: str) -> Any:
    """A host on a fresh copy."""
    return inlay.attach(base(family))


def _peft() -> Any:
    import peft

    return peft


def saved(config, folder: Path, family: str = "llama", around: float = 0.0) -> torch.Tensor:
    """A random PEFT adapter in a folder; returns its logits."""
    torch.manual_seed(4)
    config.task_type = "CAUSAL_LM"
    model = _peft().get_peft_model(base(family), config).eval()
    shake((p for p in model.parameters() if p.requires_grad), around)
    model.save_pretrained(folder)
    return logits(model)


def loaded(folder: Path, family: str = "llama") -> torch.Tensor:
    """What PEFT says with a folder."""
    return logits(_peft().PeftModel.from_pretrained(base(family), folder).eval())


def edit_config(folder: Path, **fields) -> None:
    """Change fields of a config on disk."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def table() -> str:
    """The record as Markdown, a table for each direction."""
    lines = []
    for direction in dict.fromkeys(k[2] for k in DIFFERENCES):
        families = [f for f in SIZES if any(k[1:] == (f, direction) for k in DIFFERENCES)]
        lines += [f"\n## {direction}\n", f"| method | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
        for m in dict.fromkeys(k[0] for k in DIFFERENCES if k[2] == direction):
            cells = [DIFFERENCES.get((m, f, direction)) for f in families]
            lines.append(f"| {m} | {' | '.join('' if c is None else f'{c:.1e}' if c else '0' for c in cells)} |")
    return "\n".join(lines) + "\n"
