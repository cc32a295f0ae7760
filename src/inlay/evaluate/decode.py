"""Generation in mixed batches: each prompt's text is the same whatever shares its batch, and in whatever order."""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.evaluate import slots
from inlay.evaluate.batches import (
    SHARED,
    Plan,
    Prompt,
    beginning,
    context,
    one_plan,
    pad_id,
    padded,
    prompt_ids,
    quiet,
    room,
    row_plans,
    turns,
    wear,
)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How text is generated: greedily unless beams or a temperature are asked for."""

    max_new_tokens: int = 256
    """Most tokens per prompt."""
    beams: int = 1
    """Beams of beam search (length penalty 1, as Hugging Face's default); 1: none."""
    temperature: float = 0.0
    """Sampling temperature; 0: no sampling."""
    top_p: float = 1.0
    """Sample from the fewest tokens that hold this share of probability; 1: from all."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: int = 0
    """Seed of sampling. Each prompt draws from its own stream, made from this and the prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a generation; they are cut off with all that follows."""
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


def generate(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plan: Plan = None,
    settings: GenerateSettings | None = None,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate for each prompt, in the prompts' order.

    Args:
        prompts: texts or ids.
        plan: an adapter for all prompts (None: the bare base), or a list with one entry a prompt; what the host wears
            outside this call does not matter and is not changed.
        seeds: of sampling, one a prompt; by default made from `settings.seed`, the prompt's ids, and how often the same
            prompt with the same adapter came before.
        limits: most new tokens of each prompt, where that is less than `max_new_tokens`.

    A prompt that leaves less room in the base's context than `max_new_tokens` gets the room there is (`finished` is
    then `length`); one that leaves none is an InlayError.
    """
    found: list[Generation | None] = [None] * len(prompts)
    for done, _ in generate_each(host, tokenizer, prompts, plan, settings, seeds, limits):
        for i, one in done.items():
            found[i] = one
    return found  # type: ignore[return-value]


def generate_each(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plan: Plan = None,
    settings: GenerateSettings | None = None,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
) -> Iterator[tuple[dict[int, Generation], float]]:
    """As `generate`, as rows are done: ({prompt's index: generation}, seconds since the last ones)."""
    settings = settings or GenerateSettings()
    ids, plans = prompt_ids(tokenizer, prompts), row_plans(host, plan, len(prompts))
    seeds = list(seeds) if seeds is not None else _seeds(settings.seed, ids, plans)
    if len(seeds) != len(ids):
        raise InlayError(f"{len(seeds)} seeds for {len(ids)} prompts")
    asked = list(limits) if limits is not None else [settings.max_new_tokens] * len(ids)
    if len(asked) != len(ids) or any(n < 1 for n in asked):
        raise InlayError(f"{len(asked)} limits for {len(ids)} prompts: give one each, at least 1")
    first = turns(plans)
    rows = [
        Row(i, row, worn, seed, _limit(host, i, row, worn, min(n, settings.max_new_tokens)))
        for i, (row, worn, seed, n) in enumerate(zip(ids, plans, seeds, asked, strict=True))
    ]
    rows.sort(key=lambda r: (first[r.worn], -len(r.ids), r.index))
    way = _in_slots if rows and settings.beams == 1 and slots.serves(host) else _in_batches
    yield from way(host, tokenizer, rows, settings)


@dataclass
class Row:
    """A prompt on its way."""

    index: int
    ids: list[int]
    worn: Worn
    seed: int
    limit: int
    tokens: list[int] = field(default_factory=list)

    @functools.cached_property
    def draws(self) -> list[float]:
        """A uniform number per step, the row's own."""
        return torch.rand(self.limit, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).tolist()


Made = Iterator[tuple[dict[int, Generation], float]]


def _in_slots(host: Host, tokenizer: Any, rows: list[Row], settings: GenerateSettings) -> Made:
    """As many rows as there are slots, a new one whenever one is done."""
    queue = collections.deque(rows)
    live: list[Row | None] = [None] * min(settings.batch_size, len(rows))
    most = max(room(host, r.worn) + len(r.ids) + r.limit for r in rows)
    cache = slots.Slots(host, len(live), most)
    begin = _beginning(cache, rows)
    ends = end_ids(host, tokenizer)
    tail = max((len(s.encode()) for s in settings.stop), default=0) + 8

    def choose(logits: Tensor, own: Sequence[Row]) -> Tensor:
        if not settings.temperature:
            return logits.argmax(-1)
        draw = torch.tensor([r.draws[len(r.tokens)] for r in own], dtype=torch.float64).to(logits.device)
        return pick(logits.float(), draw, settings)

    def ended(row: Row) -> bool:
        return (
            row.tokens[-1] in ends
            or len(row.tokens) == row.limit
            or any(s in _text(tokenizer, row.tokens[-tail:]) for s in settings.stop)
        )

    def until_done() -> list[Row]:
        worn: list[Worn] | None = None
        while True:
            free = [s for s, row in enumerate(live) if row is None][: len(queue)]
            if free:
                fed = [queue.popleft() for _ in free]
                for s, row in zip(free, fed, strict=True):
                    live[s] = row
                logits, worn = begin(free, fed), None
                where = free
            else:
                _close_up(cache, live)
                fed, where = [row for row in live if row is not None], list(range(len(live)))
                if worn is None:
                    worn = [row.worn for row in fed]
                    host.use(*one_plan(worn))
                logits = cache.step(torch.tensor([row.tokens[-1] for row in fed]).to(host.device, non_blocking=True))
            done = []
            for s, row, token in zip(where, fed, choose(logits, fed).tolist(), strict=True):
                row.tokens.append(token)
                if ended(row):
                    done.append(row)
                    live[s] = None
            if done or cache.due:
                return done

    start = time.perf_counter()
    while queue or any(live):
        with quiet(host), host.using(None), cache.attending():
            done = until_done()
        if done:
            made = {row.index: _finish(row.tokens, tokenizer, ends, settings.stop) for row in done}
            yield made, time.perf_counter() - start
            start = time.perf_counter()


def _close_up(cache: slots.Slots, live: list[Row | None]) -> None:
    """Bring the rows that are left to the first slots."""
    for s in reversed(range(len(live))):
        if live[s] is None:
            if s < len(live) - 1:
                cache.copy(len(live) - 1, s)
                live[s] = live[-1]
            live.pop()


def _beginning(cache: slots.Slots, rows: Sequence[Row]) -> Callable[[Sequence[int], Sequence[Row]], Tensor]:
    """What feeds new rows to free slots and gives the logits of their first tokens: a beginning that all prompts share
    is computed once for everything that is worn, and copied."""
    host = cache.host
    shared = beginning([r.ids for r in rows], leave=1)
    wearers = Counter(r.worn for r in rows)
    kept: dict[Worn, list[tuple[Tensor, Tensor]]] = {}

    def begin(free: Sequence[int], fed: Sequence[Row]) -> Tensor:
        if shared < SHARED or len(rows) < 2 * len(wearers):
            host.use(*one_plan([r.worn for r in fed]))
            return cache.begin(free, [r.ids for r in fed], [r.worn for r in fed])
        for s, row in zip(free, fed, strict=True):
            if row.worn not in kept:
                host.use(row.worn)
                cache.begin([s], [row.ids[:shared]], [row.worn])
                kept[row.worn] = cache.read(s)
            cache.write(s, kept[row.worn])
        host.use(*one_plan([r.worn for r in fed]))
        return cache.go_on(free, [r.ids[shared:] for r in fed])

    return begin


def _in_batches(host: Host, tokenizer: Any, rows: list[Row], settings: GenerateSettings) -> Made:
    """Batches that end with their last row, through Hugging Face's generation."""
    for limit in sorted({r.limit for r in rows}, reverse=True):
        group = [r for r in rows if r.limit == limit]
        for at in range(0, len(group), settings.batch_size):
            batch = group[at : at + settings.batch_size]
            start = time.perf_counter()
            with quiet(host), wear(host, [r.worn for r in batch]):
                made = _batch(host, tokenizer, batch, limit, settings)
            yield {r.index: one for r, one in zip(batch, made, strict=True)}, time.perf_counter() - start


def _limit(host: Host, index: int, ids: Sequence[int], worn: Worn, asked: int) -> int:
    most = context(host)
    left = asked if most is None else most - room(host, worn) - len(ids)
    if left < 1:
        raise InlayError(
            f"prompt {index} has {len(ids)} tokens ({room(host, worn)} virtual ones come on top), but the base's "
            f"context is {most}; shorten the prompt"
        )
    return min(left, asked)


def _seeds(seed: int, ids: Sequence[Sequence[int]], plans: Sequence[Worn]) -> list[int]:
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


def _batch(host: Host, tokenizer: Any, rows: Sequence[Row], limit: int, settings: GenerateSettings) -> list[Generation]:
    ids, mask = padded([r.ids for r in rows], pad_id(tokenizer), host.device, "left")
    wide = ids.shape[1]
    ends = end_ids(host, tokenizer)
    with _plain_config(host, ends, pad_id(tokenizer)):
        out = host.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            num_beams=settings.beams,
            do_sample=False,
            use_cache=True,
            logits_processor=[_sampler(rows, wide, settings)] if settings.temperature else None,
            stopping_criteria=[_stopper(tokenizer, settings.stop, wide)] if settings.stop else None,
        )
    return [_finish(row, tokenizer, ends, settings.stop) for row in out[:, wide:].tolist()]


