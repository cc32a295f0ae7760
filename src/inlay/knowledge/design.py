"""The plan of a study on the toy world: which runs there are, and what each condition does to a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.errors import InlayError, unknown
from inlay.knowledge.select import select_subset
from inlay.methods import method
from inlay.threads import ThreadSettings

if TYPE_CHECKING:
    from inlay.knowledge.settings import KnowSettings

REGIMES = ("edits", "new people", "random pairs")
"""Known facts with other answers; facts about people the base has not met; answers that mean nothing."""
METHODS = (
    "lora:rank=4",
    "lora:rank=1",
    "lora:rank=16",
    "series:size=16",
    "parallel:size=16",
    "prefix:tokens=8",
    "ia3",
    "road2",
)
"""Methods with their settings, as `name:setting=value,...`."""
RATES: dict[str, tuple[float, ...]] = {
    "prefix": (3e-2, 1e-1),
    "ia3": (3e-2, 1e-1),
    "road2": (1e-2, 3e-2),
    "series": (3e-2, 1e-1),
    "parallel": (3e-3, 1e-2),
}
"""Learning rates that are tried on validation items; those of `lora` for the rest."""
LORA_RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Condition:
    """What is done to a run beside plain training."""

    name: str
    kind: str
    """`plain`, `filter` or `weights`."""
    remedy: bool = False
    subset: str = ""
    """For a filter: a reading of it, or a control (`inlay.knowledge.controls`)."""
    know: tuple[tuple[str, Any], ...] = ()
    """For weights: fields of `KnowSettings`."""

    def keep(self, measured: dict[str, np.ndarray], share: float, seed: int) -> np.ndarray:
        """Mask (N,) of what is trained.

        Args:
            measured: `tsd` and `features` of the items; `loss` (of the base) and SLiCK's `categories`, where the
                condition ranks by them.
        """
        from inlay.knowledge.controls import control_subset
        from inlay.knowledge.settings import FILTER_CONTROLS

        d = measured["tsd"]
        if not self.subset:
            return np.ones(len(d), bool)
        if self.subset in FILTER_CONTROLS:
            known = measured.get("categories")
            more: dict[str, Any] = {
                "losses": measured.get("loss"),
                "categories": None if known is None else known.tolist(),
            }
            made = control_subset(self.subset, d, keep=share, seed=(seed, 30), **more)
        else:
            made = select_subset(d, measured["features"], share, 1.0, self.subset)  # type: ignore[arg-type]
        mask = np.zeros(len(d), bool)
        mask[made.kept] = True
        return mask

    def settings(self) -> KnowSettings | None:
        """Of the weighted loss; None for the plain one."""
        from inlay.knowledge.settings import KnowSettings

        if not self.know:
            return None
        here = Path("in-memory")  # static distances are given directly
        return KnowSettings(items=here, table=here, **dict(self.know))


def _weights(name: str, remedy: bool = False, **know: Any) -> Condition:
    return Condition(name, "weights", remedy, know=tuple(know.items()))


CONDITIONS: dict[str, Condition] = {
    c.name: c
    for c in (
        Condition("uniform", "weights"),
        _weights("beta -2", True, signal="dynamic", beta=-2.0),
        _weights("beta +2", True, signal="dynamic", beta=2.0),
        _weights("beta -2 to +2", True, signal="dynamic", beta=-2.0, beta_end=2.0),
        _weights("static beta -2", True, signal="static", beta=-2.0),
        _weights("static beta +2", True, signal="static", beta=2.0),
        _weights("confidence -2", signal="confidence", beta=-2.0),
        _weights("shuffled -2", signal="dynamic", beta=-2.0, control="shuffled"),
        _weights("lr-matched -2", signal="dynamic", beta=-2.0, control="lr-matched"),
        _weights("gamma 1", signal="none", gamma=1.0),
        Condition("random subset", "filter", subset="random"),
        Condition("filter A: near and spread features", "filter", True, "features"),
        Condition("filter B: near and spread distances", "filter", True, "distances"),
        Condition("filter C: middle band", "filter", True, "band"),
        Condition("lowest distance", "filter", subset="lowest-distance"),
        Condition("lowest loss", "filter", subset="loss-ranked"),
    )
}
"""Remedies and controls by name, all of which a study has unless told otherwise."""
BY_NAME = {c.name: c for c in (Condition("no unknown", "filter", subset="no-unknown"),)}
"""Controls that are run when asked for: SLiCK's Unknown leave first. All edits of the toy world are Unknown to its
base: there is nothing to compare. Of new people it guesses some."""
PLAIN = Condition("plain", "plain")
AGAINST = {"weights": "uniform", "filter": "random subset"}


def condition(name: str) -> Condition:
    """A condition by its name."""
    there = {"plain": PLAIN, **CONDITIONS, **BY_NAME}
    if name not in there:
        raise unknown("condition", name, there)
    return there[name]


def method_of(spec: str) -> tuple[str, dict[str, Any]]:
    """`lora:rank=4` -> ("lora", {"rank": 4}). Raises InlayError for what is no method or setting."""
    name, _, rest = spec.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    if any(not eq for _, eq, _ in pairs):
        raise InlayError(f"{spec!r} is no method with settings; write it as lora:rank=4")
    settings = {k: float(v) if "." in v or "e" in v else int(v) for k, _, v in pairs}
    method(name).make(**settings)
    return name, settings


def rates(spec: str) -> tuple[float, ...]:
    """Learning rates to try for a method."""
    return RATES.get(spec.partition(":")[0], LORA_RATES)


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    kind: str
    """`run` or `interference`."""
    family: str
    method: str
    regime: str
    condition: str
    seed: int
    items: int
    steps: int
    snapshots: tuple[int, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name without ending."""
        told = f"{self.kind}-{self.family}-{self.method}-{self.regime}-{self.condition}-{self.seed}"
        return "".join(c if c.isalnum() or c in "-+" else "_" for c in told)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class StudySettings(ThreadSettings):
    """A study on the toy world: families x methods x regimes x seeds, remedies with their controls, interference."""

    out: Path
    """A folder: one JSON a run in `runs/`, then the report. A study that is there is gone on with."""
    families: tuple[str, ...] = ("llama", "gptj", "bloom")
    """Bases, made (minutes each) where the cache has none. Controls and interference are run on the first."""
    methods: tuple[str, ...] = METHODS
    """Methods, as `lora:rank=4`. Controls, regimes and further families are run with the first."""
    regimes: tuple[str, ...] = REGIMES
    """Kinds of facts; methods are compared on the first."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Remedies and controls, on the first of the regimes; beside the default ones there is `no unknown`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the items, the adapter's start and the order; the same ones in every condition."""
    items: int = 360
    """Facts to learn."""
    steps: int = 200
    """Optimizer steps of a plain run, the rate falling to 0."""
    snapshots: tuple[int, ...] = (25, 50, 75, 100, 150)
    """Steps at which plain runs are looked at, beside the first and the last."""
    control_steps: int = 100
    """Steps of the runs that compare remedies and controls."""
    batch_size: int = 32
    """Facts per step."""
    keep: float = 0.7
    """Share of the facts that filters keep."""
    retained: int = 120
    """Known facts that are never trained, to see what is lost."""
    ks: tuple[int, ...] = (1, 4, 24, 96, 360)
    """Sizes of groups for interference; none: leave it out."""
    minutes: float | None = None
    """Begin no new run after so many minutes; the same command goes on."""
    bases: Path | None = None
    """Folder of the bases; the user's cache if not given."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for regime in self.regimes:
            if regime not in REGIMES:
                raise unknown("regime", regime, REGIMES)
        for name in self.conditions:
            condition(name)
        for spec in self.methods:
            method_of(spec)
        if not (self.families and self.methods and self.regimes and self.seeds):
            raise InlayError("a study needs at least one family, method, regime and seed")
        if min(self.items, self.steps, self.control_steps, self.retained, self.batch_size) < 1:
            raise InlayError("items, steps, control_steps, retained and batch_size must be at least 1")


def jobs(s: StudySettings) -> list[Job]:
    """All runs, those first without which the others say little."""
    first, main, regime = s.families[0], s.methods[0], s.regimes[0]
    snapshots = tuple(sorted({*(n for n in s.snapshots if n < s.steps), s.steps}))

    def plain(family: str, spec: str, kind: str, seed: int) -> Job:
        return Job("run", family, spec, kind, "plain", seed, s.items, s.steps, snapshots)

    def controlled(name: str, seed: int) -> Job:
        return Job("run", first, main, regime, name, seed, s.items, s.control_steps, (), {"keep": s.keep})

    ranked = [m for m in s.methods if m.startswith(main.partition(":")[0])] if s.ks else []
    elsewhere = [(f, m) for m in s.methods for f in s.families[1:]]
    streams: list[tuple[float, list[Job]]] = [
        (0.4, [Job("interference", first, m, regime, "", 0, s.items, 0, (), {"ks": list(s.ks)}) for m in ranked]),
        (1.0, [controlled(name, seed) for seed in s.seeds for name in s.conditions]),
        (1.0, [plain(first, main, kind, seed) for seed in s.seeds for kind in s.regimes[1:]]),
        (3.0, [plain(first, spec, regime, seed) for seed in s.seeds for spec in s.methods[1:]]),
        (3.0, [plain(family, main, regime, seed) for seed in s.seeds for family in s.families[1:]]),
        (12.0, [plain(f, m, regime, seed) for seed in s.seeds for f, m in elsewhere if m != main]),
    ]
    # Interleaved, so that a study that is cut short has some of everything, and most of what matters most.
    placed = [(late * i / len(own), n, i) for n, (late, own) in enumerate(streams) for i in range(len(own))]
    return [plain(first, main, regime, seed) for seed in s.seeds] + [streams[n][1][i] for _, n, i in sorted(placed)]
