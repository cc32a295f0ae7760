"""What a packed step allocates, counted and not timed: how many activations it makes and how many bytes live at its
peak. Both are the same in every run, and both are held under ceilings stated in the model's sizes."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf

import inlay
from inlay.engine.loss import in_one_product
from inlay.train.ways import Packed
from tests.train.tiny import Row

ROWS, PROMPT, WHOLE = 40, 4, 10
"""Examples of so many tokens, of which the prompt is not learned."""
TOKENS, LEARNED = ROWS * WHOLE, ROWS * (WHOLE - PROMPT)
FP32 = 4


def model(layers=4, hidden=32, inner=80, vocabulary=500):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocabulary,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config).eval()


def examples(vocabulary):
    """No two begin alike, so that nothing is computed once for several."""
    draw = random.Random(0)
    ids = [[3 + i, *(draw.randrange(3, vocabulary) for _ in range(WHOLE - 1))] for i in range(ROWS)]
    return [Row(i, [-100] * PROMPT + i[PROMPT:]) for i in ids]


def allocated(base, at="linear", method="lora", **settings) -> list[int]:
    """Bytes of every allocation (+) and release (-) of 1 KiB and more in a step, in their order."""
    host = inlay.attach(base).add("a", inlay.method(method).make(**settings), at=at, seed=0)
    way, data = Packed(host, 0, 10 * TOKENS), examples(base.config.vocab_size)

    def step():
        with host.using("a"), way.active():
            (group,) = way.split(data)
            way.loss(group).backward()
        for p in host.parameters():
            p.grad = None

    step()  # what is made once for a model is none of a step's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if abs(e.nbytes()) >= 1024]


def peak(sizes) -> int:
    """Most bytes at one time, over what was there before the step."""
    live = top = 0
    for size in sizes:
        live += size
        top = max(top, live)
    return top


def activations(sizes, hidden=32) -> int:
    """Allocations as large as a hidden state of every token."""
    return sum(size >= FP32 * TOKENS * hidden for size in sizes)


def test_a_step_allocates_the_same_every_time_and_leaves_nothing():
    first, second = (allocated(model(), rank=4) for _ in range(2))
    assert first == second and sum(first) == 0


@pytest.mark.parametrize(
    "sizes",
    [{"layers": 2}, {}, {"hidden": 64, "inner": 160}, {"inner": 200}, {"vocabulary": 4000}, {"vocabulary": 60_000}],
    ids=str,
)
def test_the_peak_is_what_the_layers_keep_and_one_slice_of_logits(library, sizes):
    """Per token and layer 11 hidden states and 2 of the MLP's (10.4 and 1.85 when this was written), and the logits of
    as many learned tokens as are computed at a time. Nothing else."""
    base = model(**sizes)
    c = base.config
    layer = 11 * c.hidden_size + 2 * c.intermediate_size
    logits = min(LEARNED, in_one_product(c.vocab_size)) * c.vocab_size
    found = peak(allocated(base, rank=4))
    assert 0.5 < found / (FP32 * (c.num_hidden_layers * TOKENS * layer + logits)) <= 1.0


LINEARS = 7
"""Of a block, each with an adapter."""


@pytest.mark.parametrize(
    ("method", "settings", "each"), [("lora", {"rank": 4}, 5), ("road1", {}, 6), ("series", {"size": 8}, 9)]
)
def test_a_layer_makes_a_fixed_number_of_activations(library, method, settings, each):
    """So many a linear, forward and backward together (35, 39 and 63 a layer when this was written), in either library.
    One copy more in each would show."""
    few, more = (activations(allocated(model(layers=n), "linear", method, **settings)) for n in (2, 4))
    assert (more - few) / 2 <= each * LINEARS and few <= 2 * each * LINEARS


def test_layers_below_the_lowest_adapter_keep_nothing():
    """The peak is that of a model without them, and their backward makes nothing."""
    upper, whole, short = (
        allocated(model(layers=n), at, rank=4) for n, at in ((4, "linear@last2"), (4, "linear"), (2, "linear"))
    )
    assert peak(upper) == peak(short)
    assert activations(upper) - activations(short) <= (activations(whole) - activations(short)) / 2
