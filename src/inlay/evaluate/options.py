"""Scoring options by their log-likelihood: multiple choice without generating anything."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.compat import kv_cache
from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.core.route import Worn
from inlay.evaluate import tree
from inlay.evaluate.batches import (
    Plan,
    Prompt,
    context,
    in_vocabulary,
    pad_id,
    padded,
    prompt_ids,
    quiet,
    room,
    row_plans,
    takes,
    wear,
)

Normalise = Literal["none", "tokens", "bytes"]
NORMALISE: tuple[Normalise, ...] = ("none", "tokens", "bytes")


def option_scores(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Prompt]],
    plan: Plan = None,
    normalise: Normalise = "none",
    *,
    batch_size: int = 32,
    share: bool = True,
) -> list[list[float]]:
    """Log-likelihood of each option behind its prompt, in nats; the largest is the prediction.

    Args:
        prompts: texts or ids.
        options: per prompt, the continuations, texts or ids. A text is encoded apart from its prompt, without special
            tokens, so that a row is exactly what training on (prompt, answer) under the clean protocol saw.
        plan: as in `generate`.
        normalise: `tokens` and `bytes` divide by the option's tokens or UTF-8 bytes (for options of unlike length).
        share: compute what options share once: trees (`inlay.evaluate.tree`), or copies of their prompts' cache where a
            base cannot be served so. False: one row per option, the plain way.
        batch_size: rows (prompt x option) per forward where no trees are used; not the result.
    """
    found: list[list[float]] = [[] for _ in prompts]
    for done, _ in option_scores_each(
        host, tokenizer, prompts, options, plan, normalise, batch_size=batch_size, share=share
    ):
        for i, scores in done.items():
            found[i] = scores
    return found


def _normalised(score: float, option: Prompt, how: Normalise, tokenizer: Any) -> float:
    if how == "tokens":
        return score / len(_option_ids(tokenizer, option))
    if how == "bytes":
        text = option if isinstance(option, str) else tokenizer.decode(list(option))
        return score / len(text.encode())
    return score


def option_scores_each(
    host: Host,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Prompt]],
    plan: Plan = None,
    normalise: Normalise = "none",
    *,
    batch_size: int = 32,
    share: bool = True,
) -> Iterator[tuple[dict[int, list[float]], float]]:
    """As `option_scores`, forward by forward: ({prompt's index: scores}, seconds since the last ones)."""
    if normalise not in NORMALISE:
        raise unknown("normalisation", normalise, NORMALISE)
    if len(options) != len(prompts):
        raise InlayError(f"{len(options)} lists of options for {len(prompts)} prompts; give one list per prompt")
    if batch_size < 1:
        raise InlayError(f"batch_size {batch_size}: at least 1")
    heads, plans = prompt_ids(tokenizer, prompts), row_plans(host, plan, len(prompts))
    tails = [[_option_ids(tokenizer, o) for o in own] for own in options]
    _check(host, heads, tails, plans)
    in_vocabulary(host, heads)
    for i, own in enumerate(tails):
        in_vocabulary(host, own, f"prompt {i}, option")

    def done(group: Sequence[int], totals: Sequence[Sequence[float]]) -> dict[int, list[float]]:
        return {
            i: [_normalised(s, o, normalise, tokenizer) for s, o in zip(own, options[i], strict=True)]
            for i, own in zip(group, totals, strict=True)
        }

    start = time.perf_counter()
    if heads and share and tree.serves(host, heads, tails):
        for group, said in tree.scores(host, heads, tails, plans):
            yield done(group, [[p for p, _ in own] for own in said]), time.perf_counter() - start
            start = time.perf_counter()
        return
    for group in _groups(heads, tails, batch_size):
        start = time.perf_counter()
        with quiet(host):
            args = ([heads[i] for i in group], [tails[i] for i in group], [plans[i] for i in group])
            totals = (_shared(host, tokenizer, *args) if share else None) or _plain(host, tokenizer, *args, batch_size)
        yield done(group, totals), time.perf_counter() - start


def _option_ids(tokenizer: Any, option: Prompt) -> list[int]:
    return list(tokenizer(option, add_special_tokens=False)["input_ids"]) if isinstance(option, str) else list(option)


def _check(host: Host, heads: list[list[int]], tails: list[list[list[int]]], plans: list[Worn]) -> None:
    most = context(host)
    for i, (head, own, worn) in enumerate(zip(heads, tails, plans, strict=True)):
        if not own or not all(own):
            raise InlayError(f"prompt {i} has {'an option without tokens' if own else 'no options'}: nothing to score")
        need = room(host, worn) + len(head) + max(map(len, own))
        if most is not None and need > most:
            raise InlayError(f"prompt {i} with its longest option needs {need} positions, the base's context is {most}")


def _groups(heads: list[list[int]], tails: list[list[list[int]]], size: int) -> Iterator[list[int]]:
    """Prompts of like length whose options fill at most `size` rows."""
    group: list[int] = []
    rows = 0
    for i in sorted(range(len(heads)), key=lambda i: (-len(heads[i]), i)):
        if group and rows + len(tails[i]) > size:
            yield group
            group, rows = [], 0
        group.append(i)
        rows += len(tails[i])
    if group:
        yield group


def _shared(
    host: Host, tokenizer: Any, heads: list[list[int]], tails: list[list[list[int]]], plans: list[Worn]
) -> list[list[float]] | None:
    """Prompts once, then all options on copies of their cache; None where the cache cannot be copied by row."""
    ids, mask = padded(heads, pad_id(tokenizer), host.device, "left")
    with_positions, with_keep = takes(host, "position_ids", "logits_to_keep")
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    more: dict[str, Any] = {"position_ids": position} if with_positions else {}
    with wear(host, plans):
        out = host.model(
            input_ids=ids, attention_mask=mask, use_cache=True, **more, **({"logits_to_keep": 1} if with_keep else {})
        )
    first = out.logits[:, -1].float().log_softmax(-1)
    owner = torch.tensor([i for i, own in enumerate(tails) for _ in own], device=host.device)
    rows = [t for own in tails for t in own]
    total = first[owner, torch.tensor([t[0] for t in rows], device=host.device)].double()
    if max(map(len, rows)) > 1:
        cache = kv_cache.returned(out)
        if not hasattr(cache, "batch_select_indices"):
            return None
        cache.batch_select_indices(owner)
        more_ids, more_mask = padded([t[:-1] for t in rows], pad_id(tokenizer), host.device, "right")
        whole = torch.cat([mask[owner], more_mask], 1)
        more = {"position_ids": (whole.cumsum(-1) - 1)[:, mask.shape[1] :]} if with_positions else {}
        with wear(host, [plans[i] for i in owner.tolist()]):
            logits = host.model(
                input_ids=more_ids,
                attention_mask=whole,
                use_cache=True,
                **kv_cache.argument(host.model, cache),
                **more,
            ).logits
        total += _gathered(logits, [t[1:] for t in rows], [0] * len(rows))
    return _by_prompt(total, tails)


def _plain(
    host: Host, tokenizer: Any, heads: list[list[int]], tails: list[list[list[int]]], plans: list[Worn], size: int
) -> list[list[float]]:
    rows = [(head, tail, worn) for head, own, worn in zip(heads, tails, plans, strict=True) for tail in own]
    totals = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        ids, mask = padded([h + t[:-1] for h, t, _ in part], pad_id(tokenizer), host.device, "right")
        with wear(host, [worn for *_, worn in part]), host.prompts([len(h) for h, *_ in part]):
            logits = host.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        totals.append(_gathered(logits, [t for _, t, _ in part], [len(h) - 1 for h, *_ in part]))
    return _by_prompt(torch.cat(totals), tails)


def _gathered(logits: Tensor, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
    """Sum of each row's token log-probabilities (B,), its first token being predicted at `start`."""
    sums = []
    for row, start, line in zip(rows, starts, logits, strict=True):
        logp = line[start : start + len(row)].float().log_softmax(-1)
        said = torch.tensor(row, dtype=torch.long, device=logits.device)
        sums.append(logp.gather(1, said[:, None]).double().sum())
    return torch.stack(sums)


def _by_prompt(total: Tensor, tails: list[list[list[int]]]) -> list[list[float]]:
    flat = iter(total.tolist())
    return [[next(flat) for _ in own] for own in tails]
