"""Two `inlay serve` behind HAProxy or nginx, as in examples/replicas: one leaves or dies, and no client notices."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from inlay.evaluate import GenerateSettings, generate
from tests.evaluate import tiny
from tests.serve import tiny_server

EXAMPLES = Path(__file__).parents[2] / "examples" / "replicas"
ASKED = [(f"{n} + 7 =", name) for n in range(12) for name in ("lora", "series", "prefix")]


def port_of(served):
    return served.url.rpartition(":")[2]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return str(s.getsockname()[1])


def installed(program):
    if (found := shutil.which(program)) is None:
        pytest.skip(f"{program} is not installed (apt-get install {program})")
    return found


def haproxy(port, replicas, folder):
    """Its command, and what its configuration reads."""
    names = {"PORT": port}
    for letter, one in zip("AB", replicas, strict=True):
        names |= {f"PID_{letter}": port_of(one), f"PORT_{letter}": port_of(one)}
    return [installed("haproxy"), "-q", "-f", str(EXAMPLES / "haproxy.cfg")], names


def nginx(port, replicas, folder):
    """The same; its ports stand in its configuration."""
    program, text = installed("nginx"), (EXAMPLES / "nginx.conf").read_text()
    ports = {"8000": port, "8001": port_of(replicas[0]), "8002": port_of(replicas[1])}
    (folder / "nginx.conf").write_text(re.sub(r"(?<=127\.0\.0\.1:)800[012]", lambda m: ports[m[0]], text))
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf")], {}


@contextlib.contextmanager
def balanced(door, replicas, folder):
    """A door before these replicas; it calls them after their ports."""
    port = free_port()
    command, names = door(port, replicas, folder)
    with subprocess.Popen(command, env=os.environ | names) as process:
        found = tiny_server.Served(f"http://127.0.0.1:{port}", process=process)
        try:
            tiny_server.wait(lambda: tiny_server.ready(found))
            if door is haproxy:
                time.sleep(2)  # it takes servers for up until its first checks
            yield found
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("door", [haproxy, nginx])
def test_streams_come_token_by_token_and_end_with_the_client(root, tmp_path, door):
    with contextlib.ExitStack() as held:
        pair = [held.enter_context(tiny_server.inside(root)) for _ in range(2)]
        front = held.enter_context(balanced(door, pair, tmp_path))
        for one in pair:
            one.batcher._running.ends.clear()
            one.batcher.host.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        asked = {"model": "lora", "prompt": "x", "max_tokens": 100, "temperature": 0, "stream": True}
        streams = [front.client().completions.create(**asked) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        assert [one.batcher.jobs for one in pair] == [2, 2], "the first token is here, the last is not made"
        for stream in streams:
            stream.close()
        tiny_server.wait(lambda: not any(one.batcher.jobs for one in pair), 3)


@pytest.mark.slow
@pytest.mark.parametrize("door", [haproxy, nginx])
def test_a_broken_adapter_puts_no_replica_down(root, tmp_path, door):
    folder = shutil.copytree(root / "adapters", tmp_path / "adapters")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter.json").write_text("{}")
    with contextlib.ExitStack() as held:
        pair = [held.enter_context(tiny_server.inside(root, adapters=(str(folder),))) for _ in range(2)]
        front = held.enter_context(balanced(door, pair, tmp_path))

        def ask(model):
            return front.http("POST", "/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})

        for _ in range(6):
            assert ask("broken").json()["error"]["code"] == "adapter_broken"
            assert ask("lora").status_code == 200
        asked = 'inlay_requests_total{path="/v1/completions",status="500"}'
        assert sum(one.metric(asked) for one in pair) == 6, "nothing is tried on the other one"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("door", [haproxy, nginx])
def test_a_replica_that_leaves_costs_no_answer(root, reference, tmp_path, door, sent):
    flags = ("--drain-delay", "3" if door is haproxy else "0", "--threads", "1", "--log", "warning")
    how = GenerateSettings(max_new_tokens=24)
    prompts, plan = zip(*ASKED, strict=True)
    want = [g.text for g in generate(reference, tiny.tokenizer(), list(prompts), list(plan), how)]
    with contextlib.ExitStack() as held:
        pair = [held.enter_context(tiny_server.outside(root, *flags)) for _ in range(2)]
        front = held.enter_context(balanced(door, pair, tmp_path))
        assert front.http("GET", "/admin/adapters", headers=tiny_server.ADMIN).status_code == 403
        by: Counter[str] = Counter()
        wrong, ending = [], threading.Event()

        def ask(first: int) -> None:
            with httpx.Client(base_url=front.url, timeout=60) as client:  # which tries nothing twice
                for i in range(first, 10_000):
                    if ending.is_set():
                        return
                    (prompt, model), right = ASKED[i % len(ASKED)], want[i % len(ASKED)]
                    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
                    try:
                        answer = client.post("/v1/completions", json=body)
                    except httpx.HTTPError as e:
                        wrong.append((type(e).__name__, str(e)))
                        return
                    if answer.status_code != 200 or answer.json()["choices"][0]["text"] != right:
                        wrong.append((answer.status_code, answer.text))
                    by[answer.headers.get("x-replica", "?").rpartition(":")[2]] += 1

        askers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for t in askers:
            t.start()
        left, stays = pair
        tiny_server.wait(lambda: len(by) == 2 and min(by.values()) >= 10, 60)
        left.process.send_signal(sent)
        left.process.wait(60)
        before = by[port_of(stays)]
        tiny_server.wait(lambda: by[port_of(stays)] >= before + 50 or wrong, 60)
        ending.set()
        for t in askers:
            t.join(60)
        assert not wrong and left.process.returncode == (0 if sent == signal.SIGTERM else -signal.SIGKILL)
        assert set(by) == set(map(port_of, pair))
