"""Files on the shelf: the second adapter of a kind is folded by the first one's recipe, to the same bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.core import files, recipe, store
from inlay.core.held import Held, read_bytes
from inlay.methods import EDITS
from tests.core.test_store import edit_json
from tests.laws.zoo import base, batch, dressed, excite, logits, methods, places, small

FAMILIES = ["llama", "bloom", "gpt2"]


def recipes(host) -> list:
    return [made for kind in host.shelf._kinds.values() for made in kind.recipes.values()]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[p].keys() == b[p].keys() and all(torch.equal(a[p][k], b[p][k]) for k in a[p]) for p in a
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_on_the_shelf_is_the_hung_adapter_folded(family, tmp_path, monkeypatch):
    donor, host = dressed(family), inlay.attach(base(family))
    tried = []
    make = recipe.recipe
    monkeypatch.setattr("inlay.core.shelf.recipe", lambda *a: (tried.append(1), make(*a))[1])
    for name in methods(family):
        inlay.save(donor, name, tmp_path / name)
        for copy in "ab":
            store.shelve(host, tmp_path / name, EDITS, f"{name}-{copy}")
            assert equal(host.shelf[f"{name}-{copy}"].at, donor.folds.get(donor, name).at), name
        assert host.shelf[f"{name}-a"].cut is host.shelf[f"{name}-b"].cut
    assert len(tried) == len(methods(family))


def test_recipes_are_for_methods_that_fold_place_by_place(tmp_path):
    made = {}
    for name in ("lora", "ia3", "lokr", "series", "dora", "road2", "vera"):
        inlay.save(dressed("llama"), name, tmp_path / name)
        host = inlay.attach(base("llama"))
        store.shelve(host, tmp_path / name, EDITS)
        (made[name],) = recipes(host)
    assert [n for n, how in made.items() if how] == ["lora", "ia3", "lokr", "series"]
    # All layers of a role in one run.
    assert [run.first.key for run in made["lora"].runs] == ["0.q", "0.k", "0.v", "0.up", "0.down"]


def test_files_that_differ_in_their_header_are_never_taken_for_each_other(tmp_path):
    donor = inlay.attach(base("llama"))
    donor.add("x", small("lora"), at="q,v", seed=0)
    excite(donor)
    inlay.save(donor, "x", tmp_path / "a")
    host = inlay.attach(base("llama"))
    store.shelve(host, tmp_path / "a", EDITS, "a")
    file = next((tmp_path / "a").glob("*.safetensors"))
    kept = load_file(file)
    cases = {"half": {k: t.half() for k, t in kept.items()}, "mixed": kept | {"0.q/A": kept["0.q/A"].half()}}
    for name, tensors in cases.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        other = tmp_path / name / file.name
        save_file(tensors, other, {"note": name})
        edit_json(tmp_path / name, tensors={"file": file.name, "sha256": files.sha256(other)})
        store.shelve(host, tmp_path / name, EDITS, name)
        want = inlay.attach(base("llama"))
        inlay.load(want, tmp_path / name, name="x")
        assert equal(host.shelf[name].at, want.folds.get(want, "x").at)
    assert [bool(how) for how in recipes(host)] == [True, True, False]


def test_a_damaged_file_of_a_known_kind_stays_off_the_shelf(tmp_path):
    inlay.save(dressed("llama"), "lora", tmp_path)
    host = inlay.attach(base("llama"))
    store.shelve(host, tmp_path, EDITS, "good")
    file = next(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    for at in (3, 40, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(inlay.InlayError, match="damaged"):
            store.shelve(host, tmp_path, EDITS, "bad")
        assert list(host.edits) == list(host.shelf) == ["good"]


def test_tensors_lie_in_the_bytes_of_their_file(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.zeros(0, 7), "d": torch.tensor(2.0).double()}
    save_file(tensors, tmp_path / "x", {"note": "y"})
    one, other = (Held.of(read_bytes(tmp_path / "x")) for _ in range(2))
    assert one.layout is other.layout and one.keys() == tensors.keys()
    assert all(torch.equal(one[k], t) and one[k].dtype == t.dtype for k, t in tensors.items())
    one["a"].zero_()
    assert not one["a"].any() and torch.equal(other["a"], tensors["a"])


def test_what_is_shelved_speaks_though_its_sites_were_once_removed(tmp_path):
    donor = dressed("llama")
    inlay.save(donor, "lora", tmp_path)
    host = inlay.attach(base("llama"))
    store.shelve(host, tmp_path, EDITS, "x")
    host.remove("x")
    host.add("hung", small("lora"), at=places("lora", "llama"), seed=1).remove("hung")
    store.shelve(host, tmp_path, EDITS, "x")
    torch.testing.assert_close(logits(host, "x", **batch()), logits(donor, "lora", **batch()), rtol=1e-4, atol=1e-5)


def test_constants_that_adapters_share_are_in_memory_once(tmp_path):
    donor = inlay.attach(base("llama"))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        donor.add(name, small("vera", projection_seed=seed), seed=ord(name))
    excite(donor)
    host = inlay.attach(base("llama"))
    for name in "abc":
        inlay.save(donor, name, tmp_path / name)
        store.shelve(host, tmp_path / name, EDITS, name)
    a, b, c = (host.shelf[name] for name in "abc")
    trained = sum(t.numel() for key, t in donor.tensors("a").items() if not key.startswith("shared/"))
    assert a.bytes == 4 * trained and a.cut is b.cut and a.cut.alike != c.cut.alike
    assert a.at["0.q"]["_A"] is b.at["1.down"]["_A"] and not torch.equal(a.at["0.q"]["_A"], c.at["0.q"]["_A"])
    for name in "abc":
        kept, loose = donor.tensors(name), host.shelf[name].loose()
        assert kept.keys() == loose.keys() and all(torch.equal(kept[k], loose[k]) for k in kept)
    host.strategy, donor.strategy = "stack", "segments"
    plan, inputs = ["a", "b", "c", None, "b"], batch(5)
    torch.testing.assert_close(logits(host, *plan, **inputs), logits(donor, *plan, **inputs), rtol=1e-4, atol=1e-5)
