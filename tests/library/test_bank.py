"""Adapters come and go, versions live as long as somebody holds them, and nothing bad gets in."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate
from inlay.library.bank import Bank
from inlay.library.compose import compose
from inlay.library.errors import BankError
from tests.evaluate import tiny
from tests.library import folders

SHORT = GenerateSettings(max_new_tokens=8)


@pytest.fixture
def folder(root, tmp_path):
    return shutil.copytree(root / "adapters", tmp_path / "adapters")


@pytest.fixture
def host():
    return inlay.attach(tiny.base("llama"))


def says(host, lease):
    return generate(host, tiny.tokenizer(), ["Tom has"], [lease.worn], SHORT)[0].text


def want(root, name, folder="adapters"):
    return generate(folders.host(root, folder), tiny.tokenizer(), ["Tom has"], name, SHORT)[0].text


def worn(host):
    return {name.partition("--")[0] for name in host.edits}


def kind(call):
    with pytest.raises(BankError) as e:
        call()
    return e.value.kind


def test_nothing_is_read_before_it_is_asked_for(host, folder):
    bank = Bank(host, [folder])
    assert bank.names() == sorted(folders.SMALL) and not host.edits
    assert bank.lease("lora") is None and bank.lease("base").worn == ()
    lease = bank.bring("lora")
    assert bank.lease("lora").worn == lease.worn and len(host.edits) == 1


def test_a_replaced_version_serves_those_who_hold_it(host, root, folder):
    bank = Bank(host, [folder])
    old = bank.bring("lora")
    shutil.rmtree(folder / "lora")
    shutil.copytree(root / "spare" / "lora", folder / "lora")
    bank.load("lora", replacing=True)
    new = bank.lease("lora")
    assert says(host, old) == want(root, "lora") != says(host, new) == want(root, "lora", "spare")
    assert len(host.edits) == 2
    old.release()
    old.release()
    bank.sweep()
    assert list(host.edits) == list(new.worn)
    bank.unload("lora")
    assert kind(lambda: bank.lease("lora")) == "unknown"
    assert says(host, new) == want(root, "lora", "spare")
    new.release()
    bank.sweep()
    assert not host.edits


def test_the_least_recently_used_leave_at_the_budget_and_come_back(host, root, folder):
    sizes = {}
    for name in folders.SMALL:
        inlay.load(own := inlay.attach(tiny.base("llama")), root / "adapters" / name)
        sizes[name] = 4 * sum(t.numel() for t in own.tensors(name).values())
    bank = Bank(host, [folder], room=sizes["lora"] + sizes["series"] + sizes["prefix"] - 4)
    for name in ("lora", "series"):
        bank.bring(name).release()
    assert bank.bytes == sizes["lora"] + sizes["series"] == sum(f.bytes for f in host.shelf.values())
    bank.lease("lora").release()
    held = bank.bring("prefix")
    assert worn(host) == {"lora", "prefix"} and bank.bytes == sizes["lora"] + sizes["prefix"] <= bank.room
    both = bank.bring("series+prompt")
    assert says(host, held) == want(root, "prefix")
    assert says(host, both) == want(root, "prompt+series")
    for lease in (held, both):
        lease.release()
    again = bank.bring("lora")
    assert says(host, again) == want(root, "lora")
    assert bank.bytes == sum(f.bytes for f in host.shelf.values()) <= bank.room


def test_what_adapters_share_counts_once_while_one_of_them_is_in_memory(host, folder):
    own = inlay.attach(tiny.base("llama"))
    for i in range(3):
        method = inlay.method("vera")
        own.add(f"v{i}", method.make(rank=8), at=["q"], seed=0)
        for p in own.parameters(f"v{i}"):
            p.data.add_(0.1 + i)
        inlay.save(own, f"v{i}", folder / f"v{i}")
    trained = 4 * sum(p.numel() for p in own.parameters("v0"))
    shared = 4 * sum(t.numel() for k, t in own.tensors("v0").items() if k.startswith("shared/_"))
    assert shared > trained > 0
    bank = Bank(host, [folder], room=shared + 2 * trained)
    bank.bring("v0").release()
    assert bank.bytes == shared + trained
    bank.bring("v1").release()
    assert bank.bytes == shared + 2 * trained == bank.room and worn(host) == {"v0", "v1"}
    bank.bring("v2").release()
    assert bank.bytes == bank.room and worn(host) == {"v1", "v2"}
    held = bank.bring("v1")
    bank.unload("v2")
    assert bank.bytes == shared + trained
    bank.unload("v1")
    assert bank.bytes == shared + trained, "who holds it on needs the shared ones as well"
    held.release()
    bank.sweep()
    assert bank.bytes == 0 and not host.edits
    bank.room = shared + trained - 4
    bank.bring("v0").release()
    bank.bring("lora").release()
    assert worn(host) == {"lora"} and bank.bytes == sum(f.bytes for f in host.shelf.values())


def test_what_is_in_use_stays_though_it_has_no_room_and_leaves_when_it_is_released(host, root, folder):
    bank = Bank(host, [folder], room=0)
    leases = [bank.bring(name) for name in ("lora", "series", "sum(0.5*lora, series)")]
    bank.sweep()
    assert bank.loaded == 3 and says(host, leases[0]) == want(root, "lora")
    for lease in leases:
        lease.release()
    bank.sweep()
    assert bank.loaded == 0 == bank.bytes and not host.edits


def test_using_wears_what_the_host_would_and_lets_go(host, root, folder):
    own = folders.host(root)
    ids = torch.arange(10).repeat(4, 1)
    with torch.no_grad(), own.using("lora", None, "prefix+series", "lora"):
        alone = own.model(ids).logits
    bank = Bank(host, [folder], room=0)
    with torch.no_grad(), bank.using("lora", None, "series+prefix", "lora") as wearing:
        assert wearing is host and bank.loaded == 3
        assert torch.equal(host.model(ids).logits, alone)
        with bank.using("base"):
            assert host.plan == ((),)
        assert torch.equal(host.model(ids).logits, alone)
    assert host.plan == ((),) and not host.edits
    bank.room = 1 << 30
    with pytest.raises(BankError, match="nobody"), bank.using("lora", "nobody"):
        pass
    assert all(a.get("requests", 0) == 0 for a in bank.describe()) and bank.loaded == 1
    with torch.no_grad(), bank.using("sum(0.7*lora, -0.3*series)"):
        compose(own, "own", "sum(0.7*lora, -0.3*series)")
        own.use("own")
        assert torch.equal(host.model(ids).logits, own.model(ids).logits)


def test_a_replacement_while_in_use_changes_nothing_for_the_user(host, root, folder):
    bank, ids = Bank(host, [folder]), torch.arange(10)[None]
    shutil.copytree(root / "spare" / "lora", folder / "other")
    with torch.no_grad(), bank.using("lora"):
        before = host.model(ids).logits
        bank.load("lora", "other", replacing=True)
        bank.unload("series")
        assert torch.equal(host.model(ids).logits, before)
        with bank.using("lora"):
            assert not torch.equal(host.model(ids).logits, before)
        assert bank.loaded == 2
    assert bank.loaded == 1


class Counted:
    """How often the file system is asked."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for module, name in ((os, "stat"), (os, "scandir"), (os, "listdir"), (os.path, "isfile"), (os.path, "isdir")):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, function):
        def counting(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return counting

    def during(self, call):
        before = self.calls
        call()
        return self.calls - before


def test_ten_thousand_folders_cost_what_ten_cost(host, root, tmp_path, monkeypatch):
    def many(number):
        folder = tmp_path / str(number)
        for i in range(number):
            (folder / f"a{i}").mkdir(parents=True)
        shutil.copytree(root / "adapters" / "lora", folder / "lora")
        return folder

    few, lots = many(10), many(10_000)
    counted = Counted(monkeypatch)
    start = [counted.during(lambda f=f: Bank(host, [f])) for f in (few, lots)]
    assert 0 < start[0] == start[1] < 12
    banks = [Bank(host, [f]) for f in (few, lots)]
    assert [counted.during(bank.names) for bank in banks] == [1, 1]
    assert [len(bank.names()) for bank in banks] == [11, 10_001]
    asked = [counted.during(lambda b=b: b.lease("lora")) for b in banks]
    assert 0 < asked[0] == asked[1] < 6
    assert kind(lambda: banks[1].lease("a17")) == "unknown" and "a17" not in banks[1].names()


def test_compositions_do_not_depend_on_who_was_loaded_first(root, folder):
    texts = set()
    for first in ("lora", "prefix", "series"):
        host = inlay.attach(tiny.base("llama"))
        bank = Bank(host, [folder])
        bank.bring(first)
        texts |= {says(host, bank.bring("series+lora+prefix")), says(host, bank.bring("prefix+series+lora"))}
    assert len(texts) == 1


@pytest.mark.parametrize("text", ["sum(0.7*lora, 0.4*series)", "stack(series, average(lora, series))"])
def test_compositions_are_made_of_the_versions_of_now(host, root, folder, text):
    from inlay.library import compose

    def alone(folder):
        own = folders.host(root, folder)
        return generate(compose(own, "x", text), tiny.tokenizer(), ["Tom has"], "x", SHORT)[0].text

    bank = Bank(host, [folder])
    assert bank.lease(text) is None
    old = bank.bring(text)
    assert (
        says(host, old) == alone("adapters") not in map(want, [root] * 2, ["lora", "series"])
        and bank.lease(text).worn == old.worn
    )
    for name in ("lora", "series"):
        shutil.rmtree(folder / name)
        shutil.copytree(root / "spare" / name, folder / name)
        bank.load(name, replacing=True)
    new = bank.bring(text)
    assert says(host, new) == alone("spare") and says(host, old) == alone("adapters")
    assert bank.names() == sorted(folders.SMALL)


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


def test_adapters_that_say_nothing_finite_are_refused(host, root, folder):
    own = folders.host(root)
    next(iter(own.tensors("lora").values())).data.fill_(float("nan"))
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


def test_a_folder_put_beside_the_others_is_served_until_it_is_unloaded(host, root, folder):
    bank = Bank(host, [folder])
    assert kind(lambda: bank.lease("late")) == "unknown"
    shutil.copytree(root / "spare" / "lora", folder / "late")
    assert says(host, bank.bring("late")) == want(root, "lora", "spare") and "late" in bank.names()
    bank.unload("late")
    assert kind(lambda: bank.lease("late")) == "unknown"
    bank.load("late")
    assert says(host, bank.lease("late")) == want(root, "lora", "spare")


def test_start(host, root, tmp_path):
    one = Bank(host, [root / "adapters" / "lora"])
    assert one.names() == ["lora"]
    with pytest.raises(InlayError, match="no folder"):
        Bank(host, [tmp_path / "missing"])
    with pytest.raises(InlayError, match="two adapters are called 'lora'"):
        Bank(host, [root / "adapters", root / "spare" / "lora"])
    both = Bank(host, [root / "adapters", root / "spare"])  # not looked into before somebody asks
    with pytest.raises(BankError, match="two adapters are called 'lora'"):
        both.bring("lora")
    run = tmp_path / "runs" / "math"
    shutil.copytree(root / "adapters" / "lora", run / "adapter")
    assert Bank(host, [tmp_path / "runs"]).names() == ["math"]


def test_a_mix_is_the_sum_and_leaves_when_nobody_holds_it(host, root, folder):
    bank = Bank(host, [folder])
    lease = bank.mix({"lora": 0.7, "series": -0.3})
    own = folders.host(root)
    compose(own, "own", "sum(0.7*lora, -0.3*series)")
    alone = generate(own, tiny.tokenizer(), ["Tom has"], "own", SHORT)[0].text
    assert says(host, lease) == alone != want(root, "lora")
    assert len(host.edits) == 3 and bank.names() == sorted(folders.SMALL)
    again = lease.again()
    lease.release()
    bank.sweep()
    assert says(host, again) == alone
    again.release()
    bank.sweep()
    assert sorted(n.partition("--")[0] for n in host.edits) == ["lora", "series"]


def test_what_has_no_sum_is_refused_and_leaves_nothing(host, folder):
    bank = Bank(host, [folder])
    with pytest.raises(BankError, match="virtual tokens"):
        bank.mix({"lora": 0.5, "prefix": 0.5})
    assert kind(lambda: bank.mix({"nobody": 1.0})) == "unknown"
    assert sorted(n.partition("--")[0] for n in host.edits) == ["lora", "prefix"]
    assert all(v.users == 0 for v in bank._loaded.values())
