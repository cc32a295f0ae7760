"""A tiny base that says something: whatever it is asked, ` a` and then the end."""

from __future__ import annotations

import torch

from tests.evaluate import tiny


def base():
    """tests.evaluate's LLaMA with quiet layers and a head that looks at the last token."""
    model = tiny.base("llama", positions=128)
    ids = {c: tiny.tokenizer()(c)["input_ids"][-1] for c in ": a"}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(0.05)
        E, W = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        E.copy_(torch.nn.functional.normalize(torch.randn_like(E), dim=-1))
        W.normal_(std=0.02)
        for now, then in ((":", " "), (" ", "a"), ("a", None)):
            W[ids[then] if then else tiny.EOS] += 3 * E[ids[now]]
    return model
