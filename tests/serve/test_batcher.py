"""Rows come, go, are late, fail: whoever is left hears what they would have heard."""

from __future__ import annotations

import queue
import time

import pytest
import torch

from inlay.evaluate import GenerateSettings, generate
from inlay.evaluate.rows import Row
from inlay.library.bank import Bank
from inlay.serve.batcher import Batcher, Job, Watch
from inlay.serve.errors import Refused
from tests.evaluate.tiny import PROMPTS, tokenizer
from tests.serve import tiny_server

LONG = GenerateSettings(max_new_tokens=60)


@pytest.fixture
def batcher(root):
    import inlay
    from tests.evaluate import tiny

    host = inlay.attach(tiny.base("llama"))
    host.model.generation_config.eos_token_id = None
    adapters = Bank(host, [root / "adapters"])
    made = Batcher(host, tiny.tokenizer(eos_token=None), adapters, rows=3, waiting=4)
    yield made
    made.stop(10)


class Heard(queue.SimpleQueue):
    """What a job was told."""

    def rest(self):
        events = []
        while not events or not events[-1].last:
            events.append(self.get(timeout=20))
        return events


def job(batcher, prompt="Why?", model="base", how=LONG, **more):
    heard = Heard()
    lease = batcher.adapters.lease(model) or batcher.call(lambda: batcher.adapters.bring(model)).result(20)
    ids = tokenizer()(prompt)["input_ids"]
    row = Row(0, ids, lease.worn, 0, batcher.limit(ids, lease, how.max_new_tokens), how)
    return Job(row, lease, heard.put, **more), heard


def alone(reference, prompt, name=None, how=LONG):
    ends, reference.model.generation_config.eos_token_id = reference.model.generation_config.eos_token_id, None
    found = generate(reference, tokenizer(eos_token=None), [prompt], name, how)[0]
    reference.model.generation_config.eos_token_id = ends
    return found


def test_tokens_come_one_by_one_and_the_last_brings_the_result(batcher, reference):
    batcher.start()
    one, heard = job(batcher, model="lora")
    batcher.submit([one])
    events, want = heard.rest(), alone(reference, "Why?", "lora")
    assert [e.token for e in events] == want.tokens
    assert events[-1].result == want and all(e.result is None for e in events[:-1])
    assert batcher.jobs == 0 and batcher.adapters.describe()[0]["requests"] == 0


def test_a_cancelled_row_leaves_and_its_neighbours_do_not_notice(batcher, reference):
    jobs = [job(batcher.start() if not i else batcher, p, m) for i, (p, m) in enumerate(
        [("Why?", "lora"), ("a", "base"), ("b", "prefix"), ("once", "series")])]  # fmt: skip
    batcher.submit([j for j, _ in jobs])
    jobs[1][1].get(timeout=20)
    batcher.cancel([jobs[1][0]])
    for (_, heard), (p, m) in zip(
        jobs, [("Why?", "lora"), ("a", None), ("b", "prefix"), ("once", "series")], strict=True
    ):
        if m is not None:
            assert heard.rest()[-1].result == alone(reference, p, m)
    while not jobs[1][1].empty():
        assert not jobs[1][1].get().last
    assert batcher.jobs == 0


def test_a_row_whose_time_is_over_hears_so(batcher):
    batcher.start()
    late, heard = job(batcher, deadline=time.monotonic() - 1)
    fine, other = job(batcher)
    batcher.submit([late, fine])
    error = heard.rest()[-1].error
    assert isinstance(error, Refused) and error.status == 504
    assert len(other.rest()) == 60


def test_more_rows_than_may_wait_are_refused_all_or_none(batcher):
    jobs = [job(batcher)[0] for _ in ()]  # the thread does not run yet, so nothing ends
    batcher.call = lambda f: pytest.fail("nothing to bring")  # type: ignore[method-assign]
    jobs = [job(batcher) for _ in range(8)]
    batcher.submit([j for j, _ in jobs[:5]])
    with pytest.raises(Refused) as e:
        batcher.submit([j for j, _ in jobs[5:]])
    assert e.value.status == 429 and e.value.again and batcher.jobs == 5
    batcher.submit([j for j, _ in jobs[5:7]])
    batcher.start()
    assert all(len(heard.rest()) == 60 for _, heard in jobs[:7])


