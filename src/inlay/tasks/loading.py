"""Records of a task: from a file, a folder, the Hub, or the synthetic world.

Files: a JSON array or JSON lines, plain or `.gz`, in LLM-Adapters' schema (`instruction, input, output, answer`) or in
a public form the task declares.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.tasks import table
from inlay.tasks.task import Record, Row, Task

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_FIELDS = ("instruction", "input", "output", "answer")
_MEANT = frozenset(
    "system history context tools functions images image videos audios messages conversations prompt completion".split()
)
"""Further columns of public files that say something of the task: without them another question is asked."""
_PUBLISHED = ("instruction", "original_text")
"""Fields that tell LLM-Adapters' own files, which have known digests, from other public forms, which have sizes."""


def load(
    task: str | Task, split: str = "test", source: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Record]:
    """Records of `task`, in their file's order.

    source: a file; a folder that holds `<split>.json`, `<Task>/<split>.json` (in any case, `dataset/` before it
    allowed) or a training set's `<name>.json`; None for the Hub, and for the synthetic sets, which are generated.
    limit: at most so many, drawn with `seed` (for synthetic sets: how many are generated, with `seed`).

    Raises InlayError for an unknown task or split, a file that is not there, and rows that do not fit, naming file,
    index and field. Warns where a file is not the published one (both digests named), and where rows were left out or
    are missing.
    """
    task = table.get(task)
    if split not in task.splits:
        raise InlayError(f"{task.name} has no split {split!r}; there is: {', '.join(task.splits)}")
    if limit is not None and limit < 1:
        raise InlayError(f"limit {limit}: at least 1 record, or None for all")
    if task.group == "world" and source is None:
        return _world(task, split, limit, seed)
    if source is None:
        records = _parts(task, split, None) if task.parts else _hub(task, split)
    else:
        path = _locate(task, split, Path(source))
        records = _parts(task, split, Path(source)) if path is None else read_records(path, task, split)
    if limit is None or limit >= len(records):
        return records
    chosen = sorted(random.Random(seed).sample(range(len(records)), limit))
    return [records[i] for i in chosen]


def _world(task: Task, split: str, limit: int | None, seed: int) -> list[Record]:
    from inlay.tasks import world

    rows = world.records(task.name, split, limit, seed)
    return [_plain(row, task, split, f"inlay.tasks.world, record {i}") for i, row in enumerate(rows)]


# ------------------------------------------------------------------------------------------------ files


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(place, value) of a JSON array (places count from 0) or of JSON lines (line numbers from 1), `.gz` unpacked.

    Raises InlayError with the file and the line where it is not JSON.
    """
    yield from _rows(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise InlayError(f"cannot read {path}: {error}") from error


def _rows(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InlayError(f"{path} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text))
        except json.JSONDecodeError as error:
            raise InlayError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InlayError(f"{path}, line {number}: not JSON ({error.msg})") from error


def read_records(path: str | Path, task: str | Task, split: str = "test") -> list[Record]:
    """The records of one file, checked against the task's schema and its known digests (or, in a public form, size)."""
    task, path = table.get(task), Path(path)
    data = _bytes(path)
    rows = [row for _, row in _rows(path, data)]
    published = bool(rows) and isinstance(rows[0], dict) and any(name in rows[0] for name in _PUBLISHED)
    if published:
        _verify(task, split, path, data)
    return _records(rows, task, split, str(path), published)


def _verify(task: Task, split: str, path: Path, data: bytes) -> None:
    known = task.checksums.get(split)
    if known is None:
        return
    sha = hashlib.sha256(data).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if sha == known.sha256 or blob == known.blob:
        return
    here, there = (
        (f"sha256 {sha}", f"sha256 {known.sha256}") if known.sha256 else (f"git blob {blob}", f"git blob {known.blob}")
    )
    warnings.warn(
        f"{path} is not the published {split} file of {task.name}: it has {here}, published is {there}", stacklevel=4
    )


def _records(rows: Sequence[Any], task: Task, split: str, where: str, published: bool = False) -> list[Record]:
    if not rows:
        raise InlayError(f"{where} holds no records")
    kept = [_record(row, task, split, where, i) for i, row in enumerate(rows)]
    if others := sorted({k for row in rows if "instruction" in row for k, v in row.items() if v} - {*_FIELDS}):
        warnings.warn(f"{where}: nothing is learned of the columns {', '.join(others)}", stacklevel=4)
    records = [r for r in kept if r is not None]
    if len(records) < len(rows):
        gone = len(rows) - len(records)
        warnings.warn(
            f"{where}: {gone} of {len(rows)} rows left out (their equation does not give the answer)", stacklevel=4
        )
    if not published and task.sizes.get(split, len(rows)) != len(rows):
        warnings.warn(f"{where}: {len(rows)} rows, the published {split} split has {task.sizes[split]}", stacklevel=4)
    return records


