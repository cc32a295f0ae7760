"""Each adapter is asked by the template that it was trained with: alone, in mixed batches, composed and saved."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.core.store import template_of
from inlay.evaluate import GenerateSettings, evaluate, generate, option_scores
from inlay.evaluate.prompting import Prompting
from inlay.interop import formats
from inlay.library.compose import compose
from inlay.tasks import Record, choose, get, template_json
from inlay.tasks.templates import ALPACA, NONE
from inlay.train import DataSettings, OptimSettings, RunSettings, TrainSettings, train
from tests.evaluate.test_suite import CHOICE, SUMS
from tests.evaluate.tiny import base
from tests.tasks.chats import CHATML, STRIPS, chatty

NAMES = ("chat", "alpaca", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("base")
    base("llama", positions=512, vocabulary=261).save_pretrained(path)
    chatty(CHATML).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Adapters trained by three templates; `chat` was not asked for."""
    root = tmp_path_factory.mktemp("runs")
    file = root / "rows.json"
    rows = [{"instruction": r.instruction, "input": "", "output": r.output, "answer": r.answer} for r in SUMS]
    file.write_text(json.dumps(rows))
    for name in NAMES:
        train(
            TrainSettings(
                model=str(folder), name=name, out=root / name, settings={"rank": 2},
                data=DataSettings(train_file=file, template=None if name == "chat" else name),
                optim=OptimSettings(steps=2, lr=0.05, warmup=0),
                run=RunSettings(device="cpu", progress=False, loggers=("none",)),
            )
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def worn(folder, runs):
    model, tok = inlay.load_base(folder, device="cpu")
    host = inlay.attach(model)
    for name in NAMES:
        inlay.load(host, runs / name / "adapter")
    return host, tok


def test_training_records_the_template_in_the_adapter_and_the_run(runs):
    def read(*path):
        return json.loads(runs.joinpath(*path).read_text())

    assert read("chat", "adapter", "adapter.json")["template"] == {"name": "chat", "chat_template": CHATML}
    assert read("alpaca", "adapter", "adapter.json")["template"] == {"name": "alpaca"}
    assert [read(n, "data.json")["template"]["name"] for n in NAMES] == list(NAMES)
    assert len({read(n, "data.json")["train"]["sha256_of_tokens"] for n in NAMES}) == 3
    assert "template: none" in (runs / "none" / "settings.yaml").read_text()


def test_rows_of_a_mixed_batch_are_asked_by_their_own_template(worn, tmp_path):
    host, tok = worn
    templates = {"base": choose(None, tok), "chat": choose("chat", tok), "alpaca": ALPACA, "none": NONE}
    how = GenerateSettings(max_new_tokens=6, stop=("<|im_end|>",))
    report = evaluate(host, tok, "SVAMP", [None, *NAMES], records={"SVAMP": SUMS}, decoding={"max_new_tokens": 6},
                      out=tmp_path, progress=False)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    for label, template in templates.items():
        ids = [template.prompt_ids(r, tok) for r in SUMS]
        want = [g.text for g in generate(host, tok, ids, None if label == "base" else label, how)]
        found = sorted((line for line in lines if line["adapter"] == label), key=lambda line: line["index"])
        assert [line["text"] for line in found] == want
    assert report.settings["templates"] == {label: template_json(t) for label, t in templates.items()}
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["templates"]["none"] == {"name": "none"}


def test_options_are_scored_behind_the_generation_prompt(worn, tmp_path):
    host, tok = worn
    evaluate(host, tok, "social_i_qa", ["chat"], how="options", records={"social_i_qa": CHOICE}, out=tmp_path,
             progress=False)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    for line, record in zip(sorted(lines, key=lambda x: x["index"]), CHOICE, strict=True):
        prompt = f"<|im_start|>user\n{record.instruction}<|im_end|>\n<|im_start|>assistant\n"
        said = [f"the correct answer is answer{i}" for i in (1, 2, 3)]
        want = option_scores(host, tok, [tok(prompt)["input_ids"]], [said], "chat")[0]
        assert line["scores"] == pytest.approx(want, abs=2e-4)


def test_a_chosen_template_takes_the_place_of_all_with_a_note(worn):
    host, tok = worn
    with pytest.warns(UserWarning) as notes:
        report = evaluate(host, tok, "SVAMP", [None, *NAMES], template="alpaca", records={"SVAMP": SUMS[:1]},
                          decoding={"max_new_tokens": 2}, progress=False)  # fmt: skip
    assert set(map(json.dumps, report.settings["templates"].values())) == {'{"name": "alpaca"}'}
    assert [str(n.message) for n in notes if "trained with" in str(n.message)] == [
        "chat was trained with the tokenizer's chat template; it is asked by the template alpaca",
        "none was trained with no template; it is asked by the template alpaca",
    ]


def test_published_prompts_are_published_whatever_there_is(worn):
    host, tok = worn
    with pytest.warns(UserWarning, match="chat was trained with the tokenizer's chat template"):
        report = evaluate(host, tok, "SVAMP", ["chat"], "published", records={"SVAMP": SUMS[:1]},
                          decoding={"max_new_tokens": 2, "beams": 1}, progress=False)  # fmt: skip
    assert report.settings["templates"] == {"chat": {"name": "published"}}
    with pytest.raises(InlayError, match="protocol 'published' fixes its templates"):
        evaluate(host, tok, "SVAMP", ["chat"], "published", template="chat", records={"SVAMP": SUMS})


def test_adapters_without_a_record_are_asked_by_the_default_said_once(folder):
    model, tok = inlay.load_base(folder, device="cpu")
    host, told = inlay.attach(model), []
    host.add("peft", inlay.method("lora").make(rank=2), seed=0)
    prompting = Prompting(host, tok, None, told.append)
    assert prompting.of(()) == prompting.of(("peft",)) == prompting.of(("peft",)) == choose("chat", tok)
    assert told == [
        "peft does not record the template it was trained with; it is asked by the tokenizer's chat template "
        "(--template chooses another)"
    ]


def test_a_template_that_is_not_known_is_refused_unless_another_is_chosen(folder):
    model, tok = inlay.load_base(folder, device="cpu")
    host, told = inlay.attach(model), []
    host.add("new", inlay.method("lora").make(rank=2), seed=0)
    host.templates["new"] = {"name": "chat", "form": "of next year"}
    with pytest.raises(InlayError, match="which this Inlay does not know.*choose a template"):
        Prompting(host, tok, None, told.append).of(("new",))
    assert Prompting(host, tok, "none", told.append).of(("new",)) is NONE
    assert told == ["new was trained with a template that this Inlay does not know; it is asked by no template"]


def test_adapters_worn_together_have_their_common_template(worn):
    host, tok = worn
    told = []
    prompting = Prompting(host, tok, None, told.append)
    assert prompting.of(("none",)) is NONE
    assert prompting.of(("alpaca", "none")) == choose("chat", tok)
    assert "alpaca+none were trained with different templates" in told[0]
    compose(host, "twice", "sum(0.5*none, 0.5*none)")
    compose(host, "both", "sum(0.5*none, 0.5*alpaca)")
    try:
        assert prompting.of(("twice",)) is NONE and "both" not in host.templates
    finally:
        host.remove("twice"), host.remove("both")
    assert "twice" not in host.templates


@pytest.mark.parametrize("read", [formats.read, formats.shelve], ids=["hung", "shelved"])
def test_the_template_goes_where_the_adapter_goes(folder, runs, tmp_path, read):
    host = inlay.attach(inlay.load_base(folder, device="cpu")[0])
    name = read(host, runs / "none" / "adapter", "moved")
    assert host.templates == {"moved": {"name": "none"}}
    if read is formats.read:
        inlay.save(host, name, tmp_path / "copy")
        read(host, tmp_path / "copy", "back")
        assert host.templates == {"moved": {"name": "none"}, "back": {"name": "none"}}
        host.remove("back")
    host.remove(name)
    assert host.templates == {}


def test_files_of_before_are_read_by_their_protocol(runs, folder, tmp_path):
    def before(**training):
        return {"about": {"training": training}}

    assert template_of(before(data={"protocol": "clean"})) == {"name": "alpaca"}
    assert template_of(before(data={"protocol": "published"})) == {"name": "published"}
    assert template_of(before(data={"protocol": "clean"}, know={"items": "facts.jsonl"})) == {"name": "none"}
    assert template_of({"about": {}}) is None and template_of({"about": {"training": "by hand"}}) is None
    old = tmp_path / "old"
    shutil.copytree(runs / "alpaca" / "adapter", old)
    about = json.loads((old / "adapter.json").read_text())
    del about["template"]
    (old / "adapter.json").write_text(json.dumps(about))
    model, tok = inlay.load_base(folder, device="cpu")
    host = inlay.attach(model)
    name = inlay.load(host, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Prompting(host, tok).of((name,)) is ALPACA


def test_a_changed_tokenizer_does_not_change_how_an_adapter_is_asked(runs, folder):
    model, tok = inlay.load_base(folder, device="cpu")
    tok.chat_template = STRIPS
    host = inlay.attach(model)
    name = inlay.load(host, runs / "chat" / "adapter")
    ids = Prompting(host, tok).of((name,)).prompt_ids(Record("Q"), tok)
    assert tok.decode(ids) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_of_a_turn_ends_generation(folder):
    model, tok = inlay.load_base(folder, device="cpu")
    host = inlay.attach(model)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.lm_head.weight[end] = 50 * model.lm_head.weight.abs().max() * torch.randn(32).sign()
        model.lm_head.weight[tok.eos_token_id] = 0
    task = get("SVAMP")
    report = evaluate(host, tok, task, records={"SVAMP": SUMS}, decoding={"max_new_tokens": 30}, progress=False)
    ids = [choose(None, tok).prompt_ids(r, tok) for r in SUMS]
    ended = [end in g.tokens for g in generate(host, tok, ids, None, GenerateSettings(max_new_tokens=30))]
    assert any(ended) and report.cell("base", "SVAMP").truncated == ended.count(False)
