"""One place of one model: the tensors that hang there and the hooks that let them speak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core import route
from inlay.core.edit import Edit, LowRank, Weights, phases
from inlay.core.errors import InlayError
from inlay.core.fold import Stack
from inlay.core.place import Place, Spot, widths

if TYPE_CHECKING:
    from inlay.core.host import Host


class Wear(nn.Module):
    """The tensors of one adapter at one place: parameters, and buffers for names that begin with `_`.

    A child of the layer it edits, so FSDP2 shards it, `.to()` moves it and `print(model)` shows it with that layer.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, value in tensors.items():
            if name.startswith("_"):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {tuple(v.shape)}" for k, v in self.tensors().items())


class Wardrobe(nn.Module):
    """Adapter name -> `Wear`. Children are called `@name`: none then meets a module's attribute (`half`, `train`)."""

    def __setitem__(self, name: str, wear: Wear) -> None:
        self.add_module(f"@{name}", wear)

    def __getitem__(self, name: str) -> Wear:
        return self._modules[f"@{name}"]  # type: ignore[return-value]

    def __delitem__(self, name: str) -> None:
        del self._modules[f"@{name}"]

    def __len__(self) -> int:
        return len(self._modules)


class Site(nn.Module):
    """Where adapters hang on one layer, or on one part of a fused layer."""

    def __init__(self, host: Host, spot: Spot, layer: nn.Module):
        super().__init__()
        self.wear = Wardrobe()
        self.places: dict[str, Place] = {}
        self.spot = spot
        self._host = [host]  # in a list: the host is no child of the layer
        self._layer = [layer]
        self._given: Tensor | None = None
        self.spoken = False
        """Set by a forward of the layer that has computed the edits in `after` as well: nothing is left to do then."""
        self._sole: WornHere | None = None
        self._found: tuple[tuple[route.Step, ...] | None, tuple[list[WornHere], list[WornHere]]] = None, ([], [])
        d_in, d_out = widths(layer, host.hidden)
        self.place = Place(
            self.frozen,
            d_in,
            spot.part.width(d_out) if spot.part else d_out,
            spot.role,
            spot.key,
            has_bias=getattr(layer, "bias", None) is not None,
            tied=host.tied and spot.role in ("embed", "head"),
        )
        self._hooks = [
            layer.register_forward_pre_hook(self._pre, with_kwargs=True),
            layer.register_forward_hook(self._post, with_kwargs=True),
        ]
        layer.add_module(self._child, self)

    @property
    def _child(self) -> str:
        return f"inlay_{self.spot.role}" if self.spot.part else "inlay"

    @property
    def layer(self) -> nn.Module:
        """The layer that is edited."""
        return self._layer[0]

    def frozen(self, x: Tensor) -> Tensor:
        """What the bare layer (or this part of it) says of x, in the precision of x."""
        host, dtype = self._host[0], x.dtype
        x = x.to(host.device, host.dtype if x.is_floating_point() else None)
        y = self.layer.forward(x)
        y = y[0] if isinstance(y, tuple) else y
        y = self.spot.part.get(y) if self.spot.part else y
        return y.to(dtype) if x.is_floating_point() else y

    def hang(self, name: str, wiring: str, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter's tensors here."""
        self.places[name] = replace(self.place, wiring=wiring)
        self.wear[name] = Wear(tensors)

    def recover(self) -> None:
        """Forget a forward that failed between this layer's input and its output."""
        self._given, self.spoken = None, False

    def wired(self, wiring: str) -> Place:
        """The place as an adapter with this wiring sees it."""
        return self.place if wiring == self.place.wiring else replace(self.place, wiring=wiring)

    def drop(self, name: str, stay: bool = False) -> bool:
        """Take an adapter away; True if nothing is left and the site has removed itself, unless it is to `stay` for
        shelved adapters."""
        del self.wear[name], self.places[name]
        if self.wear or stay:
            return False
        for hook in self._hooks:
            hook.remove()
        delattr(self.layer, self._child)
        return True

    def tensors(self, name: str) -> Weights:
        """An adapter's tensors as its edit sees them: its own here, and those it shares among places."""
        common = self._host[0].common.get(name)
        own = self.wear[name].tensors()
        return {**common.tensors(), **own} if common is not None else own

    def _worn(self, steps: tuple[route.Step, ...]) -> tuple[list[WornHere], list[WornHere]]:
        """What the steps of a route have to do here, in `before` and in `after`."""
        if torch.compiler.is_compiling():  # a graph must not depend on which route it was made under
            return self._find(steps)
        if self._found[0] is not steps:
            self._found = steps, self._find(steps)
            before, after = self._found[1]
            self._sole = after[0] if not before and len(after) == 1 and _serves_all(after[0], self.spot) else None
        return self._found[1]

    def _find(self, steps: tuple[route.Step, ...]) -> tuple[list[WornHere], list[WornHere]]:
        found: tuple[list[WornHere], list[WornHere]] = [], []
        for step in steps:
            one = _worn_here(self._host[0], self, step)
            if one is not None:
                for phase, has in enumerate(phases(one[1])):
                    if has:
                        found[phase].append(one)
        return found

    def run(self, worn: list[WornHere], x: Tensor, y: Tensor | None = None) -> Tensor:
        """Send each row through its own adapters, `before` the layer or (given y) `after` it; rows whose adapters do
        not hang here pass unchanged."""
        host, out = self._host[0], x if y is None else y
        now, dtype = host.now, host.precision(out, worn)
        tokens = x.shape[: -1 if x.is_floating_point() else None].numel() // now.batch
        jobs: list[route.Job] = []
        by_rows = False
        for step, edit, place, w in worn:
            call = now.call(step, place)
            if not edit.idle(call, tokens):
                if w is None or dtype.itemsize < 4:  # folded tensors are in the type of the edit already
                    w = edit.rounded(self.tensors(step.name) if w is None else w, dtype)  # type: ignore[union-attr]
                jobs.append((step, edit, w, call))
                by_rows = by_rows or step.rows is not None or isinstance(step, Stack) or edit.positional
        if not jobs:
            return out
        x_, out_ = (self._rows(x), out if y is None else self._rows(out)) if by_rows else (x, out)
        x_ = x_.to(dtype) if x_.is_floating_point() else x_
        new = route.apply(host.strategy, jobs, x_, None if y is None else out_.to(dtype))
        return new.reshape(out.shape).to(out.dtype) if by_rows else new.to(out.dtype)

    @property
    def edits_input(self) -> bool:
        """Whether this forward changes what the layer is given."""
        return bool(self._worn(self._host[0].now.steps)[0])

    def low_rank(self, x: Tensor) -> LowRank | None:
        """What `after` will do to a batch of which the layer is given x, if that is one low-rank edit of all rows."""
        host = self._host[0]
        before, after = self._worn(host.now.steps)
        if before or len(after) != 1 or host.precision(x, after) != x.dtype:
            return None
        step, edit, place, w = after[0]
        call = host.now.call(step, place)
        if step.rows is not None or isinstance(step, Stack) or edit.positional or edit.idle(call, x.shape[1]):
            return None
        w = self.tensors(step.name) if w is None else w
        return edit.low_rank(edit.rounded(w, x.dtype), call)

    def _rows(self, t: Tensor) -> Tensor:
        """(B, T, ...) even where a decoder has flattened rows and tokens into one (OPT's MLP does)."""
        now = self._host[0].now
        batch = now.batch
        if now.layout is not None:
            wide = 2 if tuple(t.shape[:2]) == now.layout.shape else 1
            if t.shape[:wide].numel() == batch:
                return t.reshape(batch, 1, *t.shape[wide:])
        elif t.shape[0] == batch:
            return t[:, None] if t.dim() == 2 and t.is_floating_point() else t
        if now.layout is None and t.dim() == 2 and t.shape[0] % batch == 0:
            return t.unflatten(0, (batch, -1))
        raise InlayError(
            f"{self.spot.path} sees {tuple(t.shape)}, where the {batch} rows of the batch cannot be told apart; "
            "use one adapter for the whole batch, or hang these adapters elsewhere"
        )

    def _pre(self, layer: nn.Module, args: tuple, kwargs: dict):
        if not (worn := self._worn(self._host[0].now.steps)[0]):
            return None
        x, where = _input(args, kwargs)
        new = self.run(worn, x)
        if new is x:
            return None
        self._given = x
        return ((new, *args[1:]), kwargs) if where is None else (args, kwargs | {where: new})

    def _post(self, layer: nn.Module, args: tuple, kwargs: dict, out):
        now = self._host[0].now
        if self._sole is not None and self._found[0] is now.steps and args and not self.spoken:
            # Decoding under many adapters is mostly this, at every place: as few calls as it takes.
            x, (step, edit, place, w) = args[0], self._sole
            if _plain(out, x, now) and not torch.compiler.is_compiling():
                return edit.after(w, x, out, now.call(step, place))  # type: ignore[arg-type]
        if self.spoken or not (worn := self._worn(self._host[0].now.steps)[1]):
            self._given, self.spoken = None, False
            return None
        x, self._given = self._given, None
        x = _input(args, kwargs)[0] if x is None else x
        whole = out[0] if isinstance(out, tuple) else out
        part = self.spot.part
        y = part.get(whole) if part else whole
        new = self.run(worn, x, y)
        if new is y:
            return None
        new = part.put(whole, new) if part else new
        return (new, *out[1:]) if isinstance(out, tuple) else new


def _serves_all(worn: WornHere, spot: Spot) -> bool:
    """Whether folded tensors serve every row of every step of a whole layer alike."""
    step, edit, _, w = worn
    whole = step.rows is None and w is not None and not edit.positional and type(edit).idle is Edit.idle
    return whole and spot.part is None and spot.role not in ("embed", "head")


def _plain(out: Any, x: Tensor, now: route.Route) -> bool:
    """Whether a layer's output (B, T, D) is in the type of folded adapters, its rows told apart as they are."""
    if not isinstance(out, Tensor) or out.dim() != 3 or out.dtype != x.dtype or out.dtype.itemsize < 4:
        return False
    return now.layout is None and out.shape[0] == now.batch


WornHere = tuple[route.Step, Edit, Place, Weights | None]
"""A step with something to do at a place; tensors None: the adapter hangs there and may be trained."""


def _worn_here(host: Host, site: Site, step: route.Step) -> WornHere | None:
    key = site.spot.key
    if isinstance(step, Stack):
        return (step, step.cut.edits[key], site.wired(step.cut.wirings[key]), step.at[key]) if key in step.at else None
    if (kept := host.shelf.get(step.name)) is not None:
        return (step, kept.cut.edits[key], site.wired(kept.cut.wirings[key]), kept.at[key]) if key in kept.at else None
    return (step, host.edits[step.name], site.places[step.name], None) if step.name in site.places else None


def _input(args: tuple, kwargs: dict) -> tuple[Tensor, str | None]:
    """A layer's first tensor, and its keyword if it came by keyword."""
    if args:
        return args[0], None
    for where in ("hidden_states", "input", "input_ids", "x"):
        if isinstance(kwargs.get(where), torch.Tensor):
            return kwargs[where], where
    raise InlayError(f"cannot see the input of a layer called with the keywords {sorted(kwargs)}")
