"""`inlay chat`: talk to a base and its adapters, one at a time or side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError
from inlay.tasks import template_choice
from inlay.tasks.template_choice import TemplateSettings
from inlay.threads import ThreadSettings

if TYPE_CHECKING:
    from inlay.core.host import Host

BARE = "bare"
HELP = """\
/use NAME      answer with an adapter, with several at once (a+b), or with the bare base (/use bare)
/adapters      what there is
/all TEXT      ask everyone in one batch: each adapter, and the bare base
/load FOLDER   hang another adapter
/quit          leave (so does end of input)"""


@dataclass(frozen=True, kw_only=True)
class ChatSettings(TemplateSettings, ThreadSettings):
    """Whom to talk to, and how."""

    model: tyro.conf.Positional[str]
    """The base: tiny-llama, a folder or a Hub id."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters, in any format that `inlay convert` reads."""
    use: str | None = None
    """Who answers: an adapter's name, `a+b`, or `bare` (default: the first adapter)."""
    prompt: str | None = None
    """Answer this and leave."""
    side_by_side: bool = False
    """With --prompt: every adapter and the bare base answer, in one batch."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of sampling."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the base (as stored if not given)."""
    device: str | None = None
    """Where to run; the GPU if there is one."""


def run(s: ChatSettings) -> None:
    """Answer one prompt, or start a conversation."""
    from inlay.cli.quiet import quiet

    quiet()
    from inlay.api import attach
    from inlay.models.base import load_base

    if s.side_by_side and s.prompt is None:
        raise InlayError("--side-by-side goes with --prompt; in a conversation, use /all")
    template_choice.check(s.template)
    base, tokenizer = load_base(s.model, s.dtype, s.device)
    chat = Chat(attach(base), tokenizer, s)
    for folder in s.adapters:
        chat.load(folder)
    chat.use(s.use or next(iter(chat.host.edits), BARE))
    if s.prompt is None:
        chat.loop()
    elif s.side_by_side:
        chat.everyone(s.prompt)
    else:
        chat.answer(s.prompt)


