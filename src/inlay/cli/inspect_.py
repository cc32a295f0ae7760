"""`inlay inspect`: what an adapter folder holds, or where adapters can hang on a model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from inlay.cli.plan_ import size
from inlay.cli.verbs import Verb


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What to look at."""

    path: tyro.conf.Positional[str]
    """An adapter's folder in any known format, or a model: a folder, a Hub id, tiny-llama, or a known shape."""
    json: bool = False
    """Print one JSON object."""


def run(s: InspectSettings) -> None:
    """Look, and tell."""
    from inlay.cli.quiet import quiet

    quiet()
    folder = Path(s.path)
    is_adapter = any((folder / name).is_file() for name in ("adapter.json", "adapter_config.json"))
    found = adapter(folder) if is_adapter else model(s.path)
    if s.json:
        print(json.dumps(found))
    elif is_adapter:
        show_adapter(found)
    else:
        show_model(found)


# ---- adapters --------------------------------------------------------------------------------------------------------
def adapter(folder: Path) -> dict[str, Any]:
    """An adapter folder as plain data; a damaged one is an InlayError."""
    from inlay.interop.formats import detect

    kind = detect(folder)
    return _own(folder) if kind == "inlay" else _foreign(folder, kind)


def _own(folder: Path) -> dict[str, Any]:
    from inlay.core.store import read, template_of

    record, tensors = read(folder)  # checks both digests
    return {
        "format": "inlay",
        "name": record["name"],
        "method": record["method"],
        "settings": record["settings"],
        "parameters": record["tensors"]["parameters"],
        "bytes": _bytes(tensors),
        "base": {"name": record["base"].get("name"), "family": record["base"].get("family")},
        "places": record["places"],
        "tensors": {k: list(v.shape) for k, v in tensors.items()},
        "integrity": "digests match",
        "template": template_of(record),
        "about": record["about"],
        "versions": record["versions"],
    }


def _foreign(folder: Path, kind: str) -> dict[str, Any]:
    from inlay.interop.peft_folder import read_config, read_tensors

    config = read_config(folder)
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") and "head" not in p.name)
    tensors = read_tensors(folder, *names)
    inner = config.get("config") if kind == "adapterhub" else config
    return {
        "format": kind,
        "name": folder.name,
        "method": config.get("peft_type") or (inner or {}).get("architecture") or "bottleneck",
        "settings": {k: v for k, v in (inner or {}).items() if v not in (None, [], {}, "")},
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": _bytes(tensors),
        "base": {
            "name": config.get("base_model_name_or_path") or config.get("model_name"),
            "family": config.get("model_type"),
        },
        "places": config.get("target_modules"),
        "tensors": {k: list(v.shape) for k, v in tensors.items()},
        "integrity": "readable; this format carries no digest",
    }


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def show_adapter(found: dict[str, Any]) -> None:
    """An adapter for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from inlay.tasks.template_choice import shown_json

    out = Console(highlight=False)
    base = found["base"]
    out.print(f"[bold]{escape(found['name'])}[/]: {escape(str(found['method']))}, format {found['format']}")
    out.print(f"[dim]{escape(', '.join(f'{k}={v}' for k, v in found['settings'].items()))}[/]")
    out.print(f"base {escape(str(base['name'] or 'not named'))} ({base['family'] or 'family not named'})")
    out.print(f"{found['parameters']:,} parameters, {size(found['bytes'])}; {found['integrity']}\n")
    if (template := found.get("template")) is not None:
        out.print(f"trained with {escape(shown_json(template))}")
    table = Table(box=None, padding=(0, 2))
    for title in ("tensor", "shape", "how many"):
        table.add_column(title)
    for (name, shape), count in grouped(found["tensors"]).items():
        table.add_row(escape(name), shape, str(count))
    out.print(table)
    for key, value in (found.get("about") or {}).items():
        out.print(f"[dim]{escape(key)}: {escape(json.dumps(value)[:200])}[/]")


def grouped(tensors: dict[str, list[int]]) -> dict[tuple[str, str], int]:
    """Tensors that differ only in their layer, counted together: `*.q/A`."""
    import re

    found: dict[tuple[str, str], int] = defaultdict(int)
    for name, shape in tensors.items():
        found[re.sub(r"(?<![A-Za-z0-9_])\d+(?=\.)", "*", name), " x ".join(map(str, shape))] += 1
    return dict(found)


# ---- models ----------------------------------------------------------------------------------------------------------
def model(name: str) -> dict[str, Any]:
    """A model's anatomy as plain data; no weights are read."""
    from inlay.core.experts import expert_layout
    from inlay.core.place import collapsed, ranges, widths
    from inlay.models.anatomy import anatomy
    from inlay.plan.skeleton import parameters, skeleton

    base = skeleton(name)
    parts = anatomy(base)
    hidden = parts.hidden or 0
    roles: dict[str, dict[str, Any]] = {}
    layers: dict[str, set[int]] = {}
    for spot in parts.spots:
        layers.setdefault(spot.role, set()).update([] if spot.layer is None else [spot.layer])
        if spot.role in roles:
            roles[spot.role]["places"] += 1
            continue
        module = base.get_submodule(spot.path)
        experts = 0
        if spot.parameter:
            layout = expert_layout(module, spot.parameter)
            d_in, d_out, experts = layout.d_in, layout.d_out, layout.experts
        else:
            d_in, d_out = widths(module, spot.width or hidden)
            d_out = spot.part.width(d_out) if spot.part else d_out
        roles[spot.role] = {
            "places": 1,
            "in": d_in,
            "out": d_out,
            "example": spot.full_path,
            "part_of_fused": spot.part is not None,
            "experts": experts,
        }
    for spot in parts.spots:  # of roles that some layers lack, which layers have them
        if 0 < len(layers[spot.role]) < parts.layers_of(spot.tower):
            roles[spot.role]["layers"] = ranges(layers[spot.role])
    return {
        "model": name,
        "family": parts.family,
        "layers": parts.layers,
        "hidden": hidden,
        "parameters": parameters(base),
        "roles": roles,
        "linear": sum(s.linear and not s.tower for s in parts.spots),
        "unreached": collapsed(parts.unreached),
    }


