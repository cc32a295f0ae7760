"""The house's floors: imports run down only, the core knows torch alone, and `import inlay` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "inlay"
FLOORS = (
    ("compat", "core"),
    ("methods", "models", "deltas", "interop", "tasks", "threads", "api", "__init__"),
    ("engine",),
    ("train", "evaluate", "knowledge", "library", "plan"),
    ("study", "serve", "demo"),
    ("cli", "__main__"),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
ALONE = {"tasks": {"tasks"}, "methods": {"methods"}, "deltas": {"deltas"}}
"""Rooms of the second floor that know nothing of their neighbours."""
CORE_MAY = {"torch", "safetensors", "inlay"}
FILES = sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; relative ones spelled out."""
    package = ("inlay", *path.relative_to(SRC).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            if module == "inlay":
                yield from ((node.lineno, f"inlay.{a.name}") for a in node.names)
            else:
                yield node.lineno, module


def test_every_file_stands_on_a_floor():
    assert {room(f) for f in FILES} <= set(FLOOR), "name the new package in FLOORS"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_down(path):
    here = room(path)
    for line, name in imports(path):
        head, _, rest = name.partition(".")
        if head != "inlay":
            continue
        there = rest.partition(".")[0]
        there = there if there in FLOOR else "__init__"
        assert FLOOR[there] <= FLOOR[here], f"{path.name}:{line} imports {name}, which stands above {here}"
        if here in ALONE and there not in ("core", "__init__"):
            assert there in ALONE[here], f"{path.name}:{line} imports {name}; {here} knows the core only"


@pytest.mark.parametrize("path", sorted((SRC / "methods").glob("[a-z]*.py")), ids=lambda p: p.name)
def test_methods_do_not_import_each_other(path):
    """But for the gate, which is made of another edit and names one by default."""
    others = {name for _, name in imports(path) if name.startswith("inlay.methods")}
    assert others <= ({"inlay.methods.lora"} if path.name == "gate.py" else set())


@pytest.mark.parametrize("path", sorted((SRC / "compat").glob("*.py")), ids=lambda p: p.name)
def test_compat_knows_errors_alone_and_imports_its_neighbour_when_asked(path):
    assert {n for _, n in imports(path) if n.startswith("inlay.") and not n.startswith("inlay.compat")} <= {
        "inlay.core.errors"
    }
    top = {a.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import) for a in node.names}
    top |= {n.module or "" for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and not n.level}
    outside = {n.partition(".")[0] for n in top} - set(sys.stdlib_module_names) - {"torch", "inlay"}
    assert not outside, "import it inside the functions that need it"


@pytest.mark.parametrize("path", sorted((SRC / "core").glob("*.py")), ids=lambda p: p.name)
def test_the_core_knows_torch_alone(path):
    outside = {n.partition(".")[0] for _, n in imports(path)} - set(sys.stdlib_module_names) - CORE_MAY
    assert not outside


def loaded(code: str) -> set[str]:
    """Modules in a fresh interpreter after this code."""
    show = "import sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    made = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(made.stdout.split("\n")[-2].split())


def test_import_inlay_is_light():
    assert not loaded("import inlay") & {"torch", "transformers", "datasets", "peft", "accelerate"}
    assert not loaded("import inlay; inlay.attach, inlay.method, inlay.METHODS") & {"transformers", "datasets", "peft"}
    assert not loaded("import inlay.tasks") & {"torch", "transformers", "datasets"}


def test_the_command_line_says_what_it_can_do_without_torch():
    assert not loaded("from inlay.cli import main; main(['--help'])") & {"torch", "transformers", "datasets"}
