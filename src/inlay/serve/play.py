"""The playground's page: what is on it, what its buttons do, and the process that shows it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from inlay.api import attach
from inlay.compat.gradio import mount
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.library.bank import Bank
from inlay.models.base import load_base
from inlay.serve import play_cards as cards
from inlay.serve.batcher import Batcher
from inlay.serve.playground import BASE, Playground, Question
from inlay.serve.settings import PlaySettings
from inlay.serve.text import Texts
from inlay.tasks import template_choice
from inlay.threads import set_threads

SLIDERS = 8
"""Adapters that a mix can have."""
FEW = 24
"""As many names are shown at once; of more, one searches."""
AT_FIRST = 4
"""Adapters that are chosen when the page opens."""
WEIGHT = 0.5
TO_ANSWERS = """(...all) => {
  if (window.innerWidth < 700) document.getElementById("answers").scrollIntoView({behavior: "smooth"});
  return all;
}"""
"""On a phone the answers are below what is seen."""
log = logging.getLogger(__name__)


def run(s: PlaySettings) -> None:
    """Load the base, show the page until Ctrl+C or SIGTERM."""
    template_choice.check(s.template)
    set_threads(s.threads)
    model, tokenizer = load_base(s.model, s.dtype, s.device)
    with _listening(s.host, s.port) as door:
        app, batcher = build(s, attach(model), tokenizer)
        try:
            Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run([door])
        finally:
            batcher.stop(10)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        why = str(e.strerror).partition(" (")[0]
        raise InlayError(f"cannot listen at {host}:{port}: {why}; choose another --port (0: a free one)") from e


def build(s: PlaySettings, host: Host, tokenizer: Any) -> tuple[FastAPI, Batcher]:
    """(the application, its batcher, which runs)."""
    adapters = Bank(host, s.adapters, (BASE,), int(s.adapter_memory * 2**30), trial=True)
    if not adapters.names():
        raise InlayError(f"there is no adapter in {', '.join(s.adapters)}; `inlay train` makes one")
    batcher = Batcher(host, tokenizer, adapters, rows=s.rows, longest=s.longest)
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    playground = Playground(batcher, adapters, Texts(tokenizer, vocabulary, s.template), s.timeout)
    page = make_page(playground, s.model.rstrip("/").rpartition("/")[2])
    app = mount(FastAPI(), page, "", footer_links=[], theme=_theme(), css=cards.CSS, show_error=True, run_history=False)
    batcher.start()
    return app, batcher


class Server(uvicorn.Server):
    """Says where the page is once it is there."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for door in sockets:
            host, port = door.getsockname()[:2]
            at = f"[{host}]" if ":" in host else host
            print(f"the playground is at http://{at}:{port} (Ctrl+C ends it)", flush=True)


def _theme() -> Any:
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    mono = ("ui-monospace", "monospace")
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)
    looks = {"block_radius": "*radius_lg", "block_info_text_color": "*body_text_color_subdued"}
    return theme.set(body_text_color_subdued="*neutral_500", **looks)


def make_page(playground: Playground, model: str) -> gr.Blocks:
    """The page over a playground."""
    names = playground.names()
    chosen = names[: AT_FIRST + 1]
    with gr.Blocks(title="Inlay playground", analytics_enabled=False, fill_width=True) as page:
        head = gr.HTML(cards.head(model, len(names) - 1), elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, placeholder="Ask everybody",
                                    info="Shift+Enter asks", autofocus=True, elem_id="prompt")  # fmt: skip
                who = _chooser(names, chosen)
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", scale=3, min_width=120, elem_id="ask")
                    stop = gr.Button("Stop", scale=1, min_width=80, interactive=False, elem_id="stop")
                    renew = gr.Button("Reload list", scale=1, min_width=80, elem_id="renew")
            with gr.Column(scale=2, min_width=320):
                mixed, sliders = _mix(chosen)
                how = _sampling()
        said = gr.HTML(cards.NOTHING, elem_id="answers")

        gr.on([page.load, renew.click], _renewer(playground, model), [who], [head, who], show_progress="hidden",
              concurrency_limit=None, api_visibility="private")  # fmt: skip
        weights = gr.State(dict.fromkeys(_mixable(chosen), WEIGHT))
        who.change(_slide, [who, weights, *sliders], [weights, *sliders], show_progress="hidden",
                   api_visibility="private", concurrency_limit=None)  # fmt: skip
        gr.on(
            [ask.click, prompt.submit],
            _asker(playground),
            [prompt, who, mixed, weights, *how, *sliders],
            [said, ask, stop],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
            js=TO_ANSWERS,
        )
        stop.click(_stopper(playground), None, None, queue=False, api_visibility="private")
    return page


