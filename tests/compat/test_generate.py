"""What generate() says with a KV cache is what full forwards say, for everything that depends on columns."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import inlay
from inlay.compat import kv_cache
from inlay.core.errors import InlayError
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


def test_virtual_tokens_before_pictures_stand_where_real_ones_would():
    """Positions in several parts (M-RoPE): a prompt adapter that holds embeddings of three tokens is these tokens."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=1)
    config = hf.Qwen2VLConfig(
        text_config=dict(sizes, num_key_value_heads=2, rope_parameters=rope),
        vision_config=dict(vision, temporal_patch_size=1),
        image_token_id=90,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    model = hf.Qwen2VLForConditionalGeneration(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.15)

    def picture(ids: list[int]) -> dict:
        x = torch.tensor([ids])
        seen = {"pixel_values": torch.linspace(-1, 1, 192).view(4, 48), "image_grid_thw": torch.tensor([[1, 2, 2]])}
        if "mm_token_type_ids" in kv_cache.parameters(model).names:
            seen["mm_token_type_ids"] = (x == 90).int()
        return {"input_ids": x, "attention_mask": torch.ones_like(x), **seen}

    row = [5, 92, 90, 90, 90, 90, 93, 7, 8]
    want = model.generate(**picture([20, 21, 22, *row]), **GO)[:, 3 + len(row) :]
    host = inlay.attach(model).add("prompt", small("prompt"), seed=0)
    (name,) = host.tensors("prompt")
    host.fill("prompt", {name: model.get_input_embeddings().weight[20:23].detach()})
    with torch.no_grad(), host.using("prompt"):
        for cached in (True, False):
            assert torch.equal(model.generate(**picture(row), **GO, use_cache=cached)[:, len(row) :], want)
        with pytest.raises(InlayError, match="positions of pictures itself.*give position_ids"):
            model(**picture(row))
