"""Options as the branches of a tree: what sequences share is computed once, and only what is scored gets logits.

    prompts of a task  ─ [beginning] ─┬─ [prompt 1] ─┬─ [yes]
                                      │              └─ [no] ─┬─ [, never]
                                      └─ [prompt 2] ...       └─ [t yet]

All prompts of a call begin alike, mostly: that beginning is computed once, and every later forward attends to its keys
and values. Prompts with their options are packed side by side (`inlay.core.layout`): an option continues its prompt,
blind to the other options, and options that begin alike share those tokens. Tokens behind which nothing is scored are
never computed: an option of one token costs nothing but a look at its prompt's last logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay.compat.transformers import has_attention_interface, unserved
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.layout import Layout
from inlay.core.rounding import rounding
from inlay.core.route import Worn
from inlay.engine.attention import apart, attending, grouped
from inlay.engine.head import hidden, is_whole
from inlay.engine.linear import fast_linears
from inlay.engine.loss import at_a_time
from inlay.engine.pack import Pack, budget, laid_out, takes_positions, twice_biased
from inlay.engine.shared import LEAST
from inlay.evaluate.batches import Tried, beginning, one_plan, quiet, room, turns, window

Said = tuple[float, bool]
"""An option's log-likelihood in nats, and whether greedy decoding would say it."""


@dataclass
class Tree:
    """A prompt with its options, as sequences that continue each other."""

    sequences: list[list[int]]
    parents: list[int | None]
    scored: dict[tuple[int, int], int] = field(default_factory=dict)
    """(sequence, token) whose logits are wanted -> its place among them."""
    entries: list[tuple[int, int]] = field(default_factory=list)
    """(place, id): the log-likelihoods to read."""
    options: list[list[int]] = field(default_factory=list)
    """Per option, its entries."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return sum(map(len, self.sequences))


def grow(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt and its options, none of them empty."""
    tree = Tree([list(prompt)], [None], options=[[] for _ in options])
    _branch(tree, 0, {i: list(o) for i, o in enumerate(options)})
    return tree


def _branch(tree: Tree, parent: int, rests: dict[int, list[int]]) -> None:
    """Let the rests of some options continue a sequence."""
    groups: dict[int, dict[int, list[int]]] = {}
    for i, rest in rests.items():
        groups.setdefault(rest[0], {})[i] = rest
    for own in groups.values():
        alike = beginning(list(own.values()))
        said = next(iter(own.values()))[:alike]
        further = {i: rest[alike:] for i, rest in own.items() if len(rest) > alike}
        computed = said if further else said[:-1]
        here = len(tree.sequences)
        if computed:
            tree.sequences.append(computed)
            tree.parents.append(parent)
        for t, token in enumerate(said):
            at = (here, t - 1) if t else (parent, len(tree.sequences[parent]) - 1)
            tree.entries.append((tree.scored.setdefault(at, len(tree.scored)), token))
            for i in own:
                tree.options[i].append(len(tree.entries) - 1)
        if further:
            _branch(tree, here, further)