@contextlib.contextmanager
def _plain_config(host: Host, ends: list[int], pad: int) -> Iterator[None]:
    """Set aside the generation defaults that came with the base: its penalties and temperatures would leak in."""
    from transformers import GenerationConfig

    own = host.model.generation_config
    host.model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)  # type: ignore[assignment]
    try:
        yield
    finally:
        host.model.generation_config = own


def _finish(tokens: list[int], tokenizer: Any, ends: list[int], stop: tuple[str, ...]) -> Generation:
    end = next((i for i, t in enumerate(tokens) if t in ends), None)
    spoken = tokens if end is None else tokens[:end]
    text = _text(tokenizer, spoken)
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    if not cuts:
        return Generation(text, tokens if end is None else tokens[: end + 1], "length" if end is None else "eos")
    hit = bisect.bisect_left(
        range(1, len(spoken) + 1), True, key=lambda n: any(s in _text(tokenizer, spoken[:n]) for s in stop)
    )
    return Generation(text[: min(cuts)], spoken[: hit + 1], "stop")


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stopper(tokenizer: Any, stop: tuple[str, ...], start: int):
    """Ends rows whose new text holds a stop text; reads their last tokens only, each of which is a byte or more."""
    from transformers import StoppingCriteria

    tail = max(len(s.encode()) for s in stop) + 8

    class Stopper(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            new = input_ids[:, max(start, input_ids.shape[1] - tail) :].tolist()
            return torch.tensor([any(s in _text(tokenizer, row) for s in stop) for row in new], device=input_ids.device)

    return Stopper()


def _sampler(rows: Sequence[Row], start: int, settings: GenerateSettings):
    """Sampling by inversion, one uniform number per row and step, so that a row's draws are its own."""
    from transformers import LogitsProcessor

    draws = torch.tensor([r.draws for r in rows], dtype=torch.float64)

    class Sampler(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            at = draws[:, input_ids.shape[1] - start].to(scores.device)
            chosen = pick(scores, at, settings)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    return Sampler()


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
