"""HF PEFT's files of vectors and virtual tokens, one row each: (IA)^3, RoAd, prefix, prompt tuning, P-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.core.config import text_config
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.interop.low_rank import spread_rows, whole_place, worn_by_path
from inlay.interop.peft_folder import Found, Tensors
from inlay.interop.peft_row import Dumped, Loaded, Row, need, plain_worn
from inlay.methods import method


# ---- (IA)^3 ----------------------------------------------------------------------------------------------------------
def load_ia3(found: Found) -> Loaded:
    """(1, in) scales a module's input, (out, 1) its output."""
    need(found, {"l"})
    wiring = {path: "input" if t["l"].shape[0] == 1 else "output" for path, t in found.places.items()}
    forward = found.setting("feedforward_modules", [])
    for path, w in wiring.items():
        if not isinstance(forward, str) and (w == "input") != any(path == f or path.endswith(f".{f}") for f in forward):
            raise found.error(f"the vector at {path} scales its {w}, but feedforward_modules={forward} says otherwise")
    at = [f"{path}:{w}" for path, w in wiring.items()]
    return Loaded(method("ia3").make(), here=lambda path, t: {"l": t["l"].flatten()}, at=at)


def dump_ia3(host: Host, name: str) -> Dumped:
    """Vectors at parts of a fused projection become one, with ones elsewhere."""
    edit: Any = host.edits[name]
    made, forward = {}, []
    for path, places in worn_by_path(host, name).items():
        if {edit.wiring_of(place) for _, place, _ in places} == {"input"}:
            if len(places) > 1 or places[0][0].part is not None:
                raise InlayError(f"{name!r} scales the input of a part of the fused {path}, which PEFT cannot")
            forward.append(path)
            made[path] = {"ia3_l": places[0][2]["l"][None]}
            continue
        vector: Tensor | float = 1.0
        for spot, _, w in places:
            vector = spread_rows(spot, whole_place(host, path).d_out, w["l"], vector)
        made[path] = {"ia3_l": torch.as_tensor(vector)[:, None]}
    return Dumped({"feedforward_modules": forward, "init_ia3_weights": True}, made)


# ---- RoAd ------------------------------------------------------------------------------------------------------------
def load_road(found: Found) -> Loaded:
    """Output i is paired with i + group/2. Variant 4 stores its two rows group by group."""
    need(found, {"theta", "a"})
    variant = int(str(found.setting("variant", "road_1")).removeprefix("road_"))
    group = found.setting("group_size", 64)
    edit = method(f"road{variant}").make(pairing="half", group=group)

    def here(path: str, t: Tensors) -> Tensors:
        if variant != 4:
            return t
        return {k: v.unflatten(0, (-1, 2, group)).transpose(0, 1).flatten() for k, v in t.items()}

    return Loaded(edit, here=here)


def dump_road(host: Host, name: str) -> Dumped:
    """Neighbours are groups of two."""
    edit: Any = host.edits[name]
    if edit.positional:
        raise InlayError(f"{name!r} turns {edit.positions} positions only, which PEFT's RoAd cannot; use inlay.save")
    group = edit.group if edit.pairing == "half" else 2
    variant = edit.variant
    made = {}
    for path, (_, found) in plain_worn(host, name, "RoAd").items():
        w = edit.whole(found, whole_place(host, path))
        rows = {k: v.view(2, -1, group).transpose(0, 1).flatten() if variant == 4 else v for k, v in w.items()}
        made[path] = {"road_theta": rows["theta"], "road_alpha": rows["a"]}
    return Dumped({"variant": f"road_{variant}", "group_size": group, "init_weights": True}, made)


# ---- virtual tokens --------------------------------------------------------------------------------------------------
def table_of(found: Found, width: int | None = None) -> Tensor:
    """`prompt_embeddings`, checked against the config."""
    table = found.top.get("table")
    if table is None:
        raise found.error("prompt_embeddings is missing")
    n, d = found.setting("num_virtual_tokens", len(table)), width or found.setting("token_dim", table.shape[1])
    if found.setting("num_transformer_submodules", 1) != 1:
        raise found.error("num_transformer_submodules=2 belongs to an encoder-decoder")
    if tuple(table.shape) != (n, d):
        raise found.error(f"prompt_embeddings is {tuple(table.shape)}, but the config says {(n, d)}")
    return table


def load_prompt(found: Found) -> Loaded:
    """A table at the embedding. P-tuning's encoder is not in the file, only what it wrote."""
    table = table_of(found)
    edit = method("prompt").make(tokens=len(table), start="normal")
    return Loaded(edit, values=lambda host, name: {"embed/table": table}, at=["embed"])


def dump_prompt(host: Host, name: str) -> Dumped:
    """What stands in front of the embeddings."""
    edit: Any = host.edits[name]
    ((_, _, w),) = next(iter(worn_by_path(host, name).values()))
    with torch.no_grad():
        table = edit.table(w)
    fields: dict[str, Any] = {**_shape(host, len(table)), "token_dim": table.shape[1]}
    if edit.kind == "ptuning":
        kind = edit.encoder.upper()
        fields |= {"encoder_reparameterization_type": kind, "encoder_hidden_size": edit.hidden, "encoder_num_layers": 2}
    else:
        fields["prompt_tuning_init"] = "RANDOM"
    notes = (
        ("PEFT keeps only what the encoder writes: training cannot go on from this file",)
        if edit.kind == "ptuning"
        else ()
    )
    return Dumped(fields, top={"prompt_embeddings": table}, notes=notes)


def settings_of(host: Host) -> Any:
    """The text decoder's config."""
    return text_config(host.model.config)


