"""The first use of virtual tokens or edits of single positions with a KV cache, compared with the same without one.

What a library does with its cache decides how many columns a step sees, so a change there would turn into other text
without any error. Before a host relies on a cache, it runs `PROMPT` + 1 tokens both ways under the plan at hand: in two
forwards with a cache, and in one without. The logits of the last token must agree to rounding, and the cache must count
exactly the columns it was given. That costs three forwards of a few tokens, once for each kind of edit and of cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.compat import kv_cache
from inlay.compat.versions import named
from inlay.core.errors import InlayError
from inlay.core.rounding import rounding

if TYPE_CHECKING:
    from inlay.core.host import Host

PROMPT = 3
"""Tokens of the first forward; the second one has one more."""
DRAWS = 3
"""Tokens are drawn anew this often before a difference counts: in 16 bits a mixture of experts may choose another
expert for one draw, while a cache that is misread differs in each."""


def check(host: Host, model: nn.Module, cache: Any) -> None:
    """Compare a cached with an uncached step, unless this was done before for such edits and such a cache.

    Nothing of it reaches the caller: neither the cache, nor the random state, nor the plan, nor the module's modes.

    Args:
        model: the module whose forward is about to run.
        cache: what the caller gave it; not touched.

    Raises:
        InlayError: the two differ, or cannot be compared.
    """
    once(host, model, type(cache), functools.partial(_both, host, model, cache))


def once(host: Host, model: nn.Module, kind: type, both: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """Run a comparison, unless it was run before for the edits in use and this kind of cache.

    Args:
        both: number of the draw -> logits (rows, V) of the last token, with a cache of this kind and without one.
            Called under a plan of one row for each different set of adapters that has virtual tokens or edits of single
            positions.
    """
    state = host.forward
    if state.checking or torch.compiler.is_compiling():
        return
    edits = tuple(sorted({host.edits[n].kind for row in host.plan for n in row if host.edits[n].positional}))
    key = (type(model), kind, edits)
    if not edits or key in state.checked:
        return
    with _aside(host, model):
        try:
            why = _compare(host.dtype, both)
        except (InlayError, torch.OutOfMemoryError):
            raise
        except Exception as e:  # a decoder that nobody has seen may fail anywhere
            why = f"a first cached step failed with {type(e).__name__}: {e}"
    if why:
        raise InlayError(
            f"{type(model).__name__} ({named('transformers')}) cannot be trusted with a KV cache ({kind.__name__}) "
            f"under {', '.join(edits)}: {why}; {kv_cache.CURE}"
        )
    state.checked.add(key)


def tokens(host: Host, rows: int, draw: int) -> Tensor:
    """Ids (rows, `PROMPT` + 1) of a comparison."""
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    place = torch.arange(rows * (PROMPT + 1), device=host.device).view(rows, -1)
    return (7 * place + 31 * draw + 5) % vocabulary


def _compare(dtype: torch.dtype, both: Callable[[int], tuple[Tensor, Tensor]]) -> str:
    """What is wrong with a cached step; empty if nothing is."""
    why = ""
    for draw in range(DRAWS):
        got, want = both(draw)
        if got.shape != want.shape:
            return f"logits of shape {tuple(got.shape)} with a cache, {tuple(want.shape)} without"
        scale = float(want.abs().max())
        off = float((got - want).abs().max())
        if not off > rounding(dtype) * scale:  # logits that are not numbers tell nothing
            return ""
        why = f"its logits would change by {off:.2g} (largest logit {scale:.2g})"
    return why


def _both(host: Host, model: nn.Module, cache: Any, draw: int) -> tuple[Tensor, Tensor]:
    """Logits (or hidden states) of the last token (rows, V) in float32: with a cache, and without."""
    rows = len(host.plan)
    ids = tokens(host, rows, draw)
    seen = torch.ones_like(ids)
    takes = kv_cache.parameters(model).takes
    with_cache, without = ({"use_cache": flag} if takes("use_cache") else {} for flag in (True, False))
    wide = host.forward.reserved(rows)

    own = _fresh(cache)
    handed = {} if own is None else kv_cache.argument(model, own)
    out = model(input_ids=ids[:, :PROMPT], attention_mask=seen[:, :PROMPT], **with_cache, **handed)
    if (own := kv_cache.returned(out)) is None:
        raise InlayError(f"{type(model).__name__} returns no KV cache that Inlay knows; {kv_cache.CURE}")
    _counts(own, wide + PROMPT)
    out = model(input_ids=ids[:, PROMPT:], attention_mask=seen, **with_cache, **kv_cache.argument(model, own))
    _counts(own, wide + PROMPT + 1)
    got = _last(out)

    with host.prompts([PROMPT] * rows):
        return got, _last(model(input_ids=ids, attention_mask=seen, **without))


def _fresh(cache: Any) -> Any:
    """An empty cache like the caller's; None where the model had better make one of its own."""
    if kv_cache.is_approximate(cache) or kv_cache.length(cache):
        return None
    try:
        return copy.deepcopy(cache)
    except Exception:  # what it holds cannot be copied
        return None


def _counts(cache: Any, columns: int) -> None:
    if (found := kv_cache.length(cache)) != columns:
        raise InlayError(
            f"a KV cache ({type(cache).__name__}) counts {found} columns after {columns} went in; {kv_cache.CURE}"
        )


def _last(out: Any) -> Tensor:
    first = getattr(out, "logits", None)
    first = getattr(out, "last_hidden_state", None) if first is None else first
    return (out[0] if first is None else first)[:, -1].float()


@contextlib.contextmanager
def _aside(host: Host, model: nn.Module) -> Iterator[None]:
    """Within the block, forwards are a trial's, under one row of each kind in the plan; afterwards all is as before."""
    state = host.forward
    before = host.plan, host.side, host.now, host._bare, host._ready
    counters = state.prompt_B, state._depth, state._wide
    kept = kv_cache.self_made(model)
    training = [m for m in model.modules() if m.training]
    rows = _rows(host)
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=devices):
        state.checking, state.prompt_B, state._depth, state._wide = True, None, 0, 0
        try:
            side = {k: v[rows] if len(v) == len(before[0]) else v for k, v in host.side.items()}
            host._choose(tuple(before[0][i] for i in rows), side)
            model.eval()
            yield
        finally:
            for m in training:
                m.training = True
            for module, name, value in kept:
                setattr(module, name, value)
            host.plan, host.side, host.now, host._bare, host._ready = before
            state.checking = False
            state.prompt_B, state._depth, state._wide = counters


def _rows(host: Host) -> list[int]:
    """The first row of each different set of adapters that has virtual tokens or edits single positions."""
    first: dict[Any, int] = {}
    for i, names in enumerate(host.plan):
        if any(host.edits[n].positional for n in names):
            first.setdefault(names, i)
    return list(first.values())
