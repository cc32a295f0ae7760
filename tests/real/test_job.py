"""The main job on the real base: plan, train, save, load, merge, export; killed, served, scored and measured when slow.

Adapters hang in the last blocks, so that a step costs a forward and the end of a backward.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.cli import main
from inlay.interop import formats
from inlay.models import real
from inlay.plan import plan
from inlay.train import DataSettings, OptimSettings, RunSettings, TrainSettings, checkpoint
from inlay.train import train as run_training
from tests.real.conftest import NAME, logits

FORM = real.CATALOGUE[NAME].form


def settings(out: Path, steps: int = 4, **run) -> TrainSettings:
    """LoRA in the last block, on generated sums."""
    return TrainSettings(
        model=NAME,
        method="lora",
        settings={"rank": 4},
        at="q,k,v,o,gate,up,down@29",
        name="sums",
        out=out,
        data=DataSettings(task="world-addsub", limit=4, protocol="clean"),
        optim=OptimSettings(batch_size=4, micro_batch=4, steps=steps, lr=2e-3, warmup=1),
        run=RunSettings(**{"seed": 0, "loggers": ("none",), "progress": False, "device": "cpu", "save_every": 0} | run),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of four steps over the same four examples."""
    if not real.installed(NAME):
        pytest.skip(f"{NAME} is not installed")
    out = tmp_path_factory.mktemp("real") / "run"
    run_training(settings(out))
    return out


def adapter(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def test_plan_host_and_peft_count_the_same(loaded, host):
    import copy

    from peft import LoraConfig, get_peft_model

    host.add("a", inlay.method("lora").make(rank=16), at="linear", seed=0)
    with torch.device("meta"):
        bare = type(loaded[0])(copy.deepcopy(loaded[0].config))
    theirs = get_peft_model(bare, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert plan(NAME, "lora", at="linear", settings={"rank": 16}).trainable == host.count("a") == count == 4_884_480
    assert plan(NAME).total == 134_515_008


def test_training_lowers_the_loss_and_says_what_the_weights_are(trained):
    losses = [
        json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0] < 5
    session = json.loads((trained / "environment.json").read_text())["sessions"][-1]
    base = json.loads((trained / "adapter" / "adapter.json").read_text())["base"]
    assert session["base_form"] == base["form"] == FORM and base["name"] == NAME


def test_loaded_merged_and_exported_it_gives_the_same_logits(loaded, trained, inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, _ = loaded
    bare = logits(model, inputs)
    host = inlay.attach(model)
    host.use(inlay.load(host, trained / "adapter"))
    want = logits(model, inputs)
    assert (want - bare).abs().max() > 1e-2
    formats.write(host, "sums", tmp_path / "peft")
    host.detach()
    assert torch.equal(logits(model, inputs), bare)

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(real.path(NAME)), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, inputs), want, rtol=0, atol=2e-4)

    assert main(["merge", str(trained / "adapter"), "--out", str(tmp_path / "merged")]) in (0, None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain, inputs), want, rtol=0, atol=2e-3)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.base_form == FORM


def test_a_small_evaluation_names_the_form(trained, tmp_path):
    flags = ["--tasks", "world-addsub", "--limit", "2", "--max-new-tokens", "4", "--bare", "--out", str(tmp_path)]
    assert main(["eval", "--model", NAME, "--adapters", str(trained / "adapter"), *flags]) in (0, None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(c["adapter"], c["n"]) for c in report["cells"]] == [("base", 2), ("run", 2)]
    assert report["settings"]["base_form"] == FORM and FORM in (tmp_path / "report.md").read_text()


# ---- slow: processes of their own ------------------------------------------------------------------------------------
def command(*words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, "-m", "inlay", *words], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bit_for_bit_where_it_would_have(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = (
        f"train --model {NAME} --method lora --rank 4 --at linear@28-29 --task world-addsub --limit 32 --steps 8 "
        "--batch-size 4 --micro-batch 4 --lr 1e-2 --warmup 2 --save-every 1 --loggers none --no-progress --seed 0 --out"
    ).split()
    process = command(*flags, str(run))
    while process.poll() is None and max(checkpoint.steps(run), default=0) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= max(checkpoint.steps(run)) < 8
    assert command(*flags, str(run), "--resume").wait(600) == 0
    assert command(*flags, str(whole)).wait(600) == 0
    ours, theirs = adapter(run), adapter(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_a_server_process_answers_with_base_and_adapter(trained, host, loaded):
    httpx = pytest.importorskip("httpx")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = command("serve", NAME, "--adapters", str(trained / "adapter"), "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        models = [m["id"] for m in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
        asked = {"prompt": "37 + 25 =", "max_tokens": 5, "temperature": 0}
        for name in models:
            answer = httpx.post(f"{url}/v1/completions", json=asked | {"model": name}, timeout=120).json()
            worn = None if name == NAME else inlay.load(host, trained / "adapter")
            host.use(worn)
            ids = loaded[1](asked["prompt"], return_tensors="pt")
            out = host.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert answer["choices"][0]["text"] == loaded[1].decode(out, skip_special_tokens=True), name
        assert len(models) == 2
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_its_knowledge_of_capitals_is_measured(tmp_path):
    capitals = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Nowhere": "Zzyzx"}
    rows = [
        {"id": k, "prompt": f"The capital of {k} is", "target": v, "relation": "capital"} for k, v in capitals.items()
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items, out = str(tmp_path / "items.jsonl"), tmp_path / "table"
    assert main(["know", "measure", "--model", NAME, "--items", items, "--out", str(out), "--no-cache"]) in (0, None)
    import pyarrow.parquet as pq

    table = pq.read_table(out / "table.parquet").to_pylist()
    distances = {row["id"]: row["tsd"] for row in table}
    assert max(distances[k] for k in ("France", "Japan", "Italy")) < distances["Nowhere"]
    assert json.loads((out / "table.json").read_text())["base_form"] == FORM
