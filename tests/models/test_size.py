"""What appears only at size: head counts that do not divide, deep models, large vocabularies, long contexts, sharded
and 16-bit checkpoints, offsets beyond 2^31. With few numbers, or none that are touched."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass

import pytest
import torch
import transformers as hf

import inlay
from inlay.core.held import Held, Layout
from inlay.engine.cache import Cache
from inlay.models.base import load_base
from inlay.plan import plan
from inlay.train.ways import Packed, Plain
from tests.engine import test_packed
from tests.evaluate import tiny
from tests.laws import test_laws, zoo
from tests.laws.zoo import GQA, base, excite, logits, small


def heads(queries: int, groups: int, **more):
    """A decoder with so many query and key/value heads, eight numbers each."""
    shape = {"hidden_size": 8 * queries, "num_attention_heads": queries, "num_key_value_heads": groups}
    return hf.LlamaConfig(**GQA | shape | more)


SIZES = {
    "9 heads, 3 groups, tied": lambda: heads(9, 3, tie_word_embeddings=True),
    "14 heads, 2 groups": lambda: hf.Qwen2Config(**heads(14, 2).to_dict() | {"model_type": "qwen2"}),
    "15 heads, 5 groups": lambda: heads(15, 5),
    "32 layers": lambda: hf.LlamaConfig(**GQA | {"hidden_size": 16, "num_hidden_layers": 32}),
}


SOME = ["lora", "dora", "series", "road1", "prefix", "prompt"]


@pytest.fixture(params=SIZES)
def size(request, monkeypatch):
    """A family of that size, known to the laws while the test runs; one of them with every method."""
    monkeypatch.setitem(zoo.CONFIGS, request.param, SIZES[request.param])
    if request.param != "9 heads, 3 groups, tied":
        for module in (zoo, test_laws):
            monkeypatch.setattr(module, "methods", lambda family: SOME)
    return request.param


def test_the_laws_hold(size):
    """A fresh adapter changes nothing; a mixed batch is its rows alone."""
    test_laws.test_a_fresh_adapter_changes_nothing_and_detaching_leaves_no_trace(size)
    test_laws.test_each_row_of_a_mixed_batch_equals_its_adapter_alone(size, "auto")


@pytest.mark.parametrize("name", ["lora", "series", "prefix"])
def test_packed_losses_and_gradients_are_the_plain_ones(size, name):
    """In float64; the norms and the loss compute in float32 all the same, and 32 layers make much of a rounding."""
    host = zoo.dressed(size, torch.float64)
    want, plain = test_packed.gradients(host, name, Plain(host, 0, 2), test_packed.ROWS)
    got, packed = test_packed.gradients(host, name, Packed(host, 0, 14), test_packed.ROWS)
    assert got == pytest.approx(want, rel=1e-6) and plain.keys() == packed.keys()
    near = 1e-3 if size == "32 layers" else 1e-5
    for key, g in plain.items():
        torch.testing.assert_close(packed[key], g, rtol=1e-4, atol=near * float(g.abs().max()) + 1e-12, msg=key)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_cached_step_is_the_uncached_one(size, name):
    host = zoo.dressed(size)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), host.using(name):
        whole = host.model(ids).logits
        grown = host.model.generate(ids[:, :6], max_new_tokens=3, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
        follow = host.model(grown.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(grown.logits, 1), follow, rtol=1e-4, atol=1e-4)
    assert whole.isfinite().all()


# ---- vocabularies and contexts ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]


@pytest.mark.parametrize("at", ["q,down", "embed", "head"])
def test_ids_beyond_65535_stay_what_they_are(at):
    """Packed, with shared beginnings, cached activations aside: the loss is that of plain rows."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA | {"vocab_size": 70_001})).eval()
    host = inlay.attach(model).add("a", small("lora"), at=at, seed=0)
    excite(host)
    ids = [[69_999, 65_536, 70_000, n, 131_072 % 70_001, 65_537] for n in (3, 66_000, 464)]  # 66,000 is 464 in 16 bits
    examples = [Row(i, [-100, *i[1:]]) for i in ids]
    want, plain = test_packed.gradients(host, "a", Plain(host, 0, 3), examples)
    got, packed = test_packed.gradients(host, "a", Packed(host, 0, 64), examples)
    assert got == pytest.approx(want, rel=1e-5)
    for key, g in plain.items():
        torch.testing.assert_close(packed[key], g, rtol=1e-3, atol=2e-5 * float(g.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_contexts_beyond_2048(name):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA | {"max_position_embeddings": 4096})).eval()
    host = inlay.attach(model).add("a", small(name), at=inlay.method(name).places, seed=0)
    excite(host)
    ids = torch.randint(3, 97, (2100,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Row(ids, [-100] * 2080 + ids[2080:]), Row(ids[:30], ids[:30])]
    want, _ = test_packed.gradients(host, "a", Plain(host, 0, 1), examples)
    got, _ = test_packed.gradients(host, "a", Packed(host, 0, 2200), examples)
    assert got == pytest.approx(want, rel=1e-5)


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_checkpoint_is_the_whole_one(dtype, tmp_path):
    """An adapter made on the whole float32 base fits it, in any type; it is counted, merged, and read as stored."""
    whole = tiny.base("llama")
    host = inlay.attach(whole).add("a", small("lora"), at="q,down", seed=0)
    excite(host)
    inlay.save(host, "a", tmp_path / "a")
    want, count = logits(host, "a", **zoo.batch()), host.count("a")
    bare = host.detach()
    bare.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    shards = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    model, _ = load_base(tmp_path / "base")
    assert model.dtype == dtype
    assert plan(str(tmp_path / "base"), "lora", at="q,down", settings={"rank": 4}).trainable == count
    again = inlay.attach(model)
    again.use(inlay.load(again, tmp_path / "a"))
    got = logits(again, "a", **zoo.batch())
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.0 if dtype == torch.float32 else 0.2)
    report = inlay.merge(again, "a", keep=False)
    assert len(report.modules) == 4


