"""Settings from flags and from recipes, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

import inlay
from inlay.core.errors import InlayError
from inlay.train.settings import (
    DataSettings,
    OptimSettings,
    RunSettings,
    TrainSettings,
    differences,
    identity,
    read_recipe,
    to_yaml,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read_recipe(path, TrainSettings)


def test_flags_and_recipe_agree(tmp_path):
    flags = "--model m --method lora --settings rank=8 dropout=5e-2 init=pissa rank_stabilised=true --at q,v@0-3"
    flags += " --task gsm8k --lr 1e-3 --loggers wandb tensorboard --warmup 0.1 --steps 7 --out runs/x"
    flags += " --dtype bf16 --gradient-checkpointing"
    typed = tyro.cli(TrainSettings, args=flags.split(), config=(tyro.conf.OmitArgPrefixes,))
    read = recipe(
        tmp_path,
        "model: m\nsettings: {rank: 8, dropout: 5e-2, init: pissa, rank_stabilised: true}\nat: q,v@0-3\nout: runs/x\n"
        "data: {task: gsm8k}\noptim: {lr: 1e-3, warmup: 0.1, steps: 7}\n"
        "run: {loggers: [wandb, tensorboard], dtype: bf16, gradient_checkpointing: true}\n",
    )
    assert typed == read
    assert (
        read.settings == {"rank": 8, "dropout": 0.05, "init": "pissa", "rank_stabilised": True}
        and read.optim.lr == 1e-3
    )


def test_flags_override_a_recipe(tmp_path):
    read = recipe(tmp_path, "model: m\nout: runs/x\noptim: {lr: 0.5, batch_size: 8}\nsettings: {rank: 3}\n")
    typed = tyro.cli(TrainSettings, args=["--lr", "0.25"], default=read, config=(tyro.conf.OmitArgPrefixes,))
    assert (typed.optim.lr, typed.optim.batch_size, typed.settings, typed.model) == (0.25, 8, {"rank": 3}, "m")


def test_names_are_unique_across_sections():
    """So that flags need no prefix."""
    names = [n for c in (TrainSettings, DataSettings, OptimSettings, RunSettings) for n in c.__dataclass_fields__]
    assert len(names) == len(set(names))


def test_round_trip(tmp_path):
    s = TrainSettings(
        model="m",
        out=tmp_path / "x",
        settings={"rank": 2, "alpha": 1e-7},
        data=DataSettings(train_file=Path("a.json")),
        optim=OptimSettings(lr=1e-5, warmup=0.06),
        run=RunSettings(loggers=("none",)),
    )
    assert recipe(tmp_path, to_yaml(s)) == s


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "model: m\nout: x\nlearning_rate: 1\n",
            r"a recipe has no 'learning_rate'; known here: model, method, settings, at,",
        ),
        ("model: m\nout: x\nlr: 1\n", r"has no 'lr'.*'lr' belongs into 'optim'"),
        ("model: m\nout: x\noptim: {lrr: 1}\n", r"section 'optim' has no 'lrr'; known here: batch_size, micro_batch,"),
        ("method: lora\n", "lacks model, out"),
        ("model: m\nout: x\noptim: {lr: fast}\n", r"optim.lr is 'fast', wanted a number"),
        ("model: m\nout: x\noptim: {batch_size: 1.5}\n", r"optim.batch_size is 1.5, wanted a whole number"),
        ("model: m\nout: x\noptim: {batch_size: true}\n", "wanted a whole number"),
        ("model: m\nout: x\nrun: {gradient_checkpointing: 1}\n", "wanted true or false"),
        ("model: m\nout: x\nrun: {dtype: fp8}\n", "run.dtype is 'fp8'; choose from fp32, bf16, fp16"),
        ("model: m\nout: x\nrun: {loggers: [tensorbord]}\n", "choose from auto, tensorboard, wandb, trackio, none"),
        ("model: m\nout: x\nsettings: 3\n", "settings is 3, wanted a dict"),
        ("model: m\nout: x\noptim: 3\n", "section 'optim' must be a mapping"),
        ("model: m\nout: x\noptim: {lr: .nan}\n", "lr must be a finite number, not nan"),
        ("model: m\nout: x\noptim: {warmup: .inf}\n", "warmup must be a finite number, not inf"),
        ("model: m\nout: x\noptim: {lr: 0}\n", "lr must be positive"),
        ("model: m\nout: x\nrun: {loggers: [none, wandb]}\n", "'none' excludes the others"),
        ("model: m\nout: x\nrun: {keep_last: 0}\n", "keep_last must be at least 1"),
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_refusals(tmp_path, text, match):
    with pytest.raises(InlayError, match=match):
        recipe(tmp_path, text)


def test_no_such_recipe(tmp_path):
    with pytest.raises(InlayError, match="there is no recipe"):
        read_recipe(tmp_path / "none.yaml", TrainSettings)


def test_identity_leaves_out_what_does_not_matter(tmp_path):
    a = TrainSettings(model="m", out=tmp_path / "a", run=RunSettings(loggers=("wandb",), save_every=3))
    b = TrainSettings(
        model="m", out=tmp_path / "b", run=RunSettings(progress=False, keep_last=9, cache_activations="ram")
    )
    c = TrainSettings(model="m", out=tmp_path / "b", optim=OptimSettings(lr=1.0))
    assert not differences(identity(a), identity(b)) and differences(identity(a), identity(c)) == [
        "optim.lr: 0.0003 before, 1.0 now"
    ]


# ---- the published recipes -------------------------------------------------------------------------------------------
def test_paths_may_be_texts():
    made = TrainSettings(model="m", out="runs/a", data=DataSettings(train_file="a.json", val_file="b.json"))
    assert made == TrainSettings(
        model="m", out=Path("runs/a"), data=DataSettings(train_file=Path("a.json"), val_file=Path("b.json"))
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_whole(path):
    """Each recipe reads, and its method knows its settings."""
    s = read_recipe(path, TrainSettings)
    inlay.method(s.method).make(**s.settings)
    assert s.data.task == "math_10k" and s.data.protocol == "published" and s.data.cutoff == 256
    assert (s.optim.batch_size, s.optim.micro_batch) == ((8, 4) if "prefix" in path.stem else (16, 4))
    assert s.out == Path("runs") / path.stem


PUBLISHED_FLAGS = {  # LLM-Adapters' math_running_commands: (--load_8bit, --save_step and --eval_step)
    "llama-7b-lora-math": (False, 80),
    "llama-7b-prefix-math": (False, 10),
    "llama-7b-series-math": (True, 80),
    "llama-7b-parallel-math": (False, 80),
    "bloomz-7b1-lora-math": (True, 80),
    "bloomz-7b1-series-math": (False, 80),
    "bloomz-7b1-parallel-math": (True, 80),
    "gpt-j-6b-lora-math": (False, 80),
    "gpt-j-6b-series-math": (False, 80),
    "gpt-j-6b-parallel-math": (True, 80),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_says_what_the_published_flags_say(path):
    in_8_bit, every = PUBLISHED_FLAGS[path.stem]
    s = read_recipe(path, TrainSettings)
    assert ("8-bit" in path.read_text()) == in_8_bit
    assert s.run.save_every == every
    assert s.run.eval_every == (every if s.data.val_size else 0)


TRAINED = {  # LLM-Adapters' counts; PEFT-fork measured on the same shapes
    "llama-7b-lora-math": 56_098_816,
    "llama-7b-series-math": 67_108_864,
    "llama-7b-parallel-math": 247_463_936,
    "llama-7b-prefix-math": 2_621_440,
    "gpt-j-6b-series-math": 58_720_256,
    "gpt-j-6b-parallel-math": 293_601_280,
    "gpt-j-6b-lora-math": 58_720_256,
}
BLOOM = {
    "bloomz-7b1-lora-math": 55_050_240,
    "bloomz-7b1-series-math": 62_914_560,
    "bloomz-7b1-parallel-math": 314_572_800,
}


@pytest.mark.parametrize("stem", sorted({**TRAINED, **BLOOM}))
def test_recipe_trains_the_published_number(stem):
    import torch
    from transformers import AutoModelForCausalLM, BloomConfig, GPTJConfig, LlamaConfig

    s = read_recipe(RECIPES[0].with_name(f"{stem}.yaml"), TrainSettings)
    config = {
        "llama": LlamaConfig(),
        "gpt": GPTJConfig(),
        "bloomz": BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config[stem.split("-")[0]])
    row = inlay.method(s.method)
    host = inlay.attach(model).add("a", row.make(**s.settings), at=s.at or row.places)
    assert host.count("a") == {**TRAINED, **BLOOM}[stem]


# ---- files that others wrote -----------------------------------------------------------------------------------------
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "model: *a9\n", "stands for over 100,000 values"),
        ("model: &a [*a]\n", "stands for over 100,000 values"),
        ("[" * 5000, "nested too deeply|no YAML"),
        ("x" * (2 << 20), "settings take 1,048,576 at most"),
        ("model: \x00", "no YAML"),
        ("model: 2020-99-99", "no YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
    ids=["aliases", "itself", "deep", "long", "NUL", "date", "bytes"],
)
@pytest.mark.parametrize("door", ["recipe", "command line"])
def test_a_hostile_recipe_ends_in_one_error_at_once(tmp_path, text, message, door):
    from inlay.cli import parse

    file = tmp_path / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InlayError, match=message):
        read_recipe(file, TrainSettings) if door == "recipe" else parse.read_yaml(str(file))


def test_anchors_may_be_used(tmp_path):
    (tmp_path / "a.yaml").write_text("model: &m tiny-llama\nname: n\nout: *m\ndata: {task: world-arith}\n")
    assert read_recipe(tmp_path / "a.yaml", TrainSettings).out == Path("tiny-llama")
