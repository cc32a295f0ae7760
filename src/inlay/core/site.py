"""One place of one model: the tensors that hang there and the hooks that let them speak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    spoken = False
    """Set by a forward of the layer that has computed the edits in `after` as well: nothing is left to do then."""
    called = False
    """Whether a forward has called the layer: some decoders skip one, or read its weight."""
    _given: Tensor | None = None

    def __init__(self, host: Host, spot: Spot, layer: nn.Module):
        super().__init__()
        self.wear = Wardrobe()
        self.places: dict[str, Place] = {}
        self.spot = spot
        self._host = [host]  # in a list: the host is no child of the layer
        self._layer = [layer]
        self._worn = Worn(())
        self._hooks: list[RemovableHandle] = []
        self._plain = spot.linear or spot.role in ("embed", "head")
        """Whether what it takes and gives is known: one tensor each, of the same tokens."""
        self.place = self._place(host, layer)
        self._join(layer)
        layer.add_module(self._child, self)

    def _place(self, host: Host, layer: nn.Module) -> Place:
        """The layer as an edit without a wiring sees it."""
        d_in, d_out = widths(layer, self.spot.width or host.hidden)
        spot = self.spot
        return Place(
            self.frozen,
            d_in,
            spot.part.width(d_out) if spot.part else d_out,
            spot.role,
            spot.key,
            has_bias=getattr(layer, "bias", None) is not None,
            tied=host.tied and spot.role in ("embed", "head"),
        )

    def _join(self, layer: nn.Module) -> None:
        """Take part in the layer's forward."""
        self._hooks.append(layer.register_forward_hook(self._post, with_kwargs=True))

    def _part(self, layer: nn.Module) -> None:
        """Take part in it no longer."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, x: Any) -> Any:
        """A child of an `nn.Sequential` is run by it: this one passes on what it is given."""
        return x

    @property
    def _child(self) -> str:
        if self.spot.parameter:
            return f"inlay_{self.spot.parameter}"
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
        y = y[0] if isinstance(y, (tuple, list)) else y
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
        self._part(self.layer)
        delattr(self.layer, self._child)
        return True

    def tensors(self, name: str) -> Weights:
        """An adapter's tensors as its edit sees them: its own here, and those it shares among places."""
        common = self._host[0].common.get(name)
        own = self.wear[name].tensors()
        return {**common.tensors(), **own} if common is not None else own

    def listen(self, steps: tuple[route.Step, ...]) -> None:
        """Be asked before the layer as well, if one of these steps edits what the layer is given."""
        if len(self._hooks) == 1 and self.worn(steps).before:
            self._hooks.append(self.layer.register_forward_pre_hook(self._pre, with_kwargs=True))

    def worn(self, steps: tuple[route.Step, ...]) -> Worn:
        """What the steps of a route have to do here."""
        compiled = torch.compiler.is_compiling()  # a graph must not depend on which route it was made under
        if not compiled and self._worn.steps is steps:
            return self._worn
        found = Worn(steps)
        for step in steps:
            one = _worn_here(self._host[0], self, step)
            if one is not None:
                for where, has in zip((found.before, found.after), phases(one[1], one[2]), strict=True):
                    where += [one] if has else []
        if not compiled:
            plain = self.spot.part is None and self.spot.role not in ("embed", "head")
            found.alike = plain and not any(edit.positional for _, edit, _, _ in found.before + found.after)
            self._worn = found
        return found

    def run(self, worn: Worn, x: Tensor, y: Tensor | None = None, spare: bool = False) -> Tensor:
        """Send each row through its own adapters, `before` the layer or (given y) `after` it; rows whose adapters do
        not hang here pass unchanged. A y that is `spare` may be written over."""
        host, out = self._host[0], x if y is None else y
        now, every = host.now, worn.before if y is None else worn.after
        if worn.alike and _as_it_is(x, out, now):  # mostly, where nothing is trained: as few calls as it takes
            quick: list[route.Job] = [(one[0], one[1], self._rounded(one, out.dtype), one[2]) for one in every]
            return route.apply(now, host.strategy, quick, x, y, spare)
        dtype = host.precision(out, every)
        tokens = x.shape[: -1 if x.is_floating_point() else None].numel() // max(1, now.batch)
        jobs: list[route.Job] = []
        by_rows = False
        for one in every:
            step, edit, place, _ = one
            if not (edit.positional and edit.idle(now.call(step, place), tokens)):
                jobs.append((step, edit, self._rounded(one, dtype), place))
                by_rows = by_rows or step.rows is not None or isinstance(step, Stack) or edit.positional
        if not jobs:
            return out
        x_, out_ = (self._rows(x), out if y is None else self._rows(out)) if by_rows else (x, out)
        x_ = x_.to(dtype) if x_.is_floating_point() else x_
        edited = x_ if y is None else out_.to(dtype)
        new = route.apply(now, host.strategy, jobs, x_, None if y is None else edited, spare=dtype != out.dtype)
        return new.reshape(out.shape).to(out.dtype) if by_rows else new.to(out.dtype)

    def _rounded(self, one: WornHere, dtype: torch.dtype) -> Weights:
        """An adapter's tensors for a forward in this type. Folded ones are in it already, unless it has 16 bits."""
        step, edit, _, w = one
        if w is None:
            w = self.tensors(step.name)  # type: ignore[union-attr]
            same = dtype.itemsize >= 4 and all(t.dtype == dtype for t in w.values())
            return w if same else edit.rounded(w, dtype)
        return edit.rounded(w, dtype) if dtype.itemsize < 4 else w

    @property
    def edits_input(self) -> bool:
        """Whether this forward changes what the layer is given."""
        return bool(self.worn(self._host[0].now.steps).before)

    def low_rank(self, x: Tensor) -> LowRank | None:
        """What `after` will do to a batch of which the layer is given x, if that is one low-rank edit of all rows."""
        host = self._host[0]
        worn = self.worn(host.now.steps)
        if worn.before or len(worn.after) != 1 or host.precision(x, worn.after) != x.dtype:
            return None
        step, edit, place, w = worn.after[0]
        call = host.now.call(step, place)
        if step.rows is not None or isinstance(step, Stack) or edit.positional or edit.idle(call, x.shape[1]):
            return None
        w = self.tensors(step.name) if w is None else w
        return edit.low_rank(edit.rounded(w, x.dtype), call)

    def _rows(self, t: Tensor) -> Tensor:
        """(B, T, ...) even where a decoder has flattened rows and tokens into one (OPT's MLP does)."""
        now = self._host[0].now
        batch = now.batch
        # Blocks may carry streams beside rows and tokens (Gemma 3n), on any axis; norms of heads have them at the end.
        if t.dim() > 3 and not self._plain and not self.spot.role.endswith("norm"):
            raise self._rows_unknown(t)
        if now.layout is not None:
            wide = 2 if tuple(t.shape[:2]) == now.layout.shape else 1
            if t.shape[:wide].numel() == batch:
                return t.reshape(batch, 1, *t.shape[wide:])
        elif t.shape[0] == batch:
            return t[:, None] if t.dim() == 2 and t.is_floating_point() else t
        if now.layout is None and t.dim() == 2 and t.shape[0] % batch == 0:
            return t.unflatten(0, (batch, -1))
        raise self._rows_unknown(t)

    def _rows_unknown(self, t: Tensor) -> InlayError:
        batch = self._host[0].now.batch
        return InlayError(
            f"{self.spot.path} sees {tuple(t.shape)}, where the {batch} rows of the batch cannot be told apart; "
            "use one adapter for the whole batch, or hang these adapters elsewhere"
        )

    def _pre(self, layer: nn.Module, args: tuple, kwargs: dict):
        worn = self.worn(self._host[0].now.steps)
        if not worn.before:
            return None
        x, where = self._input(args, kwargs)
        new = self.run(worn, x)
        if new is x:
            return None
        self._given = x
        return ((new, *args[1:]), kwargs) if where is None else (args, kwargs | {where: new})

    def _post(self, layer: nn.Module, args: tuple, kwargs: dict, out):
        if not torch.compiler.is_compiling() and not self.called:  # in this order, no compiled graph depends on it
            self.called = True
        worn = self.worn(self._host[0].now.steps)
        if (x := self._given) is not None:
            self._given = None  # set where need be: modules are slow to set attributes
        if self.spoken:
            self.spoken = False
            return None
        if not worn.after:
            return None
        x = self._input(args, kwargs)[0] if x is None else x
        several = isinstance(out, (tuple, list))
        whole = out[0] if several else out
        part = self.spot.part
        y = part.get(whole) if part else whole if self._plain else self._as_tokens(x, whole)
        new = self.run(worn, x, y, spare=part is None and _fresh(layer))
        if new is y:
            return None
        new = part.put(whole, new) if part else new if self._plain else new.reshape(whole.shape)
        if not several:
            return new
        if hasattr(out, "_replace"):  # a named tuple
            return out._replace(**{out._fields[0]: new})
        return [new, *out[1:]] if isinstance(out, list) else (new, *out[1:])

    def _as_tokens(self, x: Tensor, y: object) -> Tensor:
        """What a whole sub-layer gives, in the shape of what it took: some (Llama 4's experts) flatten rows and tokens.

        Raises:
            InlayError: it gives no tensor of the tokens that it took.
        """
        if isinstance(y, Tensor) and y.shape[-1:] == (self.place.d_out,):
            if y.shape[:-1] == x.shape[:-1]:
                return y
            if y.shape[:-1].numel() == x.shape[:-1].numel():
                return y.reshape(*x.shape[:-1], y.shape[-1])
        raise InlayError(
            f"no adapter can hang at {self.spot.key!r}: {self.spot.path} takes a {_shown(x)} and gives a {_shown(y)}, "
            f"not one of {self.place.d_out} features for the same tokens; name the linears inside it"
        )

    def _input(self, args: tuple, kwargs: dict) -> tuple[Tensor, str | None]:
        """A layer's first tensor, and its keyword if it came by keyword."""
        if args and (self._plain or self._fits(args[0])):
            return args[0], None
        for where in ("hidden_states", "input", "input_ids", "x"):
            if isinstance(kwargs.get(where), Tensor) and (self._plain or self._fits(kwargs[where])):
                return kwargs[where], where
        fit = [k for k, t in kwargs.items() if self._fits(t)]
        if len(fit) == 1 and not args:
            return kwargs[fit[0]], fit[0]
        given = ", ".join([*map(_shown, args), *(f"{k}={_shown(v)}" for k, v in kwargs.items())])
        raise InlayError(
            f"no adapter can hang at {self.spot.key!r}: {self.spot.path} is called with ({given}), of which none is "
            f"known to be its input of {self.place.d_in} features; name the linears inside it"
        )

    def _fits(self, t: object) -> bool:
        return isinstance(t, Tensor) and t.dim() > 1 and t.shape[-1] == self.place.d_in


