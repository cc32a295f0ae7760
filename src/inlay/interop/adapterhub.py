"""Folders of AdapterHub's `adapters` library: bottlenecks, Compacter, prefixes, LoRA and (IA)^3 on decoders.

AdapterHub adds a bottleneck where it adds the residual. With h what a sub-layer says and r the stream before it:

    original_ln_before = false   r + h + f(h)            an edit after the sub-layer
    original_ln_before = true    (r + h) + f(r + h)      an edit after the block, for the MLP's adapter
    is_parallel                  r + h + f(r)            f reads the stream before the norm: no layer is handed that
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.interop import peft
from inlay.interop.llm_adapters import ACTIVATIONS
from inlay.interop.peft_folder import Tensors, free_name, hang, read_config, read_tensors
from inlay.interop.peft_vectors import check_keys
from inlay.methods import method

FAMILIES = ("llama", "mistral", "gptj", "gpt2")
"""Decoders that AdapterHub has, all with the same two places for bottlenecks."""
ROTATED = ("llama", "mistral")
"""Those whose prefixes can be converted: rotary embeddings of whole heads."""
BOTTLENECK = {
    "adapter_down.0.weight": "D",
    "adapter_down.0.bias": "c",
    "adapter_up.weight": "U",
    "adapter_up.bias": "e",
    "scaling": "s",
}
COMPACTER = {
    "adapter_down.0.W_left": "D_s",
    "adapter_down.0.W_right": "D_t",
    "adapter_down.0.b": "c",
    "adapter_up.W_left": "U_s",
    "adapter_up.W_right": "U_t",
    "adapter_up.b": "e",
    "scaling": "s",
}


@dataclass(frozen=True)
class Folder:
    """An AdapterHub folder: its inner config and its tensors."""

    path: Path
    name: str
    config: Mapping[str, Any]
    tensors: Tensors

    def error(self, text: str) -> InlayError:
        """An error that names the folder."""
        return InlayError(f"{self.path}: {text}")

    def refuse(self, *fields: str) -> None:
        """Whatever of these is set has no counterpart."""
        for field in fields:
            if self.config.get(field):
                raise self.error(f"{field}={self.config[field]!r} has no counterpart in Inlay; nothing was read")


def read(host: Host, folder: str | Path, name: str | None = None) -> str:
    """Hang an AdapterHub adapter on a host; `InlayError`, and an unchanged host, for what has no counterpart."""
    path = Path(folder)
    meta = read_config(path)
    if meta.get("model_type") != host.anatomy.family or host.anatomy.family not in FAMILIES:
        raise InlayError(
            f"{path} was made for {meta.get('model_type')!r} and this model is a {host.anatomy.family!r}; "
            f"AdapterHub folders are read for {', '.join(FAMILIES)}"
        )
    if meta.get("hidden_size") not in (None, host.hidden):
        raise InlayError(f"{path} was made for hidden size {meta['hidden_size']}, this model has {host.hidden}")
    config: Any = meta["config"]
    if not isinstance(config, dict):
        raise InlayError(f"{path} names its config by identifier {config!r}; save it again with adapters >= 3")
    tensors = {k: v.float() for k, v in read_tensors(path, "adapter.safetensors", "pytorch_adapter.bin").items()}
    kind = config.get("architecture")
    if kind not in READERS:
        raise unknown("AdapterHub architecture", kind, map(str, READERS), f"It stands in {path}.")
    try:
        return READERS[kind](host, Folder(path, meta.get("name", ""), config, tensors), free_name(host, path, name))
    except KeyError as e:
        raise InlayError(f"{path} lacks {e.args[0]!r}; nothing was read") from e


def sort_tensors(folder: Folder, names: Mapping[str, str]) -> dict[tuple[int, str], Tensors]:
    """(layer, where) -> tensors by our name."""
    inner = "|".join(re.escape(n) for n in names)
    pattern = re.compile(rf"(?:.+\.)?(?:layers|h)\.(\d+)\.(attention|output)_adapters\.adapters\.[^.]+\.({inner})")
    found: dict[tuple[int, str], Tensors] = {}
    for key, t in folder.tensors.items():
        if not (m := pattern.fullmatch(key)):
            raise folder.error(f"does not know the tensor {key}; nothing was read")
        found.setdefault((int(m[1]), m[2]), {})[names[m[3]]] = t
    if not found:
        raise folder.error("holds no bottleneck tensors")
    return found


def place_of(folder: Folder, layer: int, where: str) -> str:
    """Our placement of one of AdapterHub's two places in a block, or the reason why there is none."""
    before, after = folder.config.get("original_ln_before"), folder.config.get("original_ln_after", True)
    residual = folder.config.get("residual_before_ln", True)
    if folder.config.get("is_parallel"):
        raise folder.error(
            "is_parallel adapters read the residual stream before the sub-layer's norm, which no layer of this decoder "
            "is handed; Inlay's parallel bottlenecks read what the sub-layer reads"
        )
    if not before and after and residual != "post_add":
        return f"{layer}.{'attn' if where == 'attention' else 'mlp'}:output"
    if before and ((after and residual is True) or (not after and residual is False)):
        if where == "output":
            return f"{layer}.block:output"
        raise folder.error(
            "a bottleneck on the stream between attention and MLP (mh_adapter with original_ln_before) has no place"
        )
    raise folder.error(
        f"original_ln_before={before}, original_ln_after={after}, residual_before_ln={residual!r} drops or doubles "
        "the decoder's residual; such a bottleneck is not read"
    )


