"""What a training run is told: settings, and recipes (the same settings as YAML)."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import tyro
import yaml

from inlay.core.errors import InlayError
from inlay.train.yaml_file import read_yaml

T = TypeVar("T")


def _pairs(words: list[str]) -> dict[str, Any]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not of the form name=value")
    return {k: _number(yaml.safe_load(v)) for k, _, v in (w.partition("=") for w in words)}


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Pairs = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=_pairs,
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda d: [f"{k}={v}" for k, v in d.items()],
    ),
]
"""A mapping that is typed as plain options (`--rank 8 --alpha 16`) on the command line."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned from."""

    task: str | None = None
    """A data set by name, such as `world-arith` (nothing to fetch) or `math_10k`; docs/tasks.md lists all."""
    train_file: Path | None = None
    """A JSON or JSON-lines file with `instruction`, `input`, `output`, `answer`; with `task`, that task's own file."""
    val_file: Path | None = None
    """Such a file for validation."""
    val_size: int = 0
    """Records drawn from the training set for validation, where there is no `val_file`."""
    limit: int | None = None
    """At most so many training records, drawn with the seed (of a generated task: how many are generated)."""
    protocol: str = "clean"
    """Loss and truncation: `clean` (loss on the answer) or `published` (LLM-Adapters' prompts and loss)."""
    template: str | None = None
    """How records become prompts: chat (the tokenizer's own chat template), alpaca (`### Instruction: ...`), none (as
    they are), or a FILE (a Jinja chat template, or a text with {instruction}). If not given: chat if the tokenizer has
    one, else alpaca. It is recorded in the adapter, which is asked by it from then on. Protocol `published` fixes its
    own."""
    empty_outputs: Literal["refuse", "skip"] = "refuse"
    """What becomes of records without an output where only the output is learned: an error that names them, or they are
    left out and counted."""
    cutoff: int = 256
    """Longest example in tokens; what is longer is cut, and counted in `data.json`."""
    group_by_length: bool = False
    """Batches of examples of like length: less padding, a less random order."""

    def __post_init__(self) -> None:
        for name in ("train_file", "val_file"):
            if (file := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(file))


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How it is learned. Defaults: LLM-Adapters' commands (batch 16, 3 epochs, 3e-4, 100 steps of warm-up, linear)."""

    batch_size: int = 16
    """Examples per optimizer step."""
    micro_batch: int = 4
    """Most examples per forward of the plain engine; gradients add up to those of one `batch_size`."""
    epochs: float = 3.0
    """Passes over the training set."""
    steps: int | None = None
    """Optimizer steps; takes the place of `epochs`."""
    lr: float = 3e-4
    """Highest learning rate."""
    warmup: float = 100.0
    """Steps of warm-up (1 or more), or their share of the run (below 1)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, on tensors of two dimensions or more."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where it runs and what is kept."""

    seed: int = 42
    """Of the adapter's start, dropout, the validation split and the order of the data."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the frozen base (as stored if not given); the adapter is trained in fp32. CPUs are faster in
    bf16 than in fp16."""
    device: str | None = None
    """Where to run, e.g. `cuda:0`; the GPU if there is one."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under a launcher that starts several processes: each holds the whole base (`ddp`), or all of them one (`fsdp`,
    FSDP2). `auto` is ddp, unless `accelerate launch` was asked for FSDP."""
    engine: Literal["packed", "plain"] = "packed"
    """Sequences packed side by side and logits only where tokens are learned, or padded rows through the whole model:
    the same losses to rounding. Where packing cannot serve a model, the run says so and is plain."""
    pack_tokens: int | None = None
    """Tokens per forward of the packed engine. If not given: 768 on a CPU (1536 if the base is in 16 bits), 8192
    elsewhere."""
    share_beginnings: bool = True
    """Compute what the examples of a pack begin with (a prompt template, mostly) once for all of them: the same losses.
    Not where dropout is drawn."""
    cache_activations: Literal["off", "ram", "disk"] = "off"
    """Where adapters hang in upper blocks only: keep what the blocks below say of each example, in memory or in the
    run folder, and pass over those blocks from the second epoch on."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, more time."""
    eval_every: int = 0
    """Steps between validations; 0: only at the end."""
    save_every: int = 200
    """Steps between checkpoints; 0: only at the end (and wherever validation improves)."""
    async_save: bool = True
    """Write checkpoints in the background: the run waits only for their copy in memory."""
    keep_last: int = 3
    """Checkpoints kept besides the best one."""
    final: Literal["best", "last"] = "best"
    """Which weights become `adapter/`: lowest validation loss, or the last step. Without validation data, the last."""
    loggers: tuple[Literal["auto", "tensorboard", "wandb", "trackio", "none"], ...] = ("auto",)
    """Where metrics go besides `metrics.jsonl`; `auto` is TensorBoard if it is installed."""
    project: str = "inlay"
    """Project name for W&B and trackio."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run, complete."""

    model: str
    """An embedded base, a folder or a Hub id."""
    method: str = "lora"
    """One of `inlay.METHODS`."""
    settings: Pairs = field(default_factory=dict)
    """The method's own settings, e.g. `rank=8 dropout=0.05`."""
    at: str | None = None
    """Where it hangs, e.g. `q@0-3,v@0-3`; the method's default places if not given."""
    name: str = "adapter"
    """What the adapter is called."""
    out: Path
    """The run folder."""
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        o, r, d = self.optim, self.run, self.data
        at_least = [("batch_size", o.batch_size, 1), ("micro_batch", o.micro_batch, 1), ("cutoff", d.cutoff, 1)]
        at_least += [("keep_last", r.keep_last, 1), ("eval_every", r.eval_every, 0), ("save_every", r.save_every, 0)]
        at_least += [("pack_tokens", 1 if r.pack_tokens is None else r.pack_tokens, 1)]
        at_least += [("val_size", d.val_size, 0), ("steps", 1 if o.steps is None else o.steps, 1)]
        for name, value, least in at_least:
            if value < least:
                raise InlayError(f"{name} must be at least {least}, not {value}")
        for name in ("epochs", "lr", "warmup", "weight_decay", "clip"):
            if not math.isfinite(getattr(o, name)):
                raise InlayError(f"{name} must be a finite number, not {getattr(o, name)}")
        if min(o.epochs, o.lr) <= 0 or min(o.warmup, o.clip, o.weight_decay) < 0:
            raise InlayError("epochs and lr must be positive; warmup, clip and weight_decay must not be negative")
        if "none" in r.loggers and len(r.loggers) > 1:
            raise InlayError(f"loggers {', '.join(r.loggers)}: 'none' excludes the others")


