"""What adapters reach in every decoder and image-text type of the installed transformers.

    python -m tests.models.coverage

writes docs/coverage.md. A place is reached if its adapter changes the logits. All places are asked at once: with random
A and B = 0, the gradient of a random projection of the logits with respect to B is not zero wherever a small B would
change them. Places without a gradient (a router's choice, an indexer's) are asked one by one, with a large B.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import inlay
from inlay.core.place import Spot, collapsed
from inlay.models.anatomy import anatomy
from tests.models import tiny_configs as tiny


@dataclass
class Row:
    """One type: what its places are, and what was reached."""

    kind: str
    auto: str
    name: str
    """Class of the model."""
    layers: int = 0
    towers: list[str] = field(default_factory=list)
    others: int = 0
    """Places that are no linears of the blocks and change the logits."""
    roles: dict[str, int] = field(default_factory=dict)
    """Role -> layers that it is in."""
    reached: int = 0
    linears: int = 0
    """Linears of the blocks, and how many of them change the logits."""
    unreached: list[str] = field(default_factory=list)
    """What the coverage line lists."""
    uncalled: list[str] = field(default_factory=list)
    """Linears of the blocks that the forward did not call, of which it warned."""
    idle: list[str] = field(default_factory=list)
    """Other places that it did not call, of which it warned as well."""
    silent: list[str] = field(default_factory=list)
    """Places that change nothing without a word."""
    unlike_peft: list[str] = field(default_factory=list)
    """Linears that PEFT's `all-linear` has and this has not, or the other way round."""
    refused: list[str] = field(default_factory=list)
    """Places that were refused, with the reason."""


def excite(host: Any, name: str) -> dict[str, torch.Tensor]:
    """Random A and B = 0 at every place of an adapter; {key: B}, the only tensors that want gradients."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for key, w in host.by_place(name).items():
        for k, t in w.items():
            t.requires_grad_(k == "B")
            t.data = torch.randn(t.shape, generator=generator) if k == "A" else torch.zeros_like(t)
        found[key] = w["B"]
    return found


def dead(host: Any, name: str, row: Row) -> list[str]:
    """Keys of an adapter's places that change no logit without a word."""
    inputs, B = tiny.inputs(row.kind, row.auto), excite(host, name)
    grads: tuple[torch.Tensor | None, ...] = (None,) * len(B)
    with host.using(name), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            y = tiny.logits(host.model, inputs)
            way = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            grads = torch.autograd.grad((y * way).sum(), list(B.values()), allow_unused=True)
        except (RuntimeError, AssertionError):  # no gradients here: RWKV and xLSTM write in place, Reformer recomputes
            with torch.no_grad():
                y = tiny.logits(host.model, inputs)
    uncalled = [k for k in B if not host.sites[k].called]
    if any(f"{len(uncalled)} of {len(B)} places" in str(w.message) for w in said):
        (row.uncalled if name == "linear" else row.idle).extend(uncalled)
    quiet = [k for k, g in zip(B, grads, strict=True) if g is None or not g.isfinite().all() or not g.abs().max() > 0]
    return [k for k in quiet if k not in row.uncalled + row.idle and not _changes(host, name, B[k], inputs, y.detach())]


@torch.no_grad()
def _changes(host: Any, name: str, B: torch.Tensor, inputs: dict, bare: torch.Tensor) -> bool:
    """Whether a large B changes the logits."""
    try:
        for seed in range(12):
            B.normal_(std=30.0, generator=torch.Generator().manual_seed(seed))
            with host.using(name):
                if not torch.equal(tiny.logits(host.model, inputs), bare):
                    return True
        return False
    finally:
        B.zero_()


def hung(model: Any, name: str, at: Any, host: Any = None) -> tuple[Any, list[str]]:
    """A host that wears a LoRA there, and what was said."""
    host = host or inlay.attach(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        host.add(name, inlay.method("lora").make(rank=1), at=at, seed=0)
    return host, [str(w.message) for w in said]


def measure(kind: str, auto: str, every_role: bool = False) -> Row:
    """One type: its linears, and with `every_role` every other place as well."""
    model = tiny.model(kind, auto)
    row = Row(kind, auto, type(model).__name__)
    row.unlike_peft = sorted(unlike_peft(model))
    host, said = hung(model, "linear", "linear")
    spots = {s.key: s for s in host.anatomy.spots}
    row.layers, row.towers = host.anatomy.layers, host.anatomy.towers
    for s in host.anatomy.spots:
        row.roles.setdefault(s.role, len({t.layer for t in host.anatomy.spots if t.role == s.role} - {None}))
    row.unreached = list(host.anatomy.unreached)
    row.linears = len(host.by_place("linear"))
    row.silent = dead(host, "linear", row)
    row.reached = row.linears - len(row.silent) - len(row.uncalled)
    if row.unreached and not any("linear" in w for w in said):
        row.silent += row.unreached
    host.remove("linear")
    if every_role:
        _others(row, host, spots)
    return row


def _others(row: Row, host: Any, spots: dict[str, Spot]) -> None:
    """The places that are no linears of the blocks: sub-layers, norms, ends. What is refused names its place."""
    keys = [k for k, s in spots.items() if not s.linear and not s.tower]
    while keys:
        try:
            hung(host.model, "others", keys, host)
            row.silent += dead(host, "others", row)
            row.others = len(keys)
            host.remove("others")
            return
        except inlay.InlayError as e:
            if "others" in host.edits:
                host.remove("others")
            named = [k for k in keys if repr(k) in str(e)] or [k for k in keys if spots[k].parameter][:1]
            if not named:
                raise
            row.refused += [f"{k}: {e}" for k in named]
            keys = [k for k in keys if spots[k].role != spots[named[0]].role]


def unlike_peft(model: Any) -> set[str]:
    """Linears that are a place here and none of PEFT's `target_modules="all-linear"`, or the other way round: an
    independent list. What is said to be unreached, and the head, may be missing here; so may the projections that
    PyTorch's `MultiheadAttention` reads and never calls."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from transformers.pytorch_utils import Conv1D

    ends: Any = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    theirs = {n for n in linears if any(n == end or n.endswith(f".{end}") for end in ends)}
    found = anatomy(model)
    places = {s.path for s in found.spots if s.linear}
    said = {p.removesuffix(".weight") for p in found.unreached} | {s.path for s in found.spots if s.role == "head"}
    within = {n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    read = {n for n in theirs if n.rpartition(".")[0] in within}
    return (theirs - places - said - read) | (places - theirs)


def kinds() -> list[tuple[str, str]]:
    """Every type that can be built."""
    return [(k, a) for k, a in tiny.kinds() if tiny.why_not(k, a) is None]


# ---- the table -------------------------------------------------------------------------------------------------------
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# What adapters reach

Made by `python -m tests.models.coverage` (`make coverage`), with transformers {version}: a tiny random model of every
type that it lists for causal language models and for images with text, an adapter at every place, and a look at which
of them change the logits.

{tried} of {listed} types tried. {reached:,} of {linears:,} linears of their blocks reached. {others:,} other places
(sub-layers, norms, ends) tried, {refused} of them refused by name. {uncalled} places of both kinds are in layers that
no forward calls, and a forward says so. Silent misses: **{silent}**.

- **roles** are what `--at` takes beside `linear`, `block`, `norm`, `embed` and `head`; (2/4): in two of four layers.
- **not reached by `linear`** is what the warning of `--at linear` names: parameters that no module is called for
  (experts, raw routers, hand-written products), linears whose weight is read without a call, linears outside blocks.
- **parts** are beside the language model and are adapted only by name: `vision.linear`, `connector`, `audio.q`.
- `router` is part of `linear` where it is an `nn.Linear`, as in PEFT's `all-linear`; where it is a parameter, it is not
  reached. What is a linear is compared with PEFT's list in every type.

"""


def table(rows: list[Row]) -> str:
    """The page."""
    import transformers

    totals = {
        "version": transformers.__version__,
        "tried": len(rows),
        "listed": len(tiny.kinds()),
        "reached": sum(r.reached for r in rows),
        "linears": sum(r.linears for r in rows),
        "uncalled": sum(len(r.uncalled + r.idle) for r in rows),
        "others": sum(r.others for r in rows),
        "refused": sum(len(r.refused) for r in rows),
        "silent": sum(len(r.silent) for r in rows),
    }
    lines = [HEAD.format(**totals)]
    for auto, title in ((tiny.CAUSAL, "Causal language models"), (tiny.IMAGES, "Images and text")):
        lines += [
            f"## {title}\n",
            "| type | class | roles | linears reached | not reached by `linear` | parts, notes |",
        ]
        lines += ["|---|---|---|---|---|---|", *(_line(r) for r in rows if r.auto == auto), ""]
    lines += ["## Not tried\n", *(f"- `{k}`: {why}" for k, why in tiny.UNBUILT.items()), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    hidden = ("block", "norm", "embed", "head")
    mine = {r: n for r, n in row.roles.items() if "." not in r and r not in hidden and n}
    roles = " ".join(f"`{r}`" + (f" ({n}/{row.layers})" if n < row.layers else "") for r, n in mine.items())
    left = dict.fromkeys(re.sub(r"^.*\.\{?[\d, -]+\}?\.(?=.*[a-z])", "", p) for p in collapsed(row.unreached))
    idle = list(dict.fromkeys(k.split(".")[1] if k[0].isdigit() else k for k in row.uncalled + row.idle))
    notes = [*row.towers, *([f"never called: {', '.join(idle)}"] if idle else [])]
    notes += [f"refused: {', '.join(dict.fromkeys(r.split(':')[0].split('.', 1)[-1] for r in row.refused))}"] * bool(
        row.refused
    )
    cells = (f"`{row.kind}`", row.name, roles, f"{row.reached} / {row.linears}", ", ".join(left), "; ".join(notes))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every type and write the page."""
    rows = []
    for kind, auto in kinds():
        rows.append(measure(kind, auto, every_role=True))
        last = rows[-1]
        print(f"{kind}: {last.reached} of {last.linears}", *last.silent[:4], flush=True)
    PAGE.write_text(table(rows))


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    main()
