"""The soft present answer: what a model expects to say, read along what it says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.knowledge.distance import distance
from inlay.knowledge.exam import Exam
from inlay.knowledge.feature import Space, embeddings, expected, features
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, measure
from inlay.knowledge.table import Table
from inlay.knowledge.track import Tracker, TrackSettings, read_watched
from inlay.knowledge.wording import examples
from inlay.train import fit
from tests.evaluate.tiny import base, tokenizer
from tests.knowledge import bigram
from tests.train.tiny import settings as train_settings

TOK = tokenizer()
PROMPTS = ["Where?", "Who wrote it, and when did they?", "b", "c"]
ANSWERS = ["x", "abc", "seven x", ""]
SOFT = MeasureSettings(max_new_tokens=4, present="soft")
HARD = dataclasses.replace(SOFT, present="greedy")


def certain(model):
    """The same model, but all probability on its likeliest token."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    return model


def test_a_certain_model_expects_what_it_says():
    host = inlay.attach(certain(bigram.base()))
    items = [Item(f"i{n}", p, "b") for n, p in enumerate(("q:", "which?:", "and who is it:"))]
    hard, soft = (measure(host, TOK, items, how) for how in (HARD, SOFT))
    assert hard["answer0"].tolist() == soft["answer0"].tolist() == ["a"] * 3
    assert np.allclose(soft["answer_features"], hard["answer_features"], atol=1e-5)
    assert soft["tsd"] == pytest.approx(hard["tsd"], abs=1e-5) and hard["tsd"].min() > 0.1


def test_an_uncertain_model_expects_the_mean_under_its_probabilities():
    host = inlay.attach(base("llama"))
    (z,) = expected(host, TOK, ["Where?"], ["ab"])
    ids, tail = TOK("Where?")["input_ids"], TOK(" ab")["input_ids"]
    with torch.no_grad():
        logits = host.model(torch.tensor([ids + tail])).logits[0]
    p = logits[len(ids) - 1 : -1].softmax(-1)
    assert torch.allclose(z, (p @ embeddings(host)).mean(0), atol=1e-6)
    (last,) = expected(host, TOK, ["Where?"], ["ab"], Space(pool="last"))
    assert torch.allclose(last, p[-1] @ embeddings(host), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_a_batch_equals_one_by_one(family):
    host = inlay.attach(base(family))
    z = expected(host, TOK, PROMPTS, ANSWERS)
    alone = torch.cat([expected(host, TOK, [p], [a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert z.dtype == torch.float32 and not z[-1].any() and distance(z, alone)[:-1].max() <= 1e-6


def test_the_adapter_is_read_and_its_embeddings_are_not():
    host = inlay.attach(base("llama"))
    bare = expected(host, TOK, PROMPTS, ANSWERS)
    host.add("a", inlay.method("lora").make(rank=4), at="q,v,down", seed=5)
    with torch.no_grad():
        for t in host.tensors("a").values():
            t.normal_()
    with host.using("a"):
        assert torch.equal(expected(host, TOK, PROMPTS, ANSWERS), bare)
    assert not torch.allclose(expected(host, TOK, PROMPTS, ANSWERS, plan="a"), bare, atol=1e-3)


def test_exact_match_stays_that_of_the_free_running_answer_and_the_two_have_keys_of_their_own(tmp_path):
    host = inlay.attach(bigram.base())
    items = [Item("i", "q:", "a"), Item("j", "r:", "b")]
    hard, soft = (measure(host, TOK, items, how, cache=tmp_path) for how in (HARD, SOFT))
    assert soft["em0"].tolist() == hard["em0"].tolist() == [True, False]
    assert hard["tsd"][0] == 0 < soft["tsd"][0] and soft.about["key"] != hard.about["key"]
    again = Table.load(soft.save(tmp_path / "t"))
    assert again.about["settings"]["present"] == "soft"


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_a_watched_run_reads_the_adapter_at_its_snapshots(tmp_path, engine):
    host = inlay.attach(base("llama")).add("a", inlay.method("lora").make(rank=4), at="q,v,down", seed=5)
    items = [Item(f"i{n}", f"Item {n} is", f"t{n}", relation="r") for n in range(5)]
    watch = Tracker(TOK, items, (), TrackSettings(measure=SOFT, at=(2, 6), probes=0))
    settings = train_settings(tmp_path, steps=6, lr=2e-2, engine=engine)
    fit(host, "a", examples(items, TOK), [], settings, tmp_path, TOK, observers=[watch])
    found = read_watched(tmp_path)
    first, last = found.snapshots[0], found.snapshots[-1]
    assert first["distance"] == found.table["tsd"].tolist() and set(first["state"]) <= {"stalled", "learned"}
    exam = Exam(host, TOK, items, SOFT)
    z = exam.features(last["answers"], plan="a")
    assert np.allclose(last["features"], z, atol=1e-5) and last["distance"] == pytest.approx(
        exam.distance_of(z), abs=1e-5
    )
    assert not np.allclose(z, exam.features(last["answers"]), atol=1e-3)  # the bare base expects something else


def test_soft_features_are_dealt_as_they_are():
    host = inlay.attach(base("llama"))
    items = [Item(f"i{n}", f"Item {n} is", f"t{n}") for n in range(4)]
    exam = Exam(host, TOK, items, SOFT)
    z = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    to, of = np.array([0, 1, 2, 3, 0]), np.array([3, 2, 1, 0, 0])
    d, em = exam.recompute(["a", "a", "t0", "t1"], z)(to, of)
    want = [float(distance(torch.tensor(z[j]), exam.targets.target[i])) for i, j in zip(to, of, strict=True)]
    assert d == pytest.approx(want) and em.tolist() == [False, False, False, False, False]


def test_what_has_no_soft_answer_is_refused():
    with pytest.raises(InlayError, match="use space embed"):
        MeasureSettings(present="soft", space=Space("hidden:1"))
    with pytest.raises(InlayError, match="present"):
        MeasureSettings(present="hard")  # type: ignore[arg-type]
    assert np.isclose(SOFT.tau, 0.01) and HARD.tau == 1e-6
    assert features(base("llama"), TOK, ["p"], ["abc"]).shape == (1, 32)