def _shown(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _as_it_is(x: Tensor, out: Tensor, now: route.Route) -> bool:
    """Whether nothing is trained, and what is edited (B, T, D) is in the type of edits with its rows told apart."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or now.layout is not None:
        return False
    return out.dim() == 3 and out.shape[0] == now.batch and out.dtype == x.dtype and out.dtype.itemsize >= 4


def _fresh(layer: nn.Module) -> bool:
    """Whether nobody else can hold what the layer has just said. What stands in for a forward says so by `fresh`."""
    own = layer.__dict__.get("forward")
    return type(layer) is nn.Linear and len(layer._forward_hooks) == 1 and (own is None or hasattr(own, "fresh"))


WornHere = tuple[route.Step, Edit, Place, Weights | None]
"""A step with something to do at a place; tensors None: the adapter hangs there and may be trained."""


@dataclass(eq=False)
class Worn:
    """What the steps of a route have to do at one place."""

    steps: tuple[route.Step, ...]
    before: list[WornHere] = field(default_factory=list)
    after: list[WornHere] = field(default_factory=list)
    alike: bool = False
    """Whether all of it edits a whole layer, and all tokens of all steps alike."""


def _worn_here(host: Host, site: Site, step: route.Step) -> WornHere | None:
    key = site.spot.key
    folded = step if isinstance(step, Stack) else host.shelf.get(step.name)
    if folded is not None:
        if key not in folded.at:
            return None
        edit, w = folded.cut.edits[key], folded.at[key]
        w = w if torch.compiler.is_compiling() else edit.viewed(w)
        return step, edit, site.wired(folded.cut.wirings[key]), w
    name = step.name  # type: ignore[union-attr]
    return (step, host.edits[name], site.places[name], None) if name in site.places else None
