"""A run folder: what was asked, on which machine, from which data; who may write into it, and where it goes on."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from inlay.core import processor
from inlay.core.errors import InlayError
from inlay.core.files import make_folder, write_text
from inlay.engine import cache
from inlay.engine.example import Example, learned
from inlay.train import checkpoint
from inlay.train.batches import digest
from inlay.train.checkpoint import Checkpoint
from inlay.train.settings import TrainSettings, bound, differences, identity, read_recipe, to_yaml

OURS = (
    "settings.yaml",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "log.txt",
    "wandb.id",
    "tensorboard",
    "adapter",
    "watched",
)
"""What a run writes, besides its checkpoints and cached activations."""
PACKAGES = ("inlay", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "accelerate")


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends."""
    make_folder(run_dir)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(run_dir / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise InlayError(f"another process is training in {run_dir}; wait for it, or choose another folder") from e
        yield


def start(run_dir: Path, settings: TrainSettings, resume: bool | str | Path, overwrite: bool) -> Checkpoint | None:
    """Make the folder ready; returns the checkpoint to go on from, if any. Raises InlayError if two runs would mix."""
    check(run_dir, settings, resume, overwrite)
    checkpoint.clean(run_dir)
    if overwrite or not _begun(run_dir):
        _wipe(run_dir)
    found = _latest(run_dir, resume)
    if found is not None and (changed := differences(bound(found.about["settings"]), identity(settings))):
        raise InlayError(
            f"{found.path} was made under other settings: {'; '.join(changed)}; give these as before to go on from it"
        )
    write_text(run_dir / "settings.yaml", to_yaml(settings))
    return found


def check(run_dir: Path, settings: TrainSettings, resume: bool | str | Path, overwrite: bool) -> None:
    """Raises InlayError if two runs would mix in this folder. Changes nothing."""
    if resume and overwrite:
        raise InlayError("resume and overwrite exclude each other: go on, or begin again")
    if run_dir.is_file():
        raise InlayError(f"{run_dir} is a file; choose another folder for the run")
    if overwrite or not _begun(run_dir):
        return
    there = [n for n in OURS if (run_dir / n).exists()] + [f"checkpoint-{s}" for s in checkpoint.steps(run_dir)]
    there += [p.name for p in cache.files(run_dir)]
    before = run_dir / "settings.yaml"
    if before.exists():
        changed = differences(identity(read_recipe(before, type(settings))), identity(settings))
        if changed or not resume:
            what = f"with other settings ({'; '.join(changed)})" if changed else "with these settings"
            cure = f"{'give these as before and ' if changed else ''}resume to go on with it, "
            raise InlayError(f"{run_dir} holds a run {what}: {cure}overwrite to replace it, or choose another folder")
    elif there:
        raise InlayError(
            f"{run_dir} has no settings.yaml but {', '.join(there[:5])}; choose another folder, or overwrite these"
        )


def beside(run_dir: Path) -> list[str]:
    """What else is in a folder that holds no run yet, hidden files aside."""
    if not run_dir.is_dir() or (run_dir / "settings.yaml").exists():
        return []
    ours = {*OURS, *(f"checkpoint-{s}" for s in checkpoint.steps(run_dir)), *(p.name for p in cache.files(run_dir))}
    return sorted(p.name for p in run_dir.iterdir() if p.name not in ours and not p.name.startswith("."))


def _begun(run_dir: Path) -> bool:
    """Whether there is anything to lose: not where a run stopped before its first step, so that it can be asked for
    again with what was wrong put right."""
    if not (run_dir / "settings.yaml").exists():
        return True
    steps = run_dir / "metrics.jsonl"
    done = steps.exists() and steps.stat().st_size > 0
    # A checkpoint that was moved aside for a new one counts as well.
    return done or (run_dir / "adapter").exists() or any(run_dir.glob("*checkpoint-*"))


def _latest(run_dir: Path, resume: bool | str | Path) -> Checkpoint | None:
    if isinstance(resume, (str, Path)):
        return checkpoint.read(Path(resume))
    return checkpoint.latest(run_dir) if resume else None


def _wipe(run_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    folders = [run_dir / f"checkpoint-{s}" for s in checkpoint.steps(run_dir)]
    for path in [*(run_dir / n for n in OURS), *folders, *cache.files(run_dir)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Software, hardware and the commit that ran."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **processor.describe(),
    }


def _commit() -> str | None:
    """The commit of the source tree that inlay runs from, if it is one; `+` marks changed files."""
    here = Path(__file__).parents[3]
    if not (here / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(here)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
        return head + ("+" if dirty.strip() else "")
    return None


def threads_of(run_dir: Path) -> int | None:
    """The number of threads of a run's last session; None where nothing tells."""
    try:
        return int(json.loads((run_dir / "environment.json").read_text())["sessions"][-1]["threads"])
    except (OSError, ValueError, LookupError):
        return None


def write_environment(run_dir: Path, device: torch.device, step: int, **more: Any) -> list[str]:
    """Add this session, and `more` of what it computes with, to `environment.json`; returns in what it differs from the
    one before."""
    path = run_dir / "environment.json"
    sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
    now = {**environment(device), **more}
    changed = differences({k: sessions[-1].get(k, now[k]) for k in now}, now) if sessions else []
    about = {
        "from_step": step,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
    }
    write_json(path, {"sessions": [*sessions, {**about, **now}]})
    return changed


def counts(examples: Sequence[Example], kept: Sequence[Example]) -> dict[str, Any]:
    """What `data.json` says of a set of examples."""
    return {
        "examples": len(kept),
        "without_a_token_to_learn": len(examples) - len(kept),
        "truncated": sum(bool(getattr(e, "truncated", False)) for e in kept),
        "tokens": sum(len(e.input_ids) for e in kept),
        "learned_tokens": sum(learned(e) for e in kept),
        "longest": max(len(e.input_ids) for e in kept),
        "sha256_of_tokens": digest(kept),
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file, never half written."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
