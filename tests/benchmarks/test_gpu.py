"""What is told of training on a GPU, computed from numbers that are known; and the whole of it on a CPU, tiny."""

import pytest

from benchmarks import bound
from benchmarks.bases import llama
from benchmarks.gpu import GEMM, Held, measure, results
from benchmarks.harness import Took
from benchmarks.lengths import rows

NAME = "gpu train lora alpaca tiny bf16"


def test_utilisation_is_tokens_a_second_times_flop_a_token_over_the_rate_of_the_same_round():
    config, examples = llama("tiny").config, rows("alpaca", 16, 200)
    tokens = sum(len(e.input_ids) for e in examples)
    took = {"ours": [Took(2.0, 1.0), Took(4.0, 1.0)], "P": [Took(6.0, 1.0), Took(8.0, 1.0)]}
    peaks, rates = {"ours": [10.0, 10.0], "P": [40.0, 40.0]}, [1e9, 4e9]
    time, speed, memory, used = results("w", config, examples, took, peaks, rates, {"P": "same"})
    assert (time.ratio, time.low, time.high, time.note) == (2.5, 2.0, 3.0, "same")
    assert speed.unit == "tokens/s" and speed.ours == pytest.approx((tokens / 2 + tokens / 4) / 2)
    assert (speed.low, speed.high) == (2.0, 3.0)
    assert (memory.workload, memory.ratio) == ("w, peak memory", 0.25)
    flop = bound.work(config, [[e] for e in examples])
    assert used.peer_is == GEMM and used.workload == "w, model-FLOPs utilisation"
    assert used.low == pytest.approx(flop / 4.0 / 4e9, abs=1e-3)
    assert used.high == pytest.approx(flop / 2.0 / 1e9, abs=1e-3)
    assert used.note == f"P {(flop / 6e9 + flop / 8 / 4e9) / 2:.3f}"


class Memory:
    """A device's allocator: `torch.cuda`'s three functions."""

    now = top = 0

    def take(self, size):
        self.now += size
        self.top = max(self.top, self.now)

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.top

    def reset_peak_memory_stats(self):
        self.top = self.now


def test_a_sides_memory_is_its_weights_and_what_its_steps_add_whoever_else_is_there():
    memory = Memory()

    class Hungry:
        def __init__(self, size):
            memory.take(size << 20)

        def steps(self, number):
            memory.take(5 << 20), memory.take(-5 << 20)
            return [], []

    first, second = (Held(lambda size=size: Hungry(size), memory) for size in (100, 30))
    first.steps(1), second.steps(1)
    assert (first.peaks, second.peaks) == ([105.0], [35.0])


def test_a_tiny_model_goes_the_whole_way_on_a_cpu(tmp_path):
    found = list(measure("tiny", rows("alpaca", 16, 200), 8, 2, "cpu", tmp_path))
    assert [r.workload for r in found] == [NAME, f"{NAME}, throughput", f"{NAME}, model-FLOPs utilisation"]
    assert all(r.rounds == 2 and 0 < r.low <= r.ratio <= r.high for r in found)
    assert "losses of 2 steps agree" in found[0].note and found[-1].unit == "TFLOP/s"
