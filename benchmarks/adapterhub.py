"""AdapterHub's series adapter under Trainer, in an environment of its own (its transformers is an older one).

    make bench-peers        makes that environment

The child process is handed the base's weights and writes its fresh adapter, so both sides begin at the same point; then
it waits for commands. It computes nothing while the other side is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama
from benchmarks.harness import Took
from benchmarks.lengths import Row, rows
from benchmarks.train import Ours, Peer

ROOT = Path(__file__).parents[1]
PYTHON = Path(__file__).with_name(".venv-adapters") / "bin" / "python"
WIDTH = 64
BATCH = 8


class Hub(Peer):
    """In the child: `adapters` under Trainer, a bottleneck on what the MLP says, before the residual is added."""

    def __init__(self, model: Any, examples: list[Row], size: int, adapter: Path):
        import adapters

        adapters.init(model)
        config = adapters.SeqBnConfig(
            original_ln_before=False, non_linearity="tanh", reduction_factor=model.config.hidden_size / WIDTH
        )
        model.add_adapter("a", config=config)
        model.train_adapter("a")
        model.save_adapter(str(adapter), "a")
        self.examples, self.size, self.model, self.arguments = examples, size, model, {}


class Remote:
    """In the parent: the child as a side of a comparison, with the `steps` of any other."""

    def __init__(self, size: str, kind: str, count: int, folder: Path, threads: int):
        command = [str(PYTHON), "-m", "benchmarks.adapterhub", size, kind, str(count), str(folder), str(threads)]
        environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"
        }
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self.versions: dict[str, str] = self._told()

    def _told(self) -> Any:
        assert self.child.stdout is not None
        for line in self.child.stdout:  # Trainer prints its logs between answers
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"AdapterHub's process ended with {self.child.wait()}; its errors stand above")

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{number}\n")
        self.child.stdin.flush()
        losses, took = self._told()
        return losses, [Took(*t) for t in took]

    def close(self) -> None:
        """End the child."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(timeout=60)


def sides(size: str, kind: str, count: int, folder: Path, threads: int) -> tuple[Ours, Remote]:
    """Both with the same base, the same adapter and `count` examples. RuntimeError without the environment."""
    if not PYTHON.exists():
        raise RuntimeError(f"{PYTHON} is not there: run `make bench-peers`")
    model = llama(size)
    torch.save(model.state_dict(), folder / "base.pt")
    peer = Remote(size, kind, count, folder, threads)
    return Ours(model, "series", rows(kind, count, model.config.vocab_size), BATCH, folder / "a"), peer


def main(size: str, kind: str, count: int, folder: Path, threads: int) -> None:
    from importlib.metadata import version

    def answer(value: object) -> None:
        print("answer " + json.dumps(value), flush=True)

    torch.set_num_threads(threads)
    model = llama(size)
    model.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
    hub = Hub(model, rows(kind, count, model.config.vocab_size), BATCH, folder / "a")
    answer({name: version(name) for name in ("adapters", "transformers", "torch")})
    for line in sys.stdin:
        answer(hub.steps(int(line)))


if __name__ == "__main__":
    size, kind, count, folder, threads = sys.argv[1:]
    main(size, kind, int(count), Path(folder), int(threads))
