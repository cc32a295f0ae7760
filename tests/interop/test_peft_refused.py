"""What a PEFT folder may hold and Inlay has not is refused by name, and leaves the model as it was."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.core.errors import InlayError
from inlay.interop import formats
from inlay.interop import peft as ours
from tests.interop.peers import attach, base, close, edit_config, host_logits, loaded, logits, saved

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def refused(folder: Path, pattern: str, family: str = "llama") -> None:
    """Reading raises, and leaves no trace."""
    host = attach(family)
    with pytest.raises(InlayError, match=pattern), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.read(host, folder, "a")
    assert not host.edits and not host.sites and torch.equal(logits(host.model), logits(base(family)))


# ---- refusals on reading ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"target_parameters": ["a.b"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"some_new_field": 3}, "some_new_field=3"),
        ({"peft_type": "OFT"}, "unknown peft_type 'OFT'"),
        ({"r": 5}, "have rank 2, but the config says 5"),
        ({"target_modules": ["q_proj"]}, "does not name"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "has no tensors for it"),
        ({"use_dora": True}, "wanted"),
        ({"target_modules": "*q_proj"}, "not a regular expression"),
        ({"peft_type": "LOHA"}, "does not know the tensors|no counterpart"),
    ],
)
def test_settings_refused(fields, why, tmp_path):
    saved(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path)
    edit_config(tmp_path, **fields)
    refused(tmp_path, why)


def test_strange_or_missing_tensors(tmp_path):
    saved(peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for tensors, why in (
        (whole | {"base_model.model.model.norm.weight": torch.ones(32)}, "does not know the tensors"),
        ({k: v for k, v in whole.items() if k != one}, "wanted"),
        ({k: v for k, v in whole.items() if "layers.1" not in k}, "has no tensors for it"),
        ({k.replace("layers.1", "layers.7"): v for k, v in whole.items()}, "no module 'model.layers.7"),
        (whole | {one: torch.zeros(31, 2)}, "wanted"),
        ({}, "holds no LORA tensors"),
    ):
        save_file(tensors, file)
        refused(tmp_path, why)
    file.write_bytes(b"not a safetensors file")
    refused(tmp_path, "not a readable safetensors")
    file.unlink()
    refused(tmp_path, "has none of")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(tmp_path, "not valid JSON")


def test_training_only_settings_are_told(tmp_path):
    saved(peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], rank_dropout=0.1), tmp_path)
    with pytest.warns(UserWarning, match="rank_dropout=0.1 acts in training only"):
        ours.read(attach("llama"), tmp_path)


def test_prefix_needs_all_layers_and_finished_keys(tmp_path):
    saved(peft.PrefixTuningConfig(num_virtual_tokens=3), tmp_path)
    edit_config(tmp_path, num_layers=1)
    refused(tmp_path, "is not 2 x 1 layers")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            head_dim=8,
        )
    )
    edit_config(tmp_path, num_layers=2)
    with pytest.raises(InlayError, match="normalises keys"):
        ours.read(inlay.attach(qwen), tmp_path)


def test_prefix_with_encoder_is_folded(tmp_path):
    host = attach("llama")
    host.add("a", inlay.method("prefix").make(tokens=3, reparameterise=True, hidden=16, std=1.0), seed=0)
    ours.write(host, "a", tmp_path)
    close(host_logits(host, "a"), loaded(tmp_path), "prefix with encoder", "llama", "Inlay to PEFT")


# ---- pickles ---------------------------------------------------------------------------------------------------------
class Trap:
    """Unpickling this would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_old_bin_is_read_and_a_pickle_with_code_is_not(tmp_path):
    theirs = saved(peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    host = attach("llama")
    ours.read(host, tmp_path, "a")
    assert torch.equal(host_logits(host, "a"), host_logits(host, "a"))
    close(host_logits(host, "a"), theirs, "LoRA (.bin)", "llama", "PEFT to Inlay")
    torch.save(tensors | {"x": Trap(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "It was not run")
    assert not (tmp_path / "ran").exists()


def test_detect(tmp_path):
    saved(peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "a" / "inner")
    assert formats.detect(tmp_path / "a" / "inner") == "peft"
    with pytest.raises(InlayError, match="sub-folders do: inner"):
        formats.detect(tmp_path / "a")
    with pytest.raises(InlayError, match="not a folder"):
        formats.detect(tmp_path / "nothing")
    host = attach("llama")
    assert formats.read(host, tmp_path / "a" / "inner") == "inner"
    assert formats.read(host, tmp_path / "a" / "inner") == "inner_2"
    inlay.save(host, "inner", tmp_path / "own")
    assert formats.detect(tmp_path / "own") == "inlay"
    formats.read(host, tmp_path / "own", "again")
    assert torch.equal(host_logits(host, "inner"), host_logits(host, "again"))
