"""HF PEFT folders, read and written; and plain LoRA folders that vLLM loads. The methods are rows of a table."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.interop import peft_lora, peft_products, peft_vectors
from inlay.interop.low_rank import factorise, widest
from inlay.interop.peft_experts import modules_only, parameter_paths, unwrapped
from inlay.interop.peft_folder import Found, Tensors, free_name, hang, read_config, read_tensors, write_folder
from inlay.interop.peft_row import Dumped, Row, fill_places, layer_kind

ROWS = (*peft_lora.ROWS, *peft_products.ROWS, *peft_vectors.ROWS)
BY_TYPE = {row.type: row for row in ROWS}
BY_KIND = {kind: row for row in ROWS for kind in row.kinds}
PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
COMMON = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config".split()
)
"""Fields that say where and whence, or that act only through another one."""
UNSET: tuple[Any, ...] = (None, False, 0, "", "none", [], {}, ())


@dataclass(frozen=True)
class Written:
    """What `write` made."""

    folder: Path
    rank: int | None = None
    """Rank of the LoRA, for format `vllm`."""
    error: float = 0.0
    """Largest relative error |written - meant| / |meant| over the modules; 0 where the file says the same."""
    notes: tuple[str, ...] = ()


# ---- reading ---------------------------------------------------------------------------------------------------------
def read(host: Host, folder: str | Path, name: str | None = None) -> str:
    """Hang a PEFT adapter on a host. `InlayError`, and an unchanged host, for whatever has no counterpart."""
    folder = Path(folder)
    return load(host, folder, read_config(folder), read_tensors(folder, *FILES), name)


def load(
    host: Host,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    name: str | None = None,
    rows: Mapping[str, Row] = BY_TYPE,
) -> str:
    """The same, from a config and tensors at hand."""
    kind = str(config.get("peft_type"))
    if kind not in rows:
        raise unknown("peft_type", kind, rows, f"It stands in {folder}.")
    row = rows[kind]
    try:
        return _load(host, folder, config, tensors, name, row)
    except re.error as e:
        raise InlayError(f"{folder}: {e.pattern!r} in the config is not a regular expression: {e}") from e


def _load(host: Host, folder: Path, config: Mapping[str, Any], tensors: Tensors, name: str | None, row: Row) -> str:
    check_settings(folder, config, row)
    found = sort_tensors(folder, config, tensors, row)
    if "target_parameters" in row.fields:
        found = unwrapped(host, found)
    if row.names:
        check_modules(host, found, row)
    loaded = row.load(found)
    values = loaded.values or (lambda host, name: fill_places(host, name, found, loaded.here))  # type: ignore[arg-type]
    at = list(loaded.at if loaded.at is not None else found.places)
    return hang(host, free_name(host, folder, name), loaded.edit, at, values)


def check_settings(folder: Path, config: Mapping[str, Any], row: Row) -> None:
    """Refuse any setting that would be dropped."""
    for field, value in config.items():
        if field in COMMON | row.fields or value in UNSET:
            continue
        if field not in row.training:
            raise InlayError(
                f"{folder}: {row.type} with {field}={value!r} has no counterpart in Inlay; nothing was read"
            )
        warnings.warn(
            f"{folder}: {field}={value!r} acts in training only and is not kept; what the adapter says is the same",
            stacklevel=4,
        )


def sort_tensors(folder: Path, config: Mapping[str, Any], tensors: Tensors, row: Row) -> Found:
    """Tensors by module path and our name; an unknown key is an error."""
    places: dict[str, Tensors] = {}
    top: Tensors = {}
    strange = []
    pattern = (
        re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(re.escape(n) for n in row.names)})") if row.names else None
    )
    for key, t in tensors.items():
        t = t.float() if t.is_floating_point() else t
        if key in row.top:
            top[row.top[key]] = t
        elif pattern and (m := pattern.fullmatch(key)):
            places.setdefault(m[1], {})[row.names[m[2]]] = t
        else:
            strange.append(key)
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InlayError(
            f"{folder}: {row.type} does not know the tensors {', '.join(sorted(strange)[:3])}{more}; nothing was read"
        )
    if row.names and not places:
        raise InlayError(f"{folder} holds no {row.type} tensors")
    return Found(folder, config, places, top)


def check_modules(host: Host, found: Found, row: Row) -> None:
    """The file's modules must be this model's, and those that `target_modules` names: no more and no fewer."""
    modules = bare_modules(host.model)
    places = {p: t for p, t in found.places.items() if p not in parameter_paths(host)}
    if lost := sorted(set(places) - set(modules)):
        raise found.error(
            f"this model, a {host.anatomy.family} of {host.anatomy.layers} layers, has no module {lost[0]!r} "
            f"({len(lost)} such)"
        )
    for path, t in places.items():
        kind = layer_kind(modules[path])
        if kind not in row.layers:
            raise found.error(f"{row.type} at {path}, a {kind}, is not read; it may stand on {', '.join(row.layers)}")
        if "base" in t and not _same(t["base"], modules[path].weight):  # type: ignore[arg-type]
            raise found.error(f"the file brings its own base weights for {path}, which are not this model's")
    if found.setting("target_modules") is None:
        return
    named = {p for p, m in modules.items() if layer_kind(m) in row.layers and targeted(found.config, p, m, host.model)}
    if extra := sorted(set(places) - named):
        raise found.error(
            f"target_modules={found.config['target_modules']!r} does not name {extra[0]} ({len(extra)} such), for "
            "which the file has tensors"
        )
    if missing := sorted(named - set(places)):
        raise found.error(
            f"target_modules names {missing[0]} ({len(missing)} such), but the file has no tensors for it"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.to(b.dtype) == b.detach().cpu()).all())


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's modules, without what a host hung on them."""
    return {p: m for p, m in model.named_modules() if p and not any(s.startswith("inlay") for s in p.split("."))}


