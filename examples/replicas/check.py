"""Asks the replicas behind a URL, kills one of them meanwhile, and compares every answer with `generate`.

python examples/replicas/check.py http://127.0.0.1:8000 runs
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import openai

import inlay
from inlay.evaluate import GenerateSettings, generate

PROMPTS = [f"Tom has {n} apples and buys 7 more. How many apples does he have?" for n in range(40)]
SETTINGS = GenerateSettings(max_new_tokens=24)


async def main(url: str, folder: Path) -> int:
    """1 if an answer was lost or differs."""
    model, tokenizer = inlay.load_base(os.environ.get("INLAY_MODEL", "tiny-llama"))
    host = inlay.attach(model)
    names = [inlay.load(host, f, f.name) for f in sorted(folder.iterdir()) if (f / "adapter.json").exists()]
    plan = [names[i % len(names)] for i in range(len(PROMPTS))]
    want = [g.text for g in generate(host, tokenizer, PROMPTS, plan, SETTINGS)]
    by: Counter[str] = Counter()
    wrong = 0
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as client:

        async def ask(i: int) -> None:
            nonlocal wrong
            asked = {"model": plan[i], "prompt": PROMPTS[i], "max_tokens": SETTINGS.max_new_tokens, "temperature": 0}
            got = await client.completions.with_raw_response.create(**asked)
            by[got.headers["x-replica"]] += 1
            wrong += got.parse().choices[0].text != want[i]

        for round_ in range(3):
            start = time.monotonic()
            await asyncio.gather(*map(ask, range(len(PROMPTS))))
            seconds = time.monotonic() - start
            print(f"round {round_}: {len(PROMPTS)} answers, {wrong} wrong, {seconds:.1f} s, by {dict(by)}")
            if round_ == 0:
                victim = by.most_common(1)[0][0]  # its process, or its address
                os.kill(int(os.environ.get(f"PID_{victim.rpartition(':')[2]}", victim)), signal.SIGKILL)
                print(f"killed {victim}")
            by.clear()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], Path(sys.argv[2]))))
