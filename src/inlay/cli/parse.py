"""From flags and a recipe to one settings object: the same names, the same types, flags over recipe, nothing unknown.

A settings class with a `method` takes that method's own settings as flags too (`--method lora --rank 8`), and under
`settings:` in a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from inlay.cli.verbs import Verb, field_docs
from inlay.core.errors import InlayError
from inlay.threads import ThreadSettings
from inlay.train import yaml_file

MISSING = dataclasses.MISSING
COMMON = {f.name for f in dataclasses.fields(ThreadSettings)}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One flag: its name on the command line, and where its value belongs in the settings."""

    flag: str
    section: str
    name: str
    positional: bool = False
    held: str = ""
    """The attribute of tyro's result that holds the section, if it is not the section's name."""


def read(verb: Verb, argv: Sequence[str]) -> Any:
    """The settings of a verb from its arguments. Mistakes raise InlayError; `--help` and tyro's own errors exit."""
    argv, recipe_file = _take(list(argv), "--recipe")
    recipe = read_yaml(recipe_file) if recipe_file else {}
    method = _method(verb.settings_class, argv, recipe)
    flags, leaves = flag_class(verb, method, recipe)
    if not {"-h", "--help"} & set(argv):
        _refuse_unknown(argv, leaves, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a recipe's plain values stand in as defaults; read_plain types them below
        values: Any = tyro.cli(
            flags,
            args=argv,
            prog=f"inlay {verb.name}",
            description=_description(verb, method),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    plain = merge(recipe, values, leaves, given(argv, leaves))
    from inlay.train.settings import read_plain

    return read_plain(plain, verb.settings_class)


def read_yaml(path: str) -> dict[str, Any]:
    """A recipe as nested mappings; what is not a mapping of settings is an error."""
    file = Path(path)
    if not file.is_file():
        known = shipped()
        if path not in known:
            names = ", ".join(known)
            raise InlayError(f"there is no recipe {path!r}; give a YAML file, or one that comes along: {names}")
        file = known[path]
    found = yaml_file.read_yaml(file)
    if not isinstance(found, Mapping):
        raise InlayError(f"{path} must hold a mapping of settings, such as `model: tiny-llama`")
    return {str(k): v for k, v in found.items()}


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with Inlay, installed or in its source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return {f.stem: f for f in sorted(folder.glob("*.yaml"))}
    return {}


# ---- which method ----------------------------------------------------------------------------------------------------
def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Take `flag VALUE` or `flag=VALUE` out of the arguments."""
    for i, arg in enumerate(argv):
        if arg == flag:
            if i + 1 == len(argv):
                raise InlayError(f"{flag} needs a value")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if arg.startswith(flag + "="):
            return argv[:i] + argv[i + 1 :], arg.partition("=")[2]
    return argv, None


def _method(settings: type, argv: list[str], recipe: Mapping[str, Any]) -> Any:
    """The row of the table of methods that is asked for; None where the verb knows no methods."""
    fields = {f.name: f for f in dataclasses.fields(settings)}
    if "method" not in fields or "settings" not in fields:
        return None
    from inlay.methods import method

    _, flag = _take(list(argv), "--method")
    return method(str(flag or recipe.get("method") or fields["method"].default))


# ---- flags -----------------------------------------------------------------------------------------------------------
def flag_class(verb: Verb, method: Any, recipe: Mapping[str, Any]) -> tuple[type, list[Leaf]]:
    """The dataclass that tyro reads, and its leaves. What the recipe gives is no longer required of the flags."""
    made: list[tuple[str, Any, Any]] = []
    leaves: list[Leaf] = []
    cls = verb.settings_class
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if field.name == "settings" and method is not None:
            continue
        if dataclasses.is_dataclass(hint):
            leaves += [Leaf(f.name, field.name, f.name) for f in dataclasses.fields(hint)]
            made.append((field.name, hint, dataclasses.field(default_factory=cast(Any, hint))))
            continue
        positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
        leaves.append(Leaf(field.name, "", field.name, positional))
        default = _default(field)
        if field.name in recipe and (default is MISSING or positional):
            default = recipe[field.name]
        made.append((field.name, Annotated[hint, tyro.conf.arg(help=docs.get(field.name))], _field(default)))
    if method is not None:
        taken = {leaf.flag for leaf in leaves}
        title = method.name.replace("-", "_")  # tyro's title for the section
        section, own = _method_class(method, taken, title)
        leaves += own
        made.append((title, section, dataclasses.field(default_factory=section)))
    made.sort(key=_rank)
    return dataclasses.make_dataclass(verb.name, made), leaves


def _rank(item: tuple[str, Any, Any]) -> int:
    """Where a flag stands: what must be given first, what all commands have in common last."""
    if item[2].default is item[2].default_factory is MISSING:
        return 0
    return 2 if item[0] in COMMON else 1


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _field(default: Any) -> Any:
    if isinstance(default, (dict, list, set)):
        return dataclasses.field(default_factory=lambda: default)
    return dataclasses.field() if default is MISSING else dataclasses.field(default=default)


def _method_class(method: Any, taken: set[str], title: str) -> tuple[type, list[Leaf]]:
    """A method's settings as flags, with its row's defaults; a name the verb has already becomes `--method-<name>`."""
    hints = typing.get_type_hints(method.edit, include_extras=True)
    docs = field_docs(method.edit)
    start = method.make()
    made, leaves = [], []
    for field in dataclasses.fields(method.edit):
        if dataclasses.is_dataclass(getattr(start, field.name)):
            continue  # an edit inside an edit is composed in Python
        flag = f"method_{field.name}" if field.name in taken else field.name
        leaves.append(Leaf(flag, "settings", field.name, held=title))
        note = tyro.conf.arg(name=flag.replace("_", "-"), help=docs.get(field.name))
        made.append((field.name, Annotated[hints[field.name], note], _field(getattr(start, field.name))))
    section = dataclasses.make_dataclass(method.name, made)
    section.__doc__ = f"Settings of {method.name}: {method.about}. Hangs at {method.places} unless --at says otherwise."
    return section, leaves


def _description(verb: Verb, method: Any) -> str:
    lines = [verb.about, "", "Examples:", *(f"  {e}" for e in verb.examples)]
    if method is not None:
        from inlay.methods import METHODS

        lines += ["", f"Methods: {', '.join(METHODS)}.", "`--method NAME --help` lists a method's own settings."]
    lines += ["", "`--recipe FILE` reads the same settings from YAML; flags override it."]
    return "\n".join(lines)


# ---- what was asked for ----------------------------------------------------------------------------------------------
def _flag_name(arg: str) -> str | None:
    """`--no-lr-x=3` -> `no_lr_x`; None for what is no flag."""
    if not arg.startswith("--") or len(arg) < 3:
        return None
    return arg[2:].partition("=")[0].replace("-", "_")


def given(argv: Sequence[str], leaves: Sequence[Leaf]) -> set[str]:
    """The flags that stand on the command line."""
    known = {leaf.flag for leaf in leaves}
    names = [n for a in argv if (n := _flag_name(a))]
    return {n if n in known else n.removeprefix("no_") for n in names}


def _refuse_unknown(argv: Sequence[str], leaves: Sequence[Leaf], method: Any) -> None:
    known = {leaf.flag for leaf in leaves if not leaf.positional}
    for name in given(argv, leaves) - known - {"help"}:
        flag = name.replace("_", "-")
        if any(leaf.flag == name for leaf in leaves):
            raise InlayError(f"the {name} stands by itself: write its value without --{flag}")
        if method is not None and _belongs_to_a_method(name):
            own = [leaf.flag.replace("_", "-") for leaf in leaves if leaf.section == "settings"]
            have = ", ".join(f"--{n}" for n in own) or "none"
            raise InlayError(f"method {method.name!r} has no setting --{flag}; its settings are: {have}")
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean --{near[0].replace('_', '-')}?" if near else "; --help lists what there is"
        raise InlayError(f"unknown option --{flag}{guess}")


def _belongs_to_a_method(name: str) -> bool:
    from inlay.methods import METHODS

    return any(name == f.name for row in METHODS.values() for f in dataclasses.fields(row.edit))


def merge(recipe: Mapping[str, Any], values: Any, leaves: Sequence[Leaf], flags: set[str]) -> dict[str, Any]:
    """The recipe with the flags that were given laid over it, as nested plain mappings."""
    from inlay.train.settings import to_plain

    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in recipe.items()}
    for leaf in leaves:
        if not (leaf.flag in flags or leaf.positional):
            continue
        at = values
        for name in filter(None, (leaf.held or leaf.section, leaf.name)):
            at = getattr(at, name)
        if leaf.section and not isinstance(plain.setdefault(leaf.section, {}), dict):
            raise InlayError(f"the recipe's {leaf.section!r} must be a mapping of settings")
        (plain[leaf.section] if leaf.section else plain)[leaf.name] = to_plain(at)
    return plain
