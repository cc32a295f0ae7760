"""Pretrain the embedded base models from scratch on the synthetic world's declarative text (CPU, seeded, resumable)."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from inlay.models.embedded import NAMES
from inlay.models.embedded.supplement import TEMPLATE_WORDS, WORDS
from inlay.tasks.world import corpus
from inlay.tasks.world.drills import DRILLS, drills

VOCABULARY = 2048
SPECIALS = ("<unk>", "<s>", "</s>")
SPLIT = r"\n| ?'(?:s|t|re|ll|ve|m|d)(?!\p{L})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|\s+"
HOME = Path(__file__).resolve().parent.parent / "src" / "inlay" / "models" / "embedded"


def train_tokenizer(seed: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE: one token per digit, one per blank run of the instruction templates, words of the world."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_text(seed), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write the tokenizer under the class name that older and newer transformers both know."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    text = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(text, indent=2) + "\n")


def tokenizer_text(seed: int) -> Iterator[str]:
    """Corpus sample, every question word and blank run the templates need, and a list of common words."""
    rng = random.Random(f"tokenizer-{seed}")
    yield from islice((text for text in corpus(seed) if text[:1].isalpha()), 20_000)
    header = [*TEMPLATE_WORDS, *(w.rstrip("12345") + ":" for w in TEMPLATE_WORDS)]
    for _ in range(250):
        yield " " + " ".join(WORDS)
        yield "\n".join(header[::2]) + " " + " ".join(header)
    for _ in range(400):
        yield "\n" + " " * 16 + "\n" + " " * 16 + "### Instruction:\n" + " " * 16 + "### Response:\n" + " " * 16 + "The"
        yield f" ? How many ? How much ? What is ? Where ? Who ? If {rng.choice(WORDS)}?"


def build(name: str, vocabulary: int) -> Any:
    """An untrained model of one family with about 2.5 to 3.5 million parameters."""
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "llama":
        config: Any = transformers.LlamaConfig(
            hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5, **common,
        )  # fmt: skip
    elif name == "gptj":
        config = transformers.GPTJConfig(
            n_embd=192, n_inner=768, n_layer=5, n_head=4, rotary_dim=32, n_positions=1024, tie_word_embeddings=False,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **common,
        )  # fmt: skip
    else:
        config = transformers.BloomConfig(
            hidden_size=192, n_layer=6, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **common
        )
    config.architectures = None
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batches(
    tokenizer: Any, seed: int, tokens: int, width: Callable[[], int], start: int = 0
) -> Iterator[tuple[torch.Tensor, int]]:
    """(token ids of the width wanted now, next document) without end; documents packed with </s> between them."""
    documents = corpus(seed + 1, start=start)
    words = random.Random(f"words-{seed}-{start}")
    buffer: list[int] = []
    used = start
    while True:
        chunk = list(islice(documents, 64))
        used += len(chunk)
        chunk.append(f"The words on the list were {', '.join(words.sample(WORDS, 12))} and {words.choice(WORDS)}.")
        for ids in tokenizer(chunk)["input_ids"]:
            buffer += ids + [2]
        while len(buffer) >= tokens:
            yield torch.tensor(buffer[:tokens]).view(-1, width()), used
            buffer = buffer[tokens:]


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: list[str], new: int = 9) -> list[str]:
    """Greedy continuations, prompts of one token length together so that no padding is needed."""
    by_length: dict[int, list[int]] = {}
    ids = tokenizer(prompts)["input_ids"]
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    out = [""] * len(prompts)
    for group in by_length.values():
        rows = torch.tensor([[2, *ids[i]] for i in group])
        width = rows.shape[1]
        for _ in range(new):
            last = model(input_ids=rows, use_cache=False).logits[:, -1].argmax(-1)
            rows = torch.cat([rows, last[:, None]], 1)
        for i, row in zip(group, rows[:, width:], strict=True):
            out[i] = tokenizer.decode(row)
    return out


def report(model: Any, tokenizer: Any, n: int = 200, seed: int = 7) -> dict[str, float]:
    """Share of each drill kind whose first completed number is the right one."""
    model.eval()
    scores: dict[str, float] = {}
    for kind in DRILLS:
        items = drills(kind, n, seed)
        texts = complete(model, tokenizer, [p for p, _ in items], new=16 if kind in ("fact", "story") else 6)
        pairs = zip(texts, (answer for _, answer in items), strict=True)
        hits = [(text.strip().rstrip(".") + ". ").split(". ")[0] == answer for text, answer in pairs]
        scores[kind] = round(sum(hits) / len(hits), 4)
    model.train()
    return scores


def schedule(progress: float, step: int, warmup: int, peak: float) -> float:
    """Linear warm-up in steps, then cosine in progress down to a twentieth of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimisers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the matrices inside the blocks and AdamW on the rest."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "wte" not in n
              and "lm_head" not in n]  # fmt: skip
    rest = [p for p in model.parameters() if all(p is not q for q in inside)]
    adam = {"lr": args.lr, "betas": (0.9, 0.98), "fused": True}
    if args.optimizer == "muon":
        muon = torch.optim.Muon(inside, lr=args.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, weight_decay=0.0, **adam)]
    groups = [{"params": inside, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, **adam)]


