"""`inlay train` and `inlay know filter` on items: filter, weights, every control by its name, the choice of beta."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import inlay
from inlay.cli import main
from inlay.core.errors import InlayError
from inlay.knowledge.controls import UNKNOWN, control_subset
from inlay.knowledge.items import Item, read_items, write_items
from inlay.knowledge.measure import MeasureSettings, measure
from inlay.knowledge.settings import CANDIDATES, FILTER_CONTROLS, KnowSettings, KnowTrainSettings
from inlay.knowledge.training import train, validation
from inlay.knowledge.weights import weights
from inlay.knowledge.wording import Wording, examples
from inlay.train.settings import DataSettings, OptimSettings, RunSettings
from tests.evaluate.tiny import base, tokenizer
from tests.train.tiny import copy, same

TOK = tokenizer()
ITEMS = [
    Item(f"i{n:02d}", f"Item {n} is", f"t{n * 7 % 10}{'x' * (n % 3)}", relation=f"r{n % 3}", paraphrases=(f"{n} is?",))
    for n in range(12)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, items and their table."""
    path = tmp_path_factory.mktemp("place")
    model = base("llama")
    model.save_pretrained(path / "base")
    TOK.save_pretrained(path / "base")
    write_items(path / "items.jsonl", [*ITEMS, Item("v", "Other", "t", split="val")])
    measure(inlay.attach(model), TOK, ITEMS, MeasureSettings(max_new_tokens=4)).save(path / "table")
    known = ("HighlyKnown", "MaybeKnown", UNKNOWN)
    (path / "known.json").write_text(json.dumps({i.id: known[n % 3] for n, i in enumerate(ITEMS)}))
    return path


def settings(place, out, val_size=0, steps=4, **know) -> KnowTrainSettings:
    sources = {"items": place / "items.jsonl", "table": place / "table"}
    return KnowTrainSettings(
        model=str(place / "base"),
        settings={"rank": 4},
        at="q,v,down",
        out=out,
        data=DataSettings(val_size=val_size),
        optim=OptimSettings(batch_size=4, micro_batch=2, steps=steps, lr=2e-2, warmup=0),
        run=RunSettings(progress=False, loggers=("none",), device="cpu", save_every=2),
        know=KnowSettings(**{**sources, **know}),
    )


def adapter(place, out):
    host = inlay.attach(inlay.load_base(place / "base", device="cpu")[0])
    inlay.load(host, out / "adapter")
    return copy(host, "adapter")


def table(place):
    from inlay.knowledge.table import Table

    return Table.load(place / "table")


def told(out):
    return json.loads((out / "data.json").read_text())


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_items_are_taught_and_held_paraphrases_validate(place, tmp_path):
    result = train(settings(place, tmp_path, val_size=3))
    about = told(tmp_path)
    assert about["train"]["examples"] == 12 and about["validation"]["examples"] == 3
    assert len(about["know"]["validation_ids"]) == 3 and result.val_loss is not None
    assert [f["path"].rsplit("/", 1)[1] for f in about["files"]] == ["items.jsonl", "table.parquet"]
    held = validation(ITEMS, settings(place, tmp_path, val_size=3))
    assert [i.id for i in held] == about["know"]["validation_ids"]


@pytest.mark.parametrize("control", ["none", *FILTER_CONTROLS])
def test_filter_and_controls_by_name_teach_as_many(place, tmp_path, control):
    train(settings(place, tmp_path, filter="features", keep=0.5, control=control, categories=place / "known.json"))
    about = told(tmp_path)
    know = about["know"]
    assert about["train"]["examples"] == know["kept"] == 6 and len(know["dropped_ids"]) == 6
    assert know["spread"].keys() == know["mean_distance"].keys() == {"kept", "all"}
    gone = {int(i[1:]) for i in know["dropped_ids"]}
    d = table(place)["tsd"]
    if control == "lowest-distance":
        assert max(d[i] for i in set(range(12)) - gone) <= min(d[i] for i in gone)
    if control == "no-unknown":
        assert {2, 5, 8, 11} <= gone
    if control == "loss-ranked":
        host = inlay.attach(base("llama"))
        loss = []
        for row in examples(ITEMS, TOK):
            with torch.no_grad():
                ids = torch.tensor([row.input_ids])
                loss.append(float(host.model(ids, labels=torch.tensor([row.labels])).loss))
        assert max(loss[i] for i in set(range(12)) - gone) <= min(loss[i] for i in gone)
    if control == "none":
        assert know["objective"] is not None and know["lam"] == 1.0


