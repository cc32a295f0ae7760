"""A step that fails: the rows at fault end with an error, and the others say what they would have said."""

from __future__ import annotations

import pytest

import inlay
from inlay.evaluate import GenerateSettings
from inlay.library.bank import Bank
from inlay.library.errors import BankError
from inlay.methods.bottleneck import Bottleneck
from inlay.methods.lora import LoRA
from inlay.serve.batcher import Batcher, Watch
from inlay.serve.blame import halves
from tests.evaluate import tiny
from tests.serve.test_batcher import alone, job


@pytest.fixture
def many(root):
    """A batcher with room for all rows at once, not yet started, and what its steps fed."""
    host = inlay.attach(tiny.base("llama"))
    host.model.generation_config.eos_token_id = None
    steps: list[int] = []
    watch = Watch(step=lambda rows, seconds: steps.append(rows))
    made = Batcher(host, tiny.tokenizer(eos_token=None), Bank(host, [root / "adapters"]), rows=12, watch=watch)
    made.start()
    yield made, steps
    made.stop(10)


def breaking(monkeypatch, edit, calls: int) -> None:
    """Let an edit fail from its n-th call on."""
    after, made = edit.after, []

    def fail(self, *args):
        made.append(1)
        if len(made) > calls:
            raise RuntimeError("a fault was put here")
        return after(self, *args)

    monkeypatch.setattr(edit, "after", fail)


@pytest.mark.parametrize("calls", [0, 6, 7, 9])  # in the first forward; between two decoding steps and within one
def test_one_faulty_adapter_ends_its_own_rows_only(many, reference, monkeypatch, calls):
    batcher, _ = many
    asked = [
        ("Why?", "lora"),
        ("a", "series"),
        ("b", "prefix"),
        ("once", "base"),
        ("Why?", "series"),
        ("c", "prompt+lora"),
    ]
    how = GenerateSettings(max_new_tokens=24)
    jobs = [job(batcher, prompt, model, how) for prompt, model in asked]
    breaking(monkeypatch, Bottleneck, calls)
    batcher.submit([j for j, _ in jobs])
    ends = [heard.rest()[-1] for _, heard in jobs]
    monkeypatch.undo()
    for (prompt, model), end in zip(asked, ends, strict=True):
        if model == "series":
            assert end.error.status == 500 and "a fault was put here" in str(end.error)
        else:
            assert end.result == alone(reference, prompt, None if model == "base" else model, how)
    assert batcher.jobs == 0 and all(not a.get("requests") for a in batcher.adapters.describe())
    with pytest.raises(BankError, match="a fault was put here"):
        job(batcher, "Why?", "series", how)
    batcher.call(lambda: batcher.adapters.load("series", replacing=True)).result(20)
    again, heard = job(batcher, "Why?", "series", how)
    batcher.submit([again])
    assert heard.rest()[-1].result == alone(reference, "Why?", "series", how)


def test_two_faulty_adapters_are_both_found(many, reference, monkeypatch):
    batcher, _ = many
    asked = [("Why?", m) for m in ("lora", "prompt", "series", "base", "prefix", "lora", "prompt", "series")]
    how = GenerateSettings(max_new_tokens=12)
    jobs = [job(batcher, prompt, model, how) for prompt, model in asked]
    breaking(monkeypatch, LoRA, 0)
    breaking(monkeypatch, Bottleneck, 0)
    batcher.submit([j for j, _ in jobs])
    ends = [heard.rest()[-1] for _, heard in jobs]
    monkeypatch.undo()
    assert [e.error is not None for e in ends] == [model in ("lora", "series") for _, model in asked]
    for (prompt, model), end in zip(asked, ends, strict=True):
        if end.error is None:
            assert end.result == alone(reference, prompt, None if model == "base" else model, how)


def broken(bank):
    return {a["name"] for a in bank.describe() if a["state"] == "broken"}


def test_a_faulty_adapter_is_tried_once_and_then_refused(many, monkeypatch):
    """Whoever waits, whoever has a lease already and whoever asks later hears so without another step."""
    batcher, steps = many
    bank = batcher.adapters
    breaking(monkeypatch, Bottleneck, 0)
    first, heard = job(batcher, "Why?", "series")
    late = [job(batcher, prompt, model) for prompt, model in (("a", "series"), ("b", "lora+series"))]
    batcher.submit([first])
    assert heard.rest()[-1].error.code == "model_failed"
    forwards = []
    hook = batcher.host.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    batcher.submit([j for j, _ in late])
    for _, told in late:
        error = told.rest()[-1].error
        assert (error.status, error.code, error.again) == (500, "adapter_broken", False) and "'series'" in str(error)
    for model in ("series", "prefix+series", "sum(0.5*series, lora)"):
        with pytest.raises(BankError, match="'series' cannot be served") as e:
            job(batcher, "Why?", model)
        assert e.value.kind == "broken"
    hook.remove()
    assert not forwards and steps == [0] and broken(bank) == {"series"} and bank.broken == 1
    assert bank.loaded == 1, "only lora stays in memory"


