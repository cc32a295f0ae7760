"""How it is run does not matter: compiled, in low precision, on quantised layers, worn together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from tests.laws.zoo import FAMILIES, base, batch, dressed, excite, logits, methods, places, small

PLAIN = [m for m in inlay.METHODS if m not in ("prefix", "prompt", "ptuning")]


@pytest.mark.parametrize("strategy", ["auto", "segments", "select", "stack"])
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "gpt2"])
def test_compiled_is_one_graph_and_a_new_plan_over_the_same_adapters_reuses_it(family, strategy):
    from torch._dynamo.testing import CompileCounterWithBackend

    host = inlay.attach(base(family), strategy=strategy)
    for name in ("lora", "road1", "series"):
        host.add(name, small(name), at=places(name, family))
    excite(host)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(host.model, backend=counter, fullgraph=True)
    graphs = []
    for plan in (
        ("lora", "road1", "series", None),
        ("road1", None, "lora", "series"),
        ("series", "lora", None, "road1"),
    ):
        with torch.no_grad(), host.using(*plan):
            got = fast(**batch(4), use_cache=False).logits
        torch.testing.assert_close(got, logits(host, *plan, **batch(4)), rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_bases_keep_float32_adapters_and_the_identity(family, dtype):
    model = base(family, dtype)
    want = model(**batch()).logits
    host = inlay.attach(model)
    for name in methods(family):
        host.add(name, small(name), at=places(name, family))
        if name in PLAIN:
            assert torch.equal(logits(host, name, **batch()), want), name
    assert {p.dtype for p in host.parameters()} == {torch.float32}
    excite(host)
    mixed = logits(host, *methods(family), **batch(len(methods(family))))
    assert mixed.dtype == dtype and mixed.isfinite().all()


def test_fast_computes_in_the_dtype_of_the_base():
    exact, fast = inlay.attach(base("llama", torch.bfloat16)), inlay.attach(base("llama", torch.bfloat16), fast=True)
    for host in (exact, fast):
        host.add("x", small("lora"), seed=0)
        excite(host)
    a, b = (logits(h, "x", **batch()).float() for h in (exact, fast))
    assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


class Int8Linear(nn.Module):
    """Stands for any quantiser's layer: no float weight to read, only a forward."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model, how: str):
    """Every linear of the blocks in another kind of storage."""
    if how == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
        return model
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        if how == "int8":
            new: nn.Module = Int8Linear(module)
        else:
            bnb = pytest.importorskip("bitsandbytes")
            if how == "bnb4":
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                new.load_state_dict({"weight": module.weight.data})
                new = new.to("cpu")
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.load_state_dict({"weight": module.weight.data})
                new = new.to("cpu")
        model.set_submodule(name, new)
    return model


@pytest.mark.parametrize("how", ["int8", "bnb4", "bnb8", "torchao"])
def test_quantised_layers_wear_every_method(how):
    model = quantise(base("llama"), how)
    want = model(**batch()).logits
    host = inlay.attach(model)
    for name in methods("llama"):
        if name != "pissa" or how == "int8":
            host.add(name, small(name), at=places(name, "llama"))
            if name in PLAIN:
                assert torch.equal(logits(host, name, **batch()), want), name
    excite(host)
    names = list(host.edits)
    mixed = logits(host, *names, **batch(len(names)))
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], logits(host, name, **batch(len(names)))[i], rtol=1e-3, atol=1e-3, msg=name)
    with host.using("lora"):
        host.model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host.parameters("lora"))
    with pytest.raises(inlay.InlayError, match="quantised"):
        inlay.merge(host, "lora")
    float_weights = inlay.merged(host, "lora")
    assert all(v.dtype == torch.float32 for v in float_weights.values())


def test_adapters_worn_together_are_compositions():
    """MAM (prefix, scaled parallel bottleneck) and UniPELT without gates, beside others in one batch."""
    host = dressed("llama", torch.float64)
    names = ("prefix+he-parallel", "lora+prefix+series", "prompt+prefix", "lora", None)
    inputs = batch(5, pad=2)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    mixed = logits(host, *names, **inputs)
    used = inputs["attention_mask"].bool()
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i][used[i]], logits(host, name, **inputs)[i][used[i]], rtol=0, atol=1e-9)
    assert (logits(host, "lora+prefix", **inputs) - logits(host, "lora", **inputs)).abs().max() > 1e-3


