"""From activations to weights: an edited layer is fed the identity, and the weight it amounts to is read off.

Whether an edit is linear is measured, not declared. What is not, or has no weight to live in, is refused with the
reason. Everything is computed in float64 from the frozen weight and rounded once to the base's type, so that each
merged weight is the float64 one, correctly rounded. What the frozen layer says of the identity is its weight and is not
computed, so a method that edits outputs costs what its formula costs: RoAd, a few element-wise operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from inlay.core.edit import Call, Weights
from inlay.core.errors import InlayError
from inlay.core.expert_site import ExpertSite
from inlay.core.experts import by_expert, shared_names
from inlay.core.fingerprint import readable
from inlay.core.host import Host
from inlay.core.shelf import only_finite
from inlay.core.site import Site


@dataclass
class Merged:
    """What a merge did, and the way back."""

    modules: list[str]
    """Paths of the changed layers."""
    rounding: float
    """Largest rounding of a merged weight to the base's type, relative to the largest weight."""
    deviation: float
    """Largest difference of logits between the adapter and the merged model, measured on random ids."""
    logits: float
    """Largest logit in that measurement, for scale."""
    untied: bool = False
    """Whether embedding and head had to part."""
    _kept: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Put the base's own weights back, from kept copies, not by subtraction. A head once untied stays so."""
        for p, old in self._kept.items():
            p.data.copy_(old)


AT_ONCE = 1024
"""Columns of the identity that are fed together."""


@torch.no_grad()
def merged(host: Host, name: str) -> dict[str, Tensor]:
    """{parameter name: new value in float32, or in a wider base's type} that the adapter amounts to; the model is not
    touched."""
    dtype = torch.promote_types(torch.float32, host.dtype)
    return {key: value.to(dtype) for key, value in _merged(host, name)}


def _merged(host: Host, name: str) -> Iterator[tuple[str, Tensor]]:
    """The same, layer by layer, unrounded."""
    host._known(name)
    if name not in host.shelf:
        only_finite(name, host.tensors(name))
    edit = host.edits[name]
    if edit.room:
        raise InlayError(
            f"{name!r} ({edit.kind}) adds virtual tokens: there is no weight to merge it into; keep it as an adapter"
        )
    if edit.positional:
        raise InlayError(
            f"{name!r} ({edit.kind}) edits single positions, and a weight serves all of them; keep it as an adapter"
        )
    layers: dict[str, list[Site]] = {}
    for site in host.sites.values():
        if name in site.places:
            layers.setdefault(site.spot.full_path, []).append(site)
    for path, sites in layers.items():
        if isinstance(site := sites[0], ExpertSite):
            yield path, _experts(host, name, site)
            continue
        read = _norm if site.spot.role == "norm" else _table if site.spot.role == "embed" else _linear
        yield from ((f"{path}.{k}", v) for k, v in read(host, name, path, sites).items())


def _exact(host: Host) -> torch.dtype:
    """The type that is computed in; Apple's GPUs have no float64."""
    return torch.float32 if host.device.type == "mps" else torch.float64


@torch.no_grad()
def merge(host: Host, name: str, keep: bool = True) -> Merged:
    """Write an adapter into the base and take it off.

    Args:
        keep: hold copies of the changed weights, so that `undo` can put them back.
    """
    parameters = dict(host.model.named_parameters(remove_duplicate=False))
    new: dict[str, Tensor] = {}
    rounding = 0.0
    for key, value in _merged(host, name):
        p = parameters.get(key)
        if p is None or not readable(p):
            raise InlayError(
                f"{key!r} is quantised: load the base in bf16 or fp32 and merge there (merged() gives float weights)"
            )
        new[key] = _once(value, p.dtype)
        if not bool(new[key].isfinite().all()):
            raise InlayError(
                f"{name!r} makes weights of {key!r} that are not finite in {str(p.dtype).removeprefix('torch.')}: the "
                "adapter is damaged, or its values are beyond that type's range (merge in bf16 or fp32 then)"
            )
        off = (new[key].to(value.dtype) - value).abs().max() / value.abs().max().clamp(min=1e-12)
        rounding = max(rounding, off.item())
    vocabulary = host.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(host.device)
    with host.using(name):
        want = host.model(input_ids=ids).logits.float()
    _refuse_shared(host, name, new)
    untied = _untie(host, new)
    parameters = dict(host.model.named_parameters(remove_duplicate=False))
    kept = {parameters[k]: parameters[k].detach().clone() for k in new} if keep else {}
    for key, value in new.items():
        parameters[key].data.copy_(value)
    paths = sorted({k.rpartition(".")[0] for k in new})
    host.remove(name)
    with host.using(None):
        got = host.model(input_ids=ids).logits.float()
    return Merged(paths, rounding, (got - want).abs().max().item(), want.abs().max().item(), untied, kept)


