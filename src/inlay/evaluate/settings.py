"""`inlay eval`: its settings, and running them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.evaluate.report import Report
from inlay.evaluate.suite import evaluate, expand
from inlay.tasks import protocols, template_choice
from inlay.tasks.template_choice import TemplateSettings
from inlay.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class EvalSettings(TemplateSettings, ThreadSettings):
    """Score a base and its adapters on tasks."""

    model: str
    """Base model: tiny-llama, tiny-gptj, tiny-bloom, a folder, or a Hub id."""
    adapters: tuple[Path, ...] = ()
    """Adapter folders, in any format that Inlay reads, or run folders; without any, the bare base is scored."""
    bare: bool = False
    """Score the bare base beside the adapters."""
    tasks: tuple[str, ...] = ("math",)
    """Tasks, or groups of them: math, commonsense, world."""
    data: Path | None = None
    """Folder in LLM-Adapters' layout (dataset/<task>/test.json); without one, the Hub. World tasks need none."""
    split: str = "test"
    """Which split of each task."""
    limit: int | None = None
    """At most so many records per task, drawn with the seed."""
    protocol: Literal["clean", "published"] = "clean"
    """Extraction and decoding: ours, or LLM-Adapters' to the letter (4 beams), its prompts included."""
    how: Literal["generate", "options"] = "generate"
    """Generate a text and extract the answer, or take the likeliest of the given options."""
    option_form: Literal["answer", "text"] = "answer"
    """With how=options: score "the correct answer is answer2", or what answer2 says."""
    normalise: Literal["none", "tokens", "bytes"] = "none"
    """With how=options: divide an option's log-likelihood by its tokens or bytes."""
    max_new_tokens: int | None = None
    """Most tokens per answer; by default the task's (256 for math, 32 for commonsense)."""
    beams: int | None = None
    """Beams; by default the protocol's (clean 1, published 4)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """With a temperature: sample from the fewest tokens that hold this share."""
    top_k: int = 0
    """With a temperature: sample from this many tokens; 0 is all."""
    batch_size: int = 16
    """Rows (prompt x adapter) per batch."""
    mixed: bool = True
    """All adapters of a task in the same batches."""
    seed: int = 0
    """Of sampling, of `limit`, and of generated tasks."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the base; as stored by default."""
    device: str | None = None
    """Where to run; the GPU if there is one."""
    out: Path = Path("eval")
    """Folder for generations and report; a run that was cut short goes on from it."""


def run(settings: EvalSettings) -> Report:
    """Load, evaluate, and print the table."""
    from rich.console import Console

    import inlay
    from inlay.models.base import load_base

    expand(settings.tasks)
    protocols.get(settings.protocol).check_template(settings.template)
    template_choice.check(settings.template)
    missing = [str(f) for f in settings.adapters if not f.is_dir()]
    if missing:
        raise InlayError(f"no such adapter folder: {', '.join(missing)}")
    model, tokenizer = load_base(settings.model, settings.dtype, settings.device)
    host = inlay.attach(model)
    names: list[str | None] = [hang(host, folder) for folder in settings.adapters]
    if settings.bare or not names:
        names.insert(0, None)
    report = evaluate(
        host,
        tokenizer,
        settings.tasks,
        names,
        settings.protocol,
        settings.how,
        template=settings.template,
        data=settings.data,
        split=settings.split,
        limit=settings.limit,
        seed=settings.seed,
        decoding=_decoding(settings),
        option_form=settings.option_form,
        normalise=settings.normalise,
        batch_size=settings.batch_size,
        mixed=settings.mixed,
        out=settings.out,
    )
    console = Console()
    console.print(report.table())
    console.print(f"generations, settings and report: {settings.out}")
    return report


def hang(host: Host, folder: Path) -> str:
    """Read an adapter of any format under its folder's name (if that is `adapter`, its parent's), numbered if taken.
    The folder of a training run will do."""
    from inlay.interop import formats
    from inlay.library.names import adapter_in

    folder = (adapter_in(folder) or folder).resolve()
    own = folder.parent.name if folder.name == "adapter" else folder.name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", own).strip("-") or "adapter"
    name, count = stem, 2
    while name in host.edits or name == "base":
        name, count = f"{stem}-{count}", count + 1
    return formats.read(host, folder, name)


def _decoding(settings: EvalSettings) -> dict[str, Any]:
    given = {"max_new_tokens": settings.max_new_tokens, "beams": settings.beams}
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return {k: v for k, v in given.items() if v is not None} | sampling | {"seed": settings.seed}