def test_two_loras_worn_together_are_their_sum():
    host = inlay.attach(base("llama", torch.float64))
    for i in range(2):
        host.add(f"l{i}", small("lora"), seed=i)
    excite(host)
    together = logits(host, "l0+l1", **batch())
    big = host.add("sum", small("lora", rank=8, alpha=128.0))
    a, b, c = (host.tensors(n) for n in ("l0", "l1", "sum"))
    big.fill("sum", {k: torch.cat([a[k], b[k]], 0 if k.endswith("A") else 1) for k in c})
    torch.testing.assert_close(logits(host, "sum", **batch()), together, rtol=0, atol=1e-10)


def test_static_caches_serve_methods_without_virtual_tokens_and_refuse_the_others():
    host = dressed("llama")
    go = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with host.using("lora", "series", None), torch.no_grad():
        want = host.model.generate(**batch(), **go)
        got = host.model.generate(**batch(), **go, cache_implementation="static", disable_compile=True)
    assert torch.equal(want, got)
    with host.using("prefix"), pytest.raises(inlay.InlayError, match="dynamic cache"):
        host.model.generate(**batch(), **go, cache_implementation="static", disable_compile=True)


def test_tied_embeddings_serve_both_ends():
    import transformers as hf

    from tests.laws.zoo import GQA

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GQA, tie_word_embeddings=True)).eval()
    host = inlay.attach(model)
    host.add("full", small("full")).add("head", small("lora"), at="head")
    assert host.count("full") == sum(p.numel() for p in base_parameters(model))
    excite(host)
    want = {n: logits(host, n, **batch()) for n in ("full", "head")}
    report = inlay.merge(host, "full")
    assert not report.untied
    torch.testing.assert_close(logits(host, None, **batch()), want["full"], rtol=1e-4, atol=1e-5)
    report.undo()
    assert inlay.merge(host, "head").untied
    torch.testing.assert_close(logits(host, None, **batch()), want["head"], rtol=1e-4, atol=1e-5)


def base_parameters(model):
    return [p for n, p in model.named_parameters() if "inlay" not in n]


def test_merged_saves_as_an_ordinary_folder(tmp_path):
    import transformers as hf

    for dtype in (torch.float32, torch.bfloat16):
        host = inlay.attach(base("llama", dtype))
        host.add("x", small("dora"))
        excite(host)
        want = logits(host, "x", **batch())
        report = inlay.merge(host, "x")
        assert 0 < report.rounding <= torch.finfo(dtype).eps / 2
        model = host.detach()
        model.save_pretrained(tmp_path / str(dtype))
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert type(again) is hf.LlamaForCausalLM and again.dtype == dtype
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
        if dtype == torch.float32:
            torch.testing.assert_close(again(**batch()).logits, want, rtol=1e-4, atol=1e-5)


def test_a_gate_stands_over_any_edit_of_an_output(tmp_path):
    host = inlay.attach(base("llama"))
    inner = small("parallel")
    host.add("plain", inner, at="up,down", seed=0)
    excite(host)
    host.add("gated", inlay.method("gated").make(edit=inner), at="up,down", seed=0)
    host.fill("gated", {k: v.clone() for k, v in host.tensors("gated").items()} | host.tensors("plain"))
    for bias, same in ((100.0, "plain"), (-100.0, None)):
        for key, p in host.tensors("gated").items():
            if key.endswith("gate_bias"):
                p.data.fill_(bias)
        torch.testing.assert_close(
            logits(host, "gated", **batch()), logits(host, same, **batch()), rtol=1e-5, atol=1e-5
        )
    inlay.save(host, "gated", tmp_path)
    again = inlay.attach(base("llama"))
    inlay.load(again, tmp_path)
    assert again.edits["gated"] == host.edits["gated"]
    with pytest.raises(inlay.InlayError, match="a gate stands behind"):
        host.add("no", inlay.method("gated").make(edit=small("series")), at="gate")
