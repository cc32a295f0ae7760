"""TRL: what its trainers ask of a forward, and how they are told from transformers' own.

Assumptions: the classes of its training arguments live in modules below `trl.`; it asks for per-token outputs by
`fused_lm_head=True` and reads `TOKEN_OUTPUTS` from the answer (a missing one is an AttributeError there, not another
result); it multiplies by the head's weight itself.
"""

from __future__ import annotations

from typing import Any

from inlay.compat.versions import check

FUSED_HEAD = "fused_lm_head"
"""The argument by which a forward is asked for `TOKEN_OUTPUTS` instead of logits."""
TOKEN_OUTPUTS = ("loss", "log_probs", "entropy", "is_top1", "label_mask")
"""Fields of such an answer, each but the loss (B, T - 1)."""


def is_trl(arguments: Any) -> bool:
    """Whether training arguments are TRL's.

    Raises:
        VersionError: they are, and that TRL is too old.
    """
    if not any(c.__module__.startswith("trl.") for c in type(arguments).__mro__):
        return False
    check("trl")
    return True
