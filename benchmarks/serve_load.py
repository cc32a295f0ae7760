"""A server under load: many streams over many adapters while adapters are added, replaced and removed.

python -m benchmarks.serve_load --seconds 60

Every version of every adapter has a known answer to one question, unlike all others: what `inlay.evaluate.generate`
says with it alone. An answer that no
version of the adapter that could have served the request gives is wrong; a request without an answer is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import torch

import inlay
from inlay.evaluate import GenerateSettings, generate

BASE = "tiny-llama"
METHODS = {"lora": {"rank": 8}, "series": {"size": 8}, "ia3": {}, "prefix": {"tokens": 4}, "road1": {}}
SPARE = 20
"""Adapters that are added and removed; as many others have a second version."""
TOKENS = 32
SETTINGS = GenerateSettings(max_new_tokens=TOKENS, batch_size=1)
ADMIN = {"Authorization": "Bearer load"}


PROMPT = "Tom has 3 apples and buys 7 more. How many apples does he have?"


def prepare(root: Path, adapters: int) -> dict[str, str]:
    """Write the adapters; source below `root` -> its answer, computed alone. Reuses what is there."""
    known = root / "answers.json"
    if known.exists() and len(found := json.loads(known.read_text())) == adapters + 2 * SPARE:
        return found
    names = [f"a{i}" for i in range(adapters)]
    sources = names + [f"spare/{n}" for n in names[:SPARE]] + [f"spare/b{i}" for i in range(SPARE)]
    model, tokenizer = inlay.load_base(BASE, "fp32", "cpu")
    host = inlay.attach(model)
    answers: dict[str, str] = {}
    for i, source in enumerate(sources):
        kind = list(METHODS)[i % len(METHODS)]
        method = inlay.method(kind)
        for noise in range(1, 100):
            host.add("x", method.make(**METHODS[kind]), at=method.places, seed=i)
            torch.manual_seed(i)
            for p in host.parameters("x"):
                p.data.add_(0.04 * noise * torch.randn_like(p))
            answer = generate(host, tokenizer, [PROMPT], "x", SETTINGS)[0].text
            if len(answer) > 8 and answer not in answers.values():  # nobody answers for another unnoticed
                break
            host.remove("x")
        inlay.save(host, "x", root / source)
        answers[source] = answer
        host.remove("x")
    known.write_text(json.dumps(answers))
    return answers


@dataclass
class Span:
    """A time in which a name may have stood for a source; None: for nothing."""

    source: str | None
    since: float
    until: float = float("inf")


@dataclass
class Load:
    """What is going on, and what came of it."""

    url: str
    answers: dict[str, str]
    streams: int
    names: list[str]
    spans: dict[str, list[Span]] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spans = {n: [Span(n, 0.0)] for n in self.names}

    def possible(self, name: str, begun: float) -> set[str | None]:
        """What a request that began then and has ended now may have met."""
        return {s.source for s in self.spans[name] if s.until >= begun}

    async def ask(self, client: openai.AsyncOpenAI, name: str, vanish: bool = False) -> None:
        """One request, and whether its answer is one of those that are right."""
        begun, text = time.monotonic(), ""
        asked = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        try:
            stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            async for part in stream:
                if part.choices:
                    if not text:
                        self.first.append(time.monotonic() - begun)
                    text += part.choices[0].text
                    if vanish and len(text) > 4:
                        await stream.close()
                        self.count["vanished"] += 1
                        return
                if part.usage:
                    self.count["tokens"] += part.usage.completion_tokens
        except openai.NotFoundError:
            if None not in self.possible(name, begun):
                self._problem("lost", f"{name}: 404, but it was there")
            else:
                self.count["not there"] += 1
            return
        except openai.APIError as e:
            return self._problem("lost", f"{name}: {type(e).__name__}: {e}")
        self.count["answered"] += 1
        if text not in {self.answers[s] for s in self.possible(name, begun) if s is not None}:
            self._problem("wrong", f"{name}: {text!r}")

    def _problem(self, kind: str, what: str) -> None:
        self.count[kind] += 1
        self.problems.append(f"{kind}: {what}")

    async def stream(self, client: openai.AsyncOpenAI, end: float, seed: int, vanishing: float) -> None:
        """One client after the other."""
        rng = random.Random(seed)
        while time.monotonic() < end:
            await self.ask(client, rng.choice(list(self.spans)), rng.random() < vanishing)

    async def change(self, end: float, pause: float) -> None:
        """Replace, remove and add adapters, one after the other."""
        rng = random.Random(0)
        async with httpx.AsyncClient(base_url=self.url, headers=ADMIN, timeout=60) as admin:
            while time.monotonic() < end:
                await asyncio.sleep(pause)
                name = rng.choice([*self.names[:SPARE], *(f"b{i}" for i in range(SPARE))])
                spans = self.spans.setdefault(name, [Span(None, 0.0)])
                now = spans[-1].source
                new: str | None = f"spare/{name}" if now in (None, name) else name
                new = None if now and name[0] == "b" else new
                spans.append(Span(new, time.monotonic()))
                if new is None:
                    got = await admin.delete(f"/admin/adapters/{name}")
                else:
                    verb = admin.put if now else admin.post
                    got = await verb(f"/admin/adapters/{name}", json={"source": new})
                got.raise_for_status()
                spans[-2].until = time.monotonic()
                self.count["removed" if new is None else "replaced" if now else "added"] += 1


async def drive(url: str, answers: dict[str, str], names: list[str], asked: argparse.Namespace) -> dict[str, object]:
    """The load, and then one request at a time."""
    from rich.progress import Progress

    limits = httpx.Limits(max_connections=asked.streams, max_keepalive_connections=asked.streams)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(limits=limits, timeout=120)
    ) as client:
        warm = Load(url, answers, 1, names)
        await asyncio.gather(*(warm.ask(client, n) for n in names))  # every adapter is read once
        alone = Load(url, answers, 1, names)
        start = time.monotonic()
        await alone.stream(client, start + asked.seconds / 3, 0, 0)
        slow = alone.count["tokens"] / (time.monotonic() - start)

        load = Load(url, answers, asked.streams, names)
        start = time.monotonic()
        end = start + asked.seconds
        with Progress(disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("load", total=asked.seconds)

            async def show() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(1)
                    bar.update(task, completed=time.monotonic() - start)

            await asyncio.gather(
                show(),
                load.change(end, asked.pause),
                *(load.stream(client, end, i, 0.02) for i in range(asked.streams)),
            )
        fast = load.count["tokens"] / (time.monotonic() - start)
    first = sorted(load.first)
    for problem in (warm.problems + alone.problems + load.problems)[:10]:
        print(problem, file=sys.stderr)
    return {
        "seconds": asked.seconds,
        "streams": asked.streams,
        "adapters": len(names),
        "methods": list(METHODS),
        **{k: load.count[k] for k in ("answered", "vanished", "not there", "added", "replaced", "removed")},
        "lost": load.count["lost"] + alone.count["lost"] + warm.count["lost"],
        "wrong": load.count["wrong"] + alone.count["wrong"] + warm.count["wrong"],
        "tokens/s": round(fast, 1),
        "tokens/s one at a time": round(slow, 1),
        "ratio": round(fast / slow, 2),
        "first token, median ms": round(1000 * statistics.median(first)),
        "first token, 95 % ms": round(1000 * first[int(0.95 * len(first))]),
    }


def main() -> int:
    """Prepare, start `inlay serve`, drive it, end it; 1 if anything was lost or wrong."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--seconds", type=float, default=300)
    parse.add_argument("--streams", type=int, default=64)
    parse.add_argument("--adapters", type=int, default=100)
    parse.add_argument("--pause", type=float, default=0.5, help="seconds between two changes of adapters")
    parse.add_argument("--rows", type=int, default=64)
    parse.add_argument("--adapter-memory", type=float, default=4.0, help="GiB that adapters may take")
    parse.add_argument("--folder", type=Path, help="keeps the adapters and their answers for another run")
    parse.add_argument("--out", type=Path, help="a JSON file for the result")
    asked = parse.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = asked.folder or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        answers = prepare(root, asked.adapters)
        names = [f"a{i}" for i in range(asked.adapters)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        words = [
            "serve",
            BASE,
            "--adapters",
            str(root),
            "--port",
            str(port),
            "--rows",
            str(asked.rows),
            "--log",
            "warning",
        ]
        words += ["--dtype", "fp32", "--device", "cpu", "--adapter-memory", str(asked.adapter_memory), "--threads", "1"]
        server = subprocess.Popen([sys.executable, "-m", "inlay", *words], env=os.environ | {"INLAY_ADMIN_KEY": "load"})
        url = f"http://127.0.0.1:{port}"
        try:
            while not _ready(url):
                if server.poll() is not None:
                    return 1
                time.sleep(0.2)
            found = asyncio.run(drive(url, answers, names, asked))
            server.send_signal(signal.SIGTERM)
            found["server's exit code"] = server.wait(60)
        finally:
            server.kill()
            server.wait()
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["lost"] or found["wrong"]))


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
