"""`inlay serve` as a process: it starts, drains on SIGTERM, dies on SIGKILL, and says what it was told wrong."""

from __future__ import annotations

import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from inlay.cli import main
from tests.serve import tiny_server
from tests.serve.tiny_server import ADMIN

LONG = {"model": "lora", "prompt": "Why?", "max_tokens": 120, "temperature": 0, "seed": 0}


def test_sigterm_ends_what_is_in_flight_and_takes_nothing_new(root):
    with tiny_server.outside(root, "--drain-delay", "1") as served:
        assert served.http("GET", "/health").json() == {"status": "ok"}
        want = served.client().completions.create(**LONG).choices[0].text
        texts: list[str] = []

        def ask():
            client = served.client()
            while True:
                try:
                    texts.append(client.completions.create(**LONG).choices[0].text)
                except openai.APIStatusError as e:
                    assert e.status_code == 503 and e.code == "shutting_down"
                    return
                except openai.APIConnectionError:
                    return

        askers = [threading.Thread(target=ask) for _ in range(6)]
        for t in askers:
            t.start()
        while not texts:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert served.http("GET", "/ready").status_code == 503
        assert served.client().completions.create(**LONG).choices[0].text == want, "/ready says no, but it still takes"
        for t in askers:
            t.join(30)
        assert served.process.wait(20) == 0
        assert set(texts) == {want} and len(texts) >= 6
        with pytest.raises(httpx.ConnectError):
            served.http("GET", "/ready")


@pytest.mark.slow
def test_what_does_not_end_in_time_is_told_so(root):
    with tiny_server.outside(root, "--drain", "0.2", "--rows", "1", "--waiting", "2000") as served:
        with served.client() as client:
            stream = client.completions.create(**LONG | {"prompt": ["Why?"] * 1500}, stream=True)
            next(iter(stream))
            served.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="going down"):
                for _ in stream:
                    pass
        assert served.process.wait(20) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(root):
    with tiny_server.outside(root, "--rows", "1", "--waiting", "2000") as served:
        stream = served.client().completions.create(**LONG | {"prompt": ["Why?"] * 1500}, stream=True)
        next(iter(stream))
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(15) == 0


@pytest.mark.slow
def test_killed_while_adapters_change_it_starts_again_as_before(root):
    with tiny_server.outside(root) as served:
        want = served.client().completions.create(**LONG).choices[0].text
        for _ in range(3):
            assert served.http("PUT", "/admin/adapters/lora", headers=ADMIN).status_code == 200
        served.process.kill()
        assert served.process.wait(10) == -signal.SIGKILL
    with tiny_server.outside(root) as served:
        assert served.client().completions.create(**LONG).choices[0].text == want


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--port", "0", "--adapters", "nowhere"], "no folder 'nowhere'"),
        (["--rows", "0"], "rows 0"),
        (["--api-key", "a", "--admin-key", "a"], "must differ"),
        (["--port", "99999"], "port 99999"),
    ],
)
def test_wrong_settings_are_one_line(root, capsys, flags, says):
    assert main(["serve", str(root / "base"), *flags]) == 2
    assert says in (told := capsys.readouterr().err) and "Traceback" not in told


def test_a_port_that_is_taken_is_told_before_the_base_is_read(root, capsys, monkeypatch):
    monkeypatch.setattr("inlay.serve.run.application", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(root / "base"), "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in told and "in use" in told and "--port" in told and "Traceback" not in told
    assert main(["serve", str(root / "base"), "--host", "nowhere.invalid"]) == 2
    assert "nowhere.invalid" in (told := capsys.readouterr().err) and "--host" in told
