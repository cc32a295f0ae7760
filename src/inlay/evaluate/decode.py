"""Generation in mixed batches: each prompt's text is the same whatever shares its batch, and in whatever order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.evaluate import slots
from inlay.evaluate.batches import (
    Plan,
    Prompt,
    in_vocabulary,
    pad_id,
    padded,
    prompt_ids,
    quiet,
    room,
    row_plans,
    turns,
    wear,
)
from inlay.evaluate.rows import (
    GenerateSettings,
    Generation,
    Row,
    end_ids,
    finish,
    pick,
    row_limit,
    row_seeds,
    said,
    stop_ids,
)
from inlay.evaluate.running import Running, sharing


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

    A stop text that is one special token of the tokenizer ends a row at that token (`finished` is `stop`).

    A prompt that leaves less room in the base's context than `max_new_tokens` gets the room there is (`finished` is
    then `length`); one that leaves none is an InlayError, and so are ids that the base does not have and stop texts
    that hold a special token besides other text.
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
    in_vocabulary(host, ids)
    seeds = list(seeds) if seeds is not None else row_seeds(settings.seed, ids, plans)
    if len(seeds) != len(ids):
        raise InlayError(f"{len(seeds)} seeds for {len(ids)} prompts")
    asked = list(limits) if limits is not None else [settings.max_new_tokens] * len(ids)
    if len(asked) != len(ids) or any(n < 1 for n in asked):
        raise InlayError(f"{len(asked)} limits for {len(ids)} prompts: give one each, at least 1")
    first, stops = turns(plans), stop_ids(tokenizer, settings.stop)
    rows = [
        Row(i, row, worn, seed, row_limit(host, i, row, worn, min(n, settings.max_new_tokens)), settings, stops=stops)
        for i, (row, worn, seed, n) in enumerate(zip(ids, plans, seeds, asked, strict=True))
    ]
    rows.sort(key=lambda r: (first[r.worn], -len(r.ids), r.index))
    way = _in_slots if rows and settings.beams == 1 and slots.serves(host) else _in_batches
    yield from way(host, tokenizer, rows, settings)


Made = Iterator[tuple[dict[int, Generation], float]]


def _in_slots(host: Host, tokenizer: Any, rows: list[Row], settings: GenerateSettings) -> Made:
    """As many rows as there are slots, a new one whenever one is done."""
    most = max(room(host, r.worn) + len(r.ids) + r.limit for r in rows)
    running = Running(host, tokenizer, min(settings.batch_size, len(rows)), most)
    running.begin = sharing(running, rows)
    running.waiting.extend(rows)

    def until_done() -> list[Row]:
        while True:
            done = [row for row in running.step() if row.done]
            if done or running.cache.due:
                return done

    start = time.perf_counter()
    while running.busy:
        with running.active():
            done = until_done()
        if done:
            yield {row.index: running.result(row) for row in done}, time.perf_counter() - start
            start = time.perf_counter()


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


def _batch(host: Host, tokenizer: Any, rows: Sequence[Row], limit: int, settings: GenerateSettings) -> list[Generation]:
    ids, mask = padded([r.ids for r in rows], pad_id(tokenizer), host.device, "left")
    wide = ids.shape[1]
    ends, stops = end_ids(host, tokenizer), rows[0].stops
    with _plain_config(host, [*ends, *stops], pad_id(tokenizer)):
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
    return [finish(row, tokenizer, ends, settings.stop, stops) for row in out[:, wide:].tolist()]


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


def _stopper(tokenizer: Any, stop: tuple[str, ...], start: int):
    """Ends rows whose new text holds a stop text; reads their last tokens only, each of which is a byte or more."""
    from transformers import StoppingCriteria

    tail = max(len(s.encode()) for s in stop) + 8

    class Stopper(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            new = input_ids[:, max(start, input_ids.shape[1] - tail) :].tolist()
            return torch.tensor([any(s in said(tokenizer, row) for s in stop) for row in new], device=input_ids.device)

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
