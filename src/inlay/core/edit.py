"""The idea: an adapter edits what a frozen layer says, y' = after(w, x, f(before(w, x))).

Shapes, named by the last letters of a tensor: B rows, T tokens of this step, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from inlay.core.place import Place

Weights = Mapping[str, Tensor]
Formula = TypeVar("Formula", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Call:
    """What one forward pass tells an edit about the rows it is given."""

    place: Place
    """Where the edit hangs, with the frozen layer as a plain function: `call.place.f(x)`."""
    training: bool = False
    """Whether the model is in training mode: dropout is drawn only then."""
    seen: int = 0
    """Columns that the KV cache held before this step: 0 at prefill and without a cache."""
    first_B: Tensor | None = None
    """The column at which this adapter's own reserved columns begin, per row; None if nobody in the batch asks."""
    side: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs per row, given to `Host.use(..., side=...)`."""
    spare: bool = False
    """Whether what is edited (x of `before`, y of `after`) is nobody else's: the result may be written over it. Told
    only to formulas marked `overwrites`, and never while gradients are recorded or a compiler looks on."""

    def position_BT(self, tokens: int) -> Tensor:
        """Place of each token relative to the adapter's first reserved column, or to the row's own first token if the
        adapter reserves none; negative on left padding."""
        if self.first_B is None:
            raise RuntimeError("this edit reads positions: set `positional = True` on its class")
        return torch.arange(self.seen, self.seen + tokens, device=self.first_B.device) - self.first_B[:, None]

    @property
    def prompt_B(self) -> Tensor:
        """Tokens of each row's prompt; 0 if it was read before this step. For positional edits that reserve nothing."""
        return self.side["prompt"]

    def take(self, rows: Tensor | slice) -> Call:
        """The same call as seen by a subset of the rows."""
        if self.first_B is None and not self.side:
            return self
        return replace(
            self,
            first_B=None if self.first_B is None else self.first_B[rows],
            side={k: v[rows] for k, v in self.side.items()},
        )


def overwrites(formula: Formula) -> Formula:
    """Marks a `before` or `after` that heeds `Call.spare`. A formula that stands over another one (a gate, a
    subclass's) is not marked by that: it still needs the y it was given."""
    formula.overwrites = True  # type: ignore[attr-defined]
    return formula


