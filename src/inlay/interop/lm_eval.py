"""EleutherAI's lm-evaluation-harness: a base with an adapter as one of its models, `inlay`.

In Python: `lm_eval.simple_evaluate(model=InlayLM(host, tokenizer, adapter="math"), tasks=[...])`.
From a shell: `python -m inlay.interop.lm_eval --model inlay --model_args pretrained=...,adapter=FOLDER --tasks ...`;
every other flag is the harness's own. (Its `lm_eval` command looks for no plug-ins, so the model is registered here.)
"""

from __future__ import annotations

from typing import Any

import torch

from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import read_plan

try:
    import lm_eval.models  # noqa: F401  (the harness registers its own models only while there are no others)
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as e:
    raise InlayError("the harness is not installed: pip install inlay[harness] accelerate") from e

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": None}
"""The harness's names of types, and ours."""


@register_model("inlay")
class InlayLM(HFLM):
    """A model of the harness that wears an adapter.

    Requests, truncation and batching are those of the harness's own `hf` model; only the forward passes differ.

    Args:
        host: a base with its adapters; or give `pretrained`.
        tokenizer: the base's.
        adapter: a name on the host (`a+b`: worn together), with `pretrained` an adapter folder; None: the bare base.
        pretrained: a base that `load_base` knows (an embedded one, a folder, a Hub id).
        dtype, device: of a `pretrained` base.
        more: whatever the harness's `HFLM` takes (`batch_size`, `max_length`, `add_bos_token` ...).
    """

    def __init__(
        self,
        host: Host | None = None,
        tokenizer: Any = None,
        adapter: str | None = None,
        *,
        pretrained: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **more: Any,
    ) -> None:
        if (host is None) == (pretrained is None):
            raise InlayError("give either a host with its tokenizer, or pretrained=<base> with adapter=<folder>")
        if host is None:
            host, tokenizer, adapter = _load(str(pretrained), adapter, dtype, device)
        elif tokenizer is None:
            raise InlayError("a host needs its tokenizer beside it: InlayLM(host, tokenizer, ...)")
        elif dtype is not None:
            raise InlayError("dtype is for pretrained=<base>; this host's base has its type already")
        read_plan([adapter], host.edits)
        self.host, self.adapter = host, adapter
        super().__init__(pretrained=host.model, tokenizer=tokenizer, **more)  # type: ignore[arg-type]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.host.using(self.adapter):
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.host.using(self.adapter):
            return super()._model_generate(context, *args, **kwargs)

    @property
    def max_length(self) -> int:
        """Most tokens of a request: the base's context, less the adapter's virtual tokens."""
        names = read_plan([self.adapter], self.host.edits)[0]
        return super().max_length - sum(self.host.edits[n].room for n in names)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results; the adapter's method and size come on top."""
        from inlay.core.store import describe

        worn = read_plan([self.adapter], self.host.edits)[0]
        about = {n: {**describe(self.host.edits[n]), "parameters": self.host.count(n)} for n in worn}
        return {**super().get_model_info(), "inlay_adapter": self.adapter, "inlay_edits": about}


def _load(pretrained: str, adapter: str | None, dtype: str | None, device: str | None) -> tuple[Host, Any, str | None]:
    import inlay
    from inlay.interop import formats
    from inlay.models.base import load_base

    model, tokenizer = load_base(pretrained, DTYPES.get(dtype, dtype) if dtype else None, device)
    host = inlay.attach(model)
    return host, tokenizer, None if adapter is None else formats.read(host, adapter, "adapter")


def main() -> None:
    """The harness's own command line, with `inlay` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
