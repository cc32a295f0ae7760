"""The peers' settings: each computes what ours does, and leaves the model to the next as it found it."""

import pytest
import torch

from benchmarks import peers, strongest
from benchmarks.asked import PEFT
from benchmarks.bases import REAL, llama
from benchmarks.harness import Took
from benchmarks.lengths import rows
from benchmarks.peers import Peers, Setting, by_sequence, settings
from benchmarks.strongest import SHIPPED, STRONGEST, Trial, rows_of
from benchmarks.texts import examples, read, write

ROWS = rows("math", 8, 200)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial("tiny", ROWS, "lora", "fp32", 4, tmp_path_factory.mktemp("trial"))


def test_every_setting_computes_our_losses(trial):
    """Trainer and, where it is installed, TRL; padded and in one row; by the mask and by sequence."""
    assert set(trial.agreed) == set(settings("fp32")) and len(trial.agreed) in (3, 6)
    shipped, fastest = trial.fastest()
    assert shipped.shipped and trial.first[fastest].wall <= trial.first[shipped].wall


def test_a_setting_leaves_nothing_to_the_next():
    """Losses of a setting are the same before and after all others, autocast and TRL's loss among them."""
    shared = Peers(llama("tiny"), "lora", ROWS, 4)

    def losses(setting):
        shared.fresh()
        return shared.of(setting).steps(1)[0]

    others = [s for s in settings("bf16") if s.autocast]
    plain, first = losses(peers.PLAIN), {s: losses(s) for s in others}
    assert losses(peers.PLAIN) == plain
    assert all(own != plain for own in first.values())  # computed in bf16 indeed
    assert losses(others[0]) == first[others[0]]


def test_attention_by_sequence_is_causal_attention_within_each():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 4) for heads in (4, 2, 2))  # grouped queries
    got = by_sequence(None, q, k, v, None, scaling=0.5, cu_seq_lens_q=torch.tensor([0, 3, 7]))[0]
    at = torch.arange(7)
    seen = (at[:, None] >= at) & ((at[:, None] < 3) == (at < 3))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    want = (0.5 * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_attention_by_sequence_refuses_a_padded_batch():
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        by_sequence(None, *torch.zeros(3, 2, 1, 5, 4), None)


def test_losses_that_differ_stop_the_trial(monkeypatch, tmp_path):
    monkeypatch.setattr(strongest, "settings", lambda dtype: [peers.PLAIN])
    monkeypatch.setattr(peers, "collate", lambda rows: peers.flat([{**r, "labels": r["input_ids"]} for r in rows]))
    with pytest.raises(RuntimeError, match="losses differ"):
        Trial("tiny", ROWS, "lora", "fp32", 4, tmp_path)


def test_the_table_names_the_fastest_that_is_shipped_and_the_fastest_of_all():
    flat, own = Setting(flat=True), Setting(flat=True, attention="by_sequence")
    took = {peers.PLAIN: [Took(3, 3)], flat: [Took(2, 2), Took(9, 9), Took(2, 2)], own: [Took(1, 1)]}
    assert rows_of(took) == {PEFT: peers.PLAIN, SHIPPED: flat, STRONGEST: own}


def test_examples_pass_through_a_file(tmp_path):
    write(ROWS, tmp_path / "examples.json")
    assert read(tmp_path / "examples.json") == ROWS


def test_a_kind_without_recorded_lengths_needs_data():
    with pytest.raises(ValueError, match="no lengths are recorded for 'mawps'"):
        examples("tiny", "mawps", 8)
    assert examples("tiny", "math", 8)[1] == "recorded lengths, random ids"


def test_real_texts_are_encoded_as_training_encodes_them(tmp_path):
    """Behind the template, the answer and its end learned; random bases keep recorded lengths."""
    from inlay.models import real

    if not real.installed(REAL[0]):
        pytest.skip(f"{REAL[0]} is not installed")
    from inlay.models.base import load_tokenizer

    record = '{"instruction": "What is %d + 1?", "input": "", "output": "It is %d.", "answer": "%d"}'
    (tmp_path / "math_data.json").write_text("[" + ",".join(record % (i, i + 1, i + 1) for i in range(16)) + "]")
    made, what = examples(REAL[0], "math", 16, tmp_path)
    tokenizer = load_tokenizer(REAL[0])
    assert what == "real texts" and len(made) == 16
    answers = {tokenizer.decode([t for t in r.labels if t != -100]) for r in made}
    assert answers == {f"It is {i + 1}.{tokenizer.eos_token}" for i in range(16)}
    assert all(tokenizer.decode(r.input_ids).startswith("Below is an instruction") for r in made)
    assert examples("tiny", "math", 16, tmp_path)[1] == "recorded lengths, random ids"
