"""What README.md and the recipes tell people to type is what the code understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from inlay.cli.parse import read, shipped
from inlay.cli.verbs import NAMES, every, named, verb
from inlay.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


COMMANDS = [
    shlex.split(line, comments=True)
    for text in (README, *(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))))
    for block in blocks(text, "(?:bash|sh|console)?")
    for line in block.splitlines()
    if line.startswith("inlay ")
]
EXAMPLES = [shlex.split(example) for name in every() for example in verb(name).examples]


@pytest.mark.parametrize("command", COMMANDS + EXAMPLES, ids=lambda c: " ".join(c[1:4]))
def test_commands_parse(command):
    name, args = named(command[1:])
    if "--help" in command:
        with pytest.raises(SystemExit) as done:
            read(verb(name), args)
        assert done.value.code in (0, None)
    elif "my.yaml" not in command:
        settings = read(verb(name), args)
        assert type(settings).__name__ == verb(name).settings_class.__name__


def test_every_verb_is_shown():
    shown = {c[1] for c in COMMANDS}
    assert shown | {"demo"} >= set(NAMES)


def test_the_python_tour_runs(tmp_path, monkeypatch):
    (tour,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    _base_if_absent(monkeypatch)
    exec(compile(tour, "README.md", "exec"), {})
    assert (tmp_path / "math-adapter" / "adapter.json").is_file()


def _base_if_absent(monkeypatch) -> None:
    """A random base stands in where the embedded weights have not been made."""
    from inlay.models import base, embedded

    try:
        if any(Path(embedded.path("llama")).glob("*.safetensors")):
            return
    except Exception:
        pass
    from tests.evaluate.tiny import base as random_base
    from tests.evaluate.tiny import tokenizer

    monkeypatch.setattr(base, "load_base", lambda name: (random_base("llama"), tokenizer()))


def test_every_method_is_in_the_readme():
    section = README.partition("## Methods")[2].partition("##")[0]
    assert set(METHODS) == set(re.findall(r"`([a-z0-9-]+)`", section)) & set(METHODS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("name", shipped())
def test_recipes_parse_and_their_methods_can_be_made(name):
    settings = read(verb("train"), ["--recipe", name])
    METHODS[settings.method].make(**settings.settings)
    from inlay.plan import plan

    assert plan(settings.model, settings.method, at=settings.at, settings=settings.settings).trainable > 0


def test_ci_runs_what_the_readme_says():
    ci = ROOT / ".ci" / "run"
    assert "make test" in ci.read_text() and ci.stat().st_mode & 0o111
