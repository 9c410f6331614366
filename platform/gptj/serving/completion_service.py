"""From a completions request to its reply: text to ids, the engine's events to text."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from gptj.engine.batch_thread import ClosedError
from gptj.engine.engine import Engine, Ticket
from gptj.engine.events import (
    BeamsFound,
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    TokenEvent,
)
from gptj.serving.completions import (
    DEFAULT_MAX_TOKENS,
    Choice,
    Completion,
    CompletionRequest,
    Logprobs,
    Prompt,
    StreamOptions,
    Usage,
    named,
)
from gptj.serving.errors import APIError, InvalidRequestError, ModelError, UnavailableError
from gptj.serving.mailbox import Mailbox
from gptj.serving.text_stream import TextStream
from gptj.serving.vocabulary import Vocabulary
from gptj.tokenizer import GPTJTokenizer

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM writes the same
Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class EncodedPrompt:
    text: str
    ids: list[int]


@dataclass
class Piece:
    """What has become certain of an output: a part of its text, with the tokens that begin there.

    Tokens come with their places in the output's text, in characters.
    """

    text: str = ""
    tokens: list[tuple[TokenEvent, int]] = field(default_factory=list)
    reason: Reason | None = None  # on the last piece

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.reason)

    def __add__(self, later: Piece) -> Piece:
        return Piece(self.text + later.text, self.tokens + later.tokens, later.reason)


class CompletionService:
    """Answers completions requests by an engine and a tokenizer.

    Args:
        vocabulary: the tokenizer's, for this engine's model.
        model_name: what replies call the model.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        vocabulary: Vocabulary,
        model_name: str,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._model_name = model_name
        self._mailbox: Mailbox | None = None

    async def complete(self, request: CompletionRequest) -> Completion:
        """The whole reply. Cancelling the call cancels the work.

        Raises APIError, QueueFullError or ClosedError.
        """
        prompts = await self._encoded(request)
        if request.use_beam_search:
            return await self._complete_by_beams(request, prompts)
        run = self._run(request, prompts)
        pieces: list[list[Piece]] = [[] for _ in run.outputs]
        async for index, piece in run.pieces():
            pieces[index].append(piece)
        # With log-probabilities of long prompts this takes a while.
        return await asyncio.to_thread(self._reply, request, run, pieces)

    def _reply(
        self, request: CompletionRequest, run: _Run, pieces: Sequence[Sequence[Piece]]
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
        """The reply in chunks: the call itself returns when the first has come, or raises.

        Raises APIError, QueueFullError or ClosedError; later ones come out of the iterator.
        """
        prompts = await self._encoded(request)
        run = self._run(request, prompts)
        chunks = self._chunks(request, run)
        first = await anext(chunks)
        return _chained(first, chunks)

    def _run(self, request: CompletionRequest, prompts: Sequence[EncodedPrompt]) -> _Run:
        return _Run(
            self._engine,
            self._tokenizer,
            request,
            prompts,
            partial(self._max_tokens, request),
            self._events(),
        )

    def _events(self) -> _Events:
        """For a request of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return _Events(self._mailbox)

    async def _chunks(self, request: CompletionRequest, run: _Run) -> AsyncIterator[Completion]:
        options = request.stream_options or StreamOptions()
        whole = Completion(model=self._model_name, choices=[])
        begun: set[int] = set()
        async for index, piece in run.pieces():
            output = run.outputs[index]
            if index in begun:
                choice = Choice(index=index, text="", logprobs=_no_logprobs(request))
            else:
                # With log-probabilities of a long prompt this takes a while.
                choice = await asyncio.to_thread(self._choice, request, output, index)
                begun.add(index)
            self._extend(choice, piece)
            usage = run.usage() if options.continuous_usage_stats else None
            yield whole.model_copy(update={"choices": [choice], "usage": usage})
        if options.include_usage:
            yield whole.model_copy(update={"usage": run.usage()})

    def _choice(self, request: CompletionRequest, output: _Output, index: int) -> Choice:
        """A choice with what it shows before its first new token: the prompt, if echoed."""
        choice = Choice(index=index, text="", logprobs=_no_logprobs(request))
        if request.echo:
            choice.text = output.prompt.text
            if choice.logprobs is not None:
                self._echo_logprobs(choice.logprobs, output)
        return choice

    def _echo_logprobs(self, logprobs: Logprobs, output: _Output) -> None:
        scored = output.scored_by.prompt_logprobs
        assert scored is not None  # it is the first event of a request that asks for it
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
        if not first_of_prompt:  # the token itself, too, where it is not among the likeliest
            top.setdefault(logprobs.tokens[-1], _finite(event.logprob))
        logprobs.top_logprobs.append(None if first_of_prompt else top)

    def _token_text(self, token: int) -> str:
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:  # a part of a character, in OpenAI's notation
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    async def _complete_by_beams(
        self, request: CompletionRequest, prompts: Sequence[EncodedPrompt]
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
                text, reason = self._beam_text(request, output)
                echoed = prompt.text if request.echo else ""
                choices.append(Choice(index=len(choices), text=echoed + text, finish_reason=reason))
        usage = _usage(prompts, new_tokens)
        return Completion(model=self._model_name, choices=choices, usage=usage)

    async def _search(self, request: CompletionRequest, prompt: EncodedPrompt) -> BeamsFound:
        events = self._events()
        params = request.sampling(self._max_tokens(request, len(prompt.ids)), sample=0)
        try:
            ticket = self._engine.beam_search(prompt.ids, params, request.beams(), events.put(0))
        except ValueError as error:
            raise named(error) from error
        try:
            _, event = await events.get()
        finally:
            ticket.cancel()
        if not isinstance(event, BeamsFound):
            raise _failure(event)
        return event

    def _beam_text(self, request: CompletionRequest, output: Sequence[int]) -> tuple[str, Reason]:
        stop_ids = {*request.stop_token_ids}
        if not request.ignore_eos:
            stop_ids |= set(self._engine.eos_ids)
        ended = bool(output) and output[-1] in stop_ids
        text = TextStream(self._tokenizer, request.stop, request.min_tokens)
        parts = [text.push(token) for token in (output[:-1] if ended else output)]
        parts.append(text.finish())
        return "".join(parts), "stop" if ended or text.stopped else "length"

    async def _encoded(self, request: CompletionRequest) -> list[EncodedPrompt]:
        """The prompts' ids, all of them known to fit. Raises APIError."""
        request.check()
        self._check_room(request)
        prompts = self._default_prompt() if request.prompt is None else request.prompt
        # Long texts take a while: not on the thread that all requests share.
        encoded = await asyncio.to_thread(
            lambda: [self._encode(request, prompt) for prompt in prompts]
        )
        known = len(self._tokenizer)
        for name, ids in (
            ("logit_bias", request.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
        ):
            if wrong := [token for token in ids if not 0 <= token < known]:
                raise InvalidRequestError(
                    f"{name}: {wrong[0]} is no token id of this model, which has {known}",
                    param=name,
                )
        for prompt in encoded:
            request.sampling(self._max_tokens(request, len(prompt.ids)), sample=0)
        return encoded

    def _check_room(self, request: CompletionRequest) -> None:
        """InvalidRequestError for more outputs than may ever wait: 429 would be no answer."""
        outputs = len(request.prompt or [""]) * request.candidates
        if not request.use_beam_search and outputs > self._engine.max_waiting:
            raise InvalidRequestError(
                f"{outputs} outputs are more than the {self._engine.max_waiting} that may wait "
                f"here: send several requests"
            )

    def _encode(self, request: CompletionRequest, prompt: Prompt) -> EncodedPrompt:
        """The text and ids of a prompt that the context has room for. Raises APIError."""
        if isinstance(prompt, list):
            self._max_tokens(request, len(prompt))
            try:
                return EncodedPrompt(self._tokenizer.decode(prompt), prompt)
            except ValueError as error:
                raise InvalidRequestError(f"prompt: {error}", param="prompt") from error
        text = prompt or self._default_prompt()[0]
        self._max_tokens(request, self._vocabulary.least_tokens(text), known="at least ")
        encoded = EncodedPrompt(text, self._tokenizer.encode(text))
        self._max_tokens(request, len(encoded.ids))
        return encoded

    def _default_prompt(self) -> list[str]:
        """As OpenAI's: what separates texts, so that a new one begins."""
        if self._tokenizer.bos_token is None:
            raise InvalidRequestError(
                "prompt must not be empty: this model has no token that begins a text",
                param="prompt",
            )
        return [self._tokenizer.bos_token]

    def _max_tokens(self, request: CompletionRequest, length: int, known: str = "") -> int:
        """How many tokens may follow a prompt of so many. InvalidRequestError if it has no room."""
        context = self._engine.context_length
        least = max(1, request.min_tokens) if request.max_tokens is None else request.max_tokens
        if length + least > context:
            raise InvalidRequestError(
                f"this model's context is {context} tokens, but {known}{length + least} are asked "
                f"for: {known}{length} of the prompt and {least} of the completion; shorten the "
                + ("prompt or lower max_tokens" if request.max_tokens else "prompt"),
                param="prompt" if length >= context else "max_tokens",
                code="context_length_exceeded",
            )
        if request.max_tokens is not None:
            return request.max_tokens
        return min(max(DEFAULT_MAX_TOKENS, request.min_tokens), context - length)


async def server_sent(chunks: AsyncIterator[Completion]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error, too, since the status has gone out already."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n"
    except APIError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


class _Output:
    """One output while it is generated."""

    def __init__(
        self, index: int, prompt: EncodedPrompt, scored_by: _Output | None, text: TextStream
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.scored_by = scored_by or self  # the output whose events report on the prompt
        self.prompt_logprobs: PromptLogprobs | None = None
        self.ended = False
        self.new_tokens = 0
        self._text = text
        self._waiting: list[tuple[TokenEvent, int]] = []  # for their text to be certain
        self._logprob = 0.0

    def take(self, event: Event, start: int) -> Piece:
        """What an event adds; nothing, perhaps. `start` is the place of the first new character.

        Raises APIError if the event says that the output failed.
        """
        piece = Piece()
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event
        elif isinstance(event, TokenEvent):
            self.new_tokens += 1
            self._logprob += event.logprob or 0.0
            self._waiting.append((event, self._text.decoded))
            piece.text = self._text.push(event.token_id)
        elif isinstance(event, Finished) and event.reason != "cancelled":
            self.new_tokens += event.stop_token is not None
            self._logprob += event.logprob or 0.0
            piece.text = self._text.finish()
            piece.reason = event.reason
        else:
            raise _failure(event)
        if self._text.stopped:
            piece.reason = "stop"
        self.ended = piece.reason is not None
        everything = self.ended and not self._text.stopped
        while self._waiting and (everything or self._waiting[0][1] < self._text.sent):
            token, place = self._waiting.pop(0)
            piece.tokens.append((token, start + place))
        return piece

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, self.new_tokens)


class _Run:
    """A request's outputs and what the engine says of them."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        max_tokens: Callable[[int], int],
        events: _Events,
    ) -> None:
        self._engine = engine
        self._events = events
        self._request = request
        self._prompts = prompts
        self._max_tokens = max_tokens
        self.outputs: list[_Output] = []
        for prompt in prompts:
            first = None
            for _ in range(request.candidates):
                text = TextStream(tokenizer, request.stop, request.min_tokens)
                output = _Output(len(self.outputs), prompt, first, text)
                first = first or output
                self.outputs.append(output)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the output, what has become certain), until all have ended.

        Whatever ends the iteration ends the work. Raises APIError, QueueFullError, ClosedError.
        """
        events = self._events
        running = len(self.outputs)
        try:
            for start in range(0, running, self._request.candidates):
                self._submit(self.outputs[start : start + self._request.candidates])
            while running:
                # What has come meanwhile goes out together: a slow client gets fewer, larger parts.
                pieces: dict[int, Piece] = {}
                for index, event in await events.get_all():
                    if self.outputs[index].ended:
                        continue
                    piece = self._take(index, event)
                    pieces[index] = pieces[index] + piece if index in pieces else piece
                    running -= self.outputs[index].ended
                for index, piece in pieces.items():
                    if piece:
                        yield index, piece
        finally:
            events.cancel()

    def _take(self, index: int, event: Event) -> Piece:
        output = self.outputs[index]
        piece = output.take(event, len(output.prompt.text) if self._request.echo else 0)
        if output.ended:
            self._events.tickets[index].cancel()  # a stop string is none of the engine's
        return piece

    def usage(self) -> Usage:
        return _usage(self._prompts, sum(output.new_tokens for output in self.outputs))

    def _submit(self, outputs: Sequence[_Output]) -> None:
        """Submit one prompt's outputs."""
        prompt = outputs[0].prompt.ids
        max_tokens = self._max_tokens(len(prompt))
        try:
            self._events.tickets += self._engine.submit_many(
                prompt,
                [self._request.sampling(max_tokens, sample) for sample in range(len(outputs))],
                [self._events.put(output.index) for output in outputs],
            )
        except ValueError as error:
            raise named(error) from error


class _Events:
    """Events of several requests, from the engine's thread to this event loop."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.tickets: list[Ticket] = []
        self._mailbox = mailbox
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def put(self, index: int) -> Callable[[Event], None]:
        """What the engine calls with the events of request `index`."""
        mailbox, queue = self._mailbox, self._queue
        return lambda event: mailbox.put(queue, (index, event))

    async def get(self) -> tuple[int, Event]:
        return await self._queue.get()

    async def get_all(self) -> list[tuple[int, Event]]:
        """All that have come; one at least."""
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()


async def _chained(first: Completion, rest: AsyncIterator[Completion]) -> AsyncIterator[Completion]:
    yield first
    async for chunk in rest:
        yield chunk


def _best(candidates: Sequence[_Output], n: int) -> Sequence[_Output]:
    """The n with the highest log-probability a token, as OpenAI's best_of."""
    if len(candidates) == n:
        return candidates
    return sorted(candidates, key=lambda output: -output.mean_logprob)[:n]


def _no_logprobs(request: CompletionRequest) -> Logprobs | None:
    return None if request.logprobs is None else Logprobs()


def _usage(prompts: Sequence[EncodedPrompt], new_tokens: int) -> Usage:
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
    )


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _failure(event: Event) -> APIError:
    if isinstance(event, Failed) and isinstance(event.error, ClosedError):
        return UnavailableError(str(event.error))
    reason = str(event.error) if isinstance(event, Failed) else "it ended early"
    return ModelError(f"the model failed on this request: {reason}")
