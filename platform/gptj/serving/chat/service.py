"""Answers chats: a template turns messages into a prompt, whose completion is the reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gptj.chat import ChatTemplate
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.engine import Engine
from gptj.engine.events import TokenEvent
from gptj.serving.adapters import ServedAdapter
from gptj.serving.chat.messages import rendering_size
from gptj.serving.chat.schemas import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    ReplyMessage,
    TokenLogprob,
    TopLogprob,
)
from gptj.serving.completions.generation_request import Prompt, Usage
from gptj.serving.completions.generation_service import GenerationService
from gptj.serving.completions.prompts import ResolvedPrompt
from gptj.serving.completions.run import Output, Piece
from gptj.serving.completions.service import finite
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import InvalidRequestError
from gptj.serving.metrics import Recorder
from gptj.tokenizer import GPTJTokenizer

NO_TEMPLATE = (
    "this model has no chat template: give the application one with args.chat_template (dolly, "
    "alpaca, gpt-jt, pygmalion, or the address of a Jinja file), or the model's folder "
    "(chat_template.jinja); /v1/completions needs none"
)


class ChatService(GenerationService[ChatRequest, ChatCompletion, ChatChunk]):
    """See GenerationService.

    Args:
        template: for the base model and adapters without their own; None: chats are rejected, with
            the remedy.
    """

    _operation = "chat"

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        vocabulary: Vocabulary,
        model_name: str,
        recorder: Recorder,
        grammars: GrammarCompiler,
        template: ChatTemplate | None,
    ) -> None:
        super().__init__(engine, tokenizer, vocabulary, model_name, recorder, grammars)
        self._template = template

    @property
    def has_template(self) -> bool:
        """Whether the base model has a template; adapters may have their own."""
        return self._template is not None

    async def complete(self, request: ChatRequest) -> ChatCompletion:
        return await super().complete(self._with_stops(request))

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatChunk]:
        return await super().stream(self._with_stops(request))

    def _with_stops(self, request: ChatRequest) -> ChatRequest:
        """The request with the template's stop strings, which may be inside a required format."""
        stop = self._template_of(request).stop
        return request if request.has_grammar else request.ending_at(stop)

    def _template_of(self, request: ChatRequest) -> ChatTemplate:
        return self.template_of(request.adapter)

    def template_of(self, adapter: ServedAdapter | None) -> ChatTemplate:
        """The adapter's own, if it has one. Raises InvalidRequestError if there is none."""
        own = None if adapter is None else adapter.template
        template = own or self._template
        if template is None:
            raise InvalidRequestError(NO_TEMPLATE, code="no_chat_template")
        return template

    def _prompts(self, request: ChatRequest) -> Sequence[Prompt] | None:
        return [request.rendered(self._template_of(request), request.messages)]

    def _characters(self, request: ChatRequest) -> int:
        return rendering_size(self._template_of(request), request.messages)

    def _reply(
        self,
        request: ChatRequest,
        choices: list[ChatChoice],
        usage: Usage,
        prompts: Sequence[ResolvedPrompt],
    ) -> ChatCompletion:
        return ChatCompletion(
            model=self._model_of(request),
            choices=choices,
            usage=usage,
            prompt_token_ids=prompts[0].ids if prompts else None,
        )

    def _first_chunk(self, request: ChatRequest) -> ChatChunk:
        return ChatChunk(model=self._model_of(request), choices=[])

    def _first_fields(self, request: ChatRequest, output: Output) -> dict[str, Any]:
        return {"prompt_token_ids": output.prompt.ids} if request.return_token_ids else {}

    def _choice(self, request: ChatRequest, output: Output, piece: Piece, index: int) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ReplyMessage(content=piece.text),
            **self._shared(request, piece),
        )

    def _delta(
        self, request: ChatRequest, output: Output, piece: Piece, first: bool
    ) -> ChunkChoice:
        return ChunkChoice(
            index=output.index,
            delta=Delta(role="assistant" if first else None, content=piece.text),
            **self._shared(request, piece),
        )

    def _shared(self, request: ChatRequest, piece: Piece) -> dict[str, Any]:
        """The fields of choices and of chunks' choices."""
        return {
            "logprobs": self._logprobs(request, piece) if request.logprobs else None,
            "finish_reason": piece.reason,
            "stop_reason": piece.stop_reason,
            "token_ids": piece.ids if request.return_token_ids else None,
        }

    def _logprobs(self, request: ChatRequest, piece: Piece) -> ChatLogprobs:
        return ChatLogprobs(content=[self._logprob(request, event) for event, _ in piece.tokens])

    def _logprob(self, request: ChatRequest, event: TokenEvent) -> TokenLogprob:
        top = event.top[: request.top_logprobs or 0]
        return TokenLogprob(
            **self._entry(event.token_id, event.logprob),
            top_logprobs=[TopLogprob(**self._entry(token, logprob)) for token, logprob in top],
        )

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._token_text(token),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }
