"""The playground's page: what its controls ask for, and all of it in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import uvicorn  # noqa: E402

import inlay  # noqa: E402
from inlay.cli import main  # noqa: E402
from inlay.core.errors import InlayError  # noqa: E402
from inlay.evaluate import GenerateSettings, generate  # noqa: E402
from inlay.library.compose import compose  # noqa: E402
from inlay.serve import play  # noqa: E402
from inlay.serve.settings import PlaySettings  # noqa: E402
from tests.evaluate import tiny  # noqa: E402
from tests.serve import tiny_server  # noqa: E402

PROMPT = "Tom has"


@pytest.fixture(scope="module")
def served(root):
    """The page, on a thread of this process."""
    s = PlaySettings(model=str(root / "base"), adapters=(str(root / "adapters"),), template="plain", rows=8)
    app, batcher = play.build(s, inlay.attach(tiny.base("llama")), tiny.tokenizer())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    tiny_server.wait(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", batcher
    server.should_exit = True
    thread.join(20)
    batcher.stop(10)


@pytest.fixture
def url(served):
    return served[0]


@pytest.fixture
def slow(served):
    """The batcher, at ten steps a second."""
    _, batcher = served
    batcher.watch.step, before = lambda rows, seconds: time.sleep(0.1), batcher.watch.step
    yield batcher
    batcher.watch.step = before


# ---- without a browser -----------------------------------------------------------------------------------------------
class Recorder:
    """A playground that notes what it is asked."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    async def ask(self, q, session):
        self.asked.append((q, session))
        if self.error:
            raise self.error
        yield play.cards.Answers(())


def press(playground, who, mixed=False, shown=None, how=(0.7, 0.9, 5.0, 33.0, " 12 "), values=(0.25, -1.0, 0.5)):
    async def all_of_it():
        ask = play._asker(playground)(SimpleNamespace(session_hash="s"), "hi", who, mixed, shown or {}, *how, *values)
        return [shown async for shown in ask]

    return asyncio.run(all_of_it())


def test_the_button_asks_what_the_controls_say():
    playground = Recorder()
    press(playground, ["base", "a", "b"], True, {"a": 0.5, "b": 0.5})
    (q, session), *_ = playground.asked
    assert session == "s" and q.prompt == "hi" and q.names == ("base", "a", "b")
    assert q.weights == {"a": 0.25, "b": -1.0}
    assert (q.temperature, q.top_p, q.top_k, q.max_new_tokens, q.seed) == (0.7, 0.9, 5, 33, 12)
    press(playground, ["a"], False, {"a": 0.5}, (0, 1, 0, 8, ""))
    assert not playground.asked[1][0].weights and playground.asked[1][0].seed is None


@pytest.mark.parametrize("error", [InlayError("choose <somebody>"), RuntimeError("out of order")])
def test_whatever_goes_wrong_is_shown_and_the_button_comes_back(error):
    html, ask, stop = press(Recorder(error), ["a"])[-1]
    assert 'role="alert"' in html and str(error).replace("<", "&lt;").replace(">", "&gt;") in html
    assert ask.interactive and not stop.interactive


def test_a_seed_that_is_no_number_and_a_mix_of_nobody_are_told():
    assert "no whole number" in press(Recorder(), ["a"], how=(1, 1, 0, 8, "two"))[-1][0]
    assert "a mix needs adapters" in press(Recorder(), ["base"], True)[-1][0]


def test_sliders_follow_the_choice_and_keep_their_weights():
    now, *sliders = play._slide(["base", "a", "c"], {"a": 0.5, "b": 0.5}, 0.9, 0.1, 0.5)
    assert now == {"a": 0.9, "c": play.WEIGHT}
    assert [(s.label, s.value) for s in sliders if s.visible] == [("a", 0.9), ("c", play.WEIGHT)]
    many, *sliders = play._slide([f"n{i}" for i in range(20)], {})
    assert len(many) == len(sliders) == play.SLIDERS and all(s.visible for s in sliders)


def test_many_adapters_are_searched_not_listed():
    assert type(play._chooser(["base"] + [f"n{i}" for i in range(100)], ["base"])).__name__ == "Dropdown"
    assert type(play._chooser(["base", "a"], ["base"])).__name__ == "CheckboxGroup"


