"""What a training run by semantic distance is told: section `know` of `inlay train`'s settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from inlay.core.errors import InlayError
from inlay.train.settings import TrainSettings

Filter = Literal["none", "features", "distances", "band"]
Signal = Literal["none", "static", "dynamic", "deviation", "confidence"]
Control = Literal["none", "random", "lowest-distance", "loss-ranked", "no-unknown", "shuffled", "lr-matched"]
FILTER_CONTROLS = ("random", "lowest-distance", "loss-ranked", "no-unknown")
"""Controls that choose as many items as the filter would, for another reason."""
WEIGHT_CONTROLS = ("shuffled", "lr-matched")
"""Controls that keep the weights' sizes and take away what they mean. (`signal: confidence` is one more.)"""
CANDIDATES = (0.0, -1.0, 1.0, -2.0)
"""What `beta: auto` tries, the mildest first: of equals the first is taken."""


@dataclass(frozen=True, kw_only=True)
class KnowSettings:
    """Knowledge items, and training that looks at their semantic distance (docs/knowledge.md)."""

    items: Path | None = None
    """A JSON-lines file of knowledge items: those of split `train` are taught, in place of a task or train_file."""
    table: Path | None = None
    """The folder that `inlay know measure` made of these items on this base: distances and features."""
    filter: Filter = "none"
    """Teach a share of the items: near ones of spread `features`, or of spread `distances`, or the middle `band`."""
    keep: float = 0.8
    """Share of the items that the filter keeps. Choose it on validation items."""
    lam: float = 1.0
    """How much the filter's spread or variance counts against distance."""
    keep_per_relation: int = 0
    """At least so many items of each relation stay."""
    signal: Signal = "none"
    """What weighs an item in the loss: its distance before training (`static`), its soft distance in this step
    (`dynamic`), how much that has grown (`deviation`), or, as a control, how unsure the model is (`confidence`)."""
    beta: float | Literal["auto"] = 1.0
    """Weights are exp(beta x signal), of mean 1: above 0 far items weigh more, below 0 near ones; 0 is the plain loss.
    Choose it on validation (-2, -1, 0, 1); `auto` trains once with each and takes the best on `val_size` items asked by
    a paraphrase."""
    beta_end: float | None = None
    """Move beta to this value over the run, linearly."""
    kappa: float = 5.0
    """Weights stay between 1/kappa and kappa before they are brought to mean 1."""
    exact: bool = False
    """Where the signal is not static, bring weights to mean 1 over the very batch, for one more forward a step, instead
    of by a running mean of earlier steps."""
    gamma: float = 0.0
    """Add gamma times the mean soft distance to the loss. Another mechanism than weights; report it as such."""
    reduction: Literal["auto", "token", "item"] = "auto"
    """Mean over learned tokens, or over items of their means; `auto` is items where there are weights."""
    control: Control = "none"
    """Put a control in the place of the remedy: for a filter `random`, `lowest-distance`, `loss-ranked` (lowest loss of
    the base) or `no-unknown` (SLiCK's Unknown leave first); for weights `shuffled` among the items of a batch, or
    `lr-matched` (all ones, the rate scaled as the weights would scale the loss)."""
    categories: Path | None = None
    """For `no-unknown`: a JSON file, an object of item id -> SLiCK category."""

    def __post_init__(self) -> None:
        beta = 0.0 if self.beta == "auto" else float(self.beta)
        if not 0 < self.keep <= 1:
            raise InlayError(f"keep is the share of items that stay, above 0 and at most 1, not {self.keep:g}")
        if min(self.lam, self.gamma, self.keep_per_relation) < 0:
            raise InlayError("lam, gamma and keep_per_relation must not be negative")
        if self.kappa < 1:
            raise InlayError(f"kappa must be 1 or more, not {self.kappa:g}")
        if max(abs(beta), abs(self.beta_end or 0.0)) > 100:
            raise InlayError("beta and beta_end must lie between -100 and 100; between -5 and 5 they make sense")
        if self.beta == "auto" and self.beta_end is not None:
            raise InlayError("beta auto and beta_end exclude each other: give beta a number to move from")
        if self.control in FILTER_CONTROLS and self.filter == "none":
            raise InlayError(f"control {self.control!r} stands in for a filter: say which one (filter: features)")
        if self.control in WEIGHT_CONTROLS and self.signal == "none":
            raise InlayError(f"control {self.control!r} stands in for weights: say which ones (signal: static)")
        if self.control == "no-unknown" and self.categories is None:
            raise InlayError("control 'no-unknown' needs categories, a JSON object of item id -> SLiCK category")
        if self.signal == "none" and (self.beta not in (1.0, "auto") or self.beta_end is not None or self.exact):
            raise InlayError("beta, beta_end and exact are of weights: say what they follow (signal: static)")
        if self.beta == "auto" and self.signal == "none":
            raise InlayError("beta auto needs a signal to weigh by (signal: static)")
        self._sources()

    def _sources(self) -> None:
        needs = [
            n for n, on in ((f"filter {self.filter}", self.filter != "none"), ("signal static", self.static)) if on
        ]
        if needs and (self.items is None or self.table is None):
            raise InlayError(f"{needs[0]} needs items and their table (`inlay know measure ITEMS` makes it)")
        if self.beta == "auto" and self.items is None:
            raise InlayError("beta auto needs items: it asks them by their paraphrases")

    @property
    def static(self) -> bool:
        """Whether weights are known before training."""
        return self.signal == "static"

    @property
    def weighs(self) -> bool:
        """Whether any weight may differ from 1."""
        return self.signal != "none" and (self.beta != 0 or bool(self.beta_end))

    @property
    def by_item(self) -> bool:
        """Whether the loss is a mean over items."""
        return self.reduction == "item" or (self.reduction == "auto" and self.weighs)


@dataclass(frozen=True, kw_only=True)
class KnowTrainSettings(TrainSettings):
    """One training run, complete, that may look at semantic distance."""

    know: KnowSettings = field(default_factory=KnowSettings)
    """Items, filter and weights by semantic distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.know.items is not None and (self.data.task or self.data.train_file or self.data.val_file):
            raise InlayError("items are taught in place of a task or file: leave task, train_file and val_file out")
        if self.know.beta == "auto" and not self.data.val_size:
            raise InlayError("beta auto needs val_size: so many taught items are asked by a paraphrase to choose it")
        if self.data.protocol == "published" and (self.know.signal != "none" or self.know.gamma):
            raise InlayError("signal and gamma look at answers, but protocol published learns prompts, too; take clean")
