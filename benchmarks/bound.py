"""What adapters cost on top of the frozen model: a step against the same forward and backward without any."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.bases import llama
from benchmarks.lengths import rows
from benchmarks.train import batches

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 8, "alpha": 16.0}),
    "dora": ("dora", {"rank": 8, "alpha": 16.0}),
    "road1": ("road1", {}),
    "series": ("series", {"size": 64}),
}


class Steps:
    """Forward and backward of packed batches, wearing an adapter or none (the input then asks for a gradient)."""

    def __init__(self, size: str, dtype: str, kind: str):
        import inlay
        from inlay.train.ways import Packed

        self.host = inlay.attach(llama(size, dtype))
        for name, (method, settings) in METHODS.items():
            self.host.add(name, inlay.method(method).make(**settings), at="linear", seed=0)
        self.way = Packed(self.host, 0, 1024)
        self.cut = batches(rows(kind, 32, self.host.model.config.vocab_size), 8)
        self.host.model.get_input_embeddings().register_forward_hook(self._leaf)
        self.bare = False

    def _leaf(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        return out.detach().requires_grad_() if self.bare else None

    def run(self, name: str | None) -> float:
        """Seconds of all batches."""
        self.bare = name is None
        began = time.perf_counter()
        with self.host.using(name), self.way.active():
            for batch in self.cut:
                for part in self.way.split(batch):
                    self.way.loss(part).backward()
        seconds = time.perf_counter() - began
        for p in self.host.parameters():
            p.grad = None
        return seconds


def gemm(dtype: str, threads: int) -> dict[str, float]:
    """GFLOP/s of this machine's matrix products in the libraries at hand, (1024 x 512) (512 x 1408)."""
    from inlay.core.product import product

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    x, W = torch.randn(1024, 512, dtype=kind), torch.randn(1408, 512, dtype=kind)
    found = {}
    for name, run in (("default", lambda: x @ W.T), ("ours", lambda: product(x, W))):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        found[name] = round(2 * 1024 * 512 * 1408 / sorted(times)[5] / 1e9, 1)
    return found
