"""HF PEFT folders: equal logits both ways, equal bits on a round trip, for every method PEFT and Inlay share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.interop import peft as ours
from tests.interop.peers import LINEARS, ROLES, attach, base, close, differs, host_logits, logits, shake

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ("llama", "gptj", "bloom", "gpt2")
LINEAR_ONLY = ("llama", "gptj", "bloom")


@dataclass(frozen=True)
class Case:
    """One method: PEFT's config, and ours."""

    config: Callable[..., Any]
    method: str
    settings: dict[str, Any]
    families: tuple[str, ...] = ALL
    around: float = 0.0
    targets: bool = True
    at: str | None = None
    same_file: bool = True
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "LoRA": Case(lambda **k: peft.LoraConfig(r=4, lora_alpha=8, **k), "lora", {"rank": 4, "alpha": 8.0}),
    "rsLoRA": Case(
        lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **k), "rslora", {"rank": 4, "alpha": 6.0}
    ),
    "DoRA": Case(lambda **k: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, **k), "dora", {"rank": 4, "alpha": 8.0}),
    "AdaLoRA": Case(
        lambda **k: peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=10, total_step=10, **k),
        "adalora",
        {"rank": 5, "alpha": 10.0},
    ),
    "LoHa": Case(lambda **k: peft.LoHaConfig(r=3, alpha=6, **k), "loha", {"rank": 3, "alpha": 6.0}, LINEAR_ONLY),
    "LoKr": Case(lambda **k: peft.LoKrConfig(r=2, alpha=6, **k), "lokr", {"rank": 2, "alpha": 6.0}, LINEAR_ONLY),
    "LoKr, both factors decomposed": Case(
        lambda **k: peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=4, **k),
        "lokr",
        {"rank": 1, "alpha": 2.0, "decompose_both": True, "factor": 4},
        LINEAR_ONLY,
    ),
    "LoKr, whole factors (KronA)": Case(
        lambda **k: peft.LoKrConfig(r=64, alpha=64, **k), "krona", {"rank": 4, "alpha": 4.0}, LINEAR_ONLY
    ),
    "VeRA": Case(lambda **k: peft.VeraConfig(r=8, **k), "vera", {"rank": 8}),
    "VeRA, projections not saved": Case(
        lambda **k: peft.VeraConfig(r=8, save_projection=False, projection_prng_key=3, **k),
        "vera",
        {"rank": 8, "projection_seed": 3},
        same_file=False,
    ),
    "RoAd-1": Case(lambda **k: peft.RoadConfig(variant="road_1", group_size=8, **k), "road1", {}, LINEAR_ONLY, 0.5),
    "RoAd-2": Case(
        lambda **k: peft.RoadConfig(variant="road_2", group_size=16, **k),
        "road2",
        {"pairing": "half", "group": 16},
        LINEAR_ONLY,
        0.5,
    ),
    "RoAd-4": Case(
        lambda **k: peft.RoadConfig(variant="road_4", group_size=8, **k),
        "road4",
        {"pairing": "half", "group": 8},
        LINEAR_ONLY,
        0.5,
    ),
    "prefix": Case(
        lambda **k: peft.PrefixTuningConfig(num_virtual_tokens=5, **k), "prefix", {"tokens": 5}, targets=False, at="k,v"
    ),
    "prompt": Case(
        lambda **k: peft.PromptTuningConfig(num_virtual_tokens=4, **k),
        "prompt",
        {"tokens": 4},
        targets=False,
        at="embed",
    ),
    "P-tuning": Case(
        lambda **k: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **k),
        "ptuning",
        {"tokens": 4, "hidden": 16},
        targets=False,
        at="embed",
        same_file=False,
    ),
}
RUNS = [pytest.param(name, family, id=f"{name}-{family}") for name, case in CASES.items() for family in case.families]


