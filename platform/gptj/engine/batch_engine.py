"""A language model that many callers share: prompts' ids in, events with the new ids out.

All waiting requests, up to `max_batch`, are generated together, from the batch's start to its
end; a request that ends frees its row at once. No text, HTTP or Ray here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gptj.engine.batch_thread import BatchThread, ClosedError
from gptj.generation import Decoder, beam_search
from gptj.model import GPTJForCausalLM
from gptj.sampling import SamplingParams, adjust, choose, generator_for

logger = logging.getLogger(__name__)

PROMPT_CHUNK = 256  # positions whose log-probabilities over the vocabulary are in memory at once


@dataclass(frozen=True)
class TokenEvent:
    """A new token. Stop tokens are none: they come as `Finished.stop_token`."""

    token_id: int
    logprob: float | None = None  # by the model alone, before penalties; None if not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (id, log-probability), best first


@dataclass(frozen=True)
class PromptLogprobs:
    """What the model thought of the prompt's own tokens; it has no opinion on the first."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class BeamsFound:
    """The continuations of a beam search, best first, with the stop token that ended each."""

    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a request that went well, or was cancelled."""

    reason: Literal["stop", "length", "cancelled"]
    stop_token: int | None = None
    logprob: float | None = None  # of the stop token; None if not asked for


@dataclass(frozen=True)
class Failed:
    """The last event of a request that went wrong."""

    error: Exception


Event = TokenEvent | PromptLogprobs | BeamsFound | Finished | Failed
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class BeamParams:
    num_beams: int  # continuations that are kept at each step
    num_results: int = 1  # of them, how many to return
    length_penalty: float = 1.0  # rank by log-probability / length ** length_penalty
    early_stopping: bool = False  # end when num_beams continuations have ended

    def __post_init__(self) -> None:
        if not 1 <= self.num_results <= self.num_beams:
            raise ValueError(
                f"num_results must be in [1, num_beams={self.num_beams}], got {self.num_results}"
            )


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    params: SamplingParams
    on_event: OnEvent
    stop_ids: tuple[int, ...]
    beams: BeamParams | None
    generator: torch.Generator | None
    output: list[int] = field(default_factory=list)
    cancelled: bool = False
    ended: bool = False


class Ticket:
    """A request that was submitted."""

    def __init__(self, engine: BatchEngine, request: _Request) -> None:
        self._engine = engine
        self._request = request

    def cancel(self) -> None:
        """End the request at the next step, or at once while it waits; harmless when it ended."""
        self._engine._cancel(self._request)


class BatchEngine:
    """Generates for many requests at a time, in a thread of its own.

    Args:
        model: in evaluation mode, on its device.
        eos_ids: end an output, unless its request ignores them.
        banned_ids: never chosen, and of no probability: ids that stand for no text.
        max_batch: requests that are generated together; a beam search goes alone.
        max_waiting: requests that may wait for the next batch.
    """

    def __init__(
        self,
        model: GPTJForCausalLM,
        *,
        eos_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        max_batch: int = 16,
        max_waiting: int = 1024,
    ) -> None:
        self._model = model
        self.eos_ids = tuple(eos_ids)
        self.max_waiting = max_waiting
        self._max_batch = max_batch
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=model.device)
        self._thread: BatchThread[_Request] = BatchThread(
            "batch-engine", self._run, self._fail, max_batch=max_batch, max_waiting=max_waiting
        )
        # A long prompt's forward pass may take minutes on a CPU: it shows that it advances.
        self._hooks = [
            block.register_forward_hook(lambda *_: self._thread.beat())
            for block in model.transformer.h
        ]

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return self._model.config.n_positions

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: OnEvent
    ) -> Ticket:
        """Let a request wait for the next batch; any thread may call this.

        Args:
            on_event: called in the engine's thread, so it must be quick: PromptLogprobs first if
                asked for, a TokenEvent a token, and Finished or Failed last. (A cancelled request
                that still waits gets its Finished from the thread that cancels.)

        Raises:
            ValueError: if the prompt is empty, too long or has ids that the model does not.
            QueueFullError, ClosedError: see BatchThread.put.
        """
        return self._submit(prompt_ids, params, on_event, None)

    def beam_search(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        beams: BeamParams,
        on_event: OnEvent,
    ) -> Ticket:
        """As submit, but gives one BeamsFound; of `params`, what restricts draws has no effect."""
        if params.max_tokens < 1:
            raise ValueError("beam search needs max_tokens of 1 or more, got 0")
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise ValueError("beam search reports no log-probabilities: leave logprobs out")
        if beams.num_beams > self._max_batch:  # each takes as much memory as a request
            raise ValueError(
                f"num_beams must be at most max_batch={self._max_batch}, got {beams.num_beams}"
            )
        return self._submit(prompt_ids, params, on_event, beams)

    def alive(self, within_seconds: float) -> bool:
        """Whether the model has made a step, or had none to make, within so many seconds."""
        return self._thread.alive(within_seconds)

    def close(self) -> None:
        """End the thread after the step that it is in; what runs or waits ends as Failed."""
        self._thread.close()
        for hook in self._hooks:
            hook.remove()

    def _submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_event: OnEvent,
        beams: BeamParams | None,
    ) -> Ticket:
        self._check(prompt_ids, params)
        eos_ids = () if params.ignore_eos else self.eos_ids
        draws = beams is None and params.temperature > 0
        request = _Request(
            list(prompt_ids),
            params,
            on_event,
            stop_ids=tuple(dict.fromkeys((*eos_ids, *params.stop_token_ids))),
            beams=beams,
            generator=generator_for(params, self._model.device) if draws else None,
        )
        self._thread.put(request)
        return Ticket(self, request)

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        length = len(prompt_ids)
        if length + params.max_tokens > self.context_length:
            raise ValueError(
                f"{length} tokens of the prompt and max_tokens={params.max_tokens} exceed the "
                f"model's context of {self.context_length} tokens: shorten the prompt or lower "
                f"max_tokens"
            )
        vocabulary = self._model.config.vocab_size
        named = {"prompt": prompt_ids, "logit_bias": params.logit_bias}
        for name, ids in {**named, "stop_token_ids": params.stop_token_ids}.items():
            if wrong := [token for token in ids if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"{name}: {wrong[0]} is no token id of this model, which has {vocabulary}"
                )

    def _cancel(self, request: _Request) -> None:
        request.cancelled = True
        if self._thread.remove(request):
            self._end(request, Finished("cancelled"))

    @torch.inference_mode()
    def _run(self, requests: list[_Request]) -> None:
        together = []
        for request in requests:
            with self._failing_alone(request):
                if request.beams is not None:
                    self._search(request, request.beams)
                elif self._begin(request):
                    together.append(request)
        if together:
            self._generate(together)

    def _begin(self, request: _Request) -> bool:
        """Report on the prompt, where that is asked for; whether there is anything to generate."""
        if request.params.prompt_logprobs is not None and not request.cancelled:
            self._emit(request, self._score(request.prompt, request.params.prompt_logprobs))
        if request.cancelled:
            self._end(request, Finished("cancelled"))
        elif request.params.max_tokens == 0:
            self._end(request, Finished("length"))
        return not request.ended

    def _generate(self, requests: list[_Request]) -> None:
        """Advance all requests by one token a step, until each has ended."""
        tokens, mask = left_padded([request.prompt for request in requests], self._model.device)
        decoder = Decoder(self._model, mask)
        while requests:
            logits_BV = decoder.advance(tokens)
            self._thread.beat()
            if self._thread.closed:
                raise ClosedError("the engine was closed while this request ran")
            self._step(requests, logits_BV)
            going_on = [row for row, request in enumerate(requests) if not request.ended]
            if len(going_on) < len(requests):
                requests = [requests[row] for row in going_on]
                if requests:
                    decoder.select(torch.tensor(going_on, device=self._model.device))
            tokens = torch.tensor(
                [request.output[-1:] for request in requests], device=self._model.device
            )

    def _step(self, requests: list[_Request], logits_BV: Tensor) -> None:
        """Choose each request's next token and report it; end those that it ends."""
        sound = logits_BV.isfinite().all(dim=-1).tolist()
        logits_BV[:, self._banned] = -torch.inf
        adjusted = [
            adjust(row, request.params, request.prompt, request.output, request.stop_ids)
            if _needs_adjusting(request)
            else row
            for row, request in zip(logits_BV, requests, strict=True)
        ]
        chosen = choose(
            torch.stack(adjusted),
            [request.params for request in requests],
            [request.generator for request in requests],
        ).tolist()
        events = _events(logits_BV, chosen, [request.params.logprobs for request in requests])
        for row, (request, token) in enumerate(zip(requests, chosen, strict=True)):
            if request.cancelled:
                self._end(request, Finished("cancelled"))
            elif not sound[row]:
                error = _not_finite(self._model)
                logger.error("a request failed: %s", error)
                self._fail(request, error)
            elif token in request.stop_ids:
                self._end(request, Finished("stop", token, events[row].logprob))
            else:
                request.output.append(token)
                self._emit(request, events[row])
                if len(request.output) == request.params.max_tokens:
                    self._end(request, Finished("length"))

    def _score(self, prompt: list[int], count: int) -> PromptLogprobs:
        """Each token's log-probability after those before it, and the `count` likeliest."""
        ids = torch.tensor([prompt], device=self._model.device)
        hidden = self._model.transformer(ids, use_cache=False, return_dict=True).last_hidden_state
        tokens = [TokenEvent(prompt[0])]
        for start in range(0, len(prompt) - 1, PROMPT_CHUNK):
            following = prompt[start + 1 : start + 1 + PROMPT_CHUNK]
            logits = self._model.lm_head(hidden[0, start : start + len(following)]).float()
            if not bool(logits.isfinite().all()):
                raise _not_finite(self._model)
            logits[:, self._banned] = -torch.inf
            tokens += _events(logits, following, [count] * len(following))
            self._thread.beat()
        return PromptLogprobs(tuple(tokens))

    def _search(self, request: _Request, beams: BeamParams) -> None:
        prompt = torch.tensor([request.prompt], device=self._model.device)
        decoder = _WatchedDecoder(
            self._model, torch.ones_like(prompt), self._banned, self._watch(request)
        )
        try:
            found = beam_search(
                decoder,
                prompt,
                request.params,
                num_beams=beams.num_beams,
                eos_ids=list(request.stop_ids),
                padding=-1,
                length_penalty=beams.length_penalty,
                early_stopping=beams.early_stopping,
                num_return_sequences=beams.num_results,
            )
        except _Cancelled:
            self._end(request, Finished("cancelled"))
            return
        outputs = found[:, len(request.prompt) :].tolist()
        without_padding = (tuple(token for token in row if token >= 0) for row in outputs)
        self._emit(request, BeamsFound(tuple(without_padding)))
        self._end(request, Finished("stop"))

    def _watch(self, request: _Request) -> Callable[[], None]:
        """What a beam search calls at each step."""

        def watch() -> None:
            self._thread.beat()
            if self._thread.closed:
                raise ClosedError("the engine was closed while this request ran")
            if request.cancelled:
                raise _Cancelled

        return watch

    @contextmanager
    def _failing_alone(self, request: _Request) -> Iterator[None]:
        try:
            yield
        # Whatever it is, the other requests of the batch have no part in it.
        except Exception as error:
            logger.exception("a request failed")
            self._fail(request, error)

    def _fail(self, request: _Request, error: Exception) -> None:
        self._end(request, Failed(error))

    def _end(self, request: _Request, event: Finished | Failed) -> None:
        if not request.ended:
            request.ended = True
            self._emit(request, event)

    def _emit(self, request: _Request, event: Event) -> None:
        try:
            request.on_event(event)
        # A caller that cannot take its events must not stop the others'.
        except Exception:
            logger.exception("a request's on_event failed; the request is cancelled")
            request.cancelled = True


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and their mask, of prompts that all end in the last column."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Cancelled(Exception):
    pass


