"""Loading a base model and its tokenizer: an embedded or a real one by name, a folder, or a Hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from inlay.core.errors import InlayError
from inlay.models import real

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDED = {"tiny-llama": "llama", "tiny-gptj": "gptj", "tiny-bloom": "bloom"}
"""Names of the bases that come with the package."""


def where(name: str | Path) -> str:
    """The folder or Hub id behind a name."""
    if str(name) in EMBEDDED:
        from inlay.models import embedded

        return str(embedded.path(EMBEDDED[str(name)]))
    if str(name) in real.CATALOGUE:
        return str(real.path(str(name)))
    return str(name)


def load_base(name: str | Path, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a name, a folder or a Hub id. Remote code is never run.

    Names are `tiny-llama`, `tiny-gptj`, `tiny-bloom`, which come with Inlay, and those of `inlay.models.real`, whose
    packages must be installed.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; as stored if not given, except that the embedded bases come in fp32.
        device: where to put it; the GPU if there is one.
    """
    from transformers import AutoModelForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise InlayError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    place = known_device(device)
    path = where(name)
    wanted = DTYPES[dtype] if dtype else torch.float32 if str(name) in EMBEDDED else "auto"
    with _told(name):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=wanted, trust_remote_code=False)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InlayError(
            f"the base {str(name)!r} also holds a PEFT adapter (adapter_config.json), and transformers has put it on: "
            "move the adapter into a folder of its own and give both"
        )
    tokenizer = load_tokenizer(name)
    model.config._name_or_path = str(name)
    return model.to(place).eval(), tokenizer


def known_device(name: str | None) -> torch.device:
    """A device that can be used here; the GPU, if there is one, where none is named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:  # the latter: PyTorch built without CUDA
        why = str(e).splitlines()[0].partition(" device type at start")[0]
        raise InlayError(f"cannot compute on device {name!r}: {why}. Leave device out, or say cpu") from e


def load_tokenizer(name: str | Path) -> Any:
    """A base's tokenizer, with a padding token in any case."""
    from transformers import AutoTokenizer

    with _told(name):
        tokenizer = AutoTokenizer.from_pretrained(where(name), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(name: str | Path, folder: Path) -> None:
    """Write a base's tokenizer as it is stored, without the padding token that `load_tokenizer` may add."""
    from transformers import AutoTokenizer

    with _told(name):
        AutoTokenizer.from_pretrained(where(name), trust_remote_code=False).save_pretrained(folder)


@contextlib.contextmanager
def _told(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        if isinstance(e, InlayError):
            raise
        if "trust_remote_code" in str(e):
            raise InlayError(
                f"the base {str(name)!r} brings code of its own, which Inlay never runs; only architectures that "
                "transformers has itself can be loaded"
            ) from e
        raise InlayError(
            f"cannot load the base {str(name)!r}: {str(e).partition(chr(10))[0]} "
            f"Give a folder, a Hub id, or one of {', '.join([*EMBEDDED, *real.CATALOGUE])}."
        ) from e
