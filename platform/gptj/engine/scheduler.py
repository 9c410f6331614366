"""Decides which tokens the next step computes and on which pages. No tensors, no model.

Every running sequence decodes in every step (several tokens with speculation); the rest of the
token budget goes to prompts, in order of arrival. When pages run out, the newest request is
preempted and requeued.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptj.engine.beam_search import BeamSearch, pages_needed
from gptj.engine.decode_batch import DecodeBatch, Sequence
from gptj.engine.pacing import PrefillPacer
from gptj.engine.page_pool import PagePool, extend_digests
from gptj.engine.request import Request
from gptj.engine.runners.base import Ints, PageCopy, StepBatch
from gptj.engine.runners.lora import NONE
from gptj.engine.speculation import Drafts, Speculator
from gptj.workers.bounded_queue import BoundedQueue


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt, or of a preempted request, to prefill: positions start to end - 1."""

    sequence: Sequence
    start: int
    end: int
    logits: range  # its rows of the step's logits

    @property
    def last(self) -> bool:
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class ScheduledStep:
    """One step. Logits rows: decoding sequences with drafts, then beams, then chunks."""

    batch: StepBatch
    copies: list[PageCopy]  # to perform before the step
    decoding: int  # logits rows of decoding sequences: one each, plus one per draft token
    drafts: Drafts
    searches: list[BeamSearch]
    chunks: list[Chunk]


