"""Loaders, on small files of the sets' own schemas. The rows are made up; only their form is the sets'."""

from __future__ import annotations

import json

import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.items import Item
from inlay.knowledge.loaders import load_items

POPQA = {
    "id": 41, "subj": "Ann Example", "prop": "occupation", "obj": "smith", "subj_id": 1, "prop_id": 22, "obj_id": 3,
    "s_aliases": "[\"A. Example\"]", "o_aliases": "[\"blacksmith\"]", "s_uri": "u", "o_uri": "v",
    "s_wiki_title": "Ann Example", "o_wiki_title": "Smith", "s_pop": 7, "o_pop": 9,
    "question": "What is Ann Example's occupation?", "possible_answers": "[\"smith\", \"blacksmith\"]",
}  # fmt: skip
ZSRE = {
    "subject": "Castle X", "src": "Who built Castle X?", "pred": "Tom", "rephrase": "By whom was Castle X built?",
    "alt": "Ada", "answers": ["Tom"], "loc": "nq question: when does it rain", "loc_ans": "in spring",
    "cond": "Tom >> Ada || Who built Castle X?",
}  # fmt: skip
KNOWEDIT = {
    "subject": "Castle X", "prompt": "Who built Castle X?", "target_new": "Ada", "ground_truth": ["Tom"],
    "rephrase_prompt": "By whom was Castle X built?", "portability": {},
    "locality": {"Relation_Specificity": [{"prompt": "Castle X stands in", "ground_truth": [["Wales"]]}]},
}  # fmt: skip
COUNTERFACT = {
    "case_id": 5, "pararel_idx": 77,
    "requested_rewrite": {
        "prompt": "{} was born in", "relation_id": "P19", "subject": "Zed",
        "target_new": {"str": "Oslo", "id": "Q585"}, "target_true": {"str": "Rome", "id": "Q220"},
    },
    "paraphrase_prompts": ["It rained. Zed is a native of", "Zed comes from"],
    "neighborhood_prompts": ["Yan was born in", "Wim was born in"],
    "attribute_prompts": ["Nils was born in"], "generation_prompts": ["Zed grew up"],
}  # fmt: skip


def write(path, rows, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows))
    return path


def test_popqa_has_a_list_of_answers_written_as_text(tmp_path):
    want = Item("popqa-41", POPQA["question"], "smith", ("blacksmith",), "occupation", "Ann Example", split="test")
    assert load_items("popqa", write(tmp_path / "p.jsonl", [POPQA], lines=True)) == [want]
    quoted = {**POPQA, "possible_answers": "['smith', 'blacksmith']"}
    assert load_items("PopQA", write(tmp_path / "p.json", [quoted])) == [want]
    fields = list(POPQA)
    cells = ['"' + str(POPQA[f]).replace('"', '""') + '"' for f in fields]
    (tmp_path / "test.tsv").write_text("\t".join(fields) + "\n" + "\t".join(cells) + "\n")
    assert load_items("popqa", tmp_path / "test.tsv") == [want]


def test_popqa_from_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([POPQA]), tmp_path / "p.parquet")
    assert load_items("popqa", tmp_path / "p.parquet")[0].aliases == ("blacksmith",)


def test_entityquestions_is_a_folder_with_a_file_per_relation(tmp_path):
    rows = [{"question": "Where was A born?", "answers": ["Ulm", "Ulm, Germany"]}]
    write(tmp_path / "dataset" / "test" / "P19.test.json", rows)
    write(
        tmp_path / "dataset" / "test" / "P17.test.jsonl", [{"question": "Land of B?", "answers": ["Peru"]}], lines=True
    )
    write(tmp_path / "dataset" / "dev" / "P19.dev.json", [{"question": "Where was C born?", "answers": ["Bonn"]}])
    items = load_items("entityquestions", tmp_path)
    assert [(i.relation, i.target, i.aliases) for i in items] == [
        ("P17", "Peru", ()),
        ("P19", "Ulm", ("Ulm, Germany",)),
    ]
    assert len({i.id for i in items}) == 2
    (dev,) = load_items("entityquestions", tmp_path, "val")
    assert (dev.target, dev.split) == ("Bonn", "val")
    with pytest.raises(InlayError, match="no files of split 'train'"):
        load_items("entityquestions", tmp_path, "train")


@pytest.mark.parametrize("row", [ZSRE, KNOWEDIT])
def test_zsre_in_both_forms(tmp_path, row):
    (item,) = load_items("zsre", write(tmp_path / "z.json", [row]))
    assert (item.prompt, item.target, item.subject) == ("Who built Castle X?", "Ada", "Castle X")
    assert item.paraphrases == ("By whom was Castle X built?",)
    (kept,) = load_items("zsre", tmp_path / "z.json", retention=True)
    want = ("when does it rain", "in spring") if row is ZSRE else ("Castle X stands in", "Wales")
    assert (kept.prompt, kept.target) == want


def test_counterfact_teaches_the_new_object_and_keeps_the_neighbours(tmp_path):
    (item,) = load_items("counterfact", write(tmp_path / "c.json", [COUNTERFACT]))
    assert (item.id, item.prompt, item.target, item.relation) == ("counterfact-5", "Zed was born in", "Oslo", "P19")
    assert item.paraphrases == ("It rained. Zed is a native of", "Zed comes from")
    kept = load_items("counterfact", tmp_path / "c.json", retention=True)
    assert [(k.prompt, k.target) for k in kept] == [("Yan was born in", "Rome"), ("Wim was born in", "Rome")]


def test_a_limit_draws_rows_with_the_seed(tmp_path):
    rows = [{**POPQA, "id": n} for n in range(20)]
    file = write(tmp_path / "p.json", rows)
    some = [load_items("popqa", file, limit=5, seed=s) for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and all(len(s) == 5 for s in some)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(InlayError, match="counterfact, entityquestions, popqa, zsre"):
        load_items("trivia")
    with pytest.raises(InlayError, match="no file or folder"):
        load_items("popqa", tmp_path / "none")
    with pytest.raises(InlayError, match=r"row 0: no row of PopQA \(KeyError: 'obj'\)"):
        load_items("popqa", write(tmp_path / "z.json", [ZSRE]))
    with pytest.raises(InlayError, match="names no facts to keep"):
        load_items("popqa", tmp_path / "z.json", retention=True)
    with pytest.raises(InlayError, match="not on the Hub in full.*princeton-nlp"):
        load_items("entityquestions")
    with pytest.raises(InlayError, match="on the Hub it has test"):
        load_items("popqa", split="train")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InlayError, match="end in .json"):
        load_items("popqa", tmp_path / "x.txt")


def test_the_hub_is_asked_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return [COUNTERFACT] if "counterfact" in args[0] else [KNOWEDIT]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_items("counterfact", split="train")[0].split == "train"
    assert load_items("zsre")[0].target == "Ada"
    assert asked[0] == (("azhx/counterfact",), {"split": "train"})
    assert asked[1][1]["data_files"].startswith("hf://datasets/zjunlp/KnowEdit/")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(InlayError, match="cannot load akariasai/PopQA: OSError: offline"):
        load_items("popqa")
