"""Run the benchmarks.

python -m benchmarks                       all of them, at full size, results into docs/benchmarks.{json,md,png}
python -m benchmarks train memory          some of them
python -m benchmarks --quick               a smoke test on tiny models; nothing is recorded
python -m benchmarks choice --data DIR     with real test files (LLM-Adapters' layout: ARC-Easy/test.json ...)
python -m benchmarks strongest --size smollm2-135m --data DIR [--beside-load 1]
                                           a real base and texts against the fastest of PEFT's and TRL's settings
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import adapterhub, attach, bound, report, texts
from benchmarks import gpu as on_gpu
from benchmarks import mix as mixing
from benchmarks.asked import BATCH, PEFT, Asked
from benchmarks.bases import REAL, llama
from benchmarks.choice import Choice
from benchmarks.generate import Generation
from benchmarks.harness import FASTER, SHARE, Result, compare, faster, machine, peak, record, state
from benchmarks.lengths import CUTOFF, Row, rows
from benchmarks.many import Many
from benchmarks.strongest import LIMIT, strongest
from benchmarks.threads import threads
from benchmarks.train import METHODS, Ours, Peer, Side, agree, pair, timed, turn
from inlay.core.host import Host
from inlay.engine.memory import kept

KINDS = ("math", "commonsense", "alpaca")
ALL_KINDS = tuple(dict.fromkeys([*CUTOFF, *texts.TASKS]))


def train(asked: Asked) -> Iterator[Result]:
    """Time of optimizer steps: every size, dtype, method and kind that is asked for."""
    for size, dtype, method, kind in product(asked.sizes, asked.dtypes, asked.methods, asked.kinds):
        examples, what = asked.examples(size, kind)
        with tempfile.TemporaryDirectory() as folder:
            ours, peer = pair(size, examples, method, dtype, BATCH, Path(folder) / "a")
            told = f"{what}; {agree(ours, peer, 2, 1e-4 if dtype == 'fp32' else 1e-3)}"
        yield _steps(f"train {method} {kind} {size} {dtype}", ours, peer, examples, PEFT, told, asked)


def series(asked: Asked) -> Iterator[Result]:
    """The same for the series adapter, which PEFT lacks: AdapterHub in an environment of its own."""
    if not adapterhub.PYTHON.exists():
        print("series needs `make bench-peers`: skipped", file=sys.stderr)
        return
    for size, kind in product(asked.sizes, asked.kinds):
        count, name = BATCH * (asked.steps + 1), f"train series {kind} {size} fp32"
        with tempfile.TemporaryDirectory() as folder:
            ours, peer = adapterhub.sides(size, kind, count, Path(folder), asked.threads)
            try:
                versions = ", ".join(f"{k} {v}" for k, v in peer.versions.items())
                told = f"{agree(ours, peer, 2, 1e-4)}; the peer runs on {versions}"
                result = _steps(name, ours, peer, ours.examples, "AdapterHub + Trainer", told, asked)
            finally:
                peer.close()
        yield result


def _steps(name: str, ours: Side, peer: Side, examples: Sequence[Row], peer_is: str, told: str, asked: Asked) -> Result:
    took = asked.measured({"ours": turn(ours, asked.steps), "peer": turn(peer, asked.steps)})
    return timed(name, took["ours"], took["peer"], examples, BATCH, peer_is, told)


def upper(asked: Asked) -> Iterator[Result]:
    """Adapters in the upper half, activations cached, second epoch on; PEFT adapts every layer."""
    config = llama(asked.size).config
    examples, at = rows("math", BATCH * (asked.steps + 1), config.vocab_size), config.num_hidden_layers // 2
    cached, plain = (
        Ours(llama(asked.size), "lora", examples, BATCH, at=f"linear@last{at}", engine=engine)
        for engine in ("packed", "plain")
    )
    cached.loop.way.remember(cached.name, cached.examples, "ram")
    once = len(examples) // BATCH
    cached.steps(once), plain.steps(once)
    told = agree(cached, plain, once, 1e-4)
    peer = Peer(llama(asked.size), "lora", examples, BATCH)
    note = f"the peer adapts every layer, ours the upper half; in the second epoch, {told} with ours uncached"
    yield _steps(f"train upper half cached math {asked.size} fp32", cached, peer, examples, PEFT, note, asked)


def gpu(asked: Asked) -> Iterator[Result]:
    """Training on a GPU: time, tokens a second, memory, model-FLOPs utilisation. --quick does without one."""
    if not torch.cuda.is_available() and not asked.quick:
        print("gpu needs CUDA: skipped", file=sys.stderr)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = rows("alpaca", BATCH * (asked.steps + 1), llama(asked.size, device="meta").config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        yield from on_gpu.measure(asked.size, examples, BATCH, asked.rounds, device, Path(folder))


def memory(asked: Asked) -> Iterator[Result]:
    """Peak resident memory of a fresh process, and the same above an idle process with the model loaded."""
    for kind in asked.kinds:
        common = [asked.size, kind, "lora", "fp32", str(BATCH), str(asked.steps), str(asked.threads)]
        found = {side: [peak(side, *common) for _ in range(asked.rounds)] for side in ("ours", "peer", "empty")}
        idle = statistics.median(found["empty"])
        note = f"of which {idle:.0f} MiB are Python, PyTorch and the weights"
        yield compare(f"memory lora {kind} {asked.size} fp32", SHARE, found["ours"], found["peer"], "MiB", PEFT, note)
        above = [[x - idle for x in found[side]] for side in ("ours", "peer")]
        yield compare(f"memory above the model, lora {kind} {asked.size} fp32", SHARE, *above, "MiB", PEFT)


def cost(asked: Asked) -> Iterator[Result]:
    """A step over the frozen forward and backward, and over the time of the products that it cannot avoid."""
    for dtype in asked.dtypes:
        steps = bound.Steps(asked.size, dtype, "math")
        sides = {str(n): partial(steps.run, n) for n in (None, *bound.METHODS)}
        with kept():
            took = asked.measured({**sides, "plain": steps.plain})
        walls = {name: [t.wall for t in v] for name, v in took.items()}
        config = steps.host.model.config
        rates = bound.gemm(dtype, config)
        least = [bound.work(config, steps.cut) / max(rates.values())] * asked.rounds
        for name in bound.METHODS:
            over = "frozen forward + backward in the same engine"
            yield compare(f"cost {name} {asked.size} {dtype}", SHARE, walls[name], walls["None"], "s", over)
            plain = "frozen forward + backward, padded, by transformers"
            yield compare(f"cost {name} {asked.size} {dtype}", SHARE, walls[name], walls["plain"], "s", plain)
            yield compare(f"cost {name} {asked.size} {dtype}", SHARE, walls[name], least, "s", LIMIT, bound.told(rates))


def choice(asked: Asked) -> Iterator[Result]:
    """Multiple choice."""
    if asked.data is None:
        print("choice needs --data: skipped", file=sys.stderr)
        return
    for name, form in (("ARC-Easy", "adapter"), ("ARC-Easy", "text"), ("openbookqa", "adapter"), ("boolq", "adapter")):
        side = Choice(asked.data, name, form, 4 if asked.quick else asked.count, "small" if asked.quick else asked.size)
        told = side.agree()
        took = asked.measured({"ours": side.ours, "harness": side.harness, "alone": side.one_by_one})
        for peer, peer_is in (("harness", "lm_eval HFLM, batch 16"), ("alone", "one forward per option")):
            yield faster(f"choice {name} ({form} prompts) {asked.size}", took["ours"], took[peer], peer_is, told)


def generate(asked: Asked) -> Iterator[Result]:
    """Generation."""
    if asked.data is None:
        print("generate needs --data: skipped", file=sys.stderr)
        return
    side = Generation(asked.data, *((8, "small") if asked.quick else (asked.count, asked.size)))
    told = side.agree()
    runs = {"ours": side.ours, "8": lambda: side.peer(8), "1": lambda: side.peer(1)}
    took = asked.measured(runs)
    for peer, peer_is in (("8", "transformers generate, batch 8"), ("1", "transformers generate, one at a time")):
        yield faster(f"generate math prompts {asked.size}", took["ours"], took[peer], peer_is, told)


def hang(asked: Asked) -> Iterator[Result]:
    """Attach time, and many adapters."""
    took = asked.measured({"ours": attach.ours, "peer": attach.peft, "bare": attach.bare})
    for peer, peer_is in (("peer", "PEFT get_peft_model"), ("bare", "a bare wrapper module")):
        yield faster("attach LoRA to 32 layers, 224 places", took["ours"], took[peer], peer_is)
    size, numbers = ("tiny", (1, 3, 5)) if asked.quick else ("60M-blocks", (1, 100, 1000))
    with tempfile.TemporaryDirectory() as folder:
        yield from Many(size, numbers, asked.rounds, Path(folder)).results()


def mix(asked: Asked) -> Iterator[Result]:
    """Many adapters in one batch."""
    many = 4 if asked.quick else 32
    plans = {"LoRA": [f"lora-{i}" for i in range(many)], "RoAd": [f"road1-{i}" for i in range(many)]}
    plans["LoRA, 4 adapters"] = [f"lora-{i * 4 // many}" for i in range(many)]
    plans["8 methods"] = [f"{m}-{i}" for m in mixing.UNLIKE for i in range(many // 8)] or ["lora-0", "road1-0"] * 2
    bare = mixing.Decoder(llama(asked.size).eval(), many)
    wanted = [(m, many if m in ("lora", "road1") else max(1, many // 8)) for m in mixing.UNLIKE]
    host, _ = mixing.shelved(asked.size, wanted)
    ours = {name: mixing.Worn(host, plan) for name, plan in plans.items()}
    peers = {n: mixing.Decoder(bare.model, many, mixing.with_peft(asked.size, n, many)) for n in {many, 4}}
    for what, steps in (("decode", 5 * asked.steps), ("prefill", 0)):
        sides: dict[str, mixing.Decoder] = {"bare": bare, **ours, **{f"PEFT {n}": p for n, p in peers.items()}}
        took = asked.measured({n: partial(d.steps, steps) if steps else d.prefill for n, d in sides.items()})
        walls = {n: [t.wall for t in v] for n, v in took.items()}
        about = f"{many} rows, context {mixing.CONTEXT}" if steps else f"{many} x {mixing.CONTEXT} tokens"
        for name in plans:
            title = _mixed(what, name, many, asked.size)
            yield compare(title, SHARE, walls[name], walls["bare"], "s", "the bare model", about)
        for name, n in (("LoRA", many), ("LoRA, 4 adapters", 4)):
            title = f"mixed {what}, LoRA, {n} adapters {asked.size}"
            yield faster(title, took[name], took[f"PEFT {n}"], "PEFT adapter_names", about)
    yield from _in_slots(host, bare, {"bare": [None] * many, **plans}, asked)


def _mixed(what: str, name: str, many: int, size: str) -> str:
    return f"mixed {what}, {name if ',' in name or 'methods' in name else f'{name}, {many} adapters'} {size}"


def _in_slots(
    host: Host, bare: mixing.Decoder, plans: Mapping[str, Sequence[str | None]], asked: Asked
) -> Iterator[Result]:
    """Steps as `inlay.evaluate.generate` makes them, over transformers' and over its own on the bare base."""
    sides = {name: mixing.Slotted(host, plan) for name, plan in plans.items()}
    want, got = bare.logits(), sides["bare"].logits()
    if (off := float((got - want).abs().max() / want.abs().max())) > 1e-4:
        raise RuntimeError(f"logits in slots are {off:.1e} off")
    runs = {name: partial(s.steps, 5 * asked.steps) for name, s in sides.items()}
    took = asked.measured({**runs, "transformers": partial(bare.steps, 5 * asked.steps)})
    walls = {n: [t.wall for t in v] for n, v in took.items()}
    many = len(plans["bare"])
    note = f"{many} rows, context {mixing.CONTEXT}; bare logits agree to {off:.0e}"
    for name in plans:
        title = f"bare decode in slots {asked.size}"
        if name != "bare":
            title = _mixed("decode in slots", name, many, asked.size)
            yield compare(title, SHARE, walls[name], walls["bare"], "s", "the bare model in slots", note)
        yield compare(title, SHARE, walls[name], walls["transformers"], "s", "the bare model", note)


