"""Adapters under `transformers.Trainer` and TRL: a model that wears one trains there like any other.

What this callback adds is Inlay's adapter folder in every checkpoint, the terms that methods such as AdaLoRA ask of a
training loop, and an error where nothing would be learned. For packed forwards there, see `inlay.engine.trainer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from inlay.api import save
from inlay.compat.trl import is_trl
from inlay.core.errors import InlayError, unknown
from inlay.core.files import replace_file
from inlay.core.fingerprint import fingerprint
from inlay.core.host import Host
from inlay.core.sharded import after_step, penalty, whole

STATE = "adapter-state.safetensors"


class AdapterCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdapterCallback(host, "a")])`, after `host.use("a")`.

    - with each checkpoint, writes `checkpoint-<step>/adapter` (`inlay.load` reads it);
    - calls `after_step` of the method once the optimizer has stepped, and keeps its state in the checkpoint;
    - adds the gradient of the method's `penalty` before the first backward of a step, so that it is clipped with the
      rest. The loss that Trainer logs does not contain it, and fp16's loss scaling and DeepSpeed exclude it;
    - stops the run in its first step if no gradient reached the adapter.

    It cannot keep Trainer from writing the frozen base into its checkpoints, nor seed the adapter: `Host.add` takes a
    seed.
    """

    def __init__(self, host: Host, name: str):
        if name not in host.edits:
            raise unknown("adapter", name, host.edits, "Hang it first with add() or load().")
        self.host, self.name, self.edit = host, name, host.edits[name]
        self.state: dict[str, torch.Tensor] = {}
        self._base = fingerprint(host)  # now: a trainer may spread the base over processes
        self._penalised = self.edit.has_penalty
        self._unchecked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would train nothing or something else; take up the method's state of a resumed run."""
        if not any(self.name in names for names in self.host.plan):
            raise InlayError(
                f"no row wears {self.name!r}, so it would not learn; call host.use({self.name!r}) before train()"
            )
        if self._penalised and (args.fp16 or getattr(args, "deepspeed", None)):
            raise InlayError(
                f"{self.edit.kind} adds a penalty to the loss; it cannot be scaled under fp16 or DeepSpeed: use bf16"
            )
        roles = {s.spot.role for s in self.host.sites.values() if self.name in s.places}
        if "head" in roles and is_trl(args):
            raise InlayError(
                "TRL multiplies by the head's weight itself and never calls the head, so an adapter there would not "
                "learn: leave 'head' out of the placement, or use Trainer or inlay.train"
            )
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and file.is_file():
            self.state = {k: v.to(self.host.device) for k, v in load_file(file).items()}
        elif state.global_step and self.edit.has_after_step:
            raise InlayError(
                f"the state of {self.edit.kind} is missing: no {file}; resume from a checkpoint in output_dir"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The penalty's gradient; the loss's own is added to it."""
        extra = penalty(self.edit, self.host.by_place(self.name))
        if extra is not None:
            extra.backward()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for gradients in the first step."""
        grads = (p.grad for p in self.host.parameters(self.name)) if self._unchecked else ()
        if self._unchecked and not any(g is not None and bool(whole(g).any()) for g in grads):
            raise InlayError(f"no gradient reached {self.name!r} in its first step, so it would not learn")
        self._unchecked = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The method's own step."""
        after_step(self.edit, self.host.by_place(self.name), state.global_step + 1, state.max_steps, self.state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the adapter beside Trainer's own files; parts of a sharded one come together for it."""
        tensors = {k: whole(v) for k, v in sorted(self.host.tensors(self.name).items())}
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save(
            self.host,
            self.name,
            folder / "adapter",
            about={"training": {"steps": state.global_step, "by": type(args).__name__}},
            tensors=tensors,
            base=self._base,
        )
        if self.state:
            kept = {k: v.detach().cpu().contiguous() for k, v in self.state.items()}
            replace_file(folder / STATE, lambda partial: save_file(kept, partial))
