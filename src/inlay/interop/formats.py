"""One door for every adapter folder: what it is, read it, write it."""

from __future__ import annotations

import json
from pathlib import Path

from inlay.core import store
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.interop import adapterhub, llm_adapters, peft, peft_shelf
from inlay.interop.peft import Written
from inlay.interop.peft_folder import CONFIG
from inlay.methods import EDITS

FORMATS = ("inlay", "peft", "llm-adapters", "adapterhub")


def detect(folder: str | Path) -> str:
    """`inlay`, `peft`, `llm-adapters` or `adapterhub`, from the files of a folder alone."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InlayError(f"{folder} is not a folder; an adapter is a folder with its config and its tensors")
    if (folder / "adapter.json").exists():
        return "inlay"
    if not (folder / CONFIG).exists():
        below = sorted({p.parent.name for file in ("adapter.json", CONFIG) for p in folder.glob(f"*/{file}")})
        hint = f" Its sub-folders do: {', '.join(below)}." if below else ""
        raise InlayError(
            f"{folder} has neither adapter.json (Inlay) nor {CONFIG} (PEFT, LLM-Adapters, AdapterHub).{hint}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except json.JSONDecodeError as e:
        raise InlayError(f"{folder / CONFIG} is not valid JSON: {e}") from e
    if "peft_type" in config:
        return "llm-adapters" if llm_adapters.is_own(config) else "peft"
    if isinstance(config.get("config"), dict) and "model_type" in config:
        return "adapterhub"
    raise InlayError(f"{folder / CONFIG} is of no known kind; known are: {', '.join(FORMATS)}")


def read(host: Host, folder: str | Path, name: str | None = None) -> str:
    """Hang an adapter from any known folder; its name on the host, by default the folder's."""
    kind = detect(folder)
    if kind == "inlay":
        return store.load(host, folder, EDITS, name)
    return {"peft": peft.read, "llm-adapters": llm_adapters.read, "adapterhub": adapterhub.read}[kind](
        host, folder, name
    )


def shelve(host: Host, folder: str | Path, name: str | None = None) -> str:
    """As `read`, for an adapter that will only be worn (`Host.shelve`)."""
    kind = detect(folder)
    if kind == "inlay":
        return store.shelve(host, folder, EDITS, name)
    if kind == "peft":
        return peft_shelf.shelve(host, Path(folder), name)
    return peft_shelf.by_hanging(host, read(host, folder, name))


def write(host: Host, name: str, folder: str | Path, format: str = "peft", rank: int | None = None) -> Written:
    """Write an adapter as `peft` (the same method) or `vllm` (plain LoRA); see `inlay.interop.peft.write`."""
    return peft.write(host, name, folder, format, rank)