def loss_function(model: Any, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Next-token loss under bf16 autocast (twice as fast as fp32 on CPUs with AVX512-bf16, same master weights)."""

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        return torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))

    return torch.compile(loss, dynamic=False) if compiled else loss


def train(args: argparse.Namespace) -> None:
    """The whole run: tokenizer, training loop with checkpoints, self-report, export."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = Path(args.out or HOME / args.name)
    out.mkdir(parents=True, exist_ok=True)
    work = Path(args.work or out)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, out)
    model = build(args.name, len(tokenizer))
    opts = optimisers(model, args)
    peaks = [o.param_groups[0]["lr"] for o in opts]
    state = {"step": 0, "seconds": 0.0, "documents": 0, "losses": []}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(opts, saved["opts"], strict=True):
            o.load_state_dict(s)
        state = saved["state"]
    loop(args, model, tokenizer, opts, peaks, state, checkpoint)
    export(args, model, tokenizer, state, out)
    checkpoint.unlink(missing_ok=True)


def loop(
    args: argparse.Namespace, model: Any, tokenizer: Any, opts: list[torch.optim.Optimizer], peaks: list[float],
    state: dict[str, Any], checkpoint: Path,
) -> None:  # fmt: skip
    """Optimise until the step or minute budget is used; fills `state` in place.

    Short rows first: attention is the costly part on a CPU. The last third sees 256 positions.
    """
    loss_of = loss_function(model, not args.no_compile)
    began = time.time() - state["seconds"]
    progress = 0.0
    data = batches(tokenizer, args.seed, args.tokens, lambda: 128 if progress < 0.65 else 256, state["documents"])
    recent: list[float] = []
    saved_at = time.time()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        row = bar.add_task(args.name, total=1.0)
        for ids, documents in data:
            state["seconds"] = time.time() - began
            progress = state["step"] / args.steps if args.steps else state["seconds"] / (60 * args.minutes)
            if progress >= 1:
                break
            for o, peak in zip(opts, peaks, strict=True):
                for group in o.param_groups:
                    group["lr"] = schedule(progress, state["step"], args.warmup, peak)
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for o in opts:
                o.step()
                o.zero_grad()
            state["step"] += 1
            state["documents"] = documents
            recent.append(loss.item())
            if state["step"] % args.log_every == 0:
                state["losses"].append([state["step"], round(sum(recent) / len(recent), 4)])
                recent = []
                bar.update(row, completed=progress, description=f"{args.name} loss {state['losses'][-1][1]:.3f}")
                print(f"{time.strftime('%H:%M:%S')} step {state['step']} {100 * progress:.1f}% "
                      f"loss {state['losses'][-1][1]:.4f}", flush=True)  # fmt: skip
            if state["step"] % args.report_every == 0:
                print(json.dumps(report(model, tokenizer, 100)), flush=True)
            if time.time() - saved_at > 240:
                saved_at = time.time()
                torch.save(
                    {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "state": state}, checkpoint
                )


def export(args: argparse.Namespace, model: Any, tokenizer: Any, state: dict[str, Any], out: Path) -> None:
    """bf16 weights, config, tokenizer and `training.json` (scores measured on the bf16 weights)."""
    model = model.to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    scores = report(model, tokenizer, args.probes)
    kept = state["losses"][:: max(1, len(state["losses"]) // 60)]
    facts = {
        "base": args.name,
        "command": f"python scripts/pretrain_bases.py {args.name} --minutes {args.minutes} --seed {args.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        "tokens": state["step"] * args.tokens,
        "documents": state["documents"],
        "seconds": round(state["seconds"]),
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("name", "out", "work", "seed")},
        "losses": [*kept, state["losses"][-1]] if kept else [],
        "drill_accuracy": scores,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(scores), flush=True)


def main() -> None:
    """Parse the command line and train one base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock budget, used when --steps is absent")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; makes the schedule reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="folder of the base (default: inside the package)")
    parser.add_argument("--work", default="", help="folder of the resumable checkpoint (default: the base folder)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step; rows of 128, at the end of 256")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--report-every", type=int, default=1000)
    parser.add_argument("--probes", type=int, default=400, help="drills of each kind in the final self-report")
    parser.add_argument("--no-compile", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
