"""Other assumptions about neighbours: met by what is installed, and what happens where one fails."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import inlay.compat.torch as compat_torch
from inlay.compat import accelerate, transformers, trl
from inlay.compat import peft as compat_peft
from inlay.compat.source import has_body
from inlay.core.errors import InlayError
from tests.laws.zoo import base


# ---- transformers ----------------------------------------------------------------------------------------------------
def test_attention_is_registered_and_taken_away_again():
    from transformers import AttentionInterface, AttentionMaskInterface

    model = base("llama")
    before = transformers.attention_name(model.config)
    transformers.register_attention("inlay-test", lambda *a: None, lambda *a: None)
    assert "inlay-test" in AttentionInterface() and "inlay-test" in AttentionMaskInterface()
    transformers.set_attention_name(model.config, "inlay-test")
    assert transformers.attention_name(model.config) == "inlay-test"
    transformers.set_attention_name(model.config, before)
    transformers.unregister_attention("inlay-test")
    assert "inlay-test" not in AttentionInterface() and "inlay-test" not in AttentionMaskInterface()


@pytest.mark.parametrize("wraps", [True, False])
def test_a_blocks_own_forward_is_found_whether_or_not_it_is_wrapped(wraps, monkeypatch):
    """From 5.23 on checkpointing wraps `forward`, before that it sat in `__call__`."""
    import functools

    import transformers.modeling_layers as layers

    class Layer(torch.nn.Module):
        if wraps:

            def __init_subclass__(cls, **kwargs):
                own = cls.forward
                cls.forward = functools.wraps(own)(lambda self, *a: "checkpointed")

    monkeypatch.setattr(layers, "GradientCheckpointingLayer", Layer)

    class Block(Layer):
        def forward(self):
            return "own"

    assert transformers.own_forward(Block())(None) == "own"


def test_the_installed_blocks_own_forward_does_not_checkpoint():
    model = base("llama").train()
    model.gradient_checkpointing_enable()
    block, called = model.model.layers[0], []
    transformers.set_checkpoint_function(block, lambda function, *args: called.append(1) or function(*args))
    x = torch.randn(1, 3, 32, requires_grad=True)
    position = model.model.rotary_emb(x, torch.arange(3)[None])
    transformers.own_forward(block)(block, x, position_embeddings=position)
    assert not called
    block(x, position_embeddings=position)
    assert called == [1]


def test_a_function_is_known_by_its_statements():
    def doubled(x):
        """Twice."""
        return 2 * x  # a comment

    assert has_body(doubled, "return 2 * x") and not has_body(doubled, "return x * 2") and not has_body(len, "pass")


# ---- torch -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_has_its_gradient_without_the_private_operator_too(dtype, monkeypatch):
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, dtype=torch.float64)
    p = scores.softmax(-1)
    p.backward(grad)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for present in (True, False):
        if not present:
            monkeypatch.delattr(torch, "_softmax_backward_data")
        got = compat_torch.softmax_backward(grad.to(dtype), p.detach().to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got, scores.grad.to(dtype), **near)


def test_transforms_are_seen_and_a_torch_that_does_not_tell_counts_as_one(monkeypatch):
    assert not compat_torch.observed()
    assert torch.vmap(lambda x: x + compat_torch.observed())(torch.zeros(2)).tolist() == [1, 1]
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    assert compat_torch.observed()


def test_onednn_with_other_arguments_or_numbers_is_not_used(monkeypatch):
    found = compat_torch.has_onednn_linear.__wrapped__
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert found()
    monkeypatch.setattr(compat_torch, "onednn_linear", lambda x, W, b: x @ W.t())
    assert not found(), "the bias is lost"

    def other(x, W, b):
        raise TypeError("unexpected argument")

    monkeypatch.setattr(compat_torch, "onednn_linear", other)
    assert not found()


# ---- optional libraries ----------------------------------------------------------------------------------------------
def test_peft_models_and_trl_arguments_are_told_from_others():
    peft = pytest.importorskip("peft")
    model = base("llama")
    assert compat_peft.base_model(model) is model and not compat_peft.has_virtual_tokens(model)
    worn = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert compat_peft.base_model(worn) is model and not compat_peft.has_virtual_tokens(worn)
    kind = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert compat_peft.has_virtual_tokens(peft.get_peft_model(base("llama"), kind))
    assert not trl.is_trl(SimpleNamespace())
    assert trl.is_trl(type("SFTConfig", (), {"__module__": "trl.trainer.sft_config"})())


def test_the_fields_that_trl_reads_are_given():
    from inlay.engine.trainer import TokenOutput

    assert set(TokenOutput.__dataclass_fields__) == set(trl.TOKEN_OUTPUTS)


def test_accelerates_launcher_is_heard(monkeypatch):
    for name in (accelerate.FSDP, *accelerate.OTHERS):
        monkeypatch.delenv(name, raising=False)
    assert not accelerate.asked()
    monkeypatch.setenv(accelerate.FSDP, "true")
    assert accelerate.asked() == {accelerate.FSDP}


def test_a_harness_whose_methods_have_other_names_is_refused(monkeypatch):
    """The base's own would be evaluated, without its adapter."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from inlay.compat import lm_eval

    lm_eval.check_harness()
    monkeypatch.delattr(HFLM, "_model_call")
    with pytest.raises(InlayError, match="has no HFLM._model_call"):
        lm_eval.check_harness()


def test_gradios_keywords_for_looks_may_be_missing_and_others_may_not(monkeypatch):
    from inlay.compat import gradio

    def mount_gradio_app(app, blocks, path, theme=None):
        return app, blocks, path, theme

    fake = SimpleNamespace(mount_gradio_app=mount_gradio_app, __version__="6.0")
    monkeypatch.setitem(sys.modules, "gradio", fake)
    assert gradio.mount(1, 2, "", theme=3, run_history=False) == (1, 2, "", 3)
    with pytest.raises(InlayError, match="does not know 'css'"):
        gradio.mount(1, 2, "", css="")
