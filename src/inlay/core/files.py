"""Files that are never half written: everything is built under another name, flushed to disk, and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from inlay.core.errors import InlayError


def flush(path: Path) -> None:
    """Make a file's (or folder's) content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place at once; on any failure the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def make_folder(path: Path) -> None:
    """A folder that may be there already; raises InlayError where there can be none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        why = "a file has that name" if path.is_file() else e.strerror
        raise InlayError(f"cannot make the folder {path}: {why}; choose another one") from e


def cache_folder(*parts: str) -> Path:
    """A folder of the user's cache: `$INLAY_CACHE`, else `inlay` under `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("INLAY_CACHE")
    root = Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"
    return root.joinpath(*parts)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears under `path` only when the with-block has ended well. `path` must not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            flush(file)
        flush(partial)
        os.rename(partial, path)
        flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_sha256(f)


def _slow_sha256(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