def read_bottleneck(host: Host, folder: Folder, name: str) -> str:
    """seq_bn, double_seq_bn and their like; narrower layers are padded with zeros, channel scales folded into U."""
    folder.refuse("use_gating", "ln_before", "ln_after", "inv_adapter", "cross_adapter")
    compacter = bool(folder.config.get("phm_layer"))
    shared = take_rule(folder) if compacter else {}
    found = sort_tensors(folder, COMPACTER if compacter else BOTTLENECK)
    told = str(folder.config.get("non_linearity")).lower()
    if told not in ACTIVATIONS:
        raise unknown("non_linearity", told, ACTIVATIONS, f"It stands in {folder.path}.")
    scaling = folder.config.get("scaling", 1.0)
    size = max(len(t["c"]) for t in found.values() if "c" in t)
    edit = method("compacter" if compacter else "series").make(
        size=size,
        activation=ACTIVATIONS[told],
        bias=True,
        learned_scale=scaling == "learned",
        scale=1.0 if isinstance(scaling, str) else float(scaling),
        **({"n": len(shared["shared/A_down"])} if compacter else {}),
    )
    keys = {at: place_of(folder, *at) for at in found}

    def values(host: Host, name: str) -> dict[str, Tensor]:
        made = dict(shared)
        for at, t in found.items():
            t = t if compacter else padded(fold(t) if scaling == "channel" else t, size)
            made |= {f"{keys[at].split(':')[0]}/{k}": v for k, v in t.items()}
        return made

    return hang(host, name, edit, list(keys.values()), values)


def fold(t: Tensors) -> Tensors:
    """A scale per channel, multiplied into the up projection."""
    return {**{k: v for k, v in t.items() if k != "s"}, "U": t["s"][:, None] * t["U"], "e": t["s"] * t["e"]}


def padded(t: Tensors, size: int) -> Tensors:
    """A narrower bottleneck in a wider one; the new units write nothing."""
    more = size - len(t["c"])
    return (
        t | {"D": pad(t["D"], (0, 0, 0, more)), "c": pad(t["c"], (0, more)), "U": pad(t["U"], (0, more))} if more else t
    )


def take_rule(folder: Folder) -> Tensors:
    """Compacter's shared rule, for both directions; other forms of PHM are refused."""
    c = folder.config
    folder.refuse("factorized_phm_rule", "shared_W_phm")
    if not (c.get("shared_phm_rule") and c.get("factorized_phm_W") and c.get("phm_bias") and c.get("phm_rank") == 1):
        raise folder.error("only Compacter's own PHM form is read: shared rule, factorised W of rank 1, biases")
    rules = [k for k in folder.tensors if k.rsplit(".", 1)[-1] == "phm_rule" or ".shared_parameters." in k]
    if len(rules) != 1:
        raise folder.error(f"holds {len(rules)} shared PHM rules, wanted 1")
    rule = folder.tensors.pop(rules[0])
    return {"shared/A_down": rule, "shared/A_up": rule}