def _refuse_shared(host: Host, name: str, new: dict[str, Tensor]) -> None:
    """Refuse weights that several layers share (Zamba's) and that would differ; embedding and head can be parted."""
    ends = {f"{s.path}.weight" for s in host.anatomy.spots if s.role in ("embed", "head")}
    names: dict[int, list[str]] = {}
    for key, p in host.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(key)
    for keys in names.values():
        changed = [k for k in keys if k in new]
        whole = len(changed) == len(keys) and all(torch.equal(new[k], new[keys[0]]) for k in keys)
        if changed and not whole and not ends.issuperset(keys):
            raise InlayError(
                f"{changed[0]!r} is one weight with {next(k for k in keys if k != changed[0])!r}, and {name!r} changes "
                "them differently: they cannot be merged; keep it as an adapter"
            )


def _once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Correctly rounded: PyTorch goes from float64 to 16 bits by way of float32 and would round some values twice."""
    if dtype.itemsize > 2 or value.dtype != torch.float64:
        return value.to(dtype)
    near = value.float()
    bits = near.view(torch.int32)
    towards_zero = bits - (near.double().abs() > value.abs()).int()
    # Rounded to odd, the float32 between is no tie of the 16-bit type unless the value is.
    return torch.where(near.double() == value, bits, towards_zero | 1).view(torch.float32).to(dtype)


def _untie(host: Host, new: dict[str, Tensor]) -> bool:
    """Part a tied embedding and head if they are to hold different weights."""
    if not host.tied:
        return False
    ends = {s.role: f"{s.path}.weight" for s in host.anatomy.spots if s.role in ("embed", "head")}
    values = [new.get(ends.get(role, "")) for role in ("embed", "head")]
    if all(v is None for v in values) or (None not in values and torch.equal(*values)):  # type: ignore[arg-type]
        return False
    head = host.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    host.model.config.tie_word_embeddings = False
    return True


def _call(host: Host, name: str, site: Site, f: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Tensor], Call]:
    part = site.spot.part
    place = replace(site.places[name], f=(lambda x: part.get(f(x))) if part else f)
    w = {k: v.to(_exact(host)) if v.is_floating_point() else v for k, v in site.tensors(name).items()}
    return host.edits[name], w, Call(place)


def _through(host: Host, name: str, sites: list[Site], f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The edited layer as a function, over `f` for the frozen one."""
    calls = [_call(host, name, site, f) for site in sites]

    def edited(x: Tensor) -> Tensor:
        given = x
        for edit, w, call in calls:
            given = edit.before(w, given, call)
        y = f(given)
        for (edit, w, call), site in zip(calls, sites, strict=True):
            part = site.spot.part
            new = edit.after(w, x, part.get(y) if part else y, call)
            y = part.put(y, new) if part else new
        return y

    return edited


def _linear(host: Host, name: str, path: str, sites: list[Site]) -> dict[str, Tensor]:
    layer = sites[0].layer
    if not hasattr(layer, "in_features") and not hasattr(layer, "nf"):
        raise InlayError(
            f"{name!r} hangs around {path!r}, which is no single weight; it cannot be merged, only kept as an adapter"
        )
    W, b, transposed = frozen(host, layer)
    wide, bias = _read_off(host, name, path, W, b, lambda f: _through(host, name, sites, f))
    return {"weight": wide.T if transposed else wide, **({"bias": bias} if b is not None else {})}


def _experts(host: Host, name: str, site: ExpertSite) -> Tensor:
    """All experts of one parameter (E, ...), as the module stores them; each is a linear of its own."""
    place, layout = site.places[name], site.layout
    shared, edit = shared_names(host.edits[name], place), host.edits[name]
    w = {k: v.to(_exact(host)) if v.is_floating_point() else v for k, v in site.tensors(name).items()}
    made = []
    for e, own in enumerate(by_expert(w, shared, layout.experts)):
        W = layout.matrices(site.stored()[e]).detach().to(_exact(host))

        def edited(f: Callable[[Tensor], Tensor], own: Weights = own, e: int = e) -> Callable[[Tensor], Tensor]:
            call = Call(replace(place.expert(e), f=f))
            return lambda x: edit.after(own, x, f(x), call)

        made.append(_read_off(host, name, site.spot.full_path, W, None, edited)[0])
    return layout.matrices(torch.stack(made))


