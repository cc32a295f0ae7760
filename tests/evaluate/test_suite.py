"""Suites: a trained adapter scores, files re-score alike, a run goes on after a kill, other settings are refused."""

import io
import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import EvalSettings, evaluate, run
from inlay.evaluate.log import Log
from inlay.evaluate.suite import expand, statement
from inlay.tasks import CLEAN, PUBLISHED, Record, encode, encode_prompt, get, to_json
from inlay.tasks.score import score_file, wilson
from tests.evaluate.tiny import base, tokenizer

COLOURS = [
    ("sky", "blue", "answer2"),
    ("pea", "green", "answer1"),
    ("snow", "white", "answer3"),
    ("coal", "black", "answer2"),
]
CHOICE = [
    Record(
        f"Please choose the correct answer to the question: {thing}?\n\nAnswer1: green Answer2: {colour} Answer3: white"
        "\n\nAnswer format: answer1/answer2/answer3",
        "",
        f"the correct answer is {answer}",
        answer,
    )
    for thing, colour, answer in COLOURS
]
PAIRS = ((1, 2), (3, 4), (2, 2))
SUMS = [Record(f"What is {a}+{b}?", "", f"The answer is {a + b}", str(float(a + b))) for a, b in PAIRS]
RECORDS = {"social_i_qa": CHOICE, "SVAMP": SUMS}
DECODING = {"max_new_tokens": 32}


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def worn(tok):
    """`good` has learned every record, `some` only the choices, `prefix` nothing."""
    host = inlay.attach(base("llama", positions=512))
    for name, records in {"good": CHOICE + SUMS, "some": CHOICE}.items():
        host.add(name, inlay.method("lora").make(rank=32), at="embed,q,k,v,o,gate,up,down,head", seed=0)
        _learn(host, name, [encode(r, tok, CLEAN, 512) for r in records])
    host.add("prefix", inlay.method("prefix").make(tokens=3), seed=0)
    return host


def _learn(host, name, rows):
    wide = max(len(r.input_ids) for r in rows)
    ids = torch.tensor([r.input_ids + [0] * (wide - len(r.input_ids)) for r in rows])
    labels = torch.tensor([r.labels + [-100] * (wide - len(r.labels)) for r in rows])
    first = min(i for r in rows for i, x in enumerate(r.labels) if x != -100)
    optimizer = torch.optim.Adam(host.parameters(name), lr=3e-3)
    with host.using(name):
        for _ in range(120):
            logits = host.model(input_ids=ids).logits[:, first - 1 : -1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, first:].flatten())
            if loss < 0.03:
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    raise AssertionError(f"did not learn: {loss}")


def suite(worn, tok, adapters=(None, "good", "some"), tasks=("siqa", "svamp"), **more):
    more = {"records": RECORDS, "decoding": DECODING, "progress": False, **more}
    return evaluate(worn, tok, list(tasks), list(adapters), **more)


def told(folder):
    rows = map(json.loads, (folder / "generations.jsonl").read_text().splitlines())
    kept = ("text", "prediction", "label", "truncated")
    return {(r["adapter"], r["dataset"], r["index"]): tuple(r[k] for k in kept) for r in rows}


def test_scores_files_and_comparisons(worn, tok, tmp_path):
    report = suite(worn, tok, out=tmp_path)
    assert [c.accuracy for c in report.cells if c.adapter == "good"] == [100, 100]
    assert report.cell("some", "social_i_qa").accuracy == 100 and report.cell("some", "SVAMP").accuracy < 100
    bare = report.cell("base", "social_i_qa")
    assert (bare.correct, bare.truncated, bare.n) == (0, 4, 4) and report.cell("good", "social_i_qa").truncated == 0
    assert (bare.low, bare.high) == wilson(0, 4) and bare.seconds > 0
    again = {(s.group["adapter"], s.task): s for s in score_file(tmp_path / "generations.jsonl")}
    for cell in report.cells:
        same = again[cell.adapter, cell.dataset]
        for count in ("n", "correct", "no_answer", "truncated"):
            assert getattr(same, count) == getattr(cell, count)
    pair = report.compare("good", "base")["social_i_qa"]
    assert (pair.first, pair.second, pair.difference, pair.p) == (4, 0, 100.0, 0.125)
    assert report.compare("good", "base")["all"].n == 7
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["cells"][0]["accuracy"] == report.cells[0].accuracy and saved["average"]["good"] == 100
    assert saved["settings"]["datasets"]["SVAMP"]["max_new_tokens"] == 32
    text = (tmp_path / "report.md").read_text()
    assert "| good | 100.0 | 100.0 | 100.0 |" in text and "p (McNemar)" in text
    assert report.table().row_count == 6
    narrow = Console(width=72, file=io.StringIO())
    narrow.print(report.table())
    shown = narrow.file.getvalue()
    assert all(f"{c.low:.1f}-{c.high:.1f}" in shown and c.dataset in shown for c in report.cells)


