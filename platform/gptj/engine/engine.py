"""A language model that many callers share: prompts' ids in, events with the new ids out.

A thread makes one step after the other. Requests join and leave at every step; each step advances
all that decode by a token, and computes a bounded part of the prompts that have just come. Pages
of the cache are shared by equal prefixes, the outputs of one prompt, and beams.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterable, Sequence

import torch

from gptj.engine.batch_thread import ClosedError
from gptj.engine.events import BeamParams, Failed, OnEvent
from gptj.engine.limits import Limits
from gptj.engine.page_pool import PagePool
from gptj.engine.request import Request
from gptj.engine.runners.base import Runner
from gptj.engine.sampler import Sampler
from gptj.engine.scheduler import Scheduler
from gptj.engine.stats import EngineStats
from gptj.engine.stepper import Stepper
from gptj.engine.waiting import WaitingQueue
from gptj.sampling import SamplingParams

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # how often a thread without work shows that it lives
CLOSE_SECONDS = 60  # for the step that is running
MAX_FAILED_STEPS = 3  # in a row: after a GPU's error, say, none will ever succeed again


class Ticket:
    """A request that was submitted."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request

    @property
    def queued_seconds(self) -> float | None:
        """From being submitted to the first step that worked on it; None if there was none yet."""
        request = self._request
        return None if request.started is None else request.started - request.submitted

    def cancel(self) -> None:
        """End the request at the next step, or at once while it waits; harmless when it ended."""
        self._engine._cancel(self._request)


