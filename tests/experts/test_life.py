"""What else holds of an adapter at experts: generation, checkpointing, packing, the shelf, composing, merging."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import inlay
from inlay import InlayError
from inlay.library.compose import compose
from tests.experts.models import CONFIGS, base, batch, expert_modules, looped_logits

FAST = pytest.mark.filterwarnings("error:.*effective weights of all experts.*")
METHODS = {
    "lora": {},
    "shared": {"experts": "shared"},
    "shared-A": {"experts": "shared-A"},
    "rslora": {},
    "pissa": {},
    "dora": {},
    "dora-shared": {"experts": "shared"},
    "adalora": {"target": 2},
    "adalora-shared": {"target": 2, "experts": "shared"},
}


def make(name: str):
    row = {"shared": "lora", "shared-A": "lora"}.get(name, name.partition("-")[0])
    return inlay.method(row).make(rank=3, alpha=6.0, **METHODS[name])


def adapted(family: str, *names: str, dtype=torch.float32, at="experts", model=None, scale=0.1):
    host = inlay.attach(model or base(family, dtype))
    for i, name in enumerate(names):
        host.add(name, make(name), at=at, seed=i)
    torch.manual_seed(1)
    for p in host.parameters():
        p.data.add_(scale * torch.randn_like(p))
    return host


def logits(host, *plan, **inputs):
    with torch.no_grad(), host.using(*plan):
        return host.model(**(inputs or batch())).logits


@FAST
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", METHODS)
def test_merged_is_worn_and_can_be_undone(family, name):
    host = adapted(family, name)
    want, before = logits(host, name), {k: v.clone() for k, v in base(family).state_dict().items()}
    report = inlay.merge(host, name)
    assert all(".experts" in m or "feed_forward" in m for m in report.modules) and report.deviation < 1e-4
    model = host.detach()
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=2e-5)
    assert (base(family)(**batch()).logits - want).abs().max() > 1e-2
    report.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@FAST
@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_saved_is_loaded_and_shelved_is_hung_in_a_mixed_batch(family, tmp_path):
    host = adapted(family, *METHODS)
    for name in METHODS:
        inlay.save(host, name, tmp_path / name)
    again = inlay.attach(base(family))
    for name in METHODS:
        inlay.load(again, tmp_path / name)
        inlay.core.store.shelve(again, tmp_path / name, inlay.methods.EDITS, f"s-{name}")
    for name in METHODS:
        want = logits(host, name)
        assert torch.equal(logits(again, name), want)
        torch.testing.assert_close(logits(again, f"s-{name}"), want, rtol=1e-4, atol=1e-5, msg=name)
    plan = [f"s-{n}" for n in METHODS] + [None]
    inputs = batch(len(plan))
    for strategy in ("auto", "stack"):
        again.strategy = strategy
        mixed = logits(again, *plan, **inputs)
        for i, name in enumerate(plan):
            torch.testing.assert_close(mixed[i], logits(again, name, **inputs)[i], rtol=1e-4, atol=1e-5)


@FAST
def test_sums_and_chains_are_what_their_parts_say():
    host = adapted("mixtral", "lora", "shared", "dora", at="experts,q")
    compose(host, "kept", "sum(0.7*lora, 0.3*shared)")
    compose(host, "hung", "sum(0.7*lora, 0.3*shared)", hang=True)
    compose(host, "chain", "stack(lora, dora)", hang=True)
    torch.testing.assert_close(logits(host, "chain"), logits(host, "lora+dora"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(host, "kept"), logits(host, "hung"), rtol=1e-5, atol=1e-5)
    bare = base("mixtral")
    for name, at in (("lora", 0.7), ("shared", 0.3)):
        for key, W in inlay.merged(host, name).items():
            p = bare.get_parameter(key)
            p.data.add_(at * (W - base("mixtral").get_parameter(key)))
    torch.testing.assert_close(logits(host, "hung"), bare(**batch()).logits, rtol=1e-4, atol=2e-5)


@FAST
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_generation_cached_is_uncached_is_alone(family):
    host = adapted(family, "lora", "dora", "shared")
    plan, inputs = ["lora", "dora", None, "shared"], batch(4, pad=2)
    go = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with host.using(*plan), torch.no_grad():
        cached = host.model.generate(**inputs, **go)
        assert torch.equal(cached, host.model.generate(**inputs, **go, use_cache=False))
    for i, name in enumerate(plan):
        with host.using(name), torch.no_grad():
            alone = host.model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **go)
        assert torch.equal(cached[i], alone[0]), name


@FAST
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_checkpointing_gives_the_same_gradients(experts):
    plan = ("lora", "dora", None, ("lora", "shared"))

    def gradients(checkpoint: bool):
        host = adapted("mixtral", "lora", "dora", "shared", model=base("mixtral", experts=experts))
        if checkpoint:
            host.model.gradient_checkpointing_enable()
        host.model.train()
        inputs = batch(4)
        with host.using(*plan):
            loss = host.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()  # under another plan than the forward's
        return {f"{n}:{k}": p.grad for n in host.edits for k, p in host.tensors(n).items() if p.requires_grad}

    plain, saved = gradients(False), gradients(True)
    for k, g in plain.items():
        assert g.abs().sum() > 0, k
        torch.testing.assert_close(saved[k], g, rtol=1e-4, atol=1e-6, msg=k)


@FAST
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_packed_training_has_the_gradients_of_rows_alone(family):
    from inlay.engine.engaged import engaged
    from inlay.engine.head import loss_sum
    from inlay.engine.pack import pack
    from inlay.engine.steady import Steady

    host = adapted(family, "lora", "dora", at="experts,q")
    plan, sequences = ("lora", "dora", None, "lora"), [r[: 7 - i].tolist() for i, r in enumerate(batch(4)["input_ids"])]
    labels = [[-100, *ids[1:-1], ids[-1]] for ids in sequences]
    total = 0.0
    for name, ids, own in zip(plan, sequences, labels, strict=True):
        with host.using(name):
            loss = host.model(input_ids=torch.tensor([ids]), labels=torch.tensor([own]), use_cache=False).loss
            loss = loss * sum(i != -100 for i in own)
            total += loss.item()
            if name:
                loss.backward()
    alone = {f"{n}:{k}": p.grad.clone() for n in host.edits for k, p in host.tensors(n).items() if p.requires_grad}
    host.model.zero_grad()
    with host.using(*plan), engaged(host, Steady()):
        packed = loss_sum(host, pack(host, sequences, labels))
        packed.backward()
    assert packed.item() == pytest.approx(total, rel=1e-5)
    for name in host.edits:
        for k, p in host.tensors(name).items():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, alone[f"{name}:{k}"], rtol=1e-3, atol=2e-5, msg=k)


@FAST
def test_dropout_draws_the_same_whether_the_module_was_tried_before_or_not():
    host = inlay.attach(base("mixtral"))
    host.add("a", inlay.method("lora").make(rank=3, alpha=6.0, dropout=0.5), at="experts", seed=0)
    for p in host.parameters():
        p.data.add_(0.1)
    still = logits(host, "a")
    host.model.train()
    first, second = ((torch.manual_seed(4), logits(host, "a"))[1] for _ in range(2))
    assert torch.equal(first, second) and not torch.allclose(first, still)


# ---- the slow way ----------------------------------------------------------------------------------------------------
def _einsum(self, hidden_states, top_k_index, top_k_weights):
    """All experts for all tokens: an operation that edits cannot follow."""
    h = torch.einsum("nd,efd->nef", hidden_states, self.gate_up_proj)
    gate, up = h.chunk(2, -1)
    out = torch.einsum("nef,edf->ned", self.act_fn(gate) * up, self.down_proj)
    picked = out.gather(1, top_k_index[..., None].expand(-1, -1, out.shape[-1]))
    return (picked * top_k_weights[..., None]).sum(1)


def _hidden(self, hidden_states, top_k_index, top_k_weights):
    """As a kernel would: the numbers are read where nothing can see it."""
    with torch._C.DisableTorchFunctionSubclass():
        W = [
            torch.empty(0).set_(t.untyped_storage(), 0, t.shape, t.stride())
            for t in (self.gate_up_proj, self.down_proj)
        ]
    out = 0
    for k in range(top_k_index.shape[1]):
        gate, up = torch.einsum("nd,nfd->nf", hidden_states, W[0][top_k_index[:, k]]).chunk(2, -1)
        y = torch.einsum("nf,ndf->nd", self.act_fn(gate) * up, W[1][top_k_index[:, k]])
        out = out + top_k_weights[:, k, None] * y
    return out


@pytest.mark.parametrize("forward", [_einsum, _hidden])
def test_what_is_not_multiplied_expert_by_expert_is_computed_in_full_and_said(forward, monkeypatch):
    model = base("mixtral")
    kind = type(expert_modules(model)[0])
    monkeypatch.setattr(kind, "forward", forward)
    bare = copy.deepcopy(model)
    host = adapted("mixtral", "lora", "shared", model=model)
    inputs = batch(3, 3)
    with (
        pytest.warns(UserWarning, match="effective weights of all experts") as notes,
        host.using("lora", None, "shared"),
    ):
        got = host.model(**inputs).logits
    assert len(notes) == 1
    of = {n: [(host.edits[n].scale, host.tensors(n))] for n in host.edits}
    want = looped_logits("mixtral", bare, [of["lora"], [], of["shared"]], **inputs)
    if forward is _hidden:  # `set_` reads no graph: only values are compared
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(got.sum(), host.parameters())
    for g, w in zip(grads, torch.autograd.grad(want.sum(), host.parameters()), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)


def test_the_slow_way_has_no_inputs_to_drop(monkeypatch):
    model = base("mixtral")
    monkeypatch.setattr(type(expert_modules(model)[0]), "forward", _einsum)
    host = inlay.attach(model)
    host.add("a", inlay.method("lora").make(rank=3, dropout=0.5), at="experts", seed=0)
    model.train()
    with pytest.raises(InlayError, match="dropout cannot act at model.layers.0.mlp.experts"):
        logits(host, "a")


def test_experts_called_without_their_tokens_serve_one_adapter_and_refuse_mixed_batches():
    torch.manual_seed(0)
    config = hf.JetMoeConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    host = adapted("jetmoe", "lora", "shared", model=model)
    assert len(host.placement("lora")) == 8
    want = logits(host, "lora")
    with pytest.raises(InlayError, match="cannot be told apart"):
        logits(host, "lora", None, "lora")
    inlay.merge(host, "lora")
    torch.testing.assert_close(logits(host, None), want, rtol=1e-4, atol=1e-5)


# ---- around it -------------------------------------------------------------------------------------------------------
def test_a_layout_that_cannot_be_established_is_refused():
    model = base("mixtral")
    experts = expert_modules(model)[0]
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 40, 32))  # neither 2 x 24 nor 24 wide
    host = inlay.attach(model)
    with pytest.raises(InlayError, match=r"cannot establish .*'gate_up_proj': \(4, 40, 32\)"):
        host.add("a", make("lora"), at="experts")
    assert not host.sites and "forward" not in experts.__dict__


def test_places_are_named_by_role_layer_and_path():
    host = inlay.attach(base("mixtral"))
    host.add("a", make("lora"), at="q,experts.down@1")
    assert host.placement("a") == ["1.q", "1.experts.down"]
    host.add("b", make("lora"), at="*.experts.gate_up_proj@0")
    assert host.placement("b") == ["0.experts.gate_up"]
    host.add("c", make("lora"), at="model.layers.1.mlp.experts.down_proj")
    assert host.placement("c") == ["1.experts.down"]
    with pytest.raises(InlayError, match="experts.up"):
        host.add("d", make("lora"), at="experts.up")
    with pytest.raises(InlayError, match="is .*wanted"):
        host.fill("b", {k: t[:1] for k, t in host.tensors("b").items()})


@pytest.mark.parametrize("name", ["adalora", "adalora-shared"])
def test_adalora_gives_ranks_to_experts(name):
    host = adapted("mixtral", name, scale=0.05)
    edit, by_place, state = host.edits[name], host.by_place(name), {}
    for step in range(12):
        with host.using(name):
            loss = host.model(**batch(), labels=batch()["input_ids"]).loss + edit.penalty(by_place)
        host.model.zero_grad()
        loss.backward()
        torch.optim.SGD(host.parameters(), lr=0.05).step()
        edit.after_step(by_place, step, 12, state)
    kept = sum(int((w["E"] != 0).sum()) for w in by_place.values())
    experts = 4 if name == "adalora" else 1
    assert kept == 2 * 2 * experts * edit.target


def test_penalty_of_experts_is_the_mean_of_theirs():
    host = adapted("mixtral", "adalora")
    edit, by_place = host.edits["adalora"], host.by_place("adalora")
    apart = {f"{k}/{e}": {n: t[e] for n, t in w.items()} for k, w in by_place.items() for e in range(4)}
    torch.testing.assert_close(edit.penalty(by_place), edit.penalty(apart))
