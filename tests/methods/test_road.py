"""RoAd as its paper defines it (Liao & Monz 2024, arXiv:2409.00119), alone, in parts, beside LoRA and in mixed batches.

The numbers R1-R25 are those of the list of checks that this implementation was written against.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.nn.functional import linear

import inlay
from inlay.core.edit import Call
from inlay.core.place import Place
from inlay.core.route import STRATEGIES
from inlay.methods.rotate import RoAd, RoAdLoRA, inverse, to_road2
from tests.laws.zoo import GQA, base, batch, excite, logits

torch.set_num_threads(1)
D_IN, D_OUT = 96, 128
VARIANTS = (1, 2, 4)
PAIRINGS = ({"pairing": "adjacent"}, {"pairing": "half", "group": 2}, {"pairing": "half", "group": 16})
EXACT = 1e-14


def layer(dtype=torch.float64, d_out: int = D_OUT, seed: int = 0):
    """A linear with a bias (W, b), and the place that it is."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, D_IN, generator=draw, dtype=torch.float64).to(dtype)
    b = torch.randn(d_out, generator=draw, dtype=torch.float64).to(dtype)
    return W, b, Place(lambda x: linear(x, W, b), D_IN, d_out, "q", "0.q", has_bias=True)


def drawn(edit: RoAd, place: Place, seed: int = 1, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random tensors: t ~ N(0, 1), a ~ 1 + 0.3 N(0, 1), the rest N(0, 0.1)."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for k, v in edit.weights(place).items():
        noise = torch.randn(v.shape, generator=draw, dtype=torch.float64)
        made[k] = {"theta": noise, "a": 1 + 0.3 * noise}.get(k, 0.1 * noise).to(dtype)
    return made


def said(edit: RoAd, w, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    """What the edit passes on instead of y (..., D)."""
    place = Place(lambda x: x, D_IN, y.shape[-1], "q", "0.q")
    x = y if x is None else x
    shape = y.shape
    return edit.after(w, x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, shape[-1]), Call(place)).reshape(shape)


def dense(edit: RoAd, w, d: int) -> torch.Tensor:
    """R, entry by entry, as the paper writes it."""
    R = torch.eye(d, dtype=torch.float64)
    g = edit.group if edit.pairing == "half" else 2
    for i in range(d // 2):
        block, within = divmod(i, g // 2)
        m = block * g + within
        n = m + g // 2
        if edit.variant == 1:
            a, t = [w["a"][i]] * 4, [w["theta"][i]] * 4
        elif edit.variant == 2:
            a, t = ([w[k][m], w[k][m], w[k][n], w[k][n]] for k in ("a", "theta"))
        else:
            a, t = ([w[k][m], w[k][d + m], w[k][d + n], w[k][n]] for k in ("a", "theta"))
        R[m, m], R[m, n] = a[0] * math.cos(t[0]), -a[1] * math.sin(t[1])
        R[n, m], R[n, n] = a[2] * math.sin(t[2]), a[3] * math.cos(t[3])
    return R


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


# ---- merging ---------------------------------------------------------------------------------------------------------
WIDE = {"hidden_size": D_IN, "intermediate_size": D_OUT, "num_attention_heads": 4, "num_hidden_layers": 1}


def wide(dtype):
    """A decoder whose fc1 is a linear 96 -> 128 with a bias."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        hf.GPTNeoXConfig(vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **WIDE)
    )
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model.to(dtype).eval()


def turned(dtype=torch.float64, at="up", scale=0.5, model=None, **settings):
    """A host on a decoder with biases that wears one random RoAd, `a`."""
    host = inlay.attach(wide(dtype) if model is None else model)
    host.add("a", RoAd(**settings), at=at, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    excite(host, scale)
    return host


def at_layer(host, name, role: str = "up"):
    """(input, output) of a place during a forward."""
    seen = {}
    layer = host.model.get_submodule(host.sites[f"0.{role}"].spot.path)
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    logits(host, name, **batch())
    handle.remove()
    return seen["x"], seen["y"]


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


# ---- mixed batches ---------------------------------------------------------------------------------------------------
PLAN = (None, "s3", "s1", "s4", "s2", None, "s1")
"""Slots [0, 3, 1, 4, 2, 0, 1]."""


def slotted(dtype=torch.float32, family="gpt_neox", strategy=None, **settings):
    """A host that wears RoAds of variants 1, 2, 4, 1 as s1 to s4."""
    model = base(family, dtype)
    host = inlay.attach(model, **({} if strategy is None else {"strategy": strategy}))
    for i, variant in enumerate((1, 2, 4, 1)):
        own = torch.float64 if dtype == torch.float64 else torch.float32
        host.add(f"s{i + 1}", RoAd(variant=variant, **settings), dtype=own)
    excite(host, 0.3)
    return host


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["R10", "R11"])
def test_R10_R11_rows_of_a_mixed_batch_are_bit_equal_to_their_adapter_alone(dtype, strategy):
    host, inputs = slotted(dtype, strategy=strategy), batch(7, pad=2)
    mixed = logits(host, *PLAN, **inputs)
    assert mixed.dtype == dtype and {p.dtype for p in host.parameters()} == {torch.float32}
    bare = base("gpt_neox", dtype)(**inputs).logits
    for i, name in enumerate(PLAN):
        assert torch.equal(mixed[i], logits(host, name, **inputs)[i]), name
        assert torch.equal(mixed[i], bare[i]) == (name is None)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pairing", [{}, {"pairing": "half", "group": 8}, {"blocks": "0.5-1"}], ids=str)
def test_R10_decoding_with_a_cache_too(pairing, strategy):
    host, inputs = slotted(family="llama", strategy=strategy, **pairing), batch(7, pad=2)
    go = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), host.using(*PLAN):
        mixed = host.model.generate(**inputs, **go)
    for name in dict.fromkeys(PLAN):
        with torch.no_grad(), host.using(name):
            alone = host.model.generate(**inputs, **go)
        for i in (i for i, n in enumerate(PLAN) if n == name):
            assert torch.equal(mixed[i], alone[i]), name


def packed_states(host, plan, sequences):
    """(W, D) of one packed row, as the decoder's base says them."""
    from inlay.engine.attention import apart
    from inlay.engine.pack import laid_out

    with torch.no_grad(), host.using(*plan), apart(host):
        layout, inputs = laid_out(host, sequences)
        with host.packed(layout):
            return layout, host.model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def test_R12_tokens_of_one_packed_row_have_slots_of_their_own():
    host = slotted(family="llama")
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 97, (n,), generator=draw).tolist() for n in (3, 5, 1, 4, 2, 6, 3)]
    layout, mixed = packed_states(host, PLAN, sequences)
    assert layout.shape == (1, 24)
    for i, name in enumerate(PLAN):
        own = slice(layout.index(i), layout.index(i) + len(sequences[i]))
        assert torch.equal(mixed[own], packed_states(host, (name,), sequences)[1][own])
        with torch.no_grad(), host.using(name):
            alone = host.model.base_model(torch.tensor([sequences[i]])).last_hidden_state[0]
        torch.testing.assert_close(mixed[own], alone, rtol=1e-5, atol=1e-5)


def gradients(host, plan, inputs) -> dict:
    host.model.zero_grad()
    for p in host.parameters():
        p.grad = None
    with host.using(*plan):
        host.model(**inputs).logits.square().sum().backward()
    return {f"{n}:{k}": t.grad for n in host.edits for k, t in host.tensors(n).items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_R13_gradients_of_a_mixed_batch_are_those_of_each_adapters_own_rows(strategy):
    host, inputs = slotted(torch.float64, "llama", strategy), batch(7)
    mixed = gradients(host, PLAN, inputs)
    for name in host.edits:
        rows = [i for i, n in enumerate(PLAN) if n == name]
        alone = gradients(host, (name,), {k: v[rows] for k, v in inputs.items()})
        for k in (k for k in mixed if k.startswith(f"{name}:")):
            torch.testing.assert_close(mixed[k], alone[k], rtol=1e-10, atol=1e-10)
    absent = gradients(host, ("s1", None, "s1", None, "s3", "s3", None), inputs)
    assert all(g is None or not g.any() for k, g in absent.items() if k[:2] in ("s2", "s4"))
    assert all(g is not None and g.any() for k, g in absent.items() if k[:2] in ("s1", "s3"))


EDITS = [*(RoAd(variant=v, **p) for v in VARIANTS for p in PAIRINGS), RoAd(blocks="0.25-0.75")]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_R13_gradcheck(edit):
    edit = replace(edit, group=min(edit.group, 8))
    place = layer(d_out=16)[2]
    w = {k: v.requires_grad_() for k, v in drawn(edit, place).items()}
    h = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)

    def f(h, *tensors):
        return edit.after(dict(zip(w, tensors, strict=True)), h, h, Call(place))

    assert torch.autograd.gradcheck(f, (h, *w.values()))


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


# ---- published numbers -----------------------------------------------------------------------------------------------
LLAMA = {"vocab_size": 32000, "intermediate_size": 11008}
SIZES = {
    "LLaMA-7B": lambda: hf.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    "LLaMA-13B": lambda: hf.LlamaConfig(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, **LLAMA | {"intermediate_size": 13824}
    ),
    "LLaMA3-8B": lambda: hf.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        intermediate_size=14336,
    ),
    "RoBERTa-base": lambda: hf.RobertaConfig(is_decoder=True),
    "RoBERTa-large": lambda: hf.RobertaConfig(
        is_decoder=True, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
COUNTS = [
    ("LLaMA-7B", "linear", 1, 1_359_872, 0.0202),
    ("LLaMA-7B", "linear", 2, 2_719_744, 0.0404),
    ("LLaMA-7B", "linear", 4, 5_439_488, 0.0807),
    ("LLaMA-13B", "linear", 1, 2_129_920, 0.0164),
    ("LLaMA3-8B", "linear", 1, 1_376_256, 0.0171),
    ("RoBERTa-base", "linear", 1, 82_944, None),
    ("RoBERTa-base", "fc1", 1, 36_864, None),
    ("RoBERTa-large", "linear", 1, 221_184, None),
    ("RoBERTa-large", "fc1", 1, 98_304, None),
]


@pytest.mark.parametrize(("size", "at", "variant", "count", "percent"), COUNTS)
def test_R19_published_parameter_counts(size, at, variant, count, percent):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(SIZES[size]())
    total = sum(p.numel() for p in model.parameters())
    host = inlay.attach(model)
    if size.startswith("RoBERTa"):
        at = [
            p
            for p, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and ".layer." in p and (at != "fc1" or "intermediate" in p)
        ]
    host.add("a", RoAd(variant=variant), at=at)
    assert host.count("a") == count
    assert percent is None or round(100 * count / total, 4) == pytest.approx(percent, abs=5e-5)


def test_R20_half_of_road4s_angles_never_move():
    torch.manual_seed(0)
    edit, place = RoAd(variant=4), layer(torch.float32, 16)[2]
    w = {k: torch.nn.Parameter(v) for k, v in edit.weights(place).items()}
    R = torch.randn(16, 16)
    optimizer = torch.optim.AdamW(w.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(300):
        h = torch.randn(32, 16)
        loss = (said(edit, w, h) - h @ R.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    diagonal, off = w["theta"].detach().chunk(2)  # t11, t22 and t12, t21
    assert not diagonal.any() and bool(off.all())
    assert sum(losses[-20:]) < sum(losses[:20])


def test_weight_decay_never_pulls_the_factors_to_zero():
    """A decaying `a` would kill the layer; the training loop decays matrices only."""
    host = inlay.attach(base("llama"))
    for variant in VARIANTS:
        host.add(f"v{variant}", RoAd(variant=variant))
    assert all(p.dim() == 1 for p in host.parameters())


# ---- HF PEFT ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [64, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_R21_pefts_checkpoints(variant, group, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    from inlay.interop import formats

    def llama():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**GQA | {"hidden_size": 128, "intermediate_size": 192})).eval()

    linears = ["q_proj", "o_proj", "up_proj"]
    config = peft.RoadConfig(task_type="CAUSAL_LM", variant=f"road_{variant}", group_size=group, target_modules=linears)
    theirs = peft.get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(**batch()).logits
    host = inlay.attach(llama())
    name = formats.read(host, tmp_path / "theirs")
    torch.testing.assert_close(logits(host, name, **batch()), want, rtol=0, atol=1e-6)
    if group == 2:  # neighbours: the file's tensors as they are
        file = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        theta = file["base_model.model.model.layers.0.self_attn.q_proj.road_theta"]
        mine, edit = host.by_place(name)["0.q"], replace(host.edits[name], pairing="adjacent")
        assert variant == 4 or torch.equal(mine["theta"], theta)
        h = torch.randn(5, 128)
        assert torch.equal(said(edit, mine, h), said(host.edits[name], mine, h))
    # Half of the blocks: PEFT has no such setting, and gets the identity for the others.
    host.add("part", RoAd(variant=variant, blocks="0.5-1", pairing="half", group=32), at="q,o")
    excite(host)
    formats.write(host, "part", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, logits(host, "part", **batch()), rtol=0, atol=1e-6)
    host.add("last", RoAd(positions="last-prompt"), at="q")
    with pytest.raises(inlay.InlayError, match="last-prompt positions only"):
        formats.write(host, "last", tmp_path / "last")


def test_R22_widths_that_cannot_be_paired_name_the_layer():
    config = hf.LlamaConfig(**GQA | {"intermediate_size": 33})
    host = inlay.attach(hf.LlamaForCausalLM(config))
    for settings in ({}, {"pairing": "half", "group": 5}):
        text = r"'0\.up' has an odd number, 33"
        with pytest.raises(inlay.InlayError, match=text):
            host.add("a", RoAd(**settings), at="up")
    with pytest.raises(inlay.InlayError, match=r"groups of 64 do not fit the 32 outputs of '0\.q'"):
        host.add("a", RoAd(pairing="half"), at="q")
    with pytest.raises(inlay.InlayError, match="leave the embedding out"):
        host.add("a", RoAd(), at="embed")
    assert not host.edits and not host.sites


# ---- single positions ------------------------------------------------------------------------------------------------
def last(layer: int, family: str = "llama", dtype=torch.float32):
    """A host that wears a RoAd of one block's last prompt token, and one of all its tokens."""
    host = inlay.attach(base(family, dtype))
    for name, positions in (("last", "last-prompt"), ("all", "all")):
        host.add(name, RoAd(positions=positions), at=f"block@{layer}")
    host.add("prefix", inlay.method("prefix").make(tokens=3), seed=0)
    host.add("after", RoAd(positions="last-prompt"), at=f"block@{layer}")
    excite(host, 0.3)
    for name in ("all", "after"):
        host.fill(name, host.tensors("last"))
    return host


def states(host, plan, **inputs) -> torch.Tensor:
    """What the last block says (B, T, D)."""
    seen = []
    handle = host.model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    logits(host, *plan, **inputs)
    handle.remove()
    return seen[-1]


def test_R23_only_the_last_prompt_token_changes():
    host, inputs = last(1), batch(3, 7)
    bare, one, every = (states(host, (n,), **inputs) for n in (None, "last", "all"))
    assert torch.equal(one[:, :-1], bare[:, :-1]) and torch.equal(one[:, -1], every[:, -1])
    assert (one[:, -1] - bare[:, -1]).abs().max() > 0.1
    # Right padding, and a prompt that ends before the answer, told by the labels or by the caller.
    inputs["attention_mask"][1, 5:] = 0
    ends = [7, 5, 7]
    one = states(host, ("last",), **inputs)
    labels = inputs["input_ids"].masked_fill(torch.arange(7) < torch.tensor([[3], [4], [2]]), -100)
    answered = states(host, ("last",), **inputs, labels=labels)
    with host.prompts([3, 4, 2]):
        told = states(host, ("last",), **inputs)
    for i, (whole, part) in enumerate(zip(ends, (3, 4, 2), strict=True)):
        for got, end in ((one, whole), (answered, part), (told, part)):
            changed = (got[i] != bare_of(host, inputs)[i]).any(-1).nonzero()[:, 0].tolist()
            assert changed == [end - 1]


def bare_of(host, inputs) -> torch.Tensor:
    return states(host, (None,), **inputs)


@pytest.mark.parametrize("plan", ["last", "prefix+last", "prefix+after"])
def test_R23_left_padding_does_not_matter(plan):
    host, inputs = last(0), batch(1, 6)
    padded = {k: torch.nn.functional.pad(v, (4, 0)) for k, v in inputs.items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want = logits(host, plan, **inputs)
    torch.testing.assert_close(logits(host, plan, **padded)[:, 4:], want, rtol=1e-5, atol=1e-5)
    assert (want - logits(host, plan.removesuffix("+last").removesuffix("+after"), **inputs)).abs().max() > 0.01 or (
        plan == "last"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_R23_rows_and_plans_mix(strategy):
    host, inputs = last(0, dtype=torch.float64), batch(5, 7, pad=2)
    host.strategy = strategy
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plan = ("last", None, "prefix+last", "all", "prefix")
    mixed, used = logits(host, *plan, **inputs), inputs["attention_mask"].bool()
    for i, name in enumerate(plan):
        alone = logits(host, name, **inputs)[i]
        torch.testing.assert_close(mixed[i][used[i]], alone[used[i]], rtol=0, atol=1e-9)


def test_R23_nothing_is_turned_while_decoding():
    host, inputs = last(1), batch(3, 6, pad=2)
    with torch.no_grad():
        for n in (None, "last"):
            with host.using(n):
                past = host.model(**inputs, use_cache=True).past_key_values
                step = torch.full((3, 1), 5)
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                said = host.model(input_ids=step, attention_mask=mask, past_key_values=past).logits
            want = said if n is None else want  # noqa: F821
    assert torch.equal(said, want)  # the last block's own output is all that was turned, and it is not cached
    # And where the turned state is read by the next block: cached is uncached, alone or with beams.
    host = last(0)
    go = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), host.using("last", None, "prefix+last"):
        for beams in (1, 3):
            cached = host.model.generate(**inputs, **go, num_beams=beams)
            with host.prompts(inputs["attention_mask"].sum(-1)):
                plain = host.model.generate(**inputs, **go, num_beams=beams, use_cache=False)
            assert torch.equal(cached, plain)


def test_R23_training_packed_or_padded_turns_what_generation_turns():
    from inlay.train.ways import Packed, Plain
    from tests.engine.test_packed import Row
    from tests.engine.test_packed import gradients as of

    host = last(0)
    ids = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
    rows = [Row(own, [-100] * n + own[n:]) for own, n in zip(ids, (3, 1, 2), strict=True)]
    want, plain = of(host, "last", Plain(host, 0, 2), rows)
    got, packed = of(host, "last", Packed(host, 0, 14), rows)
    assert got == pytest.approx(want, rel=1e-5) and set(plain) == {"0.block/theta", "0.block/a"}
    for k, g in plain.items():
        torch.testing.assert_close(packed[k], g, rtol=1e-3, atol=1e-5)
    learned = [Row(own, own) for own in ids]  # no prompt: nothing is turned, and nothing learns
    for way in (Plain(host, 0, 2), Packed(host, 0, 14)):
        assert not any(g.any() for g in of(host, "last", way, learned)[1].values())
    with host.using("last"), torch.no_grad():
        past = host.model(torch.tensor([ids[0][:3]]), use_cache=True)
        more = host.model(torch.tensor([ids[0][3:4]]), past_key_values=past.past_key_values)
        said = torch.cat([past.logits[0, -1:], more.logits[0]])
        loss = torch.nn.functional.cross_entropy(said, torch.tensor(ids[0][3:]), reduction="sum")
        assert float(loss) == pytest.approx(float(Plain(host, 0, 1).loss(rows[:1])), rel=1e-5)


def test_R23_evaluation_knows_where_prompts_end():
    from inlay.evaluate import GenerateSettings, generate, option_scores
    from tests.evaluate.tiny import base as speaking
    from tests.evaluate.tiny import tokenizer

    host = inlay.attach(speaking("llama"))
    host.add("last", RoAd(positions="last-prompt"), at="block@0")
    excite(host, 0.5)
    prompts = [f"The bird said: {w}" for w in ("hello", "no", "two words", "", "12")]
    options = [["yes", "no, never", "no"], ["a", "b"], ["x"], ["why", "what"], ["who"]]
    plan = ["last", None, "last", "last", "last"]
    scores = [option_scores(host, tokenizer(), prompts, options, plan, share=share) for share in (True, False)]
    bare = option_scores(host, tokenizer(), prompts, options)
    for a, b, c, name in zip(*scores, bare, plan, strict=True):
        assert a == pytest.approx(b, abs=2e-4) and (a == pytest.approx(c, abs=2e-4)) == (name is None)
    settings = GenerateSettings(max_new_tokens=6, batch_size=2)
    made = generate(host, tokenizer(), prompts, plan, settings)
    for prompt, name, one in zip(prompts, plan, made, strict=True):
        ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
        with torch.no_grad(), host.using(name):
            out = host.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert one.tokens == out[0, ids.shape[1] :].tolist()
    assert made != generate(host, tokenizer(), prompts, None, settings)


# ---- cost ------------------------------------------------------------------------------------------------------------
def seconds(f, device: str, runs: int = 30) -> float:
    """Of one call, the fastest of many."""
    best = math.inf
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def worn(n: int, place: Place, edit: RoAd):
    """(edit, tensors of n adapters, one a row) as they are worn once nothing is trained."""
    parts = [edit.folded(drawn(edit, place, i, torch.float32), place) for i in range(n)]
    turn = parts[0][0]
    assert all(e == turn for e, _ in parts) and turn.stacks(place)
    stack = {k: torch.stack([w[k] for _, w in parts]) for k in parts[0][1]}
    return turn, {k: t if t.dim() == 3 else t[:, None] for k, t in stack.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_R24_eight_roads_cost_less_than_eight_loras_by_bmm(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    d, rank, n = 4096, 8, 8
    draw = torch.Generator().manual_seed(0)
    x, A, B, y = (
        torch.randn(*shape, generator=draw).to(device) for shape in ((n, 1, d), (n, d, rank), (n, rank, d), (n, 1, d))
    )
    place = Place(lambda x: x, d, d, "q", "0.q")
    edit, w = worn(n, place, RoAd())
    w = {k: t.to(device) for k, t in w.items()}
    road = seconds(lambda: edit.after(w, x, y, Call(place)), device)
    lora = seconds(lambda: y + torch.bmm(torch.bmm(x, A), B), device)
    assert road < lora, (road, lora)


def operations(host, plan, inputs) -> dict[str, int]:
    """ATen operations of one decoding step, and how often each is called."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), host.using(*plan):
        past = host.model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, "past_key_values": past}
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            host.model(**step)
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("aten::")}


@pytest.mark.parametrize("variants", [(1,), (2, 4)], ids=str)
def test_R25_serving_takes_no_cosines_and_no_turn_per_adapter(variants):
    host = inlay.attach(base("llama"))
    for i in range(16):
        host.add(f"s{i}", RoAd(variant=variants[i % len(variants)], blocks="0-0.5" if i > 7 else "0-1"))
    excite(host, 0.3)
    inputs = batch(16)
    bare = operations(host, (None,), inputs)
    few, many = (operations(host, [f"s{i % n}" for i in range(16)], inputs) for n in (2, 16))
    angles = ("aten::cos", "aten::sin", "aten::polar")  # some are the base's rotary embedding's
    assert all(few.get(k, 0) == many.get(k, 0) == bare.get(k, 0) for k in angles)
    assert few == many and few != bare


ALSO = [RoAd(variant=4, blocks="0.5-1"), RoAdLoRA(rank=4, blocks="0-0.5")]


@pytest.mark.parametrize("edit", [*EDITS, *ALSO], ids=str)
def test_what_serving_computes_is_what_training_computes(edit):
    W, b, place = layer(torch.float32)
    x = torch.randn(3, 2, D_IN)
    y = linear(x, W, b)
    turn, w = worn(3, place, edit)
    got = turn.after(w, x, y, Call(place))
    for i in range(3):
        alone = edit.after(drawn(edit, place, i, torch.float32), x[i : i + 1], y[i : i + 1], Call(place))[0]
        if isinstance(edit, RoAdLoRA):
            torch.testing.assert_close(got[i], alone, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got[i], alone)
