"""The placement language and the parts of fused projections."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.place import Part, layer_set, locate, parse
from inlay.models.anatomy import anatomy
from tests.laws.zoo import CONFIGS, base, batch, excite, logits, small


def keys(family: str, at: str) -> list[str]:
    model = base(family)
    return list(locate(model, anatomy(model), at))


def test_the_language():
    assert keys("llama", "q,v@1") == ["1.q", "1.v"]
    assert keys("llama", "q@0-,v@1") == ["0.q", "1.q", "1.v"]
    assert keys("llama", "embed,q@1,v") == ["embed", "0.v", "1.q", "1.v"]
    assert keys("llama", "down:input@first1, mlp@last1") == ["0.down", "1.mlp"]
    assert keys("llama", "*.q_proj") == ["0.q", "1.q"]
    assert keys("llama", "model.layers.0.input_layernorm") == ["0.norm.input_layernorm"]
    assert keys("llama", "embed,head") == ["embed", "head"]
    assert keys("llama", "linear@0") == [f"0.{r}" for r in ("q", "k", "v", "o", "gate", "up", "down")]
    assert keys("phi3", "linear@0") == [f"0.{r}" for r in ("q", "k", "v", "o", "gate", "up", "down")]
    assert keys("mixtral", "linear@0") == [f"0.{r}" for r in ("q", "k", "v", "o")]
    assert [t.wiring for t in parse("up:series,up:output,up")] == ["output", "output", ""]
    assert layer_set("0-1+last2", 8) == {0, 1, 6, 7} and layer_set("3-", 5) == {3, 4} and layer_set("-1", 5) == {0, 1}


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("qproj", "unknown role .*'qproj'.*there is: .*attn.*q.*v"),
        ("q_proj", "unknown role"),
        ("q:sideways", "unknown wiring 'sideways'.*input.*parallel"),
        ("q@5", "outside this model, which has layers 0-1"),
        ("q@x", "cannot read the layers 'x'"),
        ("embed@0", "does not stand in layers"),
        ("q,q:parallel", "second wiring"),
        ("", "placement is empty"),
        ("q@1-0", "outside this model"),
    ],
)
def test_what_matches_nothing_is_an_error_that_says_what_exists(at, message):
    with pytest.raises(inlay.InlayError, match=message):
        keys("llama", at)


def test_wirings_are_for_methods_that_have_a_choice():
    host = inlay.attach(base("llama"))
    with pytest.raises(inlay.InlayError, match="lora cannot be wired 'parallel' at '0.q'; it has only one"):
        host.add("x", small("lora"), at="q:parallel")
    with pytest.raises(inlay.InlayError, match="prefix must hang in every layer"):
        host.add("x", small("prefix"), at="k,v@1")
    with pytest.raises(inlay.InlayError, match="hangs at k and v"):
        host.add("x", small("prefix"), at="k")
    assert not host.edits and not host.sites and not any("inlay" in n for n, _ in host.model.named_modules())


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "gpt2", "phi3", "falcon", "falcon-mq", "falcon-rw"])
def test_parts_of_fused_projections_are_the_queries_keys_and_values_the_decoder_attends_with(family, monkeypatch):
    """Doubling part k doubles what attention is given as keys, and nothing else; likewise q and v."""
    seen: list[dict[str, torch.Tensor]] = []
    import transformers as hf

    def spy(module, query, key, value, *args, **kwargs):
        seen.append({"q": query.detach(), "k": key.detach(), "v": value.detach()})
        return eager(module, query, key, value, *args, **kwargs)

    config = CONFIGS[family]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    module = __import__(type(model).__module__, fromlist=["x"])
    if not hasattr(module, "eager_attention_forward"):
        return check_by_algebra(model, family)
    eager = module.eager_attention_forward
    monkeypatch.setattr(module, "eager_attention_forward", spy)
    if hasattr(config, "rope_parameters"):  # rotation is linear: doubling goes through it
        pass
    host = inlay.attach(model)
    with torch.no_grad():
        model(**batch())
        for role in "qkv":
            host.add(f"two-{role}", inlay.method("ia3").make(), at=role)
            for p in host.parameters(f"two-{role}"):
                p.data.fill_(2.0)
            with host.using(f"two-{role}"):
                model(**batch())
    plain = seen[0]
    for role, got in zip("qkv", seen[1:], strict=True):
        for name in "qkv":
            torch.testing.assert_close(got[name], plain[name] * (2 if name == role else 1), rtol=1e-5, atol=1e-6)


def check_by_algebra(model, family):
    """Families without an attention function to spy on: the fused output is cut by the decoder's own method or view."""
    host = inlay.attach(model)
    block = model.transformer.h[0]
    attention = block.self_attention
    x = torch.randn(2, 5, 32)
    fused = attention.query_key_value(x)
    if family == "bloom":
        cut = fused.view(2, 5, 4, 3, 8)
        parts = {r: cut[..., i, :].flatten(-2) for i, r in enumerate("qkv")}
    else:
        q, k, v = attention._split_heads(fused)
        distinct = 4 if family == "falcon-rw" else 2 if family == "falcon" else 1
        step = 4 // distinct if family == "falcon" else 1  # grouped keys are repeated for each query head
        parts = {"q": q.flatten(-2), "k": k[:, :, ::step].flatten(-2), "v": v[:, :, ::step].flatten(-2)}
    for role in "qkv":
        spot = next(s for s in host.anatomy.spots if s.key == f"0.{role}")
        assert torch.equal(spot.part.get(fused), parts[role])


def test_a_part_put_back_is_the_whole():
    y = torch.randn(3, 48)
    for part in (Part(4, 3, 1, 2), Part(1, 6, 0, 4), Part(2, 4, 2, 3)):
        assert torch.equal(part.put(y, part.get(y)), y)
        assert part.get(y).shape[-1] == part.width(48)
        assert torch.equal(part.get(part.put(y, torch.zeros_like(part.get(y)))), torch.zeros_like(part.get(y)))


def test_lora_on_one_part_is_lora_on_those_rows_of_the_fused_weight():
    host = inlay.attach(base("bloom", torch.float64))
    host.add("x", small("lora"), at="k")
    excite(host)
    want = logits(host, "x", **batch())
    model = base("bloom", torch.float64)
    tensors = host.tensors("x")
    for layer in range(2):
        delta = host.edits["x"].scale * tensors[f"{layer}.k/B"] @ tensors[f"{layer}.k/A"]  # (32, 32), heads of 8
        rows = torch.cat([torch.arange(8) + 24 * head + 8 for head in range(4)])
        model.transformer.h[layer].self_attention.query_key_value.weight.data[rows] += delta.double()
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-5, atol=1e-5)  # BLOOM's softmax is float32