def test_controls_do_not_depend_on_the_order_of_the_items():
    draw = np.random.default_rng(0)
    d, loss, names = draw.random(20), draw.random(20), [f"n{i:02d}" for i in range(20)]
    kind = [("HighlyKnown", UNKNOWN)[i % 2] for i in range(20)]
    for control in FILTER_CONTROLS:
        want = None
        for p in (np.arange(20), draw.permutation(20)):
            made = control_subset(
                control, d[p], None, 0.4, [names[i] for i in p], losses=loss[p], categories=[kind[i] for i in p], seed=3
            )
            got = {names[p[i]] for i in made.kept}
            assert len(got) == 8 and got == (want := want or got)
        relations = ["few"] * 3 + ["many"] * 17
        made = control_subset(control, d, None, 0.4, names, 3, relations, losses=loss, categories=kind)
        assert {0, 1, 2} <= set(made.kept.tolist())


def test_random_subsets_follow_the_seed():
    d = np.arange(30.0)
    one, again, other = (tuple(control_subset("random", d, keep=0.5, seed=s).kept) for s in (0, 0, 1))
    assert one == again != other


def test_static_weights_are_those_of_the_table(place, tmp_path):
    """The first step's loss by hand: its items' mean losses, weighted over the batch."""
    from inlay.train.batches import Feed

    train(settings(place, tmp_path, signal="static", beta=-1.5))
    rows = examples(ITEMS, TOK)
    first = [rows.index(e) for e in Feed(rows, 4, 42, False).step(0)]
    model = base("llama")
    with torch.no_grad():
        loss = [
            model(torch.tensor([rows[i].input_ids]), labels=torch.tensor([rows[i].labels])).loss.double() for i in first
        ]
    w = weights(torch.tensor(table(place)["tsd"][first]), -1.5)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(float((torch.stack(loss) * w).mean()), rel=1e-4)


def test_beta_zero_is_the_plain_run_on_the_same_items(place, tmp_path):
    train(settings(place, tmp_path / "a"))
    train(settings(place, tmp_path / "b", signal="static", beta=0.0))
    assert same(adapter(place, tmp_path / "a"), adapter(place, tmp_path / "b"))


def test_a_table_of_another_wording_is_trained_in_that_wording(place, tmp_path):
    how = MeasureSettings(max_new_tokens=4, wording=Wording(template="Q: {prompt} A:"))
    measure(inlay.attach(base("llama")), TOK, ITEMS, how).save(tmp_path / "table")
    s = settings(place, tmp_path / "run")
    train(replace(s, know=replace(s.know, table=tmp_path / "table")))
    rows = examples(ITEMS, TOK, how.wording)
    assert told(tmp_path / "run")["train"]["tokens"] == sum(len(r.input_ids) for r in rows)


def test_beta_auto_takes_the_best_of_its_candidates(place, tmp_path, monkeypatch):
    """The final run is the chosen candidate's, to the last bit; resumed, nothing is done again."""
    import inlay.knowledge.training as training

    score = {0.0: 0.25, -1.0: 0.5, 1.0: 0.5, -2.0: 0.0}
    monkeypatch.setattr(training, "_right", lambda s, out: score[float(out.name.removeprefix("beta_"))])
    s = settings(place, tmp_path, val_size=4, signal="dynamic", beta="auto")
    train(s)
    found = json.loads((tmp_path / "beta.json").read_text())
    assert found["chosen"] == -1.0 and found["asked"] == 4
    assert [c["beta"] for c in found["candidates"]] == list(CANDIDATES)
    assert told(tmp_path)["know"]["beta"] == -1.0
    assert same(adapter(place, tmp_path), adapter(place, tmp_path / "beta_-1"))
    assert not same(adapter(place, tmp_path), adapter(place, tmp_path / "beta_+0"))
    before = (tmp_path / "beta_-2" / "metrics.jsonl").read_bytes()
    again = train(s, resume=True)
    assert again.steps == 4 and (tmp_path / "beta_-2" / "metrics.jsonl").read_bytes() == before