def test_the_list_is_that_of_the_bank_and_the_choice_stays():
    playground = SimpleNamespace(names=lambda: ["base", "a", "new"])
    renew = play._renewer(playground, "model")
    head, choice = asyncio.run(renew(["base", "a"]))
    assert "2 adapters" in head and choice["choices"] == ["base", "a", "new"] and "value" not in choice
    assert asyncio.run(renew(["base", "gone"]))[1]["value"] == ["base"]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "nothing to compare"),
        (["--adapters", "nowhere"], "no folder 'nowhere'"),
        (["--adapters", "EMPTY"], "there is no adapter in"),
        (["--adapters", "EMPTY", "--rows", "0"], "rows 0"),
        (["--adapters", "EMPTY", "--port", "99999"], "port 99999"),
        (["--adapters", "EMPTY", "--port", "TAKEN"], "Address already in use; choose another --port"),
    ],
)
def test_wrong_settings_are_one_line(root, tmp_path, capsys, flags, says):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"EMPTY": str(tmp_path), "TAKEN": str(taken.getsockname()[1])}
        flags = ["--port", "0", *flags] if "--port" not in flags else flags
        assert main(["play", str(root / "base"), *(words.get(f, f) for f in flags)]) == 2
    assert says in (told := " ".join(capsys.readouterr().err.split())) and "Traceback" not in told