def targeted(config: Mapping[str, Any], path: str, layer: nn.Module, model: nn.Module) -> bool:
    """PEFT's rule: a list of whole paths or suffixes, a regular expression of the whole path, or `all-linear`."""

    def hit(rule: Any) -> bool:
        if isinstance(rule, str):
            return bool(re.fullmatch(rule, path))
        return any(path == r or path.endswith(f".{r}") for r in rule or ())

    target = config["target_modules"]
    if hit(config.get("exclude_modules")):
        return False
    if target == "all-linear":
        return layer_kind(layer) in ("linear", "conv1d") and layer is not model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(target, str) or not hit(target) or path in target:
        return hit(target)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if m := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(m[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


# ---- writing ---------------------------------------------------------------------------------------------------------
def write(host: Host, name: str, folder: str | Path, format: str = "peft", rank: int | None = None) -> Written:
    """Write an adapter for another library.

    Args:
        format: `peft` keeps the method; `vllm` writes any additive adapter as one plain LoRA of one rank, alpha = rank.
        rank: for `vllm`, the widest rank wanted; wider updates are cut by SVD and the error is reported.
    """
    if name not in host.edits:
        raise unknown("adapter", name, host.edits)
    if format == "vllm":
        return write_vllm(host, name, Path(folder), rank)
    if format != "peft":
        raise unknown("format", format, ("peft", "vllm"))
    if rank is not None:
        raise InlayError("rank is a choice of format 'vllm'; 'peft' keeps the adapter's own")
    edit = host.edits[name]
    if edit.kind not in BY_KIND:
        raise InlayError(
            f"PEFT has no method for {edit.kind!r} ({name!r}); it has: {', '.join(sorted(BY_KIND))}. Use inlay.save"
        )
    row = BY_KIND[edit.kind]
    if "target_parameters" not in row.fields or edit.kind == "dora":
        modules_only(host, name, f"PEFT has no {edit.kind} there")
    dumped = row.dump(host, name)
    modules = bare_modules(host.model)
    for path in dumped.places:
        if layer_kind(modules[path]) not in row.layers:
            raise InlayError(
                f"PEFT cannot hang {row.type} on {path}, a {layer_kind(modules[path])}; "
                f"it may stand on {', '.join(row.layers)}"
                + (". Format 'vllm' writes it as a LoRA" if row.type in ("LOHA", "LOKR") else "")
            )
    places = {**dumped.places, **dumped.wrapped}
    tensors = {f"{PREFIX}{p}.{k}": v for p, t in places.items() for k, v in t.items()} | dumped.top
    return Written(write_folder(Path(folder), _config(host, row, dumped), tensors), notes=dumped.notes)


def _config(host: Host, row: Row, dumped: Dumped) -> dict[str, Any]:
    fields = dict(dumped.fields)
    if dumped.wrapped and not dumped.places:
        fields["target_modules"] = []  # null would let PEFT choose some
    if dumped.places:
        fields["target_modules"] = suffixes(host, set(dumped.places))
        if "feedforward_modules" in fields:
            # PEFT wants the second list to be part of the first, word by word.
            inner = set(fields["feedforward_modules"])
            fields["feedforward_modules"] = suffixes(host, inner)
            fields["target_modules"] = sorted(
                {*fields["feedforward_modules"], *suffixes(host, set(dumped.places) - inner)}
            )
        if "fan_in_fan_out" in row.fields:
            fields["fan_in_fan_out"] = any(layer_kind(host.model.get_submodule(p)) == "conv1d" for p in dumped.places)
    return {
        "peft_type": row.type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": getattr(host.model.config, "_name_or_path", None) or None,
        **fields,
    }


def suffixes(host: Host, paths: set[str]) -> list[str]:
    """The shortest list that names exactly these modules: a last name where all of that name are meant, else paths."""
    everywhere: dict[str, set[str]] = {}
    for path in bare_modules(host.model):
        everywhere.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    return sorted({last if everywhere[last] <= paths else p for p in paths for last in [p.rsplit(".", 1)[-1]]})


def write_vllm(host: Host, name: str, folder: Path, rank: int | None) -> Written:
    """A plain LoRA of one rank, its scales folded into B, for servers that read nothing else."""
    modules_only(host, name, "vLLM serves LoRA at linears only")
    factors = factorise(host, name, rank)
    modules = bare_modules(host.model)
    for path in factors:
        if layer_kind(modules[path]) not in ("linear", "conv1d"):
            raise InlayError(
                f"{name!r} hangs at {path}, a {layer_kind(modules[path])}; vLLM serves LoRA at linears only"
            )
    wide = widest(factors)
    tensors: Tensors = {}
    for path, f in factors.items():
        g = f.folded(wide)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": g.A, f"{PREFIX}{path}.lora_B.weight": g.B}
    fields = {
        "r": wide,
        "lora_alpha": wide,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    config = _config(host, BY_TYPE["LORA"], Dumped(fields, {p: {} for p in factors}))
    return Written(write_folder(folder, config, tensors), wide, max(f.error for f in factors.values()))
