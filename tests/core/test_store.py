"""Files: strict, atomic, never a pickle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.core import files, store
from tests.laws.zoo import base, batch, excite, logits, small


def wearing(method: str = "lora", seed: int = 0, family: str = "llama", **settings):
    host = inlay.attach(base(family))
    host.add("x", small(method, **settings), seed=seed)
    excite(host, seed=seed)
    return host


def edit_json(folder, **changes):
    """Change the JSON as someone who also mends its digest."""
    record = json.loads((folder / "adapter.json").read_text()) | changes
    record["digest"] = store._digest(record)
    (folder / "adapter.json").write_text(json.dumps(record))


def test_the_json_is_readable_and_names_everything(tmp_path):
    inlay.save(wearing(), "x", tmp_path, about={"template": "clean"})
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert record["method"] == "lora" and record["settings"]["rank"] == 4 and record["about"] == {"template": "clean"}
    assert record["places"][:2] == ["0.q", "0.k"] and record["base"]["family"] == "llama"
    assert record["tensors"]["parameters"] == wearing().count("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["adapter.json", record["tensors"]["file"]])


def test_saving_again_replaces_and_leaves_one_adapter(tmp_path):
    inlay.save(wearing(seed=0), "x", tmp_path)
    second = wearing(seed=1)
    inlay.save(second, "x", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = inlay.attach(base("llama"))
    assert inlay.load(again, tmp_path, name="y") == "y"
    assert torch.equal(logits(again, "y", **batch()), logits(second, "x", **batch()))


def unchanged_after(host, folder, message, **kwargs):
    before = {n for n, _ in host.model.named_modules()}, dict(host.edits)
    with pytest.raises(inlay.InlayError, match=message):
        inlay.load(host, folder, **kwargs)
    assert ({n for n, _ in host.model.named_modules()}, dict(host.edits)) == before


@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, at):
    inlay.save(wearing(), "x", tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.write_bytes(data)
    unchanged_after(inlay.attach(base("llama")), tmp_path, "damaged: its SHA-256")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_found(tmp_path, keep):
    inlay.save(wearing(), "x", tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    unchanged_after(inlay.attach(base("llama")), tmp_path, "damaged")
    inlay.save(wearing(), "x", tmp_path)
    file = tmp_path / "adapter.json"
    file.write_bytes(file.read_bytes()[:keep])
    if keep >= 0:
        unchanged_after(inlay.attach(base("llama")), tmp_path, "damaged")


def test_a_setting_changed_by_accident_is_found(tmp_path):
    inlay.save(wearing(), "x", tmp_path)
    file = tmp_path / "adapter.json"
    file.write_text(file.read_text().replace('"alpha": 64.0', '"alpha": 16.0'))
    unchanged_after(inlay.attach(base("llama")), tmp_path, "digest does not match")


def test_missing_extra_misshaped_and_foreign_tensors_are_errors(tmp_path):
    inlay.save(wearing(), "x", tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    good = load_file(file)
    first = "0.q/A"
    for bad, message in (
        ({k: v for k, v in good.items() if k != first}, f"missing {first}"),
        (good | {"9.q/A": torch.zeros(1)}, "unexpected 9.q/A"),
        (good | {first: torch.zeros(3, 3)}, r"0.q/A is \(3, 3\), wanted \(4, 32\)"),
        ({"lora_A": torch.zeros(1)}, "and .* more"),
    ):
        save_file(bad, file)
        record = json.loads((tmp_path / "adapter.json").read_text())
        edit_json(tmp_path, tensors=record["tensors"] | {"sha256": files.sha256(file)})
        unchanged_after(inlay.attach(base("llama")), tmp_path, message)


def test_unknown_methods_settings_and_versions_are_errors(tmp_path):
    inlay.save(wearing(), "x", tmp_path)
    host = inlay.attach(base("llama"))
    record = json.loads((tmp_path / "adapter.json").read_text())
    for change, message in (
        ({"method": "magic"}, "unknown method 'magic'.*lora"),
        ({"settings": record["settings"] | {"colour": "red"}}, r"no settings \['colour'\]"),
        ({"version": 9}, "update it"),
        ({"format": "other"}, "is of format 'other'"),
        ({"tensors": record["tensors"] | {"file": "../elsewhere.safetensors"}}, "not beside it"),
    ):
        edit_json(tmp_path, **{**record, **change})
        unchanged_after(host, tmp_path, message)
    unchanged_after(host, tmp_path / "nowhere", "holds no adapter.json")


def test_an_adapter_of_another_base_is_an_error(tmp_path):
    inlay.save(wearing(), "x", tmp_path)
    unchanged_after(
        inlay.attach(base("mistral")), tmp_path, "another base.*model_type is 'mistral' here and 'llama' there"
    )
    other = inlay.attach(base("llama", seed=7))
    unchanged_after(other, tmp_path, "the weights at 'embed' differ.*allow_other_base")
    inlay.load(other, tmp_path, allow_other_base=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        inlay.load(inlay.attach(base("llama").to(dtype)), tmp_path)  # the same base in another type


def test_a_folder_with_a_pickle_is_not_an_adapter_and_nothing_runs(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    inlay.save(wearing(), "x", tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(pickle.dumps(Bomb()))
    record = json.loads((tmp_path / "adapter.json").read_text())
    edit_json(tmp_path, tensors=record["tensors"] | {"sha256": files.sha256(file)})
    unchanged_after(inlay.attach(base("llama")), tmp_path, "cannot be read")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    first = wearing(seed=0)
    inlay.save(first, "x", tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for target in ("inlay.core.store.save_file", "inlay.core.files.os.fsync", "inlay.core.files.os.replace"):
        with monkeypatch.context() as m:
            m.setattr(target, full)
            with pytest.raises(OSError, match="No space left"):
                inlay.save(wearing(seed=1), "x", tmp_path)
        again = inlay.attach(base("llama"))
        inlay.load(again, tmp_path)
        assert torch.equal(logits(again, "x", **batch()), logits(first, "x", **batch()))
        assert not list(tmp_path.glob(".*partial"))


SAVER = """
import sys, torch, inlay
from tests.laws.zoo import base, small
host = inlay.attach(base("llama"))
host.add("x", small("lora", rank=16), seed=0)
n = 0
while True:
    for p in host.parameters():
        p.data.fill_(float(n))
    inlay.save(host, "x", sys.argv[1])
    print(n, flush=True)
    n += 1