class _WatchedDecoder(Decoder):
    """A Decoder that calls `watch` at each step and gives banned ids no probability."""

    def __init__(
        self, model: GPTJForCausalLM, mask: Tensor, banned: Tensor, watch: Callable[[], None]
    ) -> None:
        super().__init__(model, mask)
        self._banned = banned
        self._watch = watch

    def advance(self, ids_BL: Tensor) -> Tensor:
        self._watch()
        logits_BV = super().advance(ids_BL)
        logits_BV[:, self._banned] = -torch.inf
        return logits_BV


def _needs_adjusting(request: _Request) -> bool:
    params = request.params
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or len(request.output) < params.min_tokens
    )


def _events(
    logits_BV: Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenEvent]:
    """Each row's token, with its log-probability and the likeliest `counts` (None: neither)."""
    events = [TokenEvent(token) for token in tokens]
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return events
    logprobs = logits_BV[rows].log_softmax(dim=-1)
    best = logprobs.topk(min(max(counts[row] or 0 for row in rows), logprobs.shape[-1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    for place, row in enumerate(rows):
        pairs = list(zip(ids[place], values[place], strict=True))[: counts[row]]
        top = tuple((i, value) for i, value in pairs if value > -torch.inf)
        events[row] = TokenEvent(tokens[row], float(logprobs[place, tokens[row]]), top)
    return events


def _not_finite(model: GPTJForCausalLM) -> ArithmeticError:
    return ArithmeticError(
        f"the model's output is not finite: its weights are damaged, or too large for {model.dtype}"
    )
