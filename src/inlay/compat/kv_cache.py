"""transformers' KV caches: under which name a forward takes one, which arguments and outputs are one, what it counts.

Assumptions, and what happens where one fails:

- A forward takes its cache as `cache` (from transformers 5.24 on), `past_key_values` (before) or `cache_params` (state
  space models before 5.24). A cache under another name is recognised by its type and refused.
- A cache counts the columns it holds: `get_seq_length()`. One that does not is refused.
- A cache grows as columns are added. Static ones are allocated for a number of columns that leaves out virtual tokens:
  refused.
- A forward returns its cache under one of the same names, or somewhere in a tuple.

Only forwards with virtual tokens or edits of single positions need any of this (`inlay.core.cache_check` compares the
first cached step of theirs with an uncached one); other adapters never look at a cache.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inlay.compat.versions import named
from inlay.core.errors import InlayError

NAMES = ("cache", "past_key_values", "cache_params")
"""Arguments and outputs that hold a KV cache, the newest name first."""
OTHER_STATE = ("state", "mems", "past_buckets_states")
"""Arguments that carry what other decoders (RWKV, XLNet, Reformer) keep between steps; not served."""
SELF_MADE = ("rope_deltas",)
"""Attributes in which models keep something from one step for the next, beside their cache (Qwen2-VL and its kin)."""
CURE = "generate with use_cache=False, or leave out adapters with virtual tokens and edits of single positions"


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model's forward.

    Args:
        names: in order, without `*args` and `**kwargs`.
        rest: what its `**kwargs` is called; None if it takes none.
        cache: the one that takes the KV cache; None if none has a known name.
    """

    names: tuple[str, ...]
    rest: str | None
    cache: str | None

    def takes(self, name: str) -> bool:
        """Whether a keyword is accepted."""
        return name in self.names or self.rest is not None


@dataclass(frozen=True)
class Argument:
    """A value that was given to a forward, and under which name; `#3` if it stood beyond the named parameters."""

    name: str
    value: Any


_parameters: weakref.WeakKeyDictionary[Any, Parameters] = weakref.WeakKeyDictionary()


def parameters(model: nn.Module) -> Parameters:
    """The parameters of the forward that a call of `model` reaches now; decorated ones are looked through."""
    forward = vars(model).get("forward") or type(model).forward
    forward = getattr(forward, "__func__", forward)
    if forward not in _parameters:
        made = _read(forward)
        # A stand-in that passes everything on says nothing: the class's own forward is meant.
        _parameters[forward] = made if made.names else _read(type(model).forward)
    return _parameters[forward]


def _read(forward: Any) -> Parameters:
    every = inspect.signature(forward).parameters.values()
    names = tuple(p.name for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    names = names[1:] if names[:1] == ("self",) else names
    rest = next((p.name for p in every if p.kind is p.VAR_KEYWORD), None)
    return Parameters(names, rest, next((n for n in NAMES if n in names), None))


def is_cache(value: Any) -> bool:
    """Whether a value is a KV cache by its type: it counts columns, or its class or a parent is called `...Cache`."""
    if value is None or isinstance(value, Tensor | str | int | float | tuple | list | dict):
        return False
    return hasattr(value, "get_seq_length") or any(c.__name__.endswith("Cache") for c in type(value).__mro__)


def given(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Argument]:
    """The KV caches among a forward's arguments, by name or by type; one that is given twice counts once."""
    seen = [Argument(k, v) for k, v in kwargs.items() if v is not None and (k in NAMES or is_cache(v))]
    if len(args) > 1:
        names = parameters(model).names
        named_args = ((names[i] if i < len(names) else f"#{i}", v) for i, v in enumerate(args))
        seen += [Argument(k, v) for k, v in named_args if v is not None and (k in NAMES or is_cache(v))]
    return [a for i, a in enumerate(seen) if all(a.value is not b.value for b in seen[:i])]


def served(model: nn.Module, kwargs: Mapping[str, Any], caches: list[Argument]) -> Any:
    """The cache of a forward with virtual tokens or edits of single positions; None if it continues nothing.

    Raises:
        InlayError: something else carries state between steps, or the cache's name or type is not known.
    """
    kind = type(model).__name__
    if state := next((n for n in OTHER_STATE if kwargs.get(n) is not None), None):
        raise InlayError(f"{kind} carries {state!r} between steps, which virtual tokens are not served with; {CURE}")
    if not caches:
        return None
    if len(caches) > 1:
        raise InlayError(f"{kind} was given several KV caches ({', '.join(c.name for c in caches)}); {CURE}")
    (found,) = caches
    if found.name not in NAMES or parameters(model).cache is None:
        raise InlayError(
            f"{kind} ({named('transformers')}) was given a {type(found.value).__name__} as {found.name!r}, and Inlay "
            f"knows KV caches as {', '.join(NAMES)}; {CURE}"
        )
    if not hasattr(found.value, "get_seq_length"):
        raise InlayError(
            f"a KV cache that is a {type(found.value).__name__} does not count its columns, which virtual tokens need; "
            f"give a transformers DynamicCache, or {CURE}"
        )
    if is_static(found.value):
        raise InlayError(
            f"a {type(found.value).__name__} has no columns for virtual tokens, and hands the model a mask that edits "
            f"of single positions cannot read; use a dynamic cache, or {CURE}"
        )
    return found.value


def is_static(cache: Any) -> bool:
    """Whether a cache is allocated once for a fixed number of columns."""
    return any("Static" in c.__name__ for c in type(cache).__mro__)


def is_approximate(cache: Any) -> bool:
    """Whether a cache keeps less than it was given, so that a cached step is not an uncached one to rounding."""
    return any("Quant" in c.__name__ for c in type(cache).__mro__)


def length(cache: Any) -> int:
    """Columns that a cache holds, virtual tokens included.

    Raises:
        InlayError: it does not tell (caches of state space models do not).
    """
    try:
        return int(cache.get_seq_length())
    except ValueError as e:
        raise InlayError(f"this KV cache ({type(cache).__name__}) does not count its columns: {e}; {CURE}") from e


def argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument that this model's forward takes it by.

    Raises:
        InlayError: the forward takes none under a name that is known.
    """
    name = parameters(model).cache
    if name is None:
        raise InlayError(
            f"{type(model).__name__} ({named('transformers')}) takes no KV cache as {', '.join(NAMES)}; {CURE}"
        )
    return {name: cache}


def renamed(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the cache under the name that the forward has."""
    old = next((n for n in NAMES if kwargs.get(n) is not None), None)
    if old is None or old in parameters(model).names:
        return kwargs
    rest = {k: v for k, v in kwargs.items() if k != old}
    return rest | argument(model, kwargs[old])


def returned(output: Any) -> Any:
    """The KV cache in a model's output, by name or by type; None if there is none."""
    return next((v for k, v in _parts(output) if k in NAMES or is_cache(v)), None)


def _parts(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((k, v) for k, v in output.items() if v is not None)
    elif isinstance(output, tuple | list):
        yield from (("", v) for v in output)
    elif hasattr(output, "__dict__"):
        yield from ((k, v) for k, v in vars(output).items() if v is not None)


def self_made(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, value) of what a model itself keeps from step to step (see `SELF_MADE`)."""
    return [(m, name, vars(m)[name]) for m in model.modules() for name in SELF_MADE if name in vars(m)]
