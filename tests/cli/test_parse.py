"""Flags and recipes: one set of names and types, flags over recipe, and nothing unknown gets through."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import inlay
from inlay.cli.parse import read
from inlay.cli.verbs import GROUPS, NAMES, every, field_docs, verb, verbs_of
from inlay.methods import METHODS


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize("name", every())
def test_every_setting_of_every_verb_says_what_it_is(name):
    cls = verb(name).settings_class
    assert set(field_docs(cls)) >= {f.name for f in dataclasses.fields(cls) if f.name not in ("data", "optim", "run")}
    assert verb(name).about and verb(name).examples


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_says_what_it_is(method):
    edit = METHODS[method].edit
    assert set(field_docs(edit)) >= {f.name for f in dataclasses.fields(edit)}


@pytest.mark.parametrize("name", every())
def test_help_teaches(name, inlay_):
    code, out, _ = inlay_(*name.split(), "--help")
    assert code == 0 and verb(name).about in " ".join(out.split()) and "Examples:" in out


def test_overview_names_every_verb(inlay_):
    code, out, _ = inlay_("--help")
    assert code == 0 and all(name in out for name in NAMES)
    assert inlay_()[0] == 0 and inlay_("--version")[1].startswith("inlay ")


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_verbs_and_refuses_others(group, inlay_):
    for argv in ([group], [group, "--help"], [group, "help"]):
        code, out, _ = inlay_(*argv)
        assert code == 0 and all(name in out for name in verbs_of(group))
    code, _, err = inlay_(group, "nothing")
    assert code == 2 and f"unknown verb '{group} nothing'" in err and verbs_of(group)[0] in err


@pytest.mark.parametrize("method,flag", [("prefix", "--tokens"), ("series", "--size"), ("adalora", "--orthogonality")])
def test_help_after_a_method_lists_its_settings(method, flag, inlay_):
    _, out, _ = inlay_("plan", "--method", method, "--help")
    assert flag in out and f"Settings of {method}" in out


def test_method_settings_are_flags():
    s = read(verb("plan"), ["llama-7b", "--method", "lora", "--rank", "8", "--alpha", "3e-1"])
    assert s.model == "llama-7b" and s.settings == {"rank": 8, "alpha": 0.3}
    assert inlay.method(s.method).make(**s.settings).rank == 8


def test_flags_override_the_recipe(recipe):
    file = recipe("model: llama-13b\nmethod: series\nbatch: 4\nsettings:\n  size: 128\n  scale: 2.0\n")
    s = read(verb("plan"), ["--recipe", str(file)])
    assert (s.model, s.method, s.batch, s.settings) == ("llama-13b", "series", 4, {"size": 128, "scale": 2.0})
    s = read(verb("plan"), [f"--recipe={file}", "llama-7b", "--size", "64", "--batch", "2"])
    assert (s.model, s.batch, s.settings) == ("llama-7b", 2, {"size": 64, "scale": 2.0})


def test_sections_of_a_recipe_are_flat_as_flags(recipe):
    file = recipe("model: m\nout: runs/x\ndata: {task: mawps, cutoff: 128}\noptim: {lr: 1e-3, epochs: 2}\n")
    s = read(verb("train"), ["--recipe", str(file), "--lr", "2e-3", "--no-progress", "--seed", "7"])
    assert (s.data.task, s.data.cutoff, s.optim.lr, s.optim.epochs) == ("mawps", 128, 2e-3, 2.0)
    assert s.run.progress is False and s.run.seed == 7 and s.out.name == "x"


def test_a_name_that_the_verb_has_is_told_apart():
    argv = ["--model", "m", "--out", "o", "--method", "adalora", "--warmup", "5", "--method-warmup", "0.2"]
    s = read(verb("train"), argv)
    assert s.optim.warmup == 5 and s.settings == {"warmup": 0.2}


def test_flags_equal_recipe(recipe):
    """The same settings, whichever way they come."""
    file = recipe(
        "model: m\nmethod: prefix\nsettings: {tokens: 5}\nout: o\nat: k,v@0-1\n"
        "data: {train_file: a.json, protocol: clean}\nrun: {loggers: [none]}\n"
    )
    argv = (
        "--model m --method prefix --tokens 5 --out o --at k,v@0-1 --train-file a.json --protocol clean --loggers none"
    )
    assert read(verb("train"), ["--recipe", str(file)]) == read(verb("train"), argv.split())


@pytest.mark.parametrize(
    "argv,said",
    [
        (["plan", "llama-7b", "--method", "prefix", "--rank", "8"], "method 'prefix' has no setting --rank.*--tokens"),
        (["plan", "llama-7b", "--ranc", "8"], "unknown option --ranc; did you mean --rank"),
        (["plan", "llama-7b", "--zzz"], "unknown option --zzz"),
        (["plan", "--model", "llama-7b"], "the model stands by itself"),
        (["plan", "llama-7b", "--method", "nope"], "unknown method 'nope'; there is: .*lora"),
        (["plan", "llama-7b", "--rank", "0"], "rank must be at least 1, not 0"),
        (["plan", "llama-7b", "--recipe", "nowhere.yaml"], "there is no recipe 'nowhere.yaml'"),
        (["plan", "llama-7b", "--recipe"], "--recipe needs a value"),
        (["fly"], "unknown verb 'fly'; there is: .*train"),
        (["train", "--model", "m", "--out", "o", "--lr", "-1"], "lr must be positive|must be positive"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(argv, said, inlay_):
    import re

    code, out, err = inlay_(*argv)
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.startswith("error: ") and re.search(said, err), err


@pytest.mark.parametrize(
    "argv", [["plan"], ["plan", "gpt2", "--rank", "x"], ["score", "--task", "svamp"], ["plan", "gpt2", "--rank"]]
)
def test_missing_and_mistyped_flags_exit_with_2(argv, inlay_):
    code, out, err = inlay_(*argv)
    assert code == 2 and out == "" and err and "Traceback" not in err


@pytest.mark.parametrize(
    "text,said",
    [
        ("model: gpt2\nsise: 3\n", "has no 'sise'"),
        ("model: gpt2\nsettings: {sise: 3}\n", "no setting 'sise'"),
        ("model: gpt2\nbatch: many\n", "batch is 'many', wanted a whole number"),
        ("model: gpt2\nsettings: 3\n", "settings"),
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_a_bad_recipe_is_named(text, said, recipe, inlay_):
    code, _, err = inlay_("plan", "--recipe", recipe(text))
    assert code == 2 and said in " ".join(err.split())


def test_debug_shows_the_traceback():
    from inlay.cli import main

    with pytest.raises(inlay.InlayError):
        main(["plan", "nothing-here", "--debug"])


def test_plan_prints_one_json_object(inlay_):
    code, out, _ = inlay_("plan", "llama-7b", "--method", "lora", "--rank", 32, "--at", "q,k,v,up,down", "--json")
    assert code == 0 and json.loads(out)["trainable"] == 56_098_816
    code, out, _ = inlay_("plan", "llama-13b", "--method", "prefix", "--tokens", 10, "--json")
    assert json.loads(out)["trainable"] == 4_096_000


def test_plan_for_people(inlay_):
    code, out, _ = inlay_("plan", "bloomz-7b", "--at", "q,k,v")
    assert code == 0 and "23,592,960" in out and "hint" in out and "estimate" in out


def test_warnings_are_notes_without_file_and_line():
    code = "import warnings; from inlay.cli.quiet import quiet; quiet(); warnings.warn('padded [not] packed')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stderr == "note: padded [not] packed\n"
