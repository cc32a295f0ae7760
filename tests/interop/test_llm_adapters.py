"""LLM-Adapters folders, written here after the fork's schema, against its formulas computed here by plain hooks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from inlay.core.errors import InlayError
from inlay.interop import formats
from tests.interop.peers import SIZES, attach, base, close, differs, host_logits, ids, logits

SIZES.setdefault(
    "opt",
    {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
)
SERIES = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "bloom": ["dense_h_to_4h", "dense_4h_to_h"],
    "gptj": ["fc_in", "fc_out"],
    "opt": ["fc1", "fc2"],
}
BEFORE = ("gate_proj", "up_proj", "dense_h_to_4h", "fc_in", "fc1")
PARALLEL = {
    "llama": ["q_proj", "up_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gptj": ["v_proj", "fc_in"],
    "opt": ["q_proj", "fc2"],
}
BOTTLENECK = {
    "peft_type": "BOTTLENECK",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": "x",
    "bottleneck_size": 6,
    "non_linearity": "tanh",
    "adapter_dropout": 0.0,
    "scaling": 1.0,
    "init_weights": "bert",
    "use_parallel_adapter": False,
    "use_adapterp": False,
    "bias": "none",
    "modules_to_save": None,
}
ACTS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, "swish": nn.functional.silu}


def store(folder: Path, config: dict, tensors: dict) -> None:
    """The fork's two files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    torch.save(tensors, folder / "adapter_model.bin")


def linears(model: nn.Module, endings: list[str]) -> dict[str, nn.Module]:
    """The fork's target rule: names that end so."""
    return {p: m for p, m in model.named_modules() if any(p.endswith(e) for e in endings) and not list(m.children())}


def bottleneck(model: nn.Module, endings: list[str], config: dict) -> dict:
    """Hook the fork's formulas onto a model; returns the tensors of its file."""
    act, parallel, tensors = ACTS[config["non_linearity"]], config["use_parallel_adapter"], {}
    for path, layer in linears(model, endings).items():
        before = path.rsplit(".", 1)[-1] in BEFORE and not parallel
        wide_in = layer.in_features if before or parallel else layer.out_features
        wide_out = layer.in_features if before else layer.out_features
        down, up = (
            0.3 * torch.randn(config["bottleneck_size"], wide_in),
            0.3 * torch.randn(wide_out, config["bottleneck_size"]),
        )
        scale = config["scaling"]
        key = f"base_model.model.{path}.adapter_"
        tensors |= {f"{key}down.weight": down, f"{key}up.weight": up}
        if scale == "learned":
            scale = torch.randn(1)
            tensors[f"{key}scaling"] = scale

        def f(z, down=down, up=up, scale=scale):
            return scale * (act(z @ down.T) @ up.T)

        if before:
            layer.register_forward_pre_hook(lambda m, args, f=f: (args[0] + f(args[0]),))
        elif parallel:
            layer.register_forward_hook(lambda m, args, out, f=f: out + f(args[0]))
        else:
            layer.register_forward_hook(lambda m, args, out, f=f: out + f(out))
    return tensors


@pytest.mark.parametrize("family", SERIES)
@pytest.mark.parametrize("kind", ["series (AdapterH)", "series (AdapterP)", "parallel"])
def test_bottleneck(kind, family, tmp_path):
    torch.manual_seed(3)
    endings = PARALLEL[family] if kind == "parallel" else SERIES[family] if "H" in kind else SERIES[family][-1:]
    scaling, act = {
        "series (AdapterH)": (1.0, "tanh"),
        "series (AdapterP)": ("learned", "relu"),
        "parallel": (2.5, "swish"),
    }[kind]
    config = BOTTLENECK | {
        "target_modules": endings,
        "scaling": scaling,
        "non_linearity": act,
        "use_parallel_adapter": kind == "parallel",
    }
    model = base(family)
    store(tmp_path, config, bottleneck(model, endings, config))
    assert formats.detect(tmp_path) == "llm-adapters"
    host = attach(family)
    formats.read(host, tmp_path, "a")
    differs(logits(model), family)
    close(host_logits(host, "a"), logits(model), kind, family, "LLM-Adapters to Inlay")


LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": "x",
    "r": 4,
    "lora_alpha": 10,
    "lora_dropout": None,
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "merge_weights": False,
    "modules_to_save": None,
}


@pytest.mark.parametrize(
    ("family", "endings"), [("llama", ["q_proj", "up_proj"]), ("llama", ["proj"]), ("bloom", ["query_key_value"])]
)
def test_lora(family, endings, tmp_path):
    torch.manual_seed(3)
    model, tensors = base(family), {}
    for path, layer in linears(model, endings).items():
        A, B = 0.2 * torch.randn(4, layer.in_features), 0.2 * torch.randn(layer.out_features, 4)
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
        layer.register_forward_hook(lambda m, args, out, A=A, B=B: out + 2.5 * (args[0] @ A.T @ B.T))
    differs(logits(model), family)
    store(tmp_path, LORA | {"target_modules": endings}, tensors)
    host = attach(family)
    formats.read(host, tmp_path, "a")
    close(host_logits(host, "a"), logits(model), f"LoRA at {','.join(endings)}", family, "LLM-Adapters to Inlay")