def heterogeneous(asked: Asked) -> Iterator[Result]:
    """RoAd's headline, scaled down: tokens a second with an adapter per request, against LoRA by `torch.bmm`."""
    for requests in (2,) if asked.quick else (1, 2, 4, 8, 16, 32, 64):
        host, _ = mixing.shelved(asked.size, [("lora", requests), ("road1", requests)])
        sides = {
            "RoAd": mixing.Slotted(host, [f"road1-{i}" for i in range(requests)]),
            "LoRA": mixing.Slotted(host, [f"lora-{i}" for i in range(requests)]),
            "bmm": mixing.Slotted(mixing.with_bmm(asked.size, requests), [None] * requests),
        }
        took = asked.measured({n: partial(d.steps, 5 * asked.steps) for n, d in sides.items()})
        speed = {n: requests * 5 * asked.steps / statistics.median(t.wall for t in v) for n, v in took.items()}
        note = ", ".join(f"{n} {v:.0f}" for n, v in speed.items()) + " tokens/s"
        for peer, peer_is in (("bmm", "LoRA by torch.bmm"), ("LoRA", "our own stacked LoRA")):
            yield faster(
                f"heterogeneous RoAd, {requests:2d} requests {asked.size}", took["RoAd"], took[peer], peer_is, note
            )


