"""The engine computes what the plain padded forward computes: losses, gradients, for every method and family."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import inlay
from inlay.core.errors import InlayError
from inlay.engine import head
from inlay.engine.attention import apart
from inlay.engine.linear import FrozenLinear, fast_linears
from inlay.engine.loss import linear_cross_entropy
from inlay.engine.pack import pack, packs
from inlay.train.ways import Packed, Plain, choose
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.laws.zoo import FAMILIES, GQA, base, dressed, excite, methods, small
from tests.train.tiny import settings


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    """Random ids; the first third of each row is not learned, of the second row nothing is left out."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 97, (n,), generator=draw).tolist()
        skip = 0 if i == 1 else n // 3
        made.append(Row(ids, [-100] * skip + ids[skip:]))
    return made


ROWS = rows(5, 9, 7, 3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "falcon-rw"])
def test_losses_and_gradients_are_the_plain_ones(family):
    host = dressed(family)
    for name in methods(family):
        want, plain = gradients(host, name, Plain(host, 0, 2), ROWS)
        got, packed = gradients(host, name, Packed(host, 0, 14), ROWS)
        loss, exact = exact_gradients(family, name, ROWS)
        assert got == pytest.approx(want, rel=1e-5) and got == pytest.approx(loss, rel=1e-5), name
        assert_as_exact(packed, plain, exact, name)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2", "opt", "olmoe"])
def test_every_sequence_has_its_own_plan(family):
    host, plan = dressed(family), ("lora", "prefix", None, "prompt+series")
    alone = []
    with torch.no_grad():
        for row, name in zip(ROWS, plan, strict=True):
            with host.using(name):
                alone.append(float(Plain(host, 0, 1).loss([row])))
        with host.using(*plan), apart(host):
            made = pack(host, [r.input_ids for r in ROWS], [r.labels for r in ROWS])
            scores = head.log_likelihood(host, made)
    counts = [sum(label != -100 for label in r.labels[1:]) for r in ROWS]
    assert [-float(s.sum()) for s in scores.split(counts)] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_continuations_are_read_behind_their_parent(family, name):
    """A prompt with a tree of endings: each path scores as it does alone."""
    host = dressed(family)
    sequences, parents = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14], [20, 21]], [None, 0, 1, 0, None]
    paths = {2: [5, 6, 7, 8, 9, 10, 11], 3: [5, 6, 7, 8, 12, 13, 14]}
    labels = [[-100] * 4, [9, 10], [11], [12, 13, 14], [-100, 21]]
    with torch.no_grad(), host.using(name):
        with apart(host):
            made = pack(host, sequences, labels, parents)
            scores = head.log_likelihood(host, made).tolist()
        for end, path in paths.items():
            logp = host.model(torch.tensor([path])).logits[0, 3:-1].log_softmax(-1)
            want = logp.gather(1, torch.tensor(path[4:])[:, None])[:, 0].tolist()
            assert (scores[:3] if end == 2 else scores[3:6]) == pytest.approx(want, abs=2e-5)


def test_continuations_need_positions():
    host = dressed("bloom")
    with host.using("lora"), pytest.raises(InlayError, match="counts positions by columns"):
        pack(host, [[5, 6], [7]], [[-100, 6], [7]], [None, 0])


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "mistral"])
def test_neighbours_do_not_leak(family):
    """To the last bit: other neighbours of the same lengths change nothing."""
    host = dressed(family)
    with torch.no_grad(), host.using("lora"), apart(host):
        said = []
        for other in (ROWS[1], rows(9, 9, seed=7)[1]):
            three = [ROWS[0], other, ROWS[2]]
            made = pack(host, [r.input_ids for r in three], [r.labels for r in three])
            scores = head.log_likelihood(host, made).split([sum(x != -100 for x in r.labels[1:]) for r in three])
            said.append((scores[0], scores[2]))
    assert torch.equal(said[0][0], said[1][0]) and torch.equal(said[0][1], said[1][1])


