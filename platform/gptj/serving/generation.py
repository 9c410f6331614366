"""The generation service over HTTP: OpenAI's completions and chat, and vLLM's tokenizer API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from gptj.serving.adapters import (
    AdapterInfo,
    Adapters,
    ServedAdapter,
    served_model,
    unknown_model,
)
from gptj.serving.app import DEFAULTS, HTTPOptions, add_health, new_app
from gptj.serving.chat.schemas import ChatCompletion, ChatRequest
from gptj.serving.chat.service import ChatService
from gptj.serving.completions.generation_request import GenerationRequest
from gptj.serving.completions.generation_service import GenerationService
from gptj.serving.completions.schemas import Completion, CompletionRequest, ModelCard, ModelList
from gptj.serving.completions.server_sent_events import EventStreamResponse, server_sent
from gptj.serving.completions.service import CompletionService
from gptj.serving.errors import PermissionDeniedError
from gptj.serving.keys.account import may_use_model
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import NoRecorder, Recorder
from gptj.serving.openapi import errors
from gptj.serving.pages import playground
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.text_threads import in_template_thread, in_text_thread
from gptj.serving.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
    tokenizing_size,
)
from gptj.tokenizer import GPTJTokenizer

AnyService = GenerationService[Any, Any, Any]

CHUNK = (
    'data: {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "gpt-j-6b", '
    '"choices": [{"index": 0, "text": " have", "logprobs": null, "finish_reason": null}], '
    '"usage": null}\n\n'
)
CHAT_CHUNK = (
    'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": '
    '"gpt-j-6b", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "In"}, '
    '"logprobs": null, "finish_reason": null}], "usage": null}\n\n'
)


EVENT = {  # whose data is a chunk in JSON, an error's body or [DONE]
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


def streaming(chunk: str, shape: str) -> dict[str, Any]:
    """A route's 200, which may be a stream of chunks such as this."""
    return {
        "description": f"The reply; with `stream` its chunks as server-sent events, {shape}. "
        "An error after the first chunk is an event as well, and `[DONE]` is the last.",
        "content": {
            "text/event-stream": {
                "itemSchema": EVENT,
                "example": f"{chunk}data: [DONE]\n\n",
            }
        },
    }


def generation_app(
    completions: CompletionService,
    chats: ChatService,
    tokenizer: GPTJTokenizer,
    card: ModelCard,
    alive: Callable[[], bool],
    recorder: Recorder | None = None,
    ledger: Ledger | None = None,
    options: HTTPOptions = DEFAULTS,
    adapters: Adapters | None = None,
) -> FastAPI:
    """Routes of the services of one model, which `card` describes, and of its adapters."""
    app = new_app(
        "GPT-J text generation",
        recorder,
        playground(),
        application="generation",
        ledger=ledger,
        options=options,
    )
    add_health(app, alive, "the engine makes no progress")
    recorder_ = recorder or NoRecorder()

    def check_key(model: str | None) -> str:
        """The name of a request's model. PermissionDeniedError if its key does not allow it."""
        name = card.id if model is None else model
        if not may_use_model(name):
            raise PermissionDeniedError(
                f"this key is not for the model {name!r:.200}",
                param="model",
                code="model_not_allowed",
            )
        return name

    def adapter_of(model: str | None) -> AbstractAsyncContextManager[ServedAdapter | None]:
        """The adapter that a request's `model` names, held in the block; None: the base model."""
        return served_model(check_key(model), card.id, adapters)

    def check_name(model: str | None) -> None:
        """An adapter has its base model's tokenizer, and need not be loaded for it."""
        name = check_key(model)
        if name != card.id and not (adapters is not None and adapters.may_have(name)):
            raise unknown_model(name)

    def card_of(adapter: AdapterInfo) -> ModelCard:
        return ModelCard(
            id=adapter.name,
            created=adapter.created,
            root=adapter.address,
            parent=card.id,
            max_model_len=card.max_model_len,
            chat_template=card.chat_template or adapter.has_template,
        )

    async def answer(service: AnyService, request: GenerationRequest) -> Response:
        # The engine's requests hold the adapter themselves, once they are submitted.
        async with adapter_of(request.model) as adapter:
            if adapter is not None:
                recorder_.adapter_request(adapter.name)
                request = request.served_by(adapter)
            if request.stream:
                return EventStreamResponse(server_sent(await service.stream(request)))
            reply = await service.complete(request)
        used = reply.usage
        assert used is not None
        logprobs = request.count_logprobs(used.prompt_tokens, used.completion_tokens)
        # Serialized here: FastAPI would validate it again, on the event loop.
        content = await in_reply_thread(logprobs, reply.model_dump_json)
        return Response(content, media_type="application/json")

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**errors(404, 429, 500, 503), 200: streaming(CHUNK, "of the same shape")},
    )
    async def complete(request: CompletionRequest) -> Response:
        """Complete a prompt, as OpenAI's completions API does."""
        return await answer(completions, request)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            **errors(404, 429, 500, 503),
            200: streaming(CHAT_CHUNK, "with a `delta` in place of the message"),
        },
    )
    async def chat(request: ChatRequest) -> Response:
        """Answer a chat, as OpenAI's chat API does: the model's chat template makes its prompt."""
        return await answer(chats, request)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model of this service, and its adapters in memory."""
        present = [] if adapters is None else adapters.present()
        cards = [card, *(card_of(adapter.info) for adapter in present)]
        return ModelList(data=[each for each in cards if may_use_model(each.id)])

    @app.get("/v1/models/{model_id:path}", responses=errors(400, 404, 429, 503))
    async def model(model_id: str) -> ModelCard:
        """A model by name; adapters need not be in memory."""
        name = check_key(model_id)
        if name == card.id:
            return card
        if adapters is None:
            raise unknown_model(name)
        return card_of(await adapters.describe(name))

    @app.post("/tokenize", response_model=TokenizeReply, responses=errors(404, 429, 503))
    async def tokenize_text(request: TokenizeRequest) -> Response:
        """A text, or a chat's prompt, as token ids."""
        request.check()
        template = None
        if request.messages is None:
            check_name(request.model)
        else:
            async with adapter_of(request.model) as adapter:
                template = chats.template_of(adapter)
        # Serialized there: FastAPI would do it on the event loop.
        content = await in_template_thread(
            lambda: tokenizing_size(request, template),
            tokenize,
            tokenizer,
            request,
            card.max_model_len,
            template,
        )
        return Response(content, media_type="application/json")

    @app.post("/detokenize", response_model=DetokenizeReply, responses=errors(404, 429))
    async def detokenize_ids(request: DetokenizeRequest) -> Response:
        """Token ids as a text."""
        check_name(request.model)
        content = await in_text_thread(len(request.tokens), detokenize, tokenizer, request)
        return Response(content, media_type="application/json")

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """The tokenizer's configuration, with its sizes."""
        return await in_text_thread(0, tokenizer_info, tokenizer, card.max_model_len)

    return app
