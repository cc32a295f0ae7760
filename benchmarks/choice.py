"""Multiple choice on real questions: trees of options against lm-evaluation-harness and one forward per option."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama

FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


class Choice:
    """Questions of one file, with prompts and options as ids.

    form `adapter`: LLM-Adapters' prompt and "the correct answer is answer1"; `text`: the harness's own style, the
    question followed by what the options say.
    """

    def __init__(self, data: Path, name: str, form: str, count: int, size: str):
        import inlay
        from inlay.models.base import load_base

        self.tokenizer = load_base("tiny-llama")[1]
        self.model = llama(size).eval()
        self.host = inlay.attach(self.model)
        records = random.Random(0).sample(json.loads((data / name / "test.json").read_text()), count)
        self.prompts: list[list[int]] = []
        self.options: list[list[list[int]]] = []
        for r in records:
            prompt, options = _texts(r["instruction"], form)
            self.prompts.append([1, *self._ids(prompt)])
            self.options.append([self._ids(o) for o in options])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ours(self) -> list[float]:
        """`inlay.evaluate.option_scores`."""
        from inlay.evaluate import option_scores

        return [s for own in option_scores(self.host, self.tokenizer, self.prompts, self.options) for s in own]

    def one_by_one(self) -> list[float]:
        """A forward for every option."""
        found = []
        with torch.no_grad():
            for prompt, own in zip(self.prompts, self.options, strict=True):
                for option in own:
                    logits = self.model(torch.tensor([prompt + option[:-1]]), use_cache=False).logits
                    scores = logits[0, len(prompt) - 1 :].log_softmax(-1)
                    found.append(float(scores.gather(1, torch.tensor(option)[:, None]).sum()))
        return found

    def harness(self) -> list[float]:
        """lm_eval's HFLM, batches of 16."""
        logging.disable(logging.WARNING)
        from lm_eval.models.huggingface import HFLM

        if not hasattr(self, "_hflm"):
            self._hflm: Any = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=16)
        asked = [(("", ""), p, o) for p, own in zip(self.prompts, self.options, strict=True) for o in own]
        return [score for score, _ in self._hflm._loglikelihood_tokens(asked, disable_tqdm=True)]

    def agree(self) -> str:
        """Largest difference of scores; RuntimeError if it is not small."""
        ours, harness, alone = self.ours(), self.harness(), self.one_by_one()
        worst = max(max(abs(a - b), abs(a - c)) for a, b, c in zip(ours, harness, alone, strict=True))
        if worst > 1e-4:
            raise RuntimeError(f"scores differ by {worst}")
        return f"scores of {len(ours)} options agree to {worst:.0e}"


def _texts(instruction: str, form: str) -> tuple[str, list[str]]:
    if form == "text":
        question = instruction.split("question: ", 1)[1].split("\n\nAnswer1")[0]
        options = re.findall(r"Answer\d: (.*?)(?= Answer\d:|\n\nAnswer format)", instruction, re.S)
        return f"Question: {question}\nAnswer:", [f" {o.strip()}" for o in options]
    names = (
        instruction.split("Answer format: ")[1].split("/") if "Answer format: " in instruction else ["true", "false"]
    )
    return FRAME.format(instruction), [f"the correct answer is {n.strip()}" for n in names]