def test_sliding_windows_and_caps():
    for config in (
        hf.MistralConfig(sliding_window=4, **GQA),
        hf.Gemma2Config(head_dim=8, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=None, **GQA),
    ):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        host = inlay.attach(model).add("a", small("lora"), seed=0)
        excite(host)
        want, plain = gradients(host, "a", Plain(host, 0, 4), ROWS)
        got, packed = gradients(host, "a", Packed(host, 0, 100), ROWS)
        assert got == pytest.approx(want, rel=1e-5)
        assert all(torch.allclose(packed[k], plain[k], rtol=1e-3, atol=1e-5) for k in plain)


def test_gradient_checkpointing_replays_packs():
    found = []
    for on in (False, True):
        host = inlay.attach(base("llama")).add("a", small("lora"), seed=0)
        excite(host)
        host.model.train()
        if on:
            host.model.gradient_checkpointing_enable()
        found.append(gradients(host, "a", Packed(host, 0, 14), ROWS))
    assert found[0][0] == found[1][0] and all(torch.equal(found[0][1][k], found[1][1][k]) for k in found[0][1])


def test_16_bits_are_near():
    for family in ("llama", "bloom"):
        host = dressed(family, torch.bfloat16)
        for name in ("lora", "series", "road1", "prefix"):
            want, _ = gradients(host, name, Plain(host, 0, 4), ROWS)
            got, found = gradients(host, name, Packed(host, 0, 100), ROWS)
            assert got == pytest.approx(want, rel=2e-2)
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
        assert not host.fast


# ---- falling back ----------------------------------------------------------------------------------------------------
def test_what_cannot_be_packed_is_said_and_padded(tmp_path):
    host = inlay.attach(base("falcon-rw")).add("a", small("lora"), seed=0)
    way, notice = choose(host, "a", settings(tmp_path), 0, ROWS)
    assert isinstance(way, Plain) and "padded, not packed" in notice and "ALiBi" in notice
    capped = hf.Gemma2Config(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.5, **GQA)
    model = hf.AutoModelForCausalLM.from_config(capped)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    host = inlay.attach(model).add("a", small("lora"), seed=0)
    way, notice = choose(host, "a", settings(tmp_path), 0, ROWS)
    assert isinstance(way, Plain) and "behind the head" in notice
    host = inlay.attach(base("llama")).add("a", small("lora"), seed=0)
    assert isinstance(choose(host, "a", settings(tmp_path), 0, ROWS)[0], Packed)
    assert isinstance(choose(host, "a", settings(tmp_path, engine="plain"), 0, ROWS)[0], Plain)


def test_the_model_is_left_as_it_was_found():
    host = dressed("llama")
    before = host.model.config._attn_implementation, [vars(m).keys() for m in host.model.modules()]
    with pytest.raises(RuntimeError, match="stop"), Packed(host, 0, 9).active():
        raise RuntimeError("stop")
    assert before == (host.model.config._attn_implementation, [vars(m).keys() for m in host.model.modules()])
    from transformers import AttentionInterface

    assert not [n for n in AttentionInterface()._global_mapping if n.startswith("inlay")]


