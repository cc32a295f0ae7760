"""Adapters come and go, versions live as long as somebody holds them, and nothing bad gets in."""

from __future__ import annotations

import json
import shutil

import pytest

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate
from inlay.library.compose import compose
from inlay.serve.adapters import Adapters
from inlay.serve.errors import Refused
from tests.evaluate import tiny
from tests.serve import tiny_server

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
    return generate(tiny_server.host(root, folder), tiny.tokenizer(), ["Tom has"], name, SHORT)[0].text


def status(call):
    with pytest.raises(Refused) as e:
        call()
    return e.value.status


def test_nothing_is_read_before_it_is_asked_for(host, folder):
    adapters = Adapters(host, [folder])
    assert adapters.names() == sorted(tiny_server.SMALL) and not host.edits
    assert adapters.lease("lora") is None and adapters.lease("base").worn == ()
    lease = adapters.bring("lora")
    assert adapters.lease("lora").worn == lease.worn and len(host.edits) == 1


def test_a_replaced_version_serves_those_who_hold_it(host, root, folder):
    adapters = Adapters(host, [folder])
    old = adapters.bring("lora")
    shutil.rmtree(folder / "lora")
    shutil.copytree(root / "spare" / "lora", folder / "lora")
    adapters.load("lora", replacing=True)
    new = adapters.lease("lora")
    assert says(host, old) == want(root, "lora") != says(host, new) == want(root, "lora", "spare")
    assert len(host.edits) == 2
    old.release()
    old.release()
    adapters.sweep()
    assert list(host.edits) == list(new.worn)
    adapters.unload("lora")
    assert status(lambda: adapters.lease("lora")) == 404
    assert says(host, new) == want(root, "lora", "spare")
    new.release()
    adapters.sweep()
    assert not host.edits


def test_the_least_recently_used_leave_and_come_back(host, root, folder):
    adapters = Adapters(host, [folder], most=2)
    for name in ("lora", "series"):
        adapters.bring(name).release()
    adapters.lease("lora").release()
    held = adapters.bring("prefix")
    adapters.sweep()
    assert {n.partition("--")[0] for n in host.edits} == {"lora", "prefix"}
    both = adapters.bring("series+prompt")
    assert says(host, held) == want(root, "prefix")
    assert (
        says(host, both)
        == generate(tiny_server.host(root), tiny.tokenizer(), ["Tom has"], "prompt+series", SHORT)[0].text
    )
    for lease in (held, both):
        lease.release()
    again = adapters.bring("lora")
    assert says(host, again) == want(root, "lora")
    assert adapters.loaded <= 3


def test_compositions_do_not_depend_on_who_was_loaded_first(root, folder):
    texts = set()
    for first in ("lora", "prefix", "series"):
        host = inlay.attach(tiny.base("llama"))
        adapters = Adapters(host, [folder])
        adapters.bring(first)
        texts |= {says(host, adapters.bring("series+lora+prefix")), says(host, adapters.bring("prefix+series+lora"))}
    assert len(texts) == 1


@pytest.mark.parametrize("text", ["sum(0.7*lora, 0.4*series)", "stack(series, average(lora, series))"])
def test_compositions_are_made_of_the_versions_of_now(host, root, folder, text):
    from inlay.library import compose

    def alone(folder):
        own = tiny_server.host(root, folder)
        return generate(compose(own, "x", text), tiny.tokenizer(), ["Tom has"], "x", SHORT)[0].text

    adapters = Adapters(host, [folder])
    assert adapters.lease(text) is None
    old = adapters.bring(text)
    assert (
        says(host, old) == alone("adapters") not in map(want, [root] * 2, ["lora", "series"])
        and adapters.lease(text).worn == old.worn
    )
    for name in ("lora", "series"):
        shutil.rmtree(folder / name)
        shutil.copytree(root / "spare" / name, folder / name)
        adapters.load(name, replacing=True)
    new = adapters.bring(text)
    assert says(host, new) == alone("spare") and says(host, old) == alone("adapters")
    assert adapters.names() == sorted(tiny_server.SMALL)


@pytest.mark.parametrize(
    "text, code",
    [("sum(lora", 400), ("mean(lora, series)", 400), ("sum(0.5*nobody, lora)", 404), ("union(lora, series)", 400),
     ("sum(../x)", 400), ("sum(" * 120, 400)],
)  # fmt: skip
def test_compositions_that_cannot_be_made(host, root, folder, text, code):
    adapters = Adapters(host, [folder])
    assert status(lambda: adapters.bring(text)) == code
    assert says(host, adapters.bring("lora")) == want(root, "lora")
    assert not any("composition" in n for n in host.edits)


@pytest.mark.parametrize("name", ["../lora", "a/b", "", ".", "..", "a+b", "a b", "x" * 129, "base", "lora\n", "%2e"])
def test_bad_names(host, folder, name):
    adapters = Adapters(host, [folder])
    assert status(lambda: adapters.load(name)) in (400, 409)
    assert not host.edits


