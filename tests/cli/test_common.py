"""Flags that many verbs have in common: --template is checked before anything is loaded, --threads is obeyed by all."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
from inlay.cli.parse import flag_class
from inlay.cli.verbs import every, verb
from inlay.threads import ThreadSettings
from tests.tasks.chats import BRACKETS, CHATML, chatty

NOT_COMPUTING = {"plan", "score", "inspect", "know items"}
ASKING = {
    "train": ("--model", "nowhere", "--train-file", "rows.json", "--out", "run"),
    "eval": ("--model", "nowhere", "--tasks", "world-addsub", "--out", "run"),
    "chat": ("nowhere",),
    "serve": ("nowhere", "--port", "0"),
    "play": ("nowhere", "--port", "0", "--adapters", "adapters"),
    "know measure": ("--model", "nowhere", "--items", "facts.jsonl", "--out", "run"),
    "know slick": ("--model", "nowhere", "--items", "facts.jsonl", "--out", "run.json"),
    "know watch": ("--model", "nowhere", "--items", "facts.jsonl", "--out", "run"),
    "know interfere": ("--model", "nowhere", "--items", "facts.jsonl", "--out", "run"),
}
"""Verbs that make prompts, with a base that does not exist."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the verbs read, but for the base."""
    monkeypatch.chdir(tmp_path)
    row = {"instruction": "Q", "input": "", "output": "A", "answer": "A"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 3))
    facts = [{"id": str(i), "prompt": f"{i}?", "target": "t", "split": "train"} for i in range(3)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize(("template", "says"), [("llama3", "there is no template 'llama3'"), ("broken.jinja", "Jinja")])
def test_a_template_is_checked_before_anything_is_loaded(name, template, says, files, inlay_):
    if name == "play":
        pytest.importorskip("gradio")
    code, _, err = inlay_(*name.split(), *ASKING[name], "--template", template)
    assert code == 2 and says in err and "nowhere" not in err


def test_every_verb_that_asks_has_the_flag_and_no_other_has_it():
    having = {name for name in every() if "template" in {leaf.flag for leaf in flag_class(verb(name), None, {})[1]}}
    assert having == {*ASKING}


def test_every_verb_that_computes_has_threads_and_says_what_they_are():
    computing = {name for name in every() if issubclass(verb(name).settings_class, ThreadSettings)}
    assert computing == {*every()} - NOT_COMPUTING


@pytest.mark.parametrize("name", [*ASKING, "merge", "convert", "compose", "demo", "know study"])
def test_threads_below_one_are_refused(name, files, inlay_):
    more = {"merge": ("a", "--out", "b"), "convert": ("a", "b", "--model", "c"), "know study": ("--out", "s")}
    more["compose"] = ("sum(a, b)", "--adapters", "a", "b", "--out", "c")
    code, _, err = inlay_(*name.split(), *(ASKING | more).get(name, ()), "--threads", "0")
    assert code == 2 and "threads must be at least 1, not 0" in err


def test_threads_are_set_and_recorded_and_decide_nothing_else(base_folder, records, tmp_path, inlay_):
    run = tmp_path / "run"
    argv = ("train", "--model", base_folder, "--train-file", records, "--rank", 2, "--batch-size", 4, "--loggers",
            "none", "--no-progress", "--warmup", 0, "--device", "cpu", "--out", run)  # fmt: skip
    before = torch.get_num_threads()
    try:
        assert inlay_(*argv, "--steps", 2, "--threads", before + 1)[0] == 0
        assert torch.get_num_threads() == before + 1
        assert "threads:" not in (run / "settings.yaml").read_text()
        assert inlay_(*argv, "--steps", 2, "--resume", "--threads", before)[0] == 0
    finally:
        torch.set_num_threads(before)
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [s["threads"] for s in sessions] == [before + 1, before]
    assert "threads" in (run / "log.txt").read_text()


# ---- a base with a chat template -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chat_base(base_folder, tmp_path_factory):
    """The random base with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    model = inlay.load_base(base_folder, device="cpu")[0]
    model.resize_token_embeddings(261)
    model.save_pretrained(folder)
    chatty(CHATML).save_pretrained(folder)
    return folder


def test_chat_asks_in_the_models_own_form(chat_base, tmp_path, inlay_):
    said = ("--max-new-tokens", 12, "--prompt")
    _, own, _ = inlay_("chat", chat_base, *said, "Hi")
    _, again, _ = inlay_("chat", chat_base, "--template", "chat", *said, "Hi")
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    _, plain, _ = inlay_("chat", chat_base, "--template", "none", *said, whole)
    _, alpaca, _ = inlay_("chat", chat_base, "--template", "alpaca", *said, "Hi")
    assert own == again == plain != alpaca and own.strip()
    code, _, err = inlay_("chat", chat_base, "--template", "brackets", *said, "Hi")
    assert code == 2 and "there is no template 'brackets'" in err
    (tmp_path / "b.jinja").write_text(BRACKETS)
    assert inlay_("chat", chat_base, "--template", tmp_path / "b.jinja", *said, "Hi")[1] != own


def test_train_inspect_chat_and_eval_agree_on_the_template(chat_base, records, tmp_path, inlay_):
    run = tmp_path / "run"
    argv = ("train", "--model", chat_base, "--train-file", records, "--rank", 2, "--steps", 1, "--loggers", "none",
            "--no-progress", "--device", "cpu", "--template", "none", "--out", run)  # fmt: skip
    assert inlay_(*argv)[0] == 0
    assert "trained with no template" in inlay_("inspect", run / "adapter")[1]
    some = ("--adapters", run / "adapter", "--max-new-tokens", 8)
    _, said, err = inlay_("chat", chat_base, *some, "--prompt", "Hi")
    assert said == inlay_("chat", chat_base, *some, "--prompt", "Hi", "--template", "none")[1] and "note" not in err
    _, other, err = inlay_("chat", chat_base, *some, "--prompt", "Hi", "--template", "chat")
    assert other != said and "trained with no template; it is asked by the tokenizer's chat template" in err
    out = tmp_path / "eval"
    tasks = ("--bare", "--tasks", "world-addsub", "--limit", 2, "--out", out)
    assert inlay_("eval", "--model", chat_base, *some, *tasks)[0] == 0
    templates = json.loads((out / "report.json").read_text())["settings"]["templates"]
    assert templates == {"base": {"name": "chat", "chat_template": CHATML}, "run": {"name": "none"}}


def test_knowledge_is_asked_in_the_models_own_form(chat_base, files, tmp_path, inlay_):
    how = ("--model", chat_base, "--items", "facts.jsonl", "--no-cache", "--no-progress", "--answer-tokens", 3)
    wordings = {}
    for name in (None, "none", "Q: {prompt}"):
        out = tmp_path / str(name)[:4]
        assert inlay_("know", "measure", *how, *(("--template", name) if name else ()), "--out", out)[0] == 0
        wordings[name] = json.loads((out / "table.json").read_text())["settings"]["wording"]
    assert wordings[None]["chat"] == CHATML and wordings["none"]["chat"] is None
    assert [w["template"] for w in wordings.values()] == ["{prompt}", "{prompt}", "Q: {prompt}"]
    run = tmp_path / "run"
    few = ("--steps", 1, "--rank", 2, "--loggers", "none", "--no-progress", "--device", "cpu", "--cutoff", 64)
    watch = ("know", "watch", "--model", chat_base, "--items", "facts.jsonl", *few, "--snapshots", 1, "--out", run)
    assert inlay_(*watch)[0] == 0
    recorded = json.loads((run / "adapter" / "adapter.json").read_text())["template"]
    assert recorded == {"name": "chat", "chat_template": CHATML}
    table = tmp_path / "none"
    train = ("train", "--model", chat_base, "--items", "facts.jsonl", "--table", table, *few, "--out", tmp_path / "r2")
    code, _, err = inlay_(*train, "--template", "chat")
    assert code == 2 and "was measured with another template than 'chat'" in err
    assert inlay_(*train)[0] == 0
    assert json.loads((tmp_path / "r2" / "adapter" / "adapter.json").read_text())["template"] == {"name": "none"}
