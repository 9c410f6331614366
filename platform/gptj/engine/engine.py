"""Continuous batching for many callers: prompt ids in, events with the generated ids out.

One thread runs one step after another. Requests join and leave at every step; each step decodes one
token for every running sequence (several with speculation) and prefills a bounded number of prompt
tokens. Equal prefixes, the samples of one prompt, and beams share pages of the KV cache.

Async scheduling: a GPU need not wait for the host. While it computes a step, the host prepares and
launches the next one, whose ids are the sampled tokens on the device, and only then waits for these
tokens. Steps with beams, page copies or preemptions, and all steps of an engine with speculation,
wait for the step before.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from gptj.engine.adapter_slots import Adapter, AdapterSlots
from gptj.engine.core import EngineCore, RequestEvent
from gptj.engine.events import Event, Failed, Finished
from gptj.engine.limits import Limits
from gptj.engine.pacing import PrefillPacer
from gptj.engine.page_pool import PagePool
from gptj.engine.request import BeamParams, OnEvents, Request, Ticket, check_ids
from gptj.engine.runners.base import Runner
from gptj.engine.sampler import Sampler
from gptj.engine.scheduler import Scheduler
from gptj.engine.speculation import MAX_ROWS, TOKEN_COST, Speculation, Speculator
from gptj.engine.stats import EngineStats
from gptj.sampling import SamplingParams
from gptj.workers.bounded_queue import BoundedQueue
from gptj.workers.errors import ClosedError
from gptj.workers.worker_thread import WorkerThread

logger = logging.getLogger(__name__)


class Engine:
    """Generates for concurrent requests, on its own thread.

    Args:
        runner: the model with its cache; used only by the engine's thread until `close`.
        eos_ids: end an output, unless its request ignores them.
        banned_ids: masked to -inf, such as ids without text.
        max_num_seqs: most running sequences; each beam is one. The defaults of this and
            max_num_batched_tokens depend on the runner's device: see Limits.
        max_queued: most waiting requests.
        max_queue_seconds: longest that a request may be expected to wait for those before it; None:
            no limit.
        max_num_batched_tokens: most new tokens in a step, at least max_num_seqs. Longer prompts are
            prefilled in several steps.
        itl_target_seconds: the time between tokens of running streams (inter-token latency) that
            prompts beside them should not exceed; fewer of their tokens are then prefilled in a
            step, which delays their first token. None: max_num_batched_tokens alone limits them.
        prefix_caching: whether to keep unused pages for prompts with the same prefix.
        speculation: propose tokens and verify several per step; None: off. Does not change outputs;
            not used by beam search.
        adapters: the runner's, for statistics.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        eos_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        max_num_seqs: int | None = None,
        max_queued: int = 1024,
        max_queue_seconds: float | None = None,
        max_num_batched_tokens: int | None = None,
        itl_target_seconds: float | None = None,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.eos_ids = tuple(eos_ids)
        self._runner = runner
        self._adapters = adapters
        self._pool = PagePool(runner.num_pages, caching=prefix_caching)
        limits = Limits.of(
            runner.device,
            runner.num_pages * runner.page_size,
            self.context_length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._queue: BoundedQueue[Request] = BoundedQueue(
            max_queued,
            max_queue_seconds,
            room=lambda: self._scheduler.max_num_seqs - self._scheduler.running,
            together=limits.max_num_seqs,
        )
        self._sampler = sampler = Sampler(
            banned_ids, runner.device, runner.config.vocab_size, runner.draw
        )
        self._speculator = None
        if speculation is not None:
            self._speculator = Speculator(
                speculation, TOKEN_COST[runner.device.type], max(MAX_ROWS, limits.max_num_seqs)
            )
        self._scheduler = Scheduler(
            self._pool,
            self._queue,
            lambda request: sampler.remove(request.number),
            page_size=runner.page_size,
            max_length=self.context_length,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            speculator=self._speculator,
            pacer=None
            if itl_target_seconds is None
            else PrefillPacer(itl_target_seconds, limits.max_num_batched_tokens),
        )
        self._core = EngineCore(runner, self._scheduler, sampler, banned_ids)
        self._numbers = itertools.count()
        self._cancelled: deque[Request] = deque()  # while running
        self._cancellations = 0
        self._counting = threading.Lock()
        self._thread = WorkerThread(
            "engine",
            self._queue,
            self._step,
            self._recover,
            busy=lambda: self._scheduler.running > 0,
            finish=self._finish,
        )
        self._thread.start()

    @property
    def max_queued(self) -> int:
        return self._queue.max_queued

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding, possibly more than its tokenizer has ids."""
        return self._runner.config.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._runner.config.n_positions

    @property
    def cache_tokens(self) -> int:
        """Capacity of the cache in tokens."""
        return self._pool.num_pages * self._runner.page_size

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_events: OnEvents,
        adapter: Adapter | None = None,
    ) -> Ticket:
        """Queue a request; any thread may call this.

        Args:
            adapter: of the runner's, held by the caller; the request holds it until its end.
            on_events: called on the engine's thread, so it must be quick. After each step it gets
                all events of the requests submitted with it: for each, PromptLogprobs first, if
                requested, then a TokenEvent per token, and Finished or Failed last. (A request
                cancelled while waiting is Finished on the cancelling thread.)

        Raises:
            ValueError: if the prompt is empty, has ids outside the vocabulary, or can never fit
                the model's context or the cache.
            QueueFullError, ClosedError: see BoundedQueue.put.
        """
        (ticket,) = self.submit_many(prompt_ids, [params], [on_events], adapter)
        return ticket

    def submit_many(
        self,
        prompt_ids: Sequence[int],
        params: Sequence[SamplingParams],
        on_events: Sequence[OnEvents],
        adapter: Adapter | None = None,
    ) -> list[Ticket]:
        """Like submit, for several samples of one prompt: all are queued, or none.

        Samples that run together share the prompt's computation and pages.
        """
        prompt = self._checked(prompt_ids)
        requests = [
            self._request(prompt, each, on_events_, adapter=adapter)
            for each, on_events_ in zip(params, on_events, strict=True)
        ]
        for request in requests:
            request.group = requests[0].number
        self._put(requests)
        return [request.ticket for request in requests]

    def beam_search(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        beams: BeamParams,
        on_events: OnEvents,
        adapter: Adapter | None = None,
    ) -> Ticket:
        """Like submit, but reports one BeamsFound and ignores temperature, top_k, top_p, min_p."""
        if params.max_tokens < 1:
            raise ValueError("beam search needs max_tokens of 1 or more, got 0")
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise ValueError("beam search does not report logprobs: leave them out")
        if params.grammar is not None:
            raise ValueError("grammar does not work with beam search: leave one out")
        if beams.num_beams > self._scheduler.max_num_seqs:  # each is a sequence of the batch
            raise ValueError(
                f"num_beams must be at most max_num_seqs={self._scheduler.max_num_seqs}, "
                f"got {beams.num_beams}"
            )
        request = self._request(self._checked(prompt_ids), params, on_events, beams, adapter)
        self._put([request])
        return request.ticket

    def alive(self, within_seconds: float) -> bool:
        """Whether the engine makes progress; see WorkerThread.alive."""
        return self._thread.alive(within_seconds)

    def close(self) -> None:
        """Stop after the running step; running and waiting requests end as Failed.

        Does not close the runner; its owner may do so afterwards.
        """
        self._fail(self._queue.close(), "the engine was closed before this request's turn")
        self._thread.join()

    def stats(self) -> EngineStats:
        """A snapshot; any thread may call this."""
        speculator = self._speculator
        return EngineStats(
            running=self._scheduler.running,
            waiting=len(self._queue),
            pages_used=self._pool.num_pages - self._pool.free,
            pages_cached=self._pool.cached,
            pages_total=self._pool.num_pages,
            last_batch_size=self._core.last_batch_size,
            steps=self._core.steps,
            tokens_in=self._core.tokens_in,
            tokens_out=self._core.tokens_out,
            prefix_tokens_asked=self._scheduler.prefix_asked,
            prefix_tokens_hit=self._scheduler.prefix_hit,
            preemptions=self._scheduler.preemptions,
            cancellations=self._cancellations,
            constrained_tokens_out=self._sampler.constrained_tokens,
            adapters=0 if self._adapters is None else self._adapters.loaded,
            adapter_evictions=0 if self._adapters is None else self._adapters.evictions,
            mask_wait_ms=round(1000 * self._sampler.mask_wait_seconds),
            spec_decode_num_drafts=speculator.drafts if speculator else 0,
            spec_decode_num_draft_tokens=speculator.draft_tokens if speculator else 0,
            spec_decode_num_accepted_tokens=speculator.accepted_tokens if speculator else 0,
        )

    def _request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        on_events: OnEvents,
        beams: BeamParams | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        length = len(prompt_ids)
        if length + params.max_tokens > self.context_length:
            raise ValueError(
                f"{length} prompt tokens and max_tokens={params.max_tokens} exceed the "
                f"model's context of {self.context_length} tokens: shorten the prompt or lower "
                f"max_tokens"
            )
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("bad_words_ids", itertools.chain.from_iterable(params.bad_words_ids))
        eos_ids = () if params.ignore_eos else self.eos_ids
        request = Request(
            next(self._numbers),
            list(prompt_ids),
            length,
            length + params.max_tokens,
            params,
            frozenset((*eos_ids, *params.stop_token_ids)),
            on_events,
            beams,
            adapter,
        )
        request.ticket = Ticket(request, self._cancel)
        pages = self._scheduler.pages_for(request)
        if pages > self._pool.num_pages:
            each = "" if beams is None else f" for each of {beams.num_beams} beams"
            raise ValueError(
                f"{length} prompt tokens and max_tokens={params.max_tokens}{each} need "
                f"{pages} pages of {self._runner.page_size} tokens, but the cache has "
                f"{self._pool.num_pages}: shorten the prompt, lower max_tokens, or give the cache "
                f"more memory"
            )
        return request

    def _put(self, requests: list[Request]) -> None:
        """Queue them all, or raise what BoundedQueue.put does."""
        for request in requests:
            held = request.adapter is None or request.adapter.hold()
            assert held, "the caller must hold the adapter"
        try:
            self._queue.put(requests)
        except BaseException:
            for request in requests:
                request.end()
            raise

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        check_ids(name, ids, self._runner.config.vocab_size)

    def _checked(self, prompt_ids: Sequence[int]) -> list[int]:
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        self._check_ids("prompt", prompt_ids)
        return list(prompt_ids)

    def _cancel(self, request: Request) -> None:
        if self._queue.remove(request):
            self._count_cancellation()
            request.end()
            self._deliver([(request, Finished("cancelled"))])
        elif not request.ended:
            self._cancelled.append(request)

    def _count_cancellation(self) -> None:
        with self._counting:
            self._cancellations += 1

    def _step(self) -> bool:
        """Drop cancelled requests, then advance the running ones; on the engine's thread."""
        self._drop_cancelled()
        before = self._core.steps
        self._deliver(self._core.step())
        return self._core.steps > before

    def _drop_cancelled(self) -> None:
        for _ in range(len(self._cancelled)):
            request = self._cancelled.popleft()
            if self._scheduler.runs(request):
                self._count_cancellation()
                self._deliver(self._core.cancel(request))
            elif not request.ended:  # preempted since, and waiting again
                self._cancel(request)

    @torch.inference_mode()
    def _recover(self, error: Exception) -> None:
        """Reset the cache, which a failed step may have corrupted."""
        lost = self._core.abort(error)
        try:
            self._runner.reset()
        finally:
            self._deliver(lost)

    def _finish(self) -> None:
        self._deliver(self._core.abort(ClosedError("the engine was closed while this request ran")))
        self._fail(self._queue.close(), "the engine was closed while this request ran")  # preempted
        self._sampler.close()

    def _fail(self, requests: Iterable[Request], reason: str) -> None:
        for request in requests:
            request.end()
            self._deliver([(request, Failed(ClosedError(reason)))])

    def _deliver(self, events: Iterable[RequestEvent]) -> None:
        """Hand each caller all of its events in one call."""
        by_caller: dict[OnEvents, list[tuple[Ticket, Event]]] = {}
        for request, event in events:
            by_caller.setdefault(request.on_events, []).append((request.ticket, event))
        for on_events, own in by_caller.items():
            try:
                on_events(own)
            # A failing callback must not affect other callers.
            except Exception:
                logger.exception("a caller's on_events failed: cancelling its requests")
                for ticket, _ in own:
                    ticket.cancel()
