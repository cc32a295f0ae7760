"""RoAd: pairs of outputs are turned and stretched; alone, on some blocks or positions only, and beside LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from inlay.core.edit import Call, Edit, LowRank, Weights, overwrites
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import low_rank
from inlay.core.start import kaiming

WHOLE = "0-1"


# ---- pairs: i and i + group / 2 in each group; neighbours are groups of two ------------------------------------------
def pairs(t: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(..., D) -> its first and second members (..., D / 2)."""
    if group == 2:
        return t[..., 0::2], t[..., 1::2]
    cut = t.unflatten(-1, (-1, 2, group // 2))
    return cut[..., 0, :].flatten(-2), cut[..., 1, :].flatten(-2)


def join(first: Tensor, second: Tensor, group: int) -> Tensor:
    """The same back."""
    if group == 2:
        return torch.stack([first, second], -1).flatten(-2)
    half = (-1, group // 2)
    return torch.stack([first.unflatten(-1, half), second.unflatten(-1, half)], -2).flatten(-3)


def paired(t: Tensor) -> Tensor:
    """Neighbours as complex numbers (..., D / 2)."""
    # A view of a longer vector may begin anywhere; a compiler cannot ask where, and drops copies that are not needed.
    if torch.compiler.is_compiling() or not pairs_up(t):
        t = t.clone(memory_format=torch.contiguous_format)
    return as_pairs(t)


def pairs_up(t: Tensor) -> bool:
    """Whether `as_pairs` can be had of this memory."""
    return not (t.storage_offset() % 2 or any(s % 2 for s in t.stride()[:-1]))


def as_pairs(t: Tensor) -> Tensor:
    """Neighbours as complex numbers (..., D / 2): a view."""
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)))


def spinner(w: Weights) -> Tensor:
    """Blocks of variant 1 as complex numbers (D / 2)."""
    # Not torch.polar: its gradient has the wrong sign where a is below 0.
    return torch.complex(w["a"] * w["theta"].cos(), w["a"] * w["theta"].sin())


def spin(y: Tensor, c: Tensor) -> Tensor:
    """Neighbours, as complex numbers, times c (D / 2): one pass for a turn and a stretch."""
    return torch.view_as_real(paired(y) * c).flatten(-2)


def turn(y: Tensor, R1: Tensor, R2: Tensor, group: int) -> Tensor:
    """R1 * y + R2 * y^."""
    if group == 2:
        hat = torch.view_as_real(1j * paired(y)).flatten(-2)
    else:
        first, second = pairs(y, group)
        hat = join(-second, first, group)
    return (R1 * y).addcmul_(R2, hat)


def at_last(call: Call, y: Tensor, new: Tensor) -> Tensor:
    """`new` at the last token of a row's prompt, y elsewhere."""
    at_BT = call.position_BT(y.shape[1])
    here = (at_BT >= 0) & (at_BT == call.prompt_B[:, None] - 1)
    return torch.where(here[..., None], new, y)


def decoding(call: Call, tokens: int) -> bool:
    """Whether this is a step behind the prompt."""
    return bool(call.seen) and tokens == 1