def _read_off(
    host: Host,
    name: str,
    path: str,
    W: Tensor,
    b: Tensor | None,
    through: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]],
) -> tuple[Tensor, Tensor]:
    """(W' (D_out, D_in), bias) of an edited linear. `through` makes the edited layer of the frozen one.

    Raises:
        InlayError: it is not linear, or has a bias that nothing can hold.
    """
    known: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        return known[1] if known and x is known[0] else linear(x, W, b)

    edited = through(f)
    d_in = W.shape[1]
    u, v = torch.randn(2, d_in, generator=torch.Generator().manual_seed(0)).to(W)
    y = edited(torch.stack([torch.zeros_like(u), u, v, 3 * u - 2 * v])[None])[0]
    bias, fu, fv, fw = y[0], *(y[1:] - y[0])
    if not torch.allclose(3 * fu - 2 * fv, fw, rtol=1e-3, atol=1e-4 * float(fw.abs().max())):
        raise InlayError(
            f"{name!r} ({host.edits[name].kind}) is not linear at {path!r}: it cannot be merged; keep it as an adapter"
        )
    if b is None and float(bias.abs().max()) > 0:
        raise InlayError(f"{name!r} adds a bias at {path!r}, where the base has none to hold it; keep it as an adapter")
    wide = torch.empty_like(W)
    for at in range(0, d_in, AT_ONCE):
        part = W[:, at : at + AT_ONCE].T
        eye = torch.eye(len(part), d_in, device=W.device, dtype=W.dtype).roll(at, 1)[None]
        known[:] = eye, (part if b is None else part + b)[None]
        wide[:, at : at + AT_ONCE] = (edited(eye)[0] - bias).T
    return wide, bias


def frozen(host: Host, layer: Any) -> tuple[Tensor, Tensor | None, bool]:
    """(W (D_out, D_in), bias, whether W is stored transposed); a quantised layer is asked, not read."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    transposed = hasattr(layer, "nf")
    dtype = _exact(host)
    b = bias.detach().to(dtype) if isinstance(bias, Tensor) else None
    if readable(weight) and weight.dim() == 2:
        W = weight.detach().to(dtype)
        return (W.T if transposed else W), b, transposed
    eye = torch.eye(layer.in_features, device=host.device, dtype=host.dtype)
    zero = layer.forward(eye.new_zeros(1, len(eye))).to(dtype)
    return (layer.forward(eye).to(dtype) - zero).T, b, transposed


def _table(host: Host, name: str, path: str, sites: list[Site]) -> dict[str, Tensor]:
    """Some decoders (Gemma) scale inside the embedding: what is said is a multiple of the table."""
    layer: Any = sites[0].layer
    table = layer.weight.detach().to(_exact(host))
    ids = torch.arange(len(table), device=table.device)[None]
    some = layer.forward(ids[:, :64]).to(table.dtype)
    scale = (some.norm() / table[:64].norm()).item()
    scale = scale if abs(scale - 1) > 1e-2 else 1.0
    edited = _through(host, name, sites, lambda ids: embedding(ids, table) * scale)
    return {"weight": edited(ids)[0] / scale}


def _norm(host: Host, name: str, path: str, sites: list[Site]) -> dict[str, Tensor]:
    """A norm says g * n(x) + b; x = (1, -1, 1, -1, ...) is its own normalisation and shows g as it is applied."""
    layer: Any = sites[0].layer
    if set(dict(layer.named_parameters(recurse=False))) - {"weight", "bias"}:
        raise InlayError(f"{path!r} is a norm of a kind that cannot be merged into")
    g = layer.weight.detach().to(_exact(host))
    has_bias = getattr(layer, "bias", None) is not None
    b = layer.bias.detach().to(g.dtype) if has_bias else torch.zeros_like(g)
    sign = torch.ones_like(g)
    sign[1::2] = -1
    shown = (layer.forward(sign.to(host.dtype)[None, None])[0, 0].to(g.dtype) - b) * sign
    offset = 1.0 if (shown - 1 - g).abs().max() < (shown - g).abs().max() else 0.0  # Gemma stores g - 1
    edited = _through(host, name, sites, lambda n: n * (g + offset) + b)
    bias = edited(torch.zeros_like(g)[None, None])[0, 0]
    gain = edited(torch.ones_like(g)[None, None])[0, 0] - bias
    if not has_bias and float(bias.abs().max()) > 0:
        raise InlayError(f"{name!r} adds a bias at {path!r}, where the base has none to hold it; keep it as an adapter")
    return {"weight": gain - offset, **({"bias": bias} if has_bias else {})}
