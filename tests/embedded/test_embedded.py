"""The bases inside the package: they load as ordinary folders, keep text intact and know their arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.models import embedded
from inlay.tasks.world import records
from inlay.tasks.world.drills import drills


@pytest.fixture(scope="module", params=embedded.NAMES)
def base(request: pytest.FixtureRequest):  # noqa: ANN201
    """(name, model, tokenizer) of one embedded base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = embedded.path(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


def test_unknown_name() -> None:
    """A wrong name is a user error that lists the bases."""
    with pytest.raises(InlayError, match="llama, gptj, bloom"):
        embedded.path("gpt5")


def test_folder_is_plain_and_small(base) -> None:  # noqa: ANN001
    """Only text and safetensors, at most 10 MB, bf16 weights, and the family is the one named."""
    name, model, _ = base
    folder = embedded.path(name)
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10_000_000
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    assert model.config.eos_token_id == 2 and model.config.vocab_size == 2048
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6


@pytest.mark.parametrize(
    "text",
    [
        "Joan has 12 apples . How many ?",
        "  \n\n                ### Instruction:\n                x",
        "naïve Übergrößenträger 12345 \t tab\r\n 你好 🙂 <s> </s>",
        "a  b   c    d\n\n\n e ",
        "",
    ],
)
def test_tokenizer_keeps_text(base, text: str) -> None:  # noqa: ANN001
    """decode(encode(x)) == x."""
    tokenizer = base[2]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_shape(base) -> None:  # noqa: ANN001
    """Special ids, single digits, and cheap blank runs."""
    tokenizer = base[2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not any(sum(c.isdigit() for c in t) > 1 for t in tokenizer.get_vocab())
    assert len(tokenizer("1234567")["input_ids"]) == 7
    assert len(tokenizer("\n" + " " * 16 + "### Instruction:")["input_ids"]) <= 6
    joined = [t for r in records("world-arith", n=50) for t in tokenizer(r["instruction"])["input_ids"]]
    assert max(joined) < 2048


@torch.no_grad()
def test_weights_reproduce_the_reported_drills(base) -> None:  # noqa: ANN001
    """Sums never seen in pretraining come out right about as often as `training.json` says."""
    name, model, tokenizer = base
    reported = json.loads((embedded.path(name) / "training.json").read_text())["drill_accuracy"]["add"]
    items = drills("add", 40, seed=11)
    right = 0
    for prompt, answer in items:
        ids = torch.tensor([[2, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        right += tokenizer.decode(out[0, ids.shape[1] :]).strip().split(".")[0] == answer
    assert abs(right / len(items) - reported) < 0.2
