"""Measuring: the greedy answer of the bare base, kept under a key of all that made it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.core.store import content_digest
from inlay.evaluate import GenerateSettings, generate
from inlay.knowledge.distance import distance
from inlay.knowledge.feature import Space, features
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, base_digest, measure, table_key
from inlay.knowledge.table import Table
from inlay.knowledge.wording import Wording, answer_of, examples
from inlay.train import fit
from tests.evaluate.tiny import base, host, tokenizer

TOK = tokenizer()
ITEMS = [Item(f"i{n}", f"Item {n} is{' so' * (n % 3)}", f"t{n}", relation=f"r{n % 2}") for n in range(7)]
SETTINGS = MeasureSettings(max_new_tokens=6)


def same(a: Table, b: Table) -> bool:
    return a.rows.keys() == b.rows.keys() and all(np.array_equal(a[k], b[k]) for k in a.rows)


def test_a_row_is_the_greedy_answer_and_its_distance():
    h = inlay.attach(base("llama"))
    table = measure(h, TOK, ITEMS, SETTINGS)
    how = GenerateSettings(max_new_tokens=6, stop=("\n",))
    said = [answer_of(g.text) for g in generate(h, TOK, [i.prompt for i in ITEMS], None, how)]
    assert table["answer0"].tolist() == said
    z = features(h, TOK, [i.prompt for i in ITEMS], said)
    t = features(h, TOK, [i.prompt for i in ITEMS], [i.target for i in ITEMS])
    assert np.array_equal(table["tsd"], distance(z, t).numpy())
    assert np.array_equal(table["features"], t.numpy()) and np.array_equal(table["answer_features"], z.numpy())
    assert table["n_tokens"].tolist() == [3] * 7 and not table["em0"].any()


def test_the_answer_itself_as_target_is_at_distance_0_and_right():
    h = inlay.attach(base("llama"))
    said = measure(h, TOK, ITEMS, SETTINGS)["answer0"]
    assert all(s.strip() for s in said)
    known = [dataclasses.replace(i, target=s) for i, s in zip(ITEMS, said, strict=True)]
    table = measure(h, TOK, known, SETTINGS)
    assert table["em0"].all() and not table["tsd"].any() and not table["tie"].any()
    other = [dataclasses.replace(i, aliases=(s,)) for i, s in zip(ITEMS, said, strict=True)]
    assert not measure(h, TOK, other, SETTINGS)["tsd"].any()  # the nearest alias counts


def test_no_answer_is_flagged_and_at_distance_1():
    h = inlay.attach(base("llama"))
    first = {generate(h, TOK, [i.prompt], None, GenerateSettings(max_new_tokens=1))[0].text for i in ITEMS}
    table = measure(h, TOK, ITEMS, dataclasses.replace(SETTINGS, wording=Wording(stop=tuple(first))))
    assert table["empty"].all() and (table["tsd"] == 1).all() and set(table["answer0"]) == {""}


def test_words_in_another_order_tie_without_matching():
    h = inlay.attach(base("llama"))
    (item,) = ITEMS[:1]
    said = measure(h, TOK, [item], SETTINGS)["answer0"][0]
    mixed = dataclasses.replace(item, target=said[::-1])
    table = measure(h, TOK, [mixed], dataclasses.replace(SETTINGS, wording=Wording(lead="")))
    assert said != said[::-1] and table["tie"].all() and not table["em0"].any() and table["tsd"][0] <= 1e-6


@pytest.mark.parametrize("space", [Space(), Space("hidden:1"), Space("hidden:-1", "last", True)])
def test_a_table_does_not_see_adapters_nor_their_training(space, tmp_path):  # check 4
    from tests.train.tiny import settings as train_settings

    how = dataclasses.replace(SETTINGS, space=space)
    bare = inlay.attach(base("llama"))
    weights = content_digest(dict(bare.model.named_parameters()))
    before, key = measure(bare, TOK, ITEMS, how), table_key(bare, TOK, ITEMS, how)
    bare.add("a", inlay.method("lora").make(rank=4), at="q,v", seed=0)
    rows = examples(ITEMS, TOK)
    fit(bare, "a", rows, [], train_settings(tmp_path / "run", steps=3), tmp_path / "run", TOK)
    assert bare.use("a") and same(measure(bare, TOK, ITEMS, how), before)
    assert table_key(bare, TOK, ITEMS, how) == key
    bare.use(None)
    assert same(measure(bare, TOK, ITEMS, how), before)
    assert content_digest(dict(bare.detach().named_parameters())) == weights


def test_what_is_saved_is_read_back(tmp_path):
    table = measure(inlay.attach(base("llama")), TOK, ITEMS, dataclasses.replace(SETTINGS, space=Space(center=True)))
    back = Table.load(table.save(tmp_path / "table"))
    assert same(table, back) and back.about == table.about
    assert {k: v.dtype for k, v in back.rows.items()} == {k: v.dtype for k, v in table.rows.items()}
    assert torch.equal(back.mean, table.mean)
    assert sorted(p.name for p in (tmp_path / "table").iterdir()) == ["table.json", "table.parquet"]
    assert len(table.only(table["relation"] == "r1")) == 3
    table.only([0, 1]).save(tmp_path / "table")
    assert len(Table.load(tmp_path / "table")) == 2


def test_no_folder_of_anything_else_is_written_over(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InlayError, match="thesis.txt"):
        measure(inlay.attach(base("llama")), TOK, ITEMS, SETTINGS).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_damage_and_absence_are_told(tmp_path):
    with pytest.raises(InlayError, match=r"table.parquet is missing"):
        Table.load(tmp_path)
    folder = measure(inlay.attach(base("llama")), TOK, ITEMS, SETTINGS).save(tmp_path / "t")
    (folder / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(InlayError, match="damaged"):
        Table.load(folder)
    about = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(InlayError, match="newer Inlay"):
        Table.load(folder)


def test_the_cache_answers_for_the_same_and_for_nothing_else(tmp_path, monkeypatch):
    import inlay.knowledge.measure as module

    asked = []
    real = module.generate_each
    monkeypatch.setattr(module, "generate_each", lambda *a, **k: asked.append(1) or real(*a, **k))
    h = inlay.attach(base("llama"))
    first = measure(h, TOK, ITEMS, SETTINGS, cache=tmp_path)
    wide = dataclasses.replace(SETTINGS, batch_size=2)
    assert same(measure(host("llama"), TOK, ITEMS, wide, cache=tmp_path), first) and len(asked) == 1
    measure(h, TOK, ITEMS[:3], SETTINGS, cache=tmp_path)
    measure(h, TOK, ITEMS, dataclasses.replace(SETTINGS, space=Space("hidden:1")), cache=tmp_path)
    measure(inlay.attach(base("llama", seed=1)), TOK, ITEMS, SETTINGS, cache=tmp_path)
    assert len(asked) == 4 and len(list(tmp_path.iterdir())) == 4


def test_a_digest_sees_each_weight_of_the_base():
    h = inlay.attach(base("llama"))
    before = base_digest(h)
    assert base_digest(host("llama")) == before
    h.model.get_input_embeddings().weight.data[17, 3] += 1e-3
    assert base_digest(h) != before


def test_mistakes_are_told():
    h = inlay.attach(base("llama"))
    with pytest.raises(InlayError, match="not predict"):
        MeasureSettings(space=Space("predict:1"))
    with pytest.raises(InlayError, match="no items"):
        measure(h, TOK, [])
    with pytest.raises(InlayError, match="share|two items have the id 'i0'"):
        measure(h, TOK, ITEMS[:1] * 2)
    with pytest.raises(InlayError, match="unknown column 'tds'"):
        measure(h, TOK, ITEMS, SETTINGS)["tds"]