def test_new_rows_wait_for_a_step_of_those_that_have_begun(batcher):
    shapes = []
    hook = batcher.host.model.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    jobs = [
        job(batcher, p, how=GenerateSettings(max_new_tokens=n)) for p, n in (("aaaa", 9), ("bb", 1), ("c", 1), ("d", 1))
    ]
    batcher._running.prefill = 6
    batcher.submit([j for j, _ in jobs])
    batcher.start()
    for _, heard in jobs:
        heard.rest()
    hook.remove()
    assert shapes[:5] == [(1, 4), (1, 1), (2, 2), (1, 1), (1, 1)]  # two tokens and one fit into 6, four and two do not


def test_a_step_that_fails_ends_its_rows_only(batcher, reference):
    batcher.start()
    jobs = [job(batcher, "Why?"), job(batcher, "boom")]
    boom = tokenizer()("boom")["input_ids"]

    def fail(m, args, kwargs):
        if kwargs["input_ids"].shape == (1, 4) and kwargs["input_ids"][0].tolist() == boom:
            raise MemoryError("no room")

    hook = batcher.host.model.register_forward_pre_hook(fail, with_kwargs=True)
    batcher.submit([jobs[0][0]])
    jobs[0][1].get(timeout=20)
    batcher.submit([jobs[1][0]])
    error = jobs[1][1].rest()[-1].error
    assert error.status == 500 and "no room" in str(error)
    assert jobs[0][1].rest()[-1].result == alone(reference, "Why?")
    hook.remove()
    again, heard = job(batcher, "boom")
    batcher.submit([again])
    assert heard.rest()[-1].result == alone(reference, "boom")


def test_prompts_that_fill_the_context_are_refused(batcher):
    with pytest.raises(Refused, match="the prompt has 126 tokens .3 virtual"):
        lease = batcher.start().call(lambda: batcher.adapters.bring("prefix")).result(20)
        batcher.limit([5] * 126, lease, 8)
    assert batcher.limit([5] * 124, lease_of(batcher, "prefix"), 8) == 1


def lease_of(batcher, model):
    return batcher.call(lambda: batcher.adapters.bring(model)).result(20)


def test_stopping_tells_everybody(batcher):
    batcher.start()
    jobs = [job(batcher, p, how=GenerateSettings(max_new_tokens=100)) for p in PROMPTS[:5]]
    batcher.submit([j for j, _ in jobs])
    jobs[0][1].get(timeout=20)
    batcher.stop(20)
    assert not batcher.alive
    for _, heard in jobs:
        last = heard.rest()[-1]
        assert last.result is not None or last.error.status == 503
    assert batcher.jobs == 0


def test_the_watch_counts(root):
    import inlay
    from tests.evaluate import tiny

    seen: dict[str, list] = {"rows": [], "first": [], "how": []}
    watch = Watch(
        lambda rows, s: seen["rows"].append(rows), seen["first"].append, lambda job, how: seen["how"].append(how)
    )
    host = inlay.attach(tiny.base("llama"))
    made = Batcher(host, tiny.tokenizer(), Bank(host), rows=2, watch=watch).start()
    one, heard = job(made, how=GenerateSettings(max_new_tokens=5))
    made.submit([one])
    count = len(heard.rest())
    made.stop(10)
    assert seen["rows"] == [1] * count and len(seen["first"]) == 1
    assert seen["how"] == ["length" if count == 5 else "eos"]


def test_a_base_that_slots_do_not_serve_is_refused():
    import inlay
    from inlay.core.errors import InlayError
    from tests.laws import zoo

    host = inlay.attach(zoo.base("falcon-rw"))
    with pytest.warns(UserWarning, match="slots"), pytest.raises(InlayError, match="cannot be served"):
        Batcher(host, tokenizer(), Bank(host))
    assert torch.is_grad_enabled() and tiny_server.SMALL