def test_the_process_says_where_it_is_and_leaves_on_sigterm(root):
    words = ["play", str(root / "base"), "--adapters", str(root / "adapters"), "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "inlay", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            at = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert at and "Inlay playground" in tiny_server.httpx.get(at[0], timeout=30).text
        finally:
            process.terminate()
        assert process.wait(20) in (0, -15)


# ---- in a browser ----------------------------------------------------------------------------------------------------
def chromium(playwright):
    """A Chromium on this machine, or None."""
    own = playwright.chromium.executable_path
    names = ("chromium", "chromium-browser", "google-chrome")
    return own if os.path.exists(own) else next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as p:
        if (path := chromium(p)) is None:
            pytest.skip("there is no Chromium (apt-get install chromium, or playwright install chromium)")
        with contextlib.closing(p.chromium.launch(executable_path=path, args=["--no-sandbox"])) as found:
            yield found


@pytest.fixture
def page(browser, url):
    """The page in a window; it asks no other machine for anything, and nothing fails in it."""
    own = browser.new_page(viewport={"width": 1280, "height": 860})
    asked, wrong = [], []
    own.on("request", lambda r: asked.append(r.url))
    own.on("pageerror", lambda e: wrong.append(str(e)))
    own.goto(url)
    own.wait_for_selector("#ask")
    yield own
    own.close()
    assert not wrong and all(u.startswith((url, "data:", "blob:")) for u in asked), (wrong, asked)


def ask(page, prompt, most=20):
    """Type and press; the answers when all have ended."""
    set_most(page, most)
    page.fill("#prompt textarea", prompt)
    page.click("#ask")
    page.wait_for_selector('.answers[aria-busy="false"]')
    return said(page)


def set_most(page, most):
    if not page.locator("#most").is_visible():
        page.click("#sampling button.label-wrap")
    turn(page, "#most", most)


def turn(page, slider, value):
    """Set a slider. A control that appears this very moment loses what is typed, so until it is kept."""
    for _ in range(20):
        page.fill(f"{slider} input[type=number]", str(value))
        page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        if page.input_value(f"{slider} input[type=range]") == str(value):
            return
    raise AssertionError(f"{slider} does not take {value}")


def said(page):
    """Column -> its text."""
    return {c.get_attribute("data-name"): c.locator(".said").inner_text() for c in page.locator(".card").all()}


def want(reference, name, most=20):
    return generate(reference, tiny.tokenizer(), [PROMPT], name, GenerateSettings(max_new_tokens=most))[0].text.strip()


def test_adapters_answer_side_by_side(page, reference):
    got = ask(page, PROMPT)
    assert list(got) == ["base", "lora", "prefix", "prompt", "series"]
    assert got == {name: want(reference, None if name == "base" else name) for name in got}
    assert "5 answers in one batch" in page.locator(".tally").inner_text()
    boxes = [c.bounding_box() for c in page.locator(".card").all()]
    assert len({b["y"] for b in boxes}) == 1 and boxes == sorted(boxes, key=lambda b: b["x"])


def test_answers_stream_and_stop_ends_them(page, slow):
    set_most(page, 110)
    page.fill("#prompt textarea", "12 + 30 =")
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
          const said = document.querySelector('.card[data-name=lora] .said');
          if (said) seen.push(said.innerText.length);
        }).observe(document.querySelector('#answers'), {childList: true, subtree: true, characterData: true}) }"""
    )
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("window.seen.filter(n => n > 3).length > 1")
    assert page.locator("#ask").is_disabled()
    page.click("#stop")
    page.wait_for_selector('.answers[aria-busy="false"]')
    seen = page.evaluate("window.seen")
    assert seen == sorted(seen) and len(set(seen)) > 2, "it grows"
    assert "stopped" in page.locator(".card[data-name=lora] footer").inner_text()
    assert page.locator("#ask").is_enabled() and page.locator("#stop").is_disabled()
    assert list(ask(page, PROMPT, 5)) == ["base", "lora", "prefix", "prompt", "series"]


def test_who_closes_the_window_frees_the_batch(page, slow):
    set_most(page, 110)
    page.fill("#prompt textarea", "12 + 30 =")
    page.click("#ask")
    page.wait_for_selector(".answers footer")
    assert slow.jobs == 5
    page.close()
    tiny_server.wait(lambda: not slow.jobs, 5)


def test_sliders_weigh_a_mix(page, reference):
    compose(reference, "weighed", "sum(-0.5*lora, 1.25*series)")
    for name in ("prefix", "prompt"):
        page.locator("#who").get_by_label(name, exact=True).uncheck()
    page.click("#mix button.label-wrap")
    page.locator("#mix").get_by_label("Add a column").check()
    page.wait_for_function("document.querySelectorAll('#mix input[type=range]').length == 2")
    for i, (name, weight) in enumerate((("lora", "-0.5"), ("series", "1.25"))):
        assert name in page.locator(f"#weight-{i}").inner_text()
        turn(page, f"#weight-{i}", weight)
    got = ask(page, PROMPT)
    assert list(got) == ["base", "lora", "series", "mix"]
    assert got["mix"] == want(reference, "weighed") and len(set(got.values())) == 4
    assert "-0.5 lora + 1.25 series" in page.locator(".card.mix header").inner_text()


def test_what_is_wrong_is_said(page):
    page.fill("#prompt textarea", "x" * 500)
    page.click("#ask")
    page.wait_for_selector('.answers[aria-busy="false"]')
    alerts = page.locator(".card [role=alert]").all_inner_texts()
    assert len(alerts) == 5 and all("500 tokens" in a and "shorten the prompt" in a for a in alerts)
    for box in page.locator("#who input").all():
        box.uncheck()
    page.click("#ask")
    page.wait_for_selector(".problem")
    assert "choose the base or an adapter" in page.locator(".problem").inner_text()
    page.fill("#prompt textarea", "")
    page.click("#ask")
    page.wait_for_function("document.querySelector('.problem').innerText.includes('type a prompt')")
    assert page.locator("#ask").is_enabled()


def test_on_a_phone_nothing_is_wider_than_the_screen(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#mix button.label-wrap")
    ask(page, "y" * 100, 20)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [c.bounding_box() for c in page.locator(".card").all()]
    assert len({b["x"] for b in boxes}) == 1 and all(b["width"] > 280 for b in boxes)
    page.wait_for_function("document.querySelector('#answers').getBoundingClientRect().top < 740 / 2")


def test_adapters_that_come_and_go_are_seen_by_a_button_and_by_loading_anew(page, root, reference):
    def listed(*names):
        page.wait_for_function(
            "n => n == [...document.querySelectorAll('#who label')].map(l => l.innerText.trim()).join()",
            arg=",".join(names),
        )

    old = ["base", "lora", "prefix", "prompt", "series"]
    listed(*old)
    new = root / "adapters" / "fresh"
    shutil.copytree(root / "adapters" / "series", new)
    try:
        page.click("#renew")
        listed("base", "fresh", *old[1:])
        assert "5 adapters" in page.locator("#head").inner_text()
        for name in old[1:]:
            page.locator("#who").get_by_label(name, exact=True).uncheck()
        page.locator("#who").get_by_label("fresh", exact=True).check()
        got = ask(page, PROMPT)
        assert got == {"base": want(reference, None), "fresh": want(reference, "series")}
        page.reload()
        listed("base", "fresh", *old[1:])
    finally:
        shutil.rmtree(new)
