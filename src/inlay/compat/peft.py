"""PEFT: how a model that wears its adapters is told from others. (Its files are read by `inlay.interop`, without it.)

Assumptions: such a model has `active_peft_config` and `get_base_model()`, and a configuration with virtual tokens says
`is_prompt_learning`. A model without these counts as plain; packed forwards compare their first batch with the model's
own way in any case.
"""

from __future__ import annotations

from typing import Any

from inlay.compat.versions import check


def is_peft(model: Any) -> bool:
    """Whether a model wears PEFT's adapters.

    Raises:
        VersionError: it does, and that PEFT is too old.
    """
    if getattr(model, "active_peft_config", None) is None:
        return False
    check("peft")
    return True


def has_virtual_tokens(model: Any) -> bool:
    """Whether the active adapter of a PEFT model puts tokens before rows."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def base_model(model: Any) -> Any:
    """The transformers model under PEFT's adapters; a plain model itself."""
    return model.get_base_model() if is_peft(model) else model
