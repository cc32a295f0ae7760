"""Prompt templates: three published strings that differ from one another, and one clean template for every use.

Published: LLM-Adapters' `finetune.py`, `evaluate.py` and `generate.py`. Training, evaluation and demo differ in
trailing blanks, and the first two indent every line by 16 blanks (of a multi-line instruction, the first line only).
All blanks below are meant.
"""

from __future__ import annotations

from dataclasses import dataclass

from inlay.tasks.task import Record

_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PAIR = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_PAD = " " * 16
RESPONSE = "### Response:"
"""What every template writes before the answer."""


@dataclass(frozen=True)
class Template:
    """Text before the answer, with and without an input; the answer follows it directly."""

    name: str
    """How the template is called in manifests and errors."""
    bare: str
    """Prompt of a record without input; holds `{instruction}`."""
    paired: str
    """Prompt of a record with input; holds `{instruction}` and `{input}`."""

    def prompt(self, record: Record) -> str:
        """The text that is given to the model. Braces inside the record stay as they are."""
        if record.input:
            before, _, rest = self.paired.partition("{instruction}")
            middle, _, after = rest.partition("{input}")
            return before + record.instruction + middle + record.input + after
        before, _, after = self.bare.partition("{instruction}")
        return before + record.instruction + after

    def render(self, record: Record) -> tuple[str, str]:
        """(prompt, answer): the text given, and the text learned (`record.output`)."""
        return self.prompt(record), record.output


PUBLISHED_TRAIN = Template(
    "published-train",
    f"{_TASK}  \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n{_PAD}{RESPONSE}\n{_PAD}",
    f"{_PAIR} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n"
    f"{_PAD}### Input:\n{_PAD}{{input}}\n{_PAD}\n{_PAD}{RESPONSE}\n{_PAD}",
)
PUBLISHED_EVAL = Template(
    "published-eval",
    f"{_TASK} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n{_PAD}{RESPONSE}\n{_PAD}",
    f"{_PAIR}\n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n"
    f"{_PAD}### Input:\n{_PAD}{{input}}\n\n{_PAD}{RESPONSE}\n{_PAD}",
)
PUBLISHED_DEMO = Template(
    "published-demo",
    f"{_TASK}  \n\n### Instruction:\n{{instruction}}\n\n{RESPONSE}\n",
    f"{_PAIR} \n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{RESPONSE}\n",
)
CLEAN = Template(
    "clean",
    f"### Instruction:\n{{instruction}}\n\n{RESPONSE}\n",
    f"### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{RESPONSE}\n",
)
"""Ours: short, the same in training, evaluation and serving, no blank that could change the answer's first token."""
