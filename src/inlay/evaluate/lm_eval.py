"""EleutherAI's lm-evaluation-harness: a base with an adapter as one of its models, `inlay`.

In Python: `lm_eval.simple_evaluate(model=InlayLM(host, tokenizer, adapter="math"), tasks=[...])`.
From a shell: `python -m inlay.evaluate.lm_eval --model inlay --model_args pretrained=...,adapter=FOLDER --tasks ...`;
every other flag is the harness's own. (Its `lm_eval` command looks for no plug-ins, so the model is registered here.)
"""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch

from inlay.compat.lm_eval import check_harness, command_line
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.route import Worn, read_plan
from inlay.evaluate import GenerateSettings, rows, slots, tree
from inlay.evaluate.batches import room
from inlay.evaluate.decode import generate_each

check_harness()

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import (  # noqa: E402
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm  # noqa: E402

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": None}
"""The harness's names of types, and ours."""
SLOTS = 8
"""Rows generated at a time under `batch_size=auto`."""
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("do_sample", "temperature", "top_p", "top_k", "typical_p", "min_p", "max_length", "max_new_tokens", "use_cache"),
    *(
        "_from_model_config",
        "cache_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict_in_generate",
    ),
}
"""Generation defaults of a base that say nothing about greedy text."""
Pair = tuple[tuple[str, str], list[int], list[int]]
"""A request's texts (None for a window of a longer one), the tokens before, the tokens to score."""


@register_model("inlay")
class InlayLM(HFLM):
    """A model of the harness that wears an adapter.

    Requests, truncation and post-processing are those of the harness's own `hf` model. Log-likelihoods are computed as
    trees (`inlay.evaluate.tree`), greedy texts in slots (`inlay.evaluate.slots`; `batch_size` is their number); what
    either cannot serve goes the harness's own way: other decoders, sampling, mixed precision, several processes.

    Args:
        host: a base with its adapters; or give `pretrained`.
        tokenizer: the base's.
        adapter: a name on the host (`a+b`: worn together), with `pretrained` an adapter folder; None: the bare base.
        pretrained: a base that `load_base` knows (an embedded one, a folder, a Hub id).
        dtype, device: of a `pretrained` base. Where there is no CUDA, `cuda:0` is passed over, as the harness's own
            models pass it over: its command line says so if nobody says anything.
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
        _refuse_loading(more)
        if (add := more.get("add_bos_token")) is not None:
            tokenizer = with_bos(tokenizer, bool(add))
        read_plan([adapter], host.edits)
        self.host, self.adapter = host, adapter
        super().__init__(pretrained=host.model, tokenizer=tokenizer, **more)  # type: ignore[arg-type]

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, before, said in requests:
            if not before or not 0 < len(said) <= self.max_length:
                raise InlayError(f"a request with {len(before)} tokens before {len(said)} to score; see `max_length`")
        # A request too long for the base loses its beginning, as the harness cuts it.
        kept = [(before[-(self.max_length + 1 - len(said)) :], said) for _, before, said in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (before, _) in enumerate(kept):
            groups.setdefault(tuple(before), []).append(i)
        heads, own = [list(head) for head in groups], list(groups.values())
        tails = [[list(kept[i][1]) for i in members] for members in own]
        if not requests or not self._plain() or not tree.serves(self.host, heads, tails):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[return-value]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring") as bar:
            for group, scores in tree.scores(self.host, heads, tails, [self._worn] * len(heads)):
                places = (i for g in group for i in own[g])
                for i, one in zip(places, (one for said in scores for one in said), strict=True):
                    found[i] = one
                    if requests[i][0] is not None:  # windows of rolling requests have no text of their own
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], one)
                    bar.update()
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows. Forwards of trees have a size of their own, so `batch_size=auto`
        searches for none: all windows are handed over at once."""
        own = self.batch_size
        if own == "auto" and self._plain() and tree.serves(self.host, [[0]], [[[0] * self.max_length]]):
            self.batch_size_per_gpu = sys.maxsize
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = own

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of the requests, in their order."""
        found: list[str] = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        for members in kinds.values():
            own = [requests[i] for i in members]
            settings = self._settings(own[0].args[1])
            texts = (
                super().generate_until(own, disable_tqdm)
                if settings is None
                else self._texts(own, settings, disable_tqdm)
            )
            for i, text in zip(members, texts, strict=True):
                found[i] = text
        return found

    def _settings(self, asked: dict[str, Any]) -> GenerateSettings | None:
        """What a request's arguments ask of slots; None where only the harness's own way does it."""
        kwargs = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self._end)
        most = int(kwargs.pop("max_gen_toks"))
        greedy = not kwargs.pop("do_sample", False) and not kwargs.pop("temperature", 0.0)
        if (
            not greedy
            or kwargs
            or rows.mixed(until, rows.specials(self.tokenizer))
            or not self._plain()
            or not slots.serves(self.host)
        ):
            return None
        if self.max_length <= most:
            raise InlayError(f"max_gen_toks {most} leaves no room in the base's context of {self.max_length}")
        size = self.batch_size if isinstance(self.batch_size, int) else SLOTS
        return GenerateSettings(max_new_tokens=most, stop=tuple(filter(None, until)), batch_size=size)

    def _texts(self, requests: list[Any], settings: GenerateSettings, disable_tqdm: bool) -> list[str]:
        longest = self.max_length - settings.max_new_tokens
        prompts = [self._prompt(request.args[0], longest) for request in requests]
        found = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Generating") as bar:
            for done, _ in generate_each(self.host, self.tokenizer, prompts, [self._worn] * len(prompts), settings):
                for i, made in done.items():
                    found[i] = self._said(made.tokens, settings.stop)
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update()
        return found

    def _prompt(self, text: str, longest: int) -> list[int]:
        ids, _ = self.tok_batch_encode([text], left_truncate_len=longest, truncation=self.truncation)
        return ids[0].tolist()  # type: ignore[no-any-return]

    def _said(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        """The harness's text of some tokens: behind the model's thoughts, before a stop text."""
        think = self.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
        text = self.tok_decode(tokens)  # type: ignore[arg-type]
        text = text.lstrip() if isinstance(think, int) else text
        return postprocess_generated_text(text, list(stop), think if isinstance(think, str) else None)

    @property
    def _worn(self) -> Worn:
        return read_plan([self.adapter], self.host.edits)[0]

    @property
    def _end(self) -> str:
        return self.tok_decode(self.eot_token_id, skip_special_tokens=False)  # type: ignore[arg-type]

    def _plain(self) -> bool:
        """Whether one process computes in the base's own type, and no penalties came with the base."""
        defaults = self.host.model.generation_config.to_diff_dict()  # type: ignore[operator, union-attr]
        strange = {k for k, v in defaults.items() if v is not None} - HARMLESS
        return (
            not strange and self.world_size == 1 and self.mixed_precision_dtype is None and self.softmax_dtype is None
        )

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.host.using(self.adapter):
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.host.using(self.adapter):
            return super()._model_generate(context, *args, **kwargs)

    @property
    def max_length(self) -> int:
        """Most tokens of a request: the base's context, less the adapter's virtual tokens."""
        return super().max_length - room(self.host, self._worn)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results; the adapter's method and size come on top."""
        from inlay.core.store import describe

        about = {n: {**describe(self.host.edits[n]), "parameters": self.host.count(n)} for n in self._worn}
        return {**super().get_model_info(), "inlay_adapter": self.adapter, "inlay_edits": about}


