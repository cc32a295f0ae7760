"""HF PEFT's `target_parameters`: LoRA on the 3-D parameters of experts, in PEFT's layout and in ours.

PEFT (0.17 to 0.21, `tuners/lora/layer.py`, `ParamWrapper`) wraps the module that holds a parameter (E, a, b):

- one `lora_A.weight` (r E, in), expert by expert, and one `lora_B.weight` (out, r E), rank by rank with the experts
  inside; the update of expert e is s B_e A_e;
- `in` is the last axis of the parameter and `out` the middle one, or the other way round where the module declares
  `is_transposed`. Llama 4 stores (E, in, out) and declares nothing: there PEFT's A is our B transposed;
- a second parameter of the same module wraps the wrapper of the first, in the order in which the module registers them,
  so the first one's tensors are under one more `base_layer.` each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from inlay.core.errors import InlayError
from inlay.core.expert_site import ExpertSite
from inlay.core.experts import ExpertLayout, by_expert, expert_layout, shared_names, stacked
from inlay.core.host import Host
from inlay.interop.low_rank import Factors, exact
from inlay.interop.peft_folder import Found, Tensors

INNER = ".base_layer"


def parameter_paths(host: Host) -> dict[str, ExpertLayout]:
    """Path of each expert parameter of a model -> its layout, in the model's order."""
    found = {}
    for spot in host.anatomy.spots:
        if spot.parameter:
            found[spot.full_path] = expert_layout(host.model.get_submodule(spot.path), spot.parameter)
    return found


def peft_swaps(module: nn.Module, layout: ExpertLayout) -> bool:
    """Whether PEFT's `in` is our D_out: the module stores (E, in, out) and does not say so."""
    return layout.transposed and not getattr(module, "is_transposed", False)


# ---- reading ---------------------------------------------------------------------------------------------------------
def unwrapped(host: Host, found: Found) -> Found:
    """What a folder holds, its expert tensors by the path of their parameter and in our layout (E, ...).

    Raises:
        InlayError: `target_parameters` names what is no expert parameter here, or the tensors are not those of it.
    """
    targets = found.setting("target_parameters") or []
    if not targets:
        return found
    layouts = parameter_paths(host)
    named = [p for p in layouts if any(p == t or p.endswith(f".{t}") for t in targets)]
    for t in targets:
        if not any(p == t or p.endswith(f".{t}") for p in layouts):
            raise found.error(f"target_parameters names {t!r}, which is no expert parameter of this model")
    places = dict(found.places)
    by_module: dict[str, list[str]] = {}
    for path in named:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    for module, paths in by_module.items():
        order = [n for n, _ in host.model.get_submodule(module).named_parameters(recurse=False)]
        paths.sort(key=lambda p: order.index(p.rpartition(".")[2]))
        for depth, path in enumerate(reversed(paths)):  # the last one wraps all others
            wrapper = module + INNER * depth
            if wrapper not in places:
                raise found.error(f"target_parameters names {path}, but the file has no tensors for it")
            places[path] = _read(found, path, places.pop(wrapper), layouts[path], host.model.get_submodule(module))
    if lost := [p for p in places if p not in named and (p.endswith(INNER) or p in by_module)]:
        raise found.error(f"target_parameters does not name the parameter of the tensors at {lost[0]}")
    return replace(found, places=places)


def _read(found: Found, path: str, t: Tensors, layout: ExpertLayout, module: nn.Module) -> Tensors:
    if set(t) != {"A", "B"}:
        raise found.error(f"{path} has the tensors {sorted(t)}, wanted ['A', 'B']")
    E, swapped = layout.experts, peft_swaps(module, layout)
    d_in, d_out = (layout.d_out, layout.d_in) if swapped else (layout.d_in, layout.d_out)
    A, B = t["A"], t["B"]
    if A.shape[1] != d_in or B.shape[0] != d_out or A.shape[0] != B.shape[1] or A.shape[0] % E:
        raise found.error(
            f"{path}, {E} experts of ({layout.d_out} x {layout.d_in}), has tensors of {tuple(A.shape)} and "
            f"{tuple(B.shape)}; wanted ({E} r, {d_in}) and ({d_out}, {E} r)"
        )
    A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)  # (E, r, in), (E, out, r)
    A, B = (B.mT, A.mT) if swapped else (A, B)
    return {"A": A.contiguous(), "B": B.contiguous()}


# ---- writing ---------------------------------------------------------------------------------------------------------
def expert_sites(host: Host, name: str) -> list[ExpertSite]:
    """Where an adapter hangs on expert parameters."""
    return [s for s in host.sites.values() if isinstance(s, ExpertSite) and name in s.places]


def expert_factors(host: Host, name: str) -> dict[str, list[Factors]]:
    """Path of the parameter -> factors of each expert's update."""
    edit: Any = host.edits[name]
    made = {}
    for site in expert_sites(host, name):
        place = site.places[name]
        w = {k: v.detach().float().cpu() for k, v in site.tensors(name).items()}
        each = [
            exact(edit, place.expert(e), own)
            for e, own in enumerate(by_expert(w, shared_names(edit, place), place.experts))
        ]
        if None in each:
            raise InlayError(f"PEFT has no {edit.kind} on expert parameters ({place.key}): merge it, or use inlay.save")
        made[site.spot.full_path] = [f for f in each if f is not None]
    return made


def wrapped(host: Host, name: str, factors: Mapping[str, list[Factors]], rank: int) -> dict[str, Tensors]:
    """Module path with its wrappers -> PEFT's tensors of this rank."""
    places: dict[str, Tensors] = {}
    by_module: dict[str, list[ExpertSite]] = {}
    for site in expert_sites(host, name):
        by_module.setdefault(site.spot.path, []).append(site)
    for path, sites in by_module.items():
        order = [n for n, _ in sites[0].layer.named_parameters(recurse=False)]
        sites.sort(key=lambda s: order.index(str(s.spot.parameter)))
        for depth, site in enumerate(reversed(sites)):
            places[path + INNER * depth] = _write(site, factors[site.spot.full_path], rank)
    return places


def _write(site: ExpertSite, each: list[Factors], rank: int) -> Tensors:
    padded = [{"A": f.A, "B": f.B} for f in (_widened(f, rank) for f in each)]
    both = stacked(padded, ())
    A, B = both["A"], both["B"]
    A, B = (B.mT, A.mT) if peft_swaps(site.layer, site.layout) else (A, B)
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}


def _widened(f: Factors, rank: int) -> Factors:
    """The same factors with zeros up to `rank`."""
    more: int = rank - f.rank
    pad = nn.functional.pad
    return f if not more else Factors(pad(f.A, (0, 0, 0, more)), pad(f.B, (0, more)), f.scale)


def shortest(host: Host, paths: set[str]) -> list[str]:
    """The shortest list that names exactly these parameters: a suffix where all of that name are meant, else paths."""
    every: dict[str, set[str]] = {}
    for path in parameter_paths(host):
        every.setdefault(_suffix(path), set()).add(path)
    return sorted({_suffix(p) if every[_suffix(p)] <= paths else p for p in paths})


def _suffix(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def modules_only(host: Host, name: str, what: str) -> None:
    """Refuse an adapter that hangs on expert parameters; `what` says why a format cannot hold it."""
    if found := expert_sites(host, name):
        raise InlayError(
            f"{name!r} hangs on the expert parameter {found[0].spot.full_path}, and {what}; merge it, or use inlay.save"
        )
