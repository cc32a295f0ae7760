"""The base's fingerprint: exact positions in tensors of any size, and the fingerprints that Inlay 0.1 wrote."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core.fingerprint import _positions, _sample, differences, fingerprint
from tests.laws.zoo import GQA

CPU = torch.device("cpu")


def exact(numbers):
    return _positions(numbers, 0, CPU).tolist()


def rounded(numbers):
    """Positions as Inlay 0.1 computed them; in float32, so they depend on the processor from some 2^20 numbers on."""
    return torch.linspace(0, numbers - 1, 12).long().tolist()


def test_positions_of_small_tensors_are_those_of_inlay_0_1():
    sizes = [*range(1, 3000), *(random.Random(0).randrange(3000, 2**20) for _ in range(1000))]
    assert [exact(n) for n in sizes] == [rounded(n) for n in sizes]


def test_positions_of_inlay_0_1_were_at_most_one_further():
    rng = random.Random(1)
    sizes = [rng.randrange(2**20, 2**24) for _ in range(1000)] + [64 * rng.randrange(2**14, 2**18) for _ in range(500)]
    assert all(b - a in (0, 1) for n in sizes for a, b in zip(exact(n), rounded(n), strict=True))


@pytest.mark.parametrize("rows, columns", [(2**24 + 1, 1), (49_152, 576), (600_000, 8192), (2**31, 4)])
def test_samples_of_large_tensors_are_the_numbers_at_evenly_spaced_positions(rows, columns):
    """Without the memory: one row of numbers, seen `rows` times."""
    weight = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    assert _sample(weight) == [float(i * (rows * columns - 1) // 11 % columns) for i in range(12)]


def test_a_record_of_inlay_0_1_still_fits_and_another_base_does_not():
    """An embedding of 2^20 to 2^24 numbers, where the processor chose between two neighbours."""
    host = inlay.attach(LlamaForCausalLM(LlamaConfig(**GQA | {"vocab_size": 103_943})))
    flat = host.model.get_input_embeddings().weight.data.flatten()
    positions = exact(len(flat))
    ours = fingerprint(host)
    assert list(ours["next"]) == ["embed"]  # the other tensors are smaller
    for further in (0, 1):
        sampled = [float(flat[p + further * (0 < i < 11)]) for i, p in enumerate(positions)]
        theirs = {"shape": ours["shape"], "values": {**ours["values"], "embed": sampled}}
        assert differences(theirs, ours) == []
    flat[positions[5] : positions[5] + 2] += 1
    assert differences(theirs, fingerprint(host)) == ["the weights at 'embed' differ"]
