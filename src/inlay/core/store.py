"""Inlay's own format: one readable JSON, and the tensors in safetensors. Strict both ways, atomic, never a pickle.

    adapter.json                    method, settings, places, base and its fingerprint, template, versions, digests
    adapter-<hash>.safetensors      the tensors, `3.q/A` for place 3.q; the JSON names the file

Replacing the JSON is the one moment at which a save takes effect: a kill or a full disk at any time leaves the old
adapter or the new one, never half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from inlay.core.edit import Edit
from inlay.core.errors import InlayError, unknown
from inlay.core.files import locked, make_folder, replace_file, sha256, write_text
from inlay.core.fingerprint import differences, fingerprint
from inlay.core.held import Held, read_bytes
from inlay.core.host import Host
from inlay.core.shelf import not_finite

FORMAT, VERSION = "inlay-adapter", 1
RETRIES = 20
"""How often a reader begins again while others save into the folder."""
MEANING = ("format", "version", "method", "settings", "places", "tensors")
"""What the JSON's own digest covers; the rest may be edited by hand."""


def describe(edit: Edit) -> dict[str, Any]:
    """An edit as JSON values: its kind and all its settings, edits among them likewise."""

    def value(v: Any) -> Any:
        return describe(v) if isinstance(v, Edit) else [value(i) for i in v] if isinstance(v, tuple) else v

    return {"method": edit.kind, "settings": {f.name: value(getattr(edit, f.name)) for f in fields(edit)}}


def rebuild(about: Mapping[str, Any], edits: Mapping[str, type[Edit]]) -> Edit:
    """The edit that `describe` described."""
    if about["method"] not in edits:
        raise unknown("method", about["method"], edits, "A newer Inlay may know it.")
    kind = edits[about["method"]]
    strange = set(about["settings"]) - {f.name for f in fields(kind)}
    if strange:
        raise InlayError(
            f"method {kind.kind!r} has no settings {sorted(strange)}; a newer Inlay may have written this file"
        )

    def value(v: Any) -> Any:
        return rebuild(v, edits) if isinstance(v, dict) else tuple(map(value, v)) if isinstance(v, list) else v

    return kind(**{k: value(v) for k, v in about["settings"].items()})


