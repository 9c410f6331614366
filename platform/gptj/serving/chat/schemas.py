"""OpenAI's chat API: bodies and replies of `/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from gptj.serving.chat.messages import NO_TOOLS, ChatMessage, TemplateFields
from gptj.serving.completions.generation_request import (
    MAX_LOGPROBS,
    GenerationRequest,
    Usage,
    invalid,
)
from gptj.serving.completions.schemas import TokenIds
from gptj.serving.middleware.observing import request_id
from gptj.serving.requests import MAX_MESSAGES, FailFastList, bounds, examples

HELLO = [{"role": "user", "content": "Where do penguins live?"}]


class ChatRequest(GenerationRequest, TemplateFields):
    """OpenAI's fields and common extensions."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"messages": HELLO, "max_completion_tokens": 16, "temperature": 0},
            {
                "messages": [
                    {"role": "system", "content": "Answer in one word."},
                    {"role": "user", "content": [{"type": "text", "text": "Where do they live?"}]},
                ],
                "max_tokens": 8,
                "logprobs": True,
                "top_logprobs": 2,
            },
            {
                "messages": HELLO,
                "max_tokens": 8,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    )
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[FailFastList[ChatMessage], bounds(minItems=1, maxItems=MAX_MESSAGES)]
    # Default: all that fit the context.
    max_completion_tokens: Annotated[int | None, bounds(minimum=1)] = None
    max_tokens: Annotated[int | None, bounds(minimum=1)] = None  # its former name
    logprobs: bool = False
    top_logprobs: Annotated[int | None, bounds(minimum=0, maximum=MAX_LOGPROBS)] = None
    tools: Annotated[list[Any], bounds(maxItems=0)] = Field(default_factory=list)
    functions: Annotated[list[Any], bounds(maxItems=0)] = Field(default_factory=list)
    # No effect without tools.
    tool_choice: Annotated[Any, bounds(enum=["none", "auto"])] = None
    function_call: Annotated[Any, bounds(enum=["none", "auto"])] = None  # its former name
    parallel_tool_calls: bool | None = None  # no effect without tools
    modalities: Annotated[FailFastList[Literal["text"]] | None, bounds(maxItems=16)] = None
    store: Literal[False] = False  # nothing is kept
    # Ignored: they concern OpenAI's own storage, prices, caches and abuse checks.
    metadata: dict[str, Any] = Field(default_factory=dict)
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    echo: Literal[False] = False  # vLLM's

    _template_stops: tuple[str, ...] = PrivateAttr(default=())

    def ending_at(self, stops: tuple[str, ...]) -> Self:
        """The request with a template's stop strings added; limits apply only to its own."""
        copy = self.model_copy()
        copy._template_stops = stops
        return copy

    @property
    def stops(self) -> Sequence[str]:
        return [*self.stop, *self._template_stops]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_field(self) -> str:
        return "top_logprobs"

    def check(self) -> None:
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise invalid(name, f"{name}: {NO_TOOLS}")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise invalid(name, f"{name}: {NO_TOOLS}")
        self.check_template_fields(self.messages)
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise invalid(
                "max_tokens",
                f"max_tokens={both[0]} and max_completion_tokens={both[1]} set the same limit: "
                f"leave one out",
            )
        if self.token_limit is not None and self.token_limit < 1:
            field = self.limit_field
            raise invalid(field, f"{field} must be 1 or more, got {self.token_limit}")
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise invalid("top_logprobs", "top_logprobs needs logprobs=true")
            if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
                raise invalid(
                    "top_logprobs",
                    f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {self.top_logprobs}",
                )
        super().check()


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ReplyChoice(BaseModel):
    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    # Which stop string or token ended it, of the request or the template; null: none, or eos.
    stop_reason: str | int | None = None
    token_ids: TokenIds = None


class ChatChoice(ReplyChoice):
    message: ReplyMessage


class ChatCompletion(BaseModel):
    id: str = Field(default_factory=lambda: f"chatcmpl-{request_id()}")
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: TokenIds = None


class Delta(BaseModel):
    # In an output's first chunk; otherwise there is no such field.
    role: Annotated[Literal["assistant"] | None, Field(exclude_if=lambda role: role is None)] = None
    content: str


class ChunkChoice(ReplyChoice):
    delta: Delta


class ChatChunk(BaseModel):
    """A chunk of a stream."""

    id: str = Field(default_factory=lambda: f"chatcmpl-{request_id()}")
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: TokenIds = None  # in an output's first chunk
