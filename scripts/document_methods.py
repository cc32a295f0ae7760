"""Write docs/methods.md from the methods themselves: `python scripts/document_methods.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import torch

import inlay
from inlay.plan.skeleton import skeleton


def settings(row: inlay.core.method.Method) -> str:
    """The settings of a method, with the defaults of this row and the docstrings under the fields."""
    lines = []
    sources = [inspect.getsource(c) for c in row.edit.__mro__ if dataclasses.is_dataclass(c)]
    made = row.make()
    for f in dataclasses.fields(row.edit):
        told = next(
            (m[1] for s in sources if (m := re.search(rf'\n    {f.name}:[^\n]*\n    """(.*?)"""', s, re.S))), ""
        )
        lines.append(f"| `{f.name}` | `{getattr(made, f.name)!r}` | {' '.join(told.split())} |")
    return "\n".join(["| setting | default | |", "|---|---|---|", *lines]) if lines else "No settings."


def main() -> None:
    torch.set_num_threads(1)
    host = inlay.attach(skeleton("llama-7b"))
    parts = [
        "# Methods\n\nGenerated from the code by `python scripts/document_methods.py`. *Numbers* are those trained on "
        "LLaMA-7B at the default settings and places.\n"
    ]
    seen = {}
    for name, row in inlay.METHODS.items():
        try:
            host.add("x", row.make(), at=row.places)
            count = f"{host.count('x'):,}"
            host.remove("x")
        except inlay.InlayError as e:
            count = f"none: {e}"
        parts.append(
            f"## {name}\n\n{row.about[0].upper()}{row.about[1:]}. Default places `{row.places}`. Numbers: {count}.\n"
        )
        if row.edit in seen:
            parts.append(f"The formula is that of [{seen[row.edit]}](#{seen[row.edit]}).\n")
        else:
            parts.append(f"```text\n{inspect.cleandoc(row.edit.__doc__)}\n```\n")
            seen[row.edit] = name
        parts.append(settings(row) + "\n")
    (Path(__file__).parents[1] / "docs" / "methods.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
