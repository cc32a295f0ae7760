"""HF PEFT's low-rank files, one row each: LoRA (rsLoRA, DoRA, PiSSA), AdaLoRA, LoHa, LoKr, VeRA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay.core.host import Host
from inlay.interop.low_rank import Factors, factorise, spread_rows, whole_place, widest, worn_by_path
from inlay.interop.peft_folder import Found, Tensors
from inlay.interop.peft_row import Dumped, Loaded, Row, fill_places, need, number, plain_worn
from inlay.methods import method
from inlay.methods.lora import frozen_weight

PLAIN_STARTS = (True, "true", False, "false", "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it was."""


def patterned(found: Found, field: str, default: Any, path: str) -> Any:
    """A setting that `rank_pattern` or `alpha_pattern` may change at some modules: the first key that matches, as in PEFT."""
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


# ---- LoRA, rsLoRA, DoRA, PiSSA -------------------------------------------------------------------------------------------
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
    at = ranks_and_scales(found, {p: t["A"].shape[0] for p, t in found.places.items()}, "lora_alpha")
    rank, rs = max(r for r, _ in at.values()), bool(found.setting("use_rslora"))
    scale = Counter(s for _, s in at.values()).most_common(1)[0][0]
    alpha = scale * (rank**0.5 if rs else rank)
    if len(set(at.values())) == 1 and not found.setting("alpha_pattern"):
        alpha = found.setting("lora_alpha", 8)
    settings = {"rank": rank, "alpha": float(alpha), "dropout": found.setting("lora_dropout", 0.0), "rank_stabilised": rs}
    if start == "pissa":
        if len(set(at.values())) > 1 or kind == "dora":
            raise found.error("PiSSA with several ranks or with DoRA is not read; convert it to a plain LoRA with PEFT first")
        settings["init"] = "pissa"
    edit = method(kind).make(**settings)

    def here(path: str, t: Tensors) -> Tensors:
        r, s = at[path]
        more, ratio = rank - r, s / scale
        B = t["B"] if ratio == 1 else t["B"] * ratio
        made = {"A": pad(t["A"], (0, 0, 0, more)), "B": pad(B, (0, more))} if more else {"A": t["A"], "B": B}
        return made | ({"m": t["m"].flatten()} if kind == "dora" else {})

    return Loaded(edit, here=here)


def dump_lora(host: Host, name: str) -> Dumped:
    """LoRA as it is; PiSSA as a plain LoRA of rank 2 r, as PEFT's own converter writes it."""
    edit = host.edits[name]
    factors = factorise(host, name)
    rank = widest(factors)
    scale = edit.scale  # type: ignore[attr-defined]
    rs = edit.rank_stabilised  # type: ignore[attr-defined]
    alpha = edit.alpha if rank == edit.rank else scale * (rank**0.5 if rs else rank)  # type: ignore[attr-defined]
    fields = {
        "r": rank, "lora_alpha": number(alpha), "lora_dropout": edit.dropout, "use_rslora": rs,  # type: ignore[attr-defined]
        "use_dora": False, "init_lora_weights": True, "bias": "none",
    }
    places = {path: _padded(f, rank, host, path) for path, f in factors.items()}
    notes = (f"PiSSA written as a plain LoRA of rank {rank}",) if edit.init == "pissa" else ()  # type: ignore[attr-defined]
    return Dumped(fields, places, notes=notes)


def _padded(f: Factors, rank: int, host: Host, path: str) -> Tensors:
    A, B = pad(f.A, (0, 0, 0, rank - f.rank)), pad(f.B, (0, rank - f.rank))
    embed = hasattr(host.model.get_submodule(path), "num_embeddings")
    return {"lora_embedding_A": A, "lora_embedding_B": B} if embed else {"lora_A.weight": A, "lora_B.weight": B}


def dump_dora(host: Host, name: str) -> Dumped:
    """DoRA; parts of a fused projection become one, whose other rows keep the base's own length."""
    edit = host.edits[name]
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
    rs = edit.rank_stabilised  # type: ignore[attr-defined]
    alpha = edit.alpha if rank == edit.rank else edit.scale * (rank**0.5 if rs else rank)  # type: ignore[attr-defined]
    fields = {
        "r": rank, "lora_alpha": number(alpha), "lora_dropout": edit.dropout, "use_rslora": rs,  # type: ignore[attr-defined]
        "use_dora": True, "init_lora_weights": True, "bias": "none",
    }
    return Dumped(fields, made)


