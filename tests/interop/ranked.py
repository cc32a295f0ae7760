"""Trainer's and SFTTrainer's runs on several gloo ranks of this machine (`tests.train.ranked.launch`, or torchrun)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from inlay.engine.trainer import PackingCollator, packed_forward
from inlay.interop.trainer import AdapterCallback
from tests.interop.trainers import arguments, letters, pad, sft, texts
from tests.train.tiny import Row, rows, wearing

BATCH = 4
"""Rows of a micro-batch, over all ranks."""
HEAVY = ["transformers.trainer", "accelerate", "trl", "trl.trainer.sft_trainer", "tests.interop.ranked"]
"""What ranks import, and their forkserver may have imported for all of them."""
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
OWN = {"adalora": {"rank": 6, "target": 2, "interval": 2}}


def run(out: Path, way: str, changes: dict[str, Any], method: str = "lora", idle: bool = False) -> list[list[float]]:
    """(loss, gradient norm) of four steps of Trainer, on the ranks that are there.

    Args:
        way: `plain`, `padded` (packed, from a collator that pads) or `flat` (packed, by `PackingCollator`).
        idle: the first rows of the last rank have nothing that is learned.
    """
    from transformers import Trainer

    if "fsdp" in changes:
        _fsdp_on_cpus()
        changes = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, **changes}
    data = rows(32, prompt=True)
    if idle:
        changes = {"train_sampling_strategy": "sequential", **changes}
        data[2:4] = [Row(r.input_ids, [-100] * len(r.labels)) for r in data[2:4]]
    host = wearing(method, **OWN.get(method, {})).use("a")
    t = Trainer(
        model=host.model,
        args=arguments(out, **{**SAVING, **_mine(), "remove_unused_columns": False, **changes}),
        train_dataset=data,
        data_collator=PackingCollator() if way == "flat" else pad,
        callbacks=[AdapterCallback(host, "a")],
    )
    return _logged(t, host, way, ("loss", "grad_norm"))


def tuned(out: Path, way: str) -> list[list[float]]:
    """(loss, gradient norm, entropy, accuracy) of four steps of TRL's SFTTrainer."""
    host = wearing().use("a")
    own = {**SAVING, **_mine(), "bf16": False, "padding_free": way == "flat"}
    t = sft(host, out, texts(32), letters(), **own)
    return _logged(t, host, way, ("loss", "grad_norm", "entropy", "mean_token_accuracy"))


def first_kind() -> float:
    """A packed loss under FSDP's first kind, each block wrapped."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    init_process_group("gloo")
    host = wearing().use("a")
    blocks = ModuleWrapPolicy({LlamaDecoderLayer})
    spread = FullyShardedDataParallel(
        host.model.train(), auto_wrap_policy=blocks, device_id="cpu", use_orig_params=True
    )
    try:
        with packed_forward(host):
            return float(spread(**pad(rows(2))).loss)
    finally:
        destroy_process_group()


def _mine() -> dict[str, int]:
    return {"per_device_train_batch_size": BATCH // int(os.environ.get("WORLD_SIZE", 1))}


def _logged(t: Any, host: Any, way: str, names: tuple[str, ...]) -> list[list[float]]:
    with contextlib.nullcontext() if way == "plain" else packed_forward(host):
        t.train()
    kind = "FSDP" if getattr(t.args, "fsdp", None) else "DistributedDataParallel"
    assert type(t.model_wrapped).__name__.startswith(kind) or "WORLD_SIZE" not in os.environ
    return [[line[n] for n in names] for line in t.state.log_history if "loss" in line]


def _fsdp_on_cpus() -> None:
    """accelerate shards over GPUs only, and replicates on CPUs without a word: let it shard here too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = sharding


if __name__ == "__main__":
    made = run(Path(sys.argv[1]), "flat", {})
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "logged.json").write_text(json.dumps(made))
