"""Beam search within a batch: beams share pages, copied on write.

A search is never preempted: it is admitted once there are pages for its worst case, and keeps them
until it ends. Beams share the prompt, so this is little more than it will use.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.engine.page_pool import PagePool
from gptj.engine.request import Request
from gptj.engine.runners.base import Ints, PageCopy
from gptj.engine.runners.transfer import to_device
from gptj.generation import Beams
from gptj.sampling import adjust

Floats = npt.NDArray[np.float32]


def pages_needed(prompt_length: int, max_length: int, width: int, page_size: int) -> int:
    """The prompt's full pages once, and all other pages for each beam."""
    shared = prompt_length // page_size
    return shared + width * (-(-max_length // page_size) - shared)


class BeamSearch:
    """One request's W beams: their pages, and the tokens to feed to the next step.

    Args:
        pages: the prompt's; each beam copies the last one unless it is full.
        spare: pages for everything the beams may write.
        max_pages: most pages of a sequence.
    """

    def __init__(
        self,
        request: Request,
        pages: Sequence[int],
        spare: list[int],
        pool: PagePool,
        page_size: int,
        max_pages: int,
    ) -> None:
        assert request.beams is not None
        width = request.beams.num_beams
        full = request.prompt_length // page_size
        self.request = request
        self.width = width
        self.position = request.prompt_length - 1  # last computed position, before the first step
        self.ids: Ints = np.zeros(width, dtype=np.int32)
        self.table: Ints = np.zeros((width, max_pages), dtype=np.int32)
        self.table[:, : len(pages)] = pages
        self._beams = Beams(
            request.tokens,
            width,
            request.params.max_tokens,
            set(request.stop_ids),
            request.beams.length_penalty,
            request.beams.early_stopping,
        )
        self._pool = pool
        self._page_size = page_size
        self.pages = list(pages[:full])  # the prompt's full pages, shared by all beams
        self._tails = [list(pages[full:]) for _ in range(width)]
        for tail in self._tails[1:]:
            pool.share(tail)
        self._spare = spare

    @property
    def open(self) -> bool:
        """Whether a better result is still possible."""
        return self._beams.open

    @property
    def candidates(self) -> int:
        """Candidates that a step needs per beam."""
        return self._beams.candidates

    @property
    def outputs(self) -> list[list[int]]:
        """Each beam's output so far."""
        return [beam.output for beam in self._beams.running]

    def results(self) -> tuple[tuple[int, ...], ...]:
        assert self.request.beams is not None
        return tuple(map(tuple, self._beams.best(self.request.beams.num_results)))

    def prepare(self) -> list[PageCopy]:
        """Give each beam its own page for its next position; returns the copies to make."""
        copies = []
        place, filled = divmod(self.position, self._page_size)
        for beam, tail in enumerate(self._tails):
            if len(self.pages) + len(tail) == place:
                tail.append(self._spare.pop())
            elif self._pool.references(tail[-1]) > 1:
                copies.append(PageCopy(tail[-1], self._spare.pop(), filled))
                self._pool.release(tail[-1:])
                tail[-1] = copies[-1].target
            self.table[beam, place] = tail[-1]
        return copies

    def step(self, logprobs_WK: Floats, ids_WK: Ints) -> None:
        """Keep the best continuations, given each beam's most likely tokens.

        The first step has a single row, the prompt's.
        """
        if len(logprobs_WK) < self.width:
            logprobs_WK = logprobs_WK.repeat(self.width, axis=0)
            ids_WK = ids_WK.repeat(self.width, axis=0)
        scores_W = np.array([beam.score for beam in self._beams.running], dtype=np.float32)
        totals = (logprobs_WK + scores_W[:, None]).ravel()
        order = np.argsort(-totals, kind="stable")[: self.candidates]
        beams, tokens = order // logprobs_WK.shape[1], ids_WK.ravel()[order]
        self._beams.step(
            list(zip(totals[order].tolist(), beams.tolist(), tokens.tolist(), strict=True))
        )
        self.position += 1
        if self.open:
            self._follow([beam.origin for beam in self._beams.running])
            self.ids[:] = [beam.output[-1] for beam in self._beams.running]

    def release(self) -> None:
        """Release all pages."""
        for tail in self._tails:
            self._pool.release(tail)
        self._pool.release(self.pages)
        self._pool.release(self._spare)

    def _follow(self, origins: list[int]) -> None:
        """Give each beam the pages of the beam that it extends."""
        if origins == list(range(self.width)):
            return
        free = self._pool.free
        before, self._tails = self._tails, [list(self._tails[origin]) for origin in origins]
        for tail in self._tails:
            self._pool.share(tail)
        for tail in before:
            self._pool.release(tail)
        self._spare += self._pool.take(self._pool.free - free)
        self.table = self.table[origins]


def likeliest(
    logits_WV: Tensor, searches: Sequence[tuple[BeamSearch, int]], banned: Tensor
) -> tuple[Floats, Ints]:
    """Each row's most likely next tokens and their logprobs, both (W, K).

    Args:
        logits_WV: modified in place.
        searches: each with its number of rows, in order.
        banned: ids to mask to -inf.
    """
    logits_WV[:, banned] = -torch.inf
    logprobs_WV = logits_WV.log_softmax(dim=-1)
    row = 0
    held: list[tuple[int, int]] = []  # rows, and stop ids that min_tokens holds back there
    for search, rows in searches:
        request = search.request
        if _needs_adjusting(search):
            for number, output in enumerate(search.outputs[:rows], start=row):
                logprobs_WV[number] = adjust(
                    logprobs_WV[number],
                    request.params,
                    request.tokens,
                    output,
                    list(request.stop_ids),
                )
        elif len(search.outputs[0]) < request.params.min_tokens:
            held += product(range(row, row + rows), request.stop_ids)
        row += rows
    if held:
        rows_N, ids_N = to_device(np.array(held).T.copy(), logprobs_WV.device)
        logprobs_WV[rows_N, ids_N] = -torch.inf
    count = max(search.candidates for search, _ in searches)
    top = logprobs_WV.topk(min(count, logprobs_WV.shape[-1]))
    return top.values.numpy(force=True), top.indices.numpy(force=True).astype(np.int32)


def _needs_adjusting(search: BeamSearch) -> bool:
    """Whether more than stop ids must be adjusted, row by row."""
    params = search.request.params
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words_ids)
    )