def save(
    host: Host,
    name: str,
    folder: str | Path,
    about: Mapping[str, Any] | None = None,
    versions: Mapping | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter; an adapter already in the folder is replaced, and stays whole if anything fails.

    Args:
        about: anything to keep with it (training run, notes); JSON values.
        versions: of the software that made it.
        tensors: the adapter's, where the host holds parts of them only.
        base: the base's fingerprint, likewise.
        template: the template of the prompts that it was trained on (`inlay.tasks.template_json`); by default the one
            that the host keeps for it.
    """
    folder = Path(folder)
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in (tensors or host.tensors(name)).items()}
    if bad := not_finite(tensors):
        raise InlayError(f"{name!r} is not saved: {bad} holds values that are not finite; train again at a lower rate")
    rest = {
        "template": template or host.templates.get(name),
        "about": dict(about or {}),
        "versions": {"torch": torch.__version__, **(versions or {})},
    }
    make_folder(folder)
    with locked(folder):
        return _save(host, name, folder, tensors, base or fingerprint(host), rest)


def _save(
    host: Host,
    name: str,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    base: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Path:
    """`save` while nobody else writes into the folder; `rest` is what the JSON says besides."""
    file = folder / f"adapter-{content_digest(tensors)[:12]}.safetensors"
    replace_file(file, lambda partial: save_file(dict(tensors), partial))
    record = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        **describe(host.edits[name]),
        "places": host.placement(name),
        "tensors": {"file": file.name, "sha256": sha256(file), "parameters": host.count(name)},
        "base": {
            "name": getattr(host.model.config, "_name_or_path", "") or None,
            "family": host.anatomy.family,
            **base,
        },
        **rest,
    }
    record["digest"] = _digest(record)
    text = json.dumps(record, indent=1) + "\n"
    write_text(folder / "adapter.json", text)
    for old in folder.glob("adapter-*.safetensors"):
        if old != file:
            old.unlink()
    return folder


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values, whatever their order or device."""
    content = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        content.update(key.encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({k: record[k] for k in MEANING}, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: str | Path) -> tuple[dict[str, Any], Held]:
    """(the JSON, the tensors) of an adapter folder, both checked against their digests.

    A save into the same folder may replace the tensors between the two reads: then the new adapter is read.
    """
    folder = Path(folder)
    for _ in range(RETRIES):
        before = _stamp(folder)
        try:
            return _read(folder)
        except InlayError:
            if _stamp(folder) == before:
                raise
    return _read(folder)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What changes when adapter.json is replaced."""
    try:
        about = (folder / "adapter.json").stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _read(folder: Path) -> tuple[dict[str, Any], Held]:
    file = folder / "adapter.json"
    if not file.is_file():
        raise InlayError(
            f"{folder} holds no adapter.json; an Inlay adapter is a folder with adapter.json and a .safetensors file"
        )
    try:
        record = json.loads(file.read_text())
        if record["format"] != FORMAT:
            raise InlayError(f"{file} is of format {record['format']!r}, not {FORMAT!r}")
        if record["version"] > VERSION:
            raise InlayError(
                f"{file} is of format version {record['version']}; this Inlay reads up to {VERSION}: update it"
            )
        if record["digest"] != _digest(record):
            raise InlayError(f"{file} is damaged or was edited: its digest does not match. Restore it from a copy")
        path = folder / record["tensors"]["file"]
        expected = record["tensors"]["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise InlayError(f"{file} is damaged: {e!r}. Restore it from a copy") from e
    if path.parent != folder or not path.is_file():
        raise InlayError(
            f"{file} names the tensors {record['tensors']['file']!r}, which are not beside it; restore them from a copy"
        )
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != expected:
        raise InlayError(f"{path} is damaged: its SHA-256 is not the one in adapter.json. Restore it from a copy")
    try:
        return record, Held.of(content)
    except SafetensorError as e:
        raise InlayError(f"{path} cannot be read: {e}") from e


def load(
    host: Host,
    folder: str | Path,
    edits: Mapping[str, type[Edit]],
    name: str | None = None,
    allow_other_base: bool = False,
) -> str:
    """Hang a saved adapter on a host and return its name. On any error the model is left unchanged.

    Args:
        name: what to call it; the name it was saved under by default.
        allow_other_base: take an adapter whose base has other weights (not another shape) than this one.
    """
    record, tensors = _for(host, folder, allow_other_base)
    name = name or record["name"]
    host.add(name, rebuild(record, edits), at=record["places"])
    try:
        host.fill(name, tensors)
    except BaseException:
        host.remove(name)
        raise
    _keep_template(host, name, record)
    return name


def shelve(
    host: Host,
    folder: str | Path,
    edits: Mapping[str, type[Edit]],
    name: str | None = None,
    allow_other_base: bool = False,
) -> str:
    """As `load`, for an adapter that will only be worn (`Host.shelve`)."""
    record, tensors = _for(host, folder, allow_other_base)
    name = name or record["name"]
    host.shelve(name, rebuild(record, edits), record["places"], tensors)
    _keep_template(host, name, record)
    return name


def template_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prompt template that an adapter's JSON records; None if it records none.

    Files without the field are read by their training settings: the protocol fixed the template before there was a
    choice, and knowledge items were asked as they are.
    """
    if record.get("template"):
        found: Mapping[str, Any] = record["template"]
        return found
    training = _section(record.get("about"), "training")
    if _section(training, "know").get("items"):
        return {"name": "none"}
    protocol = str(_section(training, "data").get("protocol")).lower()
    name = {"published": "published", "clean": "alpaca"}.get(protocol)
    return {"name": name} if name else None


def _section(values: Any, name: str) -> Mapping[str, Any]:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _keep_template(host: Host, name: str, record: Mapping[str, Any]) -> None:
    if (template := template_of(record)) is not None:
        host.templates[name] = template


def _for(host: Host, folder: str | Path, allow_other_base: bool) -> tuple[dict[str, Any], Held]:
    record, tensors = read(folder)
    # Tensors at the embedding or the head have the vocabulary's size: with another one, their shapes are refused.
    told = differences(record["base"], fingerprint(host), may_grow=True)
    if told and not (allow_other_base and all("weights" in t for t in told)):
        base = record["base"]["name"] or f"a {record['base']['family']}"
        cure = "; allow_other_base=True takes it all the same" if all("weights" in t for t in told) else ""
        raise InlayError(f"{folder} was trained on another base ({base}): {'; '.join(told[:3])}{cure}")
    return record, tensors
