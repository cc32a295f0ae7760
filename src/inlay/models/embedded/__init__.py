"""Three tiny base models that come inside the package, pretrained by this project on its synthetic world."""

from __future__ import annotations

from pathlib import Path

from inlay.core.errors import InlayError

NAMES: tuple[str, ...] = ("llama", "gptj", "bloom")
"""Folder names of the embedded bases; each loads with `AutoModelForCausalLM.from_pretrained(path(name))`."""


def path(name: str) -> Path:
    """Folder of one embedded base (config, weights, tokenizer, training report).

    Raises:
        InlayError: unknown name, or the weights were not installed.
    """
    if name not in NAMES:
        raise InlayError(f"no embedded base {name!r}; there are {', '.join(NAMES)}")
    folder = Path(__file__).resolve().parent / name
    if not (folder / "model.safetensors").is_file():
        raise InlayError(
            f"the embedded base {name!r} has no weights in {folder}; reinstall inlay, "
            f"or train it with: python scripts/pretrain_bases.py {name}"
        )
    return folder