def fused(family: str) -> tuple[nn.Module, dict]:
    """The fork's merged linear: enabled thirds [on, off, on], a grouped 1 x 1 convolution for B."""
    torch.manual_seed(3)
    model, tensors = base(family), {}
    for path, layer in linears(model, ["c_attn", "query_key_value"]).items():
        width, out = 32, 96
        A, B = 0.2 * torch.randn(8, width), 0.2 * torch.randn(64, 4, 1)
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}

        def hook(m, args, y, A=A, B=B, out=out):
            after = nn.functional.conv1d((args[0] @ A.T).transpose(-1, -2), B, groups=2).transpose(-1, -2)
            result = torch.zeros(*after.shape[:-1], out)
            result[..., torch.tensor([True, False, True]).repeat_interleave(out // 3)] = after
            return y + 2.5 * result

        layer.register_forward_hook(hook)
    return model, tensors


def test_fused_lora(tmp_path):
    model, tensors = fused("gpt2")
    differs(logits(model), "gpt2")
    config = LORA | {"enable_lora": [True, False, True], "fan_in_fan_out": True}
    store(tmp_path, config | {"target_modules": ["c_attn"]}, tensors)
    host = attach("gpt2")
    formats.read(host, tmp_path, "a")
    close(host_logits(host, "a"), logits(model), "LoRA, fused", "gpt2", "LLM-Adapters to Inlay")
    _, tensors = fused("bloom")
    store(tmp_path, config | {"target_modules": ["query_key_value"]}, tensors)
    host = attach("bloom")
    with pytest.raises(InlayError, match="never did what its config says"):
        formats.read(host, tmp_path, "a")
    assert not host.edits


TOKENS = {
    "num_virtual_tokens": 4,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "inference_mode": True,
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("family", ["gptj", "opt", "gpt2"])
def test_prefix(family, tmp_path):
    from transformers import DynamicCache

    torch.manual_seed(3)
    table, cache = torch.randn(4, 2 * 2 * 32), DynamicCache()
    for i, (k, v) in enumerate(table.view(4, 2, 2, 4, 8).permute(1, 2, 3, 0, 4)):
        cache.update(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), i)
    config = TOKENS | {
        "peft_type": "PREFIX_TUNING",
        "token_dim": 32,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
        "prefix_projection": False,
    }
    store(tmp_path, config, {"prompt_embeddings": table})
    with torch.no_grad():
        theirs = base(family)(ids(), past_key_values=cache, attention_mask=torch.ones(3, 13, dtype=torch.long)).logits
    differs(theirs, family)
    host = attach(family)
    formats.read(host, tmp_path, "a")
    close(host_logits(host, "a"), theirs, "prefix", family, "LLM-Adapters to Inlay")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_prompt(kind, family, tmp_path):
    torch.manual_seed(3)
    table = torch.randn(4, 32)
    config = TOKENS | {"peft_type": kind, "token_dim": 32, "num_attention_heads": 4}
    config |= (
        {"prompt_tuning_init": "RANDOM"}
        if kind == "PROMPT_TUNING"
        else {
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": 8,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        }
    )
    store(tmp_path, config, {"prompt_embeddings": table})
    model = base(family)
    with torch.no_grad():
        x = torch.cat([table.expand(3, -1, -1), model.get_input_embeddings()(ids())], 1)
        theirs = model(inputs_embeds=x).logits[:, 4:]
    differs(theirs, family)
    host = attach(family)
    formats.read(host, tmp_path, "a")
    close(host_logits(host, "a"), theirs, kind.lower().replace("_", "-"), family, "LLM-Adapters to Inlay")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"bias": "adapter_only"}, "bias='adapter_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"non_linearity": "gelu_new"}, "unknown non_linearity"),
        ({"bottleneck_size": 7}, "adapter_down has width 6"),
        ({"scaling": "learned"}, "wanted"),
        ({"target_modules": ["up_proj"]}, "does not name"),
        ({"target_modules": ["up_proj", "down_proj", "gate_proj"]}, "has no tensors for it"),
        ({"peft_type": "SOMETHING"}, "unknown peft_type"),
    ],
)
def test_refused(fields, why, tmp_path):
    config = BOTTLENECK | {"target_modules": ["up_proj", "down_proj"]}
    store(tmp_path, config | fields, bottleneck(base("llama"), ["up_proj", "down_proj"], config))
    host = attach("llama")
    with pytest.raises(InlayError, match=why):
        formats.read(host, tmp_path, "a")
    assert not host.edits and not host.sites


def test_series_at_attention_is_refused(tmp_path):
    config = BOTTLENECK | {"target_modules": ["o_proj"]}
    store(tmp_path, config, bottleneck(base("llama"), ["o_proj"], config))
    with pytest.raises(InlayError, match="no series wiring for 'o_proj'"):
        formats.read(attach("llama"), tmp_path)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    store(tmp_path / "a", BOTTLENECK | {"target_modules": ["up_proj"]}, {"x": Trap(tmp_path / "ran")})
    host = attach("llama")
    with pytest.raises(InlayError, match="It was not run"):
        formats.read(host, tmp_path / "a")
    assert not (tmp_path / "ran").exists() and not host.edits
    torch.save([1, 2], tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(InlayError, match="mapping of names to tensors"):
        formats.read(host, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"junk")
    with pytest.raises(InlayError, match="It was not run|not a readable"):
        formats.read(host, tmp_path / "a")
