"""The engine under other training loops: `transformers.Trainer`, TRL's SFTTrainer, or a loop of one's own.

    with packed_forward(model):
        Trainer(model, args, train_dataset=rows, data_collator=PackingCollator()).train()

Within the block, a forward with labels lays its sequences side by side and gives the head the learned positions only.
The loss is the one the model would have computed. Works on a model that wears Inlay's adapters, on a PEFT model, and on
a plain causal language model, all of it trained or part.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from inlay.api import attach
from inlay.compat.peft import base_model, has_virtual_tokens
from inlay.compat.transformers import attention_name, set_attention_name
from inlay.compat.trl import FUSED_HEAD
from inlay.core.config import text_config
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.rounding import rounding
from inlay.engine.engaged import engaged
from inlay.engine.example import IGNORED, scored
from inlay.engine.head import hidden, loss_sum, refused
from inlay.engine.linear import forwards
from inlay.engine.loss import at_a_time
from inlay.engine.pack import Pack, pack
from inlay.engine.shared import beginning, laid
from inlay.engine.steady import Steady

SPARED = ("use_cache", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that packing makes needless."""
READ = ("input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch", FUSED_HEAD)


class PackingCollator:
    """Rows with `input_ids` and `labels` (attributes or keys) as one row without padding (1, T).

    `position_ids` begin at 0 with each sequence, and each sequence's first label is -100: nothing precedes it. Without
    `labels` every other token is learned. To be used within `packed_forward`, which keeps the sequences apart.
    """

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        made: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for feature in features:
            ids, labels = (_values(feature, name) for name in ("input_ids", "labels"))
            if not ids:
                continue
            made["input_ids"] += ids
            made["labels"] += [IGNORED, *(labels or ids)[1:]]
            made["position_ids"] += range(len(ids))
        return {name: torch.tensor([values]) for name, values in made.items()}


def _values(feature: Any, name: str) -> list[int]:
    found = feature.get(name) if hasattr(feature, "get") else getattr(feature, name, None)
    return [] if found is None else torch.as_tensor(found).tolist()


@contextlib.contextmanager
def packed_forward(model: Any) -> Iterator[Host]:
    """Let the model's forwards with labels run packed, in this block.

    Enter it around `train()`, when the trainer has been made: TRL puts a forward of its own there, which is served too.
    Batches may be padded on the right or flattened (`PackingCollator`, transformers' DataCollatorWithFlattening, TRL's
    `padding_free`). Padded batches of an evaluation, and what cannot be packed, go the model's own way; the reason is
    said once. The first batch is computed both ways, and a difference is such a reason.

    Args:
        model: a causal language model, one with a host of Inlay's (or that host), or a PEFT model.

    Raises:
        InlayError: for PEFT's virtual tokens; in a forward, for a flattened batch that cannot be packed.
    """
    if isinstance(model, Host):
        model = model.model
    if has_virtual_tokens(model):
        raise InlayError("PEFT puts virtual tokens before rows, not into packs; train these without packed_forward")
    inner = base_model(model)
    own = getattr(inner, "_inlay_host", None)
    learns = [p for p in inner.parameters() if p.requires_grad]
    host = own if isinstance(own, Host) else attach(inner)
    for p in learns:  # what PEFT or the user trains goes on learning
        p.requires_grad_(True)
    stands_in = _Forward(host, inner.forward, attention_name(inner.config))
    try:
        with host.decoder_only(), stands_in.engine, forwards({inner: stands_in.wrapped()}):
            stands_in.engage()
            yield host
    finally:
        if own is None:
            host.detach()


