"""Option scores equal scoring one by one, however they are batched."""

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.evaluate import option_scores
from tests.evaluate.tiny import CONFIGS, PLAN, PROMPTS, host, tokenizer

OPTIONS = [
    ["true", "false"],
    ["5", "6", "7"],
    [" yes", "no, never"],
    ["a"],
    ["answer1", "answer2", "answer3", "ä"],
    ["42", "4"],
    ["because", "so"],
    ["there was", "x"],
    ["c", "d"],
    ["1", "22", "333"],
]


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


def one_by_one(worn, tok, prompt, option, name):
    """No batch, no padding, no cache."""
    head, tail = tok(prompt)["input_ids"], tok(option, add_special_tokens=False)["input_ids"]
    with worn.using(name), torch.no_grad():
        logp = worn.model(torch.tensor([head + tail]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[len(head) - 1 + i, t].item() for i, t in enumerate(tail))


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_one_by_one(family, tok):
    worn = host(family)
    exact = [[one_by_one(worn, tok, p, o, n) for o in own] for p, own, n in zip(PROMPTS, OPTIONS, PLAN, strict=True)]
    for share in (True, False):
        for size in (1, 4, 64):
            found = option_scores(worn, tok, PROMPTS, OPTIONS, PLAN, batch_size=size, share=share)
            for a, b in zip(found, exact, strict=True):
                assert a == pytest.approx(b, abs=1e-4)


def test_order_and_normalisation(tok):
    worn = host("llama")
    plain = option_scores(worn, tok, PROMPTS, OPTIONS, PLAN)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    shuffled = option_scores(
        worn, tok, [PROMPTS[i] for i in order], [OPTIONS[i] for i in order], [PLAN[i] for i in order], batch_size=5
    )
    for i, scores in zip(order, shuffled, strict=True):
        assert scores == pytest.approx(plain[i], abs=1e-4)
    by_bytes = option_scores(worn, tok, PROMPTS, OPTIONS, PLAN, "bytes")
    by_tokens = option_scores(worn, tok, PROMPTS, OPTIONS, PLAN, "tokens")
    assert by_bytes[4] == pytest.approx([s / n for s, n in zip(plain[4], (7, 7, 7, 2), strict=True)], abs=1e-6)
    assert by_tokens[4] == pytest.approx(by_bytes[4], abs=1e-6)  # one token a byte here
    ids = [[tok(o, add_special_tokens=False)["input_ids"] for o in own] for own in OPTIONS]
    again = option_scores(worn, tok, PROMPTS, ids, PLAN, "bytes")
    assert again[4] == pytest.approx(by_bytes[4], abs=1e-6)


def test_probabilities_sum_to_one(tok):
    worn = host("gptj")
    scores = option_scores(worn, tok, ["anything"], [[[i] for i in range(259)]], "prefix")[0]
    assert torch.tensor(scores, dtype=torch.float64).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_scored_is_told(tok):
    worn = host("gpt2", positions=16)
    with pytest.raises(InlayError, match="without tokens"):
        option_scores(worn, tok, ["a"], [["b", ""]])
    with pytest.raises(InlayError, match="no options"):
        option_scores(worn, tok, ["a"], [[]])
    with pytest.raises(InlayError, match="needs 17 positions, the base's context is 16"):
        option_scores(worn, tok, ["abcdefghijkl"], [["fghij"]])
    with pytest.raises(InlayError, match="unknown normalisation 'words'"):
        option_scores(worn, tok, ["a"], [["b"]], None, "words")
    with pytest.raises(InlayError, match="2 lists of options"):
        option_scores(worn, tok, ["a"], [["b"], ["c"]])