# ---- AdaLoRA -------------------------------------------------------------------------------------------------------------
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
        final = 0 < found.setting("tfinal", 0) < steps and found.setting("tfinal", 0) / steps
        schedule = {"warmup": found.setting("tinit", 0) / steps, "final": final or 0.0, "interval": found.setting("deltaT", 1)}
    edit = method("adalora").make(
        rank=rank, target=found.setting("target_r", 8), alpha=alpha, dropout=found.setting("lora_dropout", 0.0), **schedule,
        beta1=found.setting("beta1", 0.85), beta2=found.setting("beta2", 0.85),
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
    """All triplets, pruned ones as zeros in lora_E. PEFT insists on a schedule; one is written that is not training's."""
    edit = host.edits[name]
    worn = plain_worn(host, name, "AdaLoRA")
    places = {p: {"lora_A": w["Q"], "lora_E": w["E"][:, None], "lora_B": w["P"]} for p, (_, w) in worn.items()}
    rank = edit.rank  # type: ignore[attr-defined]
    fields = {
        "init_r": rank, "target_r": edit.target, "lora_alpha": number(edit.alpha * (rank + RANKNUM) / rank),  # type: ignore[attr-defined]
        "lora_dropout": edit.dropout, "beta1": edit.beta1, "beta2": edit.beta2,  # type: ignore[attr-defined]
        "orth_reg_weight": edit.orthogonality, "bias": "none", "rank_pattern": None, "total_step": 1,  # type: ignore[attr-defined]
        "tinit": 0, "tfinal": 0, "deltaT": edit.interval,  # type: ignore[attr-defined]
    }
    return Dumped(fields, places)


# ---- LoHa, LoKr ----------------------------------------------------------------------------------------------------------
LOHA = {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"}


def load_loha(found: Found) -> Loaded:
    """Narrower ranks are padded with zeros, other scales folded into a1."""
    need(found, set(LOHA))
    at = ranks_and_scales(found, {p: t["b1"].shape[0] for p, t in found.places.items()}, "alpha")
    rank = max(r for r, _ in at.values())
    scale = Counter(s for _, s in at.values()).most_common(1)[0][0]
    one = len(set(at.values())) == 1 and not found.setting("alpha_pattern")
    edit = method("loha").make(rank=rank, alpha=float(found.setting("alpha", 8) if one else scale * rank))

    def here(path: str, t: Tensors) -> Tensors:
        r, s = at[path]
        wide = {k: pad(v, (0, rank - r) if k[0] == "a" else (0, 0, 0, rank - r)) if r < rank else v for k, v in t.items()}
        return wide if s == scale else wide | {"a1": wide["a1"] * (s / scale)}

    return Loaded(edit, here=here)


def dump_loha(host: Host, name: str) -> Dumped:
    """LoHa as it is."""
    edit = host.edits[name]
    worn = plain_worn(host, name, "LoHa")
    fields = {"r": edit.rank, "alpha": number(edit.alpha), "init_weights": True}  # type: ignore[attr-defined]
    return Dumped(fields, {p: {LOHA[k]: v for k, v in w.items()} for p, (_, w) in worn.items()})


LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def load_lokr(found: Found) -> Loaded:
    """One rank everywhere: as it is. With patterns the factors are multiplied out and the scale goes into w1."""
    need(found, *({*a, *b} for a in (("w1",), ("w1_a", "w1_b")) for b in (("w2",), ("w2_a", "w2_b"))))
    ranks = found.setting("rank_pattern") or found.setting("alpha_pattern")
    rank, alpha = found.setting("r", 8), float(found.setting("alpha", 8))
    factor = found.setting("decompose_factor", -1)
    if not ranks:
        edit = method("lokr").make(rank=rank, alpha=alpha, factor=factor, decompose_both=bool(found.setting("decompose_both")))
        return Loaded(edit, here=lambda path, t: t)
    edit = method("lokr").make(rank=1, alpha=1.0, factor=factor, whole=True)

    def here(path: str, t: Tensors) -> Tensors:
        r, a = patterned(found, "rank_pattern", rank, path), patterned(found, "alpha_pattern", alpha, path)
        w1, w2 = edit.factors(t)  # type: ignore[attr-defined]
        return {"w1": w1 * (a / r), "w2": w2}

    return Loaded(edit, here=here)


def dump_lokr(host: Host, name: str) -> Dumped:
    """LoKr as it is; whole factors (KronA) under a rank at which PEFT keeps both whole."""
    edit = host.edits[name]
    worn = plain_worn(host, name, "LoKr")
    rank, alpha = edit.rank, edit.alpha  # type: ignore[attr-defined]
    if edit.whole:  # type: ignore[attr-defined]
        most = max(d for _, w in worn.values() for t in w.values() for d in t.shape)
        alpha, rank = alpha / rank * (most := -(-most // 2)), most
    fields = {
        "r": rank, "alpha": number(alpha), "decompose_both": edit.decompose_both, "decompose_factor": edit.factor,  # type: ignore[attr-defined]
        "init_weights": True,
    }
    return Dumped(fields, {p: {f"lokr_{k}": v for k, v in w.items()} for p, (_, w) in worn.items()})


# ---- VeRA ----------------------------------------------------------------------------------------------------------------
def load_vera(found: Found) -> Loaded:
    """The file's projections, or those drawn again from their seed where it holds none."""
    edit = method("vera").make(
        rank=found.setting("r", 256), d_initial=found.setting("d_initial", 0.1),
        projection_seed=found.setting("projection_prng_key", 0),
    )
    need(found, {"d", "b"})
    stored = {"shared/_A": "vera_A", "shared/_B": "vera_B"}
    if found.setting("save_projection", True) and not all(v in found.top for v in stored.values()):
        raise found.error("save_projection is true, but base_model.vera_A or base_model.vera_B is missing")

    def values(host: Host, name: str) -> dict[str, Tensor]:
        own = fill_places(host, name, found, lambda path, t: t)
        mine = host.tensors(name)
        top = {ours: found.top[theirs] for ours, theirs in stored.items() if theirs in found.top}
        for k, v in top.items():
            if v.shape != mine[k].shape:
                raise found.error(f"{stored[k]} is {tuple(v.shape)}, but the modules it serves need {tuple(mine[k].shape)}")
        return own | top

    return Loaded(edit, values=values)


def dump_vera(host: Host, name: str) -> Dumped:
    """VeRA with its projections."""
    edit = host.edits[name]
    worn = plain_worn(host, name, "VeRA")
    shared = host.tensors(name)
    fields = {
        "r": edit.rank, "d_initial": edit.d_initial, "projection_prng_key": edit.projection_seed, "save_projection": True,  # type: ignore[attr-defined]
        "bias": "none", "init_weights": True,
    }
    places = {p: {"vera_lambda_d": w["d"], "vera_lambda_b": w["b"]} for p, (_, w) in worn.items()}
    return Dumped(fields, places, {"base_model.vera_A": shared["shared/_A"], "base_model.vera_B": shared["shared/_B"]})


LORA_FIELDS = frozenset(
    "r lora_alpha lora_dropout use_rslora use_dora init_lora_weights rank_pattern alpha_pattern fan_in_fan_out eva_config".split()
)
SCHEDULE = frozenset("target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split())
ROWS = (
    Row(
        type="LORA", kinds=("lora", "dora"), fields=LORA_FIELDS, layers=("linear", "conv1d", "embedding"),
        names={
            "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
            "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m", "base_layer.weight": "base",
        },
        load=load_lora, dump=lambda host, name: (dump_dora if host.edits[name].kind == "dora" else dump_lora)(host, name),
    ),
    Row(
        type="ADALORA", kinds=("adalora",), layers=("linear", "conv1d"), load=load_adalora, dump=dump_adalora,
        names={"lora_A": "Q", "lora_B": "P", "lora_E": "E"},
        fields=(LORA_FIELDS - {"use_dora", "use_rslora", "alpha_pattern"}) | SCHEDULE,
    ),
    Row(
        type="LOHA", kinds=("loha",), layers=("linear",), load=load_loha, dump=dump_loha,
        names={v: k for k, v in LOHA.items()}, fields=frozenset("r alpha rank_pattern alpha_pattern init_weights".split()),
        training=frozenset(("rank_dropout", "module_dropout")),
    ),
    Row(
        type="LOKR", kinds=("lokr",), layers=("linear",), load=load_lokr, dump=dump_lokr, names={f"lokr_{k}": k for k in LOKR},
        fields=frozenset("r alpha rank_pattern alpha_pattern init_weights decompose_both decompose_factor".split()),
        training=frozenset(("rank_dropout", "module_dropout", "rank_dropout_scale")),
    ),
    Row(
        type="VERA", kinds=("vera",), layers=("linear", "conv1d"), load=load_vera, dump=dump_vera,
        names={"vera_lambda_d": "d", "vera_lambda_b": "b"}, top={"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"},
        fields=frozenset("r projection_prng_key save_projection d_initial fan_in_fan_out init_weights".split()),
        training=frozenset(("vera_dropout",)),
    ),
)