@dataclass
class TokenOutput(ModelOutput):
    """What TRL asks of a forward (`compat.trl.TOKEN_OUTPUTS`): per next token (B, T - 1), 0 where none is learned."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


class _Forward:
    """Stands in for a model's forward."""

    def __init__(self, host: Host, forward: Callable[..., Any], attention: str | None):
        self.host, self.forward, self.attention = host, forward, attention
        self.wrong: str | None = None
        """Why this model cannot be packed; empty if it can, None before it was tried."""
        self.said: set[str] = set()
        self.engine, self.steady = contextlib.ExitStack(), Steady()

    def engage(self, narrow: bool = True) -> None:
        """Let forwards compute by the engine from now on; see `engaged`."""
        self.engine.close()
        self.engine.enter_context(engaged(self.host, self.steady, narrow))

    def wrapped(self) -> Callable[..., Any]:
        """Under the signature of the model's own: trainers look at it."""

        @functools.wraps(self.forward)
        def forward(*args: Any, **given: Any) -> Any:
            if args:
                given["input_ids"], *more = args
                if more:
                    raise InlayError("within packed_forward, a model takes its arguments by keyword")
            return self(given)

        return forward

    def __call__(self, given: dict[str, Any]) -> Any:
        flat = given.get("attention_mask") is None and given.get("position_ids") is not None
        why = self._unserved(given, flat)
        ids, labels = ([], []) if why else _sequences(given, flat)
        if self.wrong is None and (few := self._few(ids, labels)):
            self.wrong = self._tried(*few)
        if not why:
            why = self.wrong or ""
        if self.wrong is None and any(map(scored, labels)):
            why = "the first process has not met a batch that could be tried"
        if not why:
            return self._packed(ids, labels, given)
        if flat and given.get("labels") is not None:
            raise InlayError(f"a flattened batch must be packed, and is not: {why}; use a collator that pads")
        if self.host.model.training and why not in self.said:
            self.said.add(why)
            warnings.warn(f"batches are padded, not packed: {why}", stacklevel=2)
        return self._plain(**given)

    def _plain(self, **given: Any) -> Any:
        """The model's own forward under its own attention."""
        self.steady.clear()
        with self._own_attention():
            return self.forward(**given)

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        config = self.host.model.config
        packed = attention_name(config)
        set_attention_name(config, self.attention)
        try:
            yield
        finally:
            set_attention_name(config, packed)

    def _unserved(self, given: dict[str, Any], flat: bool) -> str:
        """Why this call is not for the engine; empty if it is."""
        ids, labels, mask = (given.get(n) for n in ("input_ids", "labels", "attention_mask"))
        if ids is None or labels is None:
            return "a forward without input_ids and labels"
        if not (flat or self.host.model.training):
            return "an evaluation"
        strange = [k for k, v in given.items() if k not in (*READ, *SPARED) and v is not None and v is not False]
        if strange:
            return f"a forward with {strange[0]!r}"
        if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any())):
            return "rows are not padded on the right"
        if mask is not None and bool(labels[mask == 0].ne(IGNORED).any()):
            return "labels of the padding are not -100"
        router = getattr(text_config(self.host.model.config), "output_router_logits", False)
        return "the loss has a term of the experts' router" if router else ""

    def _few(self, ids: list[list[int]], labels: list[list[int]]) -> list[list[list[int]]]:
        """[ids, labels] of a few short sequences, empty if nothing is learned here.

        Processes that hold parts of one model meet in its forwards: all of them are told those of the first.
        """
        learned = [n for n in sorted(range(len(ids)), key=lambda n: len(ids[n])) if scored(labels[n])]
        twice = next((n for n in learned if beginning([ids[n]] * 2, [labels[n]] * 2)), None)
        some = learned[:3] + ([] if twice is None else [twice, twice])
        few = [[ids[n] for n in some], [labels[n] for n in some]] if some else []
        if _sharded(self.host.model):
            told = [few]
            distributed.broadcast_object_list(told, src=0)
            (few,) = told
        return few

    @torch.no_grad()
    def _tried(self, ids: list[list[int]], labels: list[list[int]]) -> str:
        """Whether these have the same loss both ways; if not, what differs."""
        model = self.host.model
        training = model.training
        model.eval()
        try:
            self.engine.close()
            # Without what a trainer put around the forward: accelerate's autocast, entered twice, is never left.
            with forwards({model: self.forward}):
                why = refused(self.host)
                want = 0.0 if why else sum(self._bare(*row) for row in zip(ids, labels, strict=True))
        except Exception as e:  # a decoder that nobody has seen may fail anywhere
            why = f"{type(e).__name__}: {e}"
        finally:
            self.engage()
        try:
            if not why and (why := self._differs(ids, labels, want)):
                self.engage(narrow=False)
                why = self._differs(ids, labels, want)
            if why:  # the model goes on as if nothing had been asked of it
                self.engine.close()
        finally:
            model.train(training)
        return why

    def _bare(self, ids: list[int], labels: list[int]) -> float:
        """Summed loss of one sequence, as the model computes it."""
        row = {"input_ids": ids, "labels": labels}
        made = self.forward(**{k: torch.tensor([v], device=self.host.device) for k, v in row.items()})
        return float(made.loss) * scored(labels)

    def _differs(self, ids: list[list[int]], labels: list[list[int]], want: float) -> str:
        """What is wrong with a packed forward of these; empty if nothing is."""
        try:
            self.steady.clear()
            got = float(loss_sum(self.host, self._pack(ids, labels)))
        except Exception as e:  # as above
            return f"{type(e).__name__}: {e}"
        kind = self.host.device.type
        coarse = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.host.dtype
        near = abs(got - want) <= rounding(coarse) * abs(want)
        return "" if near else f"the loss would change from {want:.6g} to {got:.6g}"

    def _pack(self, ids: list[list[int]], labels: list[list[int]]) -> Pack:
        one = laid(self.host, ids, labels)
        return pack(self.host, one.ids, one.labels, one.parents)

    def _packed(self, ids: list[list[int]], labels: list[list[int]], given: dict[str, Any]) -> Any:
        self.steady.clear()  # no step is announced here; a pack is at least as short
        made = self._pack(ids, labels)
        count = given.get("num_items_in_batch")
        count = max(made.learned, 1) if count is None else count
        if not given.get(FUSED_HEAD):
            return CausalLMOutputWithPast(loss=loss_sum(self.host, made) / count)
        where = given["labels"][:, 1:] != IGNORED
        if given.get("attention_mask") is None and given.get("position_ids") is not None:
            where = where & (given["position_ids"][:, 1:] != 0)
        told = [t.new_zeros(where.shape).masked_scatter(where, t) for t in _tokens(self.host, made)]
        return TokenOutput(-told[0].sum() / count, *told, where)  # type: ignore[call-arg]


