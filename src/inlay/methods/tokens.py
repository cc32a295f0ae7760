"""Virtual tokens in reserved columns: prompt tuning and P-tuning at the embedding, prefix tuning at keys and values.

These methods cannot start at the identity: a token that is attended to changes what is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from inlay.core.edit import Call, Edit, Weights
from inlay.core.errors import InlayError
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.start import kaiming


@dataclass(frozen=True, kw_only=True)
class Tokens(Edit):
    """A table of `tokens` trained vectors written into the row's reserved columns; other columns pass unchanged."""

    positional = True
    tokens: int = 10
    """Number of virtual tokens."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InlayError(f"at least 1 virtual token is needed, not {self.tokens}")

    @property
    def room(self) -> int:
        return self.tokens

    def table(self, w: Weights) -> Tensor:
        """The vectors (tokens, D_out)."""
        return w["table"]

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        return Tokens(tokens=self.tokens), {"table": self.table(w)}

    def idle(self, call: Call, tokens: int) -> bool:
        return bool(call.seen) and tokens == 1  # a decoding step never stands in the reserved columns

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        at_BT = call.position_BT(y.shape[1])
        inside = ((at_BT >= 0) & (at_BT < self.tokens))[..., None]
        return torch.where(inside, self.table(w)[at_BT.clamp(0, self.tokens - 1)].to(y.dtype), y)


def _embedding_only(place: Place) -> None:
    if place.role != "embed":
        raise InlayError(
            f"this method's tokens enter at the embedding, not at {place.key!r}; use at='embed' or method 'prefix'"
        )


@dataclass(frozen=True, kw_only=True)
class Prompt(Tokens):
    """[p_1 .. p_n; E(x)] at the embedding.  Lester et al. 2021, arXiv:2104.08691.

    Starts at the embeddings of random words of the vocabulary (the paper's better start), at N(0, 0.02^2), or at
    those of a text, repeated or cut to fit: `Prompt(text="Solve the problem:").tokenised(tokenizer)`.
    """

    kind = "prompt"
    at = "embed"
    tokens: int = 20
    """Number of virtual tokens."""
    start: Literal["vocabulary", "normal"] = "vocabulary"
    """Random start: embeddings of random words, or a normal distribution."""
    text: str = ""
    """Start from the embeddings of this text's tokens instead."""
    ids: tuple[int, ...] = ()
    """The same, as ids."""

    def tokenised(self, tokenizer: Any) -> Prompt:
        if not self.text or self.ids:
            return self
        ids = tuple(tokenizer(self.text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InlayError(f"the start text {self.text!r} has no tokens")
        return replace(self, ids=ids)

    def weights(self, place: Place) -> dict[str, Tensor]:
        _embedding_only(place)
        if self.text and not self.ids:
            raise InlayError("the start text is not tokenised yet: hang prompt.tokenised(tokenizer)")
        if self.ids:
            if max(self.ids) >= place.d_in:
                raise InlayError(f"start id {max(self.ids)} is outside this model's vocabulary of {place.d_in}")
            ids = torch.tensor((self.ids * self.tokens)[: self.tokens])
        else:
            ids = torch.randint(place.d_in, (self.tokens,))
        if self.start == "normal" and not self.ids:
            return {"table": 0.02 * torch.randn(self.tokens, place.d_out)}
        return {"table": place.f(ids).float()}


@dataclass(frozen=True, kw_only=True)
class PTuning(Tokens):
    """[g(e_1) .. g(e_n); E(x)], the table written by a small encoder g.  Liu et al. 2021, arXiv:2103.10385.

    `mlp`: D -> hidden -> hidden -> D with ReLU between; `lstm`: a 2-layer bidirectional LSTM, then 2 hidden -> 2
    hidden -> D.
    """

    kind = "ptuning"
    at = "embed"
    tokens: int = 20
    """Number of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What writes the table."""
    hidden: int = 128
    """Width of the encoder."""

    def _lstm(self, d: int) -> nn.LSTM:
        return nn.LSTM(d, self.hidden, num_layers=2, bidirectional=True, batch_first=True)

    def weights(self, place: Place) -> dict[str, Tensor]:
        _embedding_only(place)
        d, h = place.d_out, self.hidden
        w = {"e": 0.02 * torch.randn(self.tokens, d)}
        sizes = [(h, d), (h, h), (d, h)] if self.encoder == "mlp" else [(2 * h, 2 * h), (d, 2 * h)]
        if self.encoder == "lstm":
            w |= {f"lstm_{k}": v.detach() for k, v in self._lstm(d).named_parameters()}
        for i, (o, n) in enumerate(sizes):
            w |= {f"W{i}": kaiming(o, n), f"b{i}": torch.zeros(o)}
        return w

    def table(self, w: Weights) -> Tensor:
        t = w["e"]
        if self.encoder == "lstm":
            with torch.device("meta"):
                net = self._lstm(t.shape[1])
            flat = {k.removeprefix("lstm_"): v for k, v in w.items() if k.startswith("lstm_")}
            t = functional_call(net, flat, (t[None],))[0][0]
        last = 2 if self.encoder == "mlp" else 1
        for i in range(last + 1):
            t = linear(t, w[f"W{i}"], w[f"b{i}"])
            t = t.relu() if i < last else t
        return t


@dataclass(frozen=True, kw_only=True)
class Prefix(Tokens):
    """Attn(x W_q, [P_K; x W_k], [P_V; x W_v]) in every block: the table stands at k and v.

    Li & Liang 2021, arXiv:2101.00190, without an encoder in the form of P-tuning v2 (Liu et al. 2022,
    arXiv:2110.07602); with `reparameterise` the tables are W2 tanh(W1 E + b1) + b2, E and W1 shared by all places.
    Reserved keys keep position 0, where rotary embeddings turn nothing. What the other layers write into the reserved
    columns is never read, so a prefix must hang in every block.
    """

    kind = "prefix"
    at = "k,v"
    everywhere = True
    room_positions = "zero"
    std: float = 0.02
    """Spread of the normal start; LLM-Adapters starts at 1."""
    reparameterise: bool = False
    """Train a two-layer encoder of the tables instead of the tables."""
    hidden: int = 512
    """Width of that encoder."""

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        layers = {role: {p.key.split(".")[0] for p in places if p.role == role} for role in {p.role for p in places}}
        if set(layers) != {"k", "v"} or layers["k"] != layers["v"]:
            raise InlayError(f"a prefix hangs at k and v of the same layers, not at {sorted(layers)}")
        if not self.reparameterise:
            return {}
        d = places[0].d_in
        return {
            "E": self.std * torch.randn(self.tokens, d),
            "W1": kaiming(self.hidden, d),
            "b1": torch.zeros(self.hidden),
        }

    def weights(self, place: Place) -> dict[str, Tensor]:
        if self.reparameterise:
            return {"W2": kaiming(place.d_out, self.hidden), "b2": torch.zeros(place.d_out)}
        return {"table": self.std * torch.randn(self.tokens, place.d_out)}

    def table(self, w: Weights) -> Tensor:
        if not self.reparameterise:
            return w["table"]
        return linear(torch.tanh(linear(w["E"], w["W1"], w["b1"])), w["W2"], w["b2"])


METHODS = (
    Method("prefix", Prefix, "trained keys and values before the row's own, in every block"),
    Method("prompt", Prompt, "trained vectors before the row's embeddings"),
    Method("ptuning", PTuning, "vectors before the row's embeddings, written by a trained encoder"),
)