# ---- offsets beyond 2^31 ---------------------------------------------------------------------------------------------
BEYOND = 2**31 + 4096


def test_tensors_beyond_two_gigabytes_of_a_file():
    """Zeros that are never touched take no memory."""
    content = mmap.mmap(-1, BEYOND + 32)
    content[BEYOND:] = torch.arange(8, dtype=torch.float32).numpy().tobytes()
    held = Held(content, Layout({"t": (torch.float32, torch.Size((2, 4)), BEYOND)}))  # type: ignore[arg-type]
    assert torch.equal(held["t"], torch.arange(8.0).view(2, 4))


def test_cached_activations_beyond_two_gigabytes(tmp_path, monkeypatch):
    """A file with a hole of 2^31 bytes before the examples."""
    monkeypatch.setattr("inlay.engine.cache._reserve", lambda path, size: path.exists() or _sparse(path, size))
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    excite(host)
    way = Packed(host, 0, 14)
    rows = test_packed.ROWS
    want = test_packed.gradients(host, "a", way, rows)
    before = Row(range(BEYOND // (host.hidden * 4)), [])  # type: ignore[arg-type]
    way.cache = Cache(host, "a", [before, *rows], tmp_path / "activations.bin")
    assert way.cache.at[id(rows[0])][1] * host.hidden * 4 >= 2**31
    for _ in range(2):
        got = test_packed.gradients(host, "a", way, rows)
        assert got[0] == want[0] and all(torch.equal(got[1][k], want[1][k]) for k in want[1])
    assert (tmp_path / "activations.bin").stat().st_blocks * 512 < 2**24


def _sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


def test_parameters_beyond_int32_are_counted():
    """Without their memory: LLaMA-65B's every linear at rank 1,024."""
    per_block = sum(1024 * (i + o) for i, o in [(8192, 8192)] * 4 + [(8192, 22016)] * 2 + [(22016, 8192)])
    counted = plan("llama-65b", "lora", at="linear", settings={"rank": 1024})
    assert counted.trainable == 80 * per_block > 2**31 and counted.total > 2**35