@dataclass(frozen=True)
class LowRank:
    """gain * (y - b + s B A x) + b, where y is what the layer says and b its bias; or, with `turn`, R y."""

    A: Tensor | None = None
    """(R, D_in)."""
    B: Tensor | None = None
    """(D_out, R)."""
    s: float = 0.0
    gain: Tensor | None = None
    """(D_out,); None: 1."""
    norm: Callable[[], Tensor] | None = None
    """What the gain is divided by (D_out,), a constant that depends on the tensors only."""
    turn: tuple[Tensor, Tensor] | None = None
    """(angles (D_out / 2,), lengths (D_out / 2,)) of the 2 x 2 blocks of R, each of which multiplies neighbours as a
    complex number. Stands alone."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A method: its settings (the fields) and its mathematics. Write `weights` and one of `before`, `after`.

    Laws, each tested over every method and decoder family:
    rows are independent (`after(batch)[rows] == after(batch[rows])`); fresh weights change nothing, to the last bit
    (virtual tokens excepted); shapes are kept; the same inputs give the same result.
    """

    kind: ClassVar[str] = ""
    """The name that files carry. Unique."""
    at: ClassVar[str] = "q,k,v,up,down"
    """Default places, in the placement language (see `inlay.core.place`)."""
    wirings: ClassVar[tuple[str, ...]] = ()
    """The wirings the method knows (`input`, `output`, `parallel`), if it has a choice."""
    positional: ClassVar[bool] = False
    """True if `call.position_BT` or `call.prompt_B` is used."""
    everywhere: ClassVar[bool] = False
    """True if the method makes sense only when it hangs in every layer."""
    coarse: ClassVar[tuple[str, ...] | None] = None
    """Tensors that may be rounded to a 16-bit base's type for speed (`Host.fast`); the edit then meets x and y in that
    type and every other tensor in float32. Factors of products may, gains near 1 may not: their steps would be lost.
    None: everything is in float32."""
    room_positions: ClassVar[str] = "count"
    """Position ids of the reserved columns: `count` (0, 1, 2 ...) or `zero` (all 0: keys meet no rotation)."""

    @property
    def room(self) -> int:
        """Columns that each row reserves on its left for virtual tokens."""
        return 0

    @property
    def prompted(self) -> bool:
        """Whether the host must say where prompts end."""
        return self.positional and not self.room

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn while it trains (dropout): alike tokens may then be treated differently."""
        return bool(getattr(self, "dropout", 0.0))

    def tokenised(self, tokenizer: Any) -> Edit:
        """The same edit, settings given as text turned into ids; whoever has a tokenizer calls it before `add`."""
        return self

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Tensors made once per adapter and handed to every place beside its own."""
        return {}

    def weights(self, place: Place) -> dict[str, Tensor]:
        """The place's own tensors at their start; a name that begins with `_` is a constant: saved, not trained."""
        raise NotImplementedError

    def before(self, w: Weights, x: Tensor, call: Call) -> Tensor:
        """What the frozen layer is given instead of x (B, T, D_in)."""
        return x

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """What is passed on instead of y (B, T, D_out); x is what the layer was first given."""
        return y

    def low_rank(self, w: Weights, call: Call) -> LowRank | None:
        """What `after` says as two thin matrices, for an engine that computes it together with the layer; None where
        it is anything else."""
        return None

    def rounded(self, w: Weights, dtype: torch.dtype) -> Weights:
        """The tensors in the type of a forward: in 16 bits, the coarse ones only."""
        whole = dtype.itemsize > 2 or self.coarse is None
        return {k: v.to(dtype) if v.is_floating_point() and (whole or k in self.coarse) else v for k, v in w.items()}  # type: ignore[operator]

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        """The same edit where nothing is trained or dropped: whatever can be computed beforehand, is. Methods that
        come to the same formula share one edit, so that they share a stack."""
        return self, w

    def viewed(self, w: Weights) -> Weights:
        """Folded tensors as the formula likes to meet them: views of the same memory, made once a plan and place."""
        return w

    def stacks(self, place: Place) -> bool:
        """Whether `before` and `after` also take tensors of a row each, matrices (B, p, q) and vectors (B, 1, p); they
        then read nothing of the call but its place. Neighbouring rows may come as one row of more tokens."""
        return False

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        """Tensors with which this same edit, folded, says y + sum s (edit(x, y) - y) over parts (s, tensors); None if
        no such tensors exist."""
        return None

    def idle(self, call: Call, tokens: int) -> bool:
        """Whether this step of so many tokens passes unchanged, whatever the tensors hold; asked if `positional`."""
        return False

    @property
    def has_penalty(self) -> bool:
        """Whether `penalty` may add a term to the loss."""
        return type(self).penalty is not Edit.penalty

    @property
    def has_after_step(self) -> bool:
        """Whether `after_step` does anything."""
        return type(self).after_step is not Edit.after_step

    def penalty(self, adapter: Mapping[str, Weights]) -> Tensor | None:
        """A term that the training loop adds to the loss, from the tensors of all places (place key -> tensors)."""
        return None

    def shared_by_experts(self, place: Place) -> tuple[str, ...] | None:
        """Names of the tensors that all experts of an expert parameter share; each expert has its own of the others.
        None: the method cannot hang there. What can has no `before`, and is linear in x."""
        return None

    def after_step(self, adapter: Mapping[str, Weights], step: int, total: int, state: dict[str, Tensor]) -> None:
        """Called by the training loop once the optimizer has stepped and while gradients are still there;
        `state` is checkpointed with the run (empty at the first step)."""

    def wiring_of(self, call_or_place: Call | Place) -> str:
        """The wiring asked for at this place."""
        place = call_or_place.place if isinstance(call_or_place, Call) else call_or_place
        return place.wiring or self.default_wiring(place.role)

    def acts(self, place: Place) -> tuple[bool, bool]:
        """Whether `before` and `after` do anything at this place: one of them, where the method has a choice."""
        inside = self.wiring_of(place) == "input"
        return not self.wirings or inside, not self.wirings or not inside

    def default_wiring(self, role: str) -> str:
        """The wiring where the placement names none."""
        return self.wirings[0] if self.wirings else ""


def phases(edit: Edit, place: Place | None = None) -> tuple[bool, bool]:
    """Whether the edit has a `before` and an `after` of its own, and at this place a use for them."""
    before, after = type(edit).before is not Edit.before, type(edit).after is not Edit.after
    acts = (True, True) if place is None else edit.acts(place)
    return before and acts[0], after and acts[1]
