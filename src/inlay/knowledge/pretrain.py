"""Small bases that know the toy world: three families, taught from scratch in minutes on one core, and kept."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import InlayError, unknown
from inlay.core.files import cache_folder, new_folder
from inlay.evaluate.bar import bar
from inlay.knowledge.measure import MeasureSettings, answers
from inlay.knowledge.wording import alike
from inlay.knowledge.world import World, tokenizer, words
from inlay.train.loop import seed_everything

WIDTH, LAYERS, HEADS = 96, 2, 4
MARKS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
"""Of the world's tokenizer."""
ROWS = 64
"""Texts a step."""
RATE, COOLING = 5e-3, 0.3
"""Highest learning rate, and the last share of steps in which it falls to zero."""
STEPS = 1800
VERSION = 1
"""Raised when the same arguments make another base."""


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        **MARKS,
    )  # fmt: skip


def _gptj(vocabulary: int) -> Any:
    from transformers import GPTJConfig

    return GPTJConfig(
        vocab_size=vocabulary, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, rotary_dim=16, n_inner=4 * WIDTH,
        n_positions=128, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False, **MARKS,
    )  # fmt: skip


def _bloom(vocabulary: int) -> Any:
    from transformers import BloomConfig

    return BloomConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


FAMILIES: dict[str, Callable[[int], Any]] = {"llama": _llama, "gptj": _gptj, "bloom": _bloom}


def make_base(
    family: str = "llama",
    seed: int = 0,
    out: str | Path | None = None,
    *,
    world: World | None = None,
    steps: int = STEPS,
    progress: bool = False,
) -> Path:
    """A folder with a base of this family that knows the world; `inlay.load_base` reads it.

    Made once: a folder that holds the base of these arguments is returned as it is.

    Args:
        family: `llama`, `gptj` or `bloom`: two layers, width 96.
        seed: of weights and of the order of texts, and of the world unless one is given.
        out: the folder; one of the user's cache by default (see `cache_folder`).
        steps: of 64 texts each.

    Raises InlayError for an unknown family, and for a folder that holds something else.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    world = world or World(seed)
    about = {
        "family": family, "seed": seed, "steps": steps, "version": VERSION,
        "world": {"seed": world.seed, "people": world.people, "strangers": world.strangers},
    }  # fmt: skip
    name = f"{family}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]}"
    folder = Path(out) if out is not None else cache_folder("worlds", name)
    if folder.exists():
        _is_it(folder, about)
        return folder
    began, random_state = time.perf_counter(), torch.random.get_rng_state()
    try:
        seed_everything(seed)
        model = _taught(family, world, seed, steps, progress)
    finally:
        torch.random.set_rng_state(random_state)
    scores = knows(model, world)
    seconds = round(time.perf_counter() - began, 1)
    with new_folder(folder) as made:
        model.save_pretrained(made)
        tokenizer().save_pretrained(made)
        told = {**about, "exact_match": scores, "seconds": seconds}
        (made / "world.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return folder


def _is_it(folder: Path, about: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InlayError(f"{folder} is there and holds no base of a world; choose another folder") from None
    if any(found.get(k) != v for k, v in about.items()):
        raise InlayError(f"{folder} holds a base made otherwise ({found}); choose another folder")


def world_of(folder: str | Path) -> World:
    """The world that a base of `make_base` knows."""
    try:
        return World(**json.loads((Path(folder) / "world.json").read_text(encoding="utf-8"))["world"])
    except (OSError, ValueError, KeyError) as e:
        raise InlayError(f"{folder} is no base of the toy world: it has no world.json; make one with make_base") from e


def knows(model: Any, world: World, most: int = 600) -> list[float]:
    """Exact match per wording of the questions, over at most so many known facts, by free generation."""
    import inlay

    items = random.Random(world.seed).sample(world.known(), min(most, len(world.facts)))
    host = inlay.attach(model.eval())
    try:
        scores = []
        for wording in zip(*((i.prompt, *i.paraphrases) for i in items), strict=True):
            said = answers(host, tokenizer(), wording, MeasureSettings(batch_size=64), 5)
            scores.append(sum(alike(a, i.target) for a, i in zip(said, items, strict=True)) / len(items))
        return scores
    finally:
        host.detach()
        model.requires_grad_(True)


def _taught(family: str, world: World, seed: int, steps: int, progress: bool) -> Any:
    from transformers import AutoModelForCausalLM

    tok = tokenizer()
    model = AutoModelForCausalLM.from_config(FAMILIES[family](len(words()))).train()
    texts = [_rows(tok, [t for own in world.biographies() for t in own]), _rows(tok, _asked(world))]
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: _rate(s, steps)) for o in optimizers]
    draw = torch.Generator().manual_seed(seed)
    with bar(progress) as shown:
        mark = shown.add_task(f"teaching {family}", total=steps)
        for step in range(steps):
            # Texts of one kind are nearly of one length, so little is padded. Questions come twice as often.
            rows = texts[step % 3 != 0]
            batch = rows[torch.randint(len(rows), (ROWS,), generator=draw)]
            _loss(model, batch, tok.pad_token_id).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            shown.advance(mark)
    return model.eval()


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks and AdamW for the rest: after 800 steps 35 % of the facts are known where
    AdamW alone has taught 5 % after 1,000."""
    if not hasattr(torch.optim, "Muon"):
        raise InlayError(f"making a base needs torch.optim.Muon, of PyTorch 2.9 and later; this is {torch.__version__}")
    outside = ("embed", "wte", "lm_head")
    inside = [p for n, p in model.named_parameters() if p.dim() == 2 and not any(word in n for word in outside)]
    taken = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(inside, lr=RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def _rate(step: int, steps: int) -> float:
    """Share of the highest rate: warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / min(100.0, steps / 10), (steps - step) / max(1.0, COOLING * steps))


def _asked(world: World) -> list[str]:
    return [f"{q} {i.target}" for i in world.known() for q in (i.prompt, *i.paraphrases)]


def _rows(tok: Any, texts: Sequence[str]) -> Tensor:
    """Texts with their end tokens (N, longest), padded on the right."""
    rows = [[*ids, tok.eos_token_id] for ids in tok(list(texts))["input_ids"]]
    wide = max(map(len, rows))
    return torch.tensor([row + [tok.pad_token_id] * (wide - len(row)) for row in rows])


def _loss(model: Any, ids: Tensor, pad: int) -> Tensor:
    """Next-token loss; causal attention never sees padding on the right."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
