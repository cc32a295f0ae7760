"""Generation on real math prompts with the embedded base, whose answers end where they end: 8 slots against
transformers' `generate` in batches of 8 and one at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from benchmarks.choice import FRAME

NEW = 64
FILES = ("AddSub", "MultiArith", "SingleEq", "SVAMP")


class Generation:
    """Prompts of four test files; the base wears nothing."""

    def __init__(self, data: Path, count: int):
        import inlay
        from inlay.models.base import load_base

        self.model, self.tokenizer = load_base("tiny-llama")
        self.host = inlay.attach(self.model)
        records = [r for name in FILES for r in json.loads((data / name / "test.json").read_text())]
        chosen = random.Random(0).sample(records, count)
        self.ids = [list(self.tokenizer(FRAME.format(r["instruction"]))["input_ids"]) for r in chosen]

    def ours(self) -> list[list[int]]:
        """`inlay.evaluate.generate`, 8 slots."""
        from inlay.evaluate import generate
        from inlay.evaluate.decode import GenerateSettings

        settings = GenerateSettings(max_new_tokens=NEW, batch_size=8)
        return [list(g.tokens) for g in generate(self.host, self.tokenizer, self.ids, None, settings)]

    def peer(self, batch: int) -> list[list[int]]:
        """transformers' generate on left-padded batches."""
        found: list[list[int]] = []
        end = self.tokenizer.eos_token_id
        for at in range(0, len(self.ids), batch):
            rows = self.ids[at : at + batch]
            wide = max(map(len, rows))
            ids = torch.tensor([[end] * (wide - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (wide - len(r)) + [1] * len(r) for r in rows])
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=end
                )
            for row in out[:, wide:].tolist():
                found.append(row[: row.index(end) + 1] if end in row else row)
        return found

    def agree(self) -> str:
        """How many texts are the same, with lengths; RuntimeError if many differ (ties in the logits may)."""
        ours, peer = self.ours(), self.peer(8)
        end = self.tokenizer.eos_token_id
        same = sum([t for t in a if t != end] == [t for t in b if t != end] for a, b in zip(ours, peer, strict=True))
        if same < 0.98 * len(ours):
            raise RuntimeError(f"only {same} of {len(ours)} texts agree")
        lengths = sorted(map(len, peer))
        median = lengths[len(lengths) // 2]
        return f"{same} of {len(ours)} texts equal; {lengths[0]} to {lengths[-1]} tokens, median {median}"
