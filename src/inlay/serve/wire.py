"""OpenAI's JSON: what requests say, and how answers are written.

Fields that would change an answer and are not implemented are refused, never ignored. Those that change nothing, by
their value or because nothing here could be changed by them, are taken: clients send them by default.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inlay.evaluate.rows import GenerateSettings

Positive = Annotated[int, Field(ge=1)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("auto",),
    "top_k": (-1,),
    "use_beam_search": (False,),
}
"""Values of fields, OpenAI's, vLLM's and others', that change no answer of this server (tools are refused)."""
LABELS = ("safety_identifier", "prompt_cache_key")
"""Texts that name something for the sender."""


def is_neutral(name: str, value: Any) -> bool:
    """Return whether a field with this value changes nothing."""
    same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in NEUTRAL.get(name, ()))
    return same or (name in LABELS and isinstance(value, str))


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Body):
    """What both kinds of requests may ask for."""

    model: Annotated[str, Field(max_length=512)]
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not OpenAI's: sample from this many likeliest tokens; 0: from all."""
    seed: int | None = None
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Not OpenAI's: seconds after which the request is given up."""
    user: str | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """OpenAI lets optional fields be null; `best_of` and the like keep their own rules where they are known."""
        if not isinstance(data, dict):
            return data
        obeyed = {n for n in cls.model_fields if n not in ("top_k", "tool_choice")}
        return {k: v for k, v in data.items() if v is not None and (k in obeyed or not is_neutral(k, v))}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def most(self) -> int | None:
        """Most new tokens."""
        raise NotImplementedError

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told beside each token's log-probability; None: neither."""
        raise NotImplementedError

    def settings(self, limit: int) -> GenerateSettings:
        """The same as `inlay.evaluate.generate` reads it; at temperature 0, `top_p` and `top_k` mean nothing."""
        sampled: dict[str, Any] = {"top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        return GenerateSettings(
            max_new_tokens=limit, temperature=self.temperature, stop=tuple(self.stop), seed=self.seed or 0, **sampled
        )


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Positive = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of must equal n: nothing is ranked")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not served; `inlay eval --how options` scores given texts")
        if self.prompt == []:
            raise ValueError("prompt is an empty list")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, texts or ids."""
        p: Any = self.prompt
        return [p] if isinstance(p, str) or isinstance(p[0], int) else p

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class Part(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """Its parts together."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _served(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadRequest(Body):
    """`POST` and `PUT /admin/adapters/{name}`."""

    source: str | None = None
    """A folder below one of the server's, or `hub:org/name`; the folder of that name by default."""


class Said(BaseModel):
    """A token as answers show it."""

    token: str
    logp: float
    likeliest: list[tuple[str, float]]


def reason(finished: str) -> str:
    """OpenAI's `finish_reason`."""
    return "length" if finished == "length" else "stop"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Chat:
    """How answers to `/v1/chat/completions` are written."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, i: int, text: str, said: Sequence[Said] | None, finish: str) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": i, "message": message, "logprobs": self.logprobs(said, 0), "finish_reason": finish}

    def delta(self, i: int, text: str, said: Sequence[Said] | None, finish: str | None, at: int) -> dict[str, Any]:
        """A piece of a choice; `at` characters were sent before."""
        delta = {"content": text} if text or said or not finish else {}
        return {"index": i, "delta": delta, "logprobs": self.logprobs(said, at), "finish_reason": finish}

    def opening(self, i: int) -> dict[str, Any] | None:
        """What a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, said: Sequence[Said] | None, at: int) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of a chat."""
        if said is None:
            return None

        def one(token: str, logp: float) -> dict[str, Any]:
            return {"token": token, "logprob": logp, "bytes": list(token.encode())}

        content = [one(s.token, s.logp) | {"top_logprobs": [one(*t) for t in s.likeliest]} for s in said]
        return {"content": content, "refusal": None}


class Completion:
    """How answers to `/v1/completions` are written."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def choice(self, i: int, text: str, said: Sequence[Said] | None, finish: str | None) -> dict[str, Any]:
        """A finished choice."""
        return self.delta(i, text, said, finish, 0)

    def delta(self, i: int, text: str, said: Sequence[Said] | None, finish: str | None, at: int) -> dict[str, Any]:
        """A piece of a choice; `at` characters were sent before."""
        return {"index": i, "text": text, "logprobs": self.logprobs(said, at), "finish_reason": finish}

    def opening(self, i: int) -> dict[str, Any] | None:
        """What a stream begins with: nothing."""
        return None

    def logprobs(self, said: Sequence[Said] | None, at: int) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of a completion."""
        if said is None:
            return None
        starts = [at + sum(len(s.token) for s in said[:i]) for i in range(len(said))]
        return {
            "tokens": [s.token for s in said],
            "token_logprobs": [s.logp for s in said],
            "top_logprobs": [dict(s.likeliest) for s in said],
            "text_offset": starts,
        }


class Answer:
    """The envelope of an answer, and of every piece of a stream."""

    def __init__(self, form: Chat | Completion, model: str):
        self.form = form
        self.head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
        """A complete answer."""
        return {**self.head, "object": self.form.whole, "choices": choices, "usage": used}

    def piece(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self.head, "object": self.form.part, "choices": choices} | ({"usage": used} if used else {})
