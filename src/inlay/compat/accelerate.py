"""accelerate: what `accelerate launch` tells the processes that it starts.

Assumption: it sets an environment variable per back end to `true`. Inlay only reports what was asked for and goes its
own way, so one that is not known is not reported, and changes no result.
"""

from __future__ import annotations

import os

FSDP = "ACCELERATE_USE_FSDP"
OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Back ends that Inlay does not use."""


def asked() -> set[str]:
    """The variables of `FSDP` and `OTHERS` that are set."""
    return {n for n in (FSDP, *OTHERS) if os.environ.get(n, "").lower() in ("true", "1")}
