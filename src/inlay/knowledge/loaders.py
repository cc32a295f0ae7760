"""Public sets of facts as items: PopQA, EntityQuestions, zsRE and CounterFact, from the Hub or from their own files."""

from __future__ import annotations

import ast
import csv
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError, unknown
from inlay.knowledge.items import Item
from inlay.tasks.loading import read_rows

Row = Mapping[str, Any]
SPLITS = {"train": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}
"""How files name their splits -> how items do."""


@dataclass(frozen=True)
class Source:
    """One public set."""

    name: str
    hub: str | None
    """Its id on the Hub; None where none is known that keeps all fields."""
    file: str | None
    """A file of that repository, where it is no ordinary data set."""
    splits: Mapping[str, str]
    """Split of items -> split on the Hub."""
    get: str
    """Where its own files are."""
    item: Callable[[Row, str], Item | None]
    """(row, id) -> item; None leaves the row out."""
    kept: Callable[[Row, str], list[Item]] | None
    """(row, id) -> facts that an edit of this row should leave as they are."""


def load_items(
    name: str,
    source: str | Path | None = None,
    split: str = "test",
    *,
    retention: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """Items of a public set.

    Args:
        name: `popqa`, `entityquestions`, `zsre` or `counterfact`.
        source: one of the set's own files (JSON, JSON lines, `.gz`, CSV, TSV, Parquet) or, for EntityQuestions, the
            folder with a file per relation; None asks the Hub.
        split: `train`, `val` or `test`, where the source has splits; written into the items.
        retention: instead of the facts to learn, those that learning them should leave alone (zsRE's locality
            questions, CounterFact's neighbourhood prompts).
        limit: at most so many rows of the source, drawn with `seed`.

    Raises InlayError for an unknown set or split, a file that is not there, and rows that do not fit.
    """
    if name.lower() not in SOURCES:
        raise unknown("set of facts", name, SOURCES)
    if split not in ("train", "val", "test"):
        raise unknown("split", split, ("train", "val", "test"))
    found = SOURCES[name.lower()]
    if retention and found.kept is None:
        raise InlayError(f"{found.name} names no facts to keep; use facts of it that are not trained on")
    rows = list(_hub(found, split) if source is None else _files(Path(source), split))
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    items: dict[str, Item] = {}
    for at, row in rows:
        for item in _made(found, row, at, retention):
            items.setdefault(item.id, Item(**{**item.__dict__, "split": split}))
    if not items:
        raise InlayError(f"{source or found.hub} holds no items of {found.name}")
    return list(items.values())


def _made(source: Source, row: Any, at: str, retention: bool) -> list[Item]:
    if not isinstance(row, Mapping):
        raise InlayError(f"{at}: an object was expected, not {type(row).__name__}")
    where = re.sub(r"[^A-Za-z0-9.]+", "-", at.rpartition("/")[2]).strip("-")
    try:
        if retention and source.kept is not None:
            return source.kept(row, where)
        item = source.item(row, where)
        return [] if item is None else [item]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise InlayError(
            f"{at}: no row of {source.name} ({type(e).__name__}: {e}); it has {', '.join(sorted(map(str, row)))}"
        ) from e


# ---- where rows come from --------------------------------------------------------------------------------------------
def _hub(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    if source.hub is None or split not in source.splits:
        there = f"on the Hub it has {', '.join(source.splits)}" if source.hub else "it is not on the Hub in full"
        raise InlayError(f"{source.name} ({split}): {there}. Give its own file as the source ({source.get})")
    try:
        import datasets
    except ImportError as e:
        raise InlayError(f"reading {source.hub} needs the `datasets` library: pip install 'inlay[data]'") from e
    try:
        if source.file is None:
            rows = datasets.load_dataset(source.hub, split=source.splits[split])
        else:
            file = f"hf://datasets/{source.hub}/{source.file}"
            rows = datasets.load_dataset("json", data_files=file, split="train")
    except Exception as e:
        raise InlayError(
            f"cannot load {source.hub}: {type(e).__name__}: {e}. Or give its own file ({source.get})"
        ) from e
    yield from ((f"{source.name}-{n}", row) for n, row in enumerate(rows))


def _files(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file, or of the files of a folder that are of this split (`P17.test.json`, `test/P17.jsonl`)."""
    if path.is_file():
        yield from _rows(path)
        return
    if not path.is_dir():
        raise InlayError(f"there is no file or folder {str(path)!r}")
    files = [
        f for f in sorted(path.rglob("*")) if f.is_file() and _READ.get(_ending(f)) and _split_of(f, path) == split
    ]
    if not files:
        raise InlayError(f"{path} holds no files of split {split!r}, such as {split}/P17.{split}.json")
    for file in files:
        yield from _rows(file)


def _split_of(file: Path, root: Path) -> str | None:
    words = [*file.relative_to(root).parts[:-1], *file.name.split(".")[:-1]]
    return next((SPLITS[w] for w in reversed(words) if w in SPLITS), None)


def _ending(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    read = _READ.get(_ending(path))
    if read is None:
        raise InlayError(f"{path}: files of facts end in {', '.join(_READ)}")
    yield from ((f"{path}, row {n}", row) for n, row in read(path))


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8", newline="") as f:
        yield from enumerate(csv.DictReader(f, delimiter="\t" if path.suffix == ".tsv" else ","), 2)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise InlayError("Parquet files need pyarrow: pip install 'inlay[knowledge]'") from e
    yield from enumerate(parquet.read_table(path).to_pylist())


_READ: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": read_rows, ".jsonl": read_rows, ".csv": _table, ".tsv": _table, ".parquet": _parquet,
}  # fmt: skip


# ---- rows of each set ------------------------------------------------------------------------------------------------
def _listed(value: Any) -> list[str]:
    """A list, or one that was written as text (PopQA's `possible_answers`)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = ast.literal_eval(value)
    if not isinstance(value, list):
        raise TypeError(f"a list of answers was expected, not {value!r}")
    return [str(v).strip() for v in value if str(v).strip()]


def _others(target: str, answers: list[str]) -> tuple[str, ...]:
    return tuple(a for a in dict.fromkeys(answers) if a != target)


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a text that is not empty, not {value!r}")
    return value.strip()


def popqa(row: Row, at: str) -> Item:
    """PopQA (Mallen et al. 2023): `question`, `obj`, `possible_answers` (a list written as text), `prop`, `subj`."""
    target = _text(row, "obj")
    others = _others(target, _listed(row["possible_answers"]))
    return Item(f"popqa-{row['id']}", _text(row, "question"), target, others, _text(row, "prop"), _text(row, "subj"))


def entityquestions(row: Row, at: str) -> Item:
    """EntityQuestions (Sciavolino et al. 2021): `question`, `answers`; the relation is in the file's name."""
    answers = _listed(row["answers"])
    relation = re.match(r"P\d+", at)
    return Item(at, _text(row, "question"), answers[0], _others(answers[0], answers), relation[0] if relation else "")


def zsre(row: Row, at: str) -> Item:
    """zsRE as edited by MEND and ROME (`src`, `alt`, `rephrase`), or by KnowEdit (`prompt`, `target_new`)."""
    if "src" in row:
        target, subject = _text(row, "alt"), str(row.get("subject") or "")
        return Item(at, _text(row, "src"), target, (), "", subject, (_text(row, "rephrase"),))
    again = row.get("rephrase_prompt") or row.get("rephrase")
    said = (str(again).strip(),) if again else ()
    return Item(at, _text(row, "prompt"), _text(row, "target_new"), (), "", str(row.get("subject") or ""), said)


def zsre_kept(row: Row, at: str) -> list[Item]:
    """zsRE's locality question, an unrelated one of Natural Questions."""
    if "loc" in row:
        question = _text(row, "loc").removeprefix("nq question:").strip()
        return [Item(f"{at}-kept", question, _text(row, "loc_ans"))]
    found = []
    for kind, cases in (row.get("locality") or {}).items():
        for n, case in enumerate(cases or []):
            truth = case["ground_truth"]
            while isinstance(truth, list):
                truth = truth[0]
            found.append(Item(f"{at}-kept-{n}", _text(case, "prompt"), str(truth).strip(), relation=str(kind)))
    return found


def counterfact(row: Row, at: str) -> Item:
    """CounterFact (Meng et al. 2022): the false fact to be taught, as the sentence to complete."""
    asked = row["requested_rewrite"]
    subject, again = _text(asked, "subject"), tuple(p.strip() for p in row.get("paraphrase_prompts") or ())
    prompt = _text(asked, "prompt").replace("{}", subject)
    target = _text(asked["target_new"], "str")
    return Item(f"counterfact-{row['case_id']}", prompt, target, (), _text(asked, "relation_id"), subject, again)


def counterfact_kept(row: Row, at: str) -> list[Item]:
    """Neighbourhood prompts: other subjects of which the true object holds."""
    asked = row["requested_rewrite"]
    truth, relation = _text(asked["target_true"], "str"), _text(asked, "relation_id")
    prompts = row.get("neighborhood_prompts") or ()
    case = f"counterfact-{row['case_id']}"
    return [Item(f"{case}-kept-{n}", p.strip(), truth, relation=relation) for n, p in enumerate(prompts)]


SOURCES = {
    "popqa": Source("PopQA", "akariasai/PopQA", None, {"test": "test"}, "test.tsv of akariasai/PopQA", popqa, None),
    "entityquestions": Source(
        "EntityQuestions", None, None, {}, "dataset.zip of princeton-nlp/EntityQuestions, unpacked",
        entityquestions, None,
    ),
    "zsre": Source(
        "zsRE", "zjunlp/KnowEdit", "benchmark/ZsRE/ZsRE-test-all.json", {"test": "train"},
        "zsre_mend_eval.json of ROME", zsre, zsre_kept,
    ),
    "counterfact": Source(
        "CounterFact", "azhx/counterfact", None, {"train": "train", "test": "test"},
        "counterfact.json of ROME", counterfact, counterfact_kept,
    ),
}  # fmt: skip
"""By lower-case name."""
