"""Answers completions requests: replies and chunks in the shape of OpenAI's completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from gptj.engine.events import TokenEvent
from gptj.serving.completions.detokenizer import TextStream
from gptj.serving.completions.generation_request import Prompt, Usage
from gptj.serving.completions.generation_service import GenerationService
from gptj.serving.completions.prompts import ResolvedPrompt
from gptj.serving.completions.run import Output, Piece
from gptj.serving.completions.schemas import (
    Choice,
    Completion,
    CompletionRequest,
    Logprobs,
    PromptLogprob,
)

SHORT_PROMPTS = 512  # characters or ids of a request's prompts: 0.3 ms
FEW_OUTPUTS = 4  # whose parameters take little time to check
MIN_LOGPROB = -9999.0  # JSON has no -inf; vLLM's value


class CompletionService(GenerationService[CompletionRequest, Completion, Completion]):
    """See GenerationService."""

    _operation = "text_completion"

    def _prompts(self, request: CompletionRequest) -> Sequence[Prompt] | None:
        return request.prompt

    def _characters(self, request: CompletionRequest) -> int:
        return sum(map(len, request.prompt or ()))

    def _resolves_at_once(self, request: CompletionRequest) -> bool:
        prompts = request.prompt or [""]
        return (
            len(prompts) * request.candidates <= FEW_OUTPUTS
            and self._characters(request) <= SHORT_PROMPTS
            and not (request.bad_words or request.logit_bias or request.allowed_token_ids)
        )

    def _reply(
        self,
        request: CompletionRequest,
        choices: list[Choice],
        usage: Usage,
        prompts: Sequence[ResolvedPrompt],
    ) -> Completion:
        return Completion(model=self._model_of(request), choices=choices, usage=usage)

    def _first_chunk(self, request: CompletionRequest) -> Completion:
        return Completion(model=self._model_of(request), choices=[])

    def _choice(
        self, request: CompletionRequest, output: Output, piece: Piece, index: int
    ) -> Choice:
        choice = self._delta(request, output, piece, True)
        choice.index = index
        return choice

    def _delta(
        self, request: CompletionRequest, output: Output, piece: Piece, first: bool
    ) -> Choice:
        """The piece, after the prompt if it is echoed."""
        logprobs = None if request.logprobs is None else Logprobs()
        choice = Choice(
            index=output.index,
            text=piece.text,
            logprobs=logprobs,
            finish_reason=piece.reason,
            stop_reason=piece.stop_reason,
        )
        if first and request.echo:
            choice.text = output.prompt.text + piece.text
            if logprobs is not None:
                self._echo_logprobs(logprobs, output, request.logprobs or 0)
        if first and request.prompt_logprobs is not None:
            choice.prompt_logprobs = [
                self._prompt_logprob(event, request.prompt_logprobs) for event in _scored(output)
            ]
        if logprobs is not None:
            for event, place in piece.tokens:
                self._add_logprob(logprobs, event, place)
        if request.return_token_ids:
            choice.token_ids = piece.ids
            choice.prompt_token_ids = output.prompt.ids if first else None
        return choice

    def _echo_logprobs(self, logprobs: Logprobs, output: Output, count: int) -> None:
        text = TextStream(self._tokenizer)
        for event in _scored(output):
            self._add_logprob(logprobs, replace(event, top=event.top[:count]), text.decoded)
            text.push(event.token_id)

    def _prompt_logprob(self, event: TokenEvent, count: int) -> dict[str, PromptLogprob] | None:
        if event.logprob is None:  # the first of the prompt
            return None
        ranks = {token: rank for rank, (token, _) in enumerate(event.top, 1)}
        logprobs = {event.token_id: event.logprob, **dict(event.top[:count])}
        return {
            str(token): PromptLogprob(
                logprob=finite(logprob),
                rank=ranks.get(token),
                decoded_token=self._token_text(token),
            )
            for token, logprob in logprobs.items()
        }

    def _add_logprob(self, logprobs: Logprobs, event: TokenEvent, place: int) -> None:
        first_of_prompt = event.logprob is None
        logprobs.tokens.append(self._token_text(event.token_id))
        logprobs.token_logprobs.append(None if first_of_prompt else finite(event.logprob))
        logprobs.text_offset.append(place)
        top = {self._token_text(token): finite(value) for token, value in event.top}
        if not first_of_prompt:  # the token itself, even if it is not among them
            top.setdefault(logprobs.tokens[-1], finite(event.logprob))
        logprobs.top_logprobs.append(None if first_of_prompt else top)


def _scored(output: Output) -> Sequence[TokenEvent]:
    """The prompt's tokens with their logprobs, if requested."""
    scored = output.scored_by.prompt_logprobs
    assert scored is not None  # always the first event, if requested
    return scored.tokens


def finite(logprob: float | None) -> float:
    assert logprob is not None
    return logprob if math.isfinite(logprob) else MIN_LOGPROB