class Scorer:
    """Scores trees, packed, behind a beginning that all prompts share.

    Args:
        shared: tokens of that beginning; 0: none.
    """

    def __init__(self, host: Host, shared: Sequence[int] = ()):
        self.host, self.shared = host, list(shared)
        self._known: dict[Worn, int] = {}
        self._before: list[list[tuple[Tensor, Tensor]]] = []
        self._recording = False
        self._of: list[int] = []
        self._layer = 0
        self._masks: list[Tensor] = []

    def score(self, trees: Sequence[Tree], worn: Sequence[Worn]) -> list[list[Said]]:
        """Per tree, what its options score; the trees' prompts come without the shared beginning."""
        with contextlib.ExitStack() as active:
            active.enter_context(quiet(self.host))
            active.enter_context(self.host.using(None))
            active.enter_context(self._attending() if has_attention_interface(self.host.model) else apart(self.host))
            active.enter_context(fast_linears(self.host.model))
            if self.shared:
                self._begin([w for w in dict.fromkeys(worn) if w not in self._known])
                self._of = [self._known[w] for w in worn]
            return self._score(trees, worn)

    def _begin(self, fresh: Sequence[Worn]) -> None:
        if not fresh:
            return
        self._of, self._recording = [], True
        trees = [Tree([self.shared], [None], {(0, len(self.shared) - 1): 0}) for _ in fresh]
        try:
            hidden(self.host, self._pack(trees, fresh, 0))
        finally:
            self._recording = False
        self._known |= {w: len(self._known) + i for i, w in enumerate(fresh)}

    def _pack(self, trees: Sequence[Tree], worn: Sequence[Worn], behind: int) -> Pack:
        first = [0]
        for tree in trees:
            first.append(first[-1] + len(tree.sequences))
        sequences = [s for tree in trees for s in tree.sequences]
        parents = [None if p is None else at + p for at, tree in zip(first, trees, strict=False) for p in tree.parents]
        self.host.use(*one_plan([w for w, tree in zip(worn, trees, strict=True) for _ in tree.sequences]))
        layout, inputs = laid_out(self.host, sequences, parents, behind=behind)
        scored = [layout.index(at + n, t) for at, tree in zip(first, trees, strict=False) for n, t in tree.scored]
        self._masks, self._layer = [], 0
        where, nothing = torch.tensor(scored, device=self.host.device), inputs["input_ids"].new_empty(0)
        return Pack(inputs, layout, where, nothing, sum(map(len, sequences)))

    def _score(self, trees: Sequence[Tree], worn: Sequence[Worn]) -> list[list[Said]]:
        pack = self._pack(trees, worn, len(self.shared))
        h_ND, now = hidden(self.host, pack), self.host.now
        places, targets, at = [], [], 0
        for tree in trees:
            places += [at + place for place, _ in tree.entries]
            targets += [token for _, token in tree.entries]
            at += len(tree.scored)
        order = sorted(range(len(places)), key=places.__getitem__)
        place = torch.tensor([places[i] for i in order])
        target = torch.tensor([targets[i] for i in order], device=h_ND.device)
        head: Any = self.host.model.get_output_embeddings()
        step = at_a_time(head.out_features)
        found: list[tuple[float, bool]] = []
        for begin in range(0, len(h_ND), step):
            part = slice(begin, begin + step)
            self.host.now = now.only(pack.scored_N[part])  # adapters of the head find their rows
            logits = head(h_ND[part, None])[:, 0].float()
            low, high = torch.searchsorted(place, torch.tensor([begin, begin + step])).tolist()
            row, said = (place[low:high] - begin).to(h_ND.device), target[low:high]
            logp = logits[row, said] - logits.logsumexp(-1)[row]
            found += zip(logp.tolist(), (logits.argmax(-1)[row] == said).tolist(), strict=True)
        entries = [found[0]] * len(order)
        for i, one in zip(order, found, strict=True):
            entries[i] = one
        scores, at = [], 0
        for tree in trees:
            own = [[entries[at + e] for e in option] for option in tree.options]
            scores.append([(sum(p for p, _ in path), all(g for _, g in path)) for path in own])
            at += len(tree.entries)
        return scores

    # ---- attention ---------------------------------------------------------------------------------------------------
    def _attending(self) -> contextlib.AbstractContextManager[None]:
        return attending(self.host, f"inlay-tree-{id(self.host)}", self._attend, lambda *args, **more: None)

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """q (1, H, W, D), k and v (1, H_kv, W, D) -> (1, W, H, D): each tree sees itself and the beginning."""
        if name := unserved(more):
            raise InlayError(f"attention with {name!r} is not served")
        layout = self.host.now.layout
        assert layout is not None
        layer = self._layer
        self._layer = (layer + 1) % self.host.anatomy.layers
        said = []
        for n, (tree, sees) in enumerate(zip(layout.families, self._sees(layout, query.device), strict=True)):
            own = slice(tree.start, tree.start + tree.length)
            q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
            if self._recording:
                if layer == len(self._before):
                    self._before.append([])
                self._before[layer].append((k.clone(), v.clone()))
            elif self._of:
                k, v = (torch.cat((b, t), 2) for b, t in zip(self._before[layer][self._of[n]], (k, v), strict=True))
            said.append(grouped(q, k, v, sees[None, None], scaling, softcap))
        return torch.cat(said, 2).transpose(1, 2), None

    def _sees(self, layout: Layout, device: torch.device) -> list[Tensor]:
        """Per tree, True where a token sees one of the beginning or of the tree (T, P + T)."""
        if not self._masks:
            behind = len(self.shared) if self._of else 0
            for f in layout.families:
                own = f.mask_TT
                if own is None:
                    own = torch.ones(f.length, f.length, dtype=torch.bool).tril_()
                self._masks.append(pad(own, (behind, 0), value=True).to(device))
        return self._masks


