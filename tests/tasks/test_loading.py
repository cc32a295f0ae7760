"""Loading: names, files, folders, checksums, the Hub's real library on local files, and mixtures."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import CLEAN, COMMONSENSE, MATH, TASKS, Record, get, load, loading, to_json
from inlay.tasks.score import equal
from inlay.tasks.task import Checksum, Hub

ROW = {"instruction": "q", "input": "", "output": "o", "answer": "1"}


def write(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("boolq", "boolq"),
        ("BoolQ", "boolq"),
        ("siqa", "social_i_qa"),
        ("Social_IQA", "social_i_qa"),
        ("obqa", "openbookqa"),
        ("arc-e", "ARC-Easy"),
        ("arc_easy", "ARC-Easy"),
        ("ARC-C", "ARC-Challenge"),
        ("arc challenge", "ARC-Challenge"),
        ("GSM8K", "gsm8k"),
        ("AQUA", "AQuA"),
        ("World_AddSub", "world-addsub"),
        ("commonsense-170K", "commonsense_170k"),
    ],
)
def test_names(name: str, task: str) -> None:
    assert get(name).name == task and get(get(name)) is get(name)


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(InlayError, match="unknown task 'csqa'; there is: AQuA, ARC-Challenge.*winogrande, world-"):
        load("csqa")


def test_the_table_is_complete() -> None:
    assert len(MATH) == 6 and len(COMMONSENSE) == 8 and {"MAWPS", "MathQA", "math_10k", "alpaca"} <= set(TASKS)
    parts = get("commonsense_170k").parts
    assert sum(get(p).sizes["train"] for p in parts) == 170_420 == get("commonsense_170k").sizes["train"]
    assert [len(get("winogrande").hub.splits[s]) for s in ("train", "test")] == [6, 1]
    assert all(task.licence for task in TASKS.values())
    assert {t.max_new_tokens for t in TASKS.values() if t.group == "math"} == {256}


@pytest.mark.parametrize("name", [*MATH, *(n for n in COMMONSENSE if n != "hellaswag"), "MAWPS", "MathQA"])
def test_every_published_test_file_loads_whole_and_verified(data: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = load(name, source=data)
    assert len(records) == get(name).sizes["test"]
    assert all(r.instruction and r.answer and not r.input for r in records)


@pytest.mark.parametrize("name", ["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa", "math_data"])
def test_published_training_files(data: Path, name: str) -> None:
    assert len(load(name, "train", data)) == get(name).sizes["train"]


def test_mawps_training_rows_become_worked_equations(data: Path) -> None:
    with pytest.warns(UserWarning, match="56 of 1898 rows left out"):
        records = load("mawps", "train", data)
    assert len(records) == 1842
    assert records[0].output == "22 - 14 = 8. 8 / 4 = 2. The answer is 2" and records[0].answer == "2.0"


@pytest.mark.parametrize("where", ["test.json", "GSM8K/test.json", "dataset/Gsm8k/test.json"])
def test_folders_of_any_case(tmp_path: Path, where: str) -> None:
    write(tmp_path / where, [ROW])
    with pytest.warns(UserWarning, match="not the published"):
        assert load("gsm8k", source=tmp_path) == [Record(**ROW)]


def test_a_folder_of_another_task_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "MultiArith" / "test.json", [ROW])
    with pytest.raises(InlayError, match="has no test.json or testset.json for AddSub"):
        load("addsub", source=tmp_path / "MultiArith")


def test_a_training_set_lies_in_its_own_file(tmp_path: Path) -> None:
    write(tmp_path / "ft-training_set" / "math_10k.json", [{k: ROW[k] for k in ("instruction", "output")}])
    with pytest.warns(UserWarning, match="has git blob .* published is git blob 27dba77d"):
        assert load("math_10k", "train", tmp_path) == [Record("q", "", "o", "")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_json_lines_and_archives(tmp_path: Path, name: str) -> None:
    lines = name.startswith("a.jsonl")
    text = json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n" if lines else json.dumps([ROW, ROW])
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    task = dataclasses.replace(get("gsm8k"), checksums={})
    assert load(task, source=path) == [Record(**ROW)] * 2


def test_a_written_set_reads_back(tmp_path: Path) -> None:
    records = [Record("a\u2028b", "", "o", "1"), Record("\u00e9", "", "o", "-2")]
    task = dataclasses.replace(get("gsm8k"), checksums={})
    for name in ("x.json", "x.jsonl"):
        to_json(records, tmp_path / name)
        assert load(task, source=tmp_path / name) == records


def test_digests_either_of_which_suffices(tmp_path: Path) -> None:
    path = write(tmp_path / "test.json", [ROW])
    raw = path.read_bytes()
    sha = hashlib.sha256(raw).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (Checksum(sha, None), Checksum(None, blob), Checksum(sha, "0"), Checksum("0", blob)):
            load(dataclasses.replace(get("gsm8k"), checksums={"test": known}), source=path)
    with pytest.warns(UserWarning, match=f"sha256 {sha}, published is sha256 00ff"):
        load(dataclasses.replace(get("gsm8k"), checksums={"test": Checksum("00ff", None)}), source=path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"instruction": "q"}], r"f\.json, record 1: field 'answer' is missing; it has instruction"),
        ([{"question": "q"}], r"f\.json, record 0: field 'answer' is missing; it has question"),
        ([{"a": 1}], r"f\.json, record 0: field 'instruction'.* is missing; it has a"),
        ([{**ROW, "answer": None}], "record 0: field 'answer' must be text, it is NoneType"),
        ([{**ROW, "instruction": ["q"]}], "record 0: field 'instruction' must be text, it is list"),
        ([1], "record 0: an object was expected, not int"),
        ([], "holds no records"),
    ],
)
def test_schema_errors(tmp_path: Path, rows: list, message: str) -> None:
    path = write(tmp_path / "f.json", rows)
    with pytest.raises(InlayError, match=message):
        load(dataclasses.replace(get("gsm8k"), checksums={}), source=path)


@pytest.mark.parametrize("column", sorted(loading._MEANT))
def test_a_column_that_belongs_to_the_task_is_never_dropped(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "a.json", [ROW, ROW | {column: ["said before"]}])
    with pytest.raises(InlayError, match=rf"record 1: the column '{column}' belongs to the task"):
        load("math_10k", "train", file)
    write(file, [ROW | {column: None}, ROW | {column: []}])  # there, and empty
    assert len(load("math_10k", "train", file)) == 2


def test_other_columns_are_named_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [ROW | {"id": 7}, ROW | {"source": "web", "note": ""}])
    with pytest.warns(UserWarning, match="nothing is learned of the columns id, source$"):
        load("math_10k", "train", file)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('[{"a": 1},\n{"a" 2}]')
    with pytest.raises(InlayError, match=r"f\.json, line 2: not JSON"):
        load("gsm8k", source=tmp_path / "f.json")
    with pytest.raises(InlayError, match="no file or folder"):
        load("gsm8k", source=tmp_path / "none")
    with pytest.raises(InlayError, match="has no test.json or testset.json for gsm8k .*it holds: f.json"):
        load("gsm8k", source=tmp_path)
    with pytest.raises(InlayError, match="AddSub has no split 'train'; there is: test"):
        load("addsub", "train")
    with pytest.raises(InlayError, match=r"AddSub \(test\) has no public source .* source="):
        load("addsub")
    with pytest.raises(InlayError, match="limit 0"):
        load("addsub", limit=0)


def test_a_limit_is_a_seeded_draw_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", [{**ROW, "instruction": str(i)} for i in range(100)])
    task = dataclasses.replace(get("gsm8k"), checksums={})
    one = [int(r.instruction) for r in load(task, source=path, limit=10, seed=1)]
    assert one == sorted(one) and len(set(one)) == 10
    assert one == [int(r.instruction) for r in load(task, source=path, limit=10, seed=1)]
    assert one != [int(r.instruction) for r in load(task, source=path, limit=10, seed=2)]
    assert len(load(task, source=path, limit=1000)) == 100


def test_the_hub_is_asked_for_every_config(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name: str, config: str | None = None, split: str | None = None):
        asked.append((name, config, split))
        row = {"sentence": f"{config} _", "option1": "a", "option2": "b", "answer": "1"}
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.warns(UserWarning, match="12 rows, the published train split has 63238"):
        records = load("winogrande", "train")
    assert len(records) == 12 and records[0].answer == "option1"
    sizes = ("xs", "s", "m", "l", "xl", "debiased")
    assert asked == [("allenai/winogrande", f"winogrande_{s}", "train") for s in sizes]


def test_the_real_datasets_library_reads_a_local_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": i} for i in (0, 1)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    hub = Hub(str(tmp_path), {"test": ((None, "validation"),)})
    task = dataclasses.replace(get("piqa"), hub=hub, sizes={"test": 2}, checksums={})
    assert [r.answer for r in load(task)] == ["solution1", "solution2"]
    broken = dataclasses.replace(task, hub=Hub(str(tmp_path), {"test": ((None, "nosuch"),)}))
    with pytest.raises(InlayError, match="cannot load .*nosuch.*Or give .*source="):
        load(broken)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InlayError, match=r"pip install inlay\[data\]"):
        load("piqa")


def test_a_mixture_is_put_together_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = get("commonsense_170k").parts
    monkeypatch.setattr(loading, "_verify", lambda *_: None)
    for name in parts[:-1]:
        write(tmp_path / name / "train.json", [{**ROW, "instruction": name}])
    with pytest.raises(InlayError, match="needs 8 parts; these cannot be read:\n  openbookqa: .*has no train.json"):
        load("commonsense_170k", "train", tmp_path)
    write(tmp_path / parts[-1] / "train.json", [{**ROW, "instruction": parts[-1]}])
    assert [r.instruction for r in load("commonsense_170k", "train", tmp_path)] == list(parts)
    write(tmp_path / "commonsense_170k.json", [ROW])
    assert load("commonsense_170k", "train", tmp_path) == [Record(**ROW)]


@pytest.mark.parametrize("name", [n for n in TASKS if n.startswith("world-")])
def test_the_synthetic_world(name: str) -> None:
    task = get(name)
    for split in ("train", "test"):
        records = load(name, split, limit=20, seed=3)
        assert len(records) == 20 and records == load(name, split, limit=20, seed=3)
        for record in records:
            if task.kind == "choice":
                assert record.answer in task.options(record) and len(task.option_texts(record)) > 1
            if task.kind == "number":
                float(record.answer)
            said = CLEAN.extract(record.output, task.kind, task.answers)
            assert said is not None and equal(said, record.answer, task.kind), record


def test_tasks_import_neither_torch_nor_datasets() -> None:
    code = "import sys, inlay.tasks.leaks, inlay.tasks.score; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_file_of_another_task_is_recognised(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"original_text": "q", "equation": "x=1+1", "ans": 2}]))
    with pytest.raises(InlayError, match=r"Rows of MAWPS look like this: name that task \(--task mawps\)"):
        load("gsm8k", "test", file)
