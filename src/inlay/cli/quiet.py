"""Keeps libraries from talking over a command's own output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Errors only from transformers, no progress bars while weights load, no tokenizer threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="transformers")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
