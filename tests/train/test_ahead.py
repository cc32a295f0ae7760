"""Tokenising goes on while the base is loaded, in the same order and to the same examples."""

import threading

import pytest

from inlay.core.errors import InlayError
from inlay.models import base
from inlay.tasks import encode_all, protocols
from inlay.train import run
from inlay.train.ahead import Ahead
from inlay.train.settings import DataSettings, RunSettings, TrainSettings


def settings(tmp_path, model="tiny-llama"):
    data = DataSettings(task="world-addsub", protocol="clean", limit=20, val_size=4)
    return TrainSettings(model=model, method="lora", out=tmp_path, data=data, run=RunSettings(progress=False))


def test_examples_are_those_of_tokenising_in_the_foreground(tmp_path):
    s = settings(tmp_path)
    lesson = run.records(s, False)(None, None)
    tokenizer, protocol = base.load_tokenizer(s.model), protocols.get("clean")
    for got, records in zip((lesson.examples, lesson.val_examples), run.read(s.data, s.run.seed), strict=True):
        assert got == encode_all(records, tokenizer, protocol, s.data.cutoff)[0] and len(got) == len(records) > 0


def test_it_has_begun_before_the_base_is_loaded(tmp_path, monkeypatch):
    tokenised = threading.Event()

    class Telling(Ahead):
        def _work(self, prepare):
            super()._work(prepare)
            tokenised.set()

    def load(*args):
        assert tokenised.wait(30)
        raise InlayError("seen")

    monkeypatch.setattr(run, "Ahead", Telling)
    monkeypatch.setattr(base, "load_base", load)
    with pytest.raises(InlayError, match="seen"):
        run.train(settings(tmp_path))


def test_what_goes_wrong_is_raised_where_the_examples_are_asked_for(tmp_path):
    ahead = Ahead([1, 0, 2], lambda: lambda n: 1 / n)
    for progress in (False, True):
        with pytest.raises(ZeroDivisionError):
            ahead.get("dividing", progress)
    with pytest.raises(InlayError, match="cannot load the base"):
        run.train(settings(tmp_path, model="nowhere"))