def _chooser(names: Sequence[str], chosen: Sequence[str]) -> Any:
    if len(names) <= FEW:
        return gr.CheckboxGroup(list(names), value=list(chosen), label="Who answers", elem_id="who")
    return gr.Dropdown(
        list(names), value=list(chosen), multiselect=True, label="Who answers", info="Type to search", elem_id="who"
    )


def _mix(chosen: Sequence[str]) -> tuple[Any, list[Any]]:
    with gr.Accordion("Mix: a weighted sum of adapters", open=False, elem_id="mix"):
        mixed = gr.Checkbox(False, label="Add a column for the sum", elem_id="mixed")
        parts = _mixable(chosen)
        sliders = [
            gr.Slider(-1, 2, WEIGHT, step=0.05, label=parts[i] if i < len(parts) else "", visible=i < len(parts),
                      elem_id=f"weight-{i}")
            for i in range(SLIDERS)
        ]  # fmt: skip
    return mixed, sliders


def _sampling() -> list[Any]:
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        return [
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token", elem_id="heat"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: from all tokens"),
            gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: from all tokens"),
            gr.Slider(1, 1024, 128, step=1, label="Most new tokens", elem_id="most"),
            gr.Textbox("", label="Seed", info="Of sampling; empty: another one every time", elem_id="seed"),
        ]


def _mixable(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != BASE][:SLIDERS]


def _slide(who: Sequence[str], shown: Mapping[str, float], *values: float) -> list[Any]:
    """Sliders for whoever is chosen now; who was chosen before keeps the weight."""
    kept = dict(shown) | dict(zip(shown, values, strict=False))
    now = {name: kept.get(name, WEIGHT) for name in _mixable(who)}
    sliders = [gr.Slider(label=name, value=value, visible=True) for name, value in now.items()]
    return [now, *sliders, *(gr.Slider(visible=False) for _ in range(SLIDERS - len(now)))]


def _renewer(playground: Playground, model: str) -> Any:
    async def renew(who: Sequence[str]) -> tuple[str, Any]:
        """The adapters that are there now. The choice is left alone, or a click made meanwhile would be undone; only
        who is gone leaves it."""
        names = await asyncio.to_thread(playground.names)
        left = [name for name in who if name in names]
        choice = gr.update(choices=names) if left == list(who) else gr.update(choices=names, value=left)
        return cards.head(model, len(names) - 1), choice

    return renew


def _asker(playground: Playground) -> Any:
    async def ask(
        request: gr.Request, prompt: str, who: list[str], mixed: bool, shown: Mapping[str, float],
        heat: float, top_p: float, top_k: float, most: float, seed: str, *values: float,
    ) -> AsyncIterator[tuple[Any, Any, Any]]:  # fmt: skip
        weights = dict(zip(shown, values, strict=False)) if mixed else {}
        try:
            q = Question(prompt=prompt, names=tuple(who), weights=weights, max_new_tokens=int(most), temperature=heat,
                         top_p=top_p, top_k=int(top_k), seed=_seed(seed))  # fmt: skip
            if mixed and not weights:
                raise InlayError("a mix needs adapters; choose some, or leave the mix out")
            first = True
            async for now in playground.ask(q, request.session_hash or ""):
                buttons = _buttons(not now.done) if first or now.done else (gr.skip(), gr.skip())
                yield cards.answers(now), *buttons
                first = False
        except InlayError as e:
            yield cards.problem(str(e)), *_buttons(False)
        except Exception as e:  # or the button to ask would never come back
            log.exception("a question failed")
            yield cards.problem(f"the playground failed: {type(e).__name__}: {e}"), *_buttons(False)

    return ask


def _stopper(playground: Playground) -> Any:
    async def stop(request: gr.Request) -> None:
        playground.stop(request.session_hash or "")

    return stop


def _buttons(busy: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not busy), gr.Button(interactive=busy)


def _seed(text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise InlayError(f"the seed {text.strip()!r} is no whole number") from None