def test_rows_that_wait_for_a_slot_do_not_try_what_has_failed(root, monkeypatch):
    host = inlay.attach(tiny.base("llama"))
    batcher = Batcher(host, tiny.tokenizer(), Bank(host, [root / "adapters"]), rows=1, waiting=8)
    jobs = [job(batcher.start() if not i else batcher, prompt, "series") for i, prompt in enumerate("abcd")]
    forwards = []
    breaking(monkeypatch, Bottleneck, 0)
    host.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    batcher.submit([j for j, _ in jobs])
    codes = [heard.rest()[-1].error.code for _, heard in jobs]
    assert codes == ["model_failed", *["adapter_broken"] * 3]
    assert len(forwards) == 3, "the step, the adapter once more by itself, the bare base"
    batcher.stop(10)


def test_of_two_adapters_on_a_row_the_faulty_one_is_found(many, reference, monkeypatch):
    batcher, _ = many
    how = GenerateSettings(max_new_tokens=8)
    both, heard = job(batcher, "Why?", "lora+series+prefix", how)
    breaking(monkeypatch, Bottleneck, 4)
    batcher.submit([both])
    assert heard.rest()[-1].error.code == "model_failed" and broken(batcher.adapters) == {"series"}
    monkeypatch.undo()
    fine, heard = job(batcher, "Why?", "prefix+lora", how)
    batcher.submit([fine])
    assert heard.rest()[-1].result == alone(reference, "Why?", "lora+prefix", how)


def test_adapters_that_fail_only_together_are_refused_together(many, reference, monkeypatch):
    batcher, _ = many
    bank, how = batcher.adapters, GenerateSettings(max_new_tokens=8)
    after = Bottleneck.after

    def fail(self, *args):
        if any("lora" in name for worn in batcher.host.plan for name in worn):
            raise RuntimeError("not beside another")
        return after(self, *args)

    both, heard = job(batcher, "Why?", "lora+series", how)
    monkeypatch.setattr(Bottleneck, "after", fail)
    batcher.submit([both])
    assert heard.rest()[-1].error.code == "model_failed" and not broken(bank)
    for model in ("series+lora", "prefix+lora+series"):
        with pytest.raises(BankError, match="not beside another") as e:
            job(batcher, "Why?", model, how)
        assert e.value.kind == "broken"
    fine, heard = job(batcher, "Why?", "series", how)
    batcher.submit([fine])
    assert heard.rest()[-1].result == alone(reference, "Why?", "series", how)
    batcher.call(lambda: bank.load("series", replacing=True)).result(20)
    monkeypatch.undo()
    again, heard = job(batcher, "Why?", "lora+series", how)
    batcher.submit([again])
    assert heard.rest()[-1].error is None


@pytest.mark.parametrize("of_the_base, error", [(True, RuntimeError), (False, MemoryError)])
def test_no_adapter_is_blamed_for_the_base_or_for_memory(many, reference, monkeypatch, of_the_base, error):
    batcher, _ = many
    how = GenerateSettings(max_new_tokens=8)

    def fail(*_):
        raise error("no adapter's fault")

    one, heard = job(batcher, "Why?", "series", how)
    if of_the_base:
        hook = batcher.host.model.register_forward_pre_hook(fail)
    else:
        monkeypatch.setattr(Bottleneck, "after", fail)
    batcher.submit([one])
    assert "no adapter's fault" in str(heard.rest()[-1].error) and not broken(batcher.adapters)
    if of_the_base:
        hook.remove()
    monkeypatch.undo()
    again, heard = job(batcher, "Why?", "series", how)
    batcher.submit([again])
    assert heard.rest()[-1].result == alone(reference, "Why?", "series", how)


def test_a_step_that_is_too_large_is_fed_in_halves_and_nobody_is_blamed(many, reference):
    batcher, steps = many
    how = GenerateSettings(max_new_tokens=10)
    jobs = [job(batcher, prompt, "lora", how) for prompt in "abcdefgh"]
    forwards = []

    def fail(m, args, kwargs):
        forwards.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 4:
            raise MemoryError("no room")

    hook = batcher.host.model.register_forward_pre_hook(fail, with_kwargs=True)
    batcher.submit([j for j, _ in jobs])
    for prompt, (_, heard) in zip("abcdefgh", jobs, strict=True):
        assert heard.rest()[-1].result == alone(reference, prompt, "lora", how)
    hook.remove()
    assert forwards == [8, 4, 4] * 10 and steps == [8] * 10


def test_a_fault_after_the_forward_is_everybodys(many, monkeypatch):
    """Some rows may have their token by then: feeding them again would tell it twice."""
    batcher, _ = many
    jobs = [job(batcher, prompt, "lora") for prompt in "ab"]

    def fail(*args):
        raise RuntimeError("cannot score")

    monkeypatch.setattr("inlay.evaluate.running.score", fail)
    batcher.submit([j for j, _ in jobs])
    assert all("cannot score" in str(heard.rest()[-1].error) for _, heard in jobs)
    assert batcher.jobs == 0 and batcher.alive


def test_halves_keep_rows_that_wear_the_same_together():
    class Wears:
        def __init__(self, worn):
            self.worn = worn

    def cut(text):
        return ["".join(row.worn) for row in halves([Wears(c) for c in text])[0]]

    assert cut("aabbbb") == ["a", "a"] and cut("abbbbbcc") == ["a", *"bbbbb"] and cut("aaaa") == ["a", "a"]
