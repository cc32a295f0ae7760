"""Adapters on the parameters of an experts module: which tokens meet which adapters, and the module's forward.

An experts module is called on tokens, each by itself: `forward(x (N, H), expert (N, K), weight (N, K))`, or Llama 4's
`forward(x (E N, H))`. Tokens whose rows have the same adapters form a group, and the frozen module is run once a group,
with an `ExpertWeight` in the place of each adapted parameter; so a row in a mixed batch meets the products it meets
alone. Where a module does something else with its parameter than multiply rows, the group is computed with effective
weights in full: exact, slower, and said once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from inlay.core import route
from inlay.core.errors import InlayError
from inlay.core.expert_weight import ExpertEdit, ExpertUpdate, ExpertWeight
from inlay.core.experts import ExpertWeights, expert_layout, shared_names
from inlay.core.fold import Stack
from inlay.core.place import Place
from inlay.core.site import Site, WornHere

if TYPE_CHECKING:
    from inlay.core.host import Host

COMPARED = 1 << 24
"""Numbers of a parameter up to which the first forward is also computed with effective weights in full."""
Jobs = dict[str, list[WornHere]]
"""Parameter -> what hangs there and has something to do."""


class ExpertSite(Site):
    """Where adapters hang on one parameter of an experts module."""

    def _place(self, host: Host, layer: nn.Module) -> Place:
        assert self.spot.parameter is not None
        self.layout = expert_layout(layer, self.spot.parameter)
        return Place(
            self._no_layer,
            self.layout.d_in,
            self.layout.d_out,
            self.spot.role,
            self.spot.key,
            experts=self.layout.experts,
            expert_f=self._expert,
        )

    def _join(self, layer: nn.Module) -> None:
        forward = layer.__dict__.get("forward")
        if not isinstance(forward, ExpertsForward):
            forward = layer.__dict__["forward"] = ExpertsForward(self._host[0], layer, forward)
        forward.sites.append(self)

    def _part(self, layer: nn.Module) -> None:
        forward = layer.__dict__["forward"]
        forward.sites.remove(self)
        if not forward.sites:
            forward.restore()

    def listen(self, steps: tuple[route.Step, ...]) -> None:
        """Nothing: what hangs here has no `before`."""

    def stored(self) -> Tensor:
        """The frozen parameter (E, ...), as the module stores it."""
        value = self.layer._parameters[self.spot.parameter]  # type: ignore[index]
        return value.stored if isinstance(value, ExpertWeight) else value  # type: ignore[return-value]

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        W = self.layout.matrices(self.stored()[expert])
        return linear(x.to(W.device, W.dtype), W).to(x.dtype)

    def _no_layer(self, x: Tensor) -> Tensor:
        raise InlayError(f"{self.spot.full_path} is no single layer: ask one of its experts (Place.expert)")


class ExpertsForward:
    """Stands in for the forward of one experts module while adapters hang on its parameters."""

    def __init__(self, host: Host, layer: nn.Module, before: Any):
        self.sites: list[ExpertSite] = []
        self._host, self._layer, self._before = host, layer, before
        self._frozen = before or functools.partial(type(layer).forward, layer)
        functools.update_wrapper(self, type(layer).forward)
        self._groups: tuple[Any, list[tuple[tuple[bool, ...], Tensor | None]]] | None = None

    def restore(self) -> None:
        """Give the module its own forward back."""
        if self._before is None:
            del self._layer.__dict__["forward"]
        else:
            self._layer.__dict__["forward"] = self._before

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, each token under the adapters of its row."""
        for site in self.sites:
            site.called = True
        now = self._host.now
        jobs = {s.spot.parameter: s.worn(now.steps).after for s in self.sites}
        steps = [s for s in now.steps if any(job[0] is s for own in jobs.values() for job in own)]
        if not steps:
            return self._frozen(*args, **kwargs)
        if any(isinstance(s, Stack) for s in steps):
            raise InlayError("adapters on experts are routed in segments, not in stacks")
        groups = self._grouped(steps, now.batch)
        if len(groups) == 1:
            return self._run(_of(jobs, steps, groups[0][0]), args, kwargs)
        tokens = _Tokens(self._layer, now, args, kwargs)
        outs = []
        for used, rows in groups:
            some = tokens.of(rows) if self._host.strategy != "select" else tokens.all
            out = self._run(_of(jobs, steps, used), *tokens.take(some))
            if not isinstance(out, Tensor) or len(out) != tokens.each * len(some):
                raise InlayError(f"{type(self._layer).__name__} gives more than a row a token; {_ONE_ADAPTER}")
            outs.append(out if some is not tokens.all else out[tokens.at(tokens.of(rows))])
        order = torch.cat([tokens.at(tokens.of(rows)) for _, rows in groups])
        return torch.cat(outs)[order.argsort()]

    def _grouped(self, steps: Sequence[route.Step], batch: int) -> list[tuple[tuple[bool, ...], Tensor | None]]:
        """[(which of the steps, their rows)]: rows that have the same adapters, together; rows None: every row."""
        if all(s.rows is None for s in steps):
            return [((True,) * len(steps), None)]
        if self._groups is None or self._groups[0] is not self._host.now.steps:
            masks_BS = torch.stack([s.mine for s in steps], 1)  # type: ignore[union-attr]
            kinds, kind_B = masks_BS.unique(dim=0, return_inverse=True)
            found = [(tuple(used), (kind_B == i).nonzero()[:, 0]) for i, used in enumerate(kinds.tolist())]
            self._groups = self._host.now.steps, found if len(found) > 1 else [(found[0][0], None)]
        return self._groups[1]

    def _run(self, jobs: Jobs, args: tuple, kwargs: dict) -> Any:
        """The frozen module on tokens that all have these adapters."""
        if not any(jobs.values()):
            return self._frozen(*args, **kwargs)
        known = _TRIED.setdefault(self._host, {})
        key = self._kind(jobs)
        if key not in known:
            known[key] = self._tried(jobs, args, kwargs)
            if known[key]:
                warnings.warn(
                    f"{type(self._layer).__name__} is computed with the effective weights of all experts, which is "
                    f"exact but takes more time and memory: {known[key]}",
                    stacklevel=2,
                )
        if known[key]:
            return self._in_full(jobs, args, kwargs)
        updates = self._updates(jobs)
        out = self._with({u: ExpertWeight.of(s.stored(), u) for s, u in updates}, updates, args, kwargs)
        if why := self._missed(updates, args, kwargs):
            raise InlayError(
                f"{type(self._layer).__name__} no longer computes as it did when it was tried ({why}); attach it again"
            )
        return out

    def _kind(self, jobs: Jobs) -> tuple[Any, ...]:
        """What decides how a module multiplies."""
        config = getattr(self._layer, "config", None)
        implementation = getattr(config, "_experts_implementation", None)
        used = tuple(s.spot.parameter for s in self.sites if jobs[s.spot.parameter])  # type: ignore[index]
        stored = self.sites[0].stored()
        return type(self._layer), implementation, used, stored.shape, stored.dtype, stored.device.type

    @torch.no_grad()
    def _tried(self, jobs: Jobs, args: tuple, kwargs: dict) -> str:
        """Whether products edit every row; if not, why the effective weights are used instead."""
        device = self.sites[0].stored().device
        # What is drawn here is drawn again: a resumed run, which tries anew, must go on as the first one did.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            updates = self._updates(jobs)
            out = self._with({u: ExpertWeight.of(s.stored(), u) for s, u in updates}, updates, args, kwargs)
            if why := self._missed(updates, args, kwargs):
                return why
            small = all(s.stored().numel() <= COMPARED for s, _ in updates)
            draws = any(one.call.training and one.edit.draws for _, u in updates for one in u.edits)
            if not small or draws or not isinstance(out, Tensor):
                return ""
            want = self._in_full(jobs, args, kwargs)
        finite = want.isfinite()
        if not finite.any():
            return ""
        off, size = float((out - want)[finite].abs().max()), float(want[finite].abs().max())
        coarse = 2.0**-5 if out.dtype.itemsize < 4 else 1e-3
        return "" if off <= coarse * size + 1e-6 else f"its products differ from theirs by {off:.2g} of {size:.2g}"

    def _updates(self, jobs: Jobs) -> list[tuple[ExpertSite, ExpertUpdate]]:
        made = []
        for site in self.sites:
            if own := jobs[site.spot.parameter]:  # type: ignore[index]
                dtype = self._host.precision(site.stored(), own)
                edits = [self._edit(site, one, dtype) for one in own]
                made.append((site, ExpertUpdate(site.spot.full_path, site.layout, edits, dtype)))
        return made

    def _edit(self, site: ExpertSite, one: WornHere, dtype: torch.dtype) -> ExpertEdit:
        step, edit, place, _ = one
        weights = ExpertWeights(site._rounded(one, dtype), shared_names(edit, place))
        return ExpertEdit(edit, weights, self._host.now.call(step, place))

    def _in_full(self, jobs: Jobs, args: tuple, kwargs: dict) -> Any:
        """The slow way: with W + dW of all experts."""
        updates = self._updates(jobs)
        return self._with({u: u.effective(s.stored()) for s, u in updates}, updates, args, kwargs)

    def _with(self, values: dict[ExpertUpdate, Tensor], updates: Any, args: tuple, kwargs: dict) -> Any:
        """The module's own forward with other tensors in the place of its parameters."""
        parameters: dict[str, Any] = self._layer._parameters
        kept = {site.spot.parameter: parameters[site.spot.parameter] for site, _ in updates}
        try:
            for site, update in updates:
                parameters[site.spot.parameter] = values[update]
            return self._frozen(*args, **kwargs)
        finally:
            parameters.update(kept)

    def _missed(self, updates: Sequence[tuple[ExpertSite, ExpertUpdate]], args: tuple, kwargs: dict) -> str:
        """Why the products of a forward may not be all that the module did with its parameters; empty: they are."""
        x, *rest = (*args, *kwargs.values())
        routed = [t for t in rest if isinstance(t, Tensor) and not t.is_floating_point() and t.dim() == 2]
        want = routed[0].numel() if len(routed) == 1 else len(x.flatten(0, -2))
        for _, update in updates:
            if update.whole:
                return f"{update.name} is not only multiplied"
            if update.rows == want or (not routed and update.rows and update.rows % max(want, 1) == 0):
                continue
            # Indices behind the last matrix stand for no expert (of another process), or for the identity (LongCat).
            if len(routed) != 1 or update.rows != int((routed[0] < self._matrices()).sum()):
                return f"{update.rows} of {want} rows are multiplied by {update.name} where it can be seen"
        return ""

    def _matrices(self) -> int:
        """Experts that have a matrix in every parameter of the module."""
        return min(len(p) for p in self._layer._parameters.values() if p is not None and p.dim() == 3)


