"""`plan`: the exact number of trainable parameters of any method at any place of any model, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from inlay.core.edit import Edit
from inlay.core.host import Host
from inlay.core.place import parse
from inlay.methods import method as find_method
from inlay.plan.memory import Memory, estimate
from inlay.plan.skeleton import parameters, skeleton


@dataclass(frozen=True)
class Plan:
    """What an adapter would be. `trainable` is exact: it is counted, not computed by formula."""

    model: str
    family: str
    method: str
    settings: Mapping[str, Any]
    at: str
    trainable: int
    """Numbers that training moves."""
    total: int
    """Numbers of the frozen base, tied weights once."""
    percent: float
    """100 trainable / (total + trainable), as papers print it."""
    file_bytes: int
    """Tensors of the saved adapter in fp32, constants included."""
    places: int
    """Where it hangs."""
    by_role: Mapping[str, Mapping[str, int]]
    """role -> how many places, how many numbers; `shared` for what all places share."""
    memory: Memory
    batch: int
    length: int
    dtype: str
    checkpointing: bool
    hints: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        data = asdict(self)
        data["memory"] = {**data["memory"], "total": self.memory.total, "estimate": True}
        data["settings"] = dict(self.settings)
        data["hints"] = list(self.hints)
        return data


def plan(
    model: str,
    method: str = "lora",
    *,
    at: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "bf16",
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
) -> Plan:
    """Count an adapter before training it.

    Args:
        model: a folder with `config.json`, a Hub id, an embedded base, or a known shape (`llama-7b`; see
            `inlay.models.shapes`).
        method: a name in `inlay.METHODS`.
        at: a placement; the method's own by default.
        settings: settings of the method over its defaults.
        dtype: of the frozen base: bf16, fp16, fp32, int8 or nf4. The adapter is fp32.
        batch, length: rows and tokens of a training batch, for the memory estimate.
        checkpointing: whether activations are recomputed block by block.

    Raises:
        InlayError: an unknown model, method, setting, role or dtype.
    """
    from inlay.api import attach

    row = find_method(method)
    edit = row.make(**dict(settings or {}))
    base = skeleton(model)
    total = parameters(base)
    host = attach(base)
    where = at or row.places
    host.add("plan", edit, at=where)
    count = host.count("plan")
    return Plan(
        model=model,
        family=host.anatomy.family,
        method=method,
        settings=_settings(edit),
        at=where,
        trainable=count,
        total=total,
        percent=100 * count / (total + count),
        file_bytes=sum(4 * t.numel() for t in host.tensors("plan").values()),
        places=sum("plan" in s.places for s in host.sites.values()),
        by_role=_by_role(host),
        memory=estimate(host, "plan", dtype=dtype, batch=batch, length=length, checkpointing=checkpointing),
        batch=batch,
        length=length,
        dtype=dtype,
        checkpointing=checkpointing,
        hints=tuple(hints(host, where)),
    )


def _settings(edit: Edit) -> dict[str, Any]:
    return asdict(edit)


def _by_role(host: Host) -> dict[str, dict[str, int]]:
    trained = {id(p) for p in host.parameters("plan")}
    found: dict[str, dict[str, int]] = {}
    for site in host.sites.values():
        if "plan" in site.places:
            own = sum(t.numel() for t in site.wear["plan"].tensors().values() if id(t) in trained)
            entry = found.setdefault(site.spot.role, {"places": 0, "trainable": 0})
            entry["places"] += 1
            entry["trainable"] += own
    if "plan" in host.common:
        shared = sum(t.numel() for t in host.common["plan"].tensors().values() if id(t) in trained)
        found["shared"] = {"places": 1, "trainable": shared}
    return found


def hints(host: Host, at: str) -> list[str]:
    """What a user of this family may want to know about this placement."""
    asked = {t.name for t in parse(at)}
    found = []
    for fused, parts in (("qkv", {"q", "k", "v"}), ("gate_up", {"gate", "up"})):
        if fused in host.anatomy.roles and parts <= asked:
            found.append(
                f"{host.anatomy.family} fuses {', '.join(sorted(parts))} into one linear; each part has an adapter "
                f"here; ask for `{fused}` to hang one on the whole (published counts of such models usually do)"
            )
    return found