def _shape(host: Host, tokens: int) -> dict[str, Any]:
    config = settings_of(host)
    return {
        "num_virtual_tokens": tokens,
        "num_layers": host.anatomy.layers,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
    }


def check_keys(host: Host) -> None:
    """A PEFT prefix holds finished keys: a decoder that still works on k after its projection cannot take them."""
    for path, m in host.model.named_modules():
        if path.rsplit(".", 1)[-1] in ("k_norm", "k_layernorm"):
            raise InlayError(
                f"a PEFT prefix holds finished keys, but this decoder normalises keys after k ({path}): not convertible"
            )
        if getattr(m, "attention_scaling", 1.0) != 1.0:
            raise InlayError(
                f"a PEFT prefix holds finished keys, but {path} scales keys by {m.attention_scaling}: not convertible"
            )


def bloom_before_2024(table: Tensor, layers: int, heads: int) -> Tensor:
    """Return a BLOOM prefix (n, 2 layers width) of LLM-Adapters, or of PEFT until transformers' change 31445, as PEFT
    lays it out since: there blocks 0 .. layers - 1 are keys and the others values, and the keys of a block, (n, heads,
    d) in memory, were read as (heads, d, n).
    """
    n = len(table)
    keys, values = table.unflatten(1, (2, layers, -1)).unbind(1)  # (n, layers, width) each
    keys = keys.transpose(0, 1).reshape(layers, heads, -1, n).permute(3, 0, 1, 2).reshape(n, layers, -1)
    return torch.stack([keys, values], 2).flatten(1)


def is_bloom_before_2024(found: Found, family: str) -> bool:
    """Tell the layout of a BLOOM prefix from the fields that only older or newer PEFT writes. Raises InlayError where
    a file may be of either: PEFT of 2023 to 2025, which does not name its version."""
    if family != "bloom" or found.setting("peft_version") or "encoder_hidden_size" not in found.config:
        return False
    if {"revision", "auto_mapping"} & set(found.config):
        raise found.error(
            "a BLOOM prefix has another layout if it was trained with transformers before 4.43, and this file does not "
            "say so; save it again with peft 0.18 or newer, which writes its version"
        )
    return True


def load_prefix(found: Found) -> Loaded:
    """(n, 2 layers width): column block 2l is the keys of layer l, 2l + 1 its values."""
    layers = found.setting("num_layers")
    table = table_of(found, found.top["table"].shape[1] if "table" in found.top else None)
    if not layers or table.shape[1] % (2 * layers) or found.setting("token_dim", 0) * 2 * layers != table.shape[1]:
        raise found.error(
            f"prompt_embeddings of width {table.shape[1]} is not 2 x {layers} layers x {found.setting('token_dim')}"
        )
    edit = method("prefix").make(tokens=len(table))

    def values(host: Host, name: str) -> dict[str, Tensor]:
        check_keys(host)
        if host.anatomy.layers != layers:
            raise found.error(f"a prefix of {layers} layers does not fit this model of {host.anatomy.layers}")
        old = is_bloom_before_2024(found, host.anatomy.family)
        whole = bloom_before_2024(table, layers, found.setting("num_attention_heads")) if old else table
        cut = whole.unflatten(1, (layers, 2, -1))
        return {f"{i}.{role}/table": cut[:, i, j] for i in range(layers) for j, role in enumerate("kv")}

    return Loaded(edit, values=values, at=["k", "v"])


def dump_prefix(host: Host, name: str) -> Dumped:
    """The finished tables; an encoder of them is folded in."""
    check_keys(host)
    edit: Any = host.edits[name]
    by_key = host.by_place(name)
    with torch.no_grad():
        tables = {key: edit.table(w) for key, w in by_key.items()}
    layers = host.anatomy.layers
    try:
        whole = torch.stack([torch.stack([tables.pop(f"{i}.{r}") for r in "kv"], 1) for i in range(layers)], 1)
    except KeyError as e:
        raise InlayError(
            f"{name!r} has no prefix at {e.args[0]}; PEFT's prefix stands at k and v of every layer"
        ) from e
    if tables:
        raise InlayError(f"{name!r} has a prefix at {sorted(tables)} beside k and v, which PEFT cannot have")
    width = whole.shape[-1]
    config = settings_of(host)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        **_shape(host, len(whole)),
        "token_dim": width,
        "num_attention_heads": width // head,
        "prefix_projection": False,
    }
    return Dumped(fields, top={"prompt_embeddings": whole.flatten(1)})


TOKENS = frozenset("num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers".split())
TABLE = {"prompt_embeddings": "table"}
ROWS = (
    Row(
        type="IA3",
        kinds=("ia3",),
        names={"ia3_l": "l"},
        layers=("linear", "conv1d"),
        load=load_ia3,
        dump=dump_ia3,
        fields=frozenset(("feedforward_modules", "fan_in_fan_out", "init_ia3_weights")),
    ),
    Row(
        type="ROAD",
        kinds=("road",),
        names={"road_theta": "theta", "road_alpha": "a"},
        layers=("linear",),
        load=load_road,
        dump=dump_road,
        fields=frozenset(("variant", "group_size", "init_weights")),
    ),
    Row(
        type="PREFIX_TUNING",
        kinds=("prefix",),
        top=TABLE,
        load=load_prefix,
        dump=dump_prefix,
        fields=TOKENS | {"prefix_projection", "encoder_hidden_size", "init_weights"},
    ),
    Row(
        type="PROMPT_TUNING",
        kinds=("prompt",),
        top=TABLE,
        load=load_prompt,
        dump=dump_prompt,
        fields=TOKENS | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    ),
    Row(
        type="P_TUNING",
        kinds=("ptuning",),
        top=TABLE,
        load=load_prompt,
        dump=dump_prompt,
        fields=TOKENS
        | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    ),
)
