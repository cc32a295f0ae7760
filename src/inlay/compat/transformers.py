"""transformers: arguments of a decoder's forward, attention looked up by name, gradient checkpointing, known sources.

Assumptions, and what happens where one fails:

- Arguments with one entry per token are those of `COLUMNS` (and masks, positions, embeddings). Virtual tokens refuse
  any other argument of that shape (`inlay.core.room`).
- Attention and masks are looked up by name in `AttentionInterface` and `AttentionMaskInterface`, and a config names its
  own in `_attn_implementation_internal`. Packing and slots are compared with the model's own way before they are used,
  so a change there costs speed and is reported.
- A checkpointed block runs `_gradient_checkpointing_func(function, *args)`, from `__call__` (before transformers 5.23)
  or from a wrapper of `forward` (`__wrapped__` is the block's own). Training compares the narrow last block with the
  whole one before it is used, and reports if it is not.
- Functions that are replaced by faster ones have the bodies given here; others are left alone.

KV caches have a module of their own: `inlay.compat.kv_cache`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

COLUMNS = {"input_ids": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0}
"""Arguments (B, T) with a value per token -> the value that a virtual token gets."""
WITH_COLUMNS = (*COLUMNS, "attention_mask", "position_ids", "inputs_embeds")
"""All arguments with an entry per token that Inlay widens for virtual tokens."""

ROTARY, HALF = "apply_rotary_pos_emb", "rotate_half"
ROTARY_BODIES = {
    ROTARY: """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed, k_embed
""",
    HALF: """
x1 = x[..., : x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2 :]
return torch.cat((-x2, x1), dim=-1)
""",
}
"""Functions of a decoder's module that compute its rotary positions, as they are served."""
RMS_NORM_BODY = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
"""The `forward` of RMS norms that are served."""
UNSERVED_ATTENTION = ("s_aux", "position_bias")
"""Arguments of attention functions that change the mathematics and that Inlay's own do not take."""


# ---- arguments -------------------------------------------------------------------------------------------------------
def per_token(arguments: Mapping[str, Any], batch: int, tokens: int) -> str | None:
    """The first argument that has an entry per token and is none of `WITH_COLUMNS`.

    Pictures (floating point, four dimensions or more) may have that shape by chance and do not count.
    """
    for name, value in arguments.items():
        shape = getattr(value, "shape", ())
        picture = len(shape) >= 4 and value.is_floating_point()
        if name not in WITH_COLUMNS and tuple(shape[:2]) == (batch, tokens) and not picture:
            return name
    return None


def places_media(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a model would itself find the positions of pictures or films among the given tokens (M-RoPE)."""
    media = any(k.startswith(("pixel_values", "image_", "video_")) and v is not None for k, v in arguments.items())
    inner = (model, getattr(model, "model", None), getattr(model, "base_model", None))
    return media and any(hasattr(m, "get_rope_index") for m in inner)


# ---- attention -------------------------------------------------------------------------------------------------------
def unserved(arguments: Mapping[str, Any]) -> str | None:
    """The first argument given to an attention function that Inlay's own do not take."""
    return next((n for n in UNSERVED_ATTENTION if arguments.get(n) is not None), None)


def has_attention_interface(model: Any) -> bool:
    """Whether a decoder's attention is looked up by name, so that another one can take its place."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def attention_name(config: Any) -> str | None:
    """The name of the attention that a config asks for."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: Any, name: str | None) -> None:
    """Set the attention of a config and its text part, past the checks that ask for built-in names."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._attn_implementation_internal = name


def register_attention(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Let configs ask for an attention function and its mask function by this name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def unregister_attention(name: str) -> None:
    """Undo `register_attention`. Where the registry's mapping is not found, the name stays and is never asked for."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for registry in (AttentionInterface, AttentionMaskInterface):
        getattr(registry, "_global_mapping", {}).pop(name, None)


# ---- gradient checkpointing ------------------------------------------------------------------------------------------
def can_checkpoint(module: Any) -> bool:
    """Whether a module has a switch for gradient checkpointing."""
    return hasattr(module, "gradient_checkpointing")


def checkpoint_function(module: Any) -> Callable[..., Any] | None:
    """The function by which a module checkpoints, `checkpoint(function, *args)`; None where it has none (yet)."""
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpoint_function(module: Any, function: Callable[..., Any]) -> None:
    """Let a module checkpoint by this function."""
    module._gradient_checkpointing_func = function


def checkpoints(module: Any) -> bool:
    """Whether a module would checkpoint if it ran now."""
    return bool(getattr(module, "gradient_checkpointing", False) and module.training)


def own_forward(block: Any) -> Callable[..., Any]:
    """A block's `forward(block, ...)` without the checkpointing that transformers puts around it.

    From transformers 5.23 on that is a wrapper of `forward` (the block's own forward is within); before, `__call__`
    does it and `forward` is the block's own, with or without decorators of other kinds.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    forward = type(block).forward
    wraps = "__init_subclass__" in vars(GradientCheckpointingLayer)
    return forward.__wrapped__ if wraps and isinstance(block, GradientCheckpointingLayer) else forward