def show_model(found: dict[str, Any]) -> None:
    """A model for people, and the placement language on it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console(highlight=False)
    out.print(
        f"[bold]{escape(found['model'])}[/]: {found['family']}, {found['layers']} layers, width {found['hidden']:,}, "
        f"{found['parameters']:,} parameters\n"
    )
    table = Table(box=None, padding=(0, 2))
    for title, side in (("role", "left"), ("places", "right"), ("in", "right"), ("out", "right"), ("first", "left")):
        table.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    for role, at in found["roles"].items():
        more = ", a part of it" if at["part_of_fused"] else f", {at['experts']} experts" if at["experts"] else ""
        where = escape(at["example"]) + f"[dim]{more}[/]"
        where += f"[dim], layers {at['layers']} only[/]" if "layers" in at else ""
        table.add_row(f"[cyan]{role}[/]", f"{at['places']:,}", f"{at['in']:,}", f"{at['out']:,}", where)
    out.print(table)
    out.print(f"\n`linear` is {found['linear']:,} places: every linear of the language model's blocks")
    if found["unreached"]:
        out.print("[yellow]not reached by it[/]: " + escape(", ".join(found["unreached"])))
    last = found["layers"] - 1
    out.print(
        f"""
[bold]placements[/] (--at): role or module pattern, [cyan]:[/]wiring, [cyan]@[/]layers; joined by commas
  q,v                  every layer's q and v
  down@0-{last // 2:<14}layers 0 to {last // 2}; also @{last}, @last2, @first1+last1
  o:parallel           from its input to its output; also :input, :output (= :series)
  {"*." + _last(found):<20} every module of that name""",
        soft_wrap=True,
    )


def _last(found: dict[str, Any]) -> str:
    roles = found["roles"]
    role = next(r for r in ("o", "down", "attn", *roles) if r in roles)
    return str(roles[role]["example"].split(".")[-1])


VERB = Verb(
    "inspect",
    "Look into an adapter folder (ours or foreign), or see where adapters can hang on a model.",
    InspectSettings,
    run,
    ("inlay inspect runs/math/adapter", "inlay inspect llama-7b"),
)