class Chat:
    """A host, who is answering, and the commands."""

    def __init__(self, host: Host, tokenizer: Any, settings: ChatSettings):
        from rich.console import Console

        from inlay.evaluate.prompting import Prompting
        from inlay.train.bar import note

        self.host, self.tokenizer, self.s = host, tokenizer, settings
        self.prompting = Prompting(host, tokenizer, settings.template, note)
        self.who: str | None = None
        self.out = Console(highlight=False, soft_wrap=True)

    def load(self, folder: Path) -> str:
        """Hang the adapter in a folder, under the folder's name if its own is taken or says nothing."""
        from inlay.interop import formats

        if not folder.is_dir():
            raise InlayError(f"there is no adapter folder {str(folder)!r}")
        return formats.read(self.host, folder, self._free_name(folder))

    def _free_name(self, folder: Path) -> str:
        import re

        parts = [p for p in folder.resolve().parts if p not in ("adapter", "/")]
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", parts[-1]) if parts else "adapter"
        name, n = stem, 2
        while name in self.host.edits or name == BARE:
            name, n = f"{stem}-{n}", n + 1
        return name

    def use(self, who: str) -> None:
        """Choose who answers."""
        plan = None if who in (BARE, "none") else who
        self.host.use(plan)
        self.who = plan

    def prompt(self, text: str, who: str | None) -> list[int]:
        """Ids of what is typed in the template of whoever answers. Each turn stands alone."""
        template = self.prompting.of(_worn(who), who)
        return template.conversation_ids([{"role": "user", "content": text}], self.tokenizer)

    def ends(self, who: str | None) -> list[int]:
        """Ids that end an answer: the base's, the tokenizer's, and the end of a turn in the template."""
        from inlay.evaluate.rows import end_ids

        ids = end_ids(self.host, self.tokenizer)
        turn = self.prompting.of(_worn(who), who).end_of_turn(self.tokenizer)
        return [*ids, turn[1]] if turn is not None and turn[1] not in ids else ids

    def answer(self, text: str) -> None:
        """Stream one answer."""
        import torch
        from transformers import TextStreamer

        from inlay.evaluate.batches import pad_id

        console = self.out

        class Stream(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                console.print(text, end="\n" if stream_end else "", markup=False)

        ids = torch.tensor([self.prompt(text, self.who)], device=self.host.device)
        if self.s.temperature:
            torch.manual_seed(self.s.seed)
            how: dict[str, Any] = {"do_sample": True, "temperature": self.s.temperature}
        else:
            how = {"do_sample": False}
        with self.host.using(self.who), torch.inference_mode():
            self.host.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.s.max_new_tokens,
                pad_token_id=pad_id(self.tokenizer),
                eos_token_id=self.ends(self.who) or None,
                streamer=Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **how,
            )

    def everyone(self, text: str) -> None:
        """Each adapter and the bare base on one prompt, in one batch."""
        from rich.markup import escape
        from rich.table import Table

        from inlay.evaluate import GenerateSettings, generate
        from inlay.evaluate.rows import end_ids

        plan: list[str | None] = [None, *self.host.edits]
        most, heat = self.s.max_new_tokens, self.s.temperature
        templates = [self.prompting.of(_worn(name)) for name in plan]
        stop = self.prompting.stops(templates, end_ids(self.host, self.tokenizer))
        settings = GenerateSettings(max_new_tokens=most, temperature=heat, seed=self.s.seed, stop=stop)
        said = generate(self.host, self.tokenizer, [self.prompt(text, name) for name in plan], plan, settings)
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, one in zip(plan, said, strict=True):
            table.add_row(f"[bold cyan]{name or BARE}[/]", escape(one.text.strip()))
        self.out.print(table)

    def loop(self) -> None:
        """Read, answer, until the end of input."""
        asked = template_choice.shown(self.prompting.of(_worn(self.who), self.who))
        about = f"{len(self.host.edits)} adapters on {self.s.model}, asked by {asked}"
        self.out.print(f"{about}; /help lists commands", style="dim", markup=False)
        while True:
            try:
                line = self.out.input(f"[bold green]{self.who or BARE}>[/] ").strip()
            except EOFError:
                self.out.print()
                return
            try:
                if line in ("/quit", "/exit", "/q"):
                    return
                self.turn(line)
            except InlayError as e:
                self.out.print(f"error: {e}", style="red", markup=False)
            except KeyboardInterrupt:
                self.out.print("[yellow]stopped[/]")

    def turn(self, line: str) -> None:
        """One line: a command or a prompt."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line:
            return
        if not line.startswith("/"):
            self.answer(line)
        elif command == "/help":
            self.out.print(HELP, markup=False)
        elif command == "/adapters":
            for name, edit in self.host.edits.items():
                self.out.print(f"{name}: {edit.kind}, {self.host.count(name):,} parameters", markup=False)
            self.out.print(f"{BARE}: the base alone", markup=False)
        elif command == "/use" and rest:
            self.use(rest)
        elif command == "/all" and rest:
            self.everyone(rest)
        elif command == "/load" and rest:
            self.out.print(f"hung as {self.load(Path(rest))}", markup=False)
        else:
            known = command in ("/use", "/all", "/load")
            raise InlayError(f"{command} {'needs more' if known else 'is no command'}; /help lists them")


def _worn(who: str | None) -> tuple[str, ...]:
    return tuple(who.split("+")) if who else ()


VERB = Verb(
    "chat",
    "Talk to a base and its adapters, one at a time or side by side in one batch.",
    ChatSettings,
    run,
    (
        "inlay chat tiny-llama --adapters runs/lora/adapter runs/prefix/adapter",
        'inlay chat tiny-llama --adapters runs/lora/adapter --prompt "Tom has 3 apples ..." --side-by-side',
    ),
)
