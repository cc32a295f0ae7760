"""Where a run's numbers go: `metrics.jsonl` and `log.txt` always, TensorBoard, W&B and trackio if asked."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.train.bar import note
from inlay.train.settings import RunSettings, TrainSettings, to_plain


class Tracker(Protocol):
    """Something that takes numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """The run has ended."""


def _import(module: str, what: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InlayError(
            f"logging to {what} needs a package that is not installed: pip install {install} (or loggers: none)"
        ) from e


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, settings: TrainSettings, step: int):
        module = _import("torch.utils.tensorboard", "TensorBoard", "inlay[track]")
        self.writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; a resumed run goes on under the same id."""

    def __init__(self, run_dir: Path, settings: TrainSettings, step: int):
        module = _import("wandb", "W&B", "wandb")
        file = run_dir / "wandb.id"
        before = file.read_text().strip() if step and file.exists() else None
        self.run = module.init(
            project=settings.run.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=to_plain(settings),
            id=before,
            resume="must" if before else None,
        )
        file.write_text(f"{self.run.id}\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio, Hugging Face's local dashboard."""

    def __init__(self, run_dir: Path, settings: TrainSettings, step: int):
        self.module = _import("trackio", "trackio", "trackio")
        resume = "allow" if step else "never"
        self.module.init(project=settings.run.project, name=run_dir.name, config=to_plain(settings), resume=resume)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def trackers(run_dir: Path, settings: TrainSettings, step: int) -> list[Tracker]:
    """The trackers asked for; `step` is where a resumed run goes on. Raises InlayError for a missing package."""
    return [TRACKERS[name](run_dir, settings, step) for name in chosen(settings.run)]


def chosen(run: RunSettings) -> list[str]:
    """Names of the trackers: `auto` is TensorBoard where it is installed."""
    names: list[str] = []
    for name in run.loggers:
        if name == "auto":
            names += ["tensorboard"] * (importlib.util.find_spec("tensorboard") is not None)
        elif name != "none":
            names.append(name)
    return list(dict.fromkeys(names))


class Journal:
    """`metrics.jsonl`, one line a step, and `log.txt`, sentences. A resumed run forgets what it will redo.

    Args:
        step: where the run goes on.
    """

    def __init__(self, run_dir: Path, step: int):
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step(line) <= step]
            write_text(self.path, "".join(kept))
        self._metrics = open(self.path, "a", buffering=1)  # noqa: SIM115
        self._log = open(run_dir / "log.txt", "a", buffering=1)  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> None:
        """One line of metrics."""
        self._metrics.write(json.dumps(values) + "\n")

    def say(self, text: str) -> None:
        """One line of log."""
        self._log.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def tell(self, text: str) -> None:
        """A line of log that the user should not have to look for: it is shown on stderr, too."""
        self.say(text)
        note(text)

    def close(self) -> None:
        """Flush to disk. Both files are line-buffered, so a full disk has spoken up before."""
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
                file.close()


class Mute(Journal):
    """The journal of a process that is not the first: it writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def tell(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")
