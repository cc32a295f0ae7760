"""Beginnings that examples share are computed once, and nothing but time changes."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay.compat.transformers import has_attention_interface
from inlay.engine import shared
from inlay.engine.example import IGNORED
from inlay.engine.pack import packs, takes_positions
from inlay.engine.trainer import packed_forward
from inlay.train.ways import Packed, Plain, choose
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.engine.test_packed import Row
from tests.laws.zoo import FAMILIES, base, dressed, excite, methods, small
from tests.train.tiny import settings

TEMPLATE = [5, 6, 7, 8, 9, 10, 11, 12, 13]
ASKED = [40, 41, 42, 43, 44, 45, 46, 47, 48]


def row(*parts: list[int], answer: list[int]) -> Row:
    prompt = [t for p in parts for t in p]
    return Row(prompt + answer, [IGNORED] * len(prompt) + answer)


ROWS = [
    row(TEMPLATE, ASKED, [50, 51], answer=[60, 61, 62]),
    row(TEMPLATE, [70, 71, 72], answer=[63]),
    row([30, 31, 32], answer=[64, 65]),
    row(TEMPLATE, ASKED, [52, 53, 54], answer=[66, 67]),
    row(TEMPLATE, ASKED, answer=[68, 69]),
    row(TEMPLATE, ASKED, answer=[70, 69]),
]
"""A template, within it a question that three ask; one example of its own; two differ in their answers alone."""
COMPUTED = 9 + 8 + (1 + 2 + 3) + (3 + 1) + (3 + 2) + (1 + 3 + 2) + 2 * (1 + 2)


def listed(examples) -> tuple[list, list]:
    return [e.input_ids for e in examples], [e.labels for e in examples]


def grown(examples) -> shared.Sequences:
    return shared.tree(*listed(examples))


def tokens(examples) -> int:
    return sum(len(e.input_ids) for e in examples)


def test_each_beginning_stands_once():
    made = grown(ROWS)
    assert made.ids[:2] == [TEMPLATE, ASKED[:-1]] and made.parents[:2] == [None, 0]
    assert made.parents[2:] == [1, 0, None, 1, 1, 1]
    assert made.tokens == COMPUTED < tokens(ROWS)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(3, 4), min_size=1, max_size=40), st.lists(st.integers(3, 4), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_a_tree_holds_the_examples(pairs):
    examples = [row(prompt, answer=answer) for prompt, answer in pairs]
    made = grown(examples)
    beginnings = len(made.ids) - len(examples)
    for i, e in enumerate(examples):
        ids, labels, at = [], [], beginnings + i
        while at is not None:
            ids, labels = made.ids[at] + ids, made.labels[at] + labels
            at = made.parents[at]
        assert ids == e.input_ids and labels == e.labels
    assert all(
        len(b) >= shared.LEAST and set(o) == {IGNORED} for b, o in zip(made.ids, made.labels[:beginnings], strict=False)
    )
    assert all(
        own and (parent is None or own[0] == IGNORED) for own, parent in zip(made.labels, made.parents, strict=True)
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "falcon-rw"])
def test_losses_and_gradients_are_the_plain_ones(family):
    host = dressed(family)
    serves = has_attention_interface(host.model) and takes_positions(host.model)
    for name in methods(family):
        want, plain = gradients(host, name, Plain(host, 0, 2), ROWS)
        with host.using(name):
            assert bool(shared.refused(host)) == (not serves or any(host.edits[n].prompted for n in name.split("+")))
        for budget in (200, 26):
            got, packed = gradients(host, name, Packed(host, 0, budget), ROWS)
            assert got == pytest.approx(want, rel=1e-5), name
            assert_as_exact(packed, plain, exact_gradients(family, name, ROWS)[1], name)


def computed(way: Packed, examples) -> list[int]:
    """Tokens that each forward of a step passes through the first MLP."""
    seen = []
    first = way.host.model.get_submodule(next(s.path for s in way.host.anatomy.spots if s.role == "mlp"))
    hook = first.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2].numel()))
    with way.active():
        for part in way.split(examples):
            way.loss(part)
    hook.remove()
    return seen


def test_what_is_computed_once():
    host = dressed("llama")
    with host.using("lora"):
        assert computed(Packed(host, 0, 500), ROWS) == [COMPUTED]
        assert computed(Packed(host, 0, 500, share=False), ROWS) == [tokens(ROWS)]
    alike = [ROWS[0], ROWS[1], ROWS[3], ROWS[4]]
    assert shared.beginning(*listed(alike)) == len(TEMPLATE)
    assert len(packs(alike, 40, len(TEMPLATE))) < len(packs(alike, 40))
    assert all(grown(own).tokens <= 40 for own in packs(alike, 40, len(TEMPLATE)))


@pytest.mark.parametrize("packed_anew", [False, True])
def test_cached_activations_know_beginnings(packed_anew):
    """Examples are kept whole: other neighbours may share something else with them, or nothing."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="q,v@last1", seed=0)
    excite(host)
    want, plain = gradients(host, "a", Packed(host, 0, 300, share=False), ROWS)
    way = Packed(host, 0, 300)
    way.remember("a", ROWS, "ram")
    for turn in range(2):
        if packed_anew and turn:
            way.budget = 45
        with host.using("a"):
            blocks = computed(way, ROWS)
        assert bool(blocks) == (turn == 0)
        got, packed = gradients(host, "a", way, ROWS)
        assert got == pytest.approx(want, rel=1e-5)
        for key, g in plain.items():
            torch.testing.assert_close(packed[key], g, rtol=1e-3, atol=2e-5 * float(g.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long", [False, True])
def test_long_and_short_beginnings(dtype, long):
    """Queries are asked again behind a short beginning, masked behind a long one; 16 bits have a node of their own."""
    host = inlay.attach(base("llama").to(dtype)).add("a", small("lora"), seed=0)
    excite(host)
    asked = TEMPLATE if not long else TEMPLATE * 3
    examples = [row(asked, [20 + i, 21 + i], answer=[60 + i, 70, 71][: 1 + 2 * (not long)]) for i in range(3)]
    want, plain = gradients(host, "a", Packed(host, 0, 300, share=False), examples)
    got, packed = gradients(host, "a", Packed(host, 0, 300), examples)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert got == pytest.approx(want, rel=near)
    for key, g in plain.items():
        torch.testing.assert_close(packed[key], g, rtol=10 * near, atol=near * float(g.abs().max()))


@pytest.mark.parametrize("method", ["lora", "series", "gated"])
def test_dropout_is_drawn_for_each_example(method):
    edit = {
        "lora": lambda: inlay.method("lora").make(rank=2, dropout=0.5),
        "series": lambda: inlay.method("series").make(size=2, dropout=0.5),
        "gated": lambda: inlay.method("gated").make(edit=inlay.method("lora").make(rank=2, dropout=0.5)),
    }[method]()
    host = inlay.attach(base("llama")).add("a", edit, seed=0)
    excite(host)
    host.model.train()
    with host.using("a"):
        assert "dropout is drawn" in shared.refused(host)
        assert computed(Packed(host, 0, 500), ROWS) == [tokens(ROWS)]
    host.model.eval()
    with host.using("a"):
        assert not shared.refused(host)


@pytest.mark.parametrize("name", methods("llama"))
def test_methods_say_whether_they_draw(name):
    """Who says no gives the same twice, also while the model trains."""
    host = inlay.attach(base("llama")).add("a", small(name), seed=0)
    excite(host)
    host.model.train()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad(), host.using("a"):
        twice = [host.model(ids).logits for _ in range(2)]
    assert host.edits["a"].draws or torch.equal(*twice)


def test_a_trial_decides(monkeypatch, tmp_path):
    """Where shared beginnings would change the loss, examples are packed without."""
    host = dressed("llama")
    assert choose(host, "lora", settings(tmp_path), 0, ROWS)[0].share
    assert not choose(host, "lora", settings(tmp_path, share_beginnings=False), 0, ROWS)[0].share
    tree = shared.tree

    def elsewhere(*given):
        made = tree(*given)
        made.ids = [[ids[0] + 1, *ids[1:]] for ids in made.ids]
        return made

    monkeypatch.setattr(shared, "tree", elsewhere)
    way, told = choose(host, "lora", settings(tmp_path), 0, ROWS)
    assert isinstance(way, Packed) and not way.share and way.narrow
    assert "computed for each of them: this model's loss would change from" in told and "last block" not in told


@pytest.mark.parametrize(("dropout", "once"), [(0.0, True), (0.5, False)])
@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_trainers_forwards_share_too(kind, dropout, once):
    """Also under PEFT, whose dropout is a module (LoRA) or a number in a table (LoHa)."""
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    made = {
        "lora": lambda: peft.LoraConfig(**given, lora_dropout=dropout, init_lora_weights=False),
        "loha": lambda: peft.LoHaConfig(**given, rank_dropout=dropout, init_weights=False),
    }[kind]()
    model = peft.get_peft_model(base("llama"), made).train()
    wide = max(len(r.input_ids) for r in ROWS)
    batch = {
        "input_ids": torch.tensor([r.input_ids + [0] * (wide - len(r.input_ids)) for r in ROWS]),
        "labels": torch.tensor([r.labels + [IGNORED] * (wide - len(r.labels)) for r in ROWS]),
        "attention_mask": torch.tensor([[1] * len(r.input_ids) + [0] * (wide - len(r.input_ids)) for r in ROWS]),
    }
    seen = []
    block = model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2].numel()))
    want = model.eval()(**batch).loss
    model.train()
    with packed_forward(model):
        got = model(**batch).loss
    assert seen[-1] == (COMPUTED if once else tokens(ROWS))
    if once:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_beginning_is_kept_once(dtype):
    """What ten more answers keep for backward does not depend on how long the beginning is."""
    host = inlay.attach(base("llama").to(dtype)).add("a", small("lora"), seed=0)
    excite(host)

    def kept(answers: int, asked: list[int]) -> int:
        way, found = Packed(host, 0, 2000), {}
        examples = [row(asked, [20 + i], answer=[60 + i, 70]) for i in range(answers)]

        def count(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with host.using("a"), way.active(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            alive = way.loss(examples)
        return sum(found.values()) if alive.requires_grad else 0

    short, long = (kept(20, TEMPLATE * n) - kept(10, TEMPLATE * n) for n in (5, 10))
    assert 0 < long < 1.2 * short
