"""RoAd as its paper defines it (Liao & Monz 2024, arXiv:2409.00119): formula, merging, conversion, parts, beside LoRA.

The numbers R1-R25, here and in the files beside this one, are those of the checks that RoAd was written against.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.nn.functional import linear

import inlay
from inlay.core.edit import Call
from inlay.methods.rotate import RoAd, RoAdLoRA, inverse, to_road2
from tests.laws.zoo import GQA, base, batch, excite, logits
from tests.methods.road import (
    D_IN,
    D_OUT,
    EXACT,
    PAIRINGS,
    VARIANTS,
    at_layer,
    dense,
    drawn,
    gradients,
    layer,
    said,
    turned,
    wide,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_R1_a_fresh_adapter_is_the_identity_to_the_last_bit(dtype):
    W, b, place = layer(dtype)
    x = torch.randn(7, 5, D_IN).to(dtype)
    y = linear(x, W, b)
    edits = [RoAd(variant=v, **p, blocks=r) for v in VARIANTS for p in PAIRINGS for r in ("0-1", "0.5-1")]
    for edit in [*edits, RoAdLoRA(rank=4)]:
        w = edit.weights(place)
        assert torch.equal(edit.after(w, x.float(), y.float(), Call(place)).to(dtype), y), edit


@pytest.mark.parametrize("pairing", PAIRINGS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_R2_two_vectors_are_the_dense_rotation(variant, pairing):
    edit = RoAd(variant=variant, **pairing)
    W, b, place = layer()
    w, h = drawn(edit, place), torch.randn(3, 5, D_OUT, dtype=torch.float64)
    torch.testing.assert_close(said(edit, w, h), h @ dense(edit, w, D_OUT).T, rtol=0, atol=EXACT)


def test_R3_with_a_of_one_lengths_are_kept():
    edit = RoAd()
    w = drawn(edit, layer()[2]) | {"a": torch.ones(D_OUT // 2, dtype=torch.float64)}
    h = torch.randn(9, D_OUT, dtype=torch.float64)
    torch.testing.assert_close(said(edit, w, h).norm(dim=-1), h.norm(dim=-1), rtol=EXACT, atol=0)
    R = said(edit, w, torch.eye(D_OUT, dtype=torch.float64)).T
    torch.testing.assert_close(R.T @ R, torch.eye(D_OUT, dtype=torch.float64), rtol=0, atol=EXACT)
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-13)


def test_R4_each_pair_is_stretched_by_its_a():
    edit = RoAd()
    w, h = drawn(edit, layer()[2]), torch.randn(9, D_OUT, dtype=torch.float64)
    before, after = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (h, said(edit, w, h)))
    torch.testing.assert_close(after, before * w["a"].abs(), rtol=1e-14, atol=1e-15)


def test_R5_a_quarter_turn_goes_from_the_first_output_to_the_second():
    w = {"theta": torch.tensor([torch.pi / 2], dtype=torch.float64), "a": torch.tensor([2.0], dtype=torch.float64)}
    got = said(RoAd(), w, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[0, 2], [-2, 0]], dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("pairing", "want"), [("adjacent", [-2, 1, 3, 4]), ("half", [-3, 2, 1, 4])])
def test_R6_who_is_paired_with_whom(pairing, want):
    w = {"theta": torch.tensor([torch.pi / 2, 0], dtype=torch.float64), "a": torch.ones(2, dtype=torch.float64)}
    got = said(RoAd(pairing=pairing, group=4), w, torch.arange(1, 5, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize("settings", [{"variant": v, **p} for v in VARIANTS for p in PAIRINGS[1:]], ids=str)
def test_R7_merged_is_unmerged_bias_included(settings, dtype, near):
    host = turned(dtype, **settings)
    x, y = at_layer(host, "a")
    path = host.sites["0.up"].spot.path
    new = inlay.merged(host, "a")
    assert set(new) == {f"{path}.weight", f"{path}.bias"} and new[f"{path}.weight"].dtype == dtype
    assert (new[f"{path}.bias"] - host.model.get_submodule(path).bias).abs().max() > 0.1
    torch.testing.assert_close(linear(x, new[f"{path}.weight"], new[f"{path}.bias"]), y, rtol=0, atol=near)


def test_R8_a_merged_bf16_weight_is_the_exact_one_correctly_rounded():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**GQA | {"hidden_size": 1024, "num_hidden_layers": 1, "num_key_value_heads": 4})
    host = turned(torch.bfloat16, at="o", model=hf.LlamaForCausalLM(config).to(torch.bfloat16).eval())
    W, w = host.model.model.layers[0].self_attn.o_proj.weight.detach().double(), host.by_place("a")["0.o"]
    exact = said(RoAd(), {k: v.detach().double() for k, v in w.items()}, W.T).T
    inlay.merge(host, "a")
    merged = host.model.model.layers[0].self_attn.o_proj.weight
    # Correctly rounded: no neighbour in bf16 is nearer than the one that was taken.
    bits = merged.view(torch.int16)
    off = (merged.double() - exact).abs()
    for step in (-1, 1):
        assert bool((off <= ((bits + step).view(torch.bfloat16).double() - exact).abs()).all())
    assert (off.norm() / exact.norm()).item() <= 1.7e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_R9_unmerged_by_copies_bit_for_bit_and_by_the_inverse_to_rounding(variant):
    host = turned(variant=variant, scale=0.2, pairing="half", group=16)
    state = {k: v.clone() for k, v in host.model.state_dict().items() if "inlay" not in k}
    inverse(host, "a", "back")
    assert host.edits["back"].variant == (1 if variant == 1 else 2)
    report = inlay.merge(host, "a")
    there = host.model.state_dict()
    assert any(not torch.equal(there[k], v) for k, v in state.items())
    inlay.merge(host, "back", keep=False)
    for k, v in host.model.state_dict().items():
        torch.testing.assert_close(v, state[k], rtol=0, atol=1e-12)
    report.undo()
    assert all(torch.equal(v, state[k]) for k, v in host.model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_R9_a_singular_block_has_no_inverse_and_says_so(variant):
    host = turned(variant=variant)
    with torch.no_grad():
        a = host.tensors("a")["0.up/a"].view(2 if variant == 4 else 1, -1)
        a[:, : 1 if variant == 1 else 2] = 0  # the first block's
    with pytest.raises(inlay.InlayError, match=r"1 blocks at '0\.up' are singular .* keep the base's own"):
        inverse(host, "a", "back")
    assert list(host.edits) == ["a"]
    want = [p.clone() for p in host.model.get_submodule(host.sites["0.up"].spot.path).parameters(recurse=False)]
    inlay.merge(host, "a").undo()
    fc1 = host.model.gpt_neox.layers[0].mlp.dense_h_to_4h
    assert all(torch.equal(a, b) for a, b in zip(want, fc1.parameters(), strict=True))


def test_what_is_no_rotation_of_all_positions_is_not_merged_nor_inverted():
    host = turned(positions="last-prompt", at="up")
    with pytest.raises(inlay.InlayError, match="single positions"):
        inlay.merge(host, "a")
    host.add("both", RoAdLoRA(rank=2)).add("lora", inlay.method("lora").make(rank=2))
    with pytest.raises(inlay.InlayError, match="inverse of road-lora"):
        inverse(host, "both", "back")
    with pytest.raises(inlay.InlayError, match="'lora' is lora, not RoAd"):
        to_road2(host, "lora", "back")


# ---- one variant from another ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"pairing": "half", "group": 16}, {"blocks": "0-0.5"}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_R14_every_road_is_a_road2(variant, settings):
    host = turned(at="up,o", variant=variant, **settings)
    to_road2(host, "a", "b")
    assert host.edits["b"] == replace(host.edits["a"], variant=2)
    assert host.count("b") == host.count("a") * {1: 2, 2: 1, 4: 0.5}[variant]
    h = torch.randn(9, D_OUT, dtype=torch.float64)
    a, b = (said(host.edits[n], host.by_place(n)["0.up"], h) for n in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=2 * EXACT)
    torch.testing.assert_close(logits(host, "a", **batch()), logits(host, "b", **batch()), rtol=0, atol=1e-11)


def test_R14_from_the_command_line(tmp_path):
    from inlay.cli import main

    model, _ = inlay.load_base("tiny-llama", device="cpu")
    host = inlay.attach(model)
    host.add("a", RoAd(variant=4), at="q,up")
    excite(host, 0.3)
    inlay.save(host, "a", tmp_path / "road4")
    assert main(["convert", str(tmp_path / "road4"), str(tmp_path / "road2"), "--model", "tiny-llama", "--road2"]) == 0
    name = inlay.load(host, tmp_path / "road2")
    assert host.edits[name] == RoAd(variant=2) and 2 * host.count(name) == host.count("a")
    torch.testing.assert_close(logits(host, name, **batch()), logits(host, "a", **batch()), rtol=1e-4, atol=1e-5)
    host.add("lora", inlay.method("lora").make(rank=2), at="q")
    inlay.save(host, "lora", tmp_path / "lora")
    wrong = ["convert", str(tmp_path / "lora"), str(tmp_path / "no"), "--model", "tiny-llama", "--road2"]
    assert main(wrong) == 2 and not (tmp_path / "no").exists()


def test_R15_road1_commutes_and_adds_up_and_road2_does_not():
    edit, place = RoAd(), layer()[2]
    v, w, h = drawn(edit, place, 1), drawn(edit, place, 2), torch.randn(9, D_OUT, dtype=torch.float64)
    one, other = said(edit, v, said(edit, w, h)), said(edit, w, said(edit, v, h))
    both = {"theta": v["theta"] + w["theta"], "a": v["a"] * w["a"]}
    torch.testing.assert_close(one, other, rtol=0, atol=EXACT)
    torch.testing.assert_close(one, said(edit, both, h), rtol=0, atol=EXACT)
    edit = RoAd(variant=2)
    v, w = drawn(edit, place, 1), drawn(edit, place, 2)
    assert (said(edit, v, said(edit, w, h)) - said(edit, w, said(edit, v, h))).abs().max() > 0.1


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pairing", PAIRINGS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_R16_disjoint_halves_commute_and_make_the_whole(variant, pairing, dtype):
    place = layer()[2]
    whole = RoAd(variant=variant, **pairing)
    A, B = (replace(whole, blocks=r) for r in ("0-0.5", "0.5-1"))
    v, w, h = drawn(A, place, 1, dtype), drawn(B, place, 2, dtype), torch.randn(9, D_OUT).to(dtype)
    assert v["a"].numel() == whole.weights(place)["a"].numel() // 2
    one, other = said(A, v, said(B, w, h)), said(B, w, said(A, v, h))
    assert torch.equal(one, other)
    # The whole adapter, its tensors put together from the halves'.
    halves = {k: (A.whole(v, place)[k], B.whole(w, place)[k]) for k in v}
    first = A.whole({"theta": torch.ones_like(v["theta"]), "a": torch.ones_like(v["a"])}, place)["theta"].bool()
    full = {k: torch.where(first, a, b) for k, (a, b) in halves.items()}
    assert torch.equal(said(whole, full, h), one)
    half = D_OUT // 2
    assert torch.equal(said(A, v, h)[:, half:], h[:, half:]) and torch.equal(said(B, w, h)[:, :half], h[:, :half])
    assert (said(A, v, h)[:, :half] - h[:, :half]).abs().max() > 0.1


def test_R16_each_half_learns_from_its_own_task_only():
    host = inlay.attach(base("llama"))
    for name, blocks in (("A", "0-0.5"), ("B", "0.5-1")):
        host.add(name, RoAd(blocks=blocks), at="block@0")
    assert host.count("A") == host.count("B") == 16
    excite(host)
    states = []
    handle = host.model.model.layers[0].register_forward_hook(lambda m, args, out: states.append(out))
    with host.using("A+B"):
        host.model(**batch())
        states.pop()[..., :16].square().sum().backward()  # a loss through half A alone
    handle.remove()
    assert all(p.grad.abs().sum() > 0 for p in host.parameters("A"))
    assert all(p.grad is None or not p.grad.any() for p in host.parameters("B"))
    for p in host.parameters():
        p.grad = None
    # Both tasks in one run: rows of task A wear A, rows of task B wear B.
    alone = gradients(host, ("A",), {k: v[:2] for k, v in batch(4).items()})
    mixed = gradients(host, ("A", "A", "B", "B"), batch(4))
    for k in ("A:0.block/theta", "A:0.block/a"):
        torch.testing.assert_close(mixed[k], alone[k], rtol=1e-4, atol=1e-4)
    # Either or both: what both say of the state is the sum of the two changes.
    changes = []
    for plan in (None, "A", "B", "A+B"):
        handle = host.model.model.layers[0].register_forward_hook(lambda m, args, out: changes.append(out))
        logits(host, plan, **batch())
        handle.remove()
    bare, a, b, both = changes
    assert torch.equal(both[..., :16], a[..., :16]) and torch.equal(both[..., 16:], b[..., 16:])
    assert torch.equal(a[..., 16:], bare[..., 16:]) and torch.equal(b[..., :16], bare[..., :16])


def test_R16_ranges_that_cannot_be_are_refused():
    for blocks in ("", "1-0", "0-2", "first", "0.5", "0-0"):
        with pytest.raises(inlay.InlayError, match="cannot read the blocks"):
            RoAd(blocks=blocks)
    with pytest.raises(inlay.InlayError, match=r"cut a group of 64 outputs at '0\.q'"):
        RoAd(blocks="0-0.25", pairing="half").weights(layer()[2])
    with pytest.raises(inlay.InlayError, match=r"name none of the 64 at '0\.q'"):
        RoAd(blocks="0-0.001").weights(layer()[2])


def test_R17_the_interchange_form_is_the_rotation_only_where_lengths_are_kept():
    edit, place = RoAd(), layer()[2]
    h = torch.randn(9, D_OUT, dtype=torch.float64)
    for alpha in (1.0, 1.3):
        w = drawn(edit, place) | {"a": torch.full((D_OUT // 2,), alpha, dtype=torch.float64)}
        R = dense(edit, w, D_OUT)
        form = h + (h - h @ R) @ R.T  # h + R (h - R^T h)
        torch.testing.assert_close(form, said(edit, w, h) + (1 - alpha**2) * h, rtol=0, atol=4 * EXACT)
    assert (form - said(edit, w, h)).abs().max() > 0.1


@pytest.mark.parametrize("blocks", ["0-1", "0.5-1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_R18_road_beside_lora_is_R_W_plus_s_B_A(variant, blocks):
    edit = RoAdLoRA(variant=variant, blocks=blocks, rank=4, alpha=6.0)
    W, b, place = layer()
    w, x = drawn(edit, place), torch.randn(2, 5, D_IN, dtype=torch.float64)
    R = dense(replace(edit, blocks="0-1"), edit.whole(w, place), D_OUT)
    got = edit.after(w, x, linear(x, W, b), Call(place))
    torch.testing.assert_close(got, linear(x, R @ W + 1.5 * w["B"] @ w["A"], R @ b), rtol=0, atol=1e-12)
    turned_too = linear(x, R @ (W + 1.5 * w["B"] @ w["A"]), R @ b)
    assert (got - turned_too).abs().max() > 0.1
    host = inlay.attach(wide(torch.float64))
    host.add("a", edit, at="up", dtype=torch.float64)
    excite(host, 0.3)
    x, y = at_layer(host, "a")
    path = host.sites["0.up"].spot.path
    new = inlay.merged(host, "a")
    torch.testing.assert_close(linear(x, new[f"{path}.weight"], new[f"{path}.bias"]), y, rtol=0, atol=1e-13)
