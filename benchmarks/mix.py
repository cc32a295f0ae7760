"""Many adapters in one batch: a step of decoding and a prefill, over the bare model, PEFT, and LoRA by `torch.bmm`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import inlay
from benchmarks.bases import ALL_LINEARS, llama
from benchmarks.harness import Took, clock
from inlay.core.host import Host
from inlay.evaluate import slots

CONTEXT = 128
UNLIKE = ("lora", "road1", "dora", "ia3", "series", "parallel", "adalora", "road4")
"""Eight methods, four adapters each."""
SMALL: dict[str, dict[str, int]] = {
    "lora": {"rank": 8},
    "dora": {"rank": 8},
    "series": {"size": 32},
    "parallel": {"size": 32},
}


def prompts(model: Any, rows: int) -> Tensor:
    """Ids (B, T) that every side is given."""
    return torch.randint(3, model.config.vocab_size, (rows, CONTEXT), generator=torch.Generator().manual_seed(1))


class Decoder:
    """A model at a context of 128 tokens, and steps from there: none of them is kept."""

    def __init__(self, model: Any, rows: int, forward: Callable[..., Any] | None = None):
        self.model, self.forward = model, forward or model
        self.prompt = prompts(model, rows)
        self.token = self.prompt[:, :1]
        self.cache: DynamicCache | None = None

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits of the prompts' next tokens."""
        self.cache = DynamicCache(config=self.model.config)
        return self.forward(input_ids=self.prompt, past_key_values=self.cache, logits_to_keep=1).logits

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, V) after the prompt and one token."""
        self.prefill()
        assert self.cache is not None
        said: Tensor = self.forward(input_ids=self.token, past_key_values=self.cache).logits[:, -1]
        self.cache.crop(-1)
        return said

    @torch.no_grad()
    def steps(self, number: int) -> Took:
        """Time of so many steps."""
        if self.cache is None:
            self.prefill()
        assert self.cache is not None
        spent = Took(0.0, 0.0)
        for _ in range(number):
            began = clock()
            self.forward(input_ids=self.token, past_key_values=self.cache)
            took = began.since()
            spent = Took(spent.wall + took.wall, spent.cpu + took.cpu)
            self.cache.crop(-1)
        return spent


def shelved(size: str, wanted: Sequence[tuple[str, int]]) -> tuple[Host, list[str]]:
    """A host with so many adapters of each method on its shelf, at the method's usual places (LoRA's: all linears)."""
    donor, host = (inlay.attach(llama(size).eval()) for _ in range(2))
    names = []
    for method, number in wanted:
        row = inlay.method(method)
        edit = row.make(**SMALL.get(method, {}))
        donor.add(method, edit, at="linear" if row.places.startswith("q,k,v") else row.places, seed=0)
        at, tensors = donor.placement(method), donor.tensors(method)
        for i in range(number):
            torch.manual_seed(i)
            moved = {k: t.detach() + 0.02 * torch.randn_like(t) for k, t in tensors.items()}
            host.shelve(f"{method}-{i}", edit, at, moved)
            names.append(f"{method}-{i}")
    return host, names


class Worn(Decoder):
    """A plan on a host."""

    def __init__(self, host: Host, plan: Sequence[str]):
        super().__init__(host.model, len(plan))
        self.host, self.plan = host, plan

    def prefill(self) -> Tensor:
        with self.host.steady(), self.host.using(*self.plan):
            return super().prefill()

    def steps(self, number: int) -> Took:
        with self.host.steady(), self.host.using(*self.plan):
            return super().steps(number)


class Slotted:
    """The same in the slots that `inlay.evaluate.generate` decodes in; without a name, a row wears nothing."""

    def __init__(self, host: Host, plan: Sequence[str | None]):
        prompt = prompts(host.model, len(plan))
        self.host, self.plan, self.token = host, plan, prompt[:, 0]
        self.cache = slots.Slots(host, len(plan), 2 * CONTEXT)
        with self._decoding():
            self.cache.begin(range(len(plan)), prompt.tolist(), [() if n is None else (n,) for n in plan])
        while not self.cache.due:
            self.steps(8)

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        with torch.no_grad(), self.host.steady(), self.host.using(*self.plan), self.cache.attending():
            yield

    def logits(self) -> Tensor:
        """(B, V) after the prompt and one token."""
        with self._decoding():
            return self._step()

    def steps(self, number: int) -> Took:
        """Time of so many steps."""
        with self._decoding():
            self._step()
            began = clock()
            for _ in range(number):
                self._step()
            return began.since()

    def _step(self) -> Tensor:
        self.cache.length = [CONTEXT] * len(self.plan)
        return self.cache.step(self.token)


def with_peft(size: str, adapters: int, rows: int) -> Callable[..., Any]:
    """PEFT's own way: `adapter_names`, one a row."""
    import peft as hf

    config = hf.LoraConfig(r=8, lora_alpha=8, target_modules=ALL_LINEARS, init_lora_weights=False)
    model = hf.get_peft_model(llama(size).eval(), config, "a0").eval()
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i * adapters // rows}" for i in range(rows)]

    def forward(**inputs: Any) -> Any:
        return model(adapter_names=names, **inputs)

    return forward


class Bmm(nn.Module):
    """A linear with a LoRA of its own for each row, by two batched products (the RoAd paper's baseline)."""

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__()
        self.layer = layer
        self.A = torch.randn(rows, layer.in_features, 8) * 0.02
        self.B = torch.randn(rows, 8, layer.out_features) * 0.02

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.bmm(torch.bmm(x, self.A), self.B)


def with_bmm(size: str, rows: int) -> Host:
    """A model whose linears all are `Bmm`; nothing of ours hangs on it."""
    model = llama(size).eval()
    for path, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and path != "lm_head":
            model.set_submodule(path, Bmm(m, rows))
    return inlay.attach(model)
