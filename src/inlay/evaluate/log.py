"""What a run leaves on disk: a JSON line per generation, and the settings that made them; both let it go on later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.files import make_folder, write_text
from inlay.core.fingerprint import differences
from inlay.core.host import Host
from inlay.core.store import content_digest, describe

Key = tuple[str, str, int]
"""(adapter, data set, index of the record)."""
GENERATIONS, SETTINGS = "generations.jsonl", "settings.json"


class Log:
    """Generations by (adapter, data set, index), kept in a folder if there is one.

    A last line that a kill left half written is dropped; damage anywhere else is an InlayError.
    """

    def __init__(self, folder: Path | None):
        self.rows: dict[Key, dict[str, Any]] = {}
        self.path = folder / GENERATIONS if folder else None
        if self.path and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole = path.read_bytes()
        lines = whole.split(b"\n")
        end = 0
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key = (row["adapter"], row["dataset"], row["index"])
            except (ValueError, KeyError, TypeError) as e:
                if number >= len(lines) - 1:
                    break
                raise InlayError(f"{path}, line {number} is damaged ({e!r}); choose another folder") from e
            if number == len(lines):
                break
            if key in self.rows:
                raise InlayError(f"{path}, line {number}: {key} occurs twice; two runs must not share a folder")
            self.rows[key] = row
            end += len(line) + 1
        if end < len(whole):
            os.truncate(path, end)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep these rows; on disk once this returns."""
        rows = list(rows)
        if self.path:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            except OSError as e:
                raise InlayError(
                    f"cannot write {self.path}: {e}. What is there is kept: make room, then say the same again"
                ) from e
        self.rows |= {(row["adapter"], row["dataset"], row["index"]): row for row in rows}

    def of(self, adapter: str, dataset: str, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows of one cell, in the records' order."""
        return [self.rows[adapter, dataset, i] for i in indices]

    def cell(self, adapter: str, dataset: str) -> list[dict[str, Any]]:
        """Whatever is there of one cell."""
        return [row for (a, d, _), row in self.rows.items() if (a, d) == (adapter, dataset)]


def adapter_digest(host: Host, worn: Iterable[str]) -> str:
    """Tells adapters apart by their settings, places and tensors."""
    digest = hashlib.sha256()
    for name in worn:
        about = describe(host.edits[name]), host.placement(name), content_digest(host.tensors(name))
        digest.update(repr(about).encode())
    return digest.hexdigest()[:16]


def settle(folder: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check a run's settings against those of the generations already in its folder, and write both together.

    Entries that are mappings (`adapters`, `datasets`) may grow; whatever is in both must be the same.
    Returns the settings of all that is in the folder.
    """
    if folder is None:
        return dict(settings)
    make_folder(folder)
    path = folder / SETTINGS
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as e:
            raise InlayError(f"{path} is damaged: {e}; choose another folder") from e
        told = _told(before, json.loads(json.dumps(settings)))
        if told:
            raise InlayError(
                f"{folder} holds generations made otherwise: {'; '.join(told)}. Choose another folder, or delete it"
            )
    elif (folder / GENERATIONS).exists():
        raise InlayError(f"{folder} has {GENERATIONS} but no {SETTINGS}; choose another folder")
    grown = {k: {**before.get(k, {}), **v} if isinstance(v, Mapping) else v for k, v in settings.items()}
    write_text(path, json.dumps(grown, indent=1, ensure_ascii=False) + "\n")
    return grown


def _told(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    told = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if key == "base":
            told += [f"the base differs ({d})" for d in differences(old or {}, new or {"shape": {}, "values": {}})]
        elif isinstance(old or {}, Mapping) and isinstance(new or {}, Mapping) and (old or new):
            old, new = old or {}, new or {}  # an entry that earlier versions did not write
            told += [
                f"{key} {k!r} differs{_leaves(old[k], new[k])}" for k in old.keys() & new.keys() if old[k] != new[k]
            ]
        elif old != new:
            told.append(f"{key} was {old!r}, now {new!r}")
    return sorted(told)


def _leaves(old: Any, new: Any) -> str:
    """What of a task's entry differs, in brackets; nothing for an adapter's, which is a digest."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return ""
    keys = [k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    named = [f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in keys if k != "digest"]
    return f" ({', '.join(named or ['other records or prompts'])})"
