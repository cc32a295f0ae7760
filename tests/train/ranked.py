"""Runs on several gloo ranks of this machine, started as a launcher starts them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "tests.train.ranked"]


def launch(size: int, work: Callable[..., Any], *args: Any, patience: float = 60) -> list[Any]:
    """What `work(*args)` returns on every rank; an exception comes back as its text, a rank that hangs is an error."""
    context = multiprocessing.get_context("forkserver")  # imports once, and has run no backward before it forks
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        process = context.Process(target=_rank, args=({**environment, "MASTER_PORT": port}, there, work, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(patience), f"rank {rank} hangs"
            answers.append(pipe.recv())
        return answers
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank(environment: dict[str, Any], pipe: Any, work: Callable[..., Any], args: tuple) -> None:
    os.environ.update({k: str(v) for k, v in environment.items()}, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(work(*args))
    except Exception as e:
        traceback.print_exc()
        pipe.send(f"{type(e).__name__}: {e}")


def train(
    run: Path,
    method: str,
    own: dict[str, Any],
    changes: dict[str, Any],
    n: int = 11,
    resume: bool | Path = False,
    rig: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """One run on the ranks that are there: what all of them must agree on, and `kept`, the base's numbers held here.

    Fails if a tensor is put together of its shards that is neither the adapter's, nor its optimizer's, nor a number.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from inlay.train import fit
    from tests.train.tiny import rows, settings, wearing

    host = wearing(method, **own)
    if (dtype := changes.get("dtype", "fp32")) != "fp32":
        host.model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
        for p in host.parameters():
            p.data = p.data.float()
    if rig is not None:
        rig(host)
    s = settings(run, **{"steps": 5, "eval_every": 2, "save_every": 2, "keep_last": 9, **changes})
    full, mine = DTensor.full_tensor, {*(tuple(t.shape) for t in host.tensors("a").values()), ()}

    def put_together(self: Any) -> Any:
        assert tuple(self.shape) in mine, f"a tensor of shape {tuple(self.shape)} was gathered"
        return full(self)

    DTensor.full_tensor = put_together
    r = fit(host, "a", rows(n, prompt=True), rows(5, 9, prompt=True), s, run, None, resume=resume)
    DTensor.full_tensor = full
    kept = sum(getattr(p, "_local_tensor", p).numel() for n, p in host.model.named_parameters() if "inlay" not in n)
    return {
        "kept": kept,
        "below": getattr(host.model, "below", 0),
        "loss": r.loss,
        "val_loss": r.val_loss,
        "best_step": r.best_step,
        "steps": r.steps,
        "tokens": r.tokens,
        **({"scales": host.model.scales} if hasattr(host.model, "scales") else {}),
    }


def metrics(run: Path) -> list[dict[str, float]]:
    """`metrics.jsonl` of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def breaks(at: int, on: int, how: str) -> Callable[[Any], None]:
    """A rig under which one rank comes to grief in its step `at`."""
    return functools.partial(_break, at, on, how)


def _break(at: int, on: int, how: str, host: Any) -> None:
    from torch.optim import AdamW

    from inlay.train import checkpoint

    if int(os.environ["RANK"]) != on:
        return
    calls, step = 0, AdamW.step

    def grief(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        made = step(self, *args, **more)
        if calls == at and how == "compute":
            host.model.model.norm.register_forward_pre_hook(functools.partial(_raise, ValueError("out of luck")))
        elif calls == at and how == "diverge":
            tensor = self.param_groups[0]["params"][0].data
            getattr(tensor, "_local_tensor", tensor).fill_(float("nan"))
        elif calls == at:
            checkpoint.save_file = functools.partial(_raise, OSError("no space left"))
        return made

    AdamW.step = grief


def _raise(error: Exception, *args: Any, **more: Any) -> None:
    raise error


def stops_after(step: int) -> Callable[[Any], None]:
    """A rig under which all ranks stop once the checkpoint of that step is there."""
    return functools.partial(_stop, step)


def _stop(step: int, host: Any) -> None:
    from inlay.train.loop import Loop

    save = Loop.save

    def last(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.step == step:
            raise RuntimeError("stopped on purpose")

    Loop.save = last


def train_differently(run: Path) -> dict[str, Any]:
    """Ranks that were given other data."""
    return train(run, "lora", {}, {}, n=9 + int(os.environ["RANK"]))


def no_dropout(host: Any) -> None:
    """A rig that lets a base of GPT-2's kind be compared: its own dropout is off."""
    for module in host.model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0


def counts_below(host: Any) -> None:
    """A rig that counts the tokens that the first block learns from; `train` returns them as `below`."""
    import torch

    model = host.model
    model.below = 0

    def count(module: Any, given: Any, out: Any) -> None:
        if torch.is_grad_enabled():
            model.below += out.shape[:-1].numel()

    model.model.layers[0].mlp.register_forward_hook(count)


def overflows(at: int, on: int) -> Callable[[Any], None]:
    """A rig under which the gradient of one rank is infinite in step `at`; `train` returns the steps' loss scales."""
    return functools.partial(_overflow, at, on)


def _overflow(at: int, on: int, host: Any) -> None:
    import math

    from inlay.train import ways
    from inlay.train.loop import Loop

    advance, loss_sum, now = Loop.advance, ways.head.loss_sum, [0]
    host.model.scales = []

    def step(self: Any) -> Any:
        now[0] = self.step + 1
        made = advance(self)
        host.model.scales.append(self.scaler.get_scale())
        return made

    def grief(*args: Any) -> Any:
        made = loss_sum(*args)
        if made.requires_grad and now[0] == at and int(os.environ.get("RANK", on)) == on:
            made.register_hook(lambda grad: grad * math.inf)
        return made

    Loop.advance, ways.head.loss_sum = step, grief


def resumed(run: Path, checkpoint: Path, own: dict[str, Any], changes: dict[str, Any], rig: Any) -> dict[str, Any]:
    """A LoRA run that goes on from a checkpoint of its own."""
    return train(run, "lora", own, changes, 11, checkpoint, rig)


def no_room(host: Any) -> None:
    """A rig under which the disk of rank 1 is full."""
    import shutil
    from types import SimpleNamespace

    if os.environ["RANK"] == "1":
        shutil.disk_usage = lambda path: SimpleNamespace(free=10)  # type: ignore[assignment, return-value]
