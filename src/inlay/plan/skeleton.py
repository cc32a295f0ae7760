"""A model without its weights: built on the meta device from a folder's config, a Hub id or a known shape."""

from __future__ import annotations

import difflib
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.core.errors import InlayError
from inlay.models.shapes import ALIASES, SHAPES, shape


def config_of(name: str) -> Any:
    """The Hugging Face config of a folder, a known shape or alias, an embedded base (`tiny-llama`) or a Hub id."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _read_config(name, folder)
    if folder.is_dir():
        raise InlayError(f"{name} is a folder without config.json; give the folder of a whole model")
    if known := shape(name):
        return AutoConfig.for_model(known.model_type, **known.config)
    if name.startswith("tiny-"):
        embedded = importlib.import_module("inlay.models.embedded")
        return AutoConfig.from_pretrained(embedded.path(name.removeprefix("tiny-")))
    if "/" not in name:
        raise unknown_model(name)
    return _read_config(name, name)


def _read_config(name: str, path: str | Path) -> Any:
    """The config in a folder or of a Hub id. No code of a folder is run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        if "trust_remote_code" in str(e):
            raise InlayError(
                f"{name!r} brings code of its own, which Inlay never runs; only architectures that transformers has "
                "itself can be counted"
            ) from e
        hub = "" if isinstance(path, Path) else " from the Hugging Face Hub"
        offline = " (HF_HUB_OFFLINE is set)" if hub and os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(e).strip().partition("\n")[0]
        raise InlayError(f"cannot read the config of {name!r}{hub}{offline}: {reason}") from e


def unknown_model(name: str) -> InlayError:
    """The error for a model that is neither a folder nor a known shape; it names what is close."""
    near = difflib.get_close_matches(name.lower(), [*SHAPES, *ALIASES], n=3)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return InlayError(
        f"unknown model {name!r}: {guess}Give a folder with config.json, a Hub id such as Qwen/Qwen3-8B, tiny-llama, "
        f"or a known shape: {', '.join(SHAPES)}."
    )


def skeleton(name: str) -> nn.Module:
    """The language model of that name with meta tensors, towers included: every shape, no memory, nothing read but its
    config."""
    config = config_of(name)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    model.tie_weights()
    return model


def _auto_class(config: Any) -> Any:
    """For causal language models, or where a type is none, for images with text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

    if config.model_type not in (*CAUSAL, *IMAGES):
        raise InlayError(
            f"{config.model_type!r} is neither a causal language model nor one of images and text in this transformers"
        )
    return AutoModelForCausalLM if config.model_type in CAUSAL else AutoModelForImageTextToText


def parameters(model: nn.Module) -> int:
    """Numbers in a model, tied weights once."""
    return sum(p.numel() for p in model.parameters())