def _record(row: Any, task: Task, split: str, where: str, index: int) -> Record | None:
    at = f"{where}, record {index}"
    if not isinstance(row, dict):
        raise InlayError(f"{at}: an object was expected, not {type(row).__name__}")
    if "instruction" in row:
        return _plain(row, task, split, at)
    for form in task.formats:
        if all(name in row for name in form.fields):
            try:
                return form.build(row)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise InlayError(f"{at}: not a {task.name} row: {type(error).__name__}: {error}") from error
    forms = [_FIELDS, *(form.fields for form in task.formats)]
    best = max(forms, key=lambda fields: sum(name in row for name in fields))
    missing = ", ".join(repr(name) for name in best if name not in row)
    alike = [
        t.name for t in table.TASKS.values() if any(all(name in row for name in form.fields) for form in t.formats)
    ]
    hint = f". Rows of {', '.join(alike)} look like this: name that task (--task {alike[0].lower()})" if alike else ""
    raise InlayError(f"{at}: field {missing} is missing; it has {', '.join(sorted(row)) or 'none'}{hint}")


def _plain(row: Row, task: Task, split: str, at: str) -> Record:
    needed: tuple[str, ...] = ("instruction", "output") if task.group == "training" else ("instruction", "answer")
    if split == "train" and task.group != "training":
        needed = ("instruction", "output", "answer")
    if meant := sorted(k for k, v in row.items() if k in _MEANT and v):
        raise InlayError(
            f"{at}: the column {meant[0]!r} belongs to the task, and this format ({', '.join(_FIELDS)}) does not learn "
            f"from it; write its text into 'instruction' or 'input', or take the column out"
        )
    values: dict[str, str] = {}
    for name in _FIELDS:
        value = row.get(name)
        if value is None and name not in needed:
            value = ""
        elif name not in row:
            raise InlayError(f"{at}: field {name!r} is missing; it has {', '.join(sorted(row))}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise InlayError(f"{at}: field {name!r} must be text, it is {type(value).__name__}")
        values[name] = value
    return Record(**values)


# ---------------------------------------------------------------------------------------------- folders


def _named(folder: Path, stem: str) -> Path | None:
    """The data file `stem` in `folder`, in any case and with any of the suffixes."""
    files = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_file()}
    return next((files[stem.lower() + s] for s in _SUFFIXES if stem.lower() + s in files), None)


def _stems(task: Task, split: str) -> list[str]:
    own = [task.name, *task.aliases] if task.group == "training" else []
    return [split, f"{split}set", *own] if task.group != "training" else own


def _homes(task: Task, root: Path) -> Iterable[Path]:
    """Folders that may hold the task: `root`, its subfolder of the task's name, and the same below `dataset/`."""
    yield root
    for base in (root, root / "dataset", root / "ft-training_set"):
        if base.is_dir():
            if base != root:
                yield base
            yield from (p for p in sorted(base.iterdir()) if p.is_dir() and table.find(p.name) is task)


def _locate(task: Task, split: str, source: Path) -> Path | None:
    """The file for (task, split); None where the set must be put together from its parts."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InlayError(f"{task.name}: no file or folder {source}")
    owner = table.find(source.name)
    for home in _homes(task, source):
        if home == source and owner is not None and owner is not task and task.group != "training":
            continue
        for stem in _stems(task, split):
            path = _named(home, stem)
            if path is not None:
                return path
    if task.parts:
        return None
    wanted = " or ".join(f"{stem}.json" for stem in _stems(task, split))
    looked = ", ".join("./" if home == source else f"{home.relative_to(source)}/" for home in _homes(task, source))
    there = ", ".join(sorted(p.name for p in source.iterdir())[:20]) or "nothing"
    raise InlayError(f"{source} has no {wanted} for {task.name} (looked in {looked}); it holds: {there}")


def _parts(task: Task, split: str, source: Path | None) -> list[Record]:
    """A mixture from its parts; every missing part is named at once."""
    records: list[Record] = []
    missing: list[str] = []
    for name in task.parts:
        try:
            records += load(name, split, source)
        except InlayError as error:
            missing.append(f"{name}: {error}")
    if missing:
        raise InlayError(f"{task.name} needs {len(task.parts)} parts; these cannot be read:\n  " + "\n  ".join(missing))
    return records


# -------------------------------------------------------------------------------------------------- Hub


OWN = "a file or folder (--data of `inlay eval`, --train-file of `inlay train`, source= in Python)"
"""What stands in for a download."""


def _hub(task: Task, split: str) -> list[Record]:
    if task.hub is None or split not in task.hub.splits:
        raise InlayError(
            f"{task.name} ({split}) has no public source that can be fetched by name; give {OWN} in "
            "LLM-Adapters' schema (its repository holds it under dataset/ or ft-training_set/)"
        )
    try:
        import datasets
    except ImportError as error:
        raise InlayError(f"reading {task.hub.id} needs the `datasets` library: pip install inlay[data]") from error
    rows: list[Any] = []
    for config, part in task.hub.splits[split]:
        try:
            rows += list(datasets.load_dataset(task.hub.id, config, split=part))
        except Exception as error:
            where = f"{task.hub.id} ({config or 'default'}, {part})"
            raise InlayError(f"cannot load {where}: {type(error).__name__}: {error}. Or give {OWN}") from error
    return _records(rows, task, split, task.hub.id)


def to_json(records: Iterable[Record], path: str | Path) -> None:
    """Write records in LLM-Adapters' schema: one JSON array, or JSON lines for a `.jsonl` path."""
    rows = [dataclasses.asdict(r) for r in records]
    path = Path(path)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=4), encoding="utf-8")
