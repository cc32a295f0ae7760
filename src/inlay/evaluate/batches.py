"""What generation and option scoring share: prompts as ids, plans per row, batches of like length, padding."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.config import context_length, text_config
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn, read_plan
from inlay.engine.shared import alike

Prompt = str | Sequence[int]
"""A text, encoded with the tokenizer's own start token, or token ids as they are."""
Plan = str | None | Sequence[str | tuple[str, ...] | None]
"""An adapter (or None, the bare base) for every prompt, or a list with one entry a prompt, as `Host.use` reads them."""


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Ids of each prompt; an end token that tokenizers append is taken off, an empty prompt becomes the start token."""
    if isinstance(prompts, str):
        raise InlayError("prompts must be a list of texts, not one text")
    found = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            ids = list(prompt)
        else:
            ids = list(tokenizer(prompt)["input_ids"])
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        if not ids:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if start is None:
                raise InlayError(f"prompt {i} is empty, and the tokenizer has no start token to stand in for it")
            ids = [start]
        found.append(ids)
    return found


def in_vocabulary(host: Host, rows: Sequence[Sequence[int]], what: str = "prompt") -> None:
    """Raises InlayError for ids that the base has no embedding of."""
    size = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for i, row in enumerate(rows):
        if strange := [t for t in row if not 0 <= t < size]:
            raise InlayError(f"{what} {i} has the token id {strange[0]}; this base's are 0 to {size - 1}")


def row_plans(host: Host, plan: Plan, rows: int) -> list[Worn]:
    """What each row wears; raises InlayError for unknown adapters and a list that is not one entry a prompt."""
    if plan is None or isinstance(plan, str):
        return list(read_plan([plan], host.edits)) * rows
    if len(plan) != rows:
        raise InlayError(f"the plan has {len(plan)} entries for {rows} prompts; give one each, or one name for all")
    return list(read_plan(plan, host.edits))


def wear(host: Host, plans: Sequence[Worn]) -> contextlib.AbstractContextManager[Host]:
    """`host.using` for these rows; one entry where all are the same, so that routes are found again."""
    return host.using(*one_plan(plans))


def one_plan(plans: Sequence[Worn]) -> Sequence[Worn]:
    """One entry for all rows where all wear the same."""
    return plans[:1] if len(set(plans)) == 1 else plans


def turns(plans: Sequence[Worn]) -> dict[Worn, int]:
    """Whose turn it is when: rows that wear the same are computed together, and meet others only at the seams. Each
    further adapter in a batch costs time; what a row says is the same either way."""
    return {worn: i for i, worn in enumerate(dict.fromkeys(plans))}


def context(host: Host) -> int | None:
    """Most positions the base was made for; None where it sets no limit (ALiBi)."""
    return context_length(host.model.config)


def room(host: Host, worn: Worn) -> int:
    """Positions that the virtual tokens of these adapters take."""
    return sum(host.edits[name].room for name in worn)


def window(host: Host) -> int | None:
    """The shortest window that any of the base's layers attends to; None where there is none."""
    config = text_config(host.model.config)
    return getattr(config, "sliding_window", None) or None


def beginning(rows: Sequence[Sequence[int]], leave: int = 0) -> int:
    """How many tokens all rows begin with, of which the shortest row has `leave` more."""
    return min(alike(rows), min(map(len, rows)) - leave)


class Tried:
    """Whether a way of computing serves a base: tried once, and said if not.

    Args:
        instead: what happens otherwise.
        refused: tries it and says why not; empty if it serves.
    """

    def __init__(self, instead: str, refused: Callable[[Host], str]):
        self.instead, self.refused = instead, refused
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __call__(self, host: Host) -> bool:
        if host.model not in self._known:
            why = self.refused(host)
            if why:
                warnings.warn(f"{self.instead}: {why}", stacklevel=3)
            self._known[host.model] = not why
        return self._known[host.model]


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest row), padded on the `left` or `right`."""
    wide = max(map(len, rows))
    ids = torch.full((len(rows), wide), pad)
    mask = torch.zeros((len(rows), wide), dtype=torch.long)
    for row, (into, seen) in zip(rows, zip(ids, mask, strict=True), strict=True):
        where = slice(wide - len(row), wide) if side == "left" else slice(0, len(row))
        into[where] = torch.tensor(row, dtype=torch.long)
        seen[where] = 1
    return ids.to(device), mask.to(device)


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows up; which one never matters, as it is masked."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


def takes(host: Host, *names: str) -> list[bool]:
    """Which of these arguments the base's forward has."""
    signature = inspect.signature(host.model.forward).parameters
    return [name in signature for name in names]


@contextlib.contextmanager
def quiet(host: Host) -> Iterator[None]:
    """No dropout and no gradients; modules that were training are so again afterwards.

    `no_grad` rather than `inference_mode`: the host keeps row indices between calls, and a training step must be
    able to use them.
    """
    training = [m for m in host.model.modules() if m.training]
    host.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
