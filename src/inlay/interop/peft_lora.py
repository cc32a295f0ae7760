"""HF PEFT's LoRA files, one row each: LoRA (rsLoRA, DoRA, PiSSA) and AdaLoRA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from inlay.core.host import Host
from inlay.core.start import frozen_weight
from inlay.interop.low_rank import Factors, factorise, spread_rows, whole_place, worn_by_path
from inlay.interop.peft_experts import expert_factors, shortest, wrapped
from inlay.interop.peft_folder import Found, Tensors
from inlay.interop.peft_row import (
    Dumped,
    Loaded,
    Row,
    embedding_scale,
    fill_places,
    layer_kind,
    need,
    number,
    plain_worn,
)
from inlay.methods import method

PLAIN_STARTS = (True, "true", False, "false", "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it was."""


def patterned(found: Found, field: str, default: Any, path: str) -> Any:
    """A setting that a pattern may change at some modules: the first key that matches, as in PEFT."""
    for key, value in (found.setting(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def ranks_and_scales(found: Found, rank_of: Mapping[str, int], alpha_field: str) -> dict[str, tuple[int, float]]:
    """Module path -> (rank, alpha / rank); the tensors' rank must be the config's."""
    made = {}
    for path, rank in rank_of.items():
        told = patterned(found, "rank_pattern", found.setting("r", 8), path)
        if told != rank:
            raise found.error(f"tensors at {path} have rank {rank}, but the config says {told}")
        alpha = patterned(found, "alpha_pattern", found.setting(alpha_field, 8), path)
        made[path] = rank, alpha / (rank**0.5 if found.setting("use_rslora") else rank)
    return made


# ---- LoRA, rsLoRA, DoRA, PiSSA ---------------------------------------------------------------------------------------
def load_lora(found: Found) -> Loaded:
    """One rank and scale for all places: narrower ones are padded with zeros, other scales are folded into B."""
    start = found.setting("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, "pissa"):
        raise found.error(
            f"init_lora_weights={start!r} changed the base it was trained on, and the file does not say how; "
            "save it again with PEFT's path_initial_model_for_weight_conversion, which writes a plain LoRA"
        )
    kind = "dora" if found.setting("use_dora") else "lora"
    need(found, {"A", "B", "m"} if kind == "dora" else {"A", "B"})
    at = ranks_and_scales(found, {p: t["A"].shape[-2] for p, t in found.places.items()}, "lora_alpha")
    rank, rs = max(r for r, _ in at.values()), bool(found.setting("use_rslora"))
    scale = Counter(s for _, s in at.values()).most_common(1)[0][0]
    alpha = scale * (rank**0.5 if rs else rank)
    if len(set(at.values())) == 1 and not found.setting("alpha_pattern"):
        alpha = found.setting("lora_alpha", 8)
    settings = {
        "rank": rank,
        "alpha": float(alpha),
        "dropout": found.setting("lora_dropout", 0.0),
        "rank_stabilised": rs,
    }
    if start == "pissa":
        if found.setting("target_parameters"):
            raise found.error("PiSSA on target_parameters is not read: PEFT starts it nowhere but at linears")
        if len(set(at.values())) > 1 or kind == "dora":
            raise found.error(
                "PiSSA with several ranks or with DoRA is not read; convert it to a plain LoRA with PEFT first"
            )
        settings["init"] = "pissa"
    edit = method(kind).make(**settings)

    def here(path: str, t: Tensors) -> Tensors:
        r, s = at[path]
        more, ratio = rank - r, s / scale
        B = t["B"] if ratio == 1 else t["B"] * ratio
        made = {"A": pad(t["A"], (0, 0, 0, more)), "B": pad(B, (0, more))} if more else {"A": t["A"], "B": B}
        return made | ({"m": t["m"].flatten()} if kind == "dora" else {})

    def values(host: Host, name: str) -> dict[str, Tensor]:
        modules = dict(host.model.named_modules())

        def with_base(path: str, t: Tensors) -> Tensors:
            own = here(path, t)
            if (layer := modules.get(path)) is None:  # a parameter of experts
                return own
            if (factor := embedding_scale(layer)) != 1:
                own["B"] = own["B"] * factor
            if start == "pissa":
                own |= principal(layer, rank, float(host.edits[name].scale))  # type: ignore[attr-defined]
            return own

        return fill_places(host, name, found, with_base)

    return Loaded(edit, values=values)


def principal(layer: nn.Module, rank: int, scale: float) -> Tensors:
    """Where PEFT's PiSSA started, from the very weight: near a small gap of singular values the last bit matters."""
    W = layer.weight
    if not isinstance(W, Tensor) or not W.is_floating_point():
        return {}
    W = W.detach().float().T if layer_kind(layer) == "conv1d" else W.detach().float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return {"_A0": root[:, None] * Vh[:rank], "_B0": U[:, :rank] * root}


def dump_lora(host: Host, name: str) -> Dumped:
    """LoRA as it is; PiSSA as a plain LoRA of rank 2 r, as PEFT's own converter writes it."""
    edit: Any = host.edits[name]
    factors, experts = factorise(host, name), expert_factors(host, name)
    rank = max(f.rank for f in (*factors.values(), *(f for each in experts.values() for f in each)))
    scale = edit.scale
    rs = edit.rank_stabilised
    alpha = edit.alpha if rank == edit.rank else scale * (rank**0.5 if rs else rank)
    fields = {
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0 if experts else edit.dropout,
        "use_rslora": rs,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
    }
    if experts:
        fields["target_parameters"] = shortest(host, set(experts))
    places = {path: _padded(f, rank, host, path) for path, f in factors.items()}
    notes = [f"PiSSA written as a plain LoRA of rank {rank}"] if edit.init == "pissa" else []
    if experts and edit.dropout:
        notes.append(f"dropout {edit.dropout} (training only) is not written: PEFT has none on target_parameters")
    if experts and edit.experts != "separate":
        notes.append("factors that experts share are written once for each expert: PEFT's are separate")
    return Dumped(fields, places, notes=tuple(notes), wrapped=wrapped(host, name, experts, rank))


def _padded(f: Factors, rank: int, host: Host, path: str) -> Tensors:
    A, B = pad(f.A, (0, 0, 0, rank - f.rank)), pad(f.B, (0, rank - f.rank))
    layer = host.model.get_submodule(path)
    embed = layer_kind(layer) == "embedding"
    if embed:
        return {"lora_embedding_A": A, "lora_embedding_B": B / embedding_scale(layer)}
    return {"lora_A.weight": A, "lora_B.weight": B}


def dump_dora(host: Host, name: str) -> Dumped:
    """DoRA; parts of a fused projection become one, whose other rows keep the base's own length."""
    edit: Any = host.edits[name]
    made: dict[str, Tensors] = {}
    worn = worn_by_path(host, name)
    rank = max(sum(w["A"].shape[0] for *_, w in places) for places in worn.values())
    for path, places in worn.items():
        A = torch.cat([w["A"] for *_, w in places])
        if places[0][0].part is None:
            B, m = places[0][2]["B"], places[0][2]["m"]
        else:
            whole = whole_place(host, path)
            m = frozen_weight(whole).norm(dim=1)
            columns = []
            for spot, _, w in places:
                m = spread_rows(spot, whole.d_out, w["m"], m)
                columns.append(spread_rows(spot, whole.d_out, w["B"]))
            B = torch.cat(columns, 1)
        made[path] = {**_padded(Factors(A, B, 1.0), rank, host, path), "lora_magnitude_vector": m}
    rs = edit.rank_stabilised
    alpha = edit.alpha if rank == edit.rank else edit.scale * (rank**0.5 if rs else rank)
    fields = {
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": edit.dropout,
        "use_rslora": rs,
        "use_dora": True,
        "init_lora_weights": True,
        "bias": "none",
    }
    return Dumped(fields, made)


# ---- AdaLoRA ---------------------------------------------------------------------------------------------------------
RANKNUM = 1e-5
"""PEFT divides by (initial rank + this)."""


def load_adalora(found: Found) -> Loaded:
    """Pruned triplets come back as zeros; PEFT's scale alpha / (initial rank + 1e-5) becomes alpha."""
    rank = found.setting("init_r", 12)
    alpha = found.setting("lora_alpha", 8)
    alpha = (alpha if alpha > 0 else float(rank)) * rank / (rank + RANKNUM)
    steps = found.setting("total_step", 0)
    schedule = {}
    if steps > 1:
        schedule = {
            "warmup": found.setting("tinit", 0) / steps,
            "final": found.setting("tfinal", 0) / steps,
            "interval": found.setting("deltaT", 1),
        }
    edit = method("adalora").make(
        rank=rank,
        target=found.setting("target_r", 8),
        alpha=alpha,
        dropout=found.setting("lora_dropout", 0.0),
        **schedule,
        beta1=found.setting("beta1", 0.85),
        beta2=found.setting("beta2", 0.85),
        orthogonality=found.setting("orth_reg_weight", 0.5),
    )
    pattern = found.setting("rank_pattern") or {}
    need(found, {"Q", "E", "P"})

    def here(path: str, t: Tensors) -> Tensors:
        kept = t["Q"].shape[0]
        mask = [bool(b) for b in pattern.get(f"{path}.lora_E", [True] * rank)]
        if kept == rank:
            return {"Q": t["Q"], "E": t["E"].flatten(), "P": t["P"]}
        if len(mask) != rank or sum(mask) != kept:
            raise found.error(f"{path} holds {kept} triplets, which rank_pattern and init_r={rank} do not explain")
        rows = torch.tensor(mask).nonzero()[:, 0]
        Q, E, P = torch.zeros(rank, t["Q"].shape[1]), torch.zeros(rank), torch.zeros(t["P"].shape[0], rank)
        Q[rows], E[rows], P[:, rows] = t["Q"], t["E"].flatten(), t["P"]
        return {"Q": Q, "E": E, "P": P}

    return Loaded(edit, here=here)


def dump_adalora(host: Host, name: str) -> Dumped:
    """All triplets, pruned ones as zeros in lora_E. PEFT insists on a schedule; a stand-in is written."""
    edit: Any = host.edits[name]
    worn = plain_worn(host, name, "AdaLoRA")
    places = {p: {"lora_A": w["Q"], "lora_E": w["E"][:, None], "lora_B": w["P"]} for p, (_, w) in worn.items()}
    rank = edit.rank
    fields = {
        "init_r": rank,
        "target_r": edit.target,
        "lora_alpha": number(edit.alpha * (rank + RANKNUM) / rank),
        "lora_dropout": edit.dropout,
        "beta1": edit.beta1,
        "beta2": edit.beta2,
        "orth_reg_weight": edit.orthogonality,
        "bias": "none",
        "rank_pattern": None,
        "total_step": 1,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": edit.interval,
    }
    return Dumped(fields, places)


LORA_FIELDS = frozenset(
    "r lora_alpha lora_dropout use_rslora use_dora init_lora_weights rank_pattern alpha_pattern fan_in_fan_out "
    "eva_config target_parameters".split()
)
SCHEDULE = frozenset("target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split())
ROWS = (
    Row(
        type="LORA",
        kinds=("lora", "dora"),
        fields=LORA_FIELDS,
        layers=("linear", "conv1d", "embedding"),
        names={
            "lora_A.weight": "A",
            "lora_B.weight": "B",
            "lora_embedding_A": "A",
            "lora_embedding_B": "B",
            "lora_magnitude_vector": "m",
            "lora_magnitude_vector.weight": "m",
            "base_layer.weight": "base",
        },
        load=load_lora,
        dump=lambda host, name: (dump_dora if host.edits[name].kind == "dora" else dump_lora)(host, name),
    ),
    Row(
        type="ADALORA",
        kinds=("adalora",),
        layers=("linear", "conv1d"),
        load=load_adalora,
        dump=dump_adalora,
        names={"lora_A": "Q", "lora_B": "P", "lora_E": "E"},
        fields=(LORA_FIELDS - {"use_dora", "use_rslora", "alpha_pattern", "target_parameters"}) | SCHEDULE,
    ),
)
