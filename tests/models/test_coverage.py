"""No silent place: in every decoder and image-text type that can be built, what `linear` names changes the logits, and
what it does not reach is said."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.edit import Call
from tests.models import coverage
from tests.models import tiny_configs as tiny

EVERY = list(coverage.kinds())
MIXED = set(
    "bailing_hybrid bamba blt deepseek_v3 deepseek_v4 falcon_h1 falcon_mamba gemma3n_text gemma4_text glm4_moe "
    "gpt_bigcode granitemoehybrid jamba jetmoe kimi_linear lfm2 lfm2_moe llama4_text longcat_flash mamba mamba2 "
    "minimax nemotron_h olmo_hybrid qwen2_moe qwen3_5_text qwen3_next recurrent_gemma rwkv starcoder2 xlm xlnet zamba "
    "zamba2 zaya".split()
)
"""Causal types whose blocks differ, or hold more than attention and an MLP: all of them in the fast suite."""
UNCALLED = {"zamba2"}
"""Types with linears that no forward calls (adapters of other blocks' turns), of which a forward warns."""
FAST = [(k, a) for i, (k, a) in enumerate(EVERY) if k in MIXED or i % 8 == 0]


def check(row: coverage.Row) -> None:
    assert not row.silent, f"{row.kind}: {row.silent} change nothing"
    assert row.linears and row.reached + len(row.uncalled) == row.linears
    assert not row.uncalled or row.kind in UNCALLED
    assert not row.unlike_peft, f"PEFT's all-linear and `linear` differ: {row.unlike_peft}"


@pytest.mark.parametrize(("kind", "auto"), FAST, ids=lambda v: v.removeprefix("AutoModelFor"))
def test_linear_reaches_every_linear_of_the_blocks_or_says_so(kind, auto):
    check(coverage.measure(kind, auto))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "auto"), EVERY, ids=lambda v: v.removeprefix("AutoModelFor"))
def test_every_role_of_every_type_changes_the_logits_or_is_refused(kind, auto):
    row = coverage.measure(kind, auto, every_role=True)
    check(row)
    assert all("no adapter can hang at" in r or "cannot" in r for r in row.refused)


def test_what_cannot_be_built_is_listed():
    """Who stops building, or begins to, is noticed: by its test, or here."""
    listed = dict(tiny.kinds())
    assert set(tiny.UNBUILT) <= set(listed), "types that transformers no longer has"
    assert sorted(tiny.UNBUILT) == [
        "evolla",
        *"gemma3n gemma4_assistant gemma4_unified_assistant".split(),
        "llama4",
        "perception_lm",
        "pi0",
    ]
    assert len(EVERY) >= len(tiny.kinds()) - 8


# ---- roles by layer --------------------------------------------------------------------------------------------------
def hung(kind: str, at: str, auto: str = tiny.CAUSAL):
    host, said = coverage.hung(tiny.model(kind, auto), "a", at)
    return [s.spot.path for s in host.sites.values()], said


def test_a_role_that_some_layers_lack_is_said_once():
    paths, said = hung("qwen3_next", "o")
    assert paths == ["model.layers.3.self_attn.o_proj"]
    assert said == ["'o' exists in layer 3 of 0-3 only; the other layers are left alone"]
    paths, said = hung("qwen3_next", "o@3,out_proj@0-2")
    assert len(paths) == 4 and not said
    assert not hung("qwen3_next", "attn")[1], "attention is linear in some layers, and every layer has one"


def test_what_linear_does_not_reach_is_said():
    _, said = hung("mixtral", "linear")
    assert said == [
        "'linear' reaches every linear of the blocks, but not these matrices of mixtral: "
        "model.layers.{0-3}.mlp.gate.weight, model.layers.{0-3}.mlp.experts.gate_up_proj, "
        "model.layers.{0-3}.mlp.experts.down_proj; 'experts' reaches those of experts"
    ]
    assert not hung("llama", "linear")[1]


@pytest.mark.parametrize(
    ("kind", "at", "first"),
    [
        ("starcoder2", "down", "model.layers.0.mlp.c_proj"),
        ("gpt_bigcode", "down", "transformer.h.0.mlp.c_proj"),
        ("deepseek_v3", "q_a", "model.layers.0.self_attn.q_a_proj"),
        ("deepseek_v3", "kv_a", "model.layers.0.self_attn.kv_a_proj_with_mqa"),
        ("deepseek_v3", "shared_up", "model.layers.3.mlp.shared_experts.up_proj"),
        ("jamba", "in_proj", "model.layers.0.mamba.in_proj"),
        ("nemotron_h", "q", "model.layers.2.mixer.q_proj"),
        ("mamba2", "out_proj", "backbone.layers.0.mixer.out_proj"),
        ("longcat_flash", "down", "model.layers.0.mlps.0.down_proj"),
        ("bart", "cross_v", "model.decoder.layers.0.encoder_attn.v_proj"),
        ("gemma3n_text", "per_layer_input_gate", "model.layers.0.per_layer_input_gate"),
    ],
)
def test_roles_have_the_names_that_one_would_guess(kind, at, first):
    assert hung(kind, at)[0][0] == first


def test_routers_and_layers_whose_weight_is_read_are_no_linears():
    """Llama 4's router inherits from nn.Linear and gives scores; Mamba multiplies by `dt_proj.weight`."""
    for kind, path in (("llama4_text", "feed_forward.router"), ("mamba", "mixer.dt_proj")):
        paths, said = hung(kind, "linear")
        assert not any(path in p for p in paths) and path in said[0]


