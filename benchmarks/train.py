"""Training: `inlay.train`'s own loop against HF PEFT under `transformers.Trainer`."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from benchmarks.bases import ALL_LINEARS, llama
from benchmarks.harness import Result, Took, clock, faster, total
from benchmarks.lengths import Row, about

LR = 1e-4
METHODS = ("lora", "road", "prefix")


def peft_config(method: str) -> Any:
    """PEFT's own settings of a method."""
    import peft

    if method == "lora":
        return peft.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEARS)
    if method == "road":
        return peft.RoadConfig(variant="road_1", group_size=64, target_modules=ALL_LINEARS)
    return peft.PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM")


def batches(examples: Sequence[Row], size: int) -> list[list[Row]]:
    """Batches in the order of the examples."""
    return [list(examples[i : i + size]) for i in range(0, len(examples) - size + 1, size)]


class Side(Protocol):
    """One of the two that are compared."""

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""


class Peer:
    """PEFT under Trainer: dynamic padding on the right, AdamW, no dropout, no checkpointing."""

    def __init__(
        self, model: Any, method: str, examples: Sequence[Row], size: int, adapter: Path | None = None, **arguments: Any
    ):
        import peft

        self.examples, self.size, self.arguments = examples, size, arguments
        self.model = peft.get_peft_model(model, peft_config(method))
        if adapter is not None:
            self.model.save_pretrained(adapter)

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        losses: list[float] = []
        took: list[Took] = []
        data = [{"input_ids": e.input_ids, "labels": e.labels} for e in self.examples]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trainer(self._settings(folder, number), data, watching(losses, took)).train()
        return losses, took

    def warm(self) -> None:
        """Import all that steps need."""
        import transformers.trainer  # noqa: F401

    def _trainer(self, settings: dict[str, Any], data: list[dict[str, list[int]]], callback: Any) -> Any:
        """What trains: transformers' Trainer over padded batches."""
        from transformers import Trainer, TrainingArguments

        args, rows = TrainingArguments(**settings), cast(Any, data)
        return in_order(
            Trainer, model=self.model, args=args, train_dataset=rows, data_collator=collate, callbacks=[callback]
        )

    def _settings(self, folder: str, steps: int) -> dict[str, Any]:
        """Of `TrainingArguments`."""
        settings = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": self.size,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": next(self.model.parameters()).device.type == "cpu",
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
        }
        return settings | self.arguments


def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest."""
    wide = max(len(r["input_ids"]) for r in rows)

    def padded(name: str, by: int) -> torch.Tensor:
        return torch.tensor([r[name] + [by] * (wide - len(r[name])) for r in rows])

    seen = torch.tensor([[1] * len(r["input_ids"]) + [0] * (wide - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": seen, "labels": padded("labels", -100)}


# transformers' Trainer is imported only by who trains with it: what it takes is no memory of ours (`benchmarks.child`).
def in_order(kind: Any, **arguments: Any) -> Any:
    """A trainer of this kind (transformers' Trainer or a subclass) that takes its examples in the order of the data."""
    from torch.utils.data import SequentialSampler

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return InOrder(**arguments)


def watching(losses: list[float], took: list[Took]) -> Any:
    """A callback that writes the loss and the time of every step into these."""
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            took.append(self.began.since())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    return Watching()


class Ours:
    """`inlay.train`'s loop over the same examples in the same order."""

    def __init__(
        self,
        model: Any,
        method: str,
        examples: Sequence[Row],
        size: int,
        adapter: Path | None = None,
        at: str = "linear",
        **run: Any,
    ):
        import inlay
        from inlay.train.loop import Loop
        from inlay.train.settings import OptimSettings, RunSettings, TrainSettings

        self.host = inlay.attach(model)
        if adapter is not None:
            from inlay.interop import formats

            name = formats.read(self.host, adapter, "a")
        else:
            name = "a"
            settings = {
                "lora": {"rank": 8, "alpha": 16.0},
                "road": {"variant": 1},
                "series": {"size": 64},
                "prefix": {"tokens": 16},
            }[method]
            row = inlay.method({"road": "road1"}.get(method, method))
            self.host.add(name, row.make(**settings), at=at if method != "prefix" else None, seed=0)
        optim = OptimSettings(batch_size=size, micro_batch=size, lr=LR, warmup=0, schedule="constant", steps=10**6)
        settings = TrainSettings(
            model="random", out=Path("unused"), optim=optim, run=RunSettings(progress=False, loggers=("none",), **run)
        )
        self.name = name
        self.loop = Loop(self.host, name, list(examples), [], settings, 0)
        cut = batches(examples, size)
        self.loop.feed.step = lambda number: cut[number % len(cut)]  # type: ignore[method-assign]
        self.examples = list(examples)

    def warm(self) -> None:
        """Nothing is left to import."""

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        from inlay.train.loop import training

        self.loop.step = 0
        losses, took = [], []
        with training(self.host, self.name, False), self.loop.way.active():
            for _ in range(number):
                began = clock()
                losses.append(self.loop.advance()["loss"])
                took.append(began.since())
        return losses, took


def agree(ours: Side, peer: Side, steps: int, near: float) -> str:
    """The largest relative difference of the losses of the first steps; RuntimeError if it is not small."""
    return alike(ours.steps(steps)[0], peer.steps(steps)[0], near)


def alike(a: Sequence[float], b: Sequence[float], near: float) -> str:
    """The same of losses that are at hand."""
    worst = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    if worst > near:
        raise RuntimeError(f"losses differ: {a} and {b}")
    return f"losses of {len(a)} steps agree to {worst:.0e}"


def pair(
    size: str, kind_rows: Sequence[Row], method: str, dtype: str, batch: int, folder: Path, device: str = "cpu"
) -> tuple[Ours, Peer]:
    """Both sides with the same base and the same adapter."""
    peer = Peer(llama(size, dtype, device), method, kind_rows, batch, folder)
    return Ours(llama(size, dtype, device), method, kind_rows, batch, folder), peer


def turn(side: Side, steps: int) -> Callable[[], Took]:
    """Time of a round's steps, the first of which is not counted."""
    return lambda: total(side.steps(steps + 1)[1][1:])


def timed(
    name: str, ours: Sequence[Took], peer: Sequence[Took], examples: Sequence[Row], batch: int, peer_is: str, told: str
) -> Result:
    """A result of training, with tokens a second: those of the texts, whatever a side pads or computes once.

    The first batch of `examples` is not counted (`turn`).
    """
    counted = examples[batch:]
    tokens = sum(len(e.input_ids) for e in counted)
    own, other = (f"{tokens / statistics.median(t.wall for t in side):.0f}" for side in (ours, peer))
    return faster(name, ours, peer, peer_is, f"{own} against {other} real tokens/s; {about(counted, batch)}; {told}")
