"""What the tests of RoAd share: a layer with a bias, random edits, the dense rotation, small decoders that wear one."""

from __future__ import annotations

import math

import torch
import transformers as hf
from torch.nn.functional import linear

import inlay
from inlay.core.edit import Call
from inlay.core.place import Place
from inlay.methods.rotate import RoAd
from tests.laws.zoo import batch, excite, logits

torch.set_num_threads(1)
D_IN, D_OUT = 96, 128
VARIANTS = (1, 2, 4)
PAIRINGS = ({"pairing": "adjacent"}, {"pairing": "half", "group": 2}, {"pairing": "half", "group": 16})
EXACT = 1e-14


def layer(dtype=torch.float64, d_out: int = D_OUT, seed: int = 0):
    """A linear with a bias (W, b), and the place that it is."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, D_IN, generator=draw, dtype=torch.float64).to(dtype)
    b = torch.randn(d_out, generator=draw, dtype=torch.float64).to(dtype)
    return W, b, Place(lambda x: linear(x, W, b), D_IN, d_out, "q", "0.q", has_bias=True)


def drawn(edit: RoAd, place: Place, seed: int = 1, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random tensors: t ~ N(0, 1), a ~ 1 + 0.3 N(0, 1), the rest N(0, 0.1)."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for k, v in edit.weights(place).items():
        noise = torch.randn(v.shape, generator=draw, dtype=torch.float64)
        made[k] = {"theta": noise, "a": 1 + 0.3 * noise}.get(k, 0.1 * noise).to(dtype)
    return made


def said(edit: RoAd, w, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    """What the edit passes on instead of y (..., D)."""
    place = Place(lambda x: x, D_IN, y.shape[-1], "q", "0.q")
    x = y if x is None else x
    shape = y.shape
    return edit.after(w, x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, shape[-1]), Call(place)).reshape(shape)


def dense(edit: RoAd, w, d: int) -> torch.Tensor:
    """R, entry by entry, as the paper writes it."""
    R = torch.eye(d, dtype=torch.float64)
    g = edit.group if edit.pairing == "half" else 2
    for i in range(d // 2):
        block, within = divmod(i, g // 2)
        m = block * g + within
        n = m + g // 2
        if edit.variant == 1:
            a, t = [w["a"][i]] * 4, [w["theta"][i]] * 4
        elif edit.variant == 2:
            a, t = ([w[k][m], w[k][m], w[k][n], w[k][n]] for k in ("a", "theta"))
        else:
            a, t = ([w[k][m], w[k][d + m], w[k][d + n], w[k][n]] for k in ("a", "theta"))
        R[m, m], R[m, n] = a[0] * math.cos(t[0]), -a[1] * math.sin(t[1])
        R[n, m], R[n, n] = a[2] * math.sin(t[2]), a[3] * math.cos(t[3])
    return R


WIDE = {"hidden_size": D_IN, "intermediate_size": D_OUT, "num_attention_heads": 4, "num_hidden_layers": 1}


def wide(dtype):
    """A decoder whose fc1 is a linear 96 -> 128 with a bias."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        hf.GPTNeoXConfig(vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **WIDE)
    )
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model.to(dtype).eval()


def turned(dtype=torch.float64, at="up", scale=0.5, model=None, **settings):
    """A host on a decoder with biases that wears one random RoAd, `a`."""
    host = inlay.attach(wide(dtype) if model is None else model)
    host.add("a", RoAd(**settings), at=at, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    excite(host, scale)
    return host


def at_layer(host, name, role: str = "up"):
    """(input, output) of a place during a forward."""
    seen = {}
    layer = host.model.get_submodule(host.sites[f"0.{role}"].spot.path)
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    logits(host, name, **batch())
    handle.remove()
    return seen["x"], seen["y"]


EDITS = [*(RoAd(variant=v, **p) for v in VARIANTS for p in PAIRINGS), RoAd(blocks="0.25-0.75")]


def gradients(host, plan, inputs) -> dict:
    host.model.zero_grad()
    for p in host.parameters():
        p.grad = None
    with host.using(*plan):
        host.model(**inputs).logits.square().sum().backward()
    return {f"{n}:{k}": t.grad for n in host.edits for k, t in host.tensors(n).items()}
