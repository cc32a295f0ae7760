"""Nothing bad gets into a bank: names, sources, damaged folders, foreign adapters."""

from __future__ import annotations

import json
import shutil

import pytest

import inlay
from inlay.library.bank import Bank
from inlay.library.errors import BankError
from tests.evaluate import tiny
from tests.library import folders
from tests.library.folders import kind, says, want


@pytest.mark.parametrize(
    "text, said",
    [("sum(lora", "invalid"), ("mean(lora, series)", "invalid"), ("sum(0.5*nobody, lora)", "unknown"),
     ("union(lora, series)", "invalid"), ("sum(../x)", "invalid"), ("sum(" * 120, "invalid")],
)  # fmt: skip
def test_compositions_that_cannot_be_made(host, root, folder, text, said):
    bank = Bank(host, [folder])
    assert kind(lambda: bank.bring(text)) == said
    assert says(host, bank.bring("lora")) == want(root, "lora")
    assert not any("composition" in n for n in host.edits)


@pytest.mark.parametrize("name", ["../lora", "a/b", "", ".", "..", "a+b", "a b", "x" * 129, "base", "lora\n", "%2e"])
def test_bad_names(host, folder, name):
    bank = Bank(host, [folder])
    assert kind(lambda: bank.load(name)) in ("bad-name", "exists")
    assert not host.edits


@pytest.mark.parametrize("source", ["../spare/lora", "/etc", "nowhere", "lora/../../spare", "link"])
def test_sources_outside_are_refused(host, root, folder, source):
    shutil.copytree(root / "spare", folder.parent / "spare")
    (folder / "link").symlink_to(folder.parent / "spare" / "lora")
    bank = Bank(host, [folder])
    assert kind(lambda: bank.load("new", source)) == "bad-source"
    assert not host.edits


def test_sources_inside_are_served_whatever_their_format(host, root, folder):
    from inlay.interop import formats

    own = folders.host(root)
    formats.write(own, "lora", folder / "hf-lora")
    bank = Bank(host, [folder])
    bank.load("new", "hf-lora")
    assert says(host, bank.lease("new")) == want(root, "lora")
    assert kind(lambda: bank.load("new", "lora")) == "exists"


def damage(folder, how):
    lora = folder / "lora"
    tensors = next(lora.glob("*.safetensors"))
    record = json.loads((lora / "adapter.json").read_text())
    if how == "cut":
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no json":
        (lora / "adapter.json").write_text("{")
    elif how == "list":
        (lora / "adapter.json").write_text("[1]")
    elif how == "binary":
        (lora / "adapter.json").write_bytes(b"\xff\xfe\x00")
    elif how == "edited":
        (lora / "adapter.json").write_text(json.dumps(record | {"method": "rm -rf"}))


@pytest.mark.parametrize("how", ["cut", "no tensors", "no json", "list", "binary", "edited"])
def test_damaged_folders_are_refused_and_nothing_is_left_behind(host, folder, root, how):
    bank = Bank(host, [folder])
    damage(folder, how)
    assert kind(lambda: bank.bring("lora")) == "broken"
    assert kind(lambda: bank.lease("lora")) == "broken"
    assert kind(lambda: bank.load("lora", replacing=True)) == "unfit"
    assert not host.edits and bank.describe()[0]["state"] == "broken"
    assert says(host, bank.bring("series")) == want(root, "series")
    shutil.rmtree(folder / "lora")
    shutil.copytree(root / "adapters" / "lora", folder / "lora")
    bank.load("lora", replacing=True)
    assert says(host, bank.lease("lora")) == want(root, "lora")


def test_a_damaged_replacement_leaves_the_old_one(host, folder, root):
    bank = Bank(host, [folder])
    bank.bring("lora").release()
    damage(folder, "cut")
    assert kind(lambda: bank.load("lora", replacing=True)) == "unfit"
    assert says(host, bank.lease("lora")) == want(root, "lora") and len(host.edits) == 1


def test_adapters_of_another_base_are_refused(folder):
    other = inlay.attach(tiny.base("llama", seed=5))
    bank = Bank(other, [folder])
    with pytest.raises(BankError, match="trained on another base"):
        bank.load("lora", replacing=True)
    assert not other.edits


def test_adapters_that_say_nothing_finite_are_refused(host, root, folder, monkeypatch):
    own = folders.host(root)
    next(iter(own.tensors("lora").values())).data.fill_(float("nan"))
    with monkeypatch.context() as m:  # a file that another program wrote
        m.setattr("inlay.core.store.not_finite", lambda tensors: None)
        inlay.save(own, "lora", folder / "lora")
    with pytest.raises(BankError, match="not finite"):
        Bank(host, [folder]).load("lora", replacing=True)
    assert not host.edits


def test_a_hub_id_is_read_from_the_hubs_cache(host, root, folder, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    repo = tmp_path / "hub" / "models--org--lora-x"
    shutil.copytree(root / "spare" / "lora", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_OFFLINE", True, raising=False)
    bank = Bank(host, [folder, "hub:org/lora-x"])
    assert says(host, bank.bring("lora-x")) == want(root, "lora", "spare")
    bank.load("other", "hub:org/lora-x")
    assert kind(lambda: bank.load("third", "hub:org/nothing")) == "unfit"
