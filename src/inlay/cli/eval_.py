"""`inlay eval`: a base and its adapters on tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.evaluate.settings import EvalSettings


def run(s: EvalSettings) -> None:
    """Evaluate, print the table, leave generations and report in a folder."""
    from inlay.cli.quiet import quiet

    quiet()
    from inlay.evaluate import settings
    from inlay.train.bar import note

    try:
        settings.run(s)
    except KeyboardInterrupt:
        note(f"what is done is in {s.out}; the same command goes on from there")
        raise


VERB = Verb(
    "eval",
    "Score a base and its adapters on tasks, all adapters in the same batches.",
    "inlay.evaluate.settings:EvalSettings",
    run,
    (
        "inlay eval --model tiny-llama --adapters runs/lora/adapter --bare --tasks world-arith --limit 100",
        "inlay eval --model llama-dir --adapters runs/math/adapter --data llm_adapters --protocol published",
        "inlay eval --model tiny-llama --adapters runs/choice/adapter --tasks world-boolq --how options",
    ),
)
