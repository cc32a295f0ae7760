"""A prompt on its way to a text: how it is generated, what was said so far, and when it ends."""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.evaluate.batches import context, room

COLDEST = 1e-4
"""Lowest temperature at which is sampled: below, the likeliest token has all the probability unless another is within
0.001 nats of it, and logits divided by it may overflow."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How text is generated: greedily unless beams or a temperature are asked for."""

    max_new_tokens: int = 256
    """Most tokens per prompt."""
    beams: int = 1
    """Beams of beam search (length penalty 1, as Hugging Face's default); 1: none."""
    temperature: float = 0.0
    """Sampling temperature; 0, and all below `COLDEST`: no sampling."""
    top_p: float = 1.0
    """Sample from the fewest tokens that hold this share of probability; 1: from all."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: int = 0
    """Seed of sampling. Each prompt draws from its own stream, made from this and the prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a generation; they are cut off with all that follows. A special token ends it as a token."""
    batch_size: int = 16
    """Rows computed at a time: speed and memory, never the result (in float32; half precision rounds by shape)."""

    def __post_init__(self) -> None:
        for name, fine in (
            ("max_new_tokens", self.max_new_tokens > 0),
            ("beams", self.beams > 0),
            ("batch_size", self.batch_size > 0),
            ("temperature", self.temperature >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("top_k", self.top_k >= 0),
        ):
            if not fine:
                raise InlayError(f"{name} {getattr(self, name)} is out of range: {_RANGES[name]}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InlayError(f"stop must be a tuple of texts that are not empty, not {self.stop!r}")
        if 0 < self.temperature < COLDEST:
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0)):
                object.__setattr__(self, name, value)
        if self.temperature and self.beams > 1:
            raise InlayError(f"beams {self.beams} with temperature {self.temperature}: beam search does not sample")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise InlayError("top_p and top_k do nothing without a temperature; set temperature above 0, or drop them")


_RANGES = {
    "max_new_tokens": "at least 1",
    "beams": "at least 1",
    "batch_size": "at least 1",
    "temperature": "0 or more",
    "top_p": "above 0, at most 1",
    "top_k": "0 or more",
}


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt."""

    text: str
    """Without the prompt, special tokens, and whatever begins at a stop text."""
    tokens: list[int]
    """The ids generated, an end token included."""
    finished: Literal["eos", "stop", "length"]
    """Why it ended: the end token, a stop text, or the limit of tokens."""


@dataclass(frozen=True)
class Scored:
    """What the model thought of a token that was generated."""

    logp: float
    """Its log-probability, in nats, whatever the temperature."""
    likeliest: list[tuple[int, float]]
    """(id, log-probability) of the likeliest tokens."""


@dataclass(eq=False)
class Row:
    """A prompt on its way."""

    index: int
    ids: list[int]
    worn: Worn
    seed: int
    limit: int
    how: GenerateSettings = field(default_factory=GenerateSettings)
    likeliest: int | None = None
    """How many of the likeliest tokens are noted beside each token's log-probability; None: neither."""
    stops: tuple[int, ...] = ()
    """Special tokens that `how.stop` names: they end this row (`stop_ids`)."""
    tokens: list[int] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    done: bool = False

    @functools.cached_property
    def draws(self) -> list[float]:
        """A uniform number per step, the row's own."""
        return torch.rand(self.limit, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).tolist()

    @property
    def sampled(self) -> tuple[float, int, float]:
        """How its tokens are chosen; rows that are alike are drawn together."""
        return self.how.temperature, self.how.top_k, self.how.top_p

    @functools.cached_property
    def _tail(self) -> int:
        return max((len(s.encode()) for s in self.how.stop), default=0) + 8

    def take(self, token: int, ends: Sequence[int], tokenizer: Any) -> None:
        """Go on by a token, and see whether that was the last one."""
        self.tokens.append(token)
        self.done = (
            token in ends
            or token in self.stops
            or len(self.tokens) == self.limit
            or (bool(self.how.stop) and any(s in said(tokenizer, self.tokens[-self._tail :]) for s in self.how.stop))
        )


def row_limit(host: Host, index: int, ids: Sequence[int], worn: Worn, asked: int) -> int:
    """Most tokens of a row: what was asked for, or the room that the base's context leaves."""
    most = context(host)
    left = asked if most is None else most - room(host, worn) - len(ids)
    if left < 1:
        raise InlayError(
            f"prompt {index} has {len(ids)} tokens ({room(host, worn)} virtual ones come on top), but the base's "
            f"context is {most}; shorten the prompt"
        )
    return min(left, asked)


def row_seeds(seed: int, ids: Sequence[Sequence[int]], plans: Sequence[Worn]) -> list[int]:
    """Each row's own seed: of the prompt, and of how often it came before with the same adapter."""
    seen: Counter[tuple] = Counter()
    seeds = []
    for row, worn in zip(ids, plans, strict=True):
        key = (tuple(row), worn)
        text = repr((seed, list(row), seen[key])).encode()
        seeds.append(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big"))
        seen[key] += 1
    return seeds


def end_ids(host: Host, tokenizer: Any) -> list[int]:
    """Ids that end a text: the base's own and the tokenizer's."""
    own = getattr(host.model.generation_config, "eos_token_id", None)
    found = [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in found if i is not None))


def stop_ids(tokenizer: Any, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids of the stop texts that are one special token each: no text shows them, so they are looked for as tokens.

    Raises InlayError for a stop text that holds one besides other text, which neither way would find.
    """
    if not stop:
        return ()
    special = specials(tokenizer)
    if torn := mixed(stop, special):
        text, token = torn
        raise InlayError(
            f"the stop text {text!r} holds the special token {token!r} besides other text, and generated texts come "
            "without special tokens; give the token alone, or text without it"
        )
    return tuple(special[s] for s in stop if s in special)


def mixed(stop: Sequence[str], special: Iterable[str]) -> tuple[str, str] | None:
    """A stop text that holds a special token besides other text, and that token."""
    return next(((s, t) for s in stop if s not in special for t in special if t in s), None)


def specials(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that decoding leaves out, by their texts."""
    added = {str(t): i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {text: i for text, i in [*added.items(), *named] if text}


def finish(
    tokens: list[int], tokenizer: Any, ends: Sequence[int], stop: tuple[str, ...], stops: Sequence[int] = ()
) -> Generation:
    """The text that these tokens make, without whatever begins at a stop text or a token of `stops`."""
    end = next((i for i, t in enumerate(tokens) if t in ends or t in stops), None)
    spoken = tokens if end is None else tokens[:end]
    text = said(tokenizer, spoken)
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    if not cuts:
        if end is None:
            return Generation(text, tokens, "length")
        return Generation(text, tokens[: end + 1], "eos" if tokens[end] in ends else "stop")
    hit = bisect.bisect_left(
        range(1, len(spoken) + 1), True, key=lambda n: any(s in said(tokenizer, spoken[:n]) for s in stop)
    )
    return Generation(text[: min(cuts)], spoken[: hit + 1], "stop")


def said(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as a text."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pick(scores: Tensor, draw: Tensor, settings: GenerateSettings) -> Tensor:
    """Token per row (B,) for a uniform number per row (B,): temperature, top-k, then top-p (Holtzman et al. 2020)."""
    p, order = (scores.double() / settings.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        p[:, settings.top_k :] = 0
        p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = torch.where(before < settings.top_p, p, 0.0)
    reach = p.cumsum(-1)
    place = torch.searchsorted(reach, draw[:, None] * reach[:, -1:], right=True)
    last = (p > 0).sum(-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last))[:, 0]
