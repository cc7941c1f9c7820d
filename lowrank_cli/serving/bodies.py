"""Bodies of requests in the OpenAI API, as far as they are supported. What is not supported is refused, not ignored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowrank_cli.errors import nearest

IGNORED = frozenset("user store metadata service_tier safety_identifier prompt_cache_key parallel_tool_calls".split())
TOP = 20  #: most probable tokens that can be asked for

Stop = Annotated[list[str], Field(max_length=16)]


class Body(BaseModel):
    """A body whose other keys are errors, unless their value changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[dict[str, list[Any]]] = {}  #: keys that are not supported -> values that mean nothing

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body is not an object")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the body holds half of a surrogate pair; expected whole characters") from None
        for key in body.keys() - cls.model_fields.keys() - IGNORED:
            if key not in cls.neutral:
                raise ValueError(f"{key}: unknown key{nearest(key, cls.model_fields)}")
            if body[key] not in [None, *cls.neutral[key]]:
                raise ValueError(f"{key}: it is not supported here; leave it out")
        return {key: value for key, value in body.items() if key in cls.model_fields}


class StreamOptions(Body):
    include_usage: bool = False


class Answering(Body):
    """What completions and chat completions have in common."""

    neutral: ClassVar[dict[str, list[Any]]] = {"presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}]}

    model: str
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Stop | None = None
    ignore_eos: bool = False  #: as of vLLM: an answer goes on after the end of the sequence
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


TokenId = Annotated[int, Field(ge=0)]


class CompletionBody(Answering):
    """``/v1/completions``."""

    neutral: ClassVar[dict[str, list[Any]]] = {
        **Answering.neutral,
        "echo": [False],
        "suffix": [""],
        "best_of": [1],
    }

    prompt: str | Annotated[list[str] | list[TokenId] | list[list[TokenId]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Other keys, such as ``name``, go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """The message with its content as one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatBody(Answering):
    """``/v1/chat/completions``."""

    neutral: ClassVar[dict[str, list[Any]]] = {
        **Answering.neutral,
        "tools": [[]],
        "tool_choice": ["none", "auto"],
        "functions": [[]],
        "response_format": [{"type": "text"}],
        "modalities": [["text"]],
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] = 0


class LoadBody(Body):
    """``/v1/load_lora_adapter``."""

    neutral: ClassVar[dict[str, list[Any]]] = {"load_inplace": [False]}

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadBody(Body):
    """``/v1/unload_lora_adapter``."""

    neutral: ClassVar[dict[str, list[Any]]] = {"lora_int_id": []}

    lora_name: str
