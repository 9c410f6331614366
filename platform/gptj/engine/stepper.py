"""One step of the model for everything that runs: its logits become tokens, and tokens events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from gptj.engine.beam_search import BeamSearch, Floats, likeliest
from gptj.engine.decode_batch import Sequence
from gptj.engine.events import BeamsFound, Failed, Finished, PromptLogprobs, TokenEvent
from gptj.engine.request import Request
from gptj.engine.runners.base import Ints, Runner
from gptj.engine.runners.transfer import sent
from gptj.engine.sampler import Sampler, finite
from gptj.engine.scheduler import Chunk, ScheduledStep, Scheduler

logger = logging.getLogger(__name__)


class Stepper:
    """Carries out the scheduler's plans.

    Args:
        cancel: called with a request whose caller cannot take its events.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        banned_ids: Iterable[int],
        cancel: Callable[[Request], object],
    ) -> None:
        self.steps = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self.last_batch_size = 0
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=runner.device)
        self._cancel = cancel

    def run(self, step: ScheduledStep) -> None:
        if step.copies:
            self._runner.copy_pages(step.copies)
        logits_WV = self._runner.step(step.batch)
        self.steps += 1
        self.last_batch_size = len(step.batch.query_start_loc) - 1
        self.tokens_in += sum(chunk.end - chunk.start for chunk in step.chunks)

        rows = list(range(step.decoding))
        searches: list[tuple[BeamSearch, list[int]]] = []  # with their rows of the logits
        row = step.decoding
        for search in step.searches:
            searches.append((search, list(range(row, row + search.width))))
            row += search.width
        for chunk in step.chunks:
            if not self._take_chunk(chunk, logits_WV):
                continue
            sequence, row = chunk.sequence, chunk.logits[-1]
            if sequence.samples[0].beams is not None:
                searches.append((self._scheduler.search(sequence), [row]))
            else:
                rows += [row] * len(sequence.samples)
                self._scheduler.decode(sequence)
        if searches:
            self._search(logits_WV, searches)
        if rows:
            self._sample(_select(logits_WV, rows))

    def _take_chunk(self, chunk: Chunk, logits_WV: Tensor) -> bool:
        """Note what was computed of a prompt; whether a next token is to be chosen."""
        sequence, last = chunk.sequence, chunk.last
        self._scheduler.note_computed(chunk)
        if sequence.scores:
            self._score(chunk, logits_WV[chunk.logits.start : chunk.logits.stop])
        if last:
            for request in list(sequence.samples):
                self._begin(request, sequence)
        return last and bool(sequence.samples)

    def _score(self, chunk: Chunk, logits_LV: Tensor) -> None:
        """Keep what the model thinks of the prompt's tokens, for those who asked."""
        sequence = chunk.sequence
        following = sequence.tokens[chunk.start + 1 : chunk.end + 1]
        if not finite(logits_LV).all():
            for request in list(sequence.samples):
                self._fail(request, self._not_finite(), damaged=True)
            return
        for request, events in sequence.scores.items():
            if not events:
                events.append(TokenEvent(sequence.tokens[0]))
            count = request.params.prompt_logprobs
            if following and count is not None:
                logits = logits_LV[: len(following)]
                events += self._sampler.prompt_logprobs(logits, following, count)

    def _begin(self, request: Request, sequence: Sequence) -> None:
        """The prompt is computed: report on it where asked to, and prepare to choose tokens."""
        if request.scores_prompt:
            request.scored = True
            self._emit(request, PromptLogprobs(tuple(sequence.scores[request])))
        if request.params.max_tokens == 0:
            self._end(request, request.finished("length"))
        elif request.beams is None:
            prompt = request.tokens[: request.prompt_length]
            output = request.tokens[request.prompt_length :]
            try:
                self._sampler.add(
                    request.number, request.params, prompt, tuple(request.stop_ids), output
                )
            # Whatever it is, the other requests of the step have no part in it.
            except Exception as error:
                logger.exception("a request failed")
                self._fail(request, error)

    def _sample(self, logits_RV: Tensor) -> None:
        """Choose each row's next token and report it; end those that it ends."""
        rows = self._scheduler.decode_batch
        choices = self._sampler.sample(logits_RV, rows.keys)
        tokens, finite, logprobs, top = (
            choices.tokens,
            choices.finite,
            choices.logprobs,
            choices.top,
        )
        ended: list[tuple[Request, Finished]] = []
        damaged: list[Request] = []
        for row, request in enumerate(rows.requests):
            token = tokens[row]
            if not finite[row]:
                damaged.append(request)
            elif token in request.stop_ids:
                end = request.finished("stop", token, logprobs[row], top[row])
                ended.append((request, end))
            else:
                request.tokens.append(token)
                self._emit(request, TokenEvent(token, logprobs[row], top[row]))
                if len(request.tokens) == request.max_length:
                    ended.append((request, request.finished("length")))
        self.tokens_out += len(rows) - len(damaged)
        rows.advance(tokens)
        for request, event in ended:
            self._end(request, event)
        for request in damaged:
            self._fail(request, self._not_finite(), damaged=True)

    def _search(self, logits_WV: Tensor, searches: list[tuple[BeamSearch, list[int]]]) -> None:
        """Let each search go on by its rows."""
        rows = [row for _, each in searches for row in each]
        values, ids = likeliest(
            _select(logits_WV, rows),
            [(search, len(each)) for search, each in searches],
            self._banned,
        )
        start = 0
        for search, each in searches:
            end = start + len(each)
            self._go_on(search, values[start:end], ids[start:end])
            start = end

    def _go_on(self, search: BeamSearch, logprobs_WK: Floats, ids_WK: Ints) -> None:
        request = search.request
        if np.isnan(logprobs_WK[:, 0]).any():
            self._fail(request, self._not_finite(), damaged=True)
            return
        search.step(logprobs_WK, ids_WK)
        if not search.open:
            results = search.results()
            self.tokens_out += sum(map(len, results))
            self._scheduler.drop(request)
            request.emit(BeamsFound(results))
            request.end(request.finished("stop"))

    def _emit(self, request: Request, event: TokenEvent | PromptLogprobs) -> None:
        if not request.emit(event):
            self._cancel(request)

    def _end(self, request: Request, event: Finished) -> None:
        self._scheduler.drop(request)
        request.end(event)

    def _fail(self, request: Request, error: Exception, *, damaged: bool = False) -> None:
        if damaged:
            logger.error("a request failed: %s", error)
        self._scheduler.drop(request, damaged=damaged)
        request.end(Failed(error))

    def _not_finite(self) -> ArithmeticError:
        return ArithmeticError(
            "the model's output is not finite: its weights are damaged, or too large for its "
            "number format"
        )


def _select(logits_WV: Tensor, rows: list[int]) -> Tensor:
    """These rows of the logits; without a copy where they lie together."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return logits_WV[rows[0] : rows[0] + len(rows)]
    return logits_WV[sent(np.array(rows), logits_WV.device)]