# ---- parts -----------------------------------------------------------------------------------------------------------
def test_packs_fill_up():
    made = packs(rows(30, 50, 20, 70, 10), 80)
    assert sorted(len(r.input_ids) for p in made for r in p) == [10, 20, 30, 50, 70]
    assert sorted(sum(len(r.input_ids) for r in p) for p in made) == [20, 80, 80]
    assert [len(p) for p in packs(rows(30, 50), 10)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy(dtype, bias, monkeypatch):
    monkeypatch.setattr("inlay.engine.loss.PRODUCT", 97 * 5)
    monkeypatch.setattr("inlay.engine.loss.NEAR", 97 * 2)
    torch.manual_seed(0)
    h, W, b = torch.randn(23, 16, dtype=dtype), torch.randn(97, 16, dtype=dtype), torch.randn(97, dtype=dtype)
    target = torch.randint(97, (23,))
    one, two = h.clone().requires_grad_(), h.clone().requires_grad_()
    want = F.cross_entropy(F.linear(one, W, b if bias else None).float(), target, reduction="sum")
    got = linear_cross_entropy(two, W, b if bias else None, target)
    (3 * want).backward()
    (3 * got).backward()
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert got.item() == pytest.approx(want.item(), rel=near)
    torch.testing.assert_close(two.grad, one.grad, rtol=near, atol=near * 30)
    far = linear_cross_entropy(1e4 * h.float(), W.float(), None, target)
    assert far.isfinite(), "a probability of zero has a finite logarithm"


def test_fast_linears_are_the_same_function():
    torch.manual_seed(0)
    x, W, b = torch.randn(2, 7, 16, requires_grad=True), torch.randn(24, 16), torch.randn(24)
    (dx,) = torch.autograd.grad(F.linear(x, W, b).square().sum(), x)
    y = FrozenLinear.apply(x, W, b)
    torch.testing.assert_close(y, F.linear(x, W, b))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], dx)
    model = base("gpt2")
    with torch.no_grad():
        want = model(torch.tensor([[4, 5, 6]])).logits
        with fast_linears(model):
            torch.testing.assert_close(model(torch.tensor([[4, 5, 6]])).logits, want, rtol=1e-4, atol=1e-4)


# ---- work done, counted: what must not creep back in -----------------------------------------------------------------
def test_counted_work():
    """Tokens through the blocks and the head, and blocks that are back-propagated."""
    host = inlay.attach(hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, "num_hidden_layers": 4})))
    host.add("a", small("lora"), at="q,v@2-3", seed=0)
    seen: dict[str, int] = {"block": 0, "head": 0, "backward": 0}

    def count(what, tokens):
        seen[what] += tokens

    for block in host.model.model.layers:
        block.register_forward_pre_hook(lambda m, args: count("block", args[0].shape[:-1].numel()))
        block.mlp.down_proj.register_full_backward_hook(lambda *_: count("backward", 1))
    h = host.model.lm_head.register_forward_pre_hook(lambda m, args: count("head", args[0].shape[:-1].numel()))
    with host.using("a"):
        way = Packed(host, 0, 1000)
        with way.active():
            way.loss(ROWS).backward()
    h.remove()
    learned = sum(label != -100 for r in ROWS for label in r.labels[1:])
    tokens = sum(len(r.input_ids) for r in ROWS)
    assert seen["block"] == 4 * tokens, "no padding"
    assert learned <= seen["head"] <= 2 * learned, "a hooked head is called once forward and once again in backward"
    assert seen["backward"] == 2, "nothing below the lowest adapted block"


def test_adapters_of_the_head_find_their_sequences():
    """Several in one pack: each sequence's loss, and each adapter's gradient, are those of its own."""
    host = inlay.attach(base("llama"))
    for name in ("a", "b"):
        host.add(name, small("lora"), at="v,head", seed=ord(name))
    excite(host)
    with Packed(host, 0, 100).active():
        alone = []
        for row, name in zip(ROWS[:3], ("a", None, "b"), strict=True):
            with host.using(name):
                alone.append(head.loss_sum(host, pack(host, [row.input_ids], [row.labels])))
        torch.stack([alone[0], alone[2]]).sum().backward()
        want = {n: {k: t.grad.clone() for k, t in host.tensors(n).items()} for n in "ab"}
        for p in host.parameters():
            p.grad = None
        with host.using("a", None, "b"):
            made = pack(host, [r.input_ids for r in ROWS[:3]], [r.labels for r in ROWS[:3]])
            loss = head.loss_sum(host, made)
            loss.backward()
            with torch.no_grad():
                assert -head.log_likelihood(host, made).sum().item() == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(sum(x.item() for x in alone), rel=1e-5)
    for name in "ab":
        for key, t in host.tensors(name).items():
            torch.testing.assert_close(t.grad, want[name][key], rtol=1e-3, atol=1e-4)
