"""Adapters come and go, and versions live as long as somebody holds them."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import generate
from inlay.library.bank import Bank
from inlay.library.compose import compose
from inlay.library.errors import BankError
from tests.evaluate import tiny
from tests.library import folders
from tests.library.folders import SHORT, kind, says, want, worn


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
