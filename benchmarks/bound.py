"""What adapters cost on top of the frozen model: a step against the same forward and backward without any."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.bases import llama
from benchmarks.harness import Took, clock
from benchmarks.lengths import Row, computed, rows
from benchmarks.train import batches
from inlay.engine.pack import budget
from inlay.train.ways import Packed, Plain, Way

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

        self.host = inlay.attach(llama(size, dtype))
        for name, (method, settings) in METHODS.items():
            self.host.add(name, inlay.method(method).make(**settings), at="linear", seed=0)
        self.way = Packed(self.host, 0, budget(self.host))
        self.cut = batches(rows(kind, 32, self.host.model.config.vocab_size), 8)
        self.host.model.get_input_embeddings().register_forward_hook(self._leaf)
        self.bare = False

    def _leaf(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        return out.detach().requires_grad_() if self.bare else None

    def run(self, name: str | None) -> Took:
        """Time of all batches."""
        with self.way.active():
            return self._run(name, self.way)

    def plain(self) -> Took:
        """The same for the frozen model in padded batches, with logits in every column, as transformers computes it."""
        return self._run(None, Plain(self.host, 0, len(self.cut[0])))

    def _run(self, name: str | None, way: Way) -> Took:
        self.bare = name is None
        began = clock()
        with self.host.using(name):
            for batch in self.cut:
                for part in way.split(batch):
                    way.loss(part).backward()
        took = began.since()
        for p in self.host.parameters():
            p.grad = None
        return took


def gemm(dtype: str, config: Any, device: str = "cpu") -> dict[str, float]:
    """FLOP/s of this machine's matrix products, (1024 x hidden) (hidden x intermediate), in the libraries at hand."""
    from inlay.core.product import product

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    d, m = config.hidden_size, config.intermediate_size
    x, W = torch.randn(1024, d, dtype=kind, device=device), torch.randn(m, d, dtype=kind, device=device)
    found = {}
    for name, run in (("PyTorch's default", lambda: x @ W.T), ("ours", lambda: product(x, W))):
        times = []
        for _ in range(20):
            began = clock()
            run()
            times.append(began.since().wall)
        found[name] = 2 * 1024 * d * m / sorted(times)[5]
    return found


def told(rates: Mapping[str, float]) -> str:
    """The rates for people."""
    return "; ".join(f"products by {k}: {v / 1e9:.0f} GFLOP/s" for k, v in rates.items())


def work(config: Any, cut: Sequence[Sequence[Row]]) -> float:
    """FLOP that no step on a frozen LLaMA can avoid: forward and gradient of the input, 4 per linear weight and token;
    the head where a token is learned. What the examples of a batch begin with alike counts once. Attention's own
    products are left out, so the floor is a little low."""
    d, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    groups = config.num_key_value_heads / config.num_attention_heads  # keys and values are narrower under GQA
    tokens = sum(computed(batch) for batch in cut)
    learned = sum(label != -100 for batch in cut for r in batch for label in r.labels[1:])
    return 4.0 * layers * ((2 + 2 * groups) * d * d + 3 * d * m) * tokens + 4.0 * d * config.vocab_size * learned


def default_products() -> None:
    """Let this process multiply as PyTorch does by default: what is left is everything but the choice of library."""
    from inlay.core import processor

    os.environ[processor.VARIABLE] = "mkl"
    processor.product_library.cache_clear()
