"""HF PEFT's files of other additive methods, one row each: LoHa, LoKr, VeRA."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from inlay.core.host import Host
from inlay.interop.peft_folder import Found, Tensors
from inlay.interop.peft_lora import patterned, ranks_and_scales
from inlay.interop.peft_row import Dumped, Loaded, Row, fill_places, need, number, plain_worn
from inlay.methods import method

# ---- LoHa, LoKr ------------------------------------------------------------------------------------------------------
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
        wide = {
            k: pad(v, (0, rank - r) if k[0] == "a" else (0, 0, 0, rank - r)) if r < rank else v for k, v in t.items()
        }
        return wide if s == scale else wide | {"a1": wide["a1"] * (s / scale)}

    return Loaded(edit, here=here)


def dump_loha(host: Host, name: str) -> Dumped:
    """LoHa as it is."""
    edit: Any = host.edits[name]
    worn = plain_worn(host, name, "LoHa")
    fields = {"r": edit.rank, "alpha": number(edit.alpha), "init_weights": True}
    return Dumped(fields, {p: {LOHA[k]: v for k, v in w.items()} for p, (_, w) in worn.items()})


LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def load_lokr(found: Found) -> Loaded:
    """One rank everywhere: as it is. With patterns the factors are multiplied out and the scale goes into w1."""
    need(found, *({*a, *b} for a in (("w1",), ("w1_a", "w1_b")) for b in (("w2",), ("w2_a", "w2_b"))))
    ranks = found.setting("rank_pattern") or found.setting("alpha_pattern")
    rank, alpha = found.setting("r", 8), float(found.setting("alpha", 8))
    factor = found.setting("decompose_factor", -1)
    if not ranks:
        edit = method("lokr").make(
            rank=rank, alpha=alpha, factor=factor, decompose_both=bool(found.setting("decompose_both"))
        )
        return Loaded(edit, here=lambda path, t: t)
    product: Any = method("lokr").make(rank=1, alpha=1.0, factor=factor, whole=True)

    def here(path: str, t: Tensors) -> Tensors:
        r, a = patterned(found, "rank_pattern", rank, path), patterned(found, "alpha_pattern", alpha, path)
        w1, w2 = product.factors(t)
        return {"w1": w1 * (a / r), "w2": w2}

    return Loaded(product, here=here)


def dump_lokr(host: Host, name: str) -> Dumped:
    """LoKr as it is; whole factors (KronA) under a rank at which PEFT keeps both whole."""
    edit: Any = host.edits[name]
    worn = plain_worn(host, name, "LoKr")
    rank, alpha = edit.rank, edit.alpha
    if edit.whole:
        most = max(d for _, w in worn.values() for t in w.values() for d in t.shape)
        alpha, rank = alpha / rank * (most := -(-most // 2)), most
    fields = {
        "r": rank,
        "alpha": number(alpha),
        "decompose_both": edit.decompose_both,
        "decompose_factor": edit.factor,
        "init_weights": True,
    }
    return Dumped(fields, {p: {f"lokr_{k}": v for k, v in w.items()} for p, (_, w) in worn.items()})


# ---- VeRA ------------------------------------------------------------------------------------------------------------
def load_vera(found: Found) -> Loaded:
    """The file's projections, or those drawn again from their seed where it holds none."""
    edit = method("vera").make(
        rank=found.setting("r", 256),
        d_initial=found.setting("d_initial", 0.1),
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
                raise found.error(
                    f"{stored[k]} is {tuple(v.shape)}, but the modules it serves need {tuple(mine[k].shape)}"
                )
        return own | top

    return Loaded(edit, values=values)


def dump_vera(host: Host, name: str) -> Dumped:
    """VeRA with its projections."""
    edit: Any = host.edits[name]
    worn = plain_worn(host, name, "VeRA")
    shared = host.tensors(name)
    fields = {
        "r": edit.rank,
        "d_initial": edit.d_initial,
        "projection_prng_key": edit.projection_seed,
        "save_projection": True,
        "bias": "none",
        "init_weights": True,
    }
    places = {p: {"vera_lambda_d": w["d"], "vera_lambda_b": w["b"]} for p, (_, w) in worn.items()}
    return Dumped(fields, places, {"base_model.vera_A": shared["shared/_A"], "base_model.vera_B": shared["shared/_B"]})


ROWS = (
    Row(
        type="LOHA",
        kinds=("loha",),
        layers=("linear",),
        load=load_loha,
        dump=dump_loha,
        names={v: k for k, v in LOHA.items()},
        fields=frozenset("r alpha rank_pattern alpha_pattern init_weights".split()),
        training=frozenset(("rank_dropout", "module_dropout")),
    ),
    Row(
        type="LOKR",
        kinds=("lokr",),
        layers=("linear",),
        load=load_lokr,
        dump=dump_lokr,
        names={f"lokr_{k}": k for k in LOKR},
        fields=frozenset("r alpha rank_pattern alpha_pattern init_weights decompose_both decompose_factor".split()),
        training=frozenset(("rank_dropout", "module_dropout", "rank_dropout_scale")),
    ),
    Row(
        type="VERA",
        kinds=("vera",),
        layers=("linear", "conv1d"),
        load=load_vera,
        dump=dump_vera,
        names={"vera_lambda_d": "d", "vera_lambda_b": "b"},
        top={"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"},
        fields=frozenset("r projection_prng_key save_projection d_initial fan_in_fan_out init_weights".split()),
        training=frozenset(("vera_dropout",)),
    ),
)
