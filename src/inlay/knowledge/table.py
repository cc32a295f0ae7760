"""A table of measured knowledge: one row an item, kept as `table.parquet` and `table.json`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay.core.errors import InlayError, unknown
from inlay.core.files import new_folder

SCHEMA = 1
PARQUET, ABOUT = "table.parquet", "table.json"


@dataclass(frozen=True)
class Table:
    """Columns of N items, all NumPy arrays in the items' order.

    id, relation, subject, split, prompt, target: of the item; answer0: the base's present answer; em0: whether it is
    right; tsd: target semantic distance, float64; empty, tie: flags of that distance; n_tokens: of the target;
    features (N, D), answer_features (N, D): of target and present answer, float32.
    """

    rows: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    """What it was made of: schema, key, model, items (digest), settings, mean."""

    def __len__(self) -> int:
        return len(self.rows["id"])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.rows:
            raise unknown("column", name, self.rows)
        return self.rows[name]

    @property
    def mean(self) -> Tensor | None:
        """What a centred space subtracts (D,)."""
        mean = self.about["mean"]
        return None if mean is None else torch.tensor(mean)

    def only(self, mask: np.ndarray) -> Table:
        """The rows of a mask or of indices."""
        return Table({k: v[mask] for k, v in self.rows.items()}, self.about)

    def save(self, folder: str | Path) -> Path:
        """Write both files; a table that is there is replaced."""
        _, parquet = _arrow()
        folder = Path(folder)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        table = _to_arrow(self.rows)
        with contextlib.suppress(FileNotFoundError):
            _ours(folder)
            os.rename(folder, aside)
        with new_folder(folder) as made:
            parquet.write_table(table, made / PARQUET)
            (made / ABOUT).write_text(json.dumps(self.about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(aside, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Table:
        """Read what `save` wrote. Raises InlayError where there is none, it is damaged, or of a newer schema."""
        _, parquet = _arrow()
        folder = Path(folder)
        for name in (PARQUET, ABOUT):
            if not (folder / name).is_file():
                raise InlayError(f"{folder} holds no table: {name} is missing; `inlay know measure` makes one")
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if about["schema"] > SCHEMA:
                raise InlayError(f"{folder} was written by a newer Inlay (schema {about['schema']}); update to read it")
            return cls(_from_arrow(parquet.read_table(folder / PARQUET)), about)
        except (ValueError, KeyError, OSError) as e:
            if isinstance(e, InlayError):
                raise
            raise InlayError(f"the table in {folder} is damaged ({e}); measure again into another folder") from e


def _ours(folder: Path) -> None:
    """Replace tables, never a folder of something else."""
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if strange := sorted(there - {PARQUET, ABOUT}):
        raise InlayError(f"{folder} holds other files ({', '.join(strange[:3])}); choose a folder of the table's own")


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InlayError("tables are Parquet files, which need pyarrow: pip install 'inlay[knowledge]'") from e
    return pyarrow, parquet


def _to_arrow(rows: Mapping[str, np.ndarray]) -> Any:
    pa, _ = _arrow()
    columns = {}
    for name, values in rows.items():
        if values.ndim == 2:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            columns[name] = pa.array(values.tolist() if values.dtype == object else values)
    return pa.table(columns)


def _from_arrow(table: Any) -> dict[str, np.ndarray]:
    pa, _ = _arrow()
    rows = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        column = column.combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            rows[name] = column.flatten().to_numpy().reshape(-1, column.type.list_size).copy()
        elif pa.types.is_string(column.type):
            rows[name] = np.array(column.to_pylist(), dtype=object)
        else:
            rows[name] = column.to_numpy(zero_copy_only=False).copy()
    return rows
