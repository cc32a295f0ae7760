"""Passing over frozen blocks changes nothing but the work."""

from __future__ import annotations

import resource
import signal

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.engine.cache import Cache, dropped, file, files, lowest
from inlay.train import fit
from inlay.train.ways import Packed
from tests.engine.exactness import gradients
from tests.engine.test_packed import ROWS
from tests.laws.zoo import base, excite, small
from tests.train.tiny import Row, copy, rows, same, settings, wearing


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "gpt_neox", "opt", "falcon", "mixtral"])
def test_the_second_time_is_the_first(family, where, tmp_path):
    host = inlay.attach(base(family)).add("a", small("lora"), at="o@1", seed=0)
    for m in host.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "dropout", None), float):  # OPT's, applied by a function
            m.dropout = 0.0
    host.model.config.attention_dropout = 0.0
    excite(host)
    way = Packed(host, 0, 14)
    want = gradients(host, "a", way, ROWS)
    way.cache = Cache(host, "a", ROWS, "ram" if where == "ram" else file(tmp_path))
    first = gradients(host, "a", way, ROWS)
    ran = []
    blocks = {s.layer: host.model.get_submodule(s.path) for s in host.anatomy.spots if s.role == "block"}
    inner = next(m for m in blocks[0].modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
    handle = inner.register_forward_hook(lambda *_: ran.append(1))
    second = gradients(host, "a", way, ROWS)
    way.split = lambda examples: [list(reversed(examples))]  # other packs than those that filled it
    third = gradients(host, "a", way, ROWS)
    handle.remove()
    assert not ran, "the block below is not computed again"
    assert want[0] == first[0] == second[0] and third[0] == pytest.approx(want[0], rel=1e-6)
    for key in want[1]:
        assert torch.equal(want[1][key], second[1][key])
    assert "forward" not in vars(blocks[0])


def test_a_run_and_its_continuation(tmp_path):
    """Disk keeps the bits of a resumed run; what is trained is what is trained without a cache."""
    data = rows(12)
    made = {}
    for name, changes in {
        "off": {},
        "ram": {"cache_activations": "ram"},
        "disk": {"cache_activations": "disk"},
    }.items():
        host = wearing(at="q,v@1")
        made[name] = (
            fit(host, "a", data, [], settings(tmp_path / name, steps=9, **changes), tmp_path / name, None),
            copy(host),
        )
    for name in ("ram", "disk"):
        assert made[name][0].loss == pytest.approx(made["off"][0].loss, rel=1e-5)
        assert "lower blocks of 2 run once" in (tmp_path / name / "log.txt").read_text()
    host = wearing(at="q,v@1")
    changed = settings(tmp_path / "disk", steps=9, cache_activations="disk")
    fit(host, "a", data, [], changed, tmp_path / "disk", None, resume=tmp_path / "disk" / "checkpoint-6")
    assert same(copy(host), made["disk"][1])


def test_refused(tmp_path):
    host = inlay.attach(base("llama")).add("a", small("lora"), seed=0).add("p", small("prompt"), seed=0)
    assert lowest(host, "a") == 0 == lowest(host, "p")
    with pytest.raises(InlayError, match="hang it higher"):
        Cache(host, "a", ROWS, "ram")
    host = inlay.attach(base("gpt2")).add("a", small("lora"), at="o@1", seed=0)
    with pytest.raises(InlayError, match="drops activations"):
        Cache(host, "a", ROWS, "ram")


@pytest.mark.parametrize("family, owner, name", [("opt", "decoder", "layerdrop"), ("mixtral", "mlp", "jitter_noise")])
def test_blocks_left_out_and_noisy_routers_are_refused(family, owner, name):
    host = inlay.attach(base(family)).add("a", small("lora"), at="o@1", seed=0)
    for m in host.model.modules():
        for key, value in vars(m).items():
            if "dropout" in key and isinstance(value, float):
                setattr(m, key, 0.0)
    host.model.config.attention_dropout = 0.0
    assert not dropped(host.model)
    (found, *_) = (m for n, m in host.model.named_modules() if n.endswith(owner) and hasattr(m, name))
    setattr(found, name, 0.25)
    with pytest.raises(InlayError, match=rf"drops activations or adds noise while it trains \({name} 0.25\)"):
        Cache(host, "a", ROWS, "ram")


def test_the_disk_is_taken_when_the_cache_is_opened(tmp_path):
    """Not page by page: a full disk would then be a SIGBUS in the middle of a run."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    many = [Row([5] * 2000, [5] * 2000)]
    made = Cache(host, "a", many, file(tmp_path))
    assert all(512 * p.stat().st_blocks >= p.stat().st_size for p in tmp_path.iterdir())
    assert file(tmp_path).stat().st_size == made.bytes == 2000 * host.hidden * 4
    made.data[:] = 1.0
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (made.bytes // 2, was[1]))
    try:
        with pytest.raises(
            InlayError, match="cached activations need .* bytes at .*activations.bin: .*leave the cache"
        ):
            Cache(host, "a", many, file(tmp_path / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert not list((tmp_path / "new").iterdir())
    assert Cache(host, "a", many, file(tmp_path)).data.eq(1).all()


def test_no_room_is_said_before_training(monkeypatch, tmp_path):
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 10})())
    with pytest.raises(InlayError, match="need .* bytes, 10 are free at"):
        Cache(host, "a", ROWS, file(tmp_path))
    file(tmp_path).write_bytes(bytes(1 << 20))  # what is there already needs no room
    Cache(host, "a", ROWS, file(tmp_path))
    with pytest.raises(InlayError, match=r"need .* bytes \(and 2,000,000 in other processes of this machine\)"):
        Cache(host, "a", ROWS, file(tmp_path), beside=2_000_000)


def test_a_file_is_read_by_whom_it_belongs_to_and_by_nobody_else(tmp_path):
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    way = Packed(host, 0, 14)

    def cached(about="mine", rank=0, size=1):
        way.cache = Cache(host, "a", ROWS, file(tmp_path, rank, size), about)
        return way.cache

    assert not cached().has(ROWS[:1])
    gradients(host, "a", way, ROWS)
    assert cached().has(ROWS), "another process of the same run"
    assert not cached("of another base").has(ROWS[:1]) and not cached().has(ROWS[:1])
    gradients(host, "a", way, ROWS)
    assert not cached(rank=0, size=2).has(ROWS[:1])
    assert {p.name.partition(".bin")[0] for p in files(tmp_path)} == {"activations-0-of-2"}
    gradients(host, "a", way, ROWS)
    for p in files(tmp_path):  # as if put there by hand: it says whose it is
        p.rename(p.with_name(p.name.replace("0-of", "1-of")))
    assert not cached(rank=1, size=2).has(ROWS[:1])


def test_what_never_reached_the_disk_is_computed_again(tmp_path):
    """A machine that goes down may have written an example's checksum and not its numbers."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    excite(host)
    way = Packed(host, 0, 14)
    want = gradients(host, "a", way, ROWS)
    for lost in range(2):
        way.cache = Cache(host, "a", ROWS, file(tmp_path))
        if lost:
            way.cache.data[way.cache.at[id(ROWS[1])][1]] = 0.0
        assert [way.cache.has([r]) for r in ROWS] == [bool(lost) and r is not ROWS[1] for r in ROWS]
        got = gradients(host, "a", way, ROWS)
        assert got[0] == want[0] and all(torch.equal(g, got[1][k]) for k, g in want[1].items())


def test_a_block_that_says_a_tuple_says_one_after_a_resumption(tmp_path):
    host = inlay.attach(base("falcon")).add("a", small("lora"), at="o@1", seed=0)
    host.model.config.hidden_dropout = host.model.config.attention_dropout = 0.0
    excite(host)
    way = Packed(host, 0, 14)
    found = []
    for _ in range(2):
        way.cache = Cache(host, "a", ROWS, file(tmp_path))
        found.append(gradients(host, "a", way, ROWS)[0])
    assert way.cache.has(ROWS) and found[0] == found[1]


def test_an_example_that_occurs_twice_is_kept_as_one(tmp_path):
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    way = Packed(host, 0, 14)
    want = gradients(host, "a", way, ROWS)
    way.cache = Cache(host, "a", [*ROWS, *ROWS], file(tmp_path))
    assert [gradients(host, "a", way, ROWS)[0] for _ in range(2)] == [want[0]] * 2 and way.cache.has(ROWS)
