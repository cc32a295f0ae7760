"""What is freed while packs are computed is not given back to the system before they are done."""

from inlay.engine import memory


class Glibc:
    """Notes how its heap is set."""

    def __init__(self):
        self.now = {}

    def mallopt(self, what, value):
        self.now[what] = value


def test_nothing_is_given_back_until_the_outermost_block_ends(monkeypatch):
    library = Glibc()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    kept = {memory.TRIM: 2**31 - 1, memory.MAP: 2**31 - 1}
    with memory.kept():
        with memory.kept():
            assert library.now == kept
        assert library.now == kept
    assert library.now == memory.USUAL


def test_a_tuned_heap_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert memory._glibc.__wrapped__() is None


def test_what_is_left_is_told_in_bytes():
    left = memory.available()
    assert left is None or 1 << 20 < left < 1 << 50
