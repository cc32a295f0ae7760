"""What is freed while a training runs is there when it is asked for again."""

import resource

import pytest
import torch

from inlay.engine import memory


def faults() -> int:
    """Pages that the system had to give this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def touch(pages: int) -> int:
    """How many pages the system gives for a tensor of so many, that is freed at once."""
    before = faults()
    torch.ones(pages * resource.getpagesize() // 4)
    return faults() - before


@pytest.mark.skipif(memory._glibc() is None, reason="another C library, or a heap tuned from outside")
def test_freed_memory_stays_within_the_block():
    pages = (48 << 20) // resource.getpagesize()
    with memory.kept():
        with memory.kept():
            touch(pages)
        assert touch(pages) < pages / 100
    touch(pages)
    assert touch(pages) > pages / 2, "more than 32 MiB come from the system again"


def test_a_tuned_heap_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert memory._glibc.__wrapped__() is None


def test_what_is_left_is_told_in_bytes():
    left = memory.available()
    assert left is None or 1 << 20 < left < 1 << 50
