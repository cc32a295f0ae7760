"""lm-evaluation-harness: what `inlay.evaluate.lm_eval` imports from it, and which methods of its model it overrides.

Assumption: `HFLM` computes through the methods in `OVERRIDDEN`. If one had another name, Inlay's own would never be
called and the bare base would be evaluated, so each is looked for before the class is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from inlay.compat.versions import check, named
from inlay.core.errors import InlayError

NEEDED = {
    "lm_eval.api.registry": ("register_model",),
    "lm_eval.models.huggingface": ("HFLM",),
    "lm_eval.models.utils": ("handle_stop_sequences", "normalize_gen_kwargs", "postprocess_generated_text"),
}
"""Module -> what is imported from it."""
OVERRIDDEN = (
    "_loglikelihood_tokens",
    "_model_call",
    "_model_generate",
    "generate_until",
    "get_model_info",
    "loglikelihood_rolling",
    "max_length",
)
"""Methods of `HFLM` that Inlay's model overrides."""
CALLED = ("tok_batch_encode", "tok_decode", "eot_token_id", "max_gen_toks")
"""Methods of `HFLM` that Inlay's model calls."""


def check_harness() -> None:
    """Look for everything that Inlay's model relies on.

    Raises:
        VersionError: this harness is too old.
        InlayError: it is not installed, or names something else.
    """
    check("lm_eval")
    try:
        importlib.import_module("lm_eval.models")  # it registers its own models only while there are no others
        modules = {name: importlib.import_module(name) for name in NEEDED}
    except ImportError as e:
        raise InlayError("the harness is not installed: pip install inlay[harness] accelerate") from e
    missing = [f"{m}.{n}" for m, names in NEEDED.items() for n in names if not hasattr(modules[m], n)]
    model = getattr(modules["lm_eval.models.huggingface"], "HFLM", None)
    missing += [f"HFLM.{n}" for n in (*OVERRIDDEN, *CALLED) if model is not None and not hasattr(model, n)]
    if missing:
        raise InlayError(
            f"{named('lm_eval')} has no {', '.join(missing)}, so Inlay's model would not be the one evaluated; "
            f"install a version that docs/results/versions.md lists"
        )


def command_line() -> Callable[[], Any]:
    """The function of the harness's own command line."""
    main = importlib.import_module("lm_eval.__main__")
    if not hasattr(main, "cli_evaluate"):
        raise InlayError(f"{named('lm_eval')} has no lm_eval.__main__.cli_evaluate; use it from Python: InlayLM(...)")
    return main.cli_evaluate  # type: ignore[no-any-return]
