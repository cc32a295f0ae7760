"""Reading a model's configuration: the language model's own part of it, where vision or audio have parts beside it."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(config: Any) -> Any:
    """The configuration of the language model: sizes and layers are read here, never from a composite's top level."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # no Hugging Face configuration, or one with several text parts
        return getattr(config, "decoder", None) or getattr(config, "text_config", None) or config


def context_length(config: Any) -> int | None:
    """Return the number of positions a language model was made for; None where it sets no limit (ALiBi)."""
    text = text_config(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((v for name in names if isinstance(v := getattr(text, name, None), int)), None)


def tied(model: nn.Module) -> bool:
    """Whether embedding and head are one weight, as the model holds them; else as its configuration says."""
    try:
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        return embed.weight is head.weight
    except (AttributeError, NotImplementedError):
        return bool(getattr(text_config(model.config), "tie_word_embeddings", False))
