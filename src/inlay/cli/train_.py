"""`inlay train`: from a base, a method and a task to a saved adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from inlay.cli.verbs import Verb
from inlay.knowledge.settings import KnowSettings, KnowTrainSettings
from inlay.threads import ThreadSettings
from inlay.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainFlags(KnowTrainSettings, ThreadSettings):
    """A training run, and what to do with one that is already there."""

    resume: bool = False
    """Go on from the last checkpoint in the run folder; begin if there is none."""
    overwrite: bool = False
    """Replace the run in that folder."""


def run(s: TrainFlags) -> None:
    """Train, and say where the adapter is."""
    from rich.console import Console
    from rich.markup import escape

    from inlay.cli.quiet import quiet

    quiet()
    from inlay.train.ranks import rank

    # A run that does not look at distances is recorded as one that cannot.
    plain = s.know == KnowSettings()
    kind = TrainSettings if plain else KnowTrainSettings
    settings = kind(**{f.name: getattr(s, f.name) for f in dataclasses.fields(kind)})
    if plain:
        from inlay.train import train
    else:
        from inlay.knowledge.training import train  # type: ignore[assignment]
    result = train(settings, resume=s.resume, overwrite=s.overwrite)
    if rank():
        return
    out = Console(highlight=False)
    best = (
        f"; best validation loss {result.val_loss:.4f}, step {result.best_step}" if result.val_loss is not None else ""
    )
    out.print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s; loss {result.loss:.4f}{best}")
    out.print(f"adapter ({result.final}): [bold]{escape(str(result.adapter))}[/]", soft_wrap=True)


VERB = Verb(
    "train",
    "Train one adapter on one base; the run folder records all that is needed to repeat it.",
    TrainFlags,
    run,
    (
        "inlay train --model tiny-llama --task world-arith --method lora --rank 8 --steps 200 --out runs/lora",
        "inlay train --recipe llama-7b-lora-math --train-file math_10k.json",
        "inlay train --recipe my.yaml --resume",
        "inlay train --model base --items facts.jsonl --table table --filter features --keep 0.7 --out runs/filtered",
        "inlay train --model base --items facts.jsonl --signal dynamic --beta auto --val-size 50 --out runs/weighed",
    ),
)
