"""A head of which each process holds a part says what a whole one says, by the same chunks."""

from __future__ import annotations

import pytest
import torch

from inlay.engine import head, loss
from tests.laws.zoo import excite
from tests.train.ranked import launch
from tests.train.tiny import rows, wearing

NEAR = {"rel": 1e-4}


def twice(how: str, read: bool = False) -> dict:
    """Two forwards and backwards of the ranks that are there, each with its part of the rows.

    Args:
        how: `whole`; `tail`, the head in one unit with the norm before it (accelerate's way); `alone`, in one of its
            own; `rounded`, so with its answers in bfloat16; `hooked`, as `tail` with somebody's hook on the head.
        read: whether something is read of the logits, too.
    """
    import os

    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from inlay.train.shards import Root
    from inlay.train.ways import Packed

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    host = wearing(at="q,up")
    excite(host)
    model, chunks, calls = host.model, [], []
    root = Root(model)
    if size > 1:
        init_process_group("gloo")
        for block in model.model.layers:
            fully_shard(block)
        if how in ("tail", "hooked"):
            fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
        else:
            out = torch.bfloat16 if how == "rounded" else None
            fully_shard(model.lm_head, mp_policy=MixedPrecisionPolicy(output_dtype=out))
        root = fully_shard(root)
    if how == "hooked":
        model.lm_head.register_forward_hook(lambda m, x, y: calls.append(1))
    forward = loss.LinearCrossEntropy.forward
    loss.LinearCrossEntropy.forward = staticmethod(lambda *given: chunks.append(1) or forward(*given))
    way, said = Packed(host, 0, 1000), []
    try:
        with host.using("a"), way.active():
            for seed in (0, 1):
                mine = rows(7, seed, prompt=True)[rank::size]
                if read:
                    each, top = root(lambda mine=mine: way.tokens(mine, lambda logits, target: logits.amax(-1), False))
                    total, extra = each.sum(), float(top.sum())
                else:
                    total, extra = root(lambda mine=mine: way.loss(mine)), 0.0
                (total * size).backward()  # FSDP2 averages
                said.append((float(total.detach()), extra))
    finally:
        loss.LinearCrossEntropy.forward = forward
    found = {k: p.grad for k, p in host.tensors("a").items()}
    full = {k: (g.full_tensor() if hasattr(g, "full_tensor") else g).tolist() for k, g in found.items()}
    if size > 1:
        destroy_process_group()
    return {"said": said, "gradients": full, "chunks": len(chunks), "calls": len(calls)}


@pytest.mark.parametrize(
    ("how", "read"), [("tail", False), ("alone", False), ("tail", True), ("hooked", False), ("rounded", False)]
)
def test_a_spread_head_computes_in_chunks_what_a_whole_one_computes(how, read):
    want = twice("whole", read)
    assert want["chunks"] == 2
    ranks = launch(2, twice, how, read)
    assert not [r for r in ranks if isinstance(r, str)], ranks
    quick = how in ("tail", "alone")
    assert [r["chunks"] for r in ranks] == [2 * quick] * 2, "chunks are taken where that is the same"
    assert [r["calls"] for r in ranks] == [4 * (how == "hooked")] * 2, "forward, and again in backward"
    near = NEAR if how != "rounded" else {"rel": 1e-2}
    for step, there in enumerate(want["said"]):
        for i, total in enumerate(there):
            assert sum(r["said"][step][i] for r in ranks) == pytest.approx(total, **near)
    for r in ranks:
        for k, g in want["gradients"].items():
            g = torch.tensor(g)
            room = (1e-5 if how != "rounded" else 3e-2) * float(g.abs().max())
            torch.testing.assert_close(torch.tensor(r["gradients"][k]), g, rtol=near["rel"], atol=room)


def test_a_head_of_another_class_is_called():
    class Own(torch.nn.Linear):
        pass

    plain = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    own = Own(4, 8, bias=False).requires_grad_(False)
    assert head._frozen(plain) and not head._frozen(own)
    assert not head._frozen(torch.nn.Linear(4, 8))
