"""PEFT folders on the shelf: the second of a kind is renamed and not hung, and folded to the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.interop import formats, peft, peft_shelf
from inlay.library.bank import Bank
from tests.evaluate import tiny

METHODS = {
    "lora": {"rank": 4}, "rslora": {"rank": 4}, "dora": {"rank": 4}, "loha": {"rank": 3}, "lokr": {"rank": 2},
    "vera": {"rank": 8}, "ia3": {}, "road1": {}, "prompt": {"tokens": 2},
}  # fmt: skip
HUNG = {"dora"}
"""Has tensors that no file holds."""


def folders(tmp_path, method, settings, number=3):
    """Folders of one kind with other numbers, written as PEFT writes them."""
    host = inlay.attach(tiny.base("llama"))
    made = inlay.method(method)
    host.add("a", made.make(**settings), at=made.places, seed=0)
    found = []
    for i in range(number):
        torch.manual_seed(i)
        for p in host.parameters("a"):
            p.data.add_(0.1 * torch.randn_like(p))
        found.append(formats.write(host, "a", tmp_path / f"{method}{i}").folder)
    return found


def flat(host, name):
    return host.shelf[name].flat


@pytest.fixture
def hung(monkeypatch):
    """Names that were hung."""
    names, add = [], Host.add
    monkeypatch.setattr(Host, "add", lambda self, name, *a, **k: (names.append(name), add(self, name, *a, **k))[1])
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_folder_of_a_kind_is_folded_to_the_bits_of_one_that_hung(method, tmp_path, hung):
    host, plain = (inlay.attach(tiny.base("llama")) for _ in range(2))
    for i, folder in enumerate(folders(tmp_path, method, METHODS[method])):
        hung.clear()
        name = formats.shelve(host, folder)
        assert name == folder.name and (i == 0 or bool(hung) == (method in HUNG))
        peft_shelf.by_hanging(plain, peft.read(plain, folder))
        assert torch.equal(flat(host, name), flat(plain, name)) and host.edits[name] == plain.edits[name]
        assert host.shelf[name].cut.alike == plain.shelf[name].cut.alike
    assert set(host.edits) == set(host.shelf) == set(plain.shelf), "nothing is left hanging"


@pytest.mark.parametrize("more", [{"lora_alpha": 31}, {"alpha_pattern": {"q_proj": 2}}])
def test_another_config_is_another_kind(tmp_path, more):
    host, plain = (inlay.attach(tiny.base("llama")) for _ in range(2))
    for i, folder in enumerate(folders(tmp_path, "lora", {"rank": 4}, 4)):
        if i > 1:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | more))
        formats.shelve(host, folder)
        peft_shelf.by_hanging(plain, peft.read(plain, folder))
        assert torch.equal(flat(host, folder.name), flat(plain, folder.name))


def test_half_precision_is_widened_exactly(tmp_path, hung):
    host, plain = (inlay.attach(tiny.base("llama")) for _ in range(2))
    for folder in folders(tmp_path, "lora", {"rank": 4}):
        file = folder / "adapter_model.safetensors"
        save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file, {"format": "pt"})
        hung.clear()
        formats.shelve(host, folder)
        later = list(hung)
        peft_shelf.by_hanging(plain, peft.read(plain, folder))
        assert torch.equal(flat(host, folder.name), flat(plain, folder.name))
    assert not later


def test_what_is_wrong_with_a_later_folder_is_said_and_nothing_is_left(tmp_path):
    host = inlay.attach(tiny.base("llama"))
    one, two, three = folders(tmp_path, "lora", {"rank": 4})
    formats.shelve(host, one)
    file = two / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InlayError, match="not a readable safetensors file"):
        formats.shelve(host, two)
    tensors = load_file(three / file.name)
    save_file(tensors | {"base_model.model.nobody.lora_A.weight": torch.ones(4, 4)}, three / file.name)
    with pytest.raises(InlayError):
        formats.shelve(host, three)
    assert list(host.edits) == [one.name]


def test_a_bank_says_the_same_with_peft_folders_as_with_its_own(tmp_path):
    ids = torch.arange(10)[None]
    host = inlay.attach(tiny.base("llama"))
    bank = Bank(host, [tmp_path])
    plain = inlay.attach(tiny.base("llama"))
    for folder in folders(tmp_path, "lora", {"rank": 4}):
        peft.read(plain, folder)
        with torch.no_grad(), bank.using(folder.name), plain.using(folder.name):
            assert torch.allclose(host.model(ids).logits, plain.model(ids).logits, atol=1e-5)
