"""Packed and padded are one training: the same losses step for step, no neighbour seen, no work that is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.engine import head
from inlay.engine.example import learned
from inlay.engine.pack import pack
from inlay.evaluate.batches import room
from inlay.train.loop import Loop, training
from inlay.train.ways import Packed
from tests.laws.zoo import FAMILIES, base, dressed, excite, methods, places, small
from tests.train.tiny import Row, rows, settings

PACKED = [f for f in FAMILIES if f != "falcon-rw"]
DATA = rows(20, prompt=True)


def never_drop(model) -> None:
    """No dropout of the base's own, which each way draws otherwise."""
    for m in model.modules():
        for name, value in vars(m).items():
            if "drop" in name and isinstance(value, float):
                setattr(m, name, 0.0)
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0


def losses(family: str, name: str, engine: str) -> list[float]:
    """Losses of four steps, each over several forwards, from the method's own start."""
    host = inlay.attach(base(family)).add("a", small(name), at=places(name, family), seed=0)
    never_drop(host.model)
    s = settings(Path("unused"), steps=4, batch_size=5, pack_tokens=24, lr=2e-3, engine=engine)
    loop = Loop(host, "a", DATA, [], s, 0)
    assert ("padded, not packed" in loop.notice) == (engine == "packed" and family == "falcon-rw")
    with training(host, "a", False), loop.active():
        return [loop.advance()["loss"] for _ in range(4)]


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", name) for name in methods("llama")] + [(f, n) for f in FAMILIES[1:] for n in ("lora", "prefix")],
)
def test_packed_steps_are_padded_steps(family, name):
    want, got = (losses(family, name, engine) for engine in ("plain", "packed"))
    assert got == pytest.approx(want, rel=1e-4) and len(set(got)) == 4


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", "series"])
@pytest.mark.parametrize("family", PACKED)
def test_no_sequence_sees_another(family, name):
    """Each says what it says alone, wherever it stands; and its loss has no gradient in its neighbours."""
    host = dressed(family)
    three = [Row([7 + i, 20, 31, 8, 40 + i, 12 + i], [-100, -100, 31, 8, 40 + i, 12 + i]) for i in range(3)]
    embedded: list[torch.Tensor] = []
    table = host.model.get_input_embeddings()

    def keep(module, args, out):
        out = out if out.requires_grad else out.requires_grad_()
        out.retain_grad()
        embedded.append(out)

    def scores(sequences):
        made = pack(host, [r.input_ids for r in sequences], [r.labels for r in sequences])
        return made, head.log_likelihood(host, made).split([learned(r) for r in sequences])

    with host.using(name), Packed(host, 0, 100).active():
        with torch.no_grad():
            alone = [scores([r])[1][0] for r in three]
            for order in ([0, 1, 2], [2, 0, 1]):
                for i, said in zip(order, scores([three[i] for i in order])[1], strict=True):
                    torch.testing.assert_close(said, alone[i], rtol=1e-5, atol=2e-5)
        handle = table.register_forward_hook(keep)
        made, said = scores(three)
        handle.remove()
        said[1].sum().backward()
    felt = embedded[0].grad.reshape(-1, embedded[0].shape[-1]).abs().sum(-1).nonzero()[:, 0].tolist()
    at, own = made.layout.index(1), room(host, (name,))  # its virtual tokens stand before it
    assert felt and set(felt) <= set(range(at - own, at + 6))
    for p in host.parameters():
        p.grad = None


# ---- what a step costs, counted: it must not creep back up --------------------------------------------------------
def test_what_a_step_keeps_for_its_backward():
    """Numbers, weights left out: logits of the vocabulary never, and per token and block a fixed few."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    excite(host)
    way, kept = Packed(host, 0, 1000), {}
    weights = {p.data_ptr() for p in host.model.parameters()} | {t.data_ptr() for t in host.tensors("a").values()}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with host.using("a"), way.active(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        (group,) = way.split(DATA)
        way.loss(group).backward()
    tokens, c = sum(len(e.input_ids) for e in DATA), host.model.config
    assert not [t for t in kept.values() if t.shape[-1] == c.vocab_size]
    numbers = sum(t.untyped_storage().nbytes() // 4 for t in kept.values())
    assert numbers <= 11 * tokens * c.num_hidden_layers * c.hidden_size, "10.8 when this was written"


# ---- the activation cache, as the loop offers it -----------------------------------------------------------------
def test_the_size_that_is_told_is_the_size_on_disk(tmp_path):
    host = inlay.attach(base("llama")).add("a", small("lora"), at="o@1", seed=0)
    told = Packed(host, 0, 100).remember("a", DATA, tmp_path / "activations.bin")
    size = (tmp_path / "activations.bin").stat().st_size
    assert f"takes {size:,} bytes" in told and size == 4 * 32 * sum(len(e.input_ids) for e in DATA)


@pytest.mark.parametrize("where", ["dropout", "hidden_dropout"])
def test_dropout_without_a_module_is_seen(where):
    """OPT, BLOOM and Falcon drop by a function, with a share that a module or the configuration holds."""
    family = "opt" if where == "dropout" else "falcon"
    host = inlay.attach(base(family)).add("a", small("lora"), at="o@1", seed=0)
    if where == "hidden_dropout":
        Packed(host, 0, 100).remember("a", DATA, "ram")
        host.model.config.hidden_dropout = 0.1
    with pytest.raises(InlayError, match=f"activations cannot be cached: the base drops .*{where} 0.1"):
        Packed(host, 0, 100).remember("a", DATA, "ram")