def made_by_peft(name: str, family: str, folder: Any) -> torch.Tensor:
    """A random adapter of PEFT's in a folder, and what PEFT says with it."""
    case = CASES[name]
    torch.manual_seed(11)
    more = {"target_modules": LINEARS[family]} if case.targets else {}
    model = peft.get_peft_model(base(family), case.config(task_type="CAUSAL_LM", **more)).eval()
    shake((p for p in model.parameters() if p.requires_grad), case.around)
    model.save_pretrained(folder)
    said = logits(model)
    differs(said, family)
    return said


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_read(name, family, tmp_path):
    theirs = made_by_peft(name, family, tmp_path)
    host = attach(family)
    assert ours.read(host, tmp_path, "a") == "a"
    close(host_logits(host, "a"), theirs, name, family, "PEFT to Inlay")
    assert torch.equal(logits(host.detach()), logits(base(family)))


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_write(name, family, tmp_path):
    case = CASES[name]
    host = attach(family)
    torch.manual_seed(5)
    host.add("a", inlay.method(case.method).make(**case.settings), at=case.at or ROLES[family], seed=1)
    shake(host.parameters("a"), case.around)
    said = host_logits(host, "a")
    differs(said, family)
    ours.write(host, "a", tmp_path)
    model = peft.PeftModel.from_pretrained(base(family), tmp_path).eval()
    close(said, logits(model), name, family, "Inlay to PEFT")
    again = attach(family)
    ours.read(again, tmp_path, "b")
    if name != "P-tuning" and not name.startswith("RoAd-1"):
        mine, back = host.tensors("a"), again.tensors("b")
        assert mine.keys() == back.keys() and all(torch.equal(mine[k], back[k]) for k in mine)


@pytest.mark.parametrize(("name", "family"), [r for r in RUNS if CASES[r.values[0]].same_file])
def test_round_trip_is_bit_equal(name, family, tmp_path):
    made_by_peft(name, family, tmp_path / "theirs")
    host = attach(family)
    ours.read(host, tmp_path / "theirs", "a")
    ours.write(host, "a", tmp_path / "ours")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---- (IA)^3: the feed-forward vector scales the input ----------------------------------------------------------------
IA3 = {
    "llama": (["k_proj", "v_proj", "down_proj"], "k,v,down", ["down_proj"]),
    "gptj": (["k_proj", "fc_out"], "k,down", ["fc_out"]),
    "bloom": (["query_key_value", "dense_4h_to_h"], "qkv,down", ["dense_4h_to_h"]),
    "gpt2": (["c_attn", "mlp.c_proj"], "qkv,down", ["mlp.c_proj"]),
}


@pytest.mark.parametrize("family", ALL)
def test_ia3(family, tmp_path):
    targets, roles, forward = IA3[family]
    torch.manual_seed(2)
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=forward)
    model = peft.get_peft_model(base(family), config).eval()
    shake((p for p in model.parameters() if p.requires_grad), 1.0, 0.5)
    model.save_pretrained(tmp_path / "theirs")
    host = attach(family)
    ours.read(host, tmp_path / "theirs", "a")
    differs(logits(model), family)
    close(host_logits(host, "a"), logits(model), "(IA)^3", family, "PEFT to Inlay")
    host.add("b", inlay.method("ia3").make(), at=roles)
    shake(host.parameters("b"), 1.0, 0.5)
    ours.write(host, "b", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    close(host_logits(host, "b"), logits(back), "(IA)^3", family, "Inlay to PEFT")


# ---- PiSSA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_pissa(family, tmp_path):
    torch.manual_seed(2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=LINEARS[family]
    )
    model = peft.get_peft_model(base(family), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    theirs = logits(model)
    differs(theirs, family)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    host = attach(family)
    for kind in ("raw", "converted"):
        ours.read(host, tmp_path / kind, kind)
        close(host_logits(host, kind), theirs, f"PiSSA ({kind})", family, "PEFT to Inlay")
    assert host.edits["raw"].init == "pissa" and host.edits["converted"].rank == 8
    assert ours.write(host, "raw", tmp_path / "ours").notes
    back = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    close(host_logits(host, "raw"), logits(back), "PiSSA as LoRA", family, "Inlay to PEFT")
