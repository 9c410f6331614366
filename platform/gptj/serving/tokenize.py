"""vLLM's tokenizer API: `POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, field_validator

from gptj.chat import ChatTemplate
from gptj.serving.chat.messages import ChatMessage, TemplateFields, rendering_size
from gptj.serving.errors import InvalidRequestError
from gptj.serving.requests import (
    MAX_IDS,
    MAX_MESSAGES,
    FailFastList,
    RequestModel,
    bounds,
    checked_text,
    examples,
)
from gptj.tokenizer import GPTJTokenizer


class TokenizeRequest(TemplateFields):
    """Of a text, or of a chat's prompt."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"prompt": "In a shocking finding"},
            {"messages": [{"role": "user", "content": "Where do penguins live?"}]},
        )
    )

    prompt: str | None = None
    messages: Annotated[
        FailFastList[ChatMessage] | None, bounds(minItems=1, maxItems=MAX_MESSAGES)
    ] = None
    model: str | None = None
    add_special_tokens: bool = True  # no effect: GPT-J's tokenizer adds none
    return_token_strs: bool = False

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str | None) -> str | None:
        return None if prompt is None else checked_text(prompt)

    def check(self) -> None:
        """Raises InvalidRequestError."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("/tokenize needs either prompt or messages", param="prompt")
        if self.messages is not None:
            self.check_template_fields(self.messages)
            return
        for name in TemplateFields.model_fields:
            if getattr(self, name):
                raise InvalidRequestError(f"{name} needs messages", param=name)


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    model_config = ConfigDict(json_schema_extra=examples({"tokens": [818, 257]}))

    tokens: Annotated[
        FailFastList[int], bounds(items={"type": "integer", "minimum": 0}, maxItems=MAX_IDS)
    ]
    model: str | None = None


class DetokenizeReply(BaseModel):
    prompt: str


def tokenizing_size(request: TokenizeRequest, template: ChatTemplate | None) -> int:
    """Characters of a request, which tell how long it takes: see text_threads."""
    if request.messages is None:
        return len(request.prompt or "")
    assert template is not None
    return rendering_size(template, request.messages)


def tokenize(
    tokenizer: GPTJTokenizer,
    request: TokenizeRequest,
    max_model_len: int,
    template: ChatTemplate | None,
) -> str:
    """A TokenizeReply as JSON.

    Args:
        template: of the messages, if there are any.
    """
    text = request.prompt or ""
    if request.messages is not None:
        assert template is not None
        text = request.rendered(template, request.messages)
    ids = tokenizer.encode(text)
    reply = TokenizeReply.model_construct(  # not validated: there may be a million ids
        count=len(ids),
        max_model_len=max_model_len,
        tokens=ids,
        token_strs=tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None,
    )
    return reply.model_dump_json(exclude_none=True)


def detokenize(tokenizer: GPTJTokenizer, request: DetokenizeRequest) -> str:
    """A DetokenizeReply as JSON. Raises InvalidRequestError for an id outside the vocabulary."""
    try:
        text = tokenizer.decode(tokenizer.check_ids(request.tokens))
    except ValueError as error:
        raise InvalidRequestError(str(error), param="tokens") from error
    return DetokenizeReply(prompt=text).model_dump_json()


def tokenizer_info(tokenizer: GPTJTokenizer, max_model_len: int) -> dict[str, Any]:
    """The tokenizer's configuration, as in tokenizer_config.json, with its sizes."""
    settings: dict[str, Any] = json.loads(tokenizer.files()["tokenizer_config.json"])
    return {
        **settings,
        "model_max_length": max_model_len,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