@pytest.mark.parametrize("source", ["../spare/lora", "/etc", "nowhere", "lora/../../spare", "link"])
def test_sources_outside_are_refused(host, root, folder, source):
    shutil.copytree(root / "spare", folder.parent / "spare")
    (folder / "link").symlink_to(folder.parent / "spare" / "lora")
    adapters = Adapters(host, [folder])
    assert status(lambda: adapters.load("new", source)) == 400
    assert not host.edits


def test_sources_inside_are_served_whatever_their_format(host, root, folder):
    from inlay.interop import formats

    own = tiny_server.host(root)
    formats.write(own, "lora", folder / "hf-lora")
    adapters = Adapters(host, [folder])
    adapters.load("new", "hf-lora")
    assert says(host, adapters.lease("new")) == want(root, "lora")
    assert status(lambda: adapters.load("new", "lora")) == 409


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
    adapters = Adapters(host, [folder])
    damage(folder, how)
    assert status(lambda: adapters.bring("lora")) == 503
    assert status(lambda: adapters.lease("lora")) == 503
    assert status(lambda: adapters.load("lora", replacing=True)) == 422
    assert not host.edits and adapters.describe()[0]["state"] == "broken"
    assert says(host, adapters.bring("series")) == want(root, "series")
    shutil.rmtree(folder / "lora")
    shutil.copytree(root / "adapters" / "lora", folder / "lora")
    adapters.load("lora", replacing=True)
    assert says(host, adapters.lease("lora")) == want(root, "lora")


def test_a_damaged_replacement_leaves_the_old_one(host, folder, root):
    adapters = Adapters(host, [folder])
    adapters.bring("lora").release()
    damage(folder, "cut")
    assert status(lambda: adapters.load("lora", replacing=True)) == 422
    assert says(host, adapters.lease("lora")) == want(root, "lora") and len(host.edits) == 1


def test_adapters_of_another_base_are_refused(folder):
    other = inlay.attach(tiny.base("llama", seed=5))
    adapters = Adapters(other, [folder])
    with pytest.raises(Refused, match="trained on another base"):
        adapters.load("lora", replacing=True)
    assert not other.edits


def test_adapters_that_say_nothing_finite_are_refused(host, root, folder):
    own = tiny_server.host(root)
    next(iter(own.tensors("lora").values())).data.fill_(float("nan"))
    inlay.save(own, "lora", folder / "lora")
    with pytest.raises(Refused, match="not finite"):
        Adapters(host, [folder]).load("lora", replacing=True)
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
    adapters = Adapters(host, [folder, "hub:org/lora-x"])
    assert says(host, adapters.bring("lora-x")) == want(root, "lora", "spare")
    adapters.load("other", "hub:org/lora-x")
    assert status(lambda: adapters.load("third", "hub:org/nothing")) == 422


def test_a_folder_put_beside_the_others_is_served_until_it_is_unloaded(host, root, folder):
    adapters = Adapters(host, [folder])
    assert status(lambda: adapters.lease("late")) == 404
    shutil.copytree(root / "spare" / "lora", folder / "late")
    assert says(host, adapters.bring("late")) == want(root, "lora", "spare") and "late" in adapters.names()
    adapters.unload("late")
    assert status(lambda: adapters.lease("late")) == 404
    adapters.load("late")
    assert says(host, adapters.lease("late")) == want(root, "lora", "spare")


def test_start(host, root, tmp_path):
    one = Adapters(host, [root / "adapters" / "lora"])
    assert one.names() == ["lora"]
    with pytest.raises(InlayError, match="no folder"):
        Adapters(host, [tmp_path / "missing"])
    with pytest.raises(InlayError, match="two adapters are called 'lora'"):
        Adapters(host, [root / "adapters", root / "spare"])
    run = tmp_path / "runs" / "math"
    shutil.copytree(root / "adapters" / "lora", run / "adapter")
    assert Adapters(host, [tmp_path / "runs"]).names() == ["math"]


def test_a_mix_is_the_sum_and_leaves_when_nobody_holds_it(host, root, folder):
    adapters = Adapters(host, [folder])
    lease = adapters.mix({"lora": 0.7, "series": -0.3})
    own = tiny_server.host(root)
    compose(own, "own", "sum(0.7*lora, -0.3*series)")
    alone = generate(own, tiny.tokenizer(), ["Tom has"], "own", SHORT)[0].text
    assert says(host, lease) == alone != want(root, "lora")
    assert len(host.edits) == 3 and adapters.names() == sorted(tiny_server.SMALL)
    again = lease.again()
    lease.release()
    adapters.sweep()
    assert says(host, again) == alone
    again.release()
    adapters.sweep()
    assert sorted(n.partition("--")[0] for n in host.edits) == ["lora", "series"]


def test_what_has_no_sum_is_refused_and_leaves_nothing(host, folder):
    adapters = Adapters(host, [folder])
    with pytest.raises(Refused, match="virtual tokens"):
        adapters.mix({"lora": 0.5, "prefix": 0.5})
    assert status(lambda: adapters.mix({"nobody": 1.0})) == 404
    assert sorted(n.partition("--")[0] for n in host.edits) == ["lora", "prefix"]
    assert all(v.users == 0 for v in adapters._loaded.values())