@pytest.mark.parametrize("how", ["generate", "options"])
def test_mixed_or_not_whatever_the_batch(worn, tok, tmp_path, how):
    tasks = ("siqa",) if how == "options" else ("siqa", "svamp")
    adapters = (None, "good", "some", "prefix", "prefix+good")
    seen = []
    for i, more in enumerate(({"batch_size": 1}, {"batch_size": 16}, {"batch_size": 3, "mixed": False})):
        suite(worn, tok, adapters, tasks, how=how, out=tmp_path / str(i), **more)
        seen.append(told(tmp_path / str(i)))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 5 * (4 if how == "options" else 7)


def test_goes_on_after_a_kill(worn, tok, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = suite(worn, tok, out=whole)
    suite(worn, tok, out=part)
    lines = (part / "generations.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:9])
    (part / "generations.jsonl").write_bytes(kept + lines[9][:40])
    report = suite(worn, tok, out=part)
    assert (part / "generations.jsonl").read_bytes().startswith(kept)
    assert told(part) == told(whole) and report.right == expected.right
    size = (part / "generations.jsonl").stat().st_size
    assert suite(worn, tok, ("good",), ("siqa",), out=part).cells[0].accuracy == 100
    assert (part / "generations.jsonl").stat().st_size == size  # nothing was generated again
    grown = suite(worn, tok, ("prefix",), ("siqa",), out=part)
    assert set(grown.settings["adapters"]) == {"prefix"}
    (part / "generations.jsonl").write_bytes(b"{}\n" + kept)
    with pytest.raises(InlayError, match="line 1 is damaged"):
        suite(worn, tok, out=part)


def test_a_folder_reports_all_its_calls(worn, tok, tmp_path):
    """Tables and comparisons are those of one call for everything; what no call has finished is not in them."""
    whole = suite(worn, tok, ("good", "some"), out=tmp_path / "whole")
    part = tmp_path / "part"
    suite(worn, tok, ("good",), ("svamp",), out=part)
    suite(worn, tok, ("good",), ("siqa",), out=part)
    last = suite(worn, tok, ("some",), ("siqa",), out=part)
    assert [(c.adapter, c.dataset) for c in last.cells] == [("some", "social_i_qa")]
    saved = json.loads((part / "report.json").read_text())
    assert {(c["adapter"], c["dataset"]) for c in saved["cells"]} == {
        ("good", "SVAMP"), ("good", "social_i_qa"), ("some", "social_i_qa")
    }  # fmt: skip
    assert saved["average"] == {"good": 100.0}, "an average over fewer tasks is another number"
    only = whole.compare("good", "some")["social_i_qa"]
    names = {"first": "good", "second": "some", "dataset": "social_i_qa"}
    counts = {"only_first": only.first, "only_second": only.second}
    assert saved["comparisons"] == [asdict(only) | names | counts]
    text = (part / "report.md").read_text()
    assert "| good | 100.0 | 100.0 | 100.0 |" in text and "| some |  | 100.0 |  |" in text
    suite(worn, tok, ("some",), ("svamp",), out=part)
    both = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "part")]
    for report in both:
        for cell in report["cells"]:
            cell.pop("seconds")
        report["cells"].sort(key=lambda c: (c["adapter"], c["dataset"]))
        report["comparisons"].sort(key=lambda c: c["dataset"])
    assert both[0]["comparisons"] == both[1]["comparisons"] and len(both[0]["comparisons"]) == 3
    assert both[0] == both[1] and both[0]["settings"]["datasets"].keys() == {"social_i_qa", "SVAMP"}
    lines = (part / "generations.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"adapter": "some", "dataset": "SVAMP"' not in line]
    (part / "generations.jsonl").write_text("".join(kept))
    suite(worn, tok, ("good",), ("siqa",), out=part)
    assert len(json.loads((part / "report.json").read_text())["cells"]) == 3, "whose answers are gone is gone"
    (part / "report.json").write_text("{")
    with pytest.raises(InlayError, match="report.json is damaged.*delete it"):
        suite(worn, tok, ("good",), ("siqa",), out=part)


def test_a_report_names_its_base_by_a_digest(worn, tok, tmp_path):
    suite(worn, tok, ("some",), ("svamp",), out=tmp_path)
    saved, kept = (json.loads((tmp_path / n).read_text()) for n in ("report.json", "settings.json"))
    assert len(saved["settings"]["base"]) == 16 and kept["base"]["values"]
    assert f'"base": "{saved["settings"]["base"]}"' in (tmp_path / "report.md").read_text()


def test_sampled_runs_go_on_alike(worn, tok, tmp_path):
    hot = {"decoding": {**DECODING, "temperature": 1.0}, "records": {"SVAMP": [SUMS[0]] * 4}, "tasks": ("SVAMP",)}
    suite(worn, tok, out=tmp_path, **hot)
    whole = told(tmp_path)
    assert len({text for (adapter, *_), (text, *_) in whole.items() if adapter == "base"}) == 4
    lines = (tmp_path / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "generations.jsonl").write_bytes(b"".join(lines[5:]))
    suite(worn, tok, out=tmp_path, **hot)
    assert told(tmp_path) == whole


def test_other_settings_are_refused(worn, tok, tmp_path):
    suite(worn, tok, ("some",), ("svamp",), out=tmp_path)
    with pytest.raises(InlayError, match="protocol was 'clean', now 'published'"):
        suite(worn, tok, ("some",), ("svamp",), out=tmp_path, protocol="published")
    with pytest.raises(InlayError, match=r"datasets 'SVAMP' differs \(max_new_tokens was 32, now 5\)"):
        suite(worn, tok, ("some",), ("svamp",), out=tmp_path, decoding={"max_new_tokens": 5})
    with pytest.raises(InlayError, match=r"datasets 'SVAMP' differs \(other records or prompts\)"):
        suite(worn, tok, ("some",), ("svamp",), out=tmp_path, records={"SVAMP": SUMS[::-1]})
    tensor = worn.parameters("some")[0]
    with torch.no_grad():
        tensor += 1e-4
        with pytest.raises(InlayError, match="adapters 'some' differs"):
            suite(worn, tok, ("some",), ("svamp",), out=tmp_path)
        tensor -= 1e-4
    with torch.no_grad():
        weight = worn.model.model.embed_tokens.weight
        weight.data = weight.data * 1.5
        with pytest.raises(InlayError, match="the base differs"):
            suite(worn, tok, ("good",), ("svamp",), out=tmp_path)
        weight.data = weight.data / 1.5


def test_a_folder_that_cannot_be_written_is_told(worn, tok, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InlayError, match="a file has that name; choose another"):
        suite(worn, tok, ("some",), ("svamp",), out=tmp_path / "file")
    log = Log(tmp_path)
    (tmp_path / "generations.jsonl").symlink_to("/dev/full")
    with pytest.raises(InlayError, match="No space left on device.*What is there is kept: make room"):
        log.add([{"adapter": "base", "dataset": "SVAMP", "index": 0}])
    assert not log.rows


def test_options_by_answer_and_by_text(worn, tok, tmp_path):
    report = suite(worn, tok, ("good", None), ("siqa",), how="options", out=tmp_path)
    assert report.cell("good", "social_i_qa").accuracy == 100
    assert report.cell("base", "social_i_qa").no_answer == 0
    row = json.loads((tmp_path / "generations.jsonl").read_text().splitlines()[0])
    assert len(row["scores"]) == 3 and row["text"] == f"the correct answer is {row['prediction']}"
    by_text = suite(worn, tok, ("good",), ("siqa",), how="options", option_form="text", normalise="bytes")
    assert by_text.settings["option_form"] == "text"
    with pytest.raises(InlayError, match="SVAMP asks for a number"):
        suite(worn, tok, ("good",), ("svamp",), how="options")


@pytest.mark.parametrize("name", ["boolq", "piqa", "siqa", "winogrande", "aqua", "arc-c"])
@pytest.mark.parametrize("protocol", [CLEAN, PUBLISHED])
def test_statements_are_read_back(name, protocol):
    task = get(name)
    for option in task.answers:
        assert protocol.extract(statement(task, option), task.kind, task.answers) == option


def test_published_protocol_uses_its_prompt_and_beams(worn, tok):
    report = suite(worn, tok, ("good",), ("siqa",), protocol="published")
    assert report.settings["datasets"]["social_i_qa"]["beams"] == 4
    short = inlay.attach(base("llama", positions=128))
    with pytest.raises(InlayError, match="the base's context is 128"):
        evaluate(short, tok, "siqa", [None], "published", records=RECORDS, progress=False)


def test_clean_prompts_are_shortened_to_fit_and_counted(tok):
    short = inlay.attach(base("gpt2", positions=128))
    cell = suite(short, tok, (None,), ("siqa",)).cells[0]
    assert cell.shortened == 4 and cell.n == 4
    assert len(encode_prompt(CHOICE[0], tok, CLEAN).input_ids) > 100


def test_data_folders_limits_and_groups(worn, tok, tmp_path):
    (tmp_path / "SVAMP").mkdir()
    to_json(SUMS * 10, tmp_path / "SVAMP" / "test.json")
    with pytest.warns(UserWarning, match="not the published"):
        report = suite(worn, tok, ("good",), ("SVAMP",), records=None, data=tmp_path, limit=5, seed=1)
    indices = sorted(report.right["good", "SVAMP"])
    assert len(indices) == 5 and indices[-1] > 5 and report.cells[0].accuracy == 100
    assert [t.name for t in expand(["commonsense", "boolq"])].count("boolq") == 1 and len(expand("math")) == 6
    assert all(t.group == "world" for t in expand("world"))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(tasks=("nothing",)), "unknown task"),
        (dict(tasks=("math_10k",)), "training set"),
        (dict(tasks=()), "no task"),
        (dict(adapters=("nobody",)), "unknown adapter"),
        (dict(adapters=()), "adapters must be"),
        (dict(how="guess"), "unknown way"),
        (dict(how="options", normalise="x"), "normalisation"),
        (dict(option_form="x"), "option form"),
        (dict(protocol="x"), "protocol"),
        (dict(decoding={"a": 1}), "decoding"),
        (dict(limit=0), "limit 0"),
        (dict(records={}), "task in `records`"),
    ],
)
def test_wrong_requests_are_told(worn, tok, wrong, says):
    with pytest.raises(InlayError, match=says):
        suite(worn, tok, **wrong)


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_the_real_files(shared, tok, tmp_path, protocol):
    """Each set's prompts, options and labels go through; a random model's score means nothing."""
    wide = inlay.attach(base("bloom"))
    data = shared / "data" / "llm_adapters"
    options = ["boolq", "piqa", "siqa", "winogrande", "arc-e", "arc-c", "obqa", "aqua"]
    few = {"data": data, "limit": 2, "progress": False, "protocol": protocol}
    report = evaluate(wide, tok, ["math", "mawps"], decoding={"max_new_tokens": 2, "beams": 2}, out=tmp_path, **few)
    assert {c.n for c in report.cells} == {2} and len(report.cells) == 7
    rows = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    gsm = json.loads((data / "gsm8k" / "test.json").read_text())
    assert all(r["label"] == gsm[r["index"]]["answer"] for r in rows if r["dataset"] == "gsm8k")
    for form in ("answer", "text"):
        found = evaluate(wide, tok, options, how="options", option_form=form, normalise="bytes", **few)
        assert [c.no_answer for c in found.cells] == [0] * 8


def test_run_from_folders(worn, tok, tmp_path, capsys):
    model = base("llama", positions=512)
    model.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    folders = (tmp_path / "a" / "my.good", tmp_path / "b" / "my.good", tmp_path / "run" / "adapter")
    for folder in folders:
        inlay.save(worn, "good", folder)
    folders = (*folders[:2], tmp_path / "run")  # what a training run leaves
    (tmp_path / "SVAMP").mkdir()
    to_json(SUMS, tmp_path / "SVAMP" / "test.json")
    settings = EvalSettings(
        model=str(tmp_path / "base"),
        adapters=folders,
        bare=True,
        tasks=("SVAMP",),
        data=tmp_path,
        max_new_tokens=28,
        out=tmp_path / "out",
        device="cpu",
    )
    with pytest.warns(UserWarning, match="not the published"):
        report = run(settings)
    assert report.adapters == ["base", "my-good", "my-good-2", "run"]
    assert [c.accuracy for c in report.cells][1:] == [100, 100, 100]
    assert "SVAMP" in capsys.readouterr().out
    with pytest.raises(InlayError, match="no such adapter folder"):
        run(EvalSettings(model="x", adapters=(tmp_path / "none",)))