WORKLOADS = {
    f.__name__: f
    for f in (train, strongest, threads, series, upper, memory, cost, choice, generate, hang, mix, heterogeneous, gpu)
}


def of(given: argparse.Namespace) -> Asked:
    """What was asked for; --quick leaves little of it."""
    lists = (tuple(given.methods), tuple(given.kinds), tuple(given.dtypes))
    if given.quick:
        size = given.size if given.size in REAL else "tiny"
        return Asked(1, 1, (size,), given.threads, given.data, True, 8, *lists, given.beside_load)
    sizes = (given.size,) if given.size else ("60M", "small")
    return Asked(
        given.rounds, given.steps, sizes, given.threads, given.data, False, given.count, *lists, given.beside_load
    )


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a round")
    parser.add_argument(
        "--size", help="base: small, 60M, 7B, smollm2-135m; 60M if not given, for train and series small as well"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="real test files")
    parser.add_argument("--count", type=int, default=40, help="questions, or prompts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=ALL_KINDS, help="mawps needs --data")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--beside-load", type=int, default=0, metavar="N", help="N busy loops run beside the rounds (not beside memory)"
    )
    parser.add_argument(
        "--default-products", action="store_true", help="ours keeps to PyTorch's default library too (float32, AMD)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, nothing recorded")
    given = parser.parse_args(words)
    if unknown := set(given.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    return given


def main() -> None:
    given = parsed()
    torch.set_num_threads(given.threads)
    asked = of(given)
    if given.default_products:
        bound.default_products()
    command = "python -m benchmarks " + " ".join("DATA" if a == str(given.data) else a for a in sys.argv[1:])
    print({**machine(), "inlay": state()})
    for name in given.workloads or WORKLOADS:
        for result in WORKLOADS[name](asked):
            if given.default_products:
                result = replace(result, workload=f"{result.workload}, default products")
            load: dict[str, Any] = dict(asked.watch.told())
            if result.metric == FASTER:
                load |= asked.watch.noted(result.rounds)
                if asked.beside:
                    result = replace(result, workload=f"{result.workload}, beside {asked.beside} busy")
                    load["beside"] = asked.beside
            print(f"{result.workload:60s} {result.ratio:8.2f} ({result.low:.2f}-{result.high:.2f}) {result.metric}, "
                  f"{result.peer_is}; {result.note}; {load}", flush=True)  # fmt: skip
            if not given.quick:
                record(result, command.strip(), load)
    if not given.quick:
        report.write()


if __name__ == "__main__":
    main()
