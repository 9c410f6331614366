"""The generation service over HTTP: OpenAI's completions API and vLLM's tokenizer API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from gptj.serving.app import add_health, new_app
from gptj.serving.completions.schemas import Completion, CompletionRequest, ModelCard, ModelList
from gptj.serving.completions.service import CompletionService, server_sent
from gptj.serving.errors import NotFoundError
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import Recorder
from gptj.serving.openapi import errors
from gptj.serving.pages import playground
from gptj.serving.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
from gptj.tokenizer import GPTJTokenizer

CHUNK = (
    'data: {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "gpt-j-6b", '
    '"choices": [{"index": 0, "text": " have", "logprobs": null, "finish_reason": null}], '
    '"usage": null}\n\n'
)
STREAM: dict[str, Any] = {
    "description": "The reply; with `stream` its chunks as server-sent events, of the same shape. "
    "An error after the first chunk is an event as well, and `[DONE]` is the last.",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": f"{CHUNK}data: [DONE]\n\n",
        }
    },
}


def generation_app(
    service: CompletionService,
    tokenizer: GPTJTokenizer,
    card: ModelCard,
    alive: Callable[[], bool],
    recorder: Recorder | None = None,
    ledger: Ledger | None = None,
) -> FastAPI:
    """Routes of a service; `card` describes its model."""
    app = new_app(
        "GPT-J text generation", recorder, playground(), application="generation", ledger=ledger
    )
    add_health(app, alive, "the engine makes no progress")

    def check_model(name: str | None) -> None:
        if name is not None and name != card.id:
            raise NotFoundError(
                f"model {name!r:.200} does not exist; this service has {card.id!r}",
                param="model",
                code="model_not_found",
            )

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**errors(404, 429, 500, 503), 200: STREAM},
    )
    async def complete(request: CompletionRequest) -> Response:
        """Complete a prompt, as OpenAI's completions API does."""
        check_model(request.model)
        if request.stream:
            chunks = await service.stream(request)
            return StreamingResponse(
                server_sent(chunks),
                media_type="text/event-stream",
                # Proxies must not buffer the stream.
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        reply = await service.complete(request)
        # Serialized here: FastAPI would validate it again, on the event loop.
        content = await asyncio.to_thread(reply.model_dump_json)
        return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models of this service, which is one."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}", responses=errors(404))
    async def model(model_id: str) -> ModelCard:
        """One of them by its name."""
        check_model(model_id)
        return card

    @app.post("/tokenize", response_model_exclude_none=True, responses=errors(404))
    async def tokenize_text(request: TokenizeRequest) -> TokenizeReply:
        """A text as token ids."""
        check_model(request.model)
        return await asyncio.to_thread(tokenize, tokenizer, request, card.max_model_len)

    @app.post("/detokenize", responses=errors(404))
    async def detokenize_ids(request: DetokenizeRequest) -> DetokenizeReply:
        """Token ids as a text."""
        check_model(request.model)
        return await asyncio.to_thread(detokenize, tokenizer, request)

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """The tokenizer's configuration, with its sizes."""
        return await asyncio.to_thread(tokenizer_info, tokenizer, card.max_model_len)

    return app
