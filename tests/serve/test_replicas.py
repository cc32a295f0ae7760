"""Two `inlay serve` behind HAProxy, as in examples/replicas: one of them leaves or dies, and no client notices."""

from __future__ import annotations

import contextlib
import os
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

CONFIG = Path(__file__).parents[2] / "examples" / "replicas" / "haproxy.cfg"
ASKED = [(f"{n} + 7 =", name) for n in range(12) for name in ("lora", "series", "prefix")]


@contextlib.contextmanager
def balanced(*replicas):
    """The door before these replicas."""
    if (haproxy := shutil.which("haproxy")) is None:
        pytest.skip("HAProxy is not installed (apt-get install haproxy)")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    names = {"PORT": str(port)}
    for letter, one in zip("AB", replicas, strict=True):
        names |= {f"PID_{letter}": str(one.process.pid), f"PORT_{letter}": one.url.rpartition(":")[2]}
    with subprocess.Popen([haproxy, "-q", "-f", str(CONFIG)], env=os.environ | names) as process:
        door = tiny_server.Served(f"http://127.0.0.1:{port}", process=process)
        try:
            tiny_server.wait(lambda: tiny_server.ready(door))
            time.sleep(2)  # HAProxy takes servers for up until its first checks
            yield door
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_replica_that_leaves_costs_no_answer(root, reference, sent):
    flags = ("--drain-delay", "3", "--threads", "1", "--log", "warning")
    how = GenerateSettings(max_new_tokens=24)
    prompts, plan = zip(*ASKED, strict=True)
    want = [g.text for g in generate(reference, tiny.tokenizer(), list(prompts), list(plan), how)]
    with contextlib.ExitStack() as held:
        pair = [held.enter_context(tiny_server.outside(root, *flags)) for _ in range(2)]
        door = held.enter_context(balanced(*pair))
        assert door.http("GET", "/admin/adapters", headers=tiny_server.ADMIN).status_code == 403
        by: Counter[str] = Counter()
        wrong, ending = [], threading.Event()

        def ask(first: int) -> None:
            with httpx.Client(base_url=door.url, timeout=60) as client:  # which tries nothing twice
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
                    by[answer.headers.get("x-replica", "?")] += 1

        askers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for t in askers:
            t.start()
        left, stays = pair
        tiny_server.wait(lambda: len(by) == 2 and min(by.values()) >= 10, 60)
        left.process.send_signal(sent)
        left.process.wait(60)
        before = by[str(stays.process.pid)]
        tiny_server.wait(lambda: by[str(stays.process.pid)] >= before + 50 or wrong, 60)
        ending.set()
        for t in askers:
            t.join(60)
        assert not wrong and left.process.returncode == (0 if sent == signal.SIGTERM else -signal.SIGKILL)
        assert set(by) == {str(one.process.pid) for one in pair}
