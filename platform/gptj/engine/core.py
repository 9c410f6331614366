"""One step of the engine: schedule, run the model, sample, and return (request, event) pairs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gptj.engine.beam_search import BeamSearch, Floats, likeliest
from gptj.engine.constraints.grammar import GrammarError
from gptj.engine.constraints.token_mask import NO_TOKEN
from gptj.engine.decode_batch import Sequence
from gptj.engine.events import BeamsFound, Event, Failed, Finished, PromptLogprobs, TokenEvent
from gptj.engine.request import Request
from gptj.engine.runners.base import Ints, Runner, StepBatch
from gptj.engine.runners.transfer import to_device
from gptj.engine.sampler import PendingOutput, Sampler, finite
from gptj.engine.scheduler import Chunk, ScheduledStep, Scheduler
from gptj.engine.speculation import Drafts

logger = logging.getLogger(__name__)

RequestEvent = tuple[Request, Event]


@dataclass(frozen=True)
class _Launched:
    """A step whose logits the device may still be computing."""

    scheduled: ScheduledStep
    logits_WV: Tensor


class EngineCore:
    """Scheduler, runner and sampler in one step; unaware of threads and callers.

    Args:
        banned_ids: masked to -inf in every request.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        banned_ids: Iterable[int],
    ) -> None:
        self.steps = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self.last_batch_size = 0
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=runner.device)
        self._events: list[RequestEvent] = []  # of the current step
        self._launched: _Launched | None = None  # ahead, for the next call
        self._ended = 0.0  # the last step, by time.perf_counter

    @torch.inference_mode()
    def step(self) -> list[RequestEvent]:
        """Advance every running request by one step, and return what happened.

        With an asynchronous runner, the device computes the next step meanwhile, if that can be
        prepared before this one's tokens are known; the next call samples from its logits.
        """
        launched, self._launched = self._launched, None
        # The device begins with a step launched ahead when the one before ends.
        began = time.perf_counter() if launched is None else self._ended
        if launched is None and (scheduled := self._scheduler.schedule()) is not None:
            launched = self._launch(scheduled)
        if launched is None:
            return self._take_events()
        scheduled, pending = launched.scheduled, self._sample(launched)
        drafts = scheduled.drafts
        del launched  # its logits' memory is free for the next step
        if pending is not None:
            try:
                if self._runner.asynchronous and not drafts:
                    self._launch_ahead(pending)
            finally:  # should that fail, this step's tokens are reported first
                self._collect(pending, drafts)
        self._ended = time.perf_counter()
        self._scheduler.note_duration(scheduled, self._ended - began)
        return self._take_events()

    def cancel(self, request: Request) -> list[RequestEvent]:
        """Drop a running request."""
        self._end(request, Finished("cancelled"))
        return self._take_events()

    def abort(self, error: Exception) -> list[RequestEvent]:
        """Fail all running requests; also returns the failed step's events."""
        self._launched = None
        for request in self._scheduler.reset():
            self._report(request, Failed(error))
        return self._take_events()

    def _launch(self, scheduled: ScheduledStep) -> _Launched:
        if scheduled.copies:
            self._runner.copy_pages(scheduled.copies)
        batch = self._scheduler.decode_batch
        self._sampler.begin({batch.keys[row]: draft for row, draft in scheduled.drafts.items()})
        batch.note_launched(np.arange(len(batch), dtype=np.int32))
        return self._compute(scheduled, scheduled.batch)

    def _launch_ahead(self, pending: PendingOutput) -> None:
        """Launch the step after the one that is being sampled, if possible."""
        batch = self._scheduler.decode_batch
        rows = batch.continuing()
        if (scheduled := self._scheduler.schedule_ahead(rows)) is not None:
            ids_R = _select(pending.tokens_R, rows.tolist()) if len(rows) else None
            batch.note_launched(rows)
            self._launched = self._compute(scheduled, replace(scheduled.batch, device_ids=ids_R))

    def _compute(self, scheduled: ScheduledStep, batch: StepBatch) -> _Launched:
        logits_WV = self._runner.step(batch)
        self.steps += 1
        self.last_batch_size = len(batch.query_start_loc) - 1
        self.tokens_in += sum(chunk.end - chunk.start for chunk in scheduled.chunks)
        return _Launched(scheduled, logits_WV)

    def _sample(self, launched: _Launched) -> PendingOutput | None:
        """Start to sample the next token of each row of the decode batch, unless it is empty."""
        scheduled, logits_WV = launched.scheduled, launched.logits_WV
        rows, searches = self._finish_prefill(scheduled, logits_WV)
        if searches:
            self._search(logits_WV, searches)
        if not rows:
            return None
        keys = self._scheduler.decode_batch.keys
        return self._sampler.launch(_select(logits_WV, rows), keys, scheduled.drafts)

    def _finish_prefill(
        self, scheduled: ScheduledStep, logits_WV: Tensor
    ) -> tuple[list[int], list[tuple[BeamSearch, list[int]]]]:
        """Move fully prefilled prompts to decoding.

        Returns the logits row of each decode row, and the logits rows of each search.
        """
        rows = list(range(scheduled.decoding))
        if not scheduled.drafts:  # some may have ended since, and the others moved
            batch = self._scheduler.decode_batch
            rows = batch.launched_rows[: len(batch)].tolist()
        searches: list[tuple[BeamSearch, list[int]]] = []
        row = scheduled.decoding
        for search in scheduled.searches:
            searches.append((search, list(range(row, row + search.width))))
            row += search.width
        for chunk in scheduled.chunks:
            if not chunk.sequence.samples:  # all cancelled
                continue
            if not self._finish_chunk(chunk, logits_WV):
                continue
            sequence, row = chunk.sequence, chunk.logits[-1]
            if sequence.samples[0].beams is not None:
                searches.append((self._scheduler.search(sequence), [row]))
            else:
                rows += [row] * len(sequence.samples)
                self._scheduler.decode(sequence)
        return rows, searches

    def _finish_chunk(self, chunk: Chunk, logits_WV: Tensor) -> bool:
        """Record a computed chunk; returns whether its sequence is ready to sample."""
        sequence, last = chunk.sequence, chunk.last
        self._scheduler.note_computed(chunk)
        if sequence.scores:
            self._score(chunk, logits_WV[chunk.logits.start : chunk.logits.stop])
        if last:
            for request in list(sequence.samples):
                self._begin(request, sequence)
        return last and bool(sequence.samples)

    def _score(self, chunk: Chunk, logits_LV: Tensor) -> None:
        """Record prompt logprobs, if requested."""
        sequence = chunk.sequence
        following = sequence.tokens[chunk.start + 1 : chunk.end + 1]
        if not finite(logits_LV).all():
            for request in list(sequence.samples):
                self._fail(request, _not_finite(), damaged=True)
            return
        for request, events in sequence.scores.items():
            if not events:
                events.append(TokenEvent(sequence.tokens[0]))
            count = request.params.prompt_logprobs
            if following and count is not None:
                logits = logits_LV[: len(following)]
                events += self._sampler.prompt_logprobs(logits, following, count)

    def _begin(self, request: Request, sequence: Sequence) -> None:
        """After prefill: report prompt logprobs, if requested, and prepare to sample."""
        if request.scores_prompt:
            request.scored = True
            self._report(request, PromptLogprobs(tuple(sequence.scores[request])))
        if request.params.max_tokens == 0:
            self._end(request, Finished("length"))
        elif request.beams is None:
            prompt = request.tokens[: request.prompt_length]
            output = request.tokens[request.prompt_length :]
            try:
                self._sampler.add(
                    request.number, request.params, prompt, tuple(request.stop_ids), output
                )
            # Any error here concerns only this request.
            except Exception as error:
                logger.exception("a request failed")
                self._fail(request, error)

    def _collect(self, pending: PendingOutput, drafts: Drafts) -> None:
        """Wait for the next tokens of each row of the decode batch, and report them."""
        batch = self._scheduler.decode_batch
        sampled = pending.result()
        if pending.revised:
            self._launched = None  # it was computed with outdated ids
        ended: list[tuple[Request, Finished]] = []
        failed: list[tuple[Request, Exception]] = []
        damaged: list[Request] = []
        last: list[int] = []
        counts: list[int] = []
        start = 0
        for row, request in enumerate(batch.requests):
            count = 0
            stopped: Finished | None = None
            for place in range(start, start + sampled.counts[row]):
                token = sampled.tokens[place]
                logprob, top = sampled.logprobs[place], sampled.top[place]
                count += 1
                if token in request.stop_ids:
                    stopped = Finished("stop", token, logprob, top)
                    break
                request.tokens.append(token)
                self._report(request, TokenEvent(token, logprob, top))
            if not sampled.finite[row]:
                damaged.append(request)
            elif row in sampled.errors:
                failed.append((request, sampled.errors[row]))
            elif stopped is not None:
                ended.append((request, stopped))
            elif row in sampled.complete:
                ended.append((request, Finished("stop")))
            elif len(request.tokens) == request.max_length:
                ended.append((request, Finished("length")))
            self.tokens_out += count
            counts.append(max(1, count))  # one position was computed even without a token
            last.append(sampled.tokens[start + counts[row] - 1])
            start += 1 + len(drafts.get(row, ()))
        self._scheduler.advance(drafts, last, counts)
        for request, event in ended:
            self._end(request, event)
        for request in damaged:
            self._fail(request, _not_finite(), damaged=True)
        for request, error in failed:
            self._fail(request, error)
        if not self._scheduler.running:
            self._launched = None  # nobody is left in it
        if self._launched is not None:
            self._sampler.begin({})

    def _search(self, logits_WV: Tensor, searches: list[tuple[BeamSearch, list[int]]]) -> None:
        """Extend each search's beams, given its logits rows."""
        rows = [row for _, each in searches for row in each]
        logprobs_WK, ids_WK = likeliest(
            _select(logits_WV, rows),
            [(search, len(each)) for search, each in searches],
            self._banned,
        )
        start = 0
        for search, each in searches:
            end = start + len(each)
            self._extend(search, logprobs_WK[start:end], ids_WK[start:end])
            start = end

    def _extend(self, search: BeamSearch, logprobs_WK: Floats, ids_WK: Ints) -> None:
        request = search.request
        if np.isnan(logprobs_WK[:, 0]).any():
            self._fail(request, _not_finite(), damaged=True)
            return
        search.step(logprobs_WK, ids_WK)
        if not search.open:
            results = search.results()
            if len(results) < search.num_results:
                self._fail(request, _too_few(len(results), search.num_results))
                return
            self.tokens_out += sum(map(len, results))
            self._report(request, BeamsFound(results))
            self._end(request, Finished("stop"))

    def _end(self, request: Request, event: Finished) -> None:
        self._scheduler.drop(request)
        self._report(request, event)

    def _fail(self, request: Request, error: Exception, *, damaged: bool = False) -> None:
        if damaged:
            logger.error("a request failed: %s", error)
        self._scheduler.drop(request, damaged=damaged)
        self._report(request, Failed(error))

    def _report(self, request: Request, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            request.end()
        self._events.append((request, event))

    def _take_events(self) -> list[RequestEvent]:
        events, self._events = self._events, []
        return events


def _not_finite() -> ArithmeticError:
    return ArithmeticError(
        "the model's output is not finite: its weights are damaged, or overflow its dtype"
    )


def _too_few(found: int, wanted: int) -> GrammarError:
    """Why a beam search has too few results."""
    if found == 0:
        return GrammarError(NO_TOKEN)
    return GrammarError(
        f"the request allows {found} of {wanted} outputs: its allowed_token_ids, bad_words and "
        f"min_tokens leave no further token for the others; remedy: allow more tokens, or lower n"
    )


def _select(tensor: Tensor, rows: list[int]) -> Tensor:
    """These rows of logits or ids; a view if they are contiguous."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[to_device(np.array(rows), tensor.device)]
