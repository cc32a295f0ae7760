"""Trees of options: every decoder scores them as alone, and computes nothing twice."""

import warnings

import pytest
import torch

import inlay
from inlay.engine import pack
from inlay.evaluate import option_scores, tree
from tests.evaluate.test_slots import Ids, dressed, prompts
from tests.laws import zoo

OPTIONS = [
    [[5], [6]],
    [[7, 8, 9], [7, 8, 10], [7, 11]],
    [[12, 13], [12]],
    [[3, 4, 5, 6, 7]],
    [[9, 9], [9, 9], [10]],
    [[20, 21, 22], [23]],
    [[30], [31, 32, 33, 34]],
    [[40, 41], [42, 43]],
]
ALIBI = ("bloom", "falcon-rw")
PLAN = ["lora", None, "prefix", "prompt", "prefix+lora", None, "lora", "prefix"]


def alone(host, ids, option, name) -> float:
    """No batch, no padding, no cache."""
    with host.using(name), torch.no_grad():
        logp = host.model(torch.tensor([ids + option]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[len(ids) - 1 + i, t].item() for i, t in enumerate(option))


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_as_alone(family, beginning, monkeypatch):
    monkeypatch.setitem(pack.BUDGET, "cpu", 60)
    host, rows = dressed(family), prompts(beginning=beginning)
    for plan in (PLAN, ["lora", None] * 4):  # without virtual tokens, the beginning is computed once
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = option_scores(host, Ids(), rows, OPTIONS, plan)
        if plan is PLAN:
            assert bool([w for w in told if "trees" in str(w.message)]) == (family in ALIBI)
        for ids, options, name, own in zip(rows, OPTIONS, plan, found, strict=True):
            assert own == pytest.approx([alone(host, ids, o, name) for o in options], abs=1e-4)


@pytest.mark.parametrize("family", ALIBI)
def test_alibi_is_refused_where_rounding_would_hide_it(family):
    with pytest.warns(UserWarning, match="ALiBi"):
        assert not tree.serves(inlay.attach(zoo.base(family, torch.bfloat16)), [[1, 2]], [[[3]]])


def test_a_fallback_is_said_once():
    host, rows = inlay.attach(zoo.base("bloom")), prompts(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            option_scores(host, Ids(), rows, OPTIONS[:2])
    assert [str(w.message).partition(",")[0] for w in told] == ["options are scored on copies of their prompts' cache"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_changed_behind_the_head_are_noticed(dtype):
    import transformers as hf

    config = hf.Gemma2Config(head_dim=8, final_logit_softcapping=9.0, **zoo.GQA)
    model = hf.Gemma2ForCausalLM(config).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with pytest.warns(UserWarning, match="behind the head"):
        assert not tree.serves(inlay.attach(model), [[1, 2]], [[[3]]])


def test_a_tree_holds_every_token_once():
    made = tree.grow([1, 2], [[7, 8, 9], [7, 8, 10], [7, 11], [7], [3]])
    assert made.sequences == [[1, 2], [7], [8]]  # the last token of an option is only looked up
    assert made.parents == [None, 0, 1]
    assert made.scored == {(0, 1): 0, (1, 0): 1, (2, 0): 2}
    assert [[made.entries[e] for e in own] for own in made.options] == [
        [(0, 7), (1, 8), (2, 9)],
        [(0, 7), (1, 8), (2, 10)],
        [(0, 7), (1, 11)],
        [(0, 7)],
        [(0, 3)],
    ]


def test_what_is_shared_is_computed_once():
    host = dressed("llama")
    rows, options = prompts(beginning=20), [[[5, 6, 7], [5, 6, 8], [9]]] * 8
    assert tree.serves(host, rows, options)
    computed, scored = [], []
    hooks = [
        host.model.model.register_forward_pre_hook(
            lambda m, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        ),
        host.model.lm_head.register_forward_pre_hook(lambda m, args: scored.append(len(args[0]))),
    ]
    option_scores(host, Ids(), rows, options, ["lora", None] * 4)
    for hook in hooks:
        hook.remove()
    assert sum(computed) == 2 * 20 + sum(len(r) - 20 + 2 for r in rows)
    assert sum(scored) == 3 * len(rows)


def test_greedy_is_told():
    host, (ids,) = dressed("llama"), prompts(1)
    with torch.no_grad(), host.using(None):
        first = host.model(torch.tensor([ids])).logits[0, -1].argmax().item()
        second = host.model(torch.tensor([[*ids, first]])).logits[0, -1].argmax().item()
    options = [[first, second], [first, (second + 1) % 97], [(first + 1) % 97]]
    ((_, (said,)),) = tree.scores(host, [ids], [options], [()])
    assert [greedy for _, greedy in said] == [True, False, False]


def test_rows_longer_than_a_window_go_another_way():
    import transformers as hf

    torch.manual_seed(0)
    host = inlay.attach(hf.MistralForCausalLM(hf.MistralConfig(sliding_window=20, **zoo.GQA)).eval())
    rows = prompts(beginning=16)
    assert not tree.serves(host, rows, OPTIONS) and tree.serves(host, [[1, 2]], [[[3], [4, 5]]])
    found = option_scores(host, Ids(), rows, OPTIONS)
    for ids, options, own in zip(rows, OPTIONS, found, strict=True):
        assert own == pytest.approx([alone(host, ids, o, None) for o in options], abs=1e-4)
