"""LoRA on expert parameters: Inlay's products, its slow way (effective weights), and PEFT's `target_parameters`.

    python -m benchmarks.experts [--experts 8] [--intermediate 512] [--steps 7]

One random Mixtral (hidden 256, 4 layers, float32), one batch, rank 8 at `experts`, one forward and backward a step.
Steps are interleaved in one process, and CPU seconds are counted beside seconds; peak memory is that of a process of
its own above one that loads the same and takes no step.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import own_peak, rounds

SIDES = ("products", "slow", "peft")
RANK = 8


def base(experts: int, intermediate: int):
    """A Mixtral of this size."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=experts,
    )
    return AutoModelForCausalLM.from_config(config)


def batch() -> dict[str, Tensor]:
    """4 rows of 256 tokens."""
    ids = torch.randint(3, 1000, (4, 256), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


class _Always(collections.UserDict):
    """A record of trials in which every module failed."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> str:
        return "asked for"


def side(name: str, experts: int, intermediate: int) -> Callable[[], float]:
    """One step of one side: the loss, gradients left behind."""
    model = base(experts, intermediate)
    model.config.use_cache = False
    if name == "peft":
        import peft

        targets = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=targets)
        model = peft.get_peft_model(model, config)
    else:
        import inlay
        from inlay.core import expert_site

        host = inlay.attach(model)
        host.add("a", inlay.method("lora").make(rank=RANK, alpha=16.0), at="experts", seed=0).use("a")
        if name == "slow":
            expert_site._TRIED[host] = _Always()  # type: ignore[assignment]
    model.train()
    inputs = batch()

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def peak(name: str, experts: int, intermediate: int, steps: int) -> float:
    """Peak memory in MiB of a process that takes so many steps."""
    command = [sys.executable, "-m", "benchmarks.experts", "--side", name, "--steps", str(steps)]
    command += ["--experts", str(experts), "--intermediate", str(intermediate)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--side", choices=SIDES)
    asked = parser.parse_args()
    size = asked.experts, asked.intermediate
    if asked.side:
        step = side(asked.side, *size)
        for _ in range(asked.steps):
            step()
        print(own_peak())
        return
    steps = {name: side(name, *size) for name in SIDES}
    losses = {name: step() for name, step in steps.items()}
    took = rounds(steps, asked.steps)
    memory = {name: peak(name, *size, 3) - peak(name, *size, 0) for name in SIDES}
    found = {
        name: {
            "loss": losses[name],
            "seconds": round(statistics.median(t.wall for t in took[name]), 4),
            "cpu_seconds": round(statistics.median(t.cpu for t in took[name]), 4),
            "MiB": round(memory[name]),
        }
        for name in SIDES
    }
    print(json.dumps({"experts": size[0], "intermediate": size[1], "threads": torch.get_num_threads(), **found}))


if __name__ == "__main__":
    main()
