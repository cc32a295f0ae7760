"""`train(settings)`: from files and recipes to an adapter that loads again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.core.files import sha256
from inlay.train import TrainSettings, read_recipe, train
from tests.train.tiny import copy, same

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,:?#\nBIRVW"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and its tokenizer (a token a letter), as `load_base` reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("base")
    words = ["<pad>", "<s>", "</s>", "<unk>", *ALPHABET]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    rows = [
        {"instruction": f"double {i}", "input": "", "output": f"it is {2 * i}", "answer": str(2 * i)} for i in range(20)
    ]
    path.write_text(json.dumps(rows))
    return path


def recipe(tmp_path, folder, data, **changes) -> TrainSettings:
    values = {
        "protocol": "clean",
        "val_size": 4,
        "task": "null",
        "cutoff": 256,
        "file": data,
        "steps": 6,
        "dropout": 0.1,
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
model: {model}
method: lora
settings: {{rank: 2, dropout: {dropout}}}
at: q@0,v@0
name: twice
out: {out}
data: {{task: {task}, train_file: {file}, val_size: {val_size}, protocol: {protocol}, cutoff: {cutoff}}}
optim: {{batch_size: 4, micro_batch: 2, steps: {steps}, lr: 1e-2, warmup: 0.2}}
run: {{eval_every: 2, save_every: 3, progress: false, loggers: none, device: cpu}}
""".format(model=folder, out=tmp_path / "run", **values)
    )
    return read_recipe(path, TrainSettings)


def test_from_recipe_to_adapter(tmp_path, folder, data):
    s = recipe(tmp_path, folder, data)
    result = train(s)
    assert result.steps == 6 and result.final == "best" and result.adapter == tmp_path / "run" / "adapter"
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["files"] == [{"path": str(data), "sha256": sha256(data), "bytes": data.stat().st_size}]
    assert (about["protocol"], about["loss_on"], about["template"]["name"]) == ("clean", "answer", "alpaca")
    assert (
        about["train"]["examples"] == 16 and about["validation"]["examples"] == 4 and about["train"]["truncated"] == 0
    )
    assert about["train"]["learned_tokens"] < about["train"]["tokens"] / 2
    model, _ = inlay.load_base(folder, device="cpu")
    host = inlay.attach(model)
    assert inlay.load(host, result.adapter) == "twice" and set(host.by_place("twice")) == {"0.q", "0.v"}
    told = json.loads((result.adapter / "adapter.json").read_text())["about"]
    assert told["training"]["data"]["protocol"] == "clean" and told["data"]["template"] == about["template"]


def test_protocol_decides_the_loss(tmp_path, folder, data):
    train(recipe(tmp_path, folder, data, protocol="published", cutoff=300))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (
        about["loss_on"] == "all"
        and about["train"]["learned_tokens"] == about["train"]["tokens"] - about["train"]["examples"]
    )


def test_truncation_is_counted(tmp_path, folder, data):
    train(recipe(tmp_path, folder, data, protocol="published", cutoff=40))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["train"]["truncated"] == 16 and about["train"]["longest"] == 40


def test_repeatable_and_resumable(tmp_path, folder, data):
    s = recipe(tmp_path, folder, data)
    adapters = []
    for out, resume in (("a", False), ("b", False), ("c", tmp_path / "a" / "checkpoint-3")):
        torch.manual_seed(len(adapters))
        result = train(replace(s, out=tmp_path / out), resume=resume)
        host = inlay.attach(inlay.load_base(folder, device="cpu")[0])
        inlay.load(host, result.adapter)
        adapters.append(copy(host, "twice"))
    assert same(adapters[0], adapters[1]) and same(adapters[0], adapters[2])


def test_a_task_that_leaks_says_so(tmp_path, folder, data):
    with pytest.warns(UserWarning, match="is not the published train file of math_10k"):
        train(recipe(tmp_path, folder, data, task="math_10k"))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["task"] == "math_10k" and "AddSub" in about["leaks"] and "inlay.tasks.leaks" in about["leaks"]


def test_validation_file(tmp_path, folder, data):
    s = recipe(tmp_path, folder, data, val_size=0)
    train(replace(s, data=replace(s.data, val_file=data)))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["validation"]["examples"] == about["train"]["examples"] == 20 and len(about["files"]) == 2
    with pytest.raises(InlayError, match="val_file or val_size, not both"):
        train(replace(s, out=tmp_path / "x", data=replace(s.data, val_file=data, val_size=2)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "lorra"}, "unknown method 'lorra'; there is: "),
        ({"settings": {"ranks": 3}}, "method 'lora' has no setting 'ranks'"),
        ({"at": "query"}, "unknown role or module pattern"),
        ({"model": "/no/such/base"}, "cannot load the base '/no/such/base'"),
    ],
)
def test_what_does_not_exist(tmp_path, folder, data, changes, match):
    with pytest.raises(InlayError, match=match):
        train(replace(recipe(tmp_path, folder, data), **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "graphics"])
def test_a_device_that_is_not_there(tmp_path, folder, data, device):
    s = recipe(tmp_path, folder, data)
    with pytest.raises(InlayError, match=f"cannot compute on device '{device}': .*Leave device out, or say cpu"):
        train(replace(s, run=replace(s.run, device=device)))
    assert not (tmp_path / "run").exists()


def test_the_folder_is_looked_at_before_the_base_is_loaded(tmp_path, folder, data, monkeypatch):
    s = recipe(tmp_path, folder, data)
    train(s)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("inlay.models.base.load_base", None)
    with pytest.raises(InlayError, match="holds a run with these settings"):
        train(s)
    with pytest.raises(InlayError, match="seed: 42 before, 1 now"):
        train(replace(s, run=replace(s.run, seed=1)), resume=True)
    with pytest.raises(InlayError, match="file is a file; choose another folder"):
        train(replace(s, out=tmp_path / "file"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_file": None}, "nothing to train on"),
        ({"train_file": Path("/no/file.json")}, "no file"),
        ({"val_size": 20}, "leaves nothing to train on: there are 20 records"),
        ({"protocol": "alpaca"}, "unknown protocol 'alpaca'; there is: clean, published"),
        ({"task": "gsm9k"}, "unknown task 'gsm9k'"),
    ],
)
def test_data_that_does_not_exist(tmp_path, folder, data, changes, match):
    s = recipe(tmp_path, folder, data)
    with pytest.raises(InlayError, match=match):
        train(replace(s, data=replace(s.data, **changes)))


# ---- rows that cannot be learned -------------------------------------------------------------------------------------
def test_records_without_an_output_are_all_named_or_left_out(tmp_path):
    from inlay.train import DataSettings
    from inlay.train.run import read

    rows = [{"instruction": f"say {i}", "output": f"ok {i}"} for i in range(30)]
    rows[7] = rows[23] = {"instruction": "Write a poem.", "output": " "}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(InlayError, match=r"2 of 30 records have an empty output.*record 7, 23, counted from 0.*skip"):
        read(DataSettings(train_file=file), 0)
    with pytest.warns(UserWarning, match="2 of 30 records left out"):
        kept, _ = read(DataSettings(train_file=file, empty_outputs="skip"), 0)
    assert [r.output for r in kept] == [r["output"] for r in rows if r["output"].strip()]
    assert len(read(DataSettings(train_file=file, protocol="published"), 0)[0]) == 30  # prompts are learned, too
