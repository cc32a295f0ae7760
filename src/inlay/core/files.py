"""Files that are never half written: everything is built under another name, flushed to disk, and renamed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from inlay.core.errors import InlayError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def flush(path: Path) -> None:
    """Make a file's (or folder's) content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class DiskError(InlayError, OSError):
    """A file or folder could not be written."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskError, which names `path` and the cure, for whatever a full or read-only disk raises in the block."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, RuntimeError, SafetensorError) as e:
        # safetensors and torch.save report a failed write in classes of their own.
        if not isinstance(e, OSError) and not re.search(
            r"I/O error|os error|PytorchStreamWriter|unexpected pos", str(e)
        ):
            raise
        why = (isinstance(e, OSError) and e.strerror) or str(e).partition("\n")[0]
        raise DiskError(f"cannot write {path}: {why}{_free(path)}; free some space or choose another folder") from e


def _free(path: Path) -> str:
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    return "" if there is None else f" ({shutil.disk_usage(there).free:,} bytes are free)"


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a file or folder against other processes and threads, until the handle that is returned is closed.

    None: another one holds it (never if `wait`). On file systems without locks nothing is locked.
    """
    handle = os.open(path, os.O_RDONLY)
    if fcntl is None:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # no locks here (some network file systems)
        if not wait:
            os.close(handle)
            return None
    return handle


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else into a with-block of this kind over the same folder."""
    handle = _lock(folder, wait=True)
    try:
        yield
    finally:
        os.close(handle)  # type: ignore[arg-type]


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, locked while the block runs; what killed processes have left there is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if (stale := _lock(left, wait=False)) is not None:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
                os.close(stale)
    while True:
        work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        work.mkdir()
        with contextlib.suppress(FileNotFoundError):
            handle = _lock(work, wait=True)
            if work.exists():  # not taken for a leftover before it was locked
                break
            os.close(handle)  # type: ignore[arg-type]
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(handle)  # type: ignore[arg-type]


def _settle(file: Path) -> None:
    """Flush a new file and give it the mode that the user's umask asks for; safetensors makes files of mode 0600."""
    probe = file.with_name(f".{secrets.token_hex(4)}.mode")
    probe.touch()
    file.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()
    flush(file)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place at once; on any failure the old file stays.

    Raises:
        DiskError: it cannot be written.
    """
    with writing(path), _work_folder(path) as work:
        made = work / path.name
        write(made)
        _settle(made)
        os.replace(made, path)
        flush(path.parent)


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
    """A folder to fill that appears under `path` only when the with-block has ended well. `path` must not exist.

    Raises:
        DiskError: it cannot be written, or exists by now.
    """
    with writing(path), _work_folder(path) as work:
        made = work / path.name
        made.mkdir()
        yield made
        for entry in sorted(made.rglob("*")):
            flush(entry) if entry.is_dir() else _settle(entry)
        flush(made)
        os.rename(made, path)
        flush(path.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_sha256(f)


def _slow_sha256(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
