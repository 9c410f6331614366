"""Simulated replicas: requests in, times of their first and last tokens out.

Generation replicas work like gptj.engine's scheduler: each running sequence takes one token of a
step, and the rest of `max_num_batched_tokens` goes to prompts in order of arrival. Steps with
prompts are simulated one by one. Between them all steps take equally long until a sequence ends, so
only those moments are computed. Contexts count with their mean length over a request's life, and a
prompt that arrives during a decode-only step does not wait for its end (half a step on average,
milliseconds on a GPU). Replicas that compute whole rows work like the services' Batcher.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import Protocol

from gptj_bench.autoscaling.machines import Machine

ROUNDING = 1e-4  # of a token: progress is computed from rates


@dataclass(slots=True, eq=False)
class Request:
    number: int
    arrival: float
    prompt: int  # tokens
    output: int  # new tokens
    first: float = inf  # time of its first token; inf before
    end: float = inf
    refused: bool = False


@dataclass(slots=True)
class Prompt:
    """A prompt being prefilled."""

    request: Request
    left: int  # tokens
    chunk: int = 0  # tokens of it in the running step


class Replica(Protocol):
    number: int
    ongoing: int  # assigned and not ended
    tokens: float  # that these have in the cache, on the mean, or wait to have computed
    due: float  # time of its next event, if nothing arrives before

    def add(self, now: float, request: Request) -> None: ...

    def work(self, now: float) -> list[Request]:
        """Process the events due at `now`; returns the requests that end."""


class RowsReplica:
    """Computes batches of rows, padded to the longest; other rows wait."""

    def __init__(self, number: int, machine: Machine, max_batch: int) -> None:
        self.number = number
        self.ongoing = 0
        self.tokens = 0.0
        self.due = inf
        self._machine = machine
        self._max_batch = max_batch
        self._waiting: deque[Request] = deque()
        self._batch: list[Request] = []

    def add(self, now: float, request: Request) -> None:
        self.ongoing += 1
        self.tokens += request.prompt
        self._waiting.append(request)
        if self.due == inf:
            self._begin(now)

    def work(self, now: float) -> list[Request]:
        ended = self._batch
        for request in ended:
            request.first = request.end = now
        self.ongoing -= len(ended)
        self.tokens -= sum(request.prompt for request in ended)
        self._begin(now)
        return ended

    def _begin(self, now: float) -> None:
        rows = min(len(self._waiting), self._max_batch)
        self._batch = [self._waiting.popleft() for _ in range(rows)]
        self.due = inf
        if self._batch:
            tokens = rows * max(request.prompt for request in self._batch)
            self.due = now + self._machine.step_seconds(0, 0, tokens)


class TokensReplica:
    """Decodes a token per sequence and step, alongside chunks of prompts."""

    def __init__(
        self, number: int, machine: Machine, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs must be in [1, max_num_batched_tokens={max_num_batched_tokens}], "
                f"got {max_num_seqs}"
            )
        self.number = number
        self.ongoing = 0
        self.tokens = 0.0
        self.due = inf
        self._machine = machine
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._now = 0.0
        self._waiting: deque[Request] = deque()
        self._prompts: deque[Prompt] = deque()
        self._step_end = inf  # of a step with prompts; inf if none runs
        self._decoding: list[tuple[float, int, Request]] = []  # a heap by final progress
        self._progress = 0.0  # tokens of a sequence decoding since time 0
        self._token_rate = 0.0  # tokens/s of each sequence
        self._context = 0.0  # cached tokens a step reads
        self._reserved = 0  # reserved cache tokens

    def add(self, now: float, request: Request) -> None:
        needed = request.prompt + request.output
        if needed > self._machine.cache_tokens:
            raise ValueError(
                f"a request of {needed} tokens never fits the cache of "
                f"{self._machine.cache_tokens} on {self._machine.name}"
            )
        self._advance(now)
        self.ongoing += 1
        self.tokens += mean_context(request)
        self._waiting.append(request)
        if self._step_end == inf:
            self._plan()

    def work(self, now: float) -> list[Request]:
        self._advance(now)
        ended = self._finish_step() if now >= self._step_end else []
        while self._decoding and self._decoding[0][0] - self._progress <= ROUNDING:
            request = heapq.heappop(self._decoding)[2]
            self._context -= mean_context(request)
            ended.append(request)
        for request in ended:
            request.end = now
            self.tokens -= mean_context(request)
            self._reserved -= request.prompt + request.output
        self.ongoing -= len(ended)
        self._plan()
        return ended

    def _finish_step(self) -> list[Request]:
        """Finish the running chunks; returns requests that end with their first token."""
        ended = []
        self._step_end = inf
        for prompt in self._prompts:
            prompt.left -= prompt.chunk
            prompt.chunk = 0
        while self._prompts and not self._prompts[0].left:
            request = self._prompts.popleft().request
            request.first = self._now
            if request.output == 1:
                ended.append(request)
            else:
                last = self._progress + request.output - 1
                heapq.heappush(self._decoding, (last, request.number, request))
                self._context += mean_context(request)
        return ended

    def _advance(self, now: float) -> None:
        self._progress += (now - self._now) * self._token_rate
        self._now = now

    def _plan(self) -> None:
        """Plan the next step, unless one with prompts is running, and the next event's time."""
        if self._step_end == inf:
            tokens = self._take_prompts()
            decoding = len(self._decoding)
            if not (tokens or decoding):
                self._token_rate, self.due = 0.0, inf
                return
            step = self._machine.step_seconds(decoding, self._context, tokens)
            self._token_rate = 1 / step
            if tokens:
                self._step_end = self._now + step
        self.due = self._step_end
        if self._decoding:
            left = self._decoding[0][0] - self._progress
            self.due = min(self.due, self._now + left / self._token_rate)

    def _take_prompts(self) -> int:
        """Admit prompts while there is room and choose the step's chunks; returns their tokens."""
        budget = room = self._max_num_batched_tokens - len(self._decoding)
        for prompt in self._prompts:
            prompt.chunk = min(prompt.left, room)
            room -= prompt.chunk
        while room and self._waiting and self._admits(self._waiting[0]):
            request = self._waiting.popleft()
            self._reserved += request.prompt + request.output
            chunk = min(request.prompt, room)
            self._prompts.append(Prompt(request, request.prompt, chunk))
            room -= chunk
        return budget - room

    def _admits(self, request: Request) -> bool:
        rows = len(self._decoding) + len(self._prompts)
        needed = self._reserved + request.prompt + request.output
        return rows < self._max_num_seqs and needed <= self._machine.cache_tokens


def mean_context(request: Request) -> float:
    return request.prompt + request.output / 2
