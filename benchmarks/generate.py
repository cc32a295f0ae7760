"""Generation on real math prompts: 8 slots against transformers' `generate` in batches of 8 and one at a time.

A base of random weights does not end its texts, so each ends at the length of the real answer: by a limit per prompt
here, by a stopping criterion per row there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama
from benchmarks.choice import FRAME

FILES = ("gsm8k", "SVAMP")
"""Test files with worked answers, long and short."""


class Generation:
    """Prompts of two test files; the base wears nothing."""

    def __init__(self, data: Path, count: int, size: str):
        import inlay
        from inlay.models.base import load_base

        self.tokenizer = load_base("tiny-llama")[1]
        self.tokenizer.eos_token = None
        self.model = llama(size).eval()
        self.model.config.eos_token_id = self.model.generation_config.eos_token_id = None
        self.host = inlay.attach(self.model)
        records = [r for name in FILES for r in json.loads((data / name / "test.json").read_text())]
        chosen = random.Random(0).sample(records, count)
        self.ids = [[1, *self._ids(FRAME.format(r["instruction"]))] for r in chosen]
        self.limits = [len(self._ids(r["output"])) for r in chosen]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ours(self) -> list[list[int]]:
        """`inlay.evaluate.generate`, 8 slots."""
        from inlay.evaluate import GenerateSettings, generate

        settings = GenerateSettings(max_new_tokens=max(self.limits), batch_size=8)
        made = generate(self.host, self.tokenizer, self.ids, None, settings, limits=self.limits)
        return [list(g.tokens) for g in made]

    def peer(self, batch: int) -> list[list[int]]:
        """transformers' generate on left-padded batches in the given order; a finished row waits for its batch."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        found: list[list[int]] = []
        for at in range(0, len(self.ids), batch):
            rows, limits = self.ids[at : at + batch], torch.tensor(self.limits[at : at + batch])
            wide = max(map(len, rows))

            class Ended(StoppingCriteria):
                def __call__(self, ids: Any, scores: Any, limits=limits, wide=wide, **kwargs: Any) -> torch.Tensor:
                    return (ids.shape[1] - wide) >= limits

            with torch.no_grad():
                out = self.model.generate(
                    input_ids=torch.tensor([[0] * (wide - len(r)) + r for r in rows]),
                    attention_mask=torch.tensor([[0] * (wide - len(r)) + [1] * len(r) for r in rows]),
                    max_new_tokens=int(limits.max()),
                    do_sample=False,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([Ended()]),
                )
            found += [row[:n] for row, n in zip(out[:, wide:].tolist(), limits.tolist(), strict=True)]
        return found

    def agree(self) -> str:
        """How many texts are the same, with lengths; RuntimeError if more than a tie in the logits differs."""
        ours, peer = self.ours(), self.peer(8)
        same = sum(a == b for a, b in zip(ours, peer, strict=True))
        if same < 0.95 * len(ours):
            raise RuntimeError(f"only {same} of {len(ours)} texts agree")
        lengths = sorted(self.limits)
        median = lengths[len(lengths) // 2]
        return f"{same} of {len(ours)} texts equal; {lengths[0]} to {lengths[-1]} tokens, median {median}"
