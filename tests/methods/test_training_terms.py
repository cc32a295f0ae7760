"""What a method adds to training (a penalty, an action after each step) is kept behind gates, in sums and in chains."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.sharded import after_step, penalty
from inlay.library import compose
from inlay.methods.compose import Chain
from inlay.methods.gate import Gated
from inlay.methods.lora import AdaLoRA
from tests.laws.zoo import base, excite

ADALORA = {"rank": 4, "target": 2, "warmup": 0.1, "final": 0.3, "interval": 1}
STEPS = 10


def host_with(text: str):
    """A host with AdaLoRA as `a`, a LoRA as `b`, and `c`: a composition, or AdaLoRA behind a gate."""
    host = inlay.attach(base("llama"))
    host.add("a", inlay.method("adalora").make(**ADALORA), at="q,v", seed=0)
    host.add("b", inlay.method("lora").make(rank=2), at="v", seed=0)
    excite(host)
    if text == "gated":
        host.add("c", Gated(edit=host.edits["a"]), at="q,v")
        a, c = host.by_place("a"), host.by_place("c")
        for key in a:
            for name in a[key]:
                c[key][name].data.copy_(a[key][name])
    else:
        compose(host, "c", text, hang=True)
    return host


def part(host, name: str) -> dict[str, torch.Tensor]:
    """AdaLoRA's tensors, wherever they are (`0.q/P`)."""
    return {k.replace("0:", ""): t for k, t in host.tensors(name).items() if k.replace("0:", "") in host.tensors("a")}


@pytest.mark.parametrize("text", ["gated", "stack(a, b)", "sum(0.5*a, b)"])
def test_adalora_is_allocated_and_penalised_as_alone(text):
    host = host_with(text)
    alone, inside = part(host, "a"), part(host, "c")
    assert alone.keys() == inside.keys() and all(torch.equal(alone[k], inside[k]) for k in alone)
    terms = [penalty(host.edits[n], host.by_place(n)) for n in "ac"]
    torch.testing.assert_close(terms[1], terms[0])
    assert terms[0] > 0

    states: dict[str, dict] = {"a": {}, "c": {}}
    random = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        for key in alone:
            alone[key].grad = torch.randn(alone[key].shape, generator=random)
            inside[key].grad = alone[key].grad.clone()
        for name in "ac":
            after_step(host.edits[name], host.by_place(name), step, STEPS, states[name])
        assert all(torch.equal(alone[k], inside[k]) for k in alone), step
    left = sum(int((t != 0).sum()) for k, t in inside.items() if k.endswith("/E"))
    assert left == len(host.by_place("a")) * ADALORA["target"]
    assert {k.removeprefix("0:") for k in states["c"]} == set(states["a"])  # all of it is in a checkpoint


def test_what_adds_nothing_says_so():
    """Trainers refuse fp16 for methods with a penalty: a composition without one is none of these."""
    lora, ada = inlay.method("lora").make(), AdaLoRA()
    assert not lora.has_penalty and not Gated(edit=lora).has_penalty and not Gated(edit=lora).has_after_step
    assert ada.has_penalty and Gated(edit=ada).has_penalty and Gated(edit=ada).has_after_step
    both = Chain(edits=(lora, ada), where=(("0.q",), ("0.q",)))
    assert both.has_penalty and both.has_after_step and not Chain(edits=(lora,), where=(("0.q",),)).has_penalty


def test_the_schedule_is_the_cubic_one_of_the_paper():
    """Zhang et al. 2023, eq. 12: b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 after the warm-up."""
    host, total = inlay.attach(base("llama")), 200
    host.add("a", inlay.method("adalora").make(**ADALORA | {"rank": 20, "target": 4}), at="q,v", seed=0)
    excite(host)
    adapter, state = host.by_place("a"), {}
    places, begin, end = len(adapter), int(0.1 * total), int(0.7 * total)
    fresh = {key: w["E"].detach().clone() for key, w in adapter.items()}
    for step in range(1, total + 1):
        for key, w in adapter.items():
            w["E"].data.copy_(fresh[key])  # as if the optimizer had moved what was set to zero
            for t in w.values():
                t.grad = torch.ones_like(t)
        after_step(host.edits["a"], adapter, step, total, state)
        left = sum(int((w["E"] != 0).sum()) for w in adapter.values())
        share = min(1.0, max(0.0, (step - begin) / (end - begin)))
        want = places * 20 if step < begin else round(places * (4 + (20 - 4) * (1 - share) ** 3))
        assert left == want, step


def test_a_triplets_importance_is_that_of_its_value_plus_the_means_of_its_vectors():
    """Zhang et al. 2023, eqs. 8-11: I = |w g|, S and U are smoothed, s = S U; the triplet's score is s(E) + mean s(P) +
    mean s(Q). In float64, written out for one place."""
    host = inlay.attach(base("llama"))
    edit = inlay.method("adalora").make(**ADALORA)
    host.add("a", edit, at="0.q", seed=0)
    excite(host)
    (w,) = host.by_place("a").values()
    random, S, U, state = torch.Generator().manual_seed(0), {}, {}, {}
    for _ in range(3):
        for t in w.values():
            t.grad = torch.randn(t.shape, generator=random)
        got = edit._importance("0.q", w, state)
        for k, t in w.items():
            sensitivity = (t.detach().double() * t.grad.double()).abs()
            S[k] = 0.85 * S.get(k, 0) + 0.15 * sensitivity
            U[k] = 0.85 * U.get(k, 0) + 0.15 * (sensitivity - S[k]).abs()
    s = {k: S[k] * U[k] for k in w}
    torch.testing.assert_close(got.double(), s["E"] + s["P"].mean(0) + s["Q"].mean(1), rtol=1e-5, atol=0)