def test_beta_auto_counts_exact_answers_to_held_paraphrases(place, tmp_path, monkeypatch):
    """The base's own answers to some paraphrases made their targets: an adapter that says what it says gets those."""
    from inlay.knowledge.training import _right

    monkeypatch.setattr("inlay.knowledge.measure.answer_limit", lambda *of: 4)  # this base does not end its answers
    how = MeasureSettings(max_new_tokens=4)
    asked = [replace(i, prompt=i.paraphrases[0]) for i in ITEMS]
    said = measure(inlay.attach(base("llama")), TOK, asked, how)["answer0"]
    items = [replace(i, target=said[n] if n % 3 else "no") for n, i in enumerate(ITEMS)]
    write_items(tmp_path / "items.jsonl", items)
    s = settings(place, tmp_path / "run", val_size=6, steps=1, table=None)
    s = replace(s, know=replace(s.know, items=tmp_path / "items.jsonl"), optim=replace(s.optim, lr=1e-9))
    train(s)
    held = validation(items, s)
    want = np.mean([i.target != "no" for i in held])
    assert 0 < want < 1 and _right(s, tmp_path / "run") == want


def test_the_command_line(place, tmp_path, capsys):
    common = ["--items", str(place / "items.jsonl"), "--table", str(place / "table")]
    assert main(["know", "filter", *common, "--keep", "0.5", "--front", "--out", str(tmp_path / "kept.jsonl")]) == 0
    kept = read_items(tmp_path / "kept.jsonl")
    about = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept) == 7 and {i.id for i in kept} & set(about["dropped_ids"]) == set()
    assert len(about["front"]["lam"]) == len(about["front"]["spread"])
    assert "a dropped fact is a fact not taught" in capsys.readouterr().out
    run = ["train", "--model", str(place / "base"), *common, "--rank", "2", "--steps", "2", "--loggers", "none"]
    run += ["--no-progress", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*run, "--signal", "dynamic", "--beta", "-2", "--filter", "band", "--keep", "0.5"]) == 0
    recipe = (tmp_path / "run" / "settings.yaml").read_text()
    assert "know:" in recipe and "beta: -2.0" in recipe and told(tmp_path / "run")["know"]["kept"] == 6
    assert main([*run, "--signal", "dynamic", "--beta", "-2", "--filter", "band", "--keep", "0.5", "--resume"]) == 0
    capsys.readouterr()
    assert main([*run, "--signal", "dynamic", "--beta", "-1", "--filter", "band", "--keep", "0.5", "--resume"]) == 2
    assert "beta: -2.0 before, -1.0 now" in capsys.readouterr().err


def test_signals_of_the_step_need_no_items(place, tmp_path):
    data = tmp_path / "data.json"
    rows = [{"instruction": f"double {i}", "input": "", "output": f"{2 * i}", "answer": str(2 * i)} for i in range(8)]
    data.write_text(json.dumps(rows))
    s = settings(place, tmp_path / "run", items=None, table=None, signal="dynamic", beta=1.0, gamma=0.5)
    train(replace(s, data=replace(s.data, train_file=data)))
    assert all("weights_used" in m for m in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--keep", "0"], "above 0 and at most 1"),
        (["--control", "loss-ranked"], "needs --model"),
        (["--control", "no-unknown"], "needs categories"),
        (["--table", "/no/such"], "holds no table"),
        (["--keep", "0.25", "--keep-per-relation", "2"], "raise keep or lower keep_per_relation"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(place, tmp_path, capsys, arguments, match):
    common = [
        "--items",
        str(place / "items.jsonl"),
        "--table",
        str(place / "table"),
        "--out",
        str(tmp_path / "k.jsonl"),
    ]
    assert main(["know", "filter", *common, *arguments]) == 2
    assert match in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i: replace(i[0], target="else"), "another prompt or target"),
        (lambda i: replace(i[0], id="new"), "has no row for 1 items, 'new' first"),
    ],
)
def test_a_table_of_other_items_is_refused(place, tmp_path, change, match):
    write_items(tmp_path / "items.jsonl", [change(ITEMS), *ITEMS[1:]])
    s = settings(place, tmp_path / "run")
    with pytest.raises(InlayError, match=match):
        train(replace(s, know=replace(s.know, items=tmp_path / "items.jsonl")))


def test_what_cannot_be_taught_is_refused(place, tmp_path):
    s = settings(place, tmp_path)
    with pytest.raises(InlayError, match="longer than cutoff 5"):
        train(replace(s, data=replace(s.data, cutoff=5)))
    with pytest.raises(InlayError, match="leave task"):
        replace(s, data=replace(s.data, task="world-addsub"))
    with pytest.raises(InlayError, match="only 12 of 12"):
        train(replace(s, data=replace(s.data, val_size=13)))
    with pytest.raises(InlayError, match="needs val_size"):
        replace(s, know=replace(s.know, signal="static", beta="auto"))
    with pytest.raises(InlayError, match="learns prompts, too"):
        replace(s, know=replace(s.know, gamma=1.0), data=replace(s.data, protocol="published"))