@dataclass(frozen=True, kw_only=True)
class RoAd(Edit):
    """R y with R block-diagonal, one 2 x 2 block a pair of outputs (bias included).  Liao & Monz 2024,
    arXiv:2409.00119.

    A block is [[a11 cos t11, -a12 sin t12], [a21 sin t21, a22 cos t22]], computed as R1 * y + R2 * y^ with y^ = (-y2,
    y1, -y4, y3, ...). Variant 1 ties a and t within a block (D_out numbers a place), 2 within a row (2 D_out), 4 not
    at all (4 D_out). Starts at a = 1, t = 0. There, variant 4's angles t11 and t22 receive no gradient and never move
    (d cos t = 0 at t = 0).

    With `blocks` only some of the blocks exist; adapters of disjoint blocks commute and may be worn together (the
    paper's composition). With `positions="last-prompt"` at role `block`, R turns the hidden state of the last prompt
    token: the paper's form as an intervention on representations.
    """

    kind = "road"
    at = "linear"
    coarse: ClassVar[tuple[str, ...] | None] = ()
    variant: Literal[1, 2, 4] = 1
    """How much is tied within a block."""
    pairing: Literal["adjacent", "half"] = "adjacent"
    """Which outputs pair up: neighbours (the paper) or i with i + group/2 in each group (HF PEFT)."""
    group: int = 64
    """Group size for `half`."""
    blocks: str = WHOLE
    """Which blocks are trained, as a range of fractions: `0-0.5` is the first half. The others are the identity."""
    positions: Literal["all", "last-prompt"] = "all"
    """Which tokens are turned: all, or the last one of the prompt."""

    def __post_init__(self) -> None:
        try:
            lo, hi = map(float, self.blocks.split("-"))
        except ValueError:
            lo, hi = 0.0, 0.0
        if not 0 <= lo < hi <= 1:
            raise InlayError(
                f"cannot read the blocks {self.blocks!r}; write a range of fractions such as 0-0.5 or 0.5-1"
            )
        object.__setattr__(self, "_range", (lo, hi))

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.positions != "all"

    def span(self, place: Place) -> tuple[int, int]:
        """The outputs lo:hi that are turned; raises InlayError where they cannot be paired."""
        if self.blocks == WHOLE:
            return 0, place.d_out
        lo, hi = (2 * round(at * (place.d_out // 2)) for at in self._range)  # type: ignore[attr-defined]
        return lo, hi

    def _checked(self, place: Place) -> int:
        """Outputs that are turned."""
        if place.role == "embed":
            raise InlayError("RoAd turns a linear's outputs; leave the embedding out")
        if place.d_out % 2:
            raise InlayError(
                f"RoAd pairs outputs, and {place.key!r} has an odd number, {place.d_out}; leave it out of the placement"
            )
        lo, hi = self.span(place)
        if lo == hi:
            raise InlayError(f"blocks {self.blocks!r} name none of the {place.d_out // 2} at {place.key!r}; name more")
        if self.pairing == "half" and (self.group % 2 or place.d_out % self.group):
            raise InlayError(
                f"RoAd's groups of {self.group} do not fit the {place.d_out} outputs of {place.key!r}; choose an even "
                "group that divides them"
            )
        if self.pairing == "half" and (lo % self.group or hi % self.group):
            raise InlayError(
                f"blocks {self.blocks!r} cut a group of {self.group} outputs at {place.key!r} (they are {lo}:{hi}); "
                "choose a smaller group or other blocks"
            )
        return hi - lo

    def weights(self, place: Place) -> dict[str, Tensor]:
        # One dimension for every variant: the training loop decays matrices only, and a that decays towards 0 is no
        # regularisation but a dying layer.
        n = self._checked(place)
        size = {1: n // 2, 2: n, 4: 2 * n}[self.variant]
        return {"theta": torch.zeros(size), "a": torch.ones(size)}

    @property
    def pitch(self) -> int:
        """Size of the groups within which outputs pair up."""
        return 2 if self.pairing == "adjacent" else self.group

    @property
    def spins(self) -> bool:
        """Whether a block is one complex number."""
        return self.variant == 1 and self.pitch == 2

    def rows(self, w: Weights) -> tuple[Tensor, Tensor]:
        """(R1, R2) of the outputs that are turned: the diagonal, and the off-diagonal magnitudes."""
        cos, sin = w["a"] * w["theta"].cos(), w["a"] * w["theta"].sin()
        if self.variant == 1:
            return join(cos, cos, self.pitch), join(sin, sin, self.pitch)
        return (cos, sin) if self.variant == 2 else (cos.chunk(2)[0], sin.chunk(2)[1])

    def whole(self, w: Weights, place: Place) -> dict[str, Tensor]:
        """theta and a of all blocks, those that are left out at their identity."""
        lo, hi = self.span(place)
        per = 2 if self.variant == 1 else 1  # outputs a number

        def filled(t: Tensor, rest: float) -> Tensor:
            rows = t.view(2 if self.variant == 4 else 1, -1)
            return pad(rows, (lo // per, (place.d_out - hi) // per), value=rest).flatten()

        return {"theta": filled(w["theta"], 0.0), "a": filled(w["a"], 1.0)}

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        w = {**w, **self.whole(w, place)}
        every = replace(self, blocks=WHOLE)
        edit = Turn(group=self.pitch, positions=self.positions)
        if self.spins:
            return edit, {"c": torch.view_as_real(spinner(w)).flatten(-2)}
        return edit, dict(zip(("R1", "R2"), every.rows(w), strict=True))

    def low_rank(self, w: Weights, call: Call) -> LowRank | None:
        if not self.spins or type(self) is not RoAd:
            return None
        w = w if self.blocks == WHOLE else self.whole(w, call.place)
        return LowRank(turn=(w["theta"], w["a"]))

    def idle(self, call: Call, tokens: int) -> bool:
        return self.positional and decoding(call, tokens)

    def everywhere_after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """What is said instead of y where the positions ask for it."""
        lo, hi = self.span(call.place)
        part = y[..., lo:hi]
        new = spin(part, spinner(w)) if self.spins else turn(part, *self.rows(w), self.pitch)
        return new if hi - lo == y.shape[-1] else torch.cat([y[..., :lo], new, y[..., hi:]], -1)

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if self.idle(call, y.shape[1]):
            return y
        given, y = y.dtype, y.to(w["a"].dtype)
        new = self.everywhere_after(w, x, y, call)
        return (at_last(call, y, new) if self.positional else new).to(given)


@dataclass(frozen=True, kw_only=True)
class RoAdLoRA(RoAd):
    """R y + s B A x: RoAd on what the frozen layer says and LoRA beside it, which R does not turn.  Liao & Monz 2024,
    arXiv:2409.00119 (LLaVA).

    A (rank, D_in), B (D_out, rank), s = alpha / rank; B starts at zero. Merged: W' = R W + s B A, b' = R b. `blocks`
    are R's alone.
    """

    kind = "road-lora"
    coarse: ClassVar[tuple[str, ...] | None] = ("A", "B")
    rank: int = 32
    """Inner width of the LoRA."""
    alpha: float = 64.0
    """Numerator of its scale."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InlayError(f"rank must be at least 1, not {self.rank}")

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {
            **super().weights(place),
            "A": kaiming(self.rank, place.d_in),
            "B": torch.zeros(place.d_out, self.rank),
        }

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        edit, turned = super().folded(w, place)
        return edit, {**turned, "A": w["A"], "B": self.alpha / self.rank * w["B"]}

    def everywhere_after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        x = dropout(x, self.dropout, True) if self.dropout and call.training else x
        turned = super().everywhere_after(w, x, y, call)
        return low_rank(x, w["A"], w["B"], self.alpha / self.rank, onto=turned.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Turn(Edit):
    """What every RoAd comes to once it is trained: R1 * y + R2 * y^, or c y where a block is one complex number, and
    B A x beside it. No angles, and the same cost for all variants and blocks."""

    group: int = 2
    positions: Literal["all", "last-prompt"] = "all"

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.positions != "all"

    def stacks(self, place: Place) -> bool:
        return not self.positional

    def idle(self, call: Call, tokens: int) -> bool:
        return self.positional and decoding(call, tokens)

    def viewed(self, w: Weights) -> Weights:
        return {**w, "c": as_pairs(w["c"])} if "c" in w and pairs_up(w["c"]) else w

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        over = call.spare and not self.positional
        if "R1" in w:
            new = turn(y, w["R1"], w["R2"], self.group)
        else:
            c = w["c"] if w["c"].is_complex() else paired(w["c"])
            if over and y.is_contiguous() and pairs_up(y):
                y.view(c.dtype).mul_(c)
                new = y
            else:
                new = spin(y, c)
        if "A" in w:
            new = low_rank(x, w["A"], w["B"], 1.0, onto=new, over=over)
        return at_last(call, y, new) if self.positional else new


# ---- one adapter from another ----------------------------------------------------------------------------------------
def to_road2(host: Host, name: str, new: str) -> Host:
    """Hang, as `new`, the RoAd_2 that a RoAd of any variant equals: a = |(R1, R2)|, t = atan2(R2, R1) per output.

    Half of RoAd_4's numbers; the function is the same (up to a rounding of the last place).
    """
    return _hang(host, name, new, lambda edit, w, key: (replace(edit, variant=2), _polar(*edit.rows(w))))


def inverse(host: Host, name: str, new: str) -> Host:
    """Hang, as `new`, the RoAd that undoes RoAd `name`; merged into a base that holds `name`, it restores that base to
    rounding. (`Merged.undo` restores it bit for bit, from kept copies.)

    A block [[p, -q], [r, s]] has the inverse [[s, q], [-r, p]] / (p s + q r). RoAd_1's is a RoAd_1, that of the others
    a RoAd_2. Raises InlayError where a block is singular (a = 0): nothing undoes it.
    """
    return _hang(host, name, new, _inverse)


def _inverse(edit: RoAd, w: Weights, key: str) -> tuple[RoAd, dict[str, Tensor]]:
    if edit.kind != "road":
        raise InlayError(f"the inverse of {edit.kind} is no {edit.kind}; merge with kept copies and undo instead")
    R1, R2 = edit.rows(w)
    (p, s), (q, r) = pairs(R1, edit.pitch), pairs(R2, edit.pitch)
    det = p * s + q * r
    if bool((det == 0).any()):
        raise InlayError(
            f"{int((det == 0).sum())} blocks at {key!r} are singular (a = 0) and have no inverse; keep the base's own "
            "weights instead: merge(keep=True) and undo()"
        )
    if edit.variant == 1:
        return edit, {"theta": -w["theta"], "a": 1 / w["a"]}
    rows = join(s / det, p / det, edit.pitch), join(-q / det, -r / det, edit.pitch)
    return replace(edit, variant=2), _polar(*rows)


def _polar(R1: Tensor, R2: Tensor) -> dict[str, Tensor]:
    return {"theta": torch.atan2(R2, R1), "a": torch.hypot(R2, R1)}


Change = Callable[[RoAd, Weights, str], tuple[RoAd, dict[str, Tensor]]]


@torch.no_grad()
def _hang(host: Host, name: str, new: str, change: Change) -> Host:
    """Another adapter at the places of a RoAd, its tensors computed place by place; those not computed are copied."""
    by_place = host.by_place(name)
    edit = host.edits[name]
    if not isinstance(edit, RoAd):
        raise InlayError(f"{name!r} is {edit.kind}, not RoAd; there is nothing to turn back or to convert")
    made = {key: change(edit, w, key) for key, w in by_place.items()}
    other = next(iter(made.values()))[0]
    dtype = next(iter(by_place.values()))["a"].dtype
    host.add(new, other, at=host.placement(name), dtype=dtype)
    values = {key: {**by_place[key], **w} for key, (_, w) in made.items()}
    return host.fill(new, {f"{key}/{k}": v for key, w in values.items() for k, v in w.items()})


METHODS = (
    Method("road1", RoAd, "pairs of outputs turned and stretched, one angle and one factor a pair", {"variant": 1}),
    Method("road2", RoAd, "RoAd with an angle and a factor per output", {"variant": 2}),
    Method("road4", RoAd, "RoAd with four angles and factors a pair", {"variant": 4}),
    Method("road-lora", RoAdLoRA, "RoAd_1 on the frozen layer's outputs, and LoRA beside it"),
)
