"""`inlay convert --to vllm` in a real vLLM: rows of several adapters in one batch say what Inlay says with them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import inlay
from inlay.cli import main
from inlay.evaluate import slots
from inlay.evaluate.rows import GenerateSettings, Row
from inlay.evaluate.running import Running
from inlay.models.base import where

PYTHON = os.environ.get("INLAY_VLLM_PYTHON", "")
SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_says.py"
METHODS = {
    "lora": ({"rank": 4}, "q,k,v,o,gate,up,down"),
    "rslora": ({"rank": 8}, "q,v"),
    "loha": ({"rank": 2}, "q,v,up"),
    "lokr": ({"rank": 2}, "q,v"),
}
PROMPTS = ["Tom has 3 apples and buys 7 more.", "Where does the", "2 + 3 ="]
TOKENS = 12


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="INLAY_VLLM_PYTHON names no Python with vLLM")
def test_vllm_says_the_same(tmp_path):
    model, tokenizer = inlay.load_base("tiny-llama", "fp32", "cpu")
    host = inlay.attach(model)
    for i, (name, (settings, at)) in enumerate(METHODS.items()):
        host.add(name, inlay.method(name).make(**settings), at=at, seed=i)
        torch.manual_seed(i)
        for p in host.parameters(name):
            p.data.add_(0.1 * torch.randn_like(p))
        inlay.save(host, name, tmp_path / name)
        words = ["convert", tmp_path / name, tmp_path / f"{name}-vllm", "--model", "tiny-llama", "--to", "vllm"]
        assert main([str(w) for w in words]) == 0
    ranks = [json.loads((tmp_path / f"{n}-vllm" / "adapter_config.json").read_text())["r"] for n in METHODS]
    allowed = next(r for r in (8, 16, 32, 64, 128, 256, 512) if r >= max(ranks))

    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    names: list[str | None] = [None, *METHODS]
    folders = [n and str(tmp_path / f"{n}-vllm") for n in names]
    asked = {"folders": folders, "prompts": ids, "tokens": TOKENS, "rank": allowed}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [PYTHON, str(SCRIPT), where("tiny-llama"), str(tmp_path / "asked.json")],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER ")).split(" ", 1)[1])

    assert slots.serves(host)
    running = Running(host, tokenizer, 8, 256)
    running.ends = []
    settings = GenerateSettings(max_new_tokens=TOKENS)
    rows = [Row(0, own, (n,) if n else (), 0, TOKENS, settings, 0) for n in names for own in ids]
    running.waiting.extend(rows)
    with running.active():
        while running.busy:
            running.step()
    assert [r.tokens for r in rows] == [tokens for tokens, _ in theirs]
    for row, (_, logp) in zip(rows, theirs, strict=True):
        assert [s.logp for s in row.scores] == pytest.approx(logp, abs=1e-3)
    assert len({tuple(r.tokens) for r in rows}) > len(PROMPTS)
