"""Measure the equalities over every family and method, and write what was measured where people read it.

    python -m tests.matrix

writes docs/results/equality.md (largest differences of logits, float32) and the support matrix in README.md. `pytest
tests/test_matrix.py` checks that what stands there is not older than the code's families and methods.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch

import inlay
from tests.laws.zoo import FAMILIES, base, batch, dressed, excite, logits, methods, places, positioned, small

ROOT = Path(__file__).parents[1]
COLUMNS = ("mixed batch", "cached", "padded", "checkpointed", "saved", "merged")
MARKS = ("<!-- matrix:begin -->", "<!-- matrix:end -->")


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def measure(family: str, name: str) -> dict[str, float | str]:
    """Largest difference between two ways of running the same adapter; for gradients relative to the largest one."""
    host, names = dressed(family), methods(family)
    inputs = positioned(family, batch(len(names), pad=2))
    used, row = inputs["attention_mask"].bool(), names.index(name)
    mixed = logits(host, *names, **inputs)[row][used[row]]
    found: dict[str, float | str] = {"mixed batch": largest(mixed, logits(host, name, **inputs)[row][used[row]])}

    one = batch(1, 6)
    full = logits(host, name, **one)
    with host.using(name), torch.no_grad():
        past = host.model(**{k: v[:, :5] for k, v in one.items()}, use_cache=True).past_key_values
        last = host.model(
            input_ids=one["input_ids"][:, 5:], attention_mask=one["attention_mask"], past_key_values=past
        ).logits
    found["cached"] = largest(last[:, 0], full[:, 5])
    wide = positioned(family, {k: torch.nn.functional.pad(v, (4, 0)) for k, v in one.items()})
    found["padded"] = largest(logits(host, name, **wide)[:, 4:], full)
    return found | alone(family, name)


def alone(family: str, name: str) -> dict[str, float | str]:
    """The measurements that change a host: gradients, files, merging."""

    def fresh():
        host = inlay.attach(base(family))
        host.add("x", small(name), at=places(name, family), seed=0)
        excite(host)
        return host

    def gradients(checkpoint: bool) -> list[torch.Tensor]:
        host = fresh()
        host.model.train()
        if checkpoint:
            host.model.gradient_checkpointing_enable()
        for module in host.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with host.using("x"):
            host.model(**batch(), labels=batch()["input_ids"], use_cache=False).loss.backward()
        return [torch.zeros(()) if p.grad is None else p.grad for p in host.parameters("x")]

    plain, saved = gradients(False), gradients(True)
    scale = max(g.abs().max().item() for g in plain)
    found: dict[str, float | str] = {"checkpointed": max(map(largest, plain, saved)) / scale}
    host = fresh()
    want = logits(host, "x", **batch())
    with tempfile.TemporaryDirectory() as folder:
        inlay.save(host, "x", folder)
        again = inlay.attach(base(family))
        inlay.load(again, folder)
    found["saved"] = largest(logits(again, "x", **batch()), want)
    try:
        inlay.merge(host, "x")
        found["merged"] = largest(logits(host, None, **batch()), want)
    except inlay.InlayError:
        found["merged"] = "refused"
    return found


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body)])


def main() -> None:
    from rich.progress import track

    torch.set_num_threads(1)
    cells: dict[tuple[str, str], dict[str, float | str]] = {}
    for family in track(FAMILIES, "measuring"):
        for name in methods(family):
            cells[family, name] = measure(family, name)
    names = list(inlay.METHODS)

    def worst(select) -> list[str]:
        out = []
        for column in COLUMNS:
            values = [c[column] for key, c in cells.items() if select(key)]
            numbers = [v for v in values if isinstance(v, float)]
            out.append(f"{max(numbers):.0e}" if numbers else "refused")
        return out

    by_method = [["method", *COLUMNS], *([n, *worst(lambda k, n=n: k[1] == n)] for n in names)]
    by_family = [["family", *COLUMNS], *([f, *worst(lambda k, f=f: k[0] == f)] for f in FAMILIES)]
    text = f"""# Equalities, measured

Largest difference of logits between two ways of running the same adapter, in float32, on tiny random models (2
layers, logits up to about 10), over {len(cells)} pairs of family and method. `python -m tests.matrix` measures and
writes this page.

- *mixed batch*: the row in one batch with every other method, against the adapter alone;
- *cached*: a token decoded on a KV cache, against the whole sequence at once;
- *padded*: four columns of left padding, against none;
- *checkpointed*: gradients under gradient checkpointing, relative to the largest;
- *saved*: saved, loaded on a fresh base (0 is bit-equal);
- *merged*: the merged base, against base and adapter; refused where the method is not linear or has no weight.

## By method, worst over the families

{table(by_method)}

## By family, worst over the methods

{table(by_family)}

torch {torch.__version__}, transformers {__import__("transformers").__version__}.
"""
    out = ROOT / "docs" / "results" / "equality.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    rows = [["", *FAMILIES], *([n, *("✓" if (f, n) in cells else "–" for f in FAMILIES)] for n in names)]
    readme = ROOT / "README.md"
    pattern = re.compile(f"{MARKS[0]}.*?{MARKS[1]}", re.S)
    readme.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n{table(rows)}\n{MARKS[1]}", readme.read_text()))


if __name__ == "__main__":
    main()