# ---- image-text models -----------------------------------------------------------------------------------------------
def test_the_language_model_is_the_default_and_towers_are_places_by_name():
    paths, said = hung("llava", "linear", tiny.IMAGES)
    assert paths and all("language_model" in p for p in paths) and not said
    paths, _ = hung("llava", "vision.q@0-1,connector", tiny.IMAGES)
    assert paths == [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.1.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    assert all("vision_tower" in p for p in hung("llava", "vision.linear", tiny.IMAGES)[0])
    assert hung("llava", "norm", tiny.IMAGES)[0] == hung("llava", "norm@0-3", tiny.IMAGES)[0] + [
        "model.language_model.norm"
    ]
    with pytest.raises(inlay.InlayError, match="layers '9' reach outside .*0-3"):
        hung("llava", "vision.q@9", tiny.IMAGES)


def test_sizes_are_the_language_models():
    config = tiny.config("llava")
    config.vision_config.hidden_size, config.vision_config.num_hidden_layers = 48, 6
    from transformers import LlavaForConditionalGeneration

    host = inlay.attach(LlavaForConditionalGeneration(config))
    assert host.hidden == 32 and host.anatomy.layers == 4 and host.anatomy.layers_of("vision") == 6


# ---- whole sub-layers ------------------------------------------------------------------------------------------------
def test_a_sublayer_that_flattens_tokens_is_edited_in_their_shape():
    """Llama 4's experts give (B T, D) for (B, T, D): a parallel bottleneck adds its own formula to it."""
    model = tiny.model("llama4_text", tiny.CAUSAL)
    ids = tiny.inputs("llama4_text", tiny.CAUSAL, rows=2)["input_ids"]
    taken: list = []
    mlp = model.model.layers[3].feed_forward
    handle = mlp.register_forward_hook(lambda m, args, out: taken.append((args[0], out[0])))
    model(ids)
    handle.remove()
    host = inlay.attach(model)
    host.add("a", inlay.method("parallel").make(size=4, activation="relu"), at="mlp:parallel@3", seed=0)
    for p in host.parameters("a"):
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    mlp.register_forward_hook(lambda m, args, out: taken.append((args[0], out[0])))
    with host.using("a"), torch.no_grad():
        model(ids)
    (x, bare), (_, edited) = taken
    site = host.sites["3.mlp"]
    want = host.edits["a"].after(site.tensors("a"), x, bare.view_as(x), Call(site.places["a"]))
    torch.testing.assert_close(edited, want.reshape(edited.shape), rtol=1e-5, atol=1e-5)
    assert edited.shape == bare.shape and not torch.equal(edited, bare)


def test_a_sublayer_with_another_input_is_refused_by_name():
    """BERT's `output` takes the MLP's inner features, not the residual stream's."""
    model = tiny.model("bert", tiny.CAUSAL)
    host, _ = coverage.hung(model, "a", "output@0")
    with (
        host.using("a"),
        pytest.raises(inlay.InlayError, match=r"no adapter can hang at '0.output': bert.encoder.layer"),
    ):
        model(**tiny.inputs("bert", tiny.CAUSAL))


def test_a_place_that_no_forward_calls_is_said():
    """BART's decoder attends to an encoder only if it is given one's states."""
    model = tiny.model("bart", tiny.CAUSAL)
    host, _ = coverage.hung(model, "a", "cross_q,q")
    inputs = tiny.inputs("bart", tiny.CAUSAL)
    with host.using("a"), pytest.warns(UserWarning, match="'a' did nothing at some places; 4 of 8 places .* 0.cross_q"):
        model(inputs["input_ids"])


@pytest.mark.parametrize("kind", ["ctrl", "openai-gpt"])
def test_sublayers_that_are_sequences_or_give_lists_can_be_edited(kind):
    """CTRL's MLP is an `nn.Sequential`, which runs every child it has; OpenAI GPT's attention gives a list."""
    model, inputs = tiny.model(kind, tiny.CAUSAL), tiny.inputs(kind, tiny.CAUSAL)
    bare = tiny.logits(model, inputs)
    host, _ = coverage.hung(model, "a", "attn,mlp")
    with host.using("a"), torch.no_grad():
        assert torch.equal(tiny.logits(model, inputs), bare), "a fresh adapter changes nothing"
        for key, w in host.by_place("a").items():
            w["B"].data.fill_(1.0)
            assert not torch.equal(tiny.logits(model, inputs), bare), key
            w["B"].data.zero_()


# ---- never silently wrong --------------------------------------------------------------------------------------------
def test_rows_are_not_taken_for_streams():
    """Gemma 3n's blocks take (4, B, T, D): with four rows, the first axis is as long as the batch."""
    model = tiny.model("gemma3n_text", tiny.CAUSAL)
    host = inlay.attach(model)
    host.add("a", inlay.method("series").make(size=4), at="block@1", seed=0)
    ids = tiny.inputs("gemma3n_text", tiny.CAUSAL, rows=4)["input_ids"]
    with (
        host.using("a", None, "a", None),
        pytest.raises(inlay.InlayError, match="rows of the batch cannot be told apart"),
    ):
        model(ids)


def test_a_weight_of_several_layers_is_not_merged_into():
    """Zamba's attention layers share their weights; an adapter in one of them has no weight of its own to go to."""
    model = tiny.model("zamba", tiny.CAUSAL)
    host, _ = coverage.hung(model, "a", "q")
    generator = torch.Generator().manual_seed(0)
    for p in host.parameters("a"):
        p.data.normal_(generator=generator)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(inlay.InlayError, match="is one weight with .*; keep it as an adapter"):
        inlay.merge(host, "a")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_without_a_role_are_an_error_that_says_where_it_is():
    with pytest.raises(inlay.InlayError, match="'o@0' selects layers of 'o', which exists in layers 3 only"):
        hung("qwen3_next", "o@0")
