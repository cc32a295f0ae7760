"""SLiCK categories: the paper's table, and estimates that do not depend on the batch."""

from __future__ import annotations

import dataclasses

import pytest

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings
from inlay.knowledge.slick import CATEGORIES, Known, SlickSettings, few_shot, shares, shifts, slick
from inlay.knowledge.wording import Wording, answer_of, exact
from tests.evaluate.tiny import base, tokenizer

TOK = tokenizer()
ITEMS = [Item(f"i{n}", f"{n}?", f"t{n}", relation=f"r{n % 2}") for n in range(8)]
HOW = SlickSettings(
    prompts=3,
    shots=2,
    samples=4,
    measure=MeasureSettings(max_new_tokens=2, wording=Wording(stop=("\n",)), batch_size=5),
)


@pytest.mark.parametrize(
    ("greedy", "sampled", "category"),
    [
        (1.0, 0.2, "HighlyKnown"),
        (1.0, 0.0, "HighlyKnown"),
        (0.9, 1.0, "MaybeKnown"),
        (0.1, 0.0, "MaybeKnown"),
        (0.0, 1 / 160, "WeaklyKnown"),
        (0.0, 0.0, "Unknown"),
    ],
)
def test_the_four_categories(greedy, sampled, category):
    assert Known("a", greedy, sampled).category == category


def test_prompts_are_examples_of_the_same_relation_without_the_item_itself():
    made = few_shot(ITEMS[2], ITEMS, HOW, TOK)
    assert len(made) == 3 == len(set(made)) and made == few_shot(ITEMS[2], ITEMS[::-1][::-1], HOW, TOK)
    for text in made:
        *shown, asked = text.split("\n")
        assert asked == "2?" and len(shown) == 2 and len(set(shown)) == 2
        assert {s.split("? ")[0] for s in shown} <= {"0", "4", "6"}
        assert all(s.split("? ")[1] == f"t{s[0]}" for s in shown)


def test_estimates_are_shares_of_right_answers():
    host = inlay.attach(base("llama"))
    prompts = [few_shot(i, ITEMS, HOW, TOK) for i in ITEMS]
    greedy = GenerateSettings(max_new_tokens=2, stop=("\n",))
    said = [[answer_of(g.text) for g in generate(host, TOK, own, None, greedy)] for own in prompts]
    assert all(said[0])
    # What the base says to the first prompt becomes the right answer; the examples stay as they are.
    items = [dataclasses.replace(i, aliases=(own[0],)) for i, own in zip(ITEMS, said, strict=True)]
    found = slick(host, TOK, items, HOW)
    want = [sum(exact(a, i) for a in own) / 3 for i, own in zip(items, said, strict=True)]
    assert [k.greedy for k in found] == want and all(w >= 1 / 3 for w in want)
    assert any(0 < k.sampled < 1 for k in found) and {round(12 * k.sampled, 9) % 1 for k in found} == {0}
    assert all(k.category in ("HighlyKnown", "MaybeKnown") for k in found)


def test_neither_batch_nor_company_changes_an_estimate(monkeypatch):
    import inlay.knowledge.slick as module

    host = inlay.attach(base("llama"))
    said = generate(
        host, TOK, [few_shot(i, ITEMS, HOW, TOK)[0] for i in ITEMS], None, GenerateSettings(max_new_tokens=2)
    )
    items = [dataclasses.replace(i, aliases=(answer_of(g.text) or "x",)) for i, g in zip(ITEMS, said, strict=True)]
    whole = slick(host, TOK, items, HOW)
    monkeypatch.setattr(module, "AT_A_TIME", 7)
    one_by_one = dataclasses.replace(HOW, measure=dataclasses.replace(HOW.measure, batch_size=1))
    assert slick(host, TOK, items, one_by_one) == whole
    assert slick(host, TOK, items[3:5], HOW, pool=items) == whole[3:5]
    assert slick(host, TOK, items, dataclasses.replace(HOW, seed=1)) != whole


def test_shares_and_shifts():
    before = [Known("a", 1, 1), Known("b", 0, 0), Known("c", 0, 0)]
    after = [Known("a", 0.5, 1), Known("b", 1, 1), Known("c", 0, 0)]
    assert shares(before) == {"HighlyKnown": 1 / 3, "MaybeKnown": 0, "WeaklyKnown": 0, "Unknown": 2 / 3}
    moved = {k: n for k, n in shifts(before, after).items() if n}
    assert moved == {("HighlyKnown", "MaybeKnown"): 1, ("Unknown", "HighlyKnown"): 1, ("Unknown", "Unknown"): 1}
    assert set(shares([])) == set(CATEGORIES)


def test_mistakes_are_told():
    with pytest.raises(InlayError, match="2 examples are wanted and relation 'r1' has 1"):
        slick(inlay.attach(base("llama")), TOK, [ITEMS[1], ITEMS[3]], HOW)
    with pytest.raises(InlayError, match="samples must be at least 1"):
        SlickSettings(samples=0)
    with pytest.raises(InlayError, match="same items"):
        shifts([Known("a", 1, 1)], [Known("b", 1, 1)])
