"""Runs a completions request: the engine's events in, text with its tokens out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gptj.engine.constraints.grammar import GrammarError
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, PromptLogprobs, TokenEvent
from gptj.engine.request import Ticket
from gptj.serving.access_log import Entry, current_entry
from gptj.serving.completions.detokenizer import TextStream
from gptj.serving.completions.engine_events import EventStream
from gptj.serving.completions.generation_request import (
    GenerationRequest,
    PromptTokensDetails,
    Usage,
)
from gptj.serving.completions.prompts import ResolvedPrompt
from gptj.serving.completions.request_trace import RequestTrace
from gptj.serving.errors import APIError, InvalidRequestError, ModelError, UnavailableError
from gptj.serving.keys.account import current_account
from gptj.serving.metrics import Recorder
from gptj.serving.middleware.observing import request_seed
from gptj.tokenizer import GPTJTokenizer
from gptj.workers.errors import ClosedError

Reason = Literal["stop", "length"]


@dataclass
class Piece:
    """Part of an output's text, with the tokens that begin in it and their character offsets."""

    text: str = ""
    tokens: list[tuple[TokenEvent, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # all that have arrived, even without text
    reason: Reason | None = None  # on the last piece
    stop_reason: str | int | None = None  # the request's stop string or token that ended it

    def __bool__(self) -> bool:
        """Whether there is something to send; ids alone wait."""
        return bool(self.text or self.tokens or self.reason)

    def extend(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.ids += later.ids
        self.reason, self.stop_reason = later.reason, later.stop_reason


class Output:
    """One output while it is generated."""

    def __init__(
        self, index: int, prompt: ResolvedPrompt, scored_by: Output | None, text: TextStream
    ) -> None:
        self.text = text
        self.index = index
        self.prompt = prompt
        self.scored_by = scored_by or self  # the output that gets the prompt logprobs
        self.prompt_logprobs: PromptLogprobs | None = None
        self.ended = False
        self.reason: Reason | None = None  # once it has ended
        self.new_tokens = 0
        self._waiting: list[tuple[TokenEvent, int]] = []  # until their text is certain
        self._logprob = 0.0

    def take(self, event: Event, start: int) -> Piece:
        """Process an event; returns a possibly empty piece. `start`: offset of the output's text.

        Raises APIError if the output failed.
        """
        piece = Piece()
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event
        elif isinstance(event, TokenEvent):
            self.new_tokens += 1
            self._logprob += event.logprob or 0.0
            piece.ids.append(event.token_id)
            self._waiting.append((event, self.text.decoded))
            piece.text = self.text.push(event.token_id)
        elif isinstance(event, Finished) and event.reason != "cancelled":
            if event.stop_token is not None:
                # It has no text, but needs a logprob entry: lm_eval takes the last entry for the
                # new token and those before for the prompt.
                self.new_tokens += 1
                piece.ids.append(event.stop_token)
                self._logprob += event.logprob or 0.0
                token = TokenEvent(event.stop_token, event.logprob, event.top)
                self._waiting.append((token, self.text.decoded))
            piece.text = self.text.finish(event.stop_token)
            piece.reason = event.reason
        else:
            raise failure(event)
        if self.text.stopped:
            piece.reason = "stop"
        self.reason = piece.reason
        self.ended = piece.reason is not None
        everything = self.ended and not self.text.stopped
        while self._waiting and (everything or self._waiting[0][1] < self.text.sent):
            token, place = self._waiting.pop(0)
            piece.tokens.append((token, start + place))
        return piece

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, self.new_tokens)


class CompletionRun:
    """A request's outputs while the engine generates them.

    Args:
        start: when the request arrived, by time.perf_counter.
        trace: of the request.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: GPTJTokenizer,
        request: GenerationRequest,
        prompts: Sequence[ResolvedPrompt],
        events: EventStream,
        recorder: Recorder,
        start: float,
        trace: RequestTrace,
    ) -> None:
        self._engine = engine
        self._trace = trace
        self._events = events
        self._request = request
        self._prompts = prompts
        self._seed = request_seed()
        # Captured now, since another request's task may close the run by collecting garbage.
        self._account = current_account()
        self._entry = current_entry()
        self.outputs: list[Output] = []
        for prompt in prompts:
            first = None
            for _ in range(request.candidates):
                text = text_stream(tokenizer, request, prompt)
                output = Output(len(self.outputs), prompt, first, text)
                first = first or output
                self.outputs.append(output)
        self._clocks = [
            OutputClock(recorder, start, self._entry, trace, each.index) for each in self.outputs
        ]

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """(index of the output, its next piece), until all outputs have ended.

        Ending the iteration cancels the work. Raises APIError, QueueFullError or ClosedError.
        """
        events = self._events
        running = len(self.outputs)
        pieces: dict[int, Piece] = {}
        try:
            for start in range(0, running, self._request.candidates):
                self._submit(self.outputs[start : start + self._request.candidates])
            while running:
                # Events that have arrived are merged: a slow client gets fewer, larger chunks.
                for index, event in await events.get_all():
                    if self.outputs[index].ended:
                        continue
                    pieces.setdefault(index, Piece()).extend(self._take(index, event))
                    running -= self.outputs[index].ended
                for index in [index for index, piece in pieces.items() if piece]:
                    yield index, pieces.pop(index)
        finally:
            events.cancel()
            usage = self.usage()
            self._trace.end(usage, [output.reason or "error" for output in self.outputs])
            self._entry.prompt_tokens = usage.prompt_tokens
            self._entry.completion_tokens = usage.completion_tokens
            if self._account is not None:
                self._account.tokens = usage.total_tokens

    def _take(self, index: int, event: Event) -> Piece:
        output, ticket = self.outputs[index], self._events.tickets[index]
        piece = output.take(event, len(output.prompt.text) if self._request.shows_prompt else 0)
        self._clocks[index].note(output.new_tokens, output.ended, ticket)
        if output.ended:
            last = event.stop_token if isinstance(event, Finished) else None
            piece.stop_reason = stop_reason(self._request, output.text, last, self._engine.eos_ids)
            ticket.cancel()  # the engine does not know about stop strings
        return piece

    def usage(self) -> Usage:
        # A prompt's samples share what its first one has found.
        firsts = self._events.tickets[:: self._request.candidates]
        return usage_of(self._prompts, sum(output.new_tokens for output in self.outputs), firsts)

    def _submit(self, outputs: Sequence[Output]) -> None:
        """Submit one prompt's outputs."""
        prompt = outputs[0].prompt
        params = prompt.params
        if self._seed is not None and params[0].seed is None:
            # Distinct per output, but the same when the request is retried.
            params = [
                replace(each, seed=self._seed + output.index)
                for each, output in zip(params, outputs, strict=True)
            ]
        try:
            tickets = self._engine.submit_many(
                prompt.ids,
                params,
                [self._events.router] * len(outputs),
                self._request.engine_adapter,
            )
        except ValueError as error:
            raise self._request.named(error) from error
        self._events.follow(tickets)


class OutputClock:
    """Records an output's latencies.

    Args:
        start: when its request arrived, by time.perf_counter.
        entry: its request's log entry.
        trace: of its request.
        index: the output's.
    """

    def __init__(
        self, recorder: Recorder, start: float, entry: Entry, trace: RequestTrace, index: int
    ) -> None:
        self._recorder = recorder
        self._entry = entry
        self._trace = trace
        self._index = index
        self._start = start
        self._first: float | None = None  # when the first token arrived

    def note(self, new_tokens: int, ended: bool, ticket: Ticket) -> None:
        """Record an event, after which the output has `new_tokens` tokens."""
        now = time.perf_counter()
        if self._first is None and new_tokens:
            self._first = now
            self._recorder.first_token(now - self._start)
            self._entry.first(now - self._start)
        if ended and self._first is not None and new_tokens > 1:
            self._recorder.token_gap((now - self._first) / (new_tokens - 1))
        if ended and ticket.queued_seconds is not None:
            self._recorder.queued(ticket.queued_seconds)
            self._entry.queued(ticket.queued_seconds)
            first = now if self._first is None else self._first
            self._trace.output(
                self._index,
                start=self._start,
                queued=ticket.queued_seconds,
                first=first,
                end=now,
                tokens=new_tokens,
            )


def text_stream(
    tokenizer: GPTJTokenizer, request: GenerationRequest, prompt: ResolvedPrompt
) -> TextStream:
    """The TextStream for an output of a prompt."""
    return TextStream(
        tokenizer,
        request.stops,
        request.min_tokens,
        include_stop=request.include_stop_str_in_output,
        begun=prompt.begun,
        echoed=request.shows_prompt,
        skip_special=request.skip_special_tokens,
    )


def stop_reason(
    request: GenerationRequest, text: TextStream, last: int | None, eos_ids: Collection[int]
) -> str | int | None:
    """Which of the request's stop strings or tokens ended an output; None: none, or eos."""
    if text.stopped_by is not None:
        return text.stopped_by
    if last is None or (last in eos_ids and not request.ignore_eos):
        return None
    return last


def usage_of(
    prompts: Sequence[ResolvedPrompt], new_tokens: int, tickets: Sequence[Ticket] = ()
) -> Usage:
    """Args: tickets: one for each prompt that has been submitted."""
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(ticket.cached_tokens for ticket in tickets)
        ),
    )


def failure(event: Event) -> APIError:
    if isinstance(event, Failed) and isinstance(event.error, ClosedError):
        return UnavailableError(str(event.error))
    if isinstance(event, Failed) and isinstance(event.error, GrammarError):
        return InvalidRequestError(f"the output could not be constrained: {event.error}")
    reason = str(event.error) if isinstance(event, Failed) else "it was cancelled"
    return ModelError(f"the model failed on this request: {reason}")