# ---- prefix ----------------------------------------------------------------------------------------------------------
def read_prefix(host: Host, folder: Folder, name: str) -> str:
    """A prefix, flat or with its encoder.

    AdapterHub puts finished keys beside the row's own and leaves the row's positions at 0, 1, ...; here the row stands
    after the prefix, at n, n + 1, ... Rotary scores depend on differences only, so keys turned by n say the same.
    """
    folder.refuse("leave_out", "use_gating")
    if host.anatomy.family not in ROTATED:
        raise folder.error(
            f"a prefix leaves the positions of {host.anatomy.family} as they are, and Inlay's shifts them: "
            "not convertible"
        )
    check_keys(host)
    held: Tensors = {}
    for key, t in folder.tensors.items():
        m = re.fullmatch(r".*prefix_tunings\.[^.]+\.self_prefix\.(.+)", key)
        if not m:
            raise folder.error(f"does not know the tensor {key}; nothing was read")
        if m[1] in held and not torch.equal(held[m[1]], t):
            raise folder.error(f"holds unequal copies of the shared {m[1]}")
        held[m[1]] = t
    n, layers = folder.config["prefix_length"], host.anatomy.layers
    if folder.config.get("flat"):
        flat = held.get("control_trans", torch.zeros(0))
        if not len(flat) or len(flat) % n:
            raise folder.error(f"control_trans holds {len(flat)} numbers, not a multiple of prefix_length={n}")
        edit: Any = method("prefix").make(tokens=n)
        shared, tables = Tensors(), {"table": flat.view(n, -1)}
    else:
        edit, shared, tables = with_encoder(folder, held, n)

    def values(host: Host, name: str) -> dict[str, Tensor]:
        made = dict(shared)
        for k, whole in tables.items():
            wanted = sum(place.d_out for place in (s.places[name] for s in host.sites.values() if name in s.places))
            if whole.shape[-1] != wanted:
                raise folder.error(f"a prefix of width {whole.shape[-1]}; this model's keys and values need {wanted}")
            cut = whole.unflatten(-1, (layers, 2, -1))
            for i in range(layers):
                made[f"{i}.k/{k}"], made[f"{i}.v/{k}"] = turned(host, cut[..., i, 0, :], n), cut[..., i, 1, :]
        return {k: v.T if k.endswith("/W2") else v for k, v in made.items()}

    return hang(host, name, edit, ["k", "v"], values)


def with_encoder(folder: Folder, held: Tensors, n: int) -> tuple[Any, Tensors, Tensors]:
    """(edit, shared tensors, what is cut by layer): our encoder if it is the same, else the finished table."""
    E, W1, b1 = held["wte.weight"], held["control_trans.0.weight"], held["control_trans.0.bias"]
    W2, b2 = held["control_trans.2.weight"], held["control_trans.2.bias"]
    told = str(folder.config.get("non_linearity", "tanh")).lower()
    if told != "tanh":
        raise folder.error(
            f"a prefix encoder with {told!r} is not read, only tanh; eject it first (model.eject_prefix_tuning)"
        )
    edit = method("prefix").make(tokens=n, reparameterise=True, hidden=len(b1))
    return edit, {"shared/E": E, "shared/W1": W1, "shared/b1": b1}, {"W2": W2.T, "b2": b2}


@torch.no_grad()
def turned(host: Host, keys: Tensor, n: int) -> Tensor:
    """Keys (..., heads x width) as the decoder's rotary embedding turns them at position n."""
    rotary = host.model.get_submodule("model.rotary_emb")
    cos, sin = (
        t[0, 0].cpu().float()
        for t in rotary(torch.zeros(1, device=host.device), torch.tensor([[n]], device=host.device))
    )
    k = keys.unflatten(-1, (-1, len(cos)))
    first, second = k.chunk(2, -1)
    return (k * cos + torch.cat([-second, first], -1) * sin).flatten(-2)


# ---- LoRA, (IA)^3 ----------------------------------------------------------------------------------------------------
def read_lora(host: Host, folder: Folder, name: str) -> str:
    """LoRA (composition `add`) or (IA)^3 (composition `scale`, on outputs)."""
    folder.refuse("use_gating", "use_dora", "vera_d", "vera_b")
    c = folder.config
    found = {}
    for key, t in folder.tensors.items():
        m = re.fullmatch(r"(.+)\.loras\.[^.]+\.lora_(A|B)", key)
        if not m:
            raise folder.error(f"does not know the tensor {key}; nothing was read")
        found[f"{m[1]}.lora_{m[2]}"] = t
    if c.get("composition_mode", "add") == "add":
        config = {"peft_type": "LORA", "r": c["r"], "lora_alpha": c["alpha"], "lora_dropout": c.get("dropout", 0.0)}
        return peft.load(host, folder.path, config, {f"{peft.PREFIX}{k}.weight": t for k, t in found.items()}, name)
    scale = float(c.get("alpha", 1))
    config = {"peft_type": "IA3", "feedforward_modules": []}
    vectors = {
        f"{peft.PREFIX}{k.removesuffix('.lora_B')}.ia3_l": t * scale for k, t in found.items() if k.endswith(".lora_B")
    }
    if len(vectors) < len(found):
        raise folder.error("(IA)^3 with a matrix lora_A is not read")
    return peft.load(host, folder.path, config, vectors, name)


READERS: dict[str | None, Callable[[Host, Folder, str], str]] = {
    None: read_bottleneck,
    "bottleneck": read_bottleneck,
    "prefix_tuning": read_prefix,
    "lora": read_lora,
}
"""`config.architecture` -> reader."""
