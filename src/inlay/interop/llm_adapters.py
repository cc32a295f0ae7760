"""Folders of the LLM-Adapters fork: LoRA, series and parallel bottlenecks. Hu et al. 2023, arXiv:2304.01933.

A folder holds `adapter_config.json` and `adapter_model.bin`, a torch pickle of which only tensors are read. Prefix,
prompt and P-tuning folders are those of HF PEFT, which the fork grew from; BLOOM's prefix has the layout of that time
(`peft_vectors.bloom_before_2024`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.interop import peft
from inlay.interop.peft_folder import Found, Tensors, read_config, read_tensors
from inlay.interop.peft_row import Loaded, Row, need
from inlay.methods import method

INPUT = ("gate_proj", "up_proj", "dense_h_to_4h", "fc_in", "c_fc", "fc1")
OUTPUT = ("down_proj", "dense_4h_to_h", "fc_out", "c_proj", "fc2")
"""The fork's fixed table: a series adapter stands before the first kind of linear and after the second."""
ACTIVATIONS = {
    "tanh": "tanh",
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
"""Names of transformers' activations -> ours."""


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config has fields that HF PEFT has not (any more)."""
    return config.get("peft_type") == "BOTTLENECK" or "enable_lora" in config or "merge_weights" in config


def read(host: Host, folder: str | Path, name: str | None = None) -> str:
    """Hang an LLM-Adapters adapter on a host; `InlayError`, and an unchanged host, for what has no counterpart."""
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, "adapter_model.bin", "adapter_model.safetensors")
    if isinstance(targets := config.get("target_modules"), list):
        # The fork matches names by their plain ending: `proj` is every projection.
        config["target_modules"] = f".*({'|'.join(map(re.escape, targets))})"
    if config.get("peft_type") == "LORA":
        config["lora_dropout"] = config.get("lora_dropout") or 0.0
        tensors = unmerge(host, folder, config, tensors)
    return peft.load(host, folder, config, tensors, name, rows={**peft.BY_TYPE, "BOTTLENECK": ROW, "LORA": LORA})


def unmerge(host: Host, folder: Path, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A LoRA over enabled thirds of a fused projection as one LoRA of the whole of it.

    The fork's thirds are contiguous. In BLOOM and GPT-NeoX the projection is interleaved per head, so there the thirds
    are not q, k and v, whatever the config says: such a file is refused.
    """
    enabled = config.get("enable_lora")
    if not enabled:
        return tensors
    made: Tensors = {}
    for key, B in tensors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        stem = key.removesuffix("lora_B.weight")
        path = stem.removeprefix(peft.PREFIX).rstrip(".")
        parts = [s.part for s in host.anatomy.spots if s.path == path and s.part is not None]
        if not parts or any(p.groups != 1 for p in parts):
            raise InlayError(
                f"{folder}: enable_lora={enabled} adapts contiguous thirds of {path}, but {host.anatomy.family} "
                "does not lay q, k and v out so: the adapter never did what its config says (a fault of the fork). "
                "Train it again"
            )
        if sum(enabled) != 2 or len(enabled) != 3 or B.dim() != 3 or f"{stem}lora_A.weight" not in tensors:
            raise InlayError(
                f"{folder}: enable_lora={enabled} at {path} is not two of three thirds, the only form the fork ran"
            )
        r, third = B.shape[1], B.shape[0] // 2
        whole = torch.zeros(3 * third, 2 * r)
        for i, slot in enumerate(s for s, on in enumerate(enabled) if on):
            whole[slot * third : (slot + 1) * third, i * r : (i + 1) * r] = B[i * third : (i + 1) * third, :, 0]
        made |= {f"{stem}lora_A.weight": tensors[f"{stem}lora_A.weight"], key: whole}
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "enable_lora": None}
    return made | {k: v for k, v in tensors.items() if k not in made}


def load_bottleneck(found: Found) -> Loaded:
    """No biases, no norm; wired by the module's name, or all parallel."""
    learned = found.setting("scaling", 1.0) == "learned"
    need(found, {"D", "U", "s"} if learned else {"D", "U"})
    size = found.setting("bottleneck_size")
    if widths := {t["D"].shape[0] for t in found.places.values()} - {size}:
        raise found.error(f"adapter_down has width {widths.pop()}, but bottleneck_size is {size}")
    activation = found.setting("non_linearity", "tanh")
    if str(activation).lower() not in ACTIVATIONS:
        raise unknown("non_linearity", activation, ACTIVATIONS, f"It stands in {found.folder}.")
    edit = method("series").make(
        size=size,
        activation=ACTIVATIONS[activation.lower()],
        dropout=found.setting("adapter_dropout", 0.0),
        scale=1.0 if learned else float(found.setting("scaling", 1.0)),
        learned_scale=learned,
    )
    parallel = bool(found.setting("use_parallel_adapter"))
    at = [f"{path}:{'parallel' if parallel else wiring(found, path)}" for path in found.places]

    def here(path: str, t: Tensors) -> dict[str, Tensor]:
        return {k: v.flatten() if k == "s" else v for k, v in t.items()}

    return Loaded(edit, here=here, at=at)


def wiring(found: Found, path: str) -> str:
    """Where the fork puts a series adapter at this module."""
    last = path.rsplit(".", 1)[-1]
    if last not in INPUT + OUTPUT:
        raise found.error(f"the fork has no series wiring for {last!r}; it knows {', '.join(INPUT + OUTPUT)}")
    return "input" if last in INPUT else "output"


BASE = peft.BY_TYPE["LORA"]
LORA = replace(BASE, fields=BASE.fields | {"enable_lora", "merge_weights"}, layers=("linear", "conv1d"))
ROW = Row(
    type="BOTTLENECK",
    kinds=(),
    layers=("linear",),
    load=load_bottleneck,
    dump=BASE.dump,
    names={"adapter_down.weight": "D", "adapter_up.weight": "U", "adapter_scaling": "s"},
    fields=frozenset(
        "bottleneck_size non_linearity adapter_dropout scaling use_parallel_adapter use_adapterp init_weights "
        "merge_weights".split()
    ),
)
