"""Adapters made of adapters: exact where mathematics allows, refused with the reason where it does not."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.library import compose
from inlay.library.compose import Node, parse
from tests.laws.zoo import base, batch, excite, logits, places, small

NEAR = dict(rtol=1e-4, atol=1e-5)
LINEAR = [
    "lora",
    "rslora",
    "pissa",
    "dora",
    "adalora",
    "ia3",
    "road1",
    "road2",
    "road4",
    "vera",
    "loha",
    "lokr",
    "full",
]


def wearing(family: str = "llama", **adapters: str):
    host = inlay.attach(base(family))
    for i, (name, method) in enumerate(adapters.items()):
        host.add(name, small(method), at=places(method, family), seed=i)
    excite(host)
    return host


def test_the_language():
    a, b, c = Node("a"), Node("b-2"), Node("3c")
    assert parse("sum(0.5*a, b-2,-2e-1*3c)") == Node("sum", ((0.5, a), (1.0, b), (-0.2, c)))
    assert parse(" stack( average(a,b-2) , 3c )") == Node("stack", ((1.0, Node("average", ((1, a), (1, b)))), (1.0, c)))
    for text, said in (
        ("sum(0.5 a)", "cannot read"),
        ("sum(a", "expected '\\)' and found the end"),
        ("mean(a, b)", "unknown composition 'mean'"),
        ("stack(0.5*a)", "takes no weights"),
        ("a) b", "left over"),
        ("sum(a; b)", "cannot read"),
        ("", "expected a name"),
    ):
        with pytest.raises(inlay.InlayError, match=said):
            parse(text)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("hang", [False, True])
def test_a_sum_of_linear_adapters_is_the_sum_of_their_updates(method, hang):
    host = wearing(a=method, b=method)
    weights = dict(host.model.named_parameters())
    updates = [{k: v - weights[k] for k, v in inlay.merged(host, n).items()} for n in ("a", "b")]
    compose(host, "c", "sum(0.7*a, -0.4*b)", hang=hang)
    got = logits(host, "c", **batch())
    if hang:
        for k, v in inlay.merged(host, "c").items():
            want = weights[k] + 0.7 * updates[0][k] - 0.4 * updates[1][k]
            torch.testing.assert_close(v, want, rtol=1e-4, atol=1e-5)
    host.detach()
    with torch.no_grad():
        for scale, update in zip((0.7, -0.4), updates, strict=True):
            for key, d in update.items():
                weights[key] += scale * d
        torch.testing.assert_close(got, host.model(**batch()).logits, rtol=1e-3, atol=1e-4)


def test_a_sum_of_loras_is_one_lora_in_a_batch_with_others():
    host = wearing(a="lora", b="lora", c="road1")
    compose(host, "ab", "sum(0.5*a, 2*b)")
    assert {e.kind for e in host.shelf["ab"].cut.edits.values()} == {"lora"}
    assert host.shelf["ab"].cut.stacks
    inputs = batch(4)
    want = torch.stack([logits(host, n, **inputs)[i] for i, n in enumerate(("ab", "c", "ab", None))])
    torch.testing.assert_close(logits(host, "ab", "c", "ab", None, **inputs), want, **NEAR)


@pytest.mark.parametrize(
    "parts", [("lora", "series"), ("dora", "ia3"), ("series", "parallel"), ("compacter", "bitfit")]
)
def test_a_sum_of_unlike_adapters_adds_what_each_one_adds(parts):
    family = "gpt2" if "bitfit" in parts else "llama"
    host = inlay.attach(base(family))
    for name, method in zip("ab", parts, strict=True):
        host.add(name, small(method), at="0.o" if method == "parallel" else "0.down")
    excite(host)
    compose(host, "one", "sum(1*a)")
    compose(host, "twice", "average(a, a)")
    for name in ("one", "twice"):
        torch.testing.assert_close(logits(host, name, **batch()), logits(host, "a", **batch()), **NEAR)
    compose(host, "both", "sum(0.5*a, 0.25*b)")
    compose(host, "nested", "sum(0.5*sum(1*a, 0.5*b))")
    torch.testing.assert_close(logits(host, "nested", **batch()), logits(host, "both", **batch()), **NEAR)


@pytest.mark.parametrize("parts", [("lora", "road2"), ("dora", "lora"), ("ia3", "series"), ("road1", "lora")])
def test_a_stack_is_a_row_that_wears_them_all(parts):
    host = wearing(a=parts[0], b=parts[1])
    want = logits(host, "a+b", **batch())
    compose(host, "s", "stack(a, b)")
    compose(host, "h", "stack(a, b)", hang=True)
    for name in ("s", "h"):
        torch.testing.assert_close(logits(host, name, **batch()), want, **NEAR)


def test_a_union_of_halves_is_either_order_bit_for_bit():
    host = inlay.attach(base("llama"))
    for name, blocks in (("a", "0-0.5"), ("b", "0.5-1"), ("c", "0.25-0.75")):
        host.add(name, inlay.method("road1").make(blocks=blocks), at="linear")
    excite(host)
    compose(host, "ab", "union(a, b)")
    compose(host, "ba", "union(b, a)")
    torch.testing.assert_close(logits(host, "ab", **batch()), logits(host, "a+b", **batch()), **NEAR)
    assert torch.equal(logits(host, "ab", **batch()), logits(host, "ba", **batch()))
    with pytest.raises(inlay.InlayError, match="disjoint blocks"):
        compose(host, "ac", "union(a, c)")


def test_what_cannot_be_composed_is_refused_with_the_reason():
    host = wearing(a="lora", p="prefix", s="series")
    host.add("t", inlay.method("parallel").make(size=4), at="down")
    host.add("o", inlay.method("series").make(size=4), at="down:output")
    for text, said in (
        ("sum(a, p)", "virtual tokens"),
        ("stack(p, a)", "virtual tokens"),
        ("union(a, s)", "RoAd"),
        ("sum(a, nobody)", "unknown adapter 'nobody'"),
    ):
        with pytest.raises(inlay.InlayError, match=said):
            compose(host, "x", text)
    assert "x" not in host.edits


@pytest.mark.parametrize("text", ["sum(0.5*a, 0.5*b)", "stack(average(a, b), c)", "stack(c, v)"])
def test_a_composition_is_saved_and_read_back(text, tmp_path):
    host = wearing(a="lora", b="dora", c="series", v="vera")
    compose(host, "m", text, hang=True)
    inlay.save(host, "m", tmp_path / "m")
    want = logits(host, "m", **batch())
    other = inlay.attach(base("llama"))
    inlay.load(other, tmp_path / "m")
    assert torch.equal(logits(other, "m", **batch()), want)


def test_adapters_on_the_shelf_compose_too():
    host = wearing(a="lora", b="road1")
    for n in "ab":
        host.shelve(f"s{n}", host.edits[n], host.placement(n), host.tensors(n))
    compose(host, "hung", "sum(0.3*a, 0.6*b)")
    compose(host, "kept", "sum(0.3*sa, 0.6*sb)")
    torch.testing.assert_close(logits(host, "kept", **batch()), logits(host, "hung", **batch()), **NEAR)