class Scheduler:
    """Holds the running sequences and admits requests from the queue as they fit.

    Args:
        left: called with each request that leaves the decode batch.
        max_length: most positions of a sequence.
        max_num_seqs: most running sequences.
        max_num_batched_tokens: most new tokens in a step.
        speculator: proposes drafts; None: each decoding sequence computes one token per step.
        pacer: limits prompts' tokens in steps that also decode; None: all of the budget.
    """

    def __init__(
        self,
        pool: PagePool,
        queue: BoundedQueue[Request],
        left: Callable[[Request], None],
        *,
        page_size: int,
        max_length: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculator: Speculator | None = None,
        pacer: PrefillPacer | None = None,
    ) -> None:
        # Every running sequence must be able to decode in every step.
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs must be in [1, max_num_batched_tokens={max_num_batched_tokens}], "
                f"got {max_num_seqs}"
            )
        self.running = 0  # sequences: all beams, and all samples of prompts in prefill
        self.preemptions = 0
        self.prefix_asked = 0  # tokens
        self.prefix_hit = 0
        self.max_num_seqs = max_num_seqs
        self.decode_batch = DecodeBatch(max_num_seqs, -(-max_length // page_size), page_size)
        self._pool = pool
        self._queue = queue
        self._left = left
        self._speculator = speculator
        self._pacer = pacer
        self._page_size = page_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._counting = np.arange(max_num_batched_tokens + 1, dtype=np.int32)
        self._places: dict[Request, Sequence | BeamSearch] = {}
        self._prefilling: list[Sequence] = []  # in order of arrival
        self._searches: list[BeamSearch] = []
        self._forked: list[Sequence] = []  # may share the page they write next

    def pages_for(self, request: Request) -> int:
        """The most pages that a request can need."""
        return pages_needed(
            request.prompt_length, request.max_length, request.width, self._page_size
        )

    def schedule(self) -> ScheduledStep | None:
        """The next step; None if nothing runs and nothing can be admitted."""
        copies = self._give_pages()
        for search in self._searches:
            copies += search.prepare()
        beams = sum(search.width for search in self._searches)
        budget = self._max_num_batched_tokens - len(self.decode_batch) - beams
        drafts = self._drafts(budget // 2)  # prompts get the other half
        decoding = len(self.decode_batch) + sum(map(len, drafts.values()))
        chunks = self._chunks(self._max_num_batched_tokens - decoding - beams, decoding + beams)
        if not (decoding or beams or chunks):
            return None
        searches = list(self._searches)
        batch = self._batch(slice(len(self.decode_batch)), 0, drafts, searches, chunks)
        return ScheduledStep(batch, copies, decoding, drafts, searches, chunks)

    def schedule_ahead(self, rows: Ints) -> ScheduledStep | None:
        """The step after the one whose tokens are being sampled; None if it must wait for them.

        It must if it may have beams or drafts, or if pages have to be copied or taken from a
        request. None, too, if all sequences end and nothing can be admitted.

        Args:
            rows: those of the decode batch that do not end for certain. Their ids are not known.
        """
        if self._searches or self._forked or self._speculator is not None:
            return None
        batch = self.decode_batch
        growing = rows[(batch.positions[rows] + 1) % self._page_size == 0]
        if len(growing) > self._pool.free:
            return None
        for row in growing:
            self._grow(batch.sequences[row])
        budget = self._max_num_batched_tokens - len(rows)
        chunks = self._chunks(budget, len(rows), ending=len(batch) - len(rows))
        if not (len(rows) or chunks):
            return None
        step = self._batch(rows, 1, {}, [], chunks)
        return ScheduledStep(step, [], len(rows), {}, [], chunks)

    def advance(self, drafts: Drafts, tokens: list[int], counts: list[int]) -> None:
        """Feed each row's last token next, after sampling `counts` tokens per row."""
        batch = self.decode_batch
        batch.advance(tokens, counts)
        if self._speculator is not None and drafts:
            self._speculator.note(batch, drafts, [count - 1 for count in counts])
            for row in drafts:
                self._settle(batch.sequences[row])

    def note_duration(self, step: ScheduledStep, seconds: float) -> None:
        """Learn from the time between the tokens before a step and its own."""
        if self._pacer is not None and step.chunks and (step.decoding or step.searches):
            self._pacer.note(sum(chunk.end - chunk.start for chunk in step.chunks), seconds)

    def note_computed(self, chunk: Chunk) -> None:
        chunk.sequence.computed = chunk.end
        self._register(chunk.sequence)

    def decode(self, sequence: Sequence) -> None:
        """After prefill: each of the prompt's samples decodes in its own row, sharing pages."""
        self._prefilling.remove(sequence)
        first, *others = sequence.samples
        sequence.samples = [first]
        first.group = None
        self.decode_batch.append(sequence)
        for sample in others:
            sample.group = None
            self._pool.share(sequence.pages)
            if len(sample.digests) < len(first.digests):
                sample.digests = list(first.digests)
            fork = Sequence([sample], list(sequence.pages), sequence.computed, sequence.registered)
            self._places[sample] = fork
            self.decode_batch.append(fork)
            self._forked.append(fork)
        if others:
            self._forked.append(sequence)

    def search(self, sequence: Sequence) -> BeamSearch:
        """After prefill: the prompt's beams take over."""
        self._prefilling.remove(sequence)
        (request,) = sequence.samples
        search = BeamSearch(
            request,
            sequence.pages,
            sequence.spare,
            self._pool,
            self._page_size,
            self.decode_batch.page_table.shape[1],
        )
        self._places[request] = search
        self._searches.append(search)
        return search

    def drop(self, request: Request, *, damaged: bool = False) -> None:
        """Remove a request and release its pages.

        Args:
            damaged: also drop its pages from the prefix cache.
        """
        place = self._places.pop(request)
        self.running -= request.width
        if damaged:
            self._pool.forget(place.pages)
        if isinstance(place, BeamSearch):
            self._searches.remove(place)
            place.release()
        elif place.row >= 0:
            self._leave_row(place, register=not damaged)
            self._pool.release(place.pages)
        else:
            place.samples.remove(request)
            if not place.samples:
                self._prefilling.remove(place)
                self._pool.release(place.pages)
                self._pool.release(place.spare)

    def runs(self, request: Request) -> bool:
        return request in self._places

    def reset(self) -> list[Request]:
        """Drop everything, for a cache reset; returns the requests that were running."""
        lost = list(self._places)
        for request in self.decode_batch.requests:
            self._leave(request)
        self.decode_batch.clear()
        self._places.clear()
        self._prefilling.clear()
        self._searches.clear()
        self._forked.clear()
        self._pool.clear()
        self.running = 0
        return lost

    def _give_pages(self) -> list[PageCopy]:
        """Give each decoding sequence its own page for its next position; returns the copies."""
        copies = []
        needing = self.decode_batch.at_border() + [each for each in self._forked if each.row >= 0]
        self._forked = []
        # Oldest first, so that preempted ones have not been given a page yet.
        for sequence in sorted(needing, key=lambda each: each.number):
            if sequence.row < 0:  # preempted just now
                continue
            place, filled = divmod(int(self.decode_batch.positions[sequence.row]), self._page_size)
            full = place == len(sequence.pages)
            if not full and self._pool.references(sequence.pages[-1]) == 1:
                continue
            while not self._pool.free and sequence.row >= 0:
                self._preempt_newest()
            if sequence.row < 0:
                continue
            if full:
                self._grow(sequence)
                continue
            (page,) = self._pool.take(1)
            copies.append(PageCopy(sequence.pages[-1], page, filled))
            self._pool.release(sequence.pages[-1:])
            sequence.pages[-1] = page
            self.decode_batch.set_last_page(sequence)
        return copies

    def _grow(self, sequence: Sequence) -> None:
        """Give a decoding sequence another page, since its last is full, or will be."""
        (page,) = self._pool.take(1)
        sequence.computed = len(sequence.pages) * self._page_size
        self._register(sequence)
        sequence.pages.append(page)
        self.decode_batch.set_last_page(sequence)

    def _preempt_newest(self) -> None:
        newest = max(self.decode_batch.sequences + self._prefilling, key=lambda each: each.number)
        samples = list(newest.samples)
        for request in samples:
            self.drop(request)
        self.preemptions += len(samples)
        self._queue.put_back(samples)

    def _leave_row(self, sequence: Sequence, *, register: bool) -> None:
        self.decode_batch.remove(sequence)
        if register:
            self._register(sequence)
        self._leave(sequence.samples[0])

    def _leave(self, request: Request) -> None:
        if self._speculator is not None:
            self._speculator.forget(request)
        self._left(request)

    def _drafts(self, budget: int) -> dict[int, list[int]]:
        """Drafts of at most `budget` tokens, with pages that would otherwise be unused."""
        if self._speculator is None:
            return {}
        drafts = self._speculator.propose(self.decode_batch, budget)
        for row, draft in list(drafts.items()):
            sequence = self.decode_batch.sequences[row]
            position = int(self.decode_batch.positions[row])
            needed = (position + len(draft)) // self._page_size + 1
            while len(sequence.pages) < needed and self._pool.free:
                sequence.pages += self._pool.take(1)
                self.decode_batch.set_last_page(sequence)
            del draft[len(sequence.pages) * self._page_size - 1 - position :]
            if not draft:
                del drafts[row]
        return drafts

    def _settle(self, sequence: Sequence) -> None:
        """Release pages with only rejected tokens, and cache full ones."""
        sequence.computed = int(self.decode_batch.positions[sequence.row])
        used = -(-sequence.computed // self._page_size)
        self._pool.release(sequence.pages[used:])
        del sequence.pages[used:]
        self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Add pages that have become full to the prefix cache."""
        full = sequence.computed // self._page_size
        if sequence.registered < full and self._pool.caching:
            digests = sequence.samples[0].digests
            extend_digests(digests, sequence.tokens, self._page_size, sequence.samples[0].salt)
            for place in range(sequence.registered, full):
                self._pool.register(sequence.pages[place], digests[place])
            sequence.registered = full

    def _chunks(self, budget: int, logits: int, ending: int = 0) -> list[Chunk]:
        """Prefill `budget` tokens of prompts; their logits follow the first `logits` rows.

        Args:
            ending: see `_admit`.
        """
        if self._pacer is not None and logits:
            budget = min(budget, self._pacer.limit)
        chunks: list[Chunk] = []
        waiting = iter(list(self._prefilling))
        while budget > 0 and (sequence := next(waiting, None) or self._admit(ending)):
            start = sequence.computed
            end = min(start + budget, len(sequence.tokens))
            num_logits = end - start if sequence.scores else int(end == len(sequence.tokens))
            chunks.append(Chunk(sequence, start, end, range(logits, logits + num_logits)))
            budget -= end - start
            logits += num_logits
        self._queue.end_turn()
        return chunks

    def _admit(self, ending: int) -> Sequence | None:
        """Start the first waiting request, with all samples of its prompt, if it fits.

        Args:
            ending: running sequences that end before its step.
        """
        while head := self._head(max(1, self.max_num_seqs - self.running + ending)):
            first = head[0]
            if first.width > self.max_num_seqs - self.running + ending:
                return None
            whole = any(request.scores_prompt for request in head)
            known = [] if whole else self._known_pages(first)
            if not self._fits(first, known, len(head)):
                return None
            # Some may have been cancelled meanwhile.
            if samples := self._queue.take(head):
                return self._start(samples, known, whole)
        return None

    def _head(self, count: int) -> list[Request]:
        """The first waiting request and its group's next ones, at most `count`."""
        requests = self._queue.peek(count)
        if not requests or requests[0].group is None:
            return requests[:1]
        return [request for request in requests if request.group == requests[0].group]

    def _known_pages(self, request: Request) -> list[int]:
        """Its prefix's cached pages; the last token is always computed, for its logits."""
        if not self._pool.caching:
            return []
        extend_digests(request.digests, request.tokens, self._page_size, request.salt)
        return self._pool.find(request.digests[: (len(request.tokens) - 1) // self._page_size])

    def _fits(self, request: Request, known: list[int], samples: int) -> bool:
        """Whether there are enough pages for it and one more for each running sequence."""
        if not self.running:
            return True  # submit refuses requests that can never fit
        needed = -(-len(request.tokens) // self._page_size)
        if request.beams is not None or len(request.tokens) > request.prompt_length:
            # Waiting is cheaper than repeated preemption.
            needed = self.pages_for(request)
        growing = len(self.decode_batch) + sum(
            len(sequence.samples) for sequence in self._prefilling
        )
        reserve = growing + samples - 1
        return needed - len(known) + reserve <= self._pool.free - self._pool.unused(known)

    def _start(self, samples: list[Request], known: list[int], whole: bool) -> Sequence:
        first = samples[0]
        count = -(-len(first.tokens) // self._page_size)
        self._pool.share(known)
        sequence = Sequence(
            samples,
            known + self._pool.take(count - len(known)),
            computed=len(known) * self._page_size,
            registered=len(known),
            scores={request: [] for request in samples if request.scores_prompt},
        )
        if first.beams is not None:
            sequence.spare = self._pool.take(self.pages_for(first) - count)
        if self._pool.caching and not whole:
            self.prefix_asked += len(first.tokens)
            self.prefix_hit += sequence.computed
        now = time.monotonic()
        for request in samples:
            self._places[request] = sequence
            self.running += request.width
            if request.started is None:  # not preempted
                request.started = now
                request.cached = sequence.computed
        self._prefilling.append(sequence)
        return sequence

    def _batch(
        self,
        decoding: Ints | slice,
        ahead: int,
        drafts: Drafts,
        searches: list[BeamSearch],
        chunks: list[Chunk],
    ) -> StepBatch:
        """The step's input.

        Args:
            decoding: rows of the decode batch.
            ahead: added to their positions.
        """
        rows = self.decode_batch
        ids, positions = [rows.ids[decoding]], [rows.positions[decoding] + np.int32(ahead)]
        adapters, tables = [rows.adapters[decoding]], [rows.page_table[decoding]]
        end = count = len(ids[0])
        if not drafts and not searches and not chunks:
            each = self._counting[: count + 1]
            return StepBatch(
                ids[0], positions[0], each, tables[0], each[:count], _used(adapters[0])
            )
        query_start_loc, logits_indices = [self._counting[: count + 1]], [self._counting[:count]]
        if drafts:
            ids[0], positions[0], query_start_loc[0] = _with_drafts(ids[0], positions[0], drafts)
            end = len(ids[0])
            logits_indices[0] = self._counting[:end]
        for search in searches:
            ids.append(search.ids)
            positions.append(np.full(search.width, search.position, dtype=np.int32))
            adapters.append(np.full(search.width, search.request.slot, dtype=np.int32))
            tables.append(search.table)
            query_start_loc.append(self._counting[end + 1 : end + search.width + 1])
            logits_indices.append(self._counting[end : end + search.width])
            end += search.width
        if chunks:
            tables.append(np.zeros((len(chunks), rows.page_table.shape[1]), dtype=np.int32))
        for row, chunk in enumerate(chunks):
            ids.append(np.array(chunk.sequence.tokens[chunk.start : chunk.end], dtype=np.int32))
            positions.append(np.arange(chunk.start, chunk.end, dtype=np.int32))
            adapters.append(np.array([chunk.sequence.samples[0].slot], dtype=np.int32))
            tables[-1][row, : len(chunk.sequence.pages)] = chunk.sequence.pages
            end += chunk.end - chunk.start
            query_start_loc.append(np.array([end], dtype=np.int32))
            logits_indices.append(np.arange(end - len(chunk.logits), end, dtype=np.int32))
        return StepBatch(
            np.concatenate(ids),
            np.concatenate(positions),
            np.concatenate(query_start_loc),
            np.concatenate(tables),
            np.concatenate(logits_indices),
            _used(np.concatenate(adapters)),
        )


def _with_drafts(ids: Ints, positions: Ints, drafts: Drafts) -> tuple[Ints, Ints, Ints]:
    """Insert the drafts' ids and positions after their rows'; also returns each row's start."""
    lengths = np.ones(len(ids), dtype=np.int32)
    for row, draft in drafts.items():
        lengths[row] += len(draft)
    starts = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    ids_T = np.repeat(ids, lengths)
    for row, draft in drafts.items():
        ids_T[starts[row] + 1 : starts[row + 1]] = draft
    within = np.arange(len(ids_T), dtype=np.int32) - np.repeat(starts[:-1], lengths)
    return ids_T, np.repeat(positions, lengths) + within, starts


def _used(adapters_R: Ints) -> Ints | None:
    """Slots of adapters; None if no sequence has one."""
    return adapters_R if (adapters_R != NONE).any() else None