FREE = (
    *("loggers", "project", "progress", "save_every", "async_save", "keep_last"),
    *("device", "parallel", "cache_activations"),
)
"""Of `run`: what may change when a run goes on. Where bits may then differ, its log says so."""


def identity(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide what is learned: a run continues only under the same ones."""
    plain = to_plain(settings)
    plain.pop("out")
    return bound(plain)


def bound(plain: dict[str, Any]) -> dict[str, Any]:
    """Without the settings of a run that may change when it goes on."""
    return {**plain, "run": {k: v for k, v in plain["run"].items() if k not in FREE}}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], under: str = "") -> list[str]:
    """`lr: 0.1 before, 0.2 now` for each leaf in which two plain settings differ."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{under}{key}.")
        elif x != y:
            found.append(f"{under}{key}: {x!r} before, {y!r} now")
    return found


# ---- recipes ---------------------------------------------------------------------------------------------------------
def to_plain(settings: Any) -> Any:
    """Settings as what YAML and JSON can hold; `read_plain` is the inverse."""
    if dataclasses.is_dataclass(settings):
        return {f.name: to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {k: to_plain(v) for k, v in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_plain(v) for v in settings]
    return str(settings) if isinstance(settings, Path) else settings


def to_yaml(settings: Any) -> str:
    """A recipe with every setting written out."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True)


def read_recipe(path: str | Path, cls: type[T]) -> T:
    """Settings of class `cls` from a YAML file. Unknown keys, missing keys and values of a wrong type are errors."""
    path = Path(path)
    if not path.is_file():
        raise InlayError(f"there is no recipe {str(path)!r}")
    found = read_yaml(path)
    try:
        return read_plain(found if found is not None else {}, cls)
    except InlayError as e:
        raise InlayError(f"{path}: {e}") from e


def read_plain(value: Any, cls: type[T], where: str = "") -> T:
    """Settings of class `cls` from nested mappings; `where` names the section in errors."""
    section = f"section {where!r}" if where else "a recipe"
    if not isinstance(value, Mapping):
        raise InlayError(f"{section} must be a mapping of settings, not {value!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if extra := [str(k) for k in value if k not in fields]:
        raise InlayError(
            f"{section} has no {', '.join(map(repr, extra))}; known here: {', '.join(fields)}{_elsewhere(cls, extra)}"
        )
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in value]
    if needed:
        raise InlayError(f"{section} lacks {', '.join(needed)}")
    hints = typing.get_type_hints(cls)
    return cls(**{k: _value(v, hints[k], f"{where}.{k}" if where else k) for k, v in value.items()})


def _elsewhere(cls: type, names: list[str]) -> str:
    """A hint for a key that stands one section too high."""
    hints = typing.get_type_hints(cls)
    inner = {f.name: s for s, h in hints.items() if dataclasses.is_dataclass(h) for f in dataclasses.fields(h)}
    found = [f"{n!r} belongs into {inner[n]!r}" for n in names if n in inner]
    return f" ({'; '.join(found)})" if found else ""


def _value(value: Any, hint: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read_plain(value, hint, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _union(value, inner, where)
    if origin is Literal:
        if value in inner:
            return value
        raise InlayError(f"{where} is {value!r}; choose from {', '.join(map(str, inner))}")
    if origin is tuple and isinstance(value, (list, tuple, str)):
        return tuple(_value(v, inner[0], where) for v in ([value] if isinstance(value, str) else value))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _number(v) for k, v in value.items()}
    return _scalar(value, hint, where)


def _union(value: Any, options: tuple, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in (o for o in options if o is not type(None)):
        try:
            return _value(value, option, where)
        except InlayError as e:
            errors.append(str(e))
    raise InlayError("; ".join(errors))


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool) and isinstance(number := _number(value), (int, float)):
        return float(number)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    wanted = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}
    kind = typing.get_origin(hint) or hint
    raise InlayError(f"{where} is {value!r}, wanted {wanted.get(kind.__name__, f'a {kind.__name__}')}")