class Engine:
    """Generates for many requests at a time, in a thread of its own.

    Args:
        runner: the model with its cache; the thread's alone until the engine is closed.
        eos_ids: end an output, unless its request ignores them.
        banned_ids: never chosen, and of no probability: ids that stand for no text.
        max_num_seqs: sequences that are worked on together; each beam is one. None: what suits
            the runner's device, as for max_num_batched_tokens; see Limits.
        max_queued: requests that may wait for their turn.
        max_num_batched_tokens: new tokens of a step, at least max_num_seqs: a prompt longer than
            what decoding leaves of them is prefilled in several steps.
        prefix_caching: whether pages that nobody uses are kept for prompts that begin alike.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        eos_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        max_num_seqs: int | None = None,
        max_queued: int = 1024,
        max_num_batched_tokens: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.eos_ids = tuple(eos_ids)
        self.max_queued = max_queued
        self._runner = runner
        sampler = Sampler(runner.config.vocab_size, banned_ids, runner.device)
        self._pool = PagePool(runner.num_pages, caching=prefix_caching)
        self._waiting = WaitingQueue(max_queued)
        limits = Limits.of(
            runner.device,
            runner.num_pages * runner.page_size,
            self.context_length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._scheduler = Scheduler(
            self._pool,
            self._waiting,
            lambda request: sampler.remove(request.number),
            page_size=runner.page_size,
            max_length=self.context_length,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self._stepper = Stepper(runner, self._scheduler, sampler, banned_ids, self._waiting.cancel)
        self._numbers = itertools.count()
        self._cancellations = 0  # of requests that ran
        self._failed_steps = 0  # since the last that went well
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return self._runner.config.n_positions

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: OnEvent
    ) -> Ticket:
        """Let a request wait for its turn; any thread may call this.

        Args:
            on_event: called in the engine's thread, so it must be quick: PromptLogprobs first if
                asked for, a TokenEvent a token, and Finished or Failed last. (A cancelled request
                that still waits gets its Finished from the thread that cancels.)

        Raises:
            ValueError: if the prompt is empty, has ids that the model does not, or can never fit
                the model's context or the cache.
            QueueFullError, ClosedError: see WaitingQueue.put.
        """
        (ticket,) = self.submit_many(prompt_ids, [params], [on_event])
        return ticket

    def submit_many(
        self,
        prompt_ids: Sequence[int],
        params: Sequence[SamplingParams],
        on_events: Sequence[OnEvent],
    ) -> list[Ticket]:
        """As submit, for several outputs of one prompt: all wait, or none.

        The prompt is computed once for all that run together; its pages are shared.
        """
        prompt = self._checked(prompt_ids)
        requests = [
            self._request(prompt, each, on_event)
            for each, on_event in zip(params, on_events, strict=True)
        ]
        for request in requests:
            request.group = requests[0].number
        self._waiting.put(requests)
        return [Ticket(self, request) for request in requests]

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
        if beams.num_beams > self._scheduler.max_num_seqs:  # each is a sequence of the batch
            raise ValueError(
                f"num_beams must be at most max_num_seqs={self._scheduler.max_num_seqs}, "
                f"got {beams.num_beams}"
            )
        request = self._request(self._checked(prompt_ids), params, on_event, beams)
        self._waiting.put([request])
        return Ticket(self, request)

    def alive(self, within_seconds: float) -> bool:
        """Whether a step has begun, or there was none to make, within so many seconds.

        Not once MAX_FAILED_STEPS in a row have failed.
        """
        if self._failed_steps >= MAX_FAILED_STEPS:
            return False
        return self._thread.is_alive() and time.monotonic() - self._last_beat < within_seconds

    def close(self) -> None:
        """End the thread after the step that it is in; what runs or waits ends as Failed.

        The runner is not closed: whoever made it may do so afterwards.
        """
        for request in self._waiting.close():
            request.end(Failed(ClosedError("the engine was closed before this request's turn")))
        self._thread.join(CLOSE_SECONDS)

    def stats(self) -> EngineStats:
        """The numbers of this moment; any thread may ask."""
        return EngineStats(
            running=self._scheduler.running,
            waiting=len(self._waiting),
            pages_used=self._pool.num_pages - self._pool.free,
            pages_cached=self._pool.cached,
            pages_total=self._pool.num_pages,
            last_batch_size=self._stepper.last_batch_size,
            steps=self._stepper.steps,
            tokens_in=self._stepper.tokens_in,
            tokens_out=self._stepper.tokens_out,
            prefix_tokens_asked=self._scheduler.prefix_asked,
            prefix_tokens_hit=self._scheduler.prefix_hit,
            preemptions=self._scheduler.preemptions,
            cancellations=self._cancellations + self._waiting.cancellations,
        )

    def _request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        on_event: OnEvent,
        beams: BeamParams | None = None,
    ) -> Request:
        length = len(prompt_ids)
        if length + params.max_tokens > self.context_length:
            raise ValueError(
                f"{length} tokens of the prompt and max_tokens={params.max_tokens} exceed the "
                f"model's context of {self.context_length} tokens: shorten the prompt or lower "
                f"max_tokens"
            )
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        eos_ids = () if params.ignore_eos else self.eos_ids
        request = Request(
            next(self._numbers),
            list(prompt_ids),
            length,
            length + params.max_tokens,
            params,
            frozenset((*eos_ids, *params.stop_token_ids)),
            on_event,
            beams,
        )
        pages = self._scheduler.pages_for(request)
        if pages > self._pool.num_pages:
            wish = "" if beams is None else f" for each of {beams.num_beams} beams"
            raise ValueError(
                f"{length} tokens of the prompt and max_tokens={params.max_tokens}{wish} need "
                f"{pages} pages of {self._runner.page_size} tokens, but the cache has "
                f"{self._pool.num_pages}: shorten the prompt, lower max_tokens, or give the cache "
                f"more memory"
            )
        return request

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        vocabulary = self._runner.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"{name}: {token} is no token id of this model, which has {vocabulary}"
                )

    def _checked(self, prompt_ids: Sequence[int]) -> list[int]:
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        self._check_ids("prompt", prompt_ids)
        return list(prompt_ids)

    def _cancel(self, request: Request) -> None:
        if self._waiting.cancel(request):
            request.end(request.finished("cancelled"))

    @torch.inference_mode()
    def _loop(self) -> None:
        while not self._waiting.closed:
            self._last_beat = time.monotonic()
            if self._scheduler.running or len(self._waiting):
                self._step()
            else:
                self._waiting.wait(IDLE_SECONDS)
        running = self._scheduler.reset()
        for request in (*running, *self._waiting.close()):
            request.end(Failed(ClosedError("the engine was closed while this request ran")))

    def _step(self) -> None:
        """Advance everything that runs, after what was cancelled has gone."""
        try:
            self._drop_cancelled()
            plan = self._scheduler.schedule()
            if plan is not None:
                self._stepper.run(plan)
                self._failed_steps = 0
        # Whatever went wrong ends this step's requests only: the others' turn comes.
        except Exception as error:
            self._recover(error)

    def _drop_cancelled(self) -> None:
        for request in self._waiting.cancelled():
            if self._scheduler.runs(request):
                self._cancellations += 1
                self._scheduler.drop(request)
                request.end(request.finished("cancelled"))
            elif not request.ended:  # preempted since, it waits again
                self._cancel(request)

    def _recover(self, error: Exception) -> None:
        """The cache is begun anew: what a failed step has written cannot be relied on."""
        logger.exception("a step failed")
        self._failed_steps += 1
        lost = self._scheduler.reset()
        try:
            self._runner.reset()
        except Exception:
            logger.exception("the cache could not be made anew")
            self._failed_steps = MAX_FAILED_STEPS
        for request in lost:
            request.end(Failed(error))
