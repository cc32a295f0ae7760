"""A foreign adapter folder as plain data: its config and tensors, safely read and atomically written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.files import replace_file, write_text
from inlay.core.host import Host

Tensors = dict[str, Tensor]
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """What one folder holds, before a model is touched."""

    folder: Path
    config: Mapping[str, Any]
    places: Mapping[str, Tensors]
    """Module path in the base -> the file's tensors there, by the name after the path."""
    top: Tensors
    """Tensors that belong to no module (`vera_A`, `prompt_embeddings`)."""

    def setting(self, name: str, default: Any = None) -> Any:
        """A config field; null counts as absent."""
        value = self.config.get(name)
        return default if value is None else value

    def error(self, text: str) -> InlayError:
        """An error that names the folder."""
        return InlayError(f"{self.folder}: {text}")


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError as e:
        raise InlayError(f"{folder} has no {CONFIG}; give the folder that holds the adapter itself") from e
    except json.JSONDecodeError as e:
        raise InlayError(f"{folder / CONFIG} is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise InlayError(f"{folder / CONFIG} holds a {type(config).__name__}, wanted an object")
    return config


def read_tensors(folder: Path, *names: str) -> Tensors:
    """Tensors of the first of these files that exists, safetensors or torch pickle. No code of a pickle is ever run."""
    for name in names:
        if (folder / name).exists():
            return _safe(folder / name) if name.endswith(".safetensors") else _pickled(folder / name)
    raise InlayError(f"{folder} has none of {', '.join(names)}")


def _safe(file: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as e:
        raise InlayError(f"{file} is not a readable safetensors file: {e}") from e


def _pickled(file: Path) -> Tensors:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise InlayError(
            f"{file} is a pickle that holds more than tensors. It was not run: loading it could execute code. "
            f"Ask its author for a safetensors file. ({str(e).splitlines()[0]})"
        ) from e
    except Exception as e:  # a broken pickle can raise anything
        raise InlayError(f"{file} is not a readable torch file: {e}") from e
    if not isinstance(held, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise InlayError(f"{file} does not hold a mapping of names to tensors")
    return dict(held)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all, the config last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().to("cpu").contiguous() for k, v in sorted(tensors.items())}
    replace_file(folder / "adapter_model.safetensors", lambda partial: save_file(plain, partial, {"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))
    return folder


Fill = Callable[[Host, str], Mapping[str, Tensor]]


def hang(host: Host, name: str, edit: Any, at: list[str] | str, values: Fill) -> str:
    """Hang an edit and fill it with a file's tensors; if anything is wrong the host is left as it was.

    `values(host, name)` gives every tensor of the adapter by its name in `host.tensors`; constants (`_...`) that it
    leaves out keep what the base gave them.
    """
    host.add(name, edit, at=at, seed=0)
    try:
        given = dict(values(host, name))
        kept = {k: v for k, v in host.tensors(name).items() if k.rpartition("/")[2].startswith("_") and k not in given}
        host.fill(name, {**kept, **given})
    except BaseException:
        host.remove(name)
        raise
    return name


def free_name(host: Host, folder: Path, name: str | None) -> str:
    """The adapter's name: the one asked for, or the folder's."""
    if name:
        return name
    plain = "".join(c if c.isalnum() and c.isascii() or c in "_-" else "_" for c in folder.resolve().name) or "adapter"
    return next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, 1000))) if n not in host.edits)


def paths_of(host: Host, name: str) -> dict[str, str]:
    """Module (or expert parameter) path -> place key, over the places of an adapter that stand on whole ones."""
    return {s.spot.full_path: key for key, s in host.sites.items() if name in s.places and s.spot.part is None}