_TRIED: WeakKeyDictionary[Host, dict[tuple[Any, ...], str]] = WeakKeyDictionary()
"""How modules multiply -> why their effective weights are used; empty: their products are edited."""
_ONE_ADAPTER = "use the same adapters for the whole batch, or hang these elsewhere"


def _of(jobs: dict[Any, list[WornHere]], steps: Sequence[route.Step], used: Sequence[bool]) -> Jobs:
    """The jobs of some of the steps."""
    some = [s for s, yes in zip(steps, used, strict=True) if yes]
    return {k: [job for job in own if any(job[0] is s for s in some)] for k, own in jobs.items()}


class _Tokens:
    """The arguments of an experts module, token by token."""

    def __init__(self, layer: nn.Module, now: route.Route, args: tuple, kwargs: dict):
        self._args, self._kwargs = args, kwargs
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        x = tensors[0]
        experts = getattr(layer, "num_experts", 0)
        # Llama 4 gives every expert every token: (E N, H), expert by expert.
        self.each = experts if len(tensors) == 1 and experts and len(x) % experts == 0 else 1
        self._n = len(x) // self.each
        whole = self._n % now.batch == 0 if now.layout is None else self._n == now.batch
        strange = len(args) + len(kwargs) != len(tensors) or (len(tensors) == 1 and self.each == 1)
        if strange or not whole or x.dim() != 2 or any(t.dim() != 2 or len(t) != len(x) for t in tensors):
            shapes = [tuple(t.shape) for t in tensors]
            raise InlayError(
                f"{type(layer).__name__} is called with {shapes}, where the tokens of the {now.batch} rows of the "
                f"batch cannot be told apart; {_ONE_ADAPTER}"
            )
        self._row = self._n // now.batch
        self.all = torch.arange(self._n, device=x.device)

    def of(self, rows: Tensor | None) -> Tensor:
        """The tokens of some rows of the batch."""
        if rows is None:
            return self.all
        return (rows[:, None] * self._row + self.all[: self._row]).flatten()

    def at(self, tokens: Tensor) -> Tensor:
        """Where they stand among the module's rows."""
        starts = torch.arange(self.each, device=tokens.device) * self._n
        return (starts[:, None] + tokens).flatten()

    def take(self, tokens: Tensor) -> tuple[tuple, dict]:
        """The arguments for some tokens."""
        where = self.at(tokens)
        return tuple(t[where] for t in self._args), {k: t[where] for k, t in self._kwargs.items()}
