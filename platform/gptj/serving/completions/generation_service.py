"""Serve a completions or chat request: prompts to the engine, its events to a reply's text."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from gptj.engine.constraints.compiler import CompiledGrammar, GrammarCompiler
from gptj.engine.engine import Engine
from gptj.engine.events import BeamsFound
from gptj.engine.request import Ticket
from gptj.serving.access_log import current_entry
from gptj.serving.completions.engine_events import EventRouter, EventStream
from gptj.serving.completions.generation_request import (
    GenerationRequest,
    Prompt,
    StreamOptions,
    Usage,
)
from gptj.serving.completions.prompts import PromptResolver, ResolvedPrompt
from gptj.serving.completions.request_trace import RequestTrace
from gptj.serving.completions.run import (
    CompletionRun,
    Output,
    Piece,
    failure,
    stop_reason,
    text_stream,
    usage_of,
)
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.keys.account import current_account, reserve_tokens
from gptj.serving.metrics import Recorder
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.text_threads import in_template_thread
from gptj.tokenizer import GPTJTokenizer

Request = TypeVar("Request", bound=GenerationRequest)
Reply = TypeVar("Reply", bound=BaseModel)
Chunk = TypeVar("Chunk", bound=BaseModel)


class GenerationService(ABC, Generic[Request, Reply, Chunk]):
    """Answers requests with an engine and a tokenizer; subclasses define the replies' shape.

    Args:
        vocabulary: of the tokenizer and the engine's model.
        model_name: the model's name in replies.
        recorder: receives latencies.
        grammars: for structured output.
    """

    _operation: ClassVar[str]  # its name in traces

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        vocabulary: Vocabulary,
        model_name: str,
        recorder: Recorder,
        grammars: GrammarCompiler,
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._recorder = recorder
        self._tokenizer = tokenizer
        self._resolver = PromptResolver(
            tokenizer,
            vocabulary,
            context_length=engine.context_length,
            cache_tokens=engine.cache_tokens,
            max_queued=engine.max_queued,
        )
        self._model_name = model_name
        self._router: EventRouter | None = None

    @abstractmethod
    def _prompts(self, request: Request) -> Sequence[Prompt] | None:
        """None: use bos as the prompt. Raises APIError.

        Called on the event loop only if `_resolves_at_once`.
        """

    @abstractmethod
    def _characters(self, request: Request) -> int:
        """Characters or ids of its prompts, which tell how long these take: see text_threads."""

    @abstractmethod
    def _choice(self, request: Request, output: Output, piece: Piece, index: int) -> Any:
        """A whole output as a choice of a reply."""

    @abstractmethod
    def _delta(self, request: Request, output: Output, piece: Piece, first: bool) -> Any:
        """A part of an output as a choice of a chunk; `first` if it is the output's first."""

    @abstractmethod
    def _reply(
        self,
        request: Request,
        choices: list[Any],
        usage: Usage,
        prompts: Sequence[ResolvedPrompt],
    ) -> Reply:
        """The whole reply."""

    @abstractmethod
    def _first_chunk(self, request: Request) -> Chunk:
        """A chunk without choices, as a template for the others."""

    def _resolves_at_once(self, request: Request) -> bool:
        """Whether its prompts take less than a thread's turn, which costs a busy replica 1 ms."""
        return False

    def _first_fields(self, request: Request, output: Output) -> dict[str, Any]:
        """Further fields of an output's first chunk."""
        return {}

    async def complete(self, request: Request) -> Reply:
        """The whole reply. Cancelling the call cancels the work.

        Raises APIError, QueueFullError or ClosedError.
        """
        start = time.perf_counter()
        prompts = await self._resolve(request)
        if request.use_beam_search:
            return await self._complete_by_beams(request, prompts, start)
        run = self._run(request, prompts, start)
        pieces = [Piece() for _ in run.outputs]
        async for index, piece in run.pieces():
            pieces[index].extend(piece)
        # Logprobs of long prompts take a while: not on the event loop.
        used = run.usage()
        logprobs = request.count_logprobs(used.prompt_tokens, used.completion_tokens)
        return await in_reply_thread(logprobs, self._reply_of, request, run, pieces, prompts)

    def _reply_of(
        self,
        request: Request,
        run: CompletionRun,
        pieces: Sequence[Piece],
        prompts: Sequence[ResolvedPrompt],
    ) -> Reply:
        choices: list[Any] = []
        for start in range(0, len(run.outputs), request.candidates):
            candidates = run.outputs[start : start + request.candidates]
            for output in _best(candidates, request.n):
                piece = pieces[output.index]
                choices.append(self._choice(request, output, piece, len(choices)))
        return self._reply(
            request, choices, run.usage(), prompts if request.return_token_ids else []
        )

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The reply in chunks; returns once the first is ready.

        Raises APIError, QueueFullError or ClosedError; the iterator raises APIError as well.
        """
        start = time.perf_counter()
        prompts = await self._resolve(request)
        run = self._run(request, prompts, start)
        chunks = self._chunks(request, run)
        first = await anext(chunks)
        return _chained(first, chunks)

    def _run(
        self, request: Request, prompts: Sequence[ResolvedPrompt], start: float
    ) -> CompletionRun:
        return CompletionRun(
            self._engine,
            self._tokenizer,
            request,
            prompts,
            self._events(),
            self._recorder,
            start,
            self._trace(request, prompts, start),
        )

    def _trace(
        self, request: Request, prompts: Sequence[ResolvedPrompt], start: float
    ) -> RequestTrace:
        params = prompts[0].params[0]
        return RequestTrace(self._operation, self._model_of(request), params, request.n, start)

    def _events(self) -> EventStream:
        """An event stream for a request on the running event loop."""
        loop = asyncio.get_running_loop()
        if self._router is None or self._router.loop is not loop:
            self._router = EventRouter(loop)
        return EventStream(self._router)

    async def _chunks(self, request: Request, run: CompletionRun) -> AsyncGenerator[Chunk]:
        options = request.stream_options or StreamOptions()
        whole = self._first_chunk(request)
        begun: set[int] = set()
        async with aclosing(run.pieces()) as pieces:
            async for index, piece in pieces:
                output = run.outputs[index]
                fields: dict[str, Any] = {}
                if index in begun:
                    choice = self._delta(request, output, piece, False)
                else:
                    if output.scored_by.prompt_logprobs is None:
                        choice = self._delta(request, output, piece, True)
                    else:  # those of a long prompt take a while: not on the event loop
                        logprobs = request.count_logprobs(len(output.prompt.ids), 0)
                        choice = await in_reply_thread(
                            logprobs, self._delta, request, output, piece, True
                        )
                    fields = self._first_fields(request, output)
                    begun.add(index)
                usage = run.usage() if options.continuous_usage_stats else None
                yield whole.model_copy(update={"choices": [choice], "usage": usage, **fields})
        if options.include_usage:
            yield whole.model_copy(update={"usage": run.usage()})

    def _model_of(self, request: Request) -> str:
        """The model's name in replies."""
        return self._model_name if request.adapter is None else request.adapter.name

    def _token_text(self, token: int) -> str:
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:  # part of a character, in OpenAI's notation
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    async def _complete_by_beams(
        self, request: Request, prompts: Sequence[ResolvedPrompt], start: float
    ) -> Reply:
        trace = self._trace(request, prompts, start)
        searches = [asyncio.ensure_future(self._search(request, prompt)) for prompt in prompts]
        try:
            found = await asyncio.gather(*searches)
        except BaseException:
            trace.end(usage_of(prompts, 0), ["error"] * len(prompts))
            raise
        finally:
            for search in searches:
                search.cancel()
        choices: list[Any] = []
        new_tokens = 0
        for prompt, (beams, _) in zip(prompts, found, strict=True):
            for ids in beams.outputs:
                new_tokens += len(ids)
                text = text_stream(self._tokenizer, request, prompt)
                output = Output(len(choices), prompt, None, text)
                piece = self._beam(request, prompt, ids)
                choices.append(self._choice(request, output, piece, output.index))
        usage = usage_of(prompts, new_tokens, [ticket for _, ticket in found])
        trace.end(usage, [choice.finish_reason for choice in choices])
        entry = current_entry()
        entry.prompt_tokens, entry.completion_tokens = usage.prompt_tokens, new_tokens
        if (account := current_account()) is not None:
            account.tokens = usage.total_tokens
        return self._reply(request, choices, usage, prompts if request.return_token_ids else [])

    async def _search(self, request: Request, prompt: ResolvedPrompt) -> tuple[BeamsFound, Ticket]:
        events = self._events()
        (params,) = prompt.params
        try:
            ticket = self._engine.beam_search(
                prompt.ids, params, request.beams(), events.router, request.engine_adapter
            )
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
        return event, ticket

    def _beam(self, request: Request, prompt: ResolvedPrompt, ids: Sequence[int]) -> Piece:
        """A beam as the only piece of an output."""
        stop_ids = {*request.stop_token_ids}
        if not request.ignore_eos:
            stop_ids |= set(self._engine.eos_ids)
        last = ids[-1] if ids and ids[-1] in stop_ids else None
        text = text_stream(self._tokenizer, request, prompt)
        parts = [text.push(token) for token in (ids if last is None else ids[:-1])]
        parts.append(text.finish(last))
        ended = last is not None or text.stopped
        return Piece(
            "".join(parts),
            reason="stop" if ended else "length",
            stop_reason=stop_reason(request, text, last, self._engine.eos_ids),
            ids=list(ids),
        )

    async def _resolve(self, request: Request) -> list[ResolvedPrompt]:
        """Raises APIError."""
        self._resolver.check(request)
        grammar = await request.compiled(self._grammars, self._recorder)
        if self._resolves_at_once(request):
            prompts = self._resolved(request, grammar)
        else:  # a long text takes a while: not on the event loop
            prompts = await in_template_thread(
                lambda: self._characters(request), self._resolved, request, grammar
            )
        await reserve_tokens(sum(prompt.most_tokens(request) for prompt in prompts))
        return prompts

    def _resolved(self, request: Request, grammar: CompiledGrammar | None) -> list[ResolvedPrompt]:
        return self._resolver.resolve(request, self._prompts(request), grammar)


async def _chained(first: Chunk, rest: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _best(candidates: Sequence[Output], n: int) -> Sequence[Output]:
    """The n with the highest mean logprob, as OpenAI's best_of."""
    if len(candidates) == n:
        return candidates
    return sorted(candidates, key=lambda output: -output.mean_logprob)[:n]