"""


def test_a_kill_during_a_save_leaves_the_old_or_the_new_adapter(tmp_path):
    for after in (0.003, 0.011, 0.019):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            last = int(saver.stdout.readline())
        time.sleep(after)
        saver.send_signal(signal.SIGKILL)
        rest = saver.stdout.read().split()
        saver.wait()
        last = int(rest[-1]) if rest else last
        host = inlay.attach(base("llama"))
        inlay.load(host, tmp_path, name="x")
        values = {float(v) for p in host.parameters() for v in p.detach().flatten()}
        assert values in ({float(last)}, {float(last + 1)})


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with files.new_folder(tmp_path / "a") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "a" / "whole").read_text() == "x"


def test_an_adapter_of_the_blocks_is_at_home_on_a_base_whose_vocabulary_has_grown(tmp_path):
    """Tokens were added, or the table was padded to a multiple of 64: the old logits are the same."""
    inputs = batch()
    for name, at in (("blocks", "q,down"), ("table", "embed"), ("prompt", None)):
        host = inlay.attach(base("llama"))
        host.add(name, small("prompt" if at is None else "lora"), at=at, seed=0)
        excite(host)
        inlay.save(host, name, tmp_path / name)
        want = logits(host, name, **inputs)
        grown = base("llama")
        grown.resize_token_embeddings(128, mean_resizing=False)
        there = inlay.attach(grown)
        if name == "table":  # one row a token: it says nothing of the new ones
            with pytest.raises(inlay.InlayError, match=r"embed/A is \(4, 97\), wanted \(4, 128\)"):
                inlay.load(there, tmp_path / name)
            continue
        inlay.load(there, tmp_path / name)
        torch.testing.assert_close(logits(there, name, **inputs)[..., :97], want, rtol=0, atol=1e-6)
    smaller = base("llama")
    smaller.resize_token_embeddings(64, mean_resizing=False)
    with pytest.raises(inlay.InlayError, match="vocab_size is 64 here and 97 there"):
        inlay.load(inlay.attach(smaller), tmp_path / "blocks")


# ---- two at once, and interrupted ------------------------------------------------------------------------------------
def test_two_processes_that_save_into_one_folder_leave_a_whole_adapter(tmp_path):
    hosts, rounds = [wearing(seed=k) for k in (1, 2)], 15
    digests = {store.content_digest(h.tensors("x")) for h in hosts}
    for r in range(rounds):
        folder, begin, children = tmp_path / str(r), time.time() + 0.02, []
        for host in hosts:
            if not (child := os.fork()):
                while time.time() < begin:
                    pass
                try:
                    inlay.save(host, "x", folder)
                finally:
                    os._exit(0)
            children.append(child)
        assert [os.waitpid(c, 0)[1] for c in children] == [0, 0]
        assert store.content_digest(store.read(folder)[1]) in digests
        assert len(list(folder.iterdir())) == 2  # nothing is left of the one that came first


def test_a_reader_that_meets_saves_reads_one_or_the_other(tmp_path):
    hosts = [wearing(seed=k) for k in (1, 2)]
    digests = {store.content_digest(h.tensors("x")) for h in hosts}
    inlay.save(hosts[0], "x", tmp_path)
    if not (child := os.fork()):
        for n in range(60):
            inlay.save(hosts[n % 2], "x", tmp_path)
        os._exit(0)
    reads = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert store.content_digest(store.read(tmp_path)[1]) in digests
        reads += 1
    assert reads > 5


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_s_is_not(tmp_path):
    (tmp_path / ".a.0123abcd.partial" / "a").mkdir(parents=True)
    (tmp_path / ".a.77.partial").write_text("half a file")
    with files.new_folder(tmp_path / "a") as mine:
        (mine / "x").write_text("x")
        files.write_text(tmp_path / "a.json", "{}")
        with pytest.raises(files.DiskError, match="cannot write"), files.new_folder(tmp_path / "a") as other:
            (other / "y").write_text("y")
            assert mine.is_dir()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "z").touch()
        (tmp_path / "a" / "z").unlink()
    assert (tmp_path / "a" / "x").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.json"]


def test_files_have_the_mode_that_umask_asks_for(tmp_path):
    """Not 0600, as safetensors makes them: another user or a container may read what was saved."""
    before = os.umask(0o022)
    try:
        inlay.save(wearing(), "x", tmp_path)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("write", ["safetensors", "torch", "text"])
def test_a_disk_that_takes_no_more_is_one_error_with_its_cure(write, tmp_path):
    """No file of this process may grow: what a full disk is to whoever writes."""
    import resource

    def work(path):
        big = torch.zeros(100_000)
        if write == "safetensors":
            return save_file({"a": big}, path)
        return torch.save(big, path) if write == "torch" else path.write_text("x" * 400_000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    files.write_text(tmp_path / "a", "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(files.DiskError, match=r"cannot write .*/a: .* free\); free some space or choose another"):
            files.replace_file(tmp_path / "a", work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


# ---- values that are not finite --------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("door", ["save", "load", "shelve", "fill"])
def test_values_that_are_not_finite_are_refused_at_every_door(door, value, tmp_path):
    from inlay.methods import EDITS

    host = wearing()
    inlay.save(host, "x", tmp_path)
    tensors = {k: t.detach().clone() for k, t in host.tensors("x").items()}
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[-1] = value
    with pytest.raises(inlay.InlayError, match=rf"{key} holds values that are not finite"):
        if door == "fill":
            host.fill("x", tensors)
        host.parameters("x")[-1].data.view(-1)[-1] = value
        host.tensors("x")[key].data.view(-1)[-1] = value
        if door == "save":
            inlay.save(host, "x", tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        save_file(tensors, file)
        record = json.loads((tmp_path / "adapter.json").read_text())
        edit_json(tmp_path, tensors=record["tensors"] | {"sha256": files.sha256(file)})
        if door == "load":
            inlay.load(host, tmp_path, name="y")
        store.shelve(host, tmp_path, EDITS, "z")
    assert set(host.edits) == {"x"}


def test_merging_refuses_weights_that_are_not_finite():
    host = inlay.attach(base("llama", torch.float16))
    host.add("x", small("ia3"), seed=0)
    for t in host.parameters("x"):
        t.data.fill_(1e6)
    with pytest.raises(inlay.InlayError, match="not finite in float16.*merge in bf16 or fp32"):
        inlay.merge(host, "x")
    next(iter(host.parameters("x"))).data.fill_(float("nan"))
    with pytest.raises(inlay.InlayError, match="'x' is damaged: .* holds values that are not finite"):
        inlay.merge(host, "x")