def _sharded(model: nn.Module) -> bool:
    """Whether a model's tensors are spread over processes by FSDP2. Raises InlayError for its predecessor."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise InlayError("packed_forward knows FSDP2 only: set fsdp_config={'version': 2}, or train with DDP")
    return isinstance(model, FSDPModule)


def _sequences(given: dict[str, Any], flat: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels of each sequence of a batch."""
    ids, labels = given["input_ids"].tolist(), given["labels"].tolist()
    if flat:
        cuts = [[t for t, p in enumerate(row) if p == 0] + [len(row)] for row in given["position_ids"].tolist()]
    elif given.get("attention_mask") is None:
        cuts = [[0, len(row)] for row in ids]
    else:
        cuts = [[0, n] for n in given["attention_mask"].sum(-1).tolist()]
    spans = [(r, a, b) for r, row in enumerate(cuts) for a, b in zip(row, row[1:], strict=False) if b > a]
    return [ids[r][a:b] for r, a, b in spans], [labels[r][a:b] for r, a, b in spans]


def _tokens(host: Host, made: Pack) -> list[Tensor]:
    """(log-probability, entropy, whether it is the likeliest) of each target (N,); the first has gradients."""
    head: Any = host.model.get_output_embeddings()
    step = at_a_time(head.out_features)
    parts = [
        checkpoint(_scores, head, h, target, use_reentrant=False)
        for h, target in zip(hidden(host, made).split(step), made.target_N.split(step), strict=True)
    ]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _scores(head: nn.Module, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = head(h[None])[0].float().log_softmax(-1)
    with torch.no_grad():
        entropy, best = -(logp.exp() * logp).sum(-1), logp.argmax(-1) == target
    return logp.gather(1, target[:, None])[:, 0], entropy, best
