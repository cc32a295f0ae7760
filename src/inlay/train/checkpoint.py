"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder that is whole or not there.

    checkpoint-<step>/adapter.safetensors   the adapter's tensors, named as `Host.tensors` names them
    checkpoint-<step>/state.pt              optimizer, schedule, scaler, random states, the method's own state
    checkpoint-<step>/checkpoint.json       step, position in the data, losses, settings, data digest

`state.pt` holds tensors and plain values only and is read with `weights_only=True`: no pickled code is ever run.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.files import new_folder, sha256

Values = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]
"""Adapter, state and facts of a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, read back."""

    path: Path
    adapter: dict[str, Tensor]
    state: dict[str, Any]
    about: dict[str, Any]
    skipped: tuple[str, ...] = ()
    """Why later checkpoints were passed over."""


def random_states() -> dict[str, Any]:
    """Python's, NumPy's and PyTorch's generators as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def write(run_dir: Path, step: int, adapter: dict[str, Tensor], state: dict[str, Any], about: dict[str, Any]) -> Path:
    """Write `checkpoint-<step>`. Whatever fails, the checkpoints that were there stay, and an InlayError says why."""
    path, aside = run_dir / f"checkpoint-{step}", run_dir / f".checkpoint-{step}.old"
    try:
        if path.exists():  # a run that was taken back to an earlier step passes this one again
            path.rename(aside)
        with new_folder(path) as folder:
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in adapter.items()}, folder / "adapter.safetensors"
            )
            torch.save(state, folder / "state.pt")
            about = about | {"sha256": {name: sha256(folder / name) for name in ("adapter.safetensors", "state.pt")}}
            about = about | {"digest": _digest(about)}
            (folder / "checkpoint.json").write_text(json.dumps(about, indent=1) + "\n")
    except Exception as e:
        clean(run_dir)
        raise InlayError(f"cannot write {path}: {e}. {last_good(run_dir)} Make room, then resume.") from e
    shutil.rmtree(aside, ignore_errors=True)
    return path


class Writer:
    """Checkpoints of a run, written one at a time; in the background, if wanted, while the run goes on.

    Only writing moves to the background: whoever calls `put` hands over values that nobody else will change.
    """

    def __init__(self, background: bool):
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def put(self, run_dir: Path, step: int, values: Values, keep_last: int, best: int | None) -> None:
        """Write a checkpoint, then delete those that are no longer wanted. Waits for the one before, and raises its
        error in place of writing this one."""
        self.wait()

        def work() -> None:
            write(run_dir, step, *values)
            prune(run_dir, keep_last, best)

        if not self.background:
            return work()
        self._thread = threading.Thread(target=self._guarded, args=(work,), name=f"checkpoint-{step}")
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            self._error = e

    def check(self) -> None:
        """Raise the error of a write that has failed since it was last asked for."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until nothing is being written; raises like `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def last_good(run_dir: Path) -> str:
    """A sentence that tells where a run can go on from."""
    there = steps(run_dir)
    return (
        f"The last good checkpoint is {run_dir / f'checkpoint-{there[-1]}'}."
        if there
        else "No checkpoint was written yet."
    )


def steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending."""
    names = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in run_dir.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in names if m)


def clean(run_dir: Path) -> None:
    """Remove what interrupted writes left behind; a checkpoint that was moved aside for one comes back."""
    for aside in run_dir.glob(".checkpoint-*.old"):
        path = run_dir / aside.name[1:-4]
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    for partial in [*run_dir.glob(".*.partial"), *(run_dir / "adapter").glob(".*.partial")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def prune(run_dir: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the last `keep_last` checkpoints and the best one."""
    keep = {*steps(run_dir)[-keep_last:], best}
    _delete(run_dir, [step for step in steps(run_dir) if step not in keep])


def forget(run_dir: Path, step: int) -> None:
    """Delete checkpoints of later steps, which a run that was taken back to this one will take again. They would be
    counted among the last ones, and a run that is stopped would go on from them."""
    _delete(run_dir, [later for later in steps(run_dir) if later > step])


def _delete(run_dir: Path, unwanted: Sequence[int]) -> None:
    for step in unwanted:  # renamed first: a kill must not leave half a checkpoint
        gone = run_dir / f".checkpoint-{step}.gone.partial"
        (run_dir / f"checkpoint-{step}").rename(gone)
        shutil.rmtree(gone)


def _digest(about: Mapping[str, Any]) -> str:
    """Hex digest of a checkpoint's JSON, this digest aside."""
    text = json.dumps({k: v for k, v in about.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(path: Path, about: Mapping[str, Any]) -> None:
    """Compare a checkpoint with its digests, which those of earlier versions have not."""
    if "sha256" not in about:
        return
    if about.get("digest") != _digest(about):
        raise InlayError("checkpoint.json was changed after it was written")
    for name, digest in about["sha256"].items():
        if sha256(path / name) != digest:
            raise InlayError(f"{name} was changed after it was written")


def latest(run_dir: Path) -> Checkpoint | None:
    """Return the last checkpoint that is whole, None if there is none; raise InlayError if all are damaged."""
    skipped: list[InlayError] = []
    for step in reversed(steps(run_dir)):
        try:
            return replace(read(run_dir / f"checkpoint-{step}"), skipped=tuple(map(str, skipped)))
        except InlayError as e:
            skipped.append(e)
    if skipped:
        raise skipped[0]
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint folder; raises InlayError if there is none or it is damaged."""
    if not (path / "checkpoint.json").is_file():
        raise InlayError(f"{path} is no checkpoint: it has no checkpoint.json. {last_good(path.parent)}")
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        _check(path, about)
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(path, load_file(path / "adapter.safetensors"), state, about)
    except Exception as e:
        others = [s for s in steps(path.parent) if path.name != f"checkpoint-{s}"]
        there = ", ".join(f"checkpoint-{s}" for s in others) or "nothing"
        raise InlayError(f"{path} is damaged ({e}). Resume from another one; there is: {there}") from e
