"""Keeps libraries from talking over a command's own output, and shows Inlay's own warnings as notes."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any


def quiet() -> None:
    """Errors only from transformers, no progress bars while weights load, no tokenizer threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="transformers")
    warnings.showwarning = _as_note
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def _as_note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """The text alone: whoever runs a command has no use for file and line."""
    from inlay.train.bar import note

    note(str(message))
