"""Answers completions requests: text to ids, and the engine's events to text."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence

from gptj.engine.engine import Engine
from gptj.engine.events import BeamsFound, TokenEvent
from gptj.serving.completions.detokenizer import TextStream
from gptj.serving.completions.prompts import PromptResolver, ResolvedPrompt
from gptj.serving.completions.run import (
    CompletionRun,
    EventRouter,
    EventStream,
    Output,
    Piece,
    Reason,
    failure,
    text_stream,
    usage_of,
)
from gptj.serving.completions.schemas import (
    Choice,
    Completion,
    CompletionRequest,
    Logprobs,
    StreamOptions,
)
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import APIError
from gptj.serving.keys.account import note_tokens, reserve_tokens
from gptj.serving.metrics import Recorder
from gptj.tokenizer import GPTJTokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf; vLLM's value


class CompletionService:
    """Answers completions requests with an engine and a tokenizer.

    Args:
        vocabulary: of the tokenizer and the engine's model.
        model_name: the model's name in replies.
        recorder: receives latencies.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        vocabulary: Vocabulary,
        model_name: str,
        recorder: Recorder,
    ) -> None:
        self._engine = engine
        self._recorder = recorder
        self._tokenizer = tokenizer
        self._resolver = PromptResolver(
            tokenizer,
            vocabulary,
            context_length=engine.context_length,
            max_queued=engine.max_queued,
        )
        self._model_name = model_name
        self._router: EventRouter | None = None

    async def complete(self, request: CompletionRequest) -> Completion:
        """The whole reply. Cancelling the call cancels the work.

        Raises APIError, QueueFullError or ClosedError.
        """
        start = time.perf_counter()
        prompts = await self._resolve(request)
        if request.use_beam_search:
            return await self._complete_by_beams(request, prompts)
        run = self._run(request, prompts, start)
        pieces: list[list[Piece]] = [[] for _ in run.outputs]
        async for index, piece in run.pieces():
            pieces[index].append(piece)
        # Logprobs of long prompts take a while: not on the event loop.
        return await asyncio.to_thread(self._reply, request, run, pieces)

    def _reply(
        self, request: CompletionRequest, run: CompletionRun, pieces: Sequence[Sequence[Piece]]
    ) -> Completion:
        choices: list[Choice] = []
        for start in range(0, len(run.outputs), request.candidates):
            candidates = run.outputs[start : start + request.candidates]
            for output in _best(candidates, request.n):
                choice = self._choice(request, output, len(choices))
                for piece in pieces[output.index]:
                    self._extend(choice, piece)
                choices.append(choice)
        return Completion(model=self._model_name, choices=choices, usage=run.usage())

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Completion]:
        """The reply in chunks; returns once the first is there.

        Raises APIError, QueueFullError or ClosedError; the iterator raises APIError as well.
        """
        start = time.perf_counter()
        prompts = await self._resolve(request)
        run = self._run(request, prompts, start)
        chunks = self._chunks(request, run)
        first = await anext(chunks)
        return _chained(first, chunks)

    def _run(
        self, request: CompletionRequest, prompts: Sequence[ResolvedPrompt], start: float
    ) -> CompletionRun:
        return CompletionRun(
            self._engine,
            self._tokenizer,
            request,
            prompts,
            self._events(),
            self._recorder,
            start,
        )

    def _events(self) -> EventStream:
        """For a request of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._router is None or self._router.loop is not loop:
            self._router = EventRouter(loop)
        return EventStream(self._router)

    async def _chunks(
        self, request: CompletionRequest, run: CompletionRun
    ) -> AsyncIterator[Completion]:
        options = request.stream_options or StreamOptions()
        whole = Completion(model=self._model_name, choices=[])
        begun: set[int] = set()
        async for index, piece in run.pieces():
            output = run.outputs[index]
            if index in begun:
                choice = Choice(index=index, text="", logprobs=_no_logprobs(request))
            else:
                # Logprobs of a long prompt take a while: not on the event loop.
                choice = await asyncio.to_thread(self._choice, request, output, index)
                begun.add(index)
            self._extend(choice, piece)
            usage = run.usage() if options.continuous_usage_stats else None
            yield whole.model_copy(update={"choices": [choice], "usage": usage})
        if options.include_usage:
            yield whole.model_copy(update={"usage": run.usage()})

    def _choice(self, request: CompletionRequest, output: Output, index: int) -> Choice:
        """A choice without new tokens: the prompt, if it is echoed."""
        choice = Choice(index=index, text="", logprobs=_no_logprobs(request))
        if request.echo:
            choice.text = output.prompt.text
            if choice.logprobs is not None:
                self._echo_logprobs(choice.logprobs, output)
        return choice

    def _echo_logprobs(self, logprobs: Logprobs, output: Output) -> None:
        scored = output.scored_by.prompt_logprobs
        assert scored is not None  # always the first event, if requested
        text = TextStream(self._tokenizer)
        for event in scored.tokens:
            self._add_logprob(logprobs, event, text.decoded)
            text.push(event.token_id)

    def _extend(self, choice: Choice, piece: Piece) -> None:
        choice.text += piece.text
        choice.finish_reason = piece.reason
        if choice.logprobs is not None:
            for event, place in piece.tokens:
                self._add_logprob(choice.logprobs, event, place)

    def _add_logprob(self, logprobs: Logprobs, event: TokenEvent, place: int) -> None:
        first_of_prompt = event.logprob is None
        logprobs.tokens.append(self._token_text(event.token_id))
        logprobs.token_logprobs.append(None if first_of_prompt else _finite(event.logprob))
        logprobs.text_offset.append(place)
        top = {self._token_text(token): _finite(value) for token, value in event.top}
        if not first_of_prompt:  # the token itself, even if it is not among them
            top.setdefault(logprobs.tokens[-1], _finite(event.logprob))
        logprobs.top_logprobs.append(None if first_of_prompt else top)

    def _token_text(self, token: int) -> str:
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:  # part of a character, in OpenAI's notation
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    async def _complete_by_beams(
        self, request: CompletionRequest, prompts: Sequence[ResolvedPrompt]
    ) -> Completion:
        searches = [asyncio.ensure_future(self._search(request, prompt)) for prompt in prompts]
        try:
            found = await asyncio.gather(*searches)
        finally:
            for search in searches:
                search.cancel()
        choices: list[Choice] = []
        new_tokens = 0
        for prompt, beams in zip(prompts, found, strict=True):
            for output in beams.outputs:
                new_tokens += len(output)
                text, reason = self._beam_text(request, prompt, output)
                echoed = prompt.text if request.echo else ""
                choices.append(Choice(index=len(choices), text=echoed + text, finish_reason=reason))
        usage = usage_of(prompts, new_tokens)
        note_tokens(usage.total_tokens)
        return Completion(model=self._model_name, choices=choices, usage=usage)

    async def _search(self, request: CompletionRequest, prompt: ResolvedPrompt) -> BeamsFound:
        events = self._events()
        (params,) = prompt.params
        try:
            ticket = self._engine.beam_search(prompt.ids, params, request.beams(), events.router)
        except ValueError as error:
            raise request.named(error) from error
        events.follow([ticket])
        try:
            _, event = await events.get()
        finally:
            events.cancel()
        if not isinstance(event, BeamsFound):
            raise failure(event)
        if ticket.queued_seconds is not None:
            self._recorder.queued(ticket.queued_seconds)
        return event

    def _beam_text(
        self, request: CompletionRequest, prompt: ResolvedPrompt, output: Sequence[int]
    ) -> tuple[str, Reason]:
        stop_ids = {*request.stop_token_ids}
        if not request.ignore_eos:
            stop_ids |= set(self._engine.eos_ids)
        ended = bool(output) and output[-1] in stop_ids
        text = text_stream(self._tokenizer, request, prompt)
        parts = [text.push(token) for token in (output[:-1] if ended else output)]
        parts.append(text.finish(output[-1] if ended else None))
        return "".join(parts), "stop" if ended or text.stopped else "length"

    async def _resolve(self, request: CompletionRequest) -> list[ResolvedPrompt]:
        """Raises APIError."""
        self._resolver.check(request)
        # Long texts take a while: not on the event loop.
        prompts = await asyncio.to_thread(self._resolver.resolve, request)
        await reserve_tokens(sum(prompt.most_tokens for prompt in prompts))
        return prompts


async def server_sent(chunks: AsyncIterator[Completion]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error is one as well, since the status has been sent."""
    try:
        async for chunk in chunks:
            yield f"data: {on_one_line(chunk.model_dump_json())}\n\n"
    except APIError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


def on_one_line(content: str) -> str:
    """JSON with escaped line separators: it allows three that end lines elsewhere."""
    if content.isascii():
        return content
    for separator in ("\u0085", "\u2028", "\u2029"):
        content = content.replace(separator, f"\\u{ord(separator):04x}")
    return content


async def _chained(first: Completion, rest: AsyncIterator[Completion]) -> AsyncIterator[Completion]:
    yield first
    async for chunk in rest:
        yield chunk


def _best(candidates: Sequence[Output], n: int) -> Sequence[Output]:
    """The n with the highest mean logprob, as OpenAI's best_of."""
    if len(candidates) == n:
        return candidates
    return sorted(candidates, key=lambda output: -output.mean_logprob)[:n]


def _no_logprobs(request: CompletionRequest) -> Logprobs | None:
    return None if request.logprobs is None else Logprobs()


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
