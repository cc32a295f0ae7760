"""Knowledge features: a vector for what an answer means, by default the mean of its tokens' input embeddings.

Features come from the bare base, so that an encoder that is being trained cannot feign progress; only `predict:l` asks
the model as it is. That embeddings and cosine are used is second-hand; mean pooling and the rest are ours
(docs/knowledge.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.engine.pack import budget
from inlay.evaluate.batches import padded, quiet
from inlay.knowledge.wording import Wording

Pool = Literal["mean", "last"]
LOGITS = 1 << 28
"""Most logits of one forward."""


@dataclass(frozen=True)
class Space:
    """Where features live."""

    name: str = "embed"
    """`embed`: input embeddings of the answer's tokens; `hidden:l`: the base's states after layer l where it reads the
    answer behind its prompt (0: embeddings; -1: the last layer); `predict:l`: the present model's state at the prompt's
    last token, which no answer enters."""
    pool: Pool = "mean"
    """Over the answer's tokens: their mean, or the last one."""
    center: bool = False
    """Subtract the mean feature (of the targets measured), for spaces in which all vectors point one way."""

    def __post_init__(self) -> None:
        kind, colon, layer = self.name.partition(":")
        fine = not colon if kind == "embed" else kind in ("hidden", "predict") and layer.lstrip("-").isdigit()
        if not fine:
            raise InlayError(f"unknown space {self.name!r}; there is: embed, hidden:<layer>, predict:<layer>")
        if self.pool not in ("mean", "last"):
            raise InlayError(f"unknown pool {self.pool!r}; there is: mean, last")

    @property
    def kind(self) -> str:
        """`embed`, `hidden` or `predict`."""
        return self.name.partition(":")[0]

    @property
    def layer(self) -> int:
        """The layer of `hidden` and `predict`."""
        return int(self.name.partition(":")[2] or 0)


def features(
    host_or_model: Host | Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    space: Space | str = "embed",
    *,
    wording: Wording | None = None,
    mean: Tensor | None = None,
    plan: str | None = None,
) -> Tensor:
    """Features (N, D), float32, on the CPU. An empty answer has the zero feature.

    Args:
        prompts: of the items, in whose context `hidden` reads the answers. `embed` does not look at them.
        answers: texts; `predict` does not look at them.
        mean: what `Space.center` subtracts (D,); see `Table.mean`.
        plan: the adapter worn under `predict` (None: what is worn now). The other spaces are always of the bare base.
    """
    space = Space(space) if isinstance(space, str) else space
    wording = wording or Wording()
    if len(prompts) != len(answers):
        raise InlayError(f"{len(prompts)} prompts for {len(answers)} answers; give one prompt each")
    if space.center and mean is None:
        raise InlayError("this space is centred: give the mean to subtract, such as the mean of the targets' features")
    tails = wording.answers(tokenizer, answers)
    model = host_or_model.model if isinstance(host_or_model, Host) else host_or_model
    host = host_or_model if isinstance(host_or_model, Host) else getattr(model, "_inlay_host", None)
    with torch.no_grad(), _as_asked(host, space, plan):
        if space.kind == "embed":
            found = _embedded(model, tails, space.pool)
        else:
            found = _states(model, wording.prompts(tokenizer, prompts), tails, space)
    if not space.center or mean is None:
        return found
    full = found.bool().any(-1, keepdim=True)
    return torch.where(full, found - mean, found)


@contextlib.contextmanager
def _as_asked(host: Host | None, space: Space, plan: str | None) -> Iterator[None]:
    """The base bare, but for `predict`; no dropout."""
    if host is None:
        if plan is not None:
            raise InlayError(f"this model has no host, so it cannot wear {plan!r}; give the host")
        yield
        return
    keep = space.kind == "predict" and plan is None
    with quiet(host), contextlib.nullcontext() if keep else host.using(plan if space.kind == "predict" else None):
        yield


@torch.no_grad()
def embeddings(host: Host) -> Tensor:
    """Input embeddings of the bare base (V, D), float32, as its first layer meets them."""
    table: Any = host.model.get_input_embeddings()
    with host.using(None):
        ids = torch.arange(table.num_embeddings, device=host.device)
        E_VD = torch.cat([table(part[None])[0].float() for part in ids.split(4096)]).clone()
    said = int(host.model.get_output_embeddings().out_features)  # type: ignore[union-attr, operator, arg-type]
    if said > len(E_VD):
        raise InlayError(
            f"this base says {said} tokens and reads {len(E_VD)}: expected embeddings and soft distances cannot be had"
        )
    return E_VD


def expected(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    space: Space | None = None,
    *,
    wording: Wording | None = None,
    mean: Tensor | None = None,
    plan: str | None = None,
) -> Tensor:
    """The soft present answer (N, D), float32, on the CPU: what a model expects to say where it said `answers`.

    At each token of an answer, the mean of the bare base's input embeddings under the model's distribution of that
    token, sum_v p(v) E[v]; pooled over tokens as `features` pools. `answers` are the model's own free-running ones, so
    no target is read, and where it is certain this is `features(..., "embed")`. An empty answer has the zero feature.

    Args:
        plan: the adapter worn where answers are read; None is the bare base. Embeddings are the bare base's always.
    """
    space, wording = space or Space(), wording or Wording()
    if space.kind != "embed":
        raise InlayError(f"expected answers live among embeddings, not in {space.name}; use space embed")
    heads, tails = wording.prompts(tokenizer, prompts), wording.answers(tokenizer, answers)
    if len(heads) != len(tails):
        raise InlayError(f"{len(heads)} prompts for {len(tails)} answers; give one prompt each")
    E_VD = embeddings(host)
    rows = [p + a for p, a in zip(heads, tails, strict=True)]
    found = [E_VD.new_zeros(E_VD.shape[1])] * len(rows)
    order = sorted((n for n, own in enumerate(tails) if own), key=lambda n: -len(rows[n]))
    with torch.no_grad(), quiet(host), host.using(plan):
        while order:
            many = max(1, min(budget(host), LOGITS // len(E_VD)) // len(rows[order[0]]))
            batch, order = order[:many], order[many:]
            ids, mask = padded([rows[n] for n in batch], 0, host.device, "right")
            with host.prompts([len(heads[n]) for n in batch]):
                logits = host.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[operator]
            for own, n in zip(logits, batch, strict=True):
                p_TV = own[len(heads[n]) - 1 : len(rows[n]) - 1].float().softmax(-1)
                found[n] = pooled(p_TV @ E_VD[: p_TV.shape[1]], space.pool)
    z = torch.stack(found).cpu()
    return torch.where(z.bool().any(-1, keepdim=True), z - mean, z) if space.center and mean is not None else z


def pooled(vectors_TD: Tensor, pool: Pool) -> Tensor:
    """One vector (D,) of a token each (T, D): summed in float64, so that the order of tokens cannot be seen."""
    return vectors_TD[-1].float() if pool == "last" else vectors_TD.double().mean(0).float()


def _embedded(model: Any, answers: Sequence[Sequence[int]], pool: Pool) -> Tensor:
    """Table look-ups; each token that occurs is looked up once."""
    table = model.get_input_embeddings()
    device = next(model.parameters()).device
    used = sorted({i for own in answers for i in own})
    if not used:
        return torch.zeros(len(answers), table.embedding_dim)
    row = {token: n for n, token in enumerate(used)}
    vectors = table(torch.tensor(used, device=device)[None])[0].float().cpu()
    empty = vectors.new_zeros(vectors.shape[-1])
    return torch.stack([pooled(vectors[[row[i] for i in own]], pool) if own else empty for own in answers])


def _states(model: Any, prompts: list[list[int]], answers: list[list[int]], space: Space) -> Tensor:
    """States at the answer's tokens, or at the prompt's last one, from batches padded on the right."""
    ends = [[]] * len(answers) if space.kind == "predict" else answers
    rows = [p + a for p, a in zip(prompts, ends, strict=True)]
    device = next(model.parameters()).device
    found: list[Tensor | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    while order:
        many = max(1, budget(model) // len(rows[order[0]]))
        batch, order = order[:many], order[many:]
        states = _layer(model, *padded([rows[n] for n in batch], 0, device, "right"), space.layer)
        for own, n in zip(states, batch, strict=True):
            end = len(rows[n])
            begin = end - 1 if space.kind == "predict" else len(prompts[n])
            found[n] = pooled(own[begin:end], space.pool) if end > begin else own.new_zeros(own.shape[-1])
    return torch.stack(found).float().cpu()  # type: ignore[arg-type]


def _layer(model: Any, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """States after a layer (B, T, D)."""
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    states = states.hidden_states
    if not -len(states) <= layer < len(states):
        raise InlayError(f"there is no layer {layer}: this base has {len(states) - 1} (0 is the embeddings)")
    return states[layer].float()