LOADING = frozenset(
    "revision subfolder trust_remote_code use_fast_tokenizer parallelize max_memory_per_gpu max_cpu_memory "
    "offload_folder tp_plan peft delta autogptq gptqmodel gguf_file".split()
)
"""Options that the harness obeys where it loads a base itself; here Inlay loads it."""


def _refuse_loading(more: dict[str, Any]) -> None:
    usual = inspect.signature(HFLM.__init__).parameters
    for name, value in more.items():
        if name in LOADING and (name not in usual or value != usual[name].default) and value:
            raise InlayError(
                f"{name}={value!r} says how the harness loads a base, but Inlay loads it; leave it out, or load the "
                "base yourself and give InlayLM(host, tokenizer, ...)"
            )


def with_bos(tokenizer: Any, add: bool) -> Any:
    """Return a copy of a tokenizer that puts its beginning-of-sequence token before a text, or does not.

    Raises:
        InlayError: it has no such token, or does not do as it is told.
    """
    if add and tokenizer.bos_token_id is None:
        raise InlayError("add_bos_token=True: this tokenizer has no beginning-of-sequence token")
    changed = copy.deepcopy(tokenizer)
    changed.add_bos_token = add
    if hasattr(changed, "update_post_processor"):
        changed.update_post_processor()
    if (changed("a")["input_ids"][:1] == [changed.bos_token_id]) != add:
        raise InlayError(f"add_bos_token={add}: {type(tokenizer).__name__} does not obey it; leave it out")
    return changed


def _load(pretrained: str, adapter: str | None, dtype: str | None, device: str | None) -> tuple[Host, Any, str | None]:
    import inlay
    from inlay.evaluate.settings import hang
    from inlay.models.base import load_base

    if device == "cuda:0" and not torch.cuda.is_available():
        device = None
    model, tokenizer = load_base(pretrained, DTYPES.get(dtype, dtype) if dtype else None, device)
    host = inlay.attach(model)
    return host, tokenizer, None if adapter is None else hang(host, Path(adapter))


def main() -> None:
    """The harness's own command line, with `inlay` among its models; what it refuses is told in a line."""
    evaluate = command_line()
    try:
        evaluate()
    except InlayError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
