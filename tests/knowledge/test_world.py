"""The toy world: what is true in it, graded overlap, and a base that knows it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.pretrain import FAMILIES, MARKS, knows, make_base, world_of
from inlay.knowledge.world import GROUPS, QUESTIONS, VALUES, World, tokenizer, words

WORLD = World(3, people=40, strangers=10)


def test_a_world_is_a_function_of_its_seed():
    again = World(3, people=40, strangers=10)
    assert again.names == WORLD.names and again.facts == WORLD.facts and again.edits(12) == WORLD.edits(12)
    assert World(4, people=40, strangers=10).facts != WORLD.facts
    assert WORLD.edits(12, seed=1) != WORLD.edits(12)
    assert len(set(WORLD.names)) == 50 and len(WORLD.facts) == 120


def test_values_are_trees_whose_words_belong_to_one_place():
    every = [w for levels in VALUES.values() for level in levels for w in level]
    assert len(every) == len(set(every)) == 3 * 3 * 4
    assert len(set(WORLD.facts.values())) > 40 and all(len(v.split()) == 3 for v in WORLD.facts.values())


def test_edits_share_what_their_group_says_and_are_never_what_is_known():
    edits = WORLD.edits(40)
    assert Counter(map(WORLD.group, edits)) == dict.fromkeys(GROUPS, 10)
    assert len({i.id for i in edits}) == 40
    for item in edits:
        known, target = WORLD.facts[item.subject, item.relation].split(), item.target.split()
        alike = [a == b for a, b in zip(known, target, strict=True)]
        shared = {"overlap2": 2, "overlap1": 1}.get(WORLD.group(item), 0)
        assert alike == [True] * shared + [False] * (3 - shared)
        assert not set(known) & set(target[shared:])


def test_strangers_are_nobody_known_and_random_pairs_mean_nothing():
    new = WORLD.new_people(30)
    assert {i.subject for i in new} <= set(WORLD.names[40:]) and len({i.id for i in new}) == 30
    pairs = World(3).random_pairs(300)
    kinds = {w: kind for kind, levels in VALUES.items() for level in levels for w in level}
    of_one_kind = sum(len({kinds[w] for w in i.target.split()}) == 1 for i in pairs) / 300
    assert 0.04 < of_one_kind < 0.20  # 1/9 by chance


def test_retention_is_untouched_known_facts_half_of_the_same_people():
    edits = WORLD.edits(24)
    kept = WORLD.retention(edits, 20)
    met = {i.subject for i in edits}
    assert not {i.id for i in edits} & {i.id for i in kept} and len(kept) == len({i.id for i in kept}) == 20
    assert sum(i.subject in met for i in kept) == 10
    assert all(i.target == WORLD.facts[i.subject, i.relation] for i in kept)


def test_every_text_is_words_of_the_vocabulary_and_comes_back():
    tok = tokenizer()
    texts = [t for own in WORLD.biographies() for t in own]
    texts += [t for i in WORLD.known() for t in (i.prompt, *i.paraphrases, i.target)]
    for ids, text in zip(tok(texts)["input_ids"], texts, strict=True):
        assert tok.unk_token_id not in ids and tok.decode(ids) == text
    assert len(tok) == len(words()) == len(set(words()))
    assert {f"{m}_token_id": getattr(tok, f"{m}_token_id") for m in ("bos", "eos", "pad")} == MARKS


def test_wordings_differ_and_each_names_the_person():
    for name, kind in itertools.islice(WORLD.facts, 6):
        item = next(i for i in WORLD.known() if (i.subject, i.relation) == (name, kind))
        asked = {item.prompt, *item.paraphrases}
        assert len(asked) == len(QUESTIONS[kind]) == 3 and all(name in q for q in asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_learns_a_small_world_and_is_made_once(family, tmp_path, monkeypatch):
    import inlay
    from inlay.knowledge import pretrain

    monkeypatch.setattr(pretrain, "ROWS", 16)

    small = World(0, people=2, strangers=1)
    folder = make_base(family, 0, tmp_path / "base", world=small, steps=100)
    before = (folder / "model.safetensors").read_bytes()
    assert make_base(family, 0, tmp_path / "base", world=small, steps=100) == folder
    assert (folder / "model.safetensors").read_bytes() == before
    model, tok = inlay.load_base(folder, device="cpu")
    assert world_of(folder) == small and min(knows(model, small)) >= 0.99
    assert tok(small.known()[0].prompt)["input_ids"][0] != tok.unk_token_id
    with pytest.raises(InlayError, match="made otherwise"):
        make_base(family, 1, tmp_path / "base", world=small, steps=100)


def test_bases_are_the_same_for_the_same_seed(tmp_path):
    small = World(0, people=2)
    made = [make_base("llama", s, tmp_path / n, world=small, steps=3) for n, s in (("a", 0), ("b", 0), ("c", 1))]
    one, two, three = ((f / "model.safetensors").read_bytes() for f in made)
    assert one == two != three


def test_mistakes_are_told(tmp_path):
    with pytest.raises(InlayError, match="bloom, gptj, llama"):
        make_base("gpt5")
    with pytest.raises(InlayError, match="choose another folder"):
        make_base("llama", 0, tmp_path)
    with pytest.raises(InlayError, match="900 people"):
        World(0, people=900)
    with pytest.raises(InlayError, match="50 items of 30"):
        WORLD.new_people(50)
    with pytest.raises(InlayError, match=r"no world.json"):
        world_of(tmp_path)