def scores(
    host: Host, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]], plans: Sequence[Worn]
) -> Iterator[tuple[list[int], list[list[Said]]]]:
    """Forward by forward: (prompts' indices, what their options score)."""
    wearers = len(set(plans))
    alike = beginning(heads, leave=1)
    # Virtual tokens stand before the text: such a beginning would differ by row. It is no prompt, either.
    whole = any(room(host, w) or any(host.edits[n].prompted for n in w) for w in set(plans))
    worth = alike >= LEAST and len(heads) >= 2 * wearers and not whole
    shared = alike if worth and has_attention_interface(host.model) else 0
    scorer = Scorer(host, heads[0][:shared])
    trees = [grow(head[shared:], own) for head, own in zip(heads, tails, strict=True)]
    size = [tree.tokens + room(host, worn) for tree, worn in zip(trees, plans, strict=True)]
    most = budget(host)
    first = turns(plans)

    def filled(group: Sequence[int]) -> int:
        own = [size[i] for i in group]
        return sum(own) if has_attention_interface(host.model) else len(own) * max(own)

    group: list[int] = []
    for i in sorted(range(len(heads)), key=lambda i: (first[plans[i]], -size[i], i)):
        if group and filled([*group, i]) > most:
            yield group, scorer.score([trees[j] for j in group], [plans[j] for j in group])
            group = []
        group.append(i)
    if group:
        yield group, scorer.score([trees[j] for j in group], [plans[j] for j in group])


BRANCHED = (([3], [4, 8, 6, 1], [4, 2, 5], [7, 3, 7, 2]), ([9],))
"""Options of two prompts: some share tokens, and more than one branch is computed."""


def _refused(host: Host) -> str:
    """Two prompts with options that share tokens, with and without a shared beginning: as each alone?"""
    if twice_biased(host.model) or not takes_positions(host.model):
        return "this decoder's ALiBi counts columns, and would take neighbours for distance"
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    near = rounding(host.dtype)
    heads = [[(5 * i + 1) % vocabulary for i in range(n)] for n in (4, 3)]
    tails = [[[t % vocabulary for t in own] for own in options] for options in BRANCHED]
    try:
        want = []
        with quiet(host), host.using(None):
            if not is_whole(host):
                return "this decoder changes its logits behind the head"
            for head, options in zip(heads, tails, strict=True):
                for tail in options:
                    ids = torch.tensor([head + tail], device=host.device)
                    logp = host.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
                    want.append(sum(logp[len(head) - 1 + t, said].item() for t, said in enumerate(tail)))
        for shared in (0, 2) if has_attention_interface(host.model) else (0,):
            trees = [grow(head[shared:], own) for head, own in zip(heads, tails, strict=True)]
            found = Scorer(host, heads[0][:shared]).score(trees, [(), ()])
            got = [p for own in found for p, _ in own]
            off = max(abs(g - w) / max(1, abs(w)) for g, w in zip(got, want, strict=True))
            if off > near:
                return f"this model's log-likelihoods would change by {off:.2g}"
    except Exception as e:  # a decoder that nobody has seen may fail anywhere
        return f"{type(e).__name__}: {e}"
    return ""


_tried = Tried("options are scored on copies of their prompts' cache, not as trees", _refused)


def serves(host: Host, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether trees give this base's scores of these prompts and options; tried once on a few tokens."""
    near = window(host)
    longest = max((len(h) + sum(map(len, own)) for h, own in zip(heads, tails, strict=True)), default=0)
    return (near is None or longest <= near) and _tried(host)
