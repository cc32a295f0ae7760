"""What generate() says with a KV cache is what full forwards say, for everything that depends on columns."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.laws.zoo import FAMILIES, base, batch, excite, places, small

NAMES = ["prefix", "prompt", "ptuning", "road1"]
NEW = 5
GO = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)


def dressed(family: str):
    """A host with all methods of virtual tokens, and one that edits the last token of a prompt only."""
    host = inlay.attach(base(family))
    for name in NAMES[:-1]:
        host.add(name, small(name), at=places(name, family), seed=0)
    host.add("road1", small("road1", positions="last-prompt"), at="block@1", seed=0)
    excite(host, 0.3)
    return host


def greedy(host, name: str, prompt: list[int]) -> list[int]:
    """The likeliest tokens by one full forward each."""
    row = list(prompt)
    with torch.no_grad(), host.using(name), host.prompts([len(prompt)]):
        for _ in range(NEW):
            row.append(int(host.model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_uncached_greedy_in_a_padded_mixed_batch_and_beams_need_no_cache(family):
    host, inputs = dressed(family), batch(len(NAMES), pad=2)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    with torch.no_grad(), host.using(*NAMES):
        got = host.model.generate(**inputs, **GO)[:, 7:].tolist()
        beams = host.model.generate(**inputs, **GO, num_beams=3)
        with host.prompts([len(p) for p in prompts]):
            plain = host.model.generate(**inputs, **GO, num_beams=3, use_cache=False)
    assert got == [greedy(host, n, p) for n, p in zip(NAMES, prompts, strict=True)]
    assert torch.equal(beams, plain)
    if family == "bloom":  # tied and random: it repeats its last token whatever it is told
        return
    with torch.no_grad(), host.using("prefix"):
        assert not torch.equal(host.model.generate(**inputs, **GO)[1:, 7:], torch.tensor(got[1:])), "they do nothing"
