"""OpenAI's completions API: bodies and replies of `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from gptj.serving.completions.generation_request import (
    MAX_LOGPROBS,
    MAX_SEQUENCES,
    GenerationRequest,
    Prompt,
    Usage,
    invalid,
)
from gptj.serving.middleware.observing import request_id
from gptj.serving.requests import MAX_IDS, bounds, checked_text, examples


def as_prompts(value: Any) -> list[Prompt]:
    """OpenAI's four kinds of prompts as a list. Raises ValueError for any other."""
    kinds = "a string, a list of strings, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return [checked_text(value)]
    if not isinstance(value, list):
        raise ValueError(f"must be {kinds}")
    if not value:
        raise ValueError("must not be an empty list")
    items = set(map(type, value))
    if items == {str}:
        return [checked_text(each) for each in value]
    if items == {int}:
        return [value]
    if items == {list} and all(set(map(type, each)) <= {int} for each in value):
        if not all(value):
            raise ValueError("must not have an empty list of token ids")
        return value
    raise ValueError(f"must be {kinds}, and not a mixture")


_ID_SCHEMA = {"type": "integer", "minimum": 0}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_SEQUENCES},
        {"type": "array", "items": _ID_SCHEMA, "minItems": 1, "maxItems": MAX_IDS},
        {
            "type": "array",
            "items": {"type": "array", "items": _ID_SCHEMA, "minItems": 1, "maxItems": MAX_IDS},
            "minItems": 1,
            "maxItems": MAX_SEQUENCES,
        },
    ]
}


class CompletionRequest(GenerationRequest):
    """OpenAI's fields and common extensions."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": "In a shocking finding, scientists", "max_tokens": 16, "temperature": 0},
            {"prompt": ["Once", "Twice"], "max_tokens": 8, "n": 2, "seed": 1, "logprobs": 3},
            {"prompt": "Once", "stream": True, "stream_options": {"include_usage": True}},
            {"prompt": "Once", "use_beam_search": True, "best_of": 4, "length_penalty": 0.8},
        )
    )

    default_tokens: ClassVar[int | None] = 16

    prompt: Annotated[
        list[Prompt] | None, PlainValidator(as_prompts), WithJsonSchema(_PROMPT_SCHEMA)
    ] = None  # default: the bos token
    suffix: Annotated[str, bounds(maxLength=0)] = ""
    # Default: 16, or all that fit the context if fewer.
    max_tokens: Annotated[int | None, bounds(minimum=0)] = None
    # Default: n.
    best_of: Annotated[int | None, bounds(minimum=1, maximum=MAX_SEQUENCES)] = None
    logprobs: Annotated[int | None, bounds(minimum=0, maximum=MAX_LOGPROBS)] = None
    # vLLM's: logprobs of the prompt's tokens, without echoing them.
    prompt_logprobs: Annotated[int | None, bounds(minimum=0, maximum=MAX_LOGPROBS)] = None
    echo: bool = False

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        return self.prompt

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        counts = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((count for count in counts if count is not None), default=None)

    @property
    def shows_prompt(self) -> bool:
        return self.echo

    @property
    def sequences_field(self) -> str:
        if self.prompt is not None and len(self.prompt) > 1:
            return "prompt"
        return "n" if self.best_of is None else "best_of"

    def check(self) -> None:
        if self.suffix:
            raise invalid("suffix", "this model does not support suffix: leave it out")
        if self.candidates < self.n:
            raise invalid("best_of", f"best_of={self.best_of} must not be below n={self.n}")
        if self.stream and self.candidates > self.n:
            raise invalid("best_of", "best_of above n does not work with stream=true")
        for field, count in (
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ):
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise invalid(field, f"{field} must be in [0, {MAX_LOGPROBS}], got {count}")
        if self.prompt_logprobs is not None and (self.stream or self.use_beam_search):
            other = "stream=true" if self.stream else "beam search"
            raise invalid("prompt_logprobs", f"{other} does not work with prompt_logprobs")
        super().check()


# Omitted without return_token_ids.
TokenIds = Annotated[list[int] | None, Field(exclude_if=lambda ids: ids is None)]


class Logprobs(BaseModel):
    """One entry for each token; null for the prompt's first token."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)  # in characters of the choice's text


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None  # 1 for the most likely; null if not among the requested ones
    decoded_token: str


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    # Per prompt token: itself and the top tokens at its position, by id; null for the first.
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    # The request's stop string or token that ended it; null: none, or eos.
    stop_reason: str | int | None = None
    token_ids: TokenIds = None
    prompt_token_ids: TokenIds = None  # in the first chunk of a stream


class Completion(BaseModel):
    """A reply, or a chunk of a stream."""

    id: str = Field(default_factory=lambda: f"cmpl-{request_id()}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptj"
    root: str  # the checkpoint's, or the adapter's, address
    parent: str | None = None  # an adapter's base model, by its name
    max_model_len: int  # the context, in tokens
    chat_template: bool = False  # whether it has one, and so supports chats


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
