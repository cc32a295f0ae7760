"""The command line: `inlay VERB ...`. Exit codes: 0 done, 2 a mistake in what was asked, 1 anything else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from inlay.cli.verbs import GROUPS, NAMES, named, verb, verbs_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. What the user got wrong is one message and exit code 2; `--debug` shows the traceback."""
    # Threads that spin while waiting make small models twenty times slower on shared cores. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        _overview()
        return 0
    if args[0] in ("--version", "-V"):
        from inlay import __version__

        print(f"inlay {__version__}")
        return 0
    try:
        return _run(args)
    except BaseException as e:
        if debug or isinstance(e, SystemExit):
            raise
        return _complain(e)


def _run(argv: list[str]) -> int:
    from inlay.cli.parse import read
    from inlay.core.errors import unknown
    from inlay.threads import ThreadSettings, set_threads

    name, args = named(argv)
    group = name.partition(" ")[0]
    if group in GROUPS and name in (group, f"{group} help"):
        _overview(group)
        return 0
    known = verbs_of(group) if group in GROUPS else list(NAMES)
    if name not in known:
        raise unknown("verb", name, known, f"`inlay {f'{group} ' if group in GROUPS else ''}--help` says what they do.")
    found = verb(name)
    settings = read(found, args)
    if isinstance(settings, ThreadSettings):
        set_threads(settings.threads)
    return found.run(settings) or 0


def _complain(e: BaseException) -> int:
    from rich.console import Console
    from rich.markup import escape

    from inlay.core.errors import InlayError, Terminated

    out = Console(stderr=True, soft_wrap=True)
    if isinstance(e, KeyboardInterrupt):
        out.print("[yellow]stopped[/]")
        return 130
    if isinstance(e, Terminated):
        return 128 + signal.SIGTERM
    if isinstance(e, BrokenPipeError):
        return 0
    if isinstance(e, InlayError):
        out.print(f"[bold red]error:[/] {escape(str(e))}", highlight=False)
        return 2
    if not isinstance(e, Exception):
        raise e
    out.print(f"[bold red]error:[/] {type(e).__name__}: {escape(str(e))}", highlight=False)
    out.print("[dim]--debug shows where this comes from[/]")
    return 2 if isinstance(e, (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)) else 1


def _overview(group: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    from inlay import __version__

    out = Console(highlight=False)
    if group is None:
        out.print(f"[bold]inlay[/] {__version__}: any adapter, at any place, in any decoder\n")
    else:
        out.print(f"[bold]inlay {group}[/]: {verb(group).about}\n")
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name in NAMES if group is None else verbs_of(group):
        found = verb(name)
        table.add_row(f"[bold cyan]{name}[/]", f"{found.about}\n[dim]{found.examples[0]}[/]")
    out.print(table)
    out.print("\n`inlay VERB --help` lists settings; `--recipe FILE.yaml` gives them from a file; `--debug`")
    out.print("shows tracebacks. A first visit: [bold]inlay demo[/]")
